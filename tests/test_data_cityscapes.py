import shutil
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image

from eomt.data.cityscapes import CITYSCAPES, TRAIN_ID_OF_ID, cityscapes
from eomt.data.toy_streets import write_toy_streets
from eomt.indices import IGNORE

STEMS = ("train/aachen/aachen_000000_000019", "train/bochum/bochum_000001_000019", "val/ulm/ulm_000000_000019")


@pytest.fixture
def extracted(tmp_path):
    """A small Cityscapes, extracted, with every label id."""
    root = tmp_path / "extracted"
    rng = np.random.default_rng(0)
    for stem in STEMS:
        save(rng.integers(0, 256, (17, 34, 3), dtype=np.uint8), root / f"leftImg8bit/{stem}_leftImg8bit.png")
        ids = rng.permuted(np.arange(34, dtype=np.uint8)[None].repeat(17, 0), axis=1)
        save(ids, root / f"gtFine/{stem}_gtFine_labelIds.png")
        save(ids, root / f"gtFine/{stem}_gtFine_instanceIds.png")  # as in the official archive
    return root


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def zips(extracted, tmp_path):
    root = tmp_path / "zips"
    root.mkdir()
    for part in ("leftImg8bit", "gtFine"):
        with ZipFile(root / f"{part}_trainvaltest.zip", "w") as archive:
            archive.writestr("README", "text")
            for path in sorted((extracted / part).rglob("*.png")):
                archive.write(path, path.relative_to(extracted))
    return root


def read(root):
    return cityscapes(str(root), img_size=(16, 16), batch_size=1, num_workers=0)


def pixels(root):
    data = read(root)
    return [
        tensor for dataset in (data.train_set.with_transform(None), data.val_set) for item in dataset for tensor in item
    ]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def add_train_ids(root, stems=STEMS):
    table = np.array([TRAIN_ID_OF_ID[value] for value in range(34)], dtype=np.uint8)
    for stem in stems:
        ids = np.asarray(Image.open(root / f"gtFine/{stem}_gtFine_labelIds.png"))
        save(table[ids], root / f"gtFine/{stem}_gtFine_labelTrainIds.png")


def test_every_frame_knows_its_city_which_was_driven_through_once(extracted):
    assert read(extracted).train_set.sequences == ["aachen", "bochum"]
    assert read(extracted).val_set.sequences == ["ulm"]


def test_the_official_splits_are_found_by_name(extracted):
    data = read(extracted)
    assert data.train_set.names == ["aachen_000000_000019", "bochum_000001_000019"]
    assert data.val_set.names == ["ulm_000000_000019"]
    assert data.num_classes == 19


def test_label_ids_map_onto_the_official_train_ids(extracted):
    ids = np.asarray(Image.open(extracted / f"gtFine/{STEMS[2]}_gtFine_labelIds.png"))
    labels = read(extracted).val_set.labels(0).numpy()
    official = {"road": 7, "building": 11, "pole": 17, "sky": 23, "person": 24, "train": 31, "bicycle": 33}
    for name, value in official.items():
        assert (labels[ids == value] == CITYSCAPES.names.index(name)).all()
    assert (labels[np.isin(ids, [0, 4, 9, 10, 14, 18, 29, 30])] == IGNORE).all()
    assert len(np.unique(labels)) == 20


def test_zips_and_extracted_folders_give_the_same_pixels(extracted, zips):
    assert same(pixels(extracted), pixels(zips))
    assert read(extracted).train_set.names == read(zips).train_set.names


def test_label_train_ids_are_preferred_and_agree_with_label_ids(extracted):
    before = pixels(extracted)
    add_train_ids(extracted)
    assert read(extracted).train_set.samples[0].label.path.endswith("_labelTrainIds.png")
    assert same(before, pixels(extracted))


def test_label_ids_are_used_where_only_some_images_have_train_ids(extracted):
    add_train_ids(extracted, STEMS[:1])
    assert read(extracted).train_set.samples[0].label.path.endswith("_labelIds.png")


def test_train_ids_alone_are_enough(extracted):
    add_train_ids(extracted)
    for stem in STEMS:
        (extracted / f"gtFine/{stem}_gtFine_labelIds.png").unlink()
    assert len(read(extracted).train_set) == 2


def test_images_may_stay_zipped_while_labels_are_extracted(extracted, zips):
    shutil.copytree(extracted / "gtFine", zips / "gtFine")
    assert same(pixels(extracted), pixels(zips))


@pytest.mark.parametrize("part", ["leftImg8bit", "gtFine"])
def test_a_half_downloaded_zip_is_an_error_at_once_that_names_it(zips, part):
    path = zips / f"{part}_trainvaltest.zip"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{part}_trainvaltest.zip is no complete zip archive.*download it again"):
        read(zips)


def test_a_damaged_member_of_a_zip_is_an_error_that_names_it(zips):
    path = zips / "leftImg8bit_trainvaltest.zip"
    content = bytearray(path.read_bytes())
    with ZipFile(path) as archive:
        entry = archive.getinfo(f"leftImg8bit/{STEMS[0]}_leftImg8bit.png")
    content[entry.header_offset + 200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"aachen_000000_000019_leftImg8bit\.png is damaged"):
        read(zips).train_set[0]


def test_opening_the_zips_decodes_no_picture(zips):
    for part in ("leftImg8bit", "gtFine"):
        with ZipFile(zips / f"{part}_trainvaltest.zip") as archive:
            members = archive.namelist()
        with ZipFile(zips / f"{part}_trainvaltest.zip", "w") as archive:
            for member in members:
                archive.writestr(member, "no picture")
    assert len(read(zips).train_set) == 2


def test_an_empty_root_is_an_error_that_says_where_to_download(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"leftImg8bit_trainvaltest\.zip .*cityscapes-dataset\.com"):
        read(tmp_path)


def test_an_image_without_labels_is_an_error_with_count_and_first_name(extracted):
    for stem in STEMS[:2]:
        (extracted / f"gtFine/{stem}_gtFine_labelIds.png").unlink()
    with pytest.raises(FileNotFoundError, match=f"2 of 3 images .* first is gtFine/{STEMS[0]}_gtFine_label"):
        read(extracted)


def test_a_missing_split_is_an_error(extracted):
    shutil.rmtree(extracted / "leftImg8bit" / "val")
    with pytest.raises(FileNotFoundError, match="leftImg8bit/val/CITY"):
        read(extracted)


def test_a_label_whose_image_is_missing_is_named_at_start(tmp_path):
    folder = write_toy_streets(tmp_path / "toy", "clear", 3, 2, (32, 64), 0)
    for part in ("leftImg8bit", "gtFine"):
        ZipFile(folder / f"{part}_trainvaltest.zip").extractall(tmp_path / "root")
    next((tmp_path / "root" / "leftImg8bit" / "train").glob("*/*.png")).unlink()
    with pytest.raises(FileNotFoundError, match="has no image leftImg8bit/train/"):
        cityscapes(str(tmp_path / "root"), img_size=[32, 32], batch_size=1, num_workers=0)


def test_an_extracted_picture_that_is_half_downloaded_is_named_at_start(tmp_path):
    folder = write_toy_streets(tmp_path / "toy", "clear", 3, 2, (32, 64), 0)
    for part in ("leftImg8bit", "gtFine"):
        ZipFile(folder / f"{part}_trainvaltest.zip").extractall(tmp_path / "root")
    data = cityscapes(str(tmp_path / "root"), img_size=[32, 32], batch_size=1, num_workers=0)
    data.check_files()
    picture = next((tmp_path / "root" / "leftImg8bit" / "val").glob("*/*.png"))
    picture.write_bytes(picture.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{picture.name} is incomplete"):
        data.check_files()


def test_an_empty_folder_does_not_hide_the_zip(tmp_path):
    folder = write_toy_streets(tmp_path / "toy", "clear", 3, 2, (32, 64), 0)
    (folder / "gtFine").mkdir()
    assert cityscapes(str(folder), img_size=[32, 32], batch_size=1, num_workers=0).num_classes == 19


def test_cities_that_are_links_are_read_in_the_order_of_their_paths(tmp_path):
    folder = write_toy_streets(tmp_path / "toy", "clear", 3, 2, (32, 64), 0)
    for part in ("leftImg8bit", "gtFine"):
        ZipFile(folder / f"{part}_trainvaltest.zip").extractall(tmp_path / "root")
        train = tmp_path / "root" / part / "train"
        (train / "toyville").rename(tmp_path / part)
        (train / "toyville").symlink_to(tmp_path / part)
    names = cityscapes(str(tmp_path / "root"), img_size=[32, 32], batch_size=1, num_workers=0).train_set.names
    assert names == [f"toyville_{k:06d}_000019" for k in range(3)]
