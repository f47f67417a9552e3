"""Benchmarks are read by their own conventions, in either layout, and nothing is mended silently."""

import numpy as np
import pytest
import torch
from PIL import Image

from eomt.anomaly.benchmarks import BENCHMARKS
from eomt.anomaly.components import ANOMALY_TRACK, OBSTACLE_TRACK
from eomt.anomaly.datasets import AnomalyDataset
from eomt.anomaly.toy_anomalies import write_toy_anomalies
from eomt.data.cityscapes import TRAIN_ID_OF_ID
from eomt.toys.scene import draw_scene


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def write(folder, images, labels=None):
    """images: {file: (h, w)}; labels: {file: values uint8 [h, w]}."""
    rng = np.random.default_rng(0)
    for file, size in images.items():
        save(folder / "images" / file, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    for file, values in (labels or {}).items():
        save(folder / "labels_masks" / file, values)


def values(size, *there):
    """A label map that holds these values, and 0."""
    labels = np.zeros(size, np.uint8)
    labels.flat[: len(there)] = there
    return labels


FOLDERS = {
    "road_anomaly_21": "RoadAnomaly21",
    "road_obstacle_21": "RoadObsticle21",
    "fs_lost_and_found": "FS_LostFound_full",
    "fs_static": "fs_static",
    "road_anomaly": "RoadAnomaly",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_course_layout_is_read_with_each_data_sets_labels(tmp_path, name):
    of_anomaly, void = (2, []) if name == "road_anomaly" else (1, [255])
    write(tmp_path / FOLDERS[name], {"0.webp": (8, 12)}, {"0.png": values((8, 12), of_anomaly, *void)})
    image, labels = AnomalyDataset(tmp_path, name)[0]
    assert image.shape == (3, 8, 12) and image.dtype == labels.dtype == torch.uint8
    assert labels.flatten()[:2].tolist() == [1, *(void or [0])] and set(labels.unique().tolist()) == {0, 1, *void}


def test_the_obstacle_track_has_small_components_and_the_others_large_ones():
    assert [name for name, b in BENCHMARKS.items() if b.track == OBSTACLE_TRACK] == [
        "road_obstacle_21",
        "toy_anomalies",
    ]
    assert all(b.region and b.track in (ANOMALY_TRACK, OBSTACLE_TRACK) for b in BENCHMARKS.values())


@pytest.mark.parametrize(
    ("name", "folder", "suffix"),
    [("road_anomaly_21", "dataset_AnomalyTrack", "jpg"), ("road_obstacle_21", "dataset_ObstacleTrack", "webp")],
)
def test_the_official_layout_has_test_images_without_labels(tmp_path, name, folder, suffix):
    images = {f"validation_1.{suffix}": (8, 12), f"alpine_2.{suffix}": (6, 4)}
    labels = {"validation_1_labels_semantic.png": values((8, 12), 1)}
    labels["validation_1_labels_semantic_color.png"] = np.zeros((8, 12, 3), np.uint8)
    write(tmp_path / folder, images, labels)
    dataset = AnomalyDataset(tmp_path, name)
    assert len(dataset) == 1 and dataset.frames == ["validation_1"] and dataset.unlabelled == ["alpine_2"]
    assert dataset.image(0).shape == (3, 8, 12) and dataset.image(1).shape == (3, 6, 4)
    with pytest.raises(IndexError):
        dataset[1]
    assert BENCHMARKS[name].export_name.endswith("Track-all")


def test_images_may_differ_in_size_and_kind_and_need_no_anomaly(tmp_path):
    sizes = {"a.png": (8, 12), "b.jpg": (5, 7), "c.WEBP": (9, 3), "d.jpeg": (4, 4)}
    write(tmp_path / "fs_static", sizes, {f"{n[0]}.png": values(size) for n, size in sizes.items()})
    dataset = AnomalyDataset(tmp_path / "fs_static", "fs_static")  # the folder itself
    assert dataset.frames == ["a", "b", "c", "d"]
    assert [tuple(labels.shape) for _, labels in dataset] == list(sizes.values())
    assert all(image.shape[1:] == labels.shape and (labels == 0).all() for image, labels in dataset)


@pytest.mark.parametrize(("name", "value"), [("fs_static", 2), ("road_anomaly", 1), ("road_anomaly", 255)])
def test_a_label_of_another_data_set_is_an_error(tmp_path, name, value):
    folder = tmp_path / FOLDERS[name]
    write(folder, {"0.png": (4, 6)}, {"0.png": values((4, 6), value)})
    message = rf"0\.png has the value {value}.*{BENCHMARKS[name].title} has 0, .* only"
    with pytest.raises(ValueError, match=message):
        AnomalyDataset(tmp_path, name).labels(0)


def test_all_labels_are_looked_at_together(tmp_path):
    write(tmp_path / "fs_static", {f"{k}.png": (4, 6) for k in "012"}, {f"{k}.png": values((4, 6)) for k in "012"})
    dataset = AnomalyDataset(tmp_path, "fs_static")
    with pytest.raises(ValueError, match="labels_masks shows nothing anomalous"):
        dataset.check()
    save(tmp_path / "fs_static" / "labels_masks" / "1.png", np.full((4, 6), 1, np.uint8))
    dataset.check()
    for k in "02":
        save(tmp_path / "fs_static" / "labels_masks" / f"{k}.png", np.full((4, 6), 255, np.uint8))
    with pytest.raises(ValueError, match="labels_masks shows nothing normal"):
        dataset.check()
    save(tmp_path / "fs_static" / "labels_masks" / "2.png", values((4, 6), 2))
    with pytest.raises(ValueError, match=r"2\.png has the value 2"):
        dataset.check()


def test_labels_in_colours_are_an_error(tmp_path):
    write(tmp_path / "fs_static", {"0.png": (4, 6)}, {"0.png": np.zeros((4, 6, 3), np.uint8)})
    with pytest.raises(ValueError, match="single channel"):
        AnomalyDataset(tmp_path, "fs_static")[0]


def test_a_label_map_of_one_bit_is_read(tmp_path):
    write(tmp_path / "fs_static", {"0.png": (4, 6)}, {"0.png": values((4, 6), 1) > 0})
    assert AnomalyDataset(tmp_path, "fs_static").labels(0).sum() == 1


def test_missing_doubled_and_unequal_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"FS Static needs .*fs_static/images"):
        AnomalyDataset(tmp_path, "fs_static")
    folder = tmp_path / "fs_static"
    write(folder, {"0.png": (4, 6)}, {"1.png": values((4, 6))})
    with pytest.raises(FileNotFoundError, match=r"1\.png has no image"):
        AnomalyDataset(tmp_path, "fs_static")
    write(folder, {"1.png": (4, 7)})
    with pytest.raises(ValueError, match="must have one size"):
        AnomalyDataset(tmp_path, "fs_static")[0]
    write(folder, {"1.jpg": (4, 6)})
    with pytest.raises(ValueError, match="two files for one frame"):
        AnomalyDataset(tmp_path, "fs_static")


def test_a_folder_without_labels_has_nothing_to_measure(tmp_path):
    write(tmp_path / "fs_static", {"0.png": (4, 6)})
    (tmp_path / "fs_static" / "labels_masks").mkdir()
    with pytest.raises(FileNotFoundError, match="nothing to measure"):
        AnomalyDataset(tmp_path, "fs_static")


def test_a_mistyped_name_gets_a_suggestion(tmp_path):
    with pytest.raises(ValueError, match=r"did you mean road_anomaly_21\?"):
        AnomalyDataset(tmp_path, "road_anomaly21")


# Toy anomalies


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    root = tmp_path_factory.mktemp("toys")
    return AnomalyDataset(write_toy_anomalies(str(root), number=16), "toy_anomalies")


def test_toy_images_show_unknown_objects_on_the_road_but_for_the_first_ones(toys):
    assert len(toys) == 16
    anomalous = [(labels == 1).float().mean().item() for _, labels in toys]
    assert anomalous[:2] == [0, 0] and min(anomalous[2:]) > 0.001 and max(anomalous) < 0.2
    for image, labels in toys:
        assert image.shape == (3, 128, 256) and set(labels.unique().tolist()) <= {0, 1, 255}
        rows = (labels == 1).nonzero()[:, 0]
        assert not len(rows) or rows.float().mean() > 128 * 0.45  # below the horizon


def test_an_object_changes_the_scene_where_it_is_and_nowhere_else(toys):
    index = 7
    image, labels = toys[index]
    plain, ids = draw_scene(np.random.default_rng((0, 2**20, index)), (128, 256), "clear")
    changed = (image.permute(1, 2, 0).numpy() != plain).any(-1)
    near = torch.nn.functional.max_pool2d((labels == 1).float()[None], 25, 1, 12)[0].bool().numpy()  # shadows too
    assert changed[labels == 1].mean() > 0.9 and not changed[~near].any()
    kept = (labels != 1).numpy()
    void = np.isin(ids, [i for i, train_id in TRAIN_ID_OF_ID.items() if train_id == 255])
    assert (labels.numpy()[kept] == np.where(void, 255, 0)[kept]).all()


def test_toy_objects_can_be_seen(toys):
    """Their colours differ from the road that they hide."""
    for index in range(2, 16):
        image, labels = toys[index]
        plain, _ = draw_scene(np.random.default_rng((0, 2**20, index)), (128, 256), "clear")
        apart = abs(image.permute(1, 2, 0).numpy().astype(int) - plain.astype(int)).max(-1)[labels == 1]
        assert np.median(apart) > 25, index


def test_toy_anomalies_are_drawn_once_and_the_same_everywhere(toys, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in (toys.folder / "images").iterdir()}
    again = write_toy_anomalies(str(toys.folder.parent.parent), number=16)
    assert again == toys.folder
    assert before == {path.name: path.stat().st_mtime_ns for path in (again / "images").iterdir()}
    few = write_toy_anomalies(str(tmp_path), number=3)
    assert (few / "images" / "toy_0002.png").read_bytes() == (again / "images" / "toy_0002.png").read_bytes()
    other = write_toy_anomalies(str(tmp_path), number=3, seed=1)
    assert (few / "images" / "toy_0002.png").read_bytes() != (other / "images" / "toy_0002.png").read_bytes()


@pytest.mark.parametrize(
    "settings", [{"number": 0}, {"number": "x"}, {"size": (16, 64)}, {"size": 64}, {"size": "ab"}, {"seed": -1}]
)
def test_impossible_toy_settings_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=f"data.{next(iter(settings))}="):
        write_toy_anomalies(str(tmp_path), **settings)


def test_other_labels_are_other_data_of_the_same_images(tmp_path, monkeypatch):
    monkeypatch.setenv("EOMT_CACHE", str(tmp_path / "cache"))
    found = []
    for there in (1, 0):
        write(tmp_path / "fs_static", {"0.png": (8, 12), "1.png": (8, 12)}, {"0.png": values((8, 12), there)})
        data = AnomalyDataset(tmp_path, "fs_static")
        found.append((data.fingerprint(), data.fingerprint(labels=False)))
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]


def test_a_label_map_in_a_lossy_format_is_refused_not_left_out(tmp_path):
    labels = {"0.png": values((8, 12), 1), "1.jpg": values((8, 12), 1)}
    write(tmp_path / "RoadAnomaly21", {"0.png": (8, 12), "1.png": (8, 12)}, labels)
    with pytest.raises(ValueError, match=r"labels_masks/1\.jpg is a JPEG, a lossy format"):
        AnomalyDataset(tmp_path, "road_anomaly_21").check()
