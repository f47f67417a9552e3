import json
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image

from eomt.anomaly.cut_paste import CutPaste, Paste
from eomt.anomaly.cutouts import ToyCutOuts
from eomt.data.cityscapes import cityscapes
from eomt.data.sampler import SeededSampler
from eomt.data.toy_streets import write_toy_streets
from eomt.indices import OUTLIER

COUNTS, SIZE, SEED = (8, 3), (96, 192), 5


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Toy streets to paste on, compressed otherwise than by the script."""
    root = tmp_path_factory.mktemp("source")
    for archive in write_toy_streets(root / "zips", "clear", *COUNTS, SIZE, 0).glob("*.zip"):
        ZipFile(archive).extractall(root)
    for path in (root / "leftImg8bit").rglob("*.png"):
        Image.open(path).save(path, compress_level=9)
    return root


def make(source, out, *arguments):
    common = ("data=cityscapes", f"data.root={source}", "data.num_workers=0", "--out", out, "--seed", SEED)
    return run_script("make_cut_paste.py", *common, *arguments)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """The folder that the command line writes, and what it says."""
    out = tmp_path_factory.mktemp("written") / "deep" / "pasted"
    run = make(source, out, "data/cut_paste=toy", "data.cut_paste.probability=0.8")
    assert run.returncode == 0, run.stderr
    return out, run.stdout


@pytest.fixture(scope="module")
def online(source):
    return opened(source, CutPaste(ToyCutOuts(), probability=0.8))


def opened(root, cut_paste=None):
    return cityscapes(str(root), img_size=[64, 96], batch_size=1, num_workers=0, cut_paste=cut_paste)


def manifest(written):
    return json.loads((written[0] / "manifest.json").read_text())


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_written_is_what_training_sees_bit_for_bit(written, online):
    images = opened(written[0]).train_set.with_transform(None)
    assert images.names == online.train_set.names
    cut_paste, augment = online.train_set.transform.transforms
    pasted = online.train_set.with_transform(cut_paste)
    for index, seed in SeededSampler(online.train_set, SEED):
        assert same(images[index], pasted[index, seed])
        torch.manual_seed(seed)
        cut_paste.draw(pasted.labels(index))  # so that the augmentation draws what it draws in training
        assert same(augment(*images[index]), online.train_set[index, seed])
    assert sum((images.labels(k) == OUTLIER).any().item() for k in range(len(images))) >= 4


def test_the_first_epoch_of_a_run_with_the_seed_shows_these_images(written, online):
    torch.manual_seed(SEED)
    seeds = dict(iter(online.train_dataloader().sampler))
    pastes = manifest(written)["pastes"]
    assert pastes and all(seeds[online.train_set.names.index(paste["image"])] == paste["seed"] for paste in pastes)


def test_the_manifest_tells_enough_to_paste_again(written, online):
    images, pastes = opened(written[0]).train_set.with_transform(None), manifest(written)["pastes"]
    cut_paste = online.cut_paste
    originals = online.train_set.with_transform(None)
    for index, name in enumerate(images.names):
        entries = [
            {k: v for k, v in paste.items() if k not in ("image", "seed")} for paste in pastes if paste["image"] == name
        ]
        assert same(images[index], cut_paste.apply(*originals[index], [Paste(**entry) for entry in entries]))
    assert {paste["source"] for paste in pastes} <= {f"drawn 0/{k}" for k in range(200)}
    facts = manifest(written)
    assert facts["seed"] == SEED and "probability=0.8" in facts["cut_paste"] and facts["train_images"] == COUNTS[0]


def test_validation_images_and_labels_are_as_they_were(written, source):
    before, after = opened(source).val_set, opened(written[0]).val_set
    assert before.names == after.names
    for index in range(len(before)):
        assert same(before[index], after[index])
        assert before.samples[index].image.read() == after.samples[index].image.read()


def test_several_processes_write_the_same(written, source, tmp_path):
    run = make(source, tmp_path / "out", "data/cut_paste=toy", "data.cut_paste.probability=0.8", "data.num_workers=2")
    assert run.returncode == 0, run.stderr
    files = sorted(path.relative_to(written[0]) for path in written[0].rglob("*.*"))
    assert len(files) == 2 * sum(COUNTS) + 2
    for file in files:
        assert file.suffix == ".json" or (written[0] / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert manifest((tmp_path / "out", ""))["pastes"] == manifest(written)["pastes"]


def test_the_summary_counts_and_the_preview_is_a_picture(written):
    facts = manifest(written)
    shown = len({paste["image"] for paste in facts["pastes"]})
    assert f"{len(facts['pastes'])} objects on {shown} of 8 training images, 3 validation images" in written[1]
    assert min(Image.open(written[0] / "preview.png").size) > 300


def test_the_dataset_report_reads_it_and_counts_outliers_apart(written, tmp_path):
    data = ("data=cityscapes", f"data.root={written[0]}", "data.num_workers=0")
    run = run_script("dataset_report.py", *data, "--out", tmp_path)
    assert run.returncode == 0 and "% outliers" in run.stdout, run.stdout + run.stderr
    train = json.loads((tmp_path / "counts.json").read_text())["splits"]["train"]
    assert len(train["classes"]) == 19 and 0.001 < train["outlier_share"] < 0.3
    counted = sum(entry["pixels"] for entry in train["classes"])
    total = COUNTS[0] * SIZE[0] * SIZE[1]
    assert counted / total == pytest.approx(1 - train["ignored_share"] - train["outlier_share"])


def test_an_existing_folder_is_left_alone(source, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    run = make(source, out, "data/cut_paste=toy")
    assert run.returncode == 1 and "mine is there already" in run.stderr and "Traceback" not in run.stderr
    assert not list(out.iterdir())


def with_opaque_cutout(folder):
    Image.fromarray(np.full((8, 8, 4), 255, np.uint8)).save(folder / "whole.png")
    return ("data/cut_paste=folder", f"data.cut_paste.cutouts.root={folder}", "data.cut_paste.probability=1")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "there is nothing to paste: choose cut-outs with data/cut_paste=toy, coco or folder"),
        (("data/cut_paste=toy", "data.cut_paste.probability=1e-9"), "no object was pasted: raise data.cut_paste"),
        (("data/cut_paste=toy", "data.cut_paste.probability=2"), "probability 2: must lie above 0, up to 1"),
        (("data/cut_paste=toy", "data.cut_paste.edges=hard"), "is not in the configuration; did you mean edge"),
        (("data/cut_paste=folder",), "data.cut_paste.cutouts.root is required"),
        (("data/cut_paste=folder", "data.cut_paste.cutouts.root=/nowhere"), "has no PNG or WebP picture"),
        (("data/cut_paste=stickers",), "stickers"),
        (("data/cut_paste=toy", "--seed", "-1"), "--seed -1"),
        (with_opaque_cutout, "whole.png is opaque all over"),
        (lambda folder: (*with_opaque_cutout(folder), "data.num_workers=2"), "whole.png is opaque all over"),
    ],
)
def test_what_cannot_be_pasted_is_one_sentence_and_leaves_nothing(source, tmp_path, arguments, sentence):
    if callable(arguments):
        (tmp_path / "cutouts").mkdir()
        arguments = arguments(tmp_path / "cutouts")
    run = make(source, tmp_path / "out" / "pasted", *arguments)
    assert run.returncode == 1 and sentence in run.stderr, run.stderr
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert not list((tmp_path / "out").glob("*")) and not list((tmp_path / "out").glob(".*"))


def test_other_classes_than_those_of_cityscapes_are_refused(tmp_path):
    for split in ("train", "val"):
        for folder, mode in ((split, "RGB"), (f"{split}annot", "L")):
            (tmp_path / folder).mkdir()
            Image.new(mode, (32, 32), 3).save(tmp_path / folder / "s_0.png")
    data = ("data=camvid", f"data.root={tmp_path}", "data.num_workers=0", "data/cut_paste=toy")
    run = run_script("make_cut_paste.py", *data, "--out", tmp_path / "out")
    assert run.returncode == 1 and "data=camvid has other classes than Cityscapes" in run.stderr


def test_help_shows_examples_and_a_missing_out_is_a_mistyped_command():
    run = run_script("make_cut_paste.py", "--help")
    assert run.returncode == 0 and "examples:" in run.stdout and "data/cut_paste=coco" in run.stdout
    assert run_script("make_cut_paste.py", "data=toy_streets").returncode == 2
