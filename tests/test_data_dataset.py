import os
import pickle
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from eomt.data.dataset import SegmentationDataset
from eomt.data.labels import LabelSet
from eomt.data.sources import ColorDecoder, IndexDecoder, Sample, Source
from eomt.indices import IGNORE

CLASSES = LabelSet(("road", "car"), ((128, 64, 128), (0, 0, 142)))
DECODER = IndexDecoder({7: 0, 8: 0, 26: 1, 0: IGNORE}, "mend the file")


def write_pair(folder, name, labels, image_size=None):
    labels = np.asarray(labels, dtype=np.uint8)
    height, width = image_size or labels.shape
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    Image.fromarray(labels).save(folder / f"{name}_labels.png")
    return Sample(name, Source(str(folder / f"{name}.png")), Source(str(folder / f"{name}_labels.png")))


def zipped(sample, path):
    with ZipFile(path, "w") as archive:
        archive.write(sample.image.path, "image.png")
        archive.write(sample.label.path, "label.png")
    return Sample(sample.name, Source(str(path), "image.png"), Source(str(path), "label.png"))


@pytest.fixture
def sample(tmp_path):
    return write_pair(tmp_path, "a", [[7, 8, 26], [0, 26, 7]])


def test_many_ids_become_one_class_and_ignored_ones_become_255(sample):
    image, labels = SegmentationDataset([sample], CLASSES, DECODER)[0]
    assert image.dtype == labels.dtype == torch.uint8
    assert image.shape == (3, 2, 3)
    assert labels.tolist() == [[0, 0, 1], [IGNORE, 1, 0]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_images_of_every_mode_become_rgb_and_stay_as_decoded_in_memory(tmp_path, sample, mode):
    picture = Image.open(sample.image.path).convert(mode)
    picture.save(sample.image.path)
    image = SegmentationDataset([sample], CLASSES, DECODER).image(0).permute(1, 2, 0)
    assert torch.equal(image, torch.tensor(np.asarray(picture.convert("RGB"))))
    assert image.is_contiguous()  # resizing is quickest so


def test_an_unlisted_value_is_an_error_that_names_file_and_value(tmp_path):
    dataset = SegmentationDataset([write_pair(tmp_path, "a", [[7, 99]])], CLASSES, DECODER)
    with pytest.raises(ValueError, match=r"a_labels\.png has the value 99.*mend the file"):
        dataset.labels(0)


def test_labels_of_another_size_than_the_image_are_an_error_that_names_both(tmp_path):
    dataset = SegmentationDataset([write_pair(tmp_path, "a", [[7, 7]], image_size=(4, 6))], CLASSES, DECODER)
    with pytest.raises(ValueError, match=r"a\.png is 4x6, .*a_labels\.png is 1x2"):
        dataset[0]


def test_an_image_that_is_stored_turned_is_refused_for_its_labels_may_not_be(tmp_path, sample):
    picture = Image.open(tmp_path / "a.png").copy()
    exif = picture.getexif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    with pytest.raises(ValueError, match=r"a\.png is stored turned \(EXIF orientation 3\)"):
        SegmentationDataset([sample], CLASSES, DECODER)[0]


@pytest.mark.parametrize("content", [b"", b"no picture", "half", "flipped"])
def test_a_damaged_picture_is_an_error_that_names_it(tmp_path, sample, content):
    whole = (tmp_path / "a.png").read_bytes()
    flipped = whole[:50] + bytes([whole[50] ^ 0xFF]) + whole[51:]
    (tmp_path / "a.png").write_bytes({"half": whole[: len(whole) // 2], "flipped": flipped}.get(content, content))
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
        SegmentationDataset([sample], CLASSES, DECODER)[0]


def test_a_zip_gives_the_same_pixels_as_files(tmp_path, sample):
    plain = SegmentationDataset([sample], CLASSES, DECODER)
    packed = SegmentationDataset([zipped(sample, tmp_path / "a.zip")], CLASSES, DECODER)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], packed[0], strict=True))


def test_an_archive_that_was_replaced_is_opened_anew(tmp_path, sample):
    for value in (7, 26):
        Image.fromarray(np.full((2, 3), value, np.uint8)).save(sample.label.path)
        zipped(sample, tmp_path / "new.zip")
        os.replace(tmp_path / "new.zip", tmp_path / "a.zip")
        label = Source(str(tmp_path / "a.zip"), "label.png")
        dataset = SegmentationDataset([Sample("a", label, label)], CLASSES, DECODER)
        assert dataset.labels(0).unique().tolist() == [DECODER.table[value]]


def test_a_picture_that_left_its_archive_is_named(tmp_path, sample):
    packed = zipped(sample, tmp_path / "a.zip")
    with ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("label.png", b"")
    with pytest.raises(ValueError, match=r"a\.zip has no image\.png"):
        SegmentationDataset([packed], CLASSES, DECODER).image(0)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_processes_open_zips_on_their_own(tmp_path, sample, start):
    dataset = SegmentationDataset([zipped(sample, tmp_path / "a.zip")] * 8, CLASSES, DECODER)
    expected, _ = dataset[0]  # the parent's handle is open when the workers start
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context=start)
    assert all(torch.equal(image, expected) for images, _ in loader for image in images)


def test_a_dataset_survives_pickling(sample):
    dataset = pickle.loads(pickle.dumps(SegmentationDataset([sample], CLASSES, DECODER)))
    assert dataset.names == ["a"]
    assert dataset.labels(0).tolist() == [[0, 0, 1], [IGNORE, 1, 0]]


def test_the_fingerprint_follows_names_and_bytes_but_not_order(tmp_path):
    first, second = write_pair(tmp_path, "a", [[7]]), write_pair(tmp_path, "b", [[7] * 50] * 50)

    def fingerprint(*samples):
        return SegmentationDataset(samples, CLASSES, DECODER).fingerprint()

    assert fingerprint(first, second) == fingerprint(second, first)
    assert fingerprint(first) != fingerprint(second)
    packed = zipped(first, tmp_path / "one.zip")
    Image.fromarray(np.full((1, 1), 26, dtype=np.uint8)).save(first.label.path)  # one value changes, not the size
    assert fingerprint(packed) != fingerprint(zipped(first, tmp_path / "two.zip"))


def test_colours_become_classes_and_an_unknown_colour_names_itself():
    decode = ColorDecoder({(128, 64, 128): 0, (0, 0, 142): 1, (0, 0, 0): IGNORE}, "add it")
    mask = np.array([[[128, 64, 128], [0, 0, 142], [0, 0, 0]]], dtype=np.uint8)
    assert decode(Image.fromarray(mask), "m.png").tolist() == [[0, 1, IGNORE]]
    mask[0, 0] = (1, 2, 3)
    with pytest.raises(ValueError, match=r"m\.png has the colour \(1, 2, 3\).*add it"):
        decode(Image.fromarray(mask), "m.png")


def test_masks_of_the_other_kind_are_errors():
    with pytest.raises(ValueError, match="single channel"):
        DECODER(Image.new("RGB", (2, 2)), "m.png")
    with pytest.raises(ValueError, match="RGB colour mask"):
        ColorDecoder({(0, 0, 0): 0}, "add it")(Image.new("L", (2, 2)), "m.png")


def test_sixteen_bit_labels_work_within_0_to_255():
    assert DECODER(Image.fromarray(np.array([[7, 26]], dtype=np.uint16)), "m.png").tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="value 1007"):
        DECODER(Image.fromarray(np.array([[7, 1007]], dtype=np.uint16)), "m.png")


def test_colorize_draws_each_class_in_its_colour_and_ignored_pixels_black():
    picture = CLASSES.colorize(torch.tensor([[0, 1, IGNORE]], dtype=torch.uint8))
    assert picture.dtype == torch.uint8
    assert picture.tolist() == [[[128, 64, 128], [0, 0, 142], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("names", "colors", "message"),
    [
        ((), (), "1 to 254"),
        (("a",) * 255, ((0, 0, 0),) * 255, "1 to 254"),
        (("a", "b"), ((0, 0, 0),), "2 names and 1 colours"),
        (("a", "a"), ((0, 0, 0),) * 2, "'a' occurs more than once"),
        (("a",), ((0, 0, 256),), "colour of 'a'"),
    ],
)
def test_impossible_label_sets_are_refused(names, colors, message):
    with pytest.raises(ValueError, match=message):
        LabelSet(names, colors)
