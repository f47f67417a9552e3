"""Exports of COCO, Label Studio and CVAT become masks and a class file that a run reads."""

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from PIL import Image

from eomt.data.folder import folder
from eomt.data.pictures import ORIENTATION

SQUARE = [2, 1, 6, 1, 6, 5, 2, 5]  # columns 2..5, rows 1..4
WIDTH, HEIGHT = 12, 8
AREA = np.zeros((HEIGHT, WIDTH), bool)
AREA[1:5, 2:6] = True


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    """Writes images and an export, and returns exit code, output and error of the script."""
    pytest.importorskip("pycocotools", reason="pip install 'eomt-lora[import]'")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)

    def call(export, *options, images=("a.jpg", "b.jpg"), name="export.json"):
        for image in images:
            (tmp_path / "photos" / image).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "photos" / image)
        text = export if isinstance(export, str) else json.dumps(export)
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(sys, "argv", ["import_masks.py", name, "photos", "out", *options])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "scripts" / "import_masks.py"), run_name="__main__")
        return exit.value.code, *capsys.readouterr()

    return call


def mask(name="a"):
    return np.asarray(Image.open(f"out/masks/{name}.png"))


def classes():
    """Names and values in the class file."""
    return {entry["name"]: entry["ids"] for entry in yaml.safe_load(Path("out/classes.yaml").read_text())["classes"]}


def coco(*annotations, categories=((1, "road"), (2, "car")), images=("a.jpg", "b.jpg")):
    listed = [{"id": k, "file_name": name, "width": WIDTH, "height": HEIGHT} for k, name in enumerate(images)]
    filled = [{"id": k, "image_id": 0, "category_id": 1, "iscrowd": 0} | a for k, a in enumerate(annotations)]
    return {"images": listed, "annotations": filled, "categories": [{"id": k, "name": n} for k, n in categories]}


def uncompressed(area):
    flat = np.concatenate([[0], area.ravel(order="F").astype(int), [2]])
    edges = np.flatnonzero(np.diff(np.where(flat == 2, 1 - flat[-2], flat)))
    return np.diff(np.concatenate([[0], edges])).tolist()


def compressed(area):
    from pycocotools import mask

    return mask.encode(np.asfortranarray(area.astype(np.uint8)))["counts"].decode()


@pytest.mark.parametrize(
    "outline",
    [
        lambda: [SQUARE],
        lambda: {"size": [HEIGHT, WIDTH], "counts": uncompressed(AREA)},
        lambda: {"size": [HEIGHT, WIDTH], "counts": compressed(AREA)},
    ],
    ids=["polygon", "uncompressed", "compressed"],
)
def test_coco_outlines_of_every_kind_become_the_same_mask(place, outline):
    code, out, error = place(coco({"segmentation": outline()}, {"segmentation": [SQUARE], "image_id": 1}))
    assert (code, error) == (0, "") and "Wrote 2 masks" in out
    assert (mask() == AREA).all() and classes() == {"background": [0], "road": [1]}
    assert 'name: "car"' in Path("out/classes.yaml").read_text()  # which has no pixel, in a comment
    data = folder("out/classes.yaml", "photos", "out/masks", img_size=(8, 8), batch_size=1, num_workers=0)
    assert data.val_set.labels(0).max() == 1


@pytest.mark.parametrize("first", [0, 1, 90])
def test_categories_may_begin_at_any_number(place, first):
    place(coco({"segmentation": [SQUARE], "category_id": first}, categories=((first + 1, "b"), (first, "a"))))
    assert classes() == {"background": [0], "a": [1]} and (mask() == AREA).all()


def test_run_lengths_in_coco_text_are_read_as_the_library_reads_them():
    masks = pytest.importorskip("pycocotools.mask", reason="pip install 'eomt-lora[import]'")
    from eomt.data.outlines import counts_in, run_lengths

    for seed in range(20):
        area = np.random.default_rng(seed).random((37, 53)) < (seed + 1) / 22
        text = masks.encode(np.asfortranarray(area.astype(np.uint8)))["counts"].decode()
        assert (run_lengths(counts_in(text), area.shape)(*area.shape) == area).all()


@pytest.mark.parametrize(("on_top", "expected"), [("smaller", 2), ("later", 1)])
def test_of_overlaps_the_smaller_lies_on_top_and_it_is_said(place, on_top, expected):
    small = [3, 2, 5, 2, 5, 4, 3, 4]
    annotations = {"segmentation": [small], "category_id": 2}, {"segmentation": [SQUARE]}
    _, out, _ = place(coco(*annotations), "--on-top", on_top)
    assert mask()[2, 3] == expected and mask()[1, 2] == 1
    assert f"1 with overlapping classes, the {on_top} on top: a.jpg" in out


def test_crowds_and_boxes_are_ignored_below_other_areas_and_told(place):
    crowd = {"size": [HEIGHT, WIDTH], "counts": uncompressed(AREA)}
    box = {"segmentation": [], "bbox": [0, 5, 12, 3]}
    _, out, _ = place(coco({"segmentation": [[2, 1, 4, 1, 4, 5, 2, 5]]}, {"segmentation": crowd, "iscrowd": 1}, box))
    assert mask()[2].tolist() == [0, 0, 1, 1, 255, 255] + [0] * 6 and (mask()[5:] == 255).all()
    assert "1 boxes and ellipses, which outline nothing" in out and "1 crowds" in out


@pytest.mark.parametrize(("choice", "expected"), [("ignore", 255), ("background", 0), ("leave", None)])
def test_pictures_without_an_annotation_are_told_and_become_what_is_asked_for(place, choice, expected):
    export, images = coco({"segmentation": [SQUARE]}), ("a.jpg", "b.jpg", "new.jpg")
    code, out, _ = place(export, "--unannotated", choice, images=images)
    assert code == 0 and f"2 pictures without an annotation ({choice}): b.jpg, new.jpg" in out
    if expected is None:
        assert os.listdir("out/masks") == ["a.png"]
    else:
        assert (mask("b") == expected).all() and (mask("new") == expected).all()


def test_faults_of_pictures_are_listed_and_the_others_are_written(place):
    export = coco(
        {"segmentation": [SQUARE]},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [1, 2]}, "image_id": 1},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "zz\x7f"}, "image_id": 2},
        {"segmentation": [[1, 1, 2, float("inf"), 3, 3]], "image_id": 3},
        images=("a.jpg", "b.jpg", "c.jpg", "d.jpg", "gone.jpg", "e.jpg"),
    )
    export["images"][5]["width"] = 99
    code, _, error = place(export, images=[f"{name}.jpg" for name in "abcde"])
    assert code == 1 and "5 pictures of the export without a mask" in error and os.listdir("out/masks") == ["a.png"]
    for text in (
        "run lengths fill 3 pixels, not the 8x12",
        "c.jpg: compressed run lengths hold 'z'",
        "gone.jpg is not among the images",
    ):
        assert text in error
    assert "e.jpg is 8x12, in the export 8x99" in error and "x and y of each" in error


def test_polygons_without_an_area_are_left_out_and_told(place):
    code, out, _ = place(coco({"segmentation": [SQUARE, [1, 1, 2, 2]]}, {"segmentation": [[3, 3, 4, 4]]}))
    assert code == 0 and "2 shapes without an area" in out and (mask() == AREA).all()


def test_images_are_found_in_sub_folders_by_path_or_by_their_only_name(place):
    export = coco(
        {"segmentation": [SQUARE]},
        {"segmentation": [SQUARE], "image_id": 1},
        {"segmentation": [SQUARE], "image_id": 2},
        images=("one/a.jpg", "/data/two/a.jpg", "C:\\tmp\\my%20b.jpg"),
    )
    code, _, error = place(export, images=("one/a.jpg", "two/a.jpg", "sub/my b.jpg"))
    assert (code, error) == (0, "")
    assert all((mask(name) == AREA).all() for name in ("one/a", "two/a", "sub/my b"))


@pytest.mark.parametrize("upright", [True, False])
def test_of_turned_images_the_view_that_was_annotated_gets_the_mask(place, tmp_path, upright):
    export = coco({"segmentation": [SQUARE]}, images=("t.jpg",))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (HEIGHT, WIDTH) if upright else (WIDTH, HEIGHT)).save(tmp_path / "photos" / "t.jpg", exif=exif)
    code, out, _ = place(export, images=())
    assert code == 0 and mask("t").shape == (HEIGHT, WIDTH)
    assert "1 images stored turned, which a run refuses: t.jpg" in out and "--fix-exif" in out


def brush(area):
    """Label Studio's run lengths of a mask, as its editor writes them: each value by itself, in words of 8 bits."""
    values = np.repeat(area.ravel(), 4).astype(int) * 255
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    place = 0
    while place < len(values):
        run = 1
        while place + run < len(values) and values[place + run] == values[place] and run < 256:
            run += 1
        bits += f"1{2:02b}{run - 1:08b}{values[place]:08b}" if run > 1 else f"0{0:02b}{0:03b}{values[place]:08b}"
        place += run
    bits += "0" * (-len(bits) % 8)
    return [int(bits[k : k + 8], 2) for k in range(0, len(bits), 8)]


def region(kind, label, **value):
    return {"original_width": WIDTH, "original_height": HEIGHT, "value": {kind: [label]} | value, "type": kind}


POINTS = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in zip(SQUARE[::2], SQUARE[1::2], strict=True)]


def test_label_studio_polygons_brushes_and_boxes(place):
    results = [
        [region("polygonlabels", "Car", points=POINTS)],
        [region("brushlabels", "Road", format="rle", rle=brush(AREA))],
        [region("rectanglelabels", "Car", x=0, y=50, width=50, height=50, rotation=0)],
    ]
    files = ("/data/upload/3/0a1b2c3d-a.jpg", "/data/local-files/?d=photos/b.jpg", "s3://bucket/c.jpg?x=1")
    tasks = [
        {"id": k, "data": {"image": file}, "annotations": [{"was_cancelled": True, "result": []}, {"result": result}]}
        for k, (file, result) in enumerate(zip(files, results, strict=True))
    ]
    code, out, error = place(tasks, images=("a.jpg", "b.jpg", "c.jpg"))
    assert (code, error) == (0, "") and classes() == {"background": [0], "Car": [1], "Road": [2]}
    assert (mask("a") == AREA).all() and (mask("b") == 2 * AREA).all()
    assert (mask("c")[4:, :6] == 255).all() and (mask("c") == 0).sum() == 72 and "1 boxes" in out


def test_label_studios_short_json_is_read_too(place):
    tasks = [
        {
            "image": "/data/upload/1/a.jpg",
            "id": 1,
            "tag": [{"points": POINTS, "polygonlabels": ["x"], "original_width": WIDTH, "original_height": HEIGHT}],
        }
    ]
    assert place(tasks)[0] == 0 and (mask() == AREA).all()


def test_cvat_polygons_masks_and_boxes(place):
    rows = "2,2,10,2"  # in a box of 4 x 4: the second half of the first row and the last two pixels
    text = f"""<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>
      <meta><job><labels><label><name>car</name></label><label><name>road</name></label></labels></job></meta>
      <image id="0" name="a.jpg" width="{WIDTH}" height="{HEIGHT}">
        <polygon label="road" z_order="1" points="2.0,1.0;6.0,1.0;6.0,5.0;2.0,5.0"></polygon>
        <tag label="car"></tag></image>
      <image id="1" name="sub/b.jpg" width="{WIDTH}" height="{HEIGHT}">
        <mask label="car" rle="{rows}" left="2" top="1" width="4" height="4" z_order="0"></mask>
        <box label="car" xtl="8" ytl="0" xbr="12" ybr="8"></box><points label="car" points="1,1"></points></image>
    </annotations>"""
    code, out, error = place(text, name="annotations.xml", images=("a.jpg", "sub/b.jpg"))
    assert (code, error) == (0, "") and classes() == {"background": [0], "car": [1], "road": [2]}
    assert (mask() == 2 * AREA).all()
    assert mask("sub/b")[1].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 255, 255, 255, 255]
    assert mask("sub/b")[4, 4:6].tolist() == [1, 1] and "1 boxes" in out and "1 shapes without an area" in out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{}", "it has no images, annotations and categories"),
        ("[]", "it is an empty list"),
        ('{"images": [{}], "annotations": [], "categories": []}', "lacks what such an export has"),
        ("[" * 100_000, "nested too deeply"),
        ("no", "export.json: Expecting value"),
        ("<a/>", "its first tag is a, not annotations"),
        ("<annotations><track/></annotations>", "tracks of a video"),
        ("<!DOCTYPE x [<!ENTITY a 'b'>]><annotations/>", "defines entities"),
        ("<annotations>", "cannot be read"),
        (coco(images=("x.jpg",)), "No picture of the export is in photos; the first: x.jpg is not among the images"),
        (coco(), "No picture of the export has an area"),
        (coco({"segmentation": [SQUARE], "category_id": 7}), "of category 7, which is not listed"),
        (coco({"segmentation": [SQUARE], "image_id": 7}), "of image 7, which is not listed"),
    ],
)
def test_what_is_no_export_is_a_sentence_and_leaves_nothing(place, text, sentence, tmp_path):
    code, out, error = place(text)
    assert (code, out) == (1, "") and sentence in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_left_alone(place, tmp_path):
    (tmp_path / "out").mkdir()
    code, _, error = place(coco({"segmentation": [SQUARE]}))
    assert code == 1 and "out is there already" in error and not list((tmp_path / "out").iterdir())


def test_without_the_library_it_is_said_what_to_install(tmp_path, monkeypatch):
    from eomt.data.annotations import read_export

    monkeypatch.setitem(sys.modules, "pycocotools", None)
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(ImportError, match=r"pip install 'eomt-lora\[import\]'"):
        read_export(tmp_path / "export.json")
