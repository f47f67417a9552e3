"""Images and masks are paired by their names, and a video's frames stand on one side of a split."""

import os

import pytest
from PIL import Image

from eomt.data.folder import splits
from eomt.data.listing import LONELY, OTHER_NAMES
from eomt.data.subsets import hold_out
from eomt.settings.compose import open_data

CLASSES = "classes:\n  - {name: road, color: [128, 64, 128], ids: [0]}\n"


@pytest.fixture
def place(tmp_path):
    """Writes empty pictures of these names and returns what `splits` makes of them."""
    (tmp_path / "classes.yaml").write_text(CLASSES)

    def read(*names, images="images", masks="masks", **options):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(path)
        places = {"images": str(tmp_path / images), "masks": str(tmp_path / masks)}
        return splits(str(tmp_path / "classes.yaml"), **places, **options)

    read.root = tmp_path
    return read


def masks_of(found):
    return {s.name: os.path.basename(s.label.path) for s in sorted((*found.train, *found.val), key=lambda s: s.name)}


@pytest.mark.parametrize(
    ("template", "mask"),
    [
        ("{name}_mask.png", "{}_mask.png"),
        ("{name}_labelIds.png", "{}_labelIds.png"),
        ("{name}_mask", "{}_mask.tif"),
        ("mask-{name}", "mask-{}.PNG"),
        ("{name}.jpg.png", "{}.jpg.png"),
        ("{name}.png", "{}.png"),
    ],
)
def test_masks_are_found_by_their_template_in_sub_folders_too(place, template, mask):
    names = ("a", "x.y", "sub/b")
    masks = [f"masks/{os.path.dirname(n)}/{mask.format(os.path.basename(n))}" for n in names]
    found = place(*(f"images/{n}.jpg" for n in names), *masks, "masks/other.bmp", mask_template=template)
    assert masks_of(found) == {n: os.path.basename(m) for n, m in zip(names, masks, strict=True)}
    assert found.left_out[OTHER_NAMES] + found.left_out[LONELY] == 1


def test_images_have_a_template_too_as_in_cityscapes(place):
    found = place(
        *(f"images/{n}_leftImg8bit.png" for n in "ab"),
        *(f"masks/{n}_gtFine_{kind}.png" for n in "ab" for kind in ("labelIds", "color")),
        image_template="{name}_leftImg8bit",
        mask_template="{name}_gtFine_labelIds.png",
    )
    assert masks_of(found) == {n: f"{n}_gtFine_labelIds.png" for n in "ab"} and found.left_out == {OTHER_NAMES: 2}


@pytest.mark.parametrize("masks", ["images", "images/masks"])
def test_masks_may_lie_among_the_images(place, masks):
    names = [f"{masks}/{n}_mask.png" for n in "ab"]
    found = place("images/a.jpg", "images/b.jpg", *names, masks=masks, mask_template="{name}_mask")
    assert masks_of(found) == {n: f"{n}_mask.png" for n in "ab"}


def test_linked_masks_are_found_by_their_template(place):
    place("images/a.jpg", "images/b.jpg", "masks/a.png", "masks/b.png")
    (place.root / "linked").mkdir()
    for name in "ab":
        (place.root / "linked" / f"{name}_mask.png").symlink_to(place.root / "masks" / f"{name}.png")
    assert masks_of(place(masks="linked", mask_template="{name}_mask.png"))["a"] == "a_mask.png"


@pytest.mark.parametrize("template", ["mask", "{name}{name}", "{name}_{id}.png", "masks/{name}.png", ""])
def test_a_template_must_hold_the_name_once(place, template):
    with pytest.raises(ValueError, match=r"data\.mask_template .*\{name\} in it once"):
        place("images/a.jpg", mask_template=template)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, r"1 of 2 .* the first is 'sub/b'; put .*\(data\.masks\), or take the image away.* "
             r"\(data\.mask_template='\{name\}_mask' finds masks that are called so\)"),
        ({"mask_template": "{name}_labels.png"}, r"no picture called \{name\}_labels\.png \(data\.mask_template\)"),
        ({"images": "none"}, r"none: no such folder \(check data\.images\)"),
        ({"masks": "none"}, r"none: no such folder \(check data\.masks\)"),
        ({"masks": "images"}, r"the same files, .*name another folder in data\.masks, or .*data\.mask_template"),
        ({"val_images": "x"}, r"data\.val_images and data\.val_masks go together"),
    ],
)  # fmt: skip
def test_what_does_not_pair_names_the_settings(place, options, sentence):
    place("images/a.jpg", "masks/a.png", "images/c.jpg", "masks/c.png")
    with pytest.raises((FileNotFoundError, ValueError), match=sentence):
        os.remove(place.root / "images" / "c.jpg")
        place("images/sub/b.jpg", "masks/sub/b_mask.png", **options)


FRAMES = [f"{drive}/left_{k}" for drive in ("d1", "d2", "d3", "d4") for k in range(8, 12)]
SPLIT = {"folder": 4, "sequence": 4, r"(d\d)/": 4, r"d[12]|d[34]": 4}


@pytest.mark.parametrize("split_by", SPLIT)
@pytest.mark.parametrize("seed", range(3))
def test_frames_of_one_sequence_stand_on_one_side(place, split_by, seed):
    names = [f"{part}/{n}.png" for n in FRAMES for part in ("images", "masks")]
    found = place(*names, split_by=split_by, val_share=0.25, split_seed=seed)
    sides = [{s.name.split("/")[0] for s in part} for part in (found.train, found.val)]
    assert not sides[0] & sides[1] and len(found.val) == 4
    kept = hold_out(found.train, 0.3, seed)
    assert not {s.sequence for s in kept[0]} & {s.sequence for s in kept[1]}


def test_of_a_single_sequence_the_last_frames_are_held_out_by_their_numbers(place):
    names = [f"{part}/f{k}.png" for k in range(20) for part in ("images", "masks")]
    found = place(*names, split_by="sequence", val_share=0.2)
    assert [s.name for s in found.val] == ["f16", "f17", "f18", "f19"] and found.train[10].name == "f10"


@pytest.mark.parametrize(
    ("split_by", "sentence"),
    [("folders", r"finds no sequence in the name 'a'; write folder, sequence"), ("(", "no regular expression")],
)
def test_a_split_that_finds_no_sequence_is_an_error(place, split_by, sentence):
    with pytest.raises(ValueError, match=rf"data\.split_by .*{sentence}"):
        place("images/a.png", "masks/a.png", "images/b.png", "masks/b.png", split_by=split_by)


def test_templates_and_expressions_are_given_as_they_are_on_the_command_line(place):
    names = [f"{part}.png" for k in range(3) for part in (f"images/d{k}_1", f"masks/d{k}_1_mask")]
    place(*names, mask_template="{name}_mask")
    paths = [f"data.{key}={place.root / key}" for key in ("images", "masks")]
    words = ["data=folder", *paths, f"data.classes={place.root / 'classes.yaml'}", "data.num_workers=0"]
    _, data = open_data(
        [*words, "data.mask_template={name}_mask.png", r"data.split_by=(d\d+)_", "data.val_share=0.3"], [8, 8], 1
    )
    assert len(data.train_set) == 2 and data.val_set.sequences[0] in ("d0", "d1", "d2")


def test_settings_that_are_missing_are_named_together():
    with pytest.raises(
        ValueError, match=r"data\.classes, data\.masks are required: .*--init IMAGES MASKS writes a class"
    ):
        open_data(["data=folder", "data.images=photos"], [8, 8], 1)
