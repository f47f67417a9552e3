"""The fingerprint of data follows its content, which is read once."""

import os

import numpy as np
import pytest
from PIL import Image

from eomt.anomaly.cutouts import FolderCutOuts
from eomt.data import identity
from eomt.data.dataset import SegmentationDataset
from eomt.data.identity import file_hashes, same_files
from eomt.data.labels import LabelSet
from eomt.data.sources import IndexDecoder, Sample, Source
from eomt.files import write_json
from eomt.reporting.evaluation_report import keep_other_scores

CLASSES = LabelSet(("road", "car"), ((128, 64, 128), (0, 0, 142)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EOMT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "SETTLED", -1)


@pytest.fixture
def hashed(monkeypatch):
    """The files that were read, in order."""
    paths, plainly = [], identity._sha256

    def count(path):
        paths.append(os.path.basename(path))
        return plainly(path)

    monkeypatch.setattr(identity, "_sha256", count)
    return paths


def mask(path, value):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path, compress_level=0)  # any value takes as many bytes
    return Source(str(path))


def dataset(folder, values=(0, 1)):
    samples = []
    for k, value in enumerate(values):
        image, label = mask(folder / f"{k}.png", 9), mask(folder / f"{k}_l.png", value)
        samples.append(Sample(str(k), image, label))
    return SegmentationDataset(samples, CLASSES, IndexDecoder({0: 0, 1: 1}, ""))


@pytest.mark.parametrize("times_set_back", [False, True])
def test_a_mask_with_other_classes_in_as_many_bytes_is_other_data(tmp_path, times_set_back):
    data = dataset(tmp_path / "data")
    path, before = data.samples[0].label.path, data.fingerprint()
    facts = os.stat(path)
    mask(tmp_path / "data" / "0_l.png", 1)
    if times_set_back:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert os.stat(path).st_size == facts.st_size
    assert same_files(before, data.fingerprint()) is False


def test_copies_in_another_folder_are_the_same_data(tmp_path):
    assert same_files(dataset(tmp_path / "a").fingerprint(), dataset(tmp_path / "b").fingerprint()) is True


def test_files_are_read_once_and_again_where_they_changed(tmp_path, hashed):
    data = dataset(tmp_path / "data")
    first = data.fingerprint()
    assert sorted(hashed) == ["0.png", "0_l.png", "1.png", "1_l.png"]
    assert data.fingerprint() == dataset_again(data).fingerprint() == first and len(hashed) == 4
    mask(tmp_path / "data" / "1_l.png", 0)
    assert data.fingerprint() != first and hashed[4:] == ["1_l.png"]


def dataset_again(data):
    return SegmentationDataset(data.samples, data.classes, data.decode_labels)


def test_parts_of_a_folder_remember_each_others_files(tmp_path, hashed):
    data = dataset(tmp_path / "data", (0, 1, 0))
    for k in range(3):
        SegmentationDataset(data.samples[k : k + 1], CLASSES, data.decode_labels).fingerprint()
    data.fingerprint()
    assert len(hashed) == 6


def test_a_file_that_has_just_changed_is_not_remembered_for_its_time_may_not_tell(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED", 60e9)
    data = dataset(tmp_path / "data")
    assert data.fingerprint() == data.fingerprint() and len(hashed) == 8


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}', b"\xff\xfe"])
def test_a_broken_memory_is_made_again(tmp_path, hashed, content):
    data = dataset(tmp_path / "data")
    first = data.fingerprint()
    (memory,) = (tmp_path / "cache" / "hashes").iterdir()
    memory.write_bytes(content)
    assert data.fingerprint() == first and len(hashed) == 8
    assert data.fingerprint() == first and len(hashed) == 8


def test_records_of_another_kind_in_the_memory_are_not_believed(tmp_path, hashed):
    path = dataset(tmp_path / "data").samples[0].label.path
    (first,) = file_hashes([path])
    (memory,) = (tmp_path / "cache" / "hashes").iterdir()
    for record in ("5", '"abc"', "null", "[1, 2, 3, 4]"):
        memory.write_text(f'{{"{path}": {record}}}')
        assert file_hashes([path]) == [first]


def test_hashes_that_cannot_be_kept_are_still_told(tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert dataset(tmp_path / "data").fingerprint().startswith("sha256:")
    assert "cannot be kept" in caplog.text


def test_what_was_hashed_before_an_error_is_remembered(tmp_path, monkeypatch):
    paths = [mask(tmp_path / "data" / f"{k}.png", k).path for k in range(40)]
    plainly = identity._sha256

    def stop(path):
        if path == paths[-1]:
            raise OSError("gone")
        return plainly(path)

    monkeypatch.setattr(identity, "_sha256", stop)
    with pytest.raises(OSError, match="gone"):
        file_hashes(paths)
    assert file_hashes(paths[:32], hashing=False) is not None


def test_nothing_is_read_where_hashing_is_forbidden(tmp_path, hashed):
    data = dataset(tmp_path / "data")
    assert data.fingerprint(hashing=False) is None and not hashed
    first = data.fingerprint()
    assert data.fingerprint(hashing=False) == first


def test_fingerprints_of_sizes_and_of_contents_do_not_tell_whether_files_are_the_same():
    assert same_files("sha256:a", "a") is None and same_files(None, "a") is None
    assert same_files("a", "a") is True and same_files("sha256:a", "sha256:b") is False


@pytest.mark.parametrize(
    ("recorded", "what"), [("sha256:b", "other images"), ("a", "an earlier version knew by their")]
)
def test_scores_on_other_images_are_kept_and_those_of_an_earlier_version_are_not_said_to_be_such(
    tmp_path, recorded, what
):
    write_json(tmp_path / "a.json", {"data": recorded, "miou": 0.5, "class_iou": {}, "classes": [], "images": []})
    with pytest.raises(ValueError, match=what):
        keep_other_scores(tmp_path / "a.json", "sha256:a")
    keep_other_scores(tmp_path / "a.json", recorded)
    keep_other_scores(tmp_path / "new.json", "sha256:a")


def test_other_cut_outs_in_as_many_bytes_are_told_by_what_describes_them(tmp_path):
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    said = []
    for color in (10, 20):
        picture.putpixel((3, 3), (color, 0, 0, 255))
        picture.save(tmp_path / "a.png", compress_level=0)
        said.append(repr(FolderCutOuts(str(tmp_path))))
    assert said[0] != said[1]
