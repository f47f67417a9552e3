"""A data set's report lists all that is wrong, and writes turned images upright."""

import json
import runpy
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from eomt.data.pictures import ORIENTATION
from eomt.data.sources import Sample, Source
from eomt.data.upright import turn_images

CLASSES = "classes:\n  - {name: road, color: [128, 64, 128], ids: [0]}\n  - {name: car, color: [0, 0, 142], ids: [1]}\n"
WORDS = "data=folder data.images=images data.masks=masks data.classes=classes.yaml data.num_workers=0 --out out".split()


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Calls `scripts/dataset_report.py` in a folder with ten good pairs."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "classes.yaml").write_text(CLASSES)
    for name in "abcdefghij":
        write(tmp_path, name)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["dataset_report.py", *WORDS, *words])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "scripts" / "dataset_report.py"), run_name="__main__")
        return exit.value.code, *capsys.readouterr()

    return call


def write(root, name, size=(24, 16), mask_size=None, orientation=None, mask=1, image_ending="jpg", mask_ending="png"):
    for part in ("images", "masks"):
        (root / part).mkdir(exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[ORIENTATION] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(root / "images" / f"{name}.{image_ending}", exif=exif)
    labels = np.zeros((mask_size or size)[::-1], np.uint8)
    labels[0, 0] = mask
    Image.fromarray(labels).save(root / "masks" / f"{name}.{mask_ending}")


def test_all_faults_are_listed_at_once_with_counts_names_and_values(report, tmp_path):
    write(tmp_path, "a", orientation=6)
    write(tmp_path, "b", mask=7)
    write(tmp_path, "c", mask=9)
    (tmp_path / "masks" / "d.png").unlink()
    write(tmp_path, "d", mask_ending="jpg", orientation=3)  # two faults
    write(tmp_path, "e", mask_size=(12, 16))
    (tmp_path / "images" / "f.jpg").write_bytes(b"half")
    (tmp_path / "masks" / "g.png").unlink()
    write(tmp_path, "h", mask_ending="tif")
    Image.new("L", (3, 3)).save(tmp_path / "masks" / "lonely.png")
    code, out, _ = report()
    assert code == 1
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    faults = [counts["unpaired"], *(part["faults"] for part in counts["splits"].values())]
    found = {}
    for kinds in faults:
        for kind, names in kinds.items():
            found.setdefault(kind, set()).update(names)
    assert found == {
        "images without a mask": {"g"},
        "two files of one name": {"h"},
        "stored turned (EXIF)": {"a", "d"},
        "masks with values of no class": {"b", "c"},
        "lossy masks": {"d"},
        "of another size than their mask": {"e"},
        "unreadable": {"f"},
    }
    values = [part["unknown_values"] for part in counts["splits"].values()]
    assert {key: count for part in values for key, count in part.items()} == {"7": 1, "9": 1}
    for text in ("has the value 7, which no class lists", "--fix-exif writes them", "1 images without a mask: g"):
        assert text in out
    assert "1 (masks without an image)" in out
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert markdown.count("\n- ") == 9


def test_a_whole_data_set_has_exit_code_0(report):
    assert report()[0] == 0


def test_where_no_image_has_a_mask_the_faults_are_the_report(report, tmp_path):
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_label.png"))
    code, out, _ = report()
    assert code == 1 and "10 images without a mask: a, b, c, d, e, f and 4 more" in out
    assert report("data.mask_template={name}_label.png")[0] == 0


# what is seen of the stored pixels, from EXIF's definition of each orientation
SEEN = {
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize("view", ["upright", "stored"])
def test_the_size_of_the_mask_tells_which_view_is_written_and_the_original_stays(tmp_path, orientation, view):
    size = (24, 16)
    write(tmp_path, "a", size, size[::-1] if view == "upright" else size, orientation)
    path = tmp_path / "images" / "a.jpg"
    before, stored = path.read_bytes(), np.asarray(Image.open(path))
    assert turn_images(pair(tmp_path)).written == [str(path.with_suffix(".png"))]
    written = Image.open(path.with_suffix(".png"))
    assert (np.asarray(written) == (SEEN[orientation](stored) if view == "upright" else stored)).all()
    assert written.getexif().get(ORIENTATION, 1) == 1
    assert (tmp_path / "images" / "a.jpg.orig").read_bytes() == before and not path.exists()


def test_fix_exif_leaves_a_data_set_in_which_nothing_is_turned(report, tmp_path):
    write(tmp_path, "a", (24, 16), (16, 24), 6)
    code, out, _ = report("--fix-exif")
    assert code == 0 and "wrote images/a.png" in out.replace(f"{tmp_path}/", "") and "0 broken" in out


@pytest.mark.parametrize("asked", ["upright", "stored"])
def test_half_turns_are_left_alone_until_it_is_said_which_view_is_meant(tmp_path, asked):
    write(tmp_path, "a", orientation=3)
    assert "both views of it (orientation 3) have one size" in turn_images(pair(tmp_path)).left["a"]
    assert not list(tmp_path.rglob("*.orig"))
    stored = np.asarray(Image.open(tmp_path / "images" / "a.jpg"))
    assert turn_images(pair(tmp_path), asked).written
    written = np.asarray(Image.open(tmp_path / "images" / "a.png"))
    assert (written == (np.rot90(stored, 2) if asked == "upright" else stored)).all()


def pair(root):
    return [Sample("a", Source(str(next((root / "images").glob("a.*")))), Source(str(root / "masks" / "a.png")))]


@pytest.mark.parametrize("ending", ["png", "webp", "jpeg"])
def test_turned_images_of_any_format_are_written(tmp_path, ending):
    write(tmp_path, "a", (24, 16), (16, 24), 6, image_ending=ending)
    assert turn_images(pair(tmp_path)).written == [str(tmp_path / "images" / "a.png")]
    assert Image.open(tmp_path / "images" / "a.png").size == (16, 24)
    assert (tmp_path / "images" / f"a.{ending}.orig").exists()


@pytest.mark.parametrize("name", ["a.jpg.orig", "a.png"])
def test_nothing_that_is_there_is_written_over(tmp_path, name):
    write(tmp_path, "a", (24, 16), (16, 24), 6)
    samples = pair(tmp_path)
    (tmp_path / "images" / name).write_text("mine")
    before = samples[0].image.read()
    assert f"{name} is there already" in turn_images(samples).left["a"]
    assert (tmp_path / "images" / name).read_text() == "mine" and samples[0].image.read() == before


def test_a_link_to_a_turned_image_leaves_what_it_points_at(tmp_path):
    write(tmp_path, "a", (24, 16), (16, 24), 6)
    target = tmp_path / "camera.jpg"
    (tmp_path / "images" / "a.jpg").rename(target)
    (tmp_path / "images" / "a.jpg").symlink_to(target)
    before = target.read_bytes()
    assert turn_images(pair(tmp_path)).written
    assert target.read_bytes() == before and (tmp_path / "images" / "a.jpg.orig").read_bytes() == before


@pytest.mark.parametrize(("size", "orientation"), [((24, 16), 1), ((16, 16), 1), ((10, 10), 6)])
def test_a_mask_that_fits_no_view_and_an_upright_image_are_left_alone(tmp_path, size, orientation):
    write(tmp_path, "a", (24, 16), size, orientation)
    done = turn_images(pair(tmp_path))
    assert not done.written and bool(done.left) == (orientation != 1)


def test_fix_exif_is_for_folders(report):
    code, _, errors = report("data.image_template={name}.jpg", "--fix-exif")
    assert code == 2 and "leave the ending out" in errors
