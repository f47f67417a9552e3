import inspect
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from PIL import Image

from eomt.command_line import one_sentence
from eomt.data.datamodule import SegmentationDataModule, feed
from eomt.data.dataset import SegmentationDataset
from eomt.data.labels import LabelSet
from eomt.data.sampler import SeededSampler
from eomt.data.sources import IndexDecoder, LoaderOptions, Sample, Source
from eomt.data.statistics import ClassCounts, class_weights, count_classes
from eomt.indices import IGNORE
from eomt.reporting.run_report import data_facts, print_start
from eomt.training.mask_classification_semantic import MaskClassificationSemantic


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EOMT_CACHE", str(tmp_path / "cache"))


CLASSES = LabelSet(("a", "b", "c"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)))
DECODER = IndexDecoder({0: 0, 1: 1, 2: 2, 255: IGNORE}, "mend it")


@pytest.fixture
def make_set(tmp_path):
    def make(count, classes=CLASSES):
        samples = []
        for index in range(count):
            image, label = tmp_path / f"{index}.png", tmp_path / f"{index}_l.png"
            Image.fromarray(np.full((20, 30 + index, 3), index, dtype=np.uint8)).save(image)
            labels = np.zeros((20, 30 + index), dtype=np.uint8)
            labels[:5] = 1
            labels[5:6] = IGNORE
            Image.fromarray(labels).save(label)
            samples.append(Sample(str(index), Source(str(image)), Source(str(label))))
        return SegmentationDataset(samples, classes, DECODER)

    return make


def module(train, val, **options):
    return SegmentationDataModule(train, val, **({"img_size": (16, 16), "batch_size": 2, "num_workers": 0} | options))


def test_training_batches_are_uint8_crops_and_the_incomplete_last_one_is_dropped(make_set):
    batches = list(module(make_set(5), make_set(1)).train_dataloader())
    assert len(batches) == 2
    images, labels = batches[0]
    assert images.shape == (2, 3, 16, 16) and labels.shape == (2, 16, 16)
    assert images.dtype == labels.dtype == torch.uint8


def test_validation_gives_whole_images_in_order(make_set):
    batches = list(module(make_set(2), make_set(3)).val_dataloader())
    assert [images[0].shape for images, _ in batches] == [(3, 20, 30), (3, 20, 31), (3, 20, 32)]
    assert all(isinstance(images, list) and isinstance(labels, list) for images, labels in batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_seed_fixes_order_and_augmentation(make_set, workers):
    def epoch(seed):
        torch.manual_seed(seed)
        loader = module(make_set(8), make_set(1), num_workers=workers).train_dataloader()
        return torch.cat([images for images, _ in loader])

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_drawn_elsewhere_change_neither_order_nor_augmentation(make_set, workers):
    def epoch(draws):
        torch.manual_seed(1)
        loader = module(make_set(8), make_set(1), num_workers=workers).train_dataloader()
        torch.rand(draws)  # fresh adapters, dropout
        crops = []
        for images, _ in loader:
            torch.rand(draws)
            crops.append(images)
        return torch.cat(crops)

    assert torch.equal(epoch(0), epoch(5))


def test_loading_data_disturbs_no_random_numbers_drawn_elsewhere(make_set):
    loader = module(make_set(8), make_set(1)).train_dataloader()
    state = torch.random.get_rng_state()
    assert len(list(loader)) == 4
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_epoch_is_the_same_whether_others_came_before_it_or_not(make_set):
    torch.manual_seed(1)
    whole, resumed = (module(make_set(8), make_set(1)).train_dataloader() for _ in range(2))
    epochs = []
    for epoch in range(3):
        whole.sampler.set_epoch(epoch)
        epochs.append(torch.cat([images for images, _ in whole]))
    resumed.sampler.set_epoch(2)
    assert torch.equal(torch.cat([images for images, _ in resumed]), epochs[2])
    assert not torch.equal(epochs[1], epochs[2])


@pytest.mark.parametrize(("one", "other"), [((0, 1), (1, 0)), ((5, 0), (5 + 4096, 0)), ((5, 0), (5 + 2**32, 0))])
def test_no_epoch_of_a_seed_is_an_epoch_of_another_seed(one, other):
    """torch adds epoch and seed, and its generator heeds 32 bits of them."""

    def epoch(seed, number):
        sampler = SeededSampler(range(100), seed)
        sampler.set_epoch(number)
        return tuple(zip(*sampler, strict=True))

    (order, seeds), (other_order, other_seeds) = epoch(*one), epoch(*other)
    assert sorted(order) == sorted(other_order) == list(range(100))
    assert order != other_order
    assert not set(seeds) & set(other_seeds)
    assert epoch(*one) == (order, seeds)


def test_processes_share_an_epoch_and_no_image_is_seen_twice(make_set):
    torch.manual_seed(1)
    seen = []
    for rank in range(2):
        data = module(make_set(8), make_set(2))
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        seen += [index for index, _ in data.train_dataloader().sampler]
    assert sorted(seen) == list(range(8))


@pytest.mark.parametrize(("images", "processes"), [(5, 2), (2, 2), (7, 3)])
def test_each_process_validates_on_images_of_its_own_and_none_is_repeated(make_set, images, processes):
    seen = []
    for rank in range(processes):
        data = module(make_set(8), make_set(images))
        data.trainer = SimpleNamespace(world_size=processes, global_rank=rank)
        seen += [int(batch[0][0, 0, 0]) for batch, _ in data.val_dataloader()]
    assert sorted(seen) == list(range(images))


def test_more_processes_than_validation_images_are_refused(make_set):
    data = module(make_set(4), make_set(1))
    data.trainer = SimpleNamespace(world_size=2, global_rank=0)
    with pytest.raises(ValueError, match="there are 1 for 2 processes"):
        data.val_dataloader()


def test_a_batch_larger_than_the_training_set_is_refused(make_set):
    with pytest.raises(ValueError, match=r"= 4 training images, there are 3; set data.batch_size to 3"):
        module(make_set(3), make_set(1), batch_size=4)


def test_a_batch_larger_than_a_process_share_of_the_training_set_is_refused(make_set):
    data = module(make_set(3), make_set(2))
    data.trainer = SimpleNamespace(world_size=2, global_rank=0)
    with pytest.raises(ValueError, match=r"2 x 2 process\(es\) = 4 training images, there are 3"):
        data.train_dataloader()


@pytest.mark.parametrize(("train", "val", "split"), [(0, 1, "training"), (1, 0, "validation")])
def test_empty_splits_are_refused(make_set, train, val, split):
    with pytest.raises(ValueError, match=f"The {split} split has 0 images"):
        module(make_set(train), make_set(val), batch_size=1)


def test_splits_of_different_classes_are_refused(make_set):
    with pytest.raises(ValueError, match="same classes"):
        module(make_set(2), make_set(1, LabelSet(("x", "b", "c"), CLASSES.colors)))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}, {"class_weights": "median"}])
def test_impossible_settings_are_refused(make_set, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        module(make_set(2), make_set(1), **options)


def test_inverse_weights_are_inverse_to_the_pixels_and_have_mean_one(make_set):
    weights = module(make_set(2), make_set(1), class_weights="inverse").class_weights
    a, b, absent = weights
    assert b / a == pytest.approx(14 / 5)  # 14 rows of a, 5 of b, one ignored
    assert (a + b) / 2 == pytest.approx(1)
    assert absent == 1


def test_effective_number_follows_the_images_that_show_a_class():
    counts = ClassCounts(torch.tensor([500, 500, 0]), torch.tensor([100, 10, 0]), num_images=100)
    common, rare, absent = class_weights(counts, "effective_number")
    assert rare / common == pytest.approx((1 - 0.99**100) / (1 - 0.99**10))
    assert (common + rare) / 2 == pytest.approx(1)
    assert absent == 1


def test_no_weights_means_that_no_label_is_read(make_set, tmp_path):
    data = module(make_set(2), make_set(1))
    for path in tmp_path.glob("*_l.png"):
        path.unlink()
    assert data.class_weights is None


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_are_those_of_all_labels(make_set, workers):
    counts = count_classes(make_set(3), workers)
    assert counts.pixels.tolist() == [14 * (30 + 31 + 32), 5 * (30 + 31 + 32), 0]
    assert counts.images.tolist() == [3, 3, 0]
    assert counts.num_images == 3


def break_picture(dataset, index):
    path = Path(dataset.samples[index].image.path)
    path.write_bytes(path.read_bytes()[:-30])
    return path


@pytest.mark.parametrize("index", [0, 4, 8])
def test_files_of_a_sample_are_looked_at_before_a_run_and_it_is_said_of_how_many(make_set, monkeypatch, caplog, index):
    monkeypatch.setattr("eomt.data.datamodule.LOOKED_AT", 3)
    caplog.set_level("INFO")
    data = module(make_set(9), make_set(2))
    data.check_files()
    assert "looked at the files of 5 of 11 images; the others are checked as they are read" in caplog.text
    path = break_picture(data.train_set, index)
    with pytest.raises(ValueError, match=f"{path} "):
        data.check_files()


def test_nothing_is_said_where_all_files_were_looked_at(make_set, caplog):
    caplog.set_level("INFO")
    module(make_set(3), make_set(1)).check_files()
    assert "looked at" not in caplog.text


@pytest.mark.parametrize("split", ["train_set", "val_set"])
def test_some_images_are_read_with_their_labels_before_a_run(make_set, split):
    data = module(make_set(9), make_set(9))
    Image.new("L", (5, 5)).save(getattr(data, split).samples[8].label.path)
    with pytest.raises(ValueError, match=r"one size: .*8\.png"):
        data.check_files()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_that_was_not_looked_at_is_one_sentence_when_it_is_read(make_set, monkeypatch, workers):
    monkeypatch.setattr("eomt.data.datamodule.LOOKED_AT", 1)
    monkeypatch.setattr("eomt.data.survey.IMAGES", 1)
    data = module(make_set(4), make_set(1), num_workers=workers)
    path = break_picture(data.train_set, 2)
    data.check_files()
    with pytest.raises(ValueError) as caught:
        list(data.train_dataloader())
    sentence = one_sentence(caught.value)
    assert sentence.startswith(f"{path} cannot be decoded") and "Traceback" not in sentence


def test_the_start_of_a_run_hashes_nothing(make_set, monkeypatch):
    monkeypatch.setattr("eomt.data.identity._sha256", lambda path: pytest.fail(f"{path} was read"))
    data = module(make_set(3), make_set(1))
    data.check_files()
    print_start(MaskClassificationSemantic(**TINY | {"num_classes": 3}), data)


def test_a_run_that_did_not_end_well_reads_nothing_for_its_summary_and_none_is_lost_for_a_file_that_is_gone(
    make_set, caplog
):
    data = module(make_set(3), make_set(1))
    facts = data_facts(data, RuntimeError())
    assert facts == {"train": None, "train_images": 3, "val": None, "val_images": 1}
    assert data_facts(data, None)["train"].startswith("sha256:")
    Path(data.val_set.samples[0].label.path).unlink()
    assert data_facts(data, None) == {"train_images": 3, "val_images": 1} and "is not known" in caplog.text


def test_the_fingerprint_tells_splits_and_sizes(make_set):
    one, two = (module(make_set(count), make_set(1)).fingerprint() for count in (2, 3))
    assert (one["train_images"], one["val_images"], two["train_images"]) == (2, 1, 3)
    assert one["train"] != two["train"]
    assert one["val"] == two["val"]


def test_loader_options_are_the_parameters_of_feed_and_of_the_data_module():
    parameters = {*inspect.signature(SegmentationDataModule.__init__).parameters, *inspect.signature(feed).parameters}
    assert set(LoaderOptions.__annotations__) == parameters - {"self", "train", "val", "splits", "loader"}


@pytest.mark.parametrize("name", ["cityscapes", "camvid", "folder", "toy_streets"])
def test_every_key_of_a_data_yaml_is_a_parameter_of_its_factory(name):
    from importlib import import_module

    path = Path(__file__).parents[1] / "configs" / "data" / f"{name}.yaml"
    shared = yaml.safe_load((path.parent / "base.yaml").read_text())
    keys = shared | yaml.safe_load(path.read_text())
    del keys["defaults"]
    module_name, function = keys.pop("_target_").rsplit(".", 1)
    own = set(inspect.signature(getattr(import_module(module_name), function)).parameters) - {"loader"}
    assert own <= set(keys)
    assert set(keys) <= own | set(LoaderOptions.__annotations__)


def test_a_batch_of_a_resumed_epoch_is_made_of_the_same_images_and_said_to_be(make_set, monkeypatch):
    torch.manual_seed(1)
    data = module(make_set(8), make_set(1))
    batches, items = list(data.train_dataloader()), data.batch_items(3)
    monkeypatch.setattr(SegmentationDataModule, "_batches_done", lambda self: 2)
    resumed = list(data.train_dataloader())
    assert len(resumed) == len(batches) - 2 and torch.equal(resumed[1][0], batches[3][0])
    assert data.batch_items(3) == items


def test_too_few_images_for_the_processes_are_told_before_they_start(make_set):
    data = module(make_set(4), make_set(1))
    data.check_processes(1)
    with pytest.raises(ValueError, match="Every process needs a validation image, there are 1 for 2 processes"):
        data.check_processes(2)
    with pytest.raises(ValueError, match=r"batch_size . x 9 process"):
        data.check_processes(9)
