import hashlib
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from eomt.data import cityscapes
from eomt.data.cityscapes import CITYSCAPES, TRAIN_ID_OF_ID
from eomt.data.statistics import count_classes
from eomt.data.toy_streets import toy_streets
from eomt.toys.objects import draw_cutout, draw_stranger
from eomt.toys.scene import draw_scene


def draw(root, **options):
    settings = {
        "num_train": 3,
        "num_val": 2,
        "size": (64, 128),
        "img_size": (32, 32),
        "batch_size": 1,
        "num_workers": 0,
    }
    return toy_streets(str(root), **(settings | options))


def images(data):
    return [image for image, _ in data.train_set.with_transform(None)]


def zips(root):
    return sorted(root.rglob("*.zip"))


def test_the_zips_have_the_layout_of_cityscapes(tmp_path):
    draw(tmp_path)
    members = {name for path in zips(tmp_path) for name in ZipFile(path).namelist()}
    assert {path.name for path in zips(tmp_path)} == {"leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"}
    assert "leftImg8bit/train/toyville/toyville_000000_000019_leftImg8bit.png" in members
    assert "gtFine/val/toyburg/toyburg_000001_000019_gtFine_labelIds.png" in members
    assert len(members) == 10


def test_scenes_are_drawn_one_by_one_and_are_no_frames_of_a_drive(tmp_path):
    data = draw(tmp_path)
    assert {sample.sequence for dataset in (data.train_set, data.val_set) for sample in dataset.samples} == {None}
    read_as_cityscapes = cityscapes.splits(str(zips(tmp_path)[0].parent))
    assert {sample.sequence for sample in read_as_cityscapes.val} == {"toyburg"}


def test_the_same_settings_write_the_same_bytes(tmp_path):
    draw(tmp_path / "a")
    draw(tmp_path / "b")
    for first, second in zip(zips(tmp_path / "a"), zips(tmp_path / "b"), strict=True):
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("damage", ["gone", "cut", "another"])
def test_drawn_streets_of_which_an_archive_is_not_whole_are_drawn_again(tmp_path, damage):
    whole = images(draw(tmp_path))
    path = zips(tmp_path)[1]
    if damage == "another":  # fewer pictures, in an archive that is whole itself
        with ZipFile(path, "w") as archive:
            archive.writestr("leftImg8bit/train/toyville/a.png", b"")
    else:
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "gone":
        path.unlink()
    assert all(torch.equal(a, b) for a, b in zip(images(draw(tmp_path)), whole, strict=True))


def test_seeds_and_domains_and_splits_show_different_scenes(tmp_path):
    sets = [
        draw(tmp_path).train_set,
        draw(tmp_path, data_seed=1).train_set,
        draw(tmp_path, domain="night_fog").train_set,
        draw(tmp_path).val_set,
    ]
    labels = [dataset.labels(0) for dataset in sets]
    assert not any(torch.equal(labels[i], labels[j]) for i in range(4) for j in range(i))


def test_a_larger_set_begins_with_the_smaller_one(tmp_path):
    few, more = draw(tmp_path), draw(tmp_path, num_train=4)
    assert all(torch.equal(a, b) for a, b in zip(images(few), images(more), strict=False))


def test_the_scenes_are_written_once(tmp_path):
    draw(tmp_path)
    before = [path.stat().st_mtime_ns for path in zips(tmp_path)]
    draw(tmp_path)
    assert [path.stat().st_mtime_ns for path in zips(tmp_path)] == before


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("eomt.data.toy_streets.draw_scene", interrupt)
        with pytest.raises(KeyboardInterrupt):
            draw(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(draw(tmp_path).train_set) == 3


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("EOMT_CACHE", str(tmp_path))
    toy_streets(num_train=1, num_val=1, size=(32, 64), img_size=(32, 32), batch_size=1, num_workers=0)
    assert len(zips(tmp_path / "toy_streets")) == 2


@pytest.mark.parametrize("domain", ["clear", "night_fog"])
def test_at_least_twelve_classes_occur_often(tmp_path, domain):
    data = draw(tmp_path, domain=domain, num_train=24, size=(128, 256))
    counts = count_classes(data.train_set)
    often = [name for name, n in zip(CITYSCAPES.names, counts.images, strict=True) if n >= 6]
    assert len(often) >= 12, often
    assert {"road", "sidewalk", "building", "vegetation", "sky", "car", "person", "pole"} <= set(often)


def test_every_label_is_a_cityscapes_id_and_some_pixels_are_ignored():
    scenes = [draw_scene(np.random.default_rng(seed), (64, 128), "clear")[1] for seed in range(20)]
    ids = set(np.unique(scenes).tolist())
    assert ids <= set(TRAIN_ID_OF_ID)
    assert 4 in ids  # static


def test_night_is_darker_than_day_but_not_black():
    def brightness(domain):
        return np.mean([draw_scene(np.random.default_rng(seed), (64, 128), domain)[0] for seed in range(8)])

    assert 25 < brightness("night_fog") < 0.7 * brightness("clear")


def test_labels_lie_on_the_things_they_name():
    """By day the sky is brighter and bluer than the road below it, in every scene."""
    for seed in range(8):
        image, labels = draw_scene(np.random.default_rng(seed), (128, 256), "clear")
        sky, road = image[labels == 23].mean(0), image[labels == 7].mean(0)
        assert sky.mean() > road.mean() + 20
        assert (labels[-1] == 7).any() and (labels[:4] == 7).sum() == 0


@pytest.mark.parametrize(
    "options", [{"domain": "snow"}, {"num_train": 0}, {"num_val": 0}, {"size": (16, 64)}, {"data_seed": -1}]
)
def test_impossible_settings_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=f"data.{next(iter(options))}"):
        draw(tmp_path, **options)


@pytest.mark.parametrize(
    ("domain", "seed", "stored"),
    [
        ("clear", 0, "82931c25d1d9079a"),
        ("clear", 1, "7ea1e72c732ff5aa"),
        ("night_fog", 0, "b70e89218beb9f77"),
        ("night_fog", 1, "5eb2b93074ad5e64"),
    ],
)
def test_a_scene_is_pixel_for_pixel_what_earlier_versions_drew(domain, seed, stored):
    assert digest(*draw_scene(np.random.default_rng(seed), (64, 128), domain)) == stored


def test_unknown_objects_are_pixel_for_pixel_what_earlier_versions_drew():
    rng = np.random.default_rng(3)
    strangers = [draw_stranger(rng) for _ in range(12)]
    assert digest(*draw_scene(np.random.default_rng(3), (64, 128), "clear", strangers)) == "e3d89e1c78c0c732"
    assert digest(*(draw_cutout(np.random.default_rng((0, k))) for k in range(24))) == "238ce12a5949a176"


def digest(*arrays):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]
