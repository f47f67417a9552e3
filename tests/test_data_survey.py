"""What is said of the data before a run: one line, and warnings of labels that can teach or judge nothing."""

import os
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from eomt.data.datamodule import SegmentationDataModule
from eomt.data.dataset import SegmentationDataset
from eomt.data.labels import LabelSet
from eomt.data.sources import ColorDecoder, IndexDecoder, Sample, Source
from eomt.indices import IGNORE, OUTLIER

BINARY = LabelSet(("background", "thing"), ((0, 0, 0), (255, 0, 0)))
IDS = IndexDecoder({0: 0, 1: 1, 254: OUTLIER, 255: IGNORE}, "mend it")


@pytest.fixture
def sample(tmp_path):
    """Writes an image of noise, or a given one, and a mask of two rows: a pair of the data set."""

    def write(name, top, bottom, image=None, size=(20, 30)):
        mask = np.empty((*size, *np.shape(top)), np.uint8)
        mask[: size[0] // 2], mask[size[0] // 2 :] = top, bottom
        Image.fromarray(mask).save(tmp_path / f"{name}_mask.png")
        if image is None:
            image = tmp_path / f"{name}.png"
            noise = np.random.default_rng(list(name.encode())).integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(noise).save(image)
        source = image if isinstance(image, Source) else Source(str(image))
        return Sample(name, source, Source(str(tmp_path / f"{name}_mask.png")))

    return write


def data(train, val, classes=BINARY, decoder=IDS):
    sets = (SegmentationDataset(part, classes, decoder) for part in (train, val))
    return SegmentationDataModule(*sets, (16, 16), batch_size=1, num_workers=0)


@pytest.fixture
def said(caplog):
    """The lines that the start of a run logs about its data, and its warnings."""

    def start(*arguments, **options):
        caplog.clear()
        caplog.set_level("INFO")
        module = arguments[0] if isinstance(arguments[0], SegmentationDataModule) else data(*arguments, **options)
        module.check_files()
        kinds = {kind: [r.getMessage() for r in caplog.records if r.levelname == kind] for kind in ("INFO", "WARNING")}
        return kinds["INFO"], kinds["WARNING"]

    return start


def test_one_line_tells_pairs_sizes_classes_and_what_is_ignored(sample, said):
    lines, warnings = said(
        [sample("a", 0, 1), sample("b", 0, 255, size=(40, 30))], [sample("c", 0, 1), sample("d", 255, 255)]
    )
    assert lines == [
        "data: 2 + 2 pairs, images 20x30 to 40x30, 2 of 2 classes with pixels, 1 without a labelled pixel, "
        "40.0 % of the pixels ignored (all 2 + all 2 label maps counted); read all 4 pairs"
    ]
    assert not warnings


def test_the_line_says_by_reason_what_was_left_out(sample, said):
    module = data([sample("a", 0, 1)], [sample("b", 0, 1)])
    module.left_out = {"system files": 3, "without a mask": 0}
    assert said(module)[0][0].startswith("data: 1 + 1 pairs (left out: 3 system files), images 20x30, ")


def test_only_the_first_process_tells(sample, said, monkeypatch):
    monkeypatch.setattr("eomt.data.datamodule.rank_zero_only", SimpleNamespace(rank=1))
    assert said([sample("a", 0, 0)], [sample("b", 0, 1)]) == ([], [])


def test_masks_of_0_and_255_for_classes_0_and_1_are_warned_of_with_the_values_they_hold(sample, said):
    _, (warning,) = said([sample("a", 0, 255)], [sample("b", 0, 255)])
    assert warning == (
        "no pixel of thing in all 1 training and all 1 validation label maps; the training masks hold "
        "0 (50.0 %, background), 255 (50.0 %, ignored); 255 is ignored: if a class is meant by it, list it there "
        "instead"
    )


def test_colours_that_masks_hold_are_named_as_colours(sample, said):
    decoder = ColorDecoder({(9, 8, 7): 0, (1, 2, 3): 1, (0, 0, 0): IGNORE}, "mend it")
    _, (warning,) = said([sample("a", (9, 8, 7), (0, 0, 0))], [sample("b", (9, 8, 7), (1, 2, 3))], decoder=decoder)
    assert "no training pixel of thing in all 1 label maps, but validation pixels" in warning
    assert "hold (9, 8, 7) (50.0 %, background), (0, 0, 0) (50.0 %, ignored)" in warning or (
        "hold (0, 0, 0) (50.0 %, ignored), (9, 8, 7) (50.0 %, background)" in warning
    )


@pytest.mark.parametrize(("split", "value", "meaning"), [("training", 255, "ignored"), ("validation", 254, "outliers")])
def test_a_split_without_any_labelled_pixel_is_an_error_that_shows_its_values(sample, said, split, value, meaning):
    parts = [sample("a", 0, 1)], [sample("b", value, value)]
    with pytest.raises(ValueError, match=rf"The {split} split has no labelled .* {value} \(100\.0 %, {meaning}\)"):
        said(*(parts[::-1] if split == "training" else parts))


def test_a_labelled_pixel_and_a_rare_class_are_searched_beyond_the_first_sample(sample, said, monkeypatch):
    monkeypatch.setattr("eomt.data.survey.IMAGES", 2)
    train = [sample(str(k), 255, 255) for k in range(5)] + [
        sample("r", 0, 1),
        *(sample(f"s{k}", 255, 255) for k in "ab"),
    ]
    monkeypatch.setattr("eomt.data.survey.MASKS", 2)
    (line,), warnings = said(train, [sample("v", 0, 1)])
    assert "(7 of 8 + all 1 label maps counted)" in line and not warnings
    monkeypatch.setattr("eomt.data.survey.MASKS", 8)
    assert "(all 8 + all 1 label maps counted)" in said(train, [sample("v", 0, 1)])[0][0]


def test_of_large_files_fewer_are_read(sample, said, monkeypatch):
    monkeypatch.setattr("eomt.data.survey.BYTES", 10_000)
    monkeypatch.setattr("eomt.data.survey.LEAST", 3)
    (line,), _ = said([sample(str(k), 0, 1) for k in range(12)], [sample("v", 0, 1)])
    assert "(5 of 12 + all 1 label maps counted)" in line


def test_one_class_is_told_to_be_too_few(sample, said):
    classes, decoder = LabelSet(("thing",), ((1, 2, 3),)), IndexDecoder({1: 0, 255: IGNORE}, "mend it")
    _, warnings = said([sample("a", 1, 255)], [sample("b", 1, 255)], classes=classes, decoder=decoder)
    assert len(warnings) == 1 and "'thing' is the only class" in warnings[0] and "background" in warnings[0]


def test_a_class_that_is_lost_in_scaling_to_the_crop_is_warned_of(sample, said):
    small = sample("a", 0, 0, size=(200, 300))
    mask = np.zeros((200, 300), np.uint8)
    mask[101, 151] = 1
    Image.fromarray(mask).save(small.label.path)
    _, (warning,) = said([small], [sample("b", 0, 1)])
    assert warning.startswith("no pixel of thing is left in the training masks looked at, once scaled to the crop")
    assert said([small, sample("c", 0, 1)], [sample("b", 0, 1)])[1] == []


def same_path(image, folder):
    return image


def symbolic_link(image, folder):
    (folder / "link.png").symlink_to(image)
    return folder / "link.png"


def hard_link(image, folder):
    os.link(image, folder / "link.png")
    return folder / "link.png"


def copied(image, folder):
    (folder / "copy.png").write_bytes(image.read_bytes())
    return folder / "copy.png"


def another_format(image, folder):
    Image.open(image).save(folder / "other.bmp")
    return folder / "other.bmp"


@pytest.mark.parametrize("way", [same_path, symbolic_link, hard_link, copied, another_format])
def test_validation_images_that_are_training_images_are_warned_of_once(sample, said, tmp_path, way):
    train = [sample("a", 0, 1), sample("b", 0, 1)]
    val = [sample("c", 0, 1), sample("d", 0, 1, image=way(tmp_path / "b.png", tmp_path))]
    _, warnings = said(train, val)
    assert len(warnings) == 1
    assert warnings[0].startswith("at least 1 of 2 validation images are training images, too (d): ")


def test_members_of_an_archive_are_compared_by_their_checksums(sample, said, tmp_path):
    train, val = [sample("a", 0, 1)], [sample("b", 0, 1)]
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for member, name in (("a.png", "a"), ("again.png", "a"), ("b.png", "b")):
            archive.write(tmp_path / f"{name}.png", member)
    members = [
        sample(name, 0, 1, image=Source(str(tmp_path / "images.zip"), f"{name}.png")) for name in ("a", "again", "b")
    ]
    assert said(members[:1], members[2:])[1] == []
    assert "validation images are training images, too (again)" in said(members[:1], members[1:2])[1][0]
    assert said(train, val)[1] == []


def test_files_of_one_size_and_other_contents_are_other_images(sample, said, tmp_path):
    images = []
    for value in (1, 2):
        images.append(tmp_path / f"{value}.bmp")
        Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(images[-1])
    assert images[0].stat().st_size == images[1].stat().st_size
    assert said([sample("a", 0, 1, image=images[0])], [sample("b", 0, 1, image=images[1])])[1] == []


@pytest.mark.parametrize("limit", [1, 0.5])
def test_a_run_that_validates_on_unlabelled_images_alone_is_refused(sample, limit):
    module = data([sample("a", 0, 1)], [sample("b", 255, 255), sample("c", 0, 1)])
    module.trainer = SimpleNamespace(limit_val_batches=limit, world_size=1)
    with pytest.raises(ValueError, match=rf"limit_val_batches {limit}.* no labelled pixel"):
        module.setup("fit")
    module.trainer.limit_val_batches = 1.0
    module.setup("fit")


def test_of_many_pairs_the_line_says_how_many_were_looked_at(sample, said, monkeypatch):
    monkeypatch.setattr("eomt.data.survey.IMAGES", 2)
    (line,), _ = said([sample(str(k), 0, 1) for k in range(5)], [sample(f"v{k}", 0, 1) for k in range(3)])
    assert line.endswith("; looked at 4 of 8 pairs")


def test_an_error_of_the_sample_says_how_many_pairs_are_wrong(sample, said):
    train = [sample(str(k), 0, 1) for k in range(5)]
    for name in "24":
        sample(name, 0, 77)
    with pytest.raises(ValueError, match=r"2_mask\.png has the value 77.* \(2 of 5 pairs .* scripts/dataset_"):
        said(train, [sample("v", 0, 1)])
    for name in "13":
        os.truncate(train[int(name)].label.path, 40)
    with pytest.raises(ValueError, match=r"1_mask\.png cannot be .* \(2 of 6 pairs looked at are wrong, of 6 in all"):
        said(train, [sample("v", 0, 1)])


def scene(seed, shift=0, size=(120, 160)):
    """Something with light and dark places, smooth as photographs are; another seed is another place."""
    small = np.random.default_rng(seed).integers(0, 256, (12, 20, 3), np.uint8)
    return Image.fromarray(small).resize((2 * size[1], size[0])).crop((shift, 0, shift + size[1], size[0]))


def written(tmp_path, sample, name, picture, **options):
    picture.save(tmp_path / f"{name}.jpg", **options)
    return sample(name, 0, 1, image=Source(str(tmp_path / f"{name}.jpg")), size=(picture.height, picture.width))


def test_lossy_and_smaller_copies_on_both_sides_of_a_split_are_warned_of(sample, said, tmp_path):
    train = [written(tmp_path, sample, f"t{k}", scene(k)) for k in range(5)]
    copies = [
        written(tmp_path, sample, "lossy", scene(1), quality=15),
        written(tmp_path, sample, "small", scene(3).resize((100, 75))),
    ]
    _, (warning,) = said(train, [*copies, *(written(tmp_path, sample, f"v{k}", scene(20 + k)) for k in range(4))])
    assert warning.startswith(
        "at least 2 of the 6 validation images looked at nearly are training images (lossy like t1, small like t3)"
    )
    assert "data.split_by=sequence" in warning


def test_neighbouring_frames_on_both_sides_are_found_among_many(sample, said, tmp_path, monkeypatch):
    monkeypatch.setattr("eomt.data.survey.IMAGES", 4)
    frames = [written(tmp_path, sample, f"f{k}", scene(k // 20, 2 * (k % 20))) for k in range(40)]
    val = [frames[k] for k in (5, 15, 25, 35)]
    _, (warning,) = said([frame for frame in frames if frame not in val], val)
    assert "f5 like f4" in warning and warning.startswith("at least 4 of the 4 ")


def test_images_of_other_places_and_flat_ones_are_no_copies(sample, said, tmp_path):
    pictures = [scene(k) for k in range(30)] + [Image.new("RGB", (160, 120), 40 * k) for k in range(6)]
    samples = [written(tmp_path, sample, f"p{k}", picture) for k, picture in enumerate(pictures)]
    assert not said(samples[::2], samples[1::2])[1]
