"""The example of morphed faces: drawing, folders, settings, metrics, training, resuming, testing, comparing."""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
SRC = ROOT / "examples" / "morph" / "src"
sys.path.append(str(SRC))  # at its end, where its test.py hides nothing

from morph import arguments, data, faces, metrics, pictures, pretraining, saved, settings  # noqa: E402

CONFIG = ROOT / "examples" / "morph" / "configs" / "drawn.yaml"
TINY = ["identities=6", "pictures=2", "img_size=32", "batch_size=8", "epochs=3", "logger=csv", "val_share=0.34"]
TINY += ["backbone_kwargs={embed_dim: 16, depth: 2, num_heads: 2}", "weights=none", "lora_dropout=0.2"]


def read(*overrides, config=CONFIG, count=None):
    return settings.read_settings(config, overrides, count)


def script(name):
    """The module of a script of the example, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"morph_{name}", SRC / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(name, *words):
    return script(name).main([str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with LoRA as the command line makes it."""
    folder = tmp_path_factory.mktemp("run")
    assert call("train", "--output", folder, "--override", *TINY) == 0
    return folder


# Faces ---------------------------------------------------------------------------------------------------------------


def test_drawn_faces_are_the_same_for_a_seed_and_others_for_another():
    first, again, other = (faces.draw_split(3, 1, 32, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first[0], again[0]) and not np.array_equal(first[0], other[0])
    assert first[1].tolist() == [0, 1] * 3 and [len(persons) for persons in first[2]] == [1, 2] * 3


def test_warping_moves_the_face_with_its_landmarks_and_leaves_the_frame():
    person = faces.draw_identity(np.random.default_rng(0))
    rng = np.random.default_rng(1)
    image, points = faces.draw_picture(person, rng, 32)
    assert np.abs(faces.warp(image, points, points) - image).max() < 1e-6  # aligned with itself, nothing moves
    to_the_right = points.copy()
    to_the_right[: -len(faces.FRAME), 0] += 1 / 32
    moved = faces.warp(image, points, to_the_right)
    assert np.abs(moved[12:20, 13:20] - image[12:20, 12:19]).mean() < 0.02  # by one pixel
    assert np.abs(moved[0, 0] - image[0, 0]).max() < 1e-6


def test_neither_noise_nor_blur_tells_a_morph():
    images, labels, _ = faces.draw_split(24, 1, 32, np.random.default_rng(0))
    corner = images[:, :3, :3].astype(float).std((1, 2)).mean(-1)  # nothing but background and noise
    assert corner[labels == 0].mean() == pytest.approx(corner[labels == 1].mean(), rel=0.15)


def test_drawn_persons_of_the_splits_and_of_the_pretraining_are_different_ones(monkeypatch):
    drawn = []

    def remembered(rng):
        person = draw(rng)
        drawn.append((person.width, person.height, *person.eyes, *person.mouth))
        return person

    draw = faces.draw_identity
    for module in (faces, pretraining):
        monkeypatch.setattr(module, "draw_identity", remembered)
    splits = data.drawn_splits(6, 1, 16, 0.34, 0)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [8, 4, 6]  # of 4, 2 and 3 persons
    next(pretraining.batches(read("mae_steps=2", "mae_batch_size=4", "img_size=16")))
    assert len(drawn) == 4 + 2 + 3 + 8 and len({*drawn}) == len(drawn)


def test_data_follow_from_their_own_seed_and_not_from_that_of_the_training():
    first, same, other = (
        data.read_splits(read(*TINY, *words))["train"].pictures for words in ([], ["seed=1"], ["data_seed=1"])
    )
    assert all(map(np.array_equal, first, same)) and not any(map(np.array_equal, first, other))


# Folders -------------------------------------------------------------------------------------------------------------


def put(root, name, value):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(value).integers(0, 255, (40, 30, 3), np.uint8)).save(path)


def folder_of(root, names):
    for number, name in enumerate(names):
        put(root, name, number)
    return read(f"data={root}", "img_size=32")


def write_rows(root, columns, rows):
    for number, row in enumerate(rows):
        put(root, row[0], number)
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return read(f"data={root}", "img_size=32")


def test_folder_names_say_label_and_split(tmp_path, caplog):
    labels, splits = ("bona-fide", "Morphed"), ("Train", "test")
    names = [f"{split}/{label}/{n}.png" for split in splits for label in labels for n in "ab"]
    found = pictures.read_folder(folder_of(tmp_path, names))
    assert [len(found[name]) for name in ("train", "val", "test")] == [3, 1, 4]
    assert sorted((p.path.parent.name, p.label) for p in found["test"])[1:3] == [("Morphed", 1), ("bona-fide", 0)]
    assert "identities are not known" in caplog.text


def test_a_csv_says_label_split_and_identity_and_persons_are_held_out_whole(tmp_path):
    labels = ["bona_fide"] * 8 + ["morph"] * 8
    rows = [(f"{n}.png", label, "train", f"{n % 8}") for n, label in enumerate(labels)]
    rows += [(f"t{n}.png", "morph", "test", f"{n + 10}") for n in range(4)]
    splits = pictures.read_folder(write_rows(tmp_path, ("file", "label", "split", "identity"), rows))
    persons = {name: {i for p in part for i in p.identities} for name, part in splits.items()}
    assert splits["test"] and splits["val"] and not persons["train"] & persons["val"]
    assert sum(map(len, splits.values())) == 20


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_the_share_to_validate_with_is_the_one_asked_for(share, caplog):
    alone = [pictures.Picture(Path(f"{n}.png"), n % 2, "train") for n in range(20)]
    known = [pictures.Picture(Path(f"{n}.png"), 0, "train", (str(n),)) for n in range(20)]
    for train in (alone, known):
        kept, val = pictures.hold_out(train, share)
        assert len(val) == 20 * share and len(kept) + len(val) == 20
    morph = pictures.Picture(Path("m.png"), 1, "train", tuple(map(str, range(20))))
    assert len(pictures.hold_out([*known, morph], share)[0]) == 20 - 20 * share
    assert "one to validate with are left out" in caplog.text


def test_without_splits_identities_decide_and_morphs_across_are_left_out(tmp_path, caplog):
    rows = [(f"{n}.png", "bona_fide", str(n)) for n in range(30)]
    rows += [(f"m{n}.png", "morph", f"{n};{n + 1}") for n in range(29)]
    splits = pictures.read_folder(write_rows(tmp_path, ("file", "label", "identity"), rows))
    assert all(splits.values()) and "morphs of persons in two splits are left out" in caplog.text


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (("file",), [("a.png",)], "has no column label"),
        (("file", "label"), [("a.png", "fake")], "line 2: label 'fake' is none"),
        (("file", "label", "split"), [("a.png", "morph", "sometimes")], "split 'sometimes' is none"),
        (("file", "label"), [("a.png", "morph")], "neither splits nor identities"),
        (("file", "label", "split"), [("a.png", "morph", "train"), ("b.png", "morph", "")], "in no split"),
        (("file", "label", "split"), [("a.png", "morph", "train")] * 2, "names a picture twice"),
        (
            ("file", "label", "split", "identity"),
            [("a.png", "bona_fide", "train", "ann"), ("b.png", "morph", "test", "ann+bob")],
            "identity ann in train and in test",
        ),
    ],
)
def test_a_csv_that_cannot_be_meant_is_refused(tmp_path, columns, rows, message):
    with pytest.raises(ValueError, match=message):
        pictures.read_folder(write_rows(tmp_path, columns, rows))


def test_a_picture_of_training_and_test_is_refused(tmp_path):
    config = folder_of(tmp_path, ["train/morph/a.png", "train/bona_fide/b.png", "train/bona_fide/c.png"])
    (tmp_path / "test" / "bona_fide").mkdir(parents=True)
    (tmp_path / "test" / "bona_fide" / "d.png").write_bytes((tmp_path / "train/bona_fide/c.png").read_bytes())
    with pytest.raises(ValueError, match=r"d\.png in test is a picture of train"):
        pictures.read_folder(config)


def test_a_picture_that_is_cut_off_is_refused_before_training(tmp_path):
    config = folder_of(tmp_path, ["train/morph/a.png", "train/bona_fide/b.png"])
    whole = (tmp_path / "train/morph/a.png").read_bytes()
    (tmp_path / "train/morph/a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.png"):
        pictures.read_folder(config)


def test_a_picture_in_no_labelled_folder_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lies in no folder that says what it is"):
        pictures.read_folder(folder_of(tmp_path / "a", ["train/x/a.png"]))
    config = write_rows(tmp_path, ("file", "label", "split"), [("a.png", "morph", "train")])
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png is not there"):
        pictures.read_folder(config)


def test_a_picture_is_cut_to_its_middle_square(tmp_path):
    put(tmp_path, "a.png", 0)
    assert pictures.load_picture(tmp_path / "a.png", 32).shape == (32, 32, 3)


def test_augmentation_follows_from_the_seed():
    image = torch.rand(3, 32, 32)
    assert torch.equal(data.augment(image, 3), data.augment(image, 3))
    assert any(not torch.equal(data.augment(image, seed), image) for seed in range(4))


# Settings ------------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_documents():
    own = read()
    assert own == settings.Settings()
    assert (own.lora_r, own.lora_alpha, own.lora_dropout, own.freeze_strategy) == (4, 32, 0.1, "backbone_only")
    assert own.lora().target_modules == ("query", "key", "value")


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("lora_r=8", "lora_r", 8),
        ("lora_alpha=16", "lora_alpha", 16),
        ("lora_dropout=0", "lora_dropout", 0),
        ("lora_targets=[query, value]", "lora_targets", ["query", "value"]),
        ("lora_lr=5e-4", "lora_lr", 5e-4),
        ("use_lora=false", "use_lora", False),
        ("backbone_kwargs={embed_dim: 8}", "backbone_kwargs", {"embed_dim": 8}),
        ("preset=null", "preset", None),
        ("logger=wandb", "logger", "wandb"),
    ],
)
def test_an_override_is_read_by_the_type_of_its_setting(override, name, value):
    assert getattr(read(override), name) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora_rank=8", "no setting 'lora_rank'; did you mean lora_"),
        ("lora_r", "NAME=VALUE is meant"),
        ("lora_r=true", "lora_r 'true': should be a valid integer"),
        ("lora_r=0", "LoRA rank 0"),
        ("lora_dropout=1", "LoRA dropout 1"),
        ("epochs=0", "epochs '0': should be greater than 0"),
        ("batch_size=1", "batch_size '1'"),
        ("freeze_strategy=head", "freeze_strategy 'head': should be 'backbone_only' or 'none'"),
        ("freeze_strategy=none", "set use_lora=false"),
        ("img_size=60", "multiples of patch_size 8"),
        ("preset=huge", "preset 'huge'"),
        ("lora_targets={", "no YAML"),
    ],
)
def test_an_override_that_cannot_be_meant_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        read(override)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["use_lora=false", "lora_r=8", "backbone_lr=1e-3"], {"lora_r", "backbone_lr"}),
        (["unfreeze_last_n=1", "mae_steps=9"], {"unfreeze_last_n"}),
        (["weights=none", "mae_steps=9", "data_seed=1"], {"mae_steps"}),
        (["weights=none", "data=folder", "pictures=9", "data_seed=1"], {"pictures", "data_seed"}),
        (["use_lora=false", "unfreeze_last_n=1", "backbone_lr=1e-3"], set()),
    ],
)
def test_an_override_that_does_nothing_is_named(words, named):
    assert settings.idle(read(*words), settings.read_overrides(words)).keys() == named


def test_the_whole_backbone_and_its_last_blocks_contradict_each_other():
    with pytest.raises(ValueError, match="unfreeze_last_n=1 a part of it"):
        read("use_lora=false", "freeze_strategy=none", "unfreeze_last_n=1")


@pytest.mark.parametrize(
    ("images", "name", "rank", "epochs"), [(500, "small", 4, 30), (3000, "medium", 8, 20), (9000, "large", 16, 10)]
)
def test_a_preset_has_rank_rate_and_epochs_and_overrides_go_before_it(images, name, rank, epochs):
    chosen = read("preset=auto", count=lambda _: images)
    assert (chosen.preset, chosen.lora_r, chosen.epochs) == (name, rank, epochs)
    assert chosen.lora_lr == pytest.approx(5e-4 if name != "large" else 3e-4)
    changed = read(f"preset={name}", "lora_r=2", "epochs=1")
    assert (changed.lora_r, changed.epochs, changed.lora_lr) == (2, 1, chosen.lora_lr)


def test_files_that_are_not_there_are_named(tmp_path):
    for override in (f"data={tmp_path / 'none'}", f"weights={tmp_path / 'none'}"):
        with pytest.raises(FileNotFoundError, match=r"none: there is no such"):
            read(override).check_files()


def test_both_configurations_are_valid():
    assert read(config=CONFIG.with_name("mae_base.yaml")).backbone_name == "vit_base_patch16_224.mae"


# Metrics -------------------------------------------------------------------------------------------------------------

BONA_FIDE_SCORES = [0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40, 0.45, 0.90]
MORPH_SCORES = [0.12, 0.42, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.95, 0.99]


def hand_made(bona_fide=BONA_FIDE_SCORES, morphs=MORPH_SCORES):
    return torch.tensor(bona_fide + morphs), torch.tensor([0] * len(bona_fide) + [1] * len(morphs))


def test_error_rates_of_hand_made_scores():
    found = metrics.detection_metrics(*hand_made())
    assert found["bona_fide"] == found["morphs"] == 10
    assert found["macer_at_bpcer_1"] == found["macer_at_bpcer_5"] == pytest.approx(0.8)  # above 0.90 lie two morphs
    assert found["macer_at_bpcer_10"] == pytest.approx(0.2)  # one bona fide picture may be wrong: from 0.60 on
    assert found["d_eer"] == pytest.approx(0.2)  # from 0.45 on, two of ten are wrong in both classes


def test_scores_may_be_logits_of_any_size():
    scores, labels = hand_made()
    assert metrics.detection_metrics(torch.logit(scores), labels) == pytest.approx(
        metrics.detection_metrics(scores, labels)
    )


def test_perfect_and_useless_scores():
    perfect = metrics.detection_metrics(*hand_made([0.1, 0.2], [0.8, 0.9]))
    useless = metrics.detection_metrics(*hand_made([0.5] * 4, [0.5] * 4))
    assert [perfect[name] for name in ("d_eer", "macer_at_bpcer_1")] == [0, 0]
    assert [useless[name] for name in ("d_eer", "macer_at_bpcer_1")] == [0.5, 1]


@pytest.mark.parametrize(("bona_fide", "morphs", "absent"), [([], [0.5], "bona fide"), ([0.5], [], "morphs")])
def test_without_a_class_there_is_no_error_rate(bona_fide, morphs, absent, caplog):
    found = metrics.detection_metrics(*hand_made(bona_fide, morphs))
    assert found["d_eer"] is None and found["macer_at_bpcer_5"] is None and f"no {absent} pictures" in caplog.text
    assert "D-EER                 none" in metrics.metrics_table(found)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"1 of 2 scores are not finite.* has diverged; lower lr and lora_lr"):
        metrics.detection_metrics(torch.tensor([float("nan"), 0.2]), torch.tensor([0, 1]))


def test_the_det_curve_is_drawn(tmp_path):
    metrics.draw_det({"detector": metrics.error_rates(*hand_made())}, tmp_path / "det.png")
    assert Image.open(tmp_path / "det.png").size[0] > 300


# Pretraining ---------------------------------------------------------------------------------------------------------


def test_drawn_weights_are_pretrained_once_and_load_into_the_detector(tmp_path, monkeypatch):
    monkeypatch.setenv("EOMT_CACHE", str(tmp_path))
    own = read(*TINY, "weights=drawn", "mae_steps=2", "mae_batch_size=4")
    folder = pretraining.base_weights(own)
    monkeypatch.setattr(pretraining, "pretrain", None)
    assert pretraining.base_weights(own) == folder
    from morph.module import MorphDetector

    detector = MorphDetector(own, folder)
    from transformers import ViTMAEModel

    peer, images = ViTMAEModel.from_pretrained(folder, mask_ratio=0.0).eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        pixels = detector.encoder.normalize(images)
        in_order = torch.arange(16.0).expand(2, 16)
        expected = peer(pixels, noise=in_order).last_hidden_state
        torch.testing.assert_close(detector.eval().encoder.backbone.forward_features(pixels), expected)


def test_without_transformers_pretraining_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        pretraining.mae_config(read())


def test_sizes_that_pretraining_needs_are_named():
    with pytest.raises(ValueError, match="lack depth, num_heads"):
        pretraining.mae_config(read("backbone_kwargs={embed_dim: 16}"))


# Runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_passes_the_audit_and_leaves_its_base_as_it_was(run):
    summary = json.loads((run / "summary.json").read_text())
    assert all(check["passed"] for check in summary["audit"].values()) and "frozen_unchanged" in summary["audit"]
    assert summary["frozen_unchanged"] and summary["frozen_tensors"] > 20
    rank, width, depth = 4, 16, 2
    assert summary["trainable_by_part"] == {
        "backbone LoRA": depth * rank * (width + 3 * width), "backbone": 0, "head": 2 * width + 2,
    }  # fmt: skip
    left = {"settings.json", "rest.safetensors", "adapter", "base.safetensors"}
    assert {path.name for path in (run / "model").iterdir()} == left
    assert (run / "test" / "det.png").is_file() and (run / "metrics.csv").is_file()


def test_testing_repeats_the_score_of_the_run_with_the_adapters_own_settings(run, tmp_path, capsys):
    assert call("test", "--model_path", run / "model", "--output", tmp_path, "--lora_r", "4") == 0
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads((run / "summary.json").read_text())["test"]
    assert (tmp_path / "scores.csv").read_text() == (run / "test" / "scores.csv").read_text()
    assert "D-EER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--override", "lora_r=8"], r"LoRA rank 8: the adapter in \S+ was trained with 4"),
        (["--lora_r", "8"], r"LoRA rank 8: the adapter in \S+ was trained with 4"),
        (["--lora_alpha", "16"], r"LoRA alpha 16\.0: the adapter in \S+ was trained with 32"),
        (["--lora_dropout", "0.1"], r"LoRA dropout 0\.1: the adapter in \S+ was trained with 0\.2"),
        (["--override", "img_size=64"], r"img_size=64: the detector in \S+ was trained with img_size=32"),
        (["--override", "use_lora=false"], r"use_lora=False: the detector in \S+ was trained with use_lora=True"),
        (["--override", "colour=red"], "no setting 'colour'"),
    ],
)
def test_a_flag_that_contradicts_the_detector_is_an_error(run, words, message, capsys):
    assert call("test", "--model_path", run / "model", *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error)


def test_a_folder_without_a_detector_is_named(tmp_path, capsys):
    assert call("test", "--model_path", tmp_path) == 1
    assert "holds no settings.json: give the folder model/ of a run" in capsys.readouterr().err


def test_an_adapter_on_another_base_is_refused(run, tmp_path):
    from morph.module import MorphDetector

    shutil.copytree(run / "model", tmp_path / "model")
    other = MorphDetector(read(*TINY, "seed=1", "use_lora=false"))
    saved.save_base(other, tmp_path / "model" / "base.safetensors")
    with pytest.raises(ValueError, match="trained on other base weights"):
        saved.load_detector(tmp_path / "model", saved.saved_settings(tmp_path / "model"))


def test_a_detector_on_drawn_weights_opens_where_they_would_be_drawn_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("EOMT_CACHE", str(tmp_path / "here"))
    words = [*TINY, "weights=drawn", "mae_steps=2", "mae_batch_size=4", "epochs=2"]
    assert call("train", "--output", tmp_path / "run", "--override", *words) == 0
    shutil.move(tmp_path / "run", tmp_path / "moved")
    monkeypatch.setenv("EOMT_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(pretraining, "pretrain", None)
    assert call("test", "--model_path", tmp_path / "moved" / "model") == 0
    found = json.loads((tmp_path / "moved" / "test" / "metrics.json").read_text())
    summary = json.loads((tmp_path / "moved" / "summary.json").read_text())
    assert found == summary["test"]
    (tmp_path / "moved" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "moved" / "model")
    assert call("train", "--output", tmp_path / "moved", "--resume", "auto", "--override", *words) == 0
    assert json.loads((tmp_path / "moved" / "summary.json").read_text())["test"] == found


def test_a_run_is_not_written_over(run, capsys):
    assert call("train", "--output", run, "--override", *TINY) == 1
    assert f"--output {run} holds a run: continue it with --resume auto" in capsys.readouterr().err


def test_remedies_are_named_as_the_settings_are(tmp_path, monkeypatch, capsys):
    from morph import module

    monkeypatch.setattr(module.F, "cross_entropy", lambda logits, labels: logits.sum() * float("nan"))
    words = ["--output", tmp_path / "run", "--override", *TINY, "epochs=9", "use_lora=false"]
    assert call("train", *words) == 1
    assert "; lower lr, or set precision=32-true, now it is 32-true" in capsys.readouterr().err


def test_help_fits_the_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("train", "test", "compare"):
        with pytest.raises(SystemExit):
            call(name, "--help")
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80, name


def test_other_settings_do_not_resume_a_run(run, capsys):
    assert call("train", "--output", run, "--resume", "auto", "--override", *TINY, "lr=1e-2") == 1
    said = capsys.readouterr().err
    assert "lr 0.001, now it is 0.01" in said and "ckpt_path" not in said


def test_an_interrupted_run_says_how_it_goes_on_and_ends_as_a_signal_does(run, tmp_path, monkeypatch, capsys):
    from morph import module

    def interrupted(self):
        if self.current_epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.MorphDetector, "on_train_epoch_start", interrupted)
        assert call("train", "--output", tmp_path / "run", "--override", *TINY) == 130
    assert f"go on with the same settings and --output {tmp_path / 'run'} --resume auto" in capsys.readouterr().out
    assert call("train", "--output", tmp_path / "run", "--resume", "auto", "--override", *TINY) == 0


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(run, tmp_path, monkeypatch):
    from morph import module, running

    def interrupted(self):
        if self.current_epoch == 2:
            raise RuntimeError("interrupted")

    own = read(*TINY)
    with monkeypatch.context() as patch:
        patch.setattr(module.MorphDetector, "on_train_epoch_start", interrupted)
        with pytest.raises(RuntimeError, match="interrupted"):
            running.train(own, tmp_path / "again")
    running.train(own, tmp_path / "again", "auto")
    for name in ("rest.safetensors", "adapter/adapter_model.safetensors"):
        first, second = (saved.read_tensors(folder / "model" / name)[0] for folder in (run, tmp_path / "again"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_seconds_of_a_run_that_went_on_are_those_of_all_its_parts():
    from morph.running import Clock

    clock = Clock()
    assert max(clock.spent().values()) < 50
    clock.load_state_dict({"seconds": 100.0, "cpu_seconds": 90.0})
    spent = clock.spent()
    assert (
        100 <= spent["seconds"] < 150 and 90 <= spent["cpu_seconds"] < 150 and clock.state_dict().keys() == spent.keys()
    )


def test_a_checkpoint_that_is_named_is_one_to_go_on_from_with_its_own_settings(run, capsys):
    last = run / "checkpoints" / "last.ckpt"
    assert call("train", "--output", run, "--resume", last, "--override", *TINY, "lora_r=2") == 1
    assert "lora_r 4, now it is 2" in capsys.readouterr().err


def test_checkpoints_hold_what_trains_alone(run):
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state and all("lora_" in key or key.startswith("head.") for key in state)


def test_too_few_pictures_and_a_single_class_are_errors():
    with pytest.raises(ValueError, match=r"8 training pictures|16 training pictures"):
        data.FaceData(read(*TINY, "batch_size=64")).check_training()
    loaded = data.FaceData(read(*TINY))
    loaded.splits = {"train": data.Faces([np.zeros((32, 32, 3), np.uint8)] * 8, [1] * 8, 32)}
    with pytest.raises(ValueError, match="all training pictures are morphs"):
        loaded.check_training()


def test_a_folder_of_pictures_trains_and_is_tested(tmp_path, capsys):
    places = [(split, n) for split in ("train", "val", "test") for n in range(8)]
    rows = [(f"{split}{n}.png", ("bona_fide", "morph")[n % 2], split, f"{split}{n}") for split, n in places]
    write_rows(tmp_path / "data", ("file", "label", "split", "identity"), rows)
    words = [*TINY, f"data={tmp_path / 'data'}", "epochs=1", "use_lora=false", "logger=tensorboard"]
    assert call("train", "--output", tmp_path / "run", "--override", *words) == 0
    with (tmp_path / "run" / "test" / "scores.csv").open() as file:
        assert sorted(Path(row["picture"]).name for row in csv.DictReader(file)) == [f"test{n}.png" for n in range(8)]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_the_comparison_makes_its_table_and_does_not_repeat_what_is_finished(tmp_path, capsys, monkeypatch):
    variants = ["frozen", "last_block", "full"]
    words = ["--output", tmp_path, "--seeds", "0", "--variants", *variants, "--override", *TINY, "epochs=1"]
    assert call("compare", *words) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["variant"] for run in results["runs"]] == variants
    sizes = [run["trainable_parameters"] for run in results["runs"]]
    assert sizes[0] == 34 and sizes[0] < sizes[1] < sizes[2] == results["runs"][2]["total_parameters"]
    table = (tmp_path / "results.md").read_text()
    assert "| frozen |" in table and "unchanged |" in table and "(100.0 %)" in table and "\n\nOne seed; " in table
    assert results["seeds"] == [0] and results["git_commit"] == str(results["runs"][0]["git_commit"])
    assert {"commands", "machine", "versions", "settings", "what"} < results.keys()
    assert not {*settings.WHAT_TRAINS, "seed"} & results["settings"].keys() and results["settings"]["epochs"] == 1
    from morph import running

    monkeypatch.setattr(running, "fit", None)
    assert call("compare", *words) == 0


def test_the_readme_shows_the_table_of_its_results():
    from morph.comparing import results_table

    folder = CONFIG.parents[1]
    results, text = json.loads((folder / "results.json").read_text()), (folder / "README.md").read_text()
    shown = text.split("<!-- results.json -->\n")[1].split("<!-- end of results.json -->")[0]
    assert shown.strip() == results_table(results).strip()
    assert all(run["status"] == "finished" and run["git_commit"] == results["git_commit"] for run in results["runs"])


@pytest.mark.parametrize("word", ["use_lora=false", "unfreeze_last_n=1", "freeze_strategy=none", "seed=3"])
def test_a_comparison_refuses_what_it_sets_itself(tmp_path, word, capsys):
    assert call("compare", "--output", tmp_path, "--override", *TINY, word) == 1
    assert f"override {word.split('=')[0]}: a comparison sets it for each of its runs" in capsys.readouterr().err


def test_the_variants_of_a_comparison_are_what_they_are_called_whatever_the_file_says(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("use_lora: false\nunfreeze_last_n: 1\npreset: auto\n")
    names = list(settings.VARIANTS)
    cells = settings.read_variants(names, [0, 1], file, ["lora_targets=[query]"], lambda own: 12_800)
    assert list(cells) == [(name, seed) for name in names for seed in (0, 1)]
    assert [cell.seed for cell in cells.values()] == [0, 1] * 5
    trained = [(cells[name, 0].use_lora, cells[name, 0].unfreeze_last_n) for name in names]
    assert trained == [(False, 0), (False, 1), (True, 0), (False, 0), (False, 0)]
    assert {(cell.preset, cell.lora_r, cell.epochs) for cell in cells.values()} == {("large", 16, 10)}


def test_a_spread_is_mean_and_deviation_in_percent():
    from morph.comparing import spread

    assert spread([0.1, 0.2, 0.3]) == "20.0 ± 10.0" and spread([0.25]) == "25.0" and spread([None]) == "none"


RATES = ["lr=1e-4", "lora_lr=2e-4", "backbone_lr=3e-4", "weight_decay=0.5"]


@pytest.mark.parametrize(
    ("overrides", "groups", "trained"),
    [
        (["lora_targets=[query, out]"], {("lora", 2e-4, 0.0), ("heads", 1e-4, 0.5)}, {"qkv", "proj"}),
        (["lora_r=2"], {("lora", 2e-4, 0.0), ("heads", 1e-4, 0.5)}, {"qkv"}),
        (["use_lora=false", "unfreeze_last_n=1"], {("backbone", 3e-4, 0.5), ("heads", 1e-4, 0.5)}, {"1"}),
        (["use_lora=false"], {("heads", 1e-4, 0.5)}, set()),
    ],
)
def test_each_kind_of_parameter_has_its_rate(overrides, groups, trained):
    from morph.module import MorphDetector

    detector = MorphDetector(read(*TINY, *RATES, *overrides))
    found = detector.groups()
    assert {(group["kind"], group["lr"], group["weight_decay"]) for group in found} == groups
    names = [n for n, p in detector.encoder.backbone.named_parameters() if p.requires_grad]
    assert {n.split(".")[1 if "use_lora=false" in overrides else 3] for n in names} == trained


def test_the_whole_backbone_trains_without_freezing():
    from morph.module import MorphDetector

    detector = MorphDetector(read(*TINY, "use_lora=false", "freeze_strategy=none"))
    assert detector.adapted is None and all(p.requires_grad for p in detector.parameters())


def test_loaders_and_trainer_heed_their_settings(tmp_path):
    from morph import running

    own = read(*TINY, "num_workers=2", "precision=bf16-mixed")
    loader = data.FaceData(own).train_dataloader()
    assert (loader.num_workers, loader.batch_size) == (2, 8)
    trainer = running.make_trainer(own, tmp_path)
    assert (trainer.max_epochs, trainer.precision) == (3, "bf16-mixed")


def test_auto_counts_the_training_pictures():
    assert arguments.count(read(*TINY)) == 16
    with pytest.raises(ValueError, match=r"preset=auto counts training images.*name a preset"):
        read("preset=auto")


def test_the_rates_rise_over_the_share_of_steps_that_warms_up_and_fall_after():
    from morph.module import MorphDetector

    detector = MorphDetector(read(*TINY, "warmup=0.4", "lr=1e-2"))
    detector.trainer = SimpleNamespace(estimated_stepping_batches=10)
    found = detector.configure_optimizers()
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    head = next(group for group in optimizer.param_groups if group["kind"] == "heads")
    rates = []
    for _ in range(10):
        rates.append(head["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01]) and rates[4:] == sorted(rates[4:], reverse=True)
    assert head["lr"] == pytest.approx(0, abs=1e-9)


def test_frozen_weights_that_change_are_an_error(tmp_path, monkeypatch, capsys):
    from morph import module

    def spoil(self):
        self.encoder.backbone.norm.weight.data += 1

    monkeypatch.setattr(module.MorphDetector, "on_train_end", spoil)
    words = [*TINY, "epochs=1", "use_lora=false"]
    assert call("train", "--output", tmp_path / "run", "--override", *words) == 1
    assert "frozen weights changed in training: encoder.backbone.norm.weight" in capsys.readouterr().err


def test_wandb_and_none_are_loggers_by_choice(tmp_path, monkeypatch):
    from morph import running

    monkeypatch.setattr(running, "wandb_logger", lambda project, name, save_dir: (project, name, save_dir))
    assert running.make_loggers(read("logger=wandb"), tmp_path)[1] == ("morph", tmp_path.name, tmp_path)
    assert len(running.make_loggers(read("logger=csv"), tmp_path)) == 1


def test_without_a_network_the_hub_is_named_with_the_ways_out(monkeypatch):
    from morph import module

    def offline(*args, **kwargs):
        raise ConnectionError("offline") from OSError()

    monkeypatch.setattr(module, "ViT", offline)
    with pytest.raises(ConnectionError, match=r"weights=hub: timm's \w+ could not be had \(OSError\).*weights=FILE"):
        module.MorphDetector(read("weights=hub"))


def test_the_lightning_modules_are_short():
    for name in ("module", "data"):
        assert len((SRC / "morph" / f"{name}.py").read_text().splitlines()) <= 200


def test_wrong_settings_are_said_before_torch_is_imported():
    code = (
        f"import sys; sys.modules['torch'] = None; sys.path[:0] = [{str(SRC)!r}, {str(ROOT)!r}]; import train, test\n"
    )
    code += "sys.exit(train.main(['--override', 'lora_r=0']) + test.main(['--model_path', 'nowhere']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SRC)
    assert result.returncode == 2 and "LoRA rank 0" in result.stderr and "model_path nowhere" in result.stderr
