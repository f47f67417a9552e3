"""Which files a data set finds in its folders, and what it says of those that it leaves out."""

import os
from zipfile import ZipFile

import pytest
import yaml
from odd_pictures import encoded
from PIL import Image

from eomt.anomaly.cutouts import FolderCutOuts
from eomt.anomaly.datasets import AnomalyDataset
from eomt.data import camvid, cityscapes, folder
from eomt.data.listing import LEFT_BY_SYSTEMS, LISTED_ALREADY, LONELY, OTHER_KINDS, is_left_by_system, list_pictures
from eomt.inference.crops import find_images
from eomt.inference.inputs import find_inputs

PNG = encoded(Image.new("L", (2, 2)), "PNG")
CLASSES = {"classes": [{"name": "a", "color": [1, 2, 3], "ids": [0]}]}
STRAYS = (
    "._im0.png",
    ".hidden.png",
    ".ipynb_checkpoints/im0-checkpoint.png",
    ".thumbnails/im0.png",
    "@eaDir/im0.png",
    "__MACOSX/im0.png",
    ".Trash-1000/im0.png",
    "$RECYCLE.BIN/im0.png",
    "thumbnails/im0.png",
    "Thumbs.db",
    ".DS_Store",
    "desktop.ini",
    "lost+found/im0.png",
)


def put(root, *names, content=PNG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.fixture
def data(tmp_path):
    """A folder of three images and masks."""
    put(tmp_path, *(f"{kind}/s/im{k}.png" for k in range(3) for kind in ("images", "masks")))
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(CLASSES))
    return tmp_path


def splits(root, **options):
    return folder.splits(str(root / "classes.yaml"), str(root / "images"), str(root / "masks"), **options)


def names(found):
    return sorted(sample.name for sample in (*found.train, *found.val))


@pytest.mark.parametrize("stray", STRAYS)
def test_files_that_systems_leave_are_known_by_their_names(stray):
    assert is_left_by_system(stray.split("/")) and is_left_by_system(("s", *stray.upper().split("/")))


@pytest.mark.parametrize("name", ["a.b.png", "thumb.png", "Über/ä.png", "_a.png", "a/~b.png", "trash/a.png"])
def test_other_names_are_pictures(name):
    assert not is_left_by_system(name.split("/"))


def test_what_systems_leave_is_skipped_by_training_prediction_merging_benchmarks_and_cut_outs(tmp_path, data):
    put(data, *(f"{kind}/s/{stray}" for kind in ("images", "masks") for stray in STRAYS))
    found = splits(data)
    assert names(found) == ["s/im0", "s/im1", "s/im2"]
    assert found.left_out == {LEFT_BY_SYSTEMS: 2 * len(STRAYS)}
    assert list(find_inputs(str(data / "images"), tmp_path / "out", False)) == ["s/im0", "s/im1", "s/im2"]
    assert len(find_inputs(str(data / "images" / "**" / "*.png"), tmp_path / "out", False)) == 3
    assert len(find_images([str(data / "images")])) == len(find_images([f"{data}/images/**/*.png"])) == 3
    bench = tmp_path / "RoadAnomaly21"
    put(bench, *(f"{part}/{name}" for part in ("images", "labels_masks") for name in ("im0.png", *STRAYS)))
    assert AnomalyDataset(tmp_path, "road_anomaly_21").frames == ["im0"]
    put(tmp_path / "cut", "a/im0.png", *STRAYS, content=encoded(Image.new("RGBA", (2, 2)), "PNG"))
    assert FolderCutOuts(str(tmp_path / "cut")).files == [tmp_path / "cut" / "a" / "im0.png"]


def test_a_file_or_a_data_set_in_a_hidden_folder_that_was_named_is_read(tmp_path, data):
    hidden = tmp_path / ".cache" / "data"
    hidden.parent.mkdir()
    os.rename(data / "images", hidden)
    assert len(list_pictures(hidden).pictures) == 3
    assert len(find_inputs(str(hidden / "s" / "*.png"), tmp_path / "out", False)) == 3
    os.rename(hidden / "s" / "im0.png", hidden / "s" / ".im0.png")
    assert len(find_inputs(str(hidden / "s" / ".im0.png"), tmp_path / "out", False)) == 1


def test_what_systems_leave_in_the_archives_and_folders_of_cityscapes_is_skipped_and_counted(tmp_path):
    parts = {"leftImg8bit": "_leftImg8bit.png", "gtFine": "_gtFine_labelIds.png"}
    for part, ending in parts.items():
        with ZipFile(tmp_path / f"{part}_trainvaltest.zip", "w") as archive:
            for split in ("train", "val"):
                for name in (f"{part}/{split}/u/", f"{part}/{split}/u/._", f"__MACOSX/{part}/{split}/u/"):
                    archive.writestr(f"{name}u_0_0{ending}", PNG)
    zipped = cityscapes.splits(str(tmp_path))
    assert names(zipped) == ["u_0_0", "u_0_0"] and zipped.left_out == {LEFT_BY_SYSTEMS: 8}
    for part, ending in parts.items():
        put(tmp_path / part, *(f"{split}/u/{stray}u_0_0{ending}" for split in ("train", "val") for stray in ("", "._")))
        put(tmp_path / part, f"train/@eaDir/u_0_0{ending}", "train/u/other.png")
    plain = cityscapes.splits(str(tmp_path))
    assert names(plain) == ["u_0_0", "u_0_0"] and plain.train[0].image.member is None
    assert plain.left_out[LEFT_BY_SYSTEMS] == 6 and plain.left_out[cityscapes.OTHER_NAMES] == 1


def test_camvid_leaves_out_what_is_none_of_its_frames_and_counts_it(tmp_path):
    for split in ("train", "val"):
        put(tmp_path / split, "0001_a.png", "._0001_a.png", "Thumbs.db", "notes.txt", "more/0001_b.png")
        put(tmp_path / f"{split}annot", "0001_a.png", "0001_c.png")
    found = camvid.splits(str(tmp_path))
    assert names(found) == ["0001_a", "0001_a"]
    assert found.left_out == {
        LEFT_BY_SYSTEMS: 4,
        OTHER_KINDS: 2,
        camvid.IN_FOLDERS: 2,
        LONELY: 2,
    }


def test_pictures_in_linked_folders_are_found_by_training_and_prediction(tmp_path, data):
    for kind in ("images", "masks"):
        put(tmp_path / "elsewhere" / kind, *(f"deep/im{k}.png" for k in range(6)))
        (data / kind / "linked").symlink_to(tmp_path / "elsewhere" / kind)
    found = splits(data)
    assert len(names(found)) == 9 and "linked/deep/im5" in names(found) and not found.left_out
    assert len(find_inputs(str(data / "images"), tmp_path / "out", False)) == 9
    assert len(find_images([str(data / "images")])) == 9


def test_links_in_a_circle_end_and_no_picture_is_listed_twice(data):
    (data / "images" / "0").symlink_to(data / "images" / "s")  # its name comes first, but the folder itself counts
    (data / "images" / "s" / "up").symlink_to(data / "images")
    (data / "images" / "s" / "self").symlink_to("self")
    found = splits(data)
    assert names(found) == ["s/im0", "s/im1", "s/im2"]
    assert found.left_out == {LISTED_ALREADY: 2, OTHER_KINDS: 1}


def test_two_folders_of_images_may_share_their_masks_by_a_link(data):
    put(data, *(f"images/night/im{k}.png" for k in range(3)))
    (data / "masks" / "night").symlink_to("s")
    assert names(splits(data)) == [f"{place}/im{k}" for place in ("night", "s") for k in range(3)]


def test_a_pipe_with_the_name_of_a_picture_is_not_waited_for(data):
    os.mkfifo(data / "images" / "s" / "pipe.png")
    (data / "images" / "s" / "linked.png").symlink_to("pipe.png")
    assert splits(data).left_out == {OTHER_KINDS: 2}


def test_the_start_of_a_run_can_say_what_was_left_out(data):
    put(data, "masks/s/im3.png", "masks/more/im4.png", "images/s/im0.heic", "images/readme.txt", "images/.DS_Store")
    found = splits(data)
    assert found.left_out == {LONELY: 2, OTHER_KINDS: 2, LEFT_BY_SYSTEMS: 1}
    fed = folder.folder(
        *(str(data / name) for name in ("classes.yaml", "images", "masks")),
        img_size=(16, 16),
        batch_size=1,
        num_workers=0,
    )
    assert fed.left_out == found.left_out
    both = splits(data, val_images=str(data / "images"), val_masks=str(data / "masks"))
    assert both.left_out == {reason: 2 * count for reason, count in found.left_out.items()}


def test_a_name_is_one_whether_its_dots_are_letters_of_their_own_or_not(tmp_path):
    put(tmp_path, "images/e\u0301.png", "masks/\u00e9.png", "images/b.png", "masks/b.png")
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(CLASSES))
    assert names(splits(tmp_path)) == ["b", "\u00e9"]


def test_a_mask_of_nearly_the_name_is_told(tmp_path):
    put(tmp_path, "images/street_0.png", "masks/street_0_mask.png")
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(CLASSES))
    with pytest.raises(FileNotFoundError, match=r"the first is 'street_0'.*did you mean street_0_mask\?"):
        splits(tmp_path)


def test_a_link_to_nothing_is_told_to_be_one(data):
    (data / "images" / "s" / "im9.png").symlink_to(data / "gone.png")
    put(data, "masks/s/im9.png")
    places = [str(data / name) for name in ("classes.yaml", "images", "masks")]
    samples = folder.splits(*places, val_share=0.5).train + folder.splits(*places, val_share=0.5).val
    broken = next(sample for sample in samples if sample.name == "s/im9")
    for read in (broken.image.check_image, broken.image.decode):
        with pytest.raises(FileNotFoundError, match=r"im9\.png is a link to .*gone\.png, which is not there"):
            read()
