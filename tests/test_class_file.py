"""`scripts/dataset_report.py --init` describes masks in a class file that a run accepts."""

import runpy
import sys

import numpy as np
import pytest
import yaml
from conftest import ROOT
from PIL import Image

from eomt.data.folder import folder
from eomt.indices import IGNORE

ROAD, CAR, BLACK = [128, 64, 128], [0, 0, 142], [0, 0, 0]


@pytest.fixture
def init(tmp_path, monkeypatch, capsys):
    """Writes masks beside images, and returns exit code, YAML and errors of `--init`."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)

    def call(*masks, ending="_mask.png", options=("data.mask_template={name}_mask.png",), **save):
        for k, mask in enumerate(masks):
            for part in ("images", "masks"):
                (tmp_path / part / "sub").mkdir(parents=True, exist_ok=True)
            picture = mask if isinstance(mask, Image.Image) else Image.fromarray(np.asarray(mask, np.uint8))
            picture.save(tmp_path / "masks" / "sub" / f"{k}{ending}", **save)
            Image.new("RGB", picture.size).save(tmp_path / "images" / "sub" / f"{k}.jpg")
        words = ["dataset_report.py", "--init", "images", "masks", *options]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "scripts" / words[0]), run_name="__main__")
        return exit.value.code, *capsys.readouterr()

    return call


def labels(text, tmp_path):
    """The label maps that a run reads with this class file."""
    (tmp_path / "classes.yaml").write_text(text)
    places = {"classes": "classes.yaml", "images": "images", "masks": "masks", "mask_template": "{name}_mask"}
    data = folder(**places, img_size=(8, 8), batch_size=1, num_workers=0)
    sets = (data.train_set, data.val_set)
    return {part.names[k]: part.labels(k).tolist() for part in sets for k in range(len(part))}


def test_ids_become_classes_and_255_is_ignored(init, tmp_path):
    code, text, errors = init([[0, 0, 7, 255]], [[0, 0, 0, 26]])
    content = yaml.safe_load(text)
    assert (code, errors) == (0, "")
    assert [(entry["name"], entry["ids"]) for entry in content["classes"]] == [
        ("class_0", [0]),
        ("class_1", [7]),
        ("class_2", [26]),
    ]
    assert content["ignore_ids"] == [255]
    assert "ids: [0]} # 62.5 % of the pixels, in 2 masks" in text and "# neither trained on nor counted; 12.5 %" in text
    assert "# 0 is often the background" in text
    assert labels(text, tmp_path) == {"sub/0": [[0, 0, 1, IGNORE]], "sub/1": [[0, 0, 0, 2]]}


def test_colours_become_classes_of_their_own_colour(init, tmp_path):
    code, text, _ = init([[ROAD, CAR]], [[BLACK, CAR]])
    classes = yaml.safe_load(text)["classes"]
    assert code == 0 and [entry["color"] for entry in classes] == [BLACK, CAR, ROAD]
    assert "# [0, 0, 0] is often the background" in text and "ignore_rgb: [[0, 0, 0]]" in text
    assert labels(text, tmp_path) == {"sub/0": [[2, 1]], "sub/1": [[0, 1]]}


def test_0_and_255_alone_are_two_classes_and_it_is_said(init, tmp_path):
    _, text, _ = init([[0, 255]], [[0, 0]])
    assert "so 255 is a class here" in text and "ignore_ids" not in yaml.safe_load(text)
    assert labels(text, tmp_path)["sub/0"] == [[0, 1]]


def test_a_palette_gives_its_colours_to_the_ids(init, tmp_path):
    picture = Image.fromarray(np.array([[0, 3]], np.uint8), "P")
    picture.putpalette([v for k in range(256) for v in (k, 255 - k, 9)])
    _, text, _ = init(picture, picture)
    assert yaml.safe_load(text)["classes"][1] == {"name": "class_1", "color": [3, 252, 9], "ids": [3]}
    assert labels(text, tmp_path)["sub/0"] == [[0, 1]]


@pytest.mark.parametrize("mode", ["1", "I;16"])
def test_masks_of_other_depths_are_described(init, tmp_path, mode):
    values = np.array([[0, 1]], np.uint16)
    picture = Image.fromarray(values.astype(bool)) if mode == "1" else Image.fromarray(values)
    _, text, _ = init(picture, picture)
    assert labels(text, tmp_path)["sub/0"] == [[0, 1]]


def test_what_cannot_be_read_or_has_no_partner_goes_to_standard_error(init, tmp_path):
    init([[0, 1]], [[0, 1]], [[0, 1]])
    (tmp_path / "masks" / "sub" / "1_mask.png").write_bytes(b"half")
    (tmp_path / "masks" / "sub" / "2_mask.png").unlink()
    code, text, errors = init()
    assert code == 1 and "1 masks could not be read" in text and len(yaml.safe_load(text)["classes"]) == 2
    assert "1 images without a mask, the first: images/sub/2.jpg has no mask in masks" in errors
    assert "1 masks that cannot be read, the first: masks/sub/1_mask.png cannot be decoded" in errors


@pytest.mark.parametrize(
    ("masks", "sentence"),
    [
        (([[0]], [[ROAD]]), "1 of ids (masks/sub/0_mask.png) and 1 of colours (masks/sub/1_mask.png): a class file"),
        (([[[r, g, 0] for r in range(20)] for g in range(20)],), "400 colours, more than 254 classes"),
        ((Image.fromarray(np.array([[300]], np.uint16)),), "has the value 300, label values are 0..255"),
        ((Image.new("LA", (2, 2)),), "has mode LA, which is neither ids nor RGB"),
    ],
)  # fmt: skip
def test_masks_that_no_class_file_describes_are_a_sentence_and_print_nothing(init, masks, sentence):
    code, text, errors = init(*masks)
    assert (code, text) == (2, "") and sentence in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "data.mask_template='{name}_mask' finds masks that are called so"),
        (("data.mask_templat={name}",), "did you mean data.mask_template?"),
        (("data.mask_template={name}_x",), "no picture called {name}_x (data.mask_template), the first is sub/0_"),
    ],
)  # fmt: skip
def test_init_names_the_settings(init, options, sentence):
    code, text, errors = init([[0, 1]], options=options)
    assert (code, text) == (2, "") and sentence in errors
