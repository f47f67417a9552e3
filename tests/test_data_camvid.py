import os

import numpy as np
import pytest
from PIL import Image

from eomt.data.camvid import CAMVID, camvid
from eomt.indices import IGNORE

REAL = os.environ.get("EOMT_CAMVID")


@pytest.fixture
def root(tmp_path):
    """Two sequences for training, one of them for validation too."""
    for split, sequence, count in (("train", "day", 10), ("train", "dusk", 5), ("val", "day", 3)):
        for folder in (split, f"{split}annot"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for frame in range(count):
            name = f"{sequence}_{split}{frame:03d}"
            Image.fromarray(np.zeros((8, 12, 3), dtype=np.uint8)).save(tmp_path / split / f"{name}.jpg")
            annotation = np.arange(96, dtype=np.uint8).reshape(8, 12) % 12
            Image.fromarray(annotation).save(tmp_path / f"{split}annot" / f"{name}.png")
    return tmp_path


def read(root, **options):
    return camvid(str(root), **options, img_size=(8, 8), batch_size=1, num_workers=0)


def test_all_frames_are_read_and_void_is_ignored(root):
    data = read(root)
    assert (len(data.train_set), len(data.val_set), data.num_classes) == (15, 3, 11)
    assert data.val_set.labels(0).flatten().tolist() == [*range(11), IGNORE] * 8


def test_every_frame_knows_its_sequence(root):
    assert read(root).train_set.sequences == ["day"] * 10 + ["dusk"] * 5


def test_sequences_choose_by_prefix_in_both_splits(root):
    data = read(root, sequences=["day"])
    assert len(data.train_set) == 10
    assert all(name.startswith("day_") for name in data.train_set.names + data.val_set.names)


def test_an_unknown_sequence_is_an_error_that_lists_the_known_ones(root):
    with pytest.raises(ValueError, match=r"data\.sequences has 'night'.*; choose from day, dusk"):
        read(root, sequences=["night"])


def test_a_share_holds_out_the_last_frames_of_each_sequence(root):
    data = read(root, val_share=0.4)
    for sequence, train, val in (("day", 6, 4), ("dusk", 3, 2)):
        kept = [name for name in data.train_set.names if name.startswith(sequence)]
        held_out = [name for name in data.val_set.names if name.startswith(sequence)]
        assert (len(kept), len(held_out)) == (train, val)
        assert max(kept) < min(held_out)


def test_a_share_leaves_the_val_folder_alone(root):
    assert all("_train" in name for name in read(root, val_share=0.4).val_set.names)


def test_a_sequence_without_val_images_is_an_error_that_offers_the_share(root):
    with pytest.raises(ValueError, match=r"no image of dusk; set data\.val_share"):
        read(root, sequences=["dusk"])


def test_validation_on_another_sequence(root):
    data = read(root, sequences=["day"], val_sequences=["dusk"], val_share=0.4)
    assert all(name.startswith("day") for name in data.train_set.names)
    assert data.val_set.names == ["dusk_train003", "dusk_train004"]


@pytest.mark.parametrize("share", [0, 1, -0.5, 40])
def test_impossible_shares_are_refused(root, share):
    with pytest.raises(ValueError, match=f"between 0 and 1, got {share}"):
        read(root, val_share=share)


def test_a_missing_annotation_is_an_error_that_names_it(root):
    (root / "trainannot" / "day_train004.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 15 .*day_train004\.png"):
        read(root)


def test_a_missing_folder_is_an_error_that_names_it(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"elsewhere/train.*data\.root"):
        read(tmp_path / "elsewhere")


@pytest.mark.skipif(not REAL, reason="EOMT_CAMVID does not name a copy of CamVid")
def test_the_real_camvid_has_367_training_and_101_validation_images():
    data = read(REAL)
    assert (len(data.train_set), len(data.val_set)) == (367, 101)
    image, labels = data.val_set[0]
    assert image.shape == (3, 360, 480)
    assert set(labels.unique().tolist()) <= {*range(len(CAMVID)), IGNORE}
    sky = image[:, labels == CAMVID.names.index("sky")].float().mean()
    assert sky > image[:, labels == CAMVID.names.index("road")].float().mean()


@pytest.mark.skipif(not REAL, reason="EOMT_CAMVID does not name a copy of CamVid")
def test_the_real_dusk_sequence_splits_into_37_and_25_frames():
    data = read(REAL, sequences=["0001TP"], val_share=0.4)
    assert (len(data.train_set), len(data.val_set)) == (37, 25)
    assert max(data.train_set.names) < min(data.val_set.names)


def test_two_images_of_one_name_are_named(root):
    (root / "train" / "day_train000.png").write_bytes((root / "train" / "day_train000.jpg").read_bytes())
    with pytest.raises(ValueError, match=r"day_train000\.jpg and day_train000\.png are two images of one name"):
        read(root)
