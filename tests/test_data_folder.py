import numpy as np
import pytest
import yaml
from PIL import Image

from eomt.data.folder import folder, read_classes
from eomt.indices import IGNORE

ROAD, CAR = {"name": "road", "color": [128, 64, 128]}, {"name": "car", "color": [0, 0, 142]}
BY_ID = {"classes": [ROAD | {"ids": [7, 8]}, CAR | {"ids": [26]}], "ignore_ids": [0]}
BY_COLOR = {"classes": [ROAD, CAR | {"rgb": [[0, 0, 142], [0, 0, 70]]}], "ignore_rgb": [[0, 0, 0]]}


@pytest.fixture
def read(tmp_path):
    """Writes a folder dataset of `count` equal masks, reads it, and returns the data module."""

    def write_and_read(content, mask, count=10, **options):
        (tmp_path / "classes.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        write(tmp_path / "images", tmp_path / "masks", mask, count)
        paths = {key: str(tmp_path / key) for key in ("images", "masks")} | {"classes": str(tmp_path / "classes.yaml")}
        return folder(**(paths | {"img_size": (8, 8), "batch_size": 1, "num_workers": 0} | options))

    return write_and_read


def write(images, masks, mask, count):
    mask = np.asarray(mask, dtype=np.uint8)
    for index in range(count):
        image_path, mask_path = images / "city" / f"{index:02d}.jpg", masks / "city" / f"{index:02d}.png"
        if mask_path.exists():
            continue
        for path in (image_path, mask_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*mask.shape[:2], 3), dtype=np.uint8)).save(image_path)
        Image.fromarray(mask).save(mask_path)


def test_several_ids_merge_into_one_class_and_ignored_ones_into_255(read):
    data = read(BY_ID, [[7, 8, 26, 0]])
    assert data.val_set.labels(0).tolist() == [[0, 0, 1, IGNORE]]
    assert data.classes.names == ("road", "car") and data.classes.colors[0] == (128, 64, 128)


def test_colour_masks_take_a_class_own_colour_or_its_list(read):
    mask = [[[128, 64, 128], [0, 0, 142], [0, 0, 70], [0, 0, 0]]]
    assert read(BY_COLOR, mask).val_set.labels(0).tolist() == [[0, 1, 1, IGNORE]]


@pytest.mark.parametrize(
    ("content", "mask", "message"),
    [
        (BY_ID, [[7, 99]], r"city/\d\d\.png has the value 99.*add it to a class or to the ignored values"),
        (BY_COLOR, [[[9, 9, 9]]], r"city/\d\d\.png has the colour \(9, 9, 9\).*classes\.yaml"),
        (BY_COLOR, [[7]], "must be an RGB colour mask"),
        (BY_ID, [[[0, 0, 0]]], "single channel"),
    ],
)
def test_masks_that_do_not_fit_the_yaml_fail_at_construction(read, content, mask, message):
    with pytest.raises(ValueError, match=message):
        read(content, mask)


def test_the_split_follows_its_seed_and_never_overlaps(read):
    def held_out(seed):
        data = read(BY_ID, [[7]], count=20, val_share=0.3, split_seed=seed)
        assert not set(data.train_set.names) & set(data.val_set.names)
        assert (len(data.train_set), len(data.val_set)) == (14, 6)
        return data.val_set.names

    assert held_out(0) == held_out(0)
    assert held_out(0) != held_out(1)


def test_validation_folders_replace_the_split(read, tmp_path):
    write(tmp_path / "vi", tmp_path / "vm", [[26]], 3)
    data = read(BY_ID, [[7]], val_images=str(tmp_path / "vi"), val_masks=str(tmp_path / "vm"))
    assert (len(data.train_set), len(data.val_set)) == (10, 3)
    assert data.val_set.labels(0).tolist() == [[1]]


def test_validation_images_without_masks_folder_are_refused(read):
    with pytest.raises(ValueError, match="go together"):
        read(BY_ID, [[7]], val_images="somewhere")


def test_an_image_without_a_mask_is_an_error_that_names_it(read, tmp_path):
    read(BY_ID, [[7]])
    (tmp_path / "masks" / "city" / "03.png").rename(tmp_path / "masks" / "city" / "other.png")
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images .* 'city/03'"):
        read(BY_ID, [[7]], count=0, images=str(keep(tmp_path / "images", {"02", "03", "04"})))


def keep(root, stems):
    for path in root.rglob("*.jpg"):
        if path.stem not in stems:
            path.unlink()
    return root


@pytest.mark.parametrize("share", [0, 1, 1.5])
def test_impossible_shares_are_refused(read, share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        read(BY_ID, [[7]], val_share=share)


def test_a_first_image_that_is_wrong_says_what_lists_and_mends_the_others(read, tmp_path):
    read(BY_ID, [[7, 8]], count=4, split_by="folder")
    turned = Image.new("RGB", (1, 2))
    turned.getexif()[0x0112] = 6
    for path in sorted((tmp_path / "images").rglob("*.jpg")):
        turned.save(path, exif=turned.getexif())
    with pytest.raises(
        ValueError, match=r"--fix-exif \(2 of 2 pairs looked at are wrong, of 4 in all: scripts/dataset_rep"
    ):
        read(BY_ID, [[7, 8]], count=4)


def test_a_path_of_the_other_kind_is_called_what_it_is(read, tmp_path):
    read(BY_ID, [[7]])
    classes, images = str(tmp_path / "classes.yaml"), str(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match=r"classes\.yaml is a file, a folder is meant \(check data.masks\)"):
        read(BY_ID, [[7]], masks=classes)
    with pytest.raises(FileNotFoundError, match=r"images is a folder; .* MASKS > classes\.yaml` writes one"):
        read(BY_ID, [[7]], classes=images)


def test_missing_files_are_named(read):
    with pytest.raises(FileNotFoundError, match=r"/nowhere: no such folder \(check data.images\)"):
        read(BY_ID, [[7]], images="/nowhere")
    with pytest.raises(FileNotFoundError, match=r"/nowhere\.yaml is not there"):
        read(BY_ID, [[7]], classes="/nowhere.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("classes: [", "no valid YAML"),
        ("- road", "list `classes`"),
        ({"classes": []}, "list `classes`"),
        ({"classes": [ROAD], "ignore": [0]}, "unknown key 'ignore'"),
        ({"classes": ["road"]}, "class 0 must be a mapping"),
        ({"classes": [ROAD | {"id": 7}]}, "unknown key 'id'"),
        ({"classes": [{"color": [0, 0, 0]}]}, "needs a `name`"),
        ({"classes": [{"name": "road"}]}, "needs a `color`"),
        ({"classes": [ROAD | {"color": [0, 0, 256]}]}, "needs a `color`"),
        ({"classes": [ROAD | {"ids": 7}]}, "`ids` must be a list"),
        ({"classes": [ROAD | {"ids": [7], "rgb": [[0, 0, 0]]}]}, "both `ids` and `rgb`"),
        ({"classes": [ROAD | {"ids": [7]}, CAR]}, "'car' has none"),
        ({"classes": [ROAD | {"ids": [7]}, CAR | {"ids": [7]}]}, "value 7 more than once"),
        ({"classes": [ROAD | {"ids": [7]}], "ignore_ids": [7]}, "value 7 more than once"),
        ({"classes": [ROAD | {"ids": [256]}]}, "an id 0..255, got 256"),
        ({"classes": [ROAD | {"ids": [7]}], "ignore_rgb": [[0, 0, 0]]}, "use `ignore_ids`"),
        ({"classes": [ROAD], "ignore_ids": [0]}, "use `ignore_rgb`"),
        ({"classes": [ROAD, ROAD]}, "'road' occurs more than once"),
    ],
)
def test_a_wrong_yaml_is_an_error_that_says_what_is_wrong(read, content, message):
    with pytest.raises(ValueError, match=message):
        read(content, [[7]])


TEXT = yaml.safe_dump({"classes": [{"name": "straße", "color": [1, 2, 3], "ids": [7]}]}, allow_unicode=True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_classes_in_utf_8_are_read_with_and_without_a_mark_at_the_beginning(read, tmp_path, encoding):
    read(BY_ID, [[7]])
    (tmp_path / "classes.yaml").write_bytes(TEXT.encode(encoding))
    assert read_classes(tmp_path / "classes.yaml")[0].names == ("straße",)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32", "shift-jis"])
def test_classes_in_another_encoding_are_an_error_that_names_the_file_and_what_to_do(tmp_path, encoding):
    text = TEXT.replace("ß", "道") if encoding == "shift-jis" else TEXT
    (tmp_path / "classes.yaml").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"classes\.yaml cannot be read: it is no text in UTF-8 .*save it in UTF-8"):
        read_classes(tmp_path / "classes.yaml")


def test_a_tab_in_the_classes_is_an_error_that_names_file_and_line(tmp_path):
    (tmp_path / "classes.yaml").write_text("classes:\n\t- {name: a}\n")
    with pytest.raises(ValueError, match=r"classes\.yaml cannot be read: it is no valid YAML .*line 2"):
        read_classes(tmp_path / "classes.yaml")
