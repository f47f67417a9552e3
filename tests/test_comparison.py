"""Runs side by side: reading, comparability, means, intervals, the table."""

import csv
import hashlib
import json
import math
import os
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import ttest_rel

from eomt.anomaly.benchmarks import BENCHMARKS
from eomt.comparison import evaluations
from eomt.comparison.bootstrap import (
    bootstrap_iou,
    image_weights,
    mean_over_seeds,
    resample,
    times_drawn,
    units,
    widening,
)
from eomt.comparison.cells import finished, outdated
from eomt.comparison.counts import hits_and_unions, iou, mean_iou
from eomt.comparison.differences import differences
from eomt.comparison.runs import load_runs
from eomt.comparison.statistics import compare, image_gains
from eomt.comparison.table import NONE, table, warnings_of
from eomt.comparison.verdicts import headline
from eomt.training.class_scores import iou_per_class

ROOT = Path(__file__).parent.parent
CLASSES = ("sky", "road", "traffic_sign")
COLORS = ((70, 130, 180), (128, 64, 128), (220, 220, 0))
PARAMETERS = {"none": 4000, "head": 300, "lora_r8": 500, "lora_r16": 600, "full": 4000}
PARAMETERS |= {"lora_r4": 400, "lora_last_k": 400, "unfreeze_last_n": 1000}


def confusion(accuracy, seed=0, images=20, classes=3, pixels=2000):
    """Counts [N, K, K] of a network that labels this share of the pixels right and the others at random."""
    rng = np.random.default_rng(seed)
    chance = np.full((classes, classes), (1 - accuracy) / (classes - 1)) + np.eye(classes) * (
        accuracy - (1 - accuracy) / (classes - 1)
    )
    sizes = rng.integers(pixels // 4, pixels, (images, classes))
    return np.stack([[rng.multinomial(n, p) for n, p in zip(row, chance, strict=True)] for row in sizes])


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def write_evaluation(folder, counts, domain="target", **changes):
    """evaluation/`domain`.json and .npz; None for a change leaves the entry out."""
    classes = changes.pop("classes", CLASSES)
    scores = iou_per_class(torch.from_numpy(counts.sum(0)))
    facts = {
        "schema_version": 1,
        "domain": domain,
        "description": "drawn, sequences 1",
        "miou": float(scores.nanmean()),
        "class_iou": {name: None if v != v else v for name, v in zip(classes, scores.tolist(), strict=True)},
        "classes": list(classes),
        "class_colors": [list(COLORS[k % 3]) for k in range(len(classes))],
        "images": [f"image_{i:03d}" for i in range(len(counts))],
        "data": digest(domain),
        "img_size": [64, 128],
        "precision": "32-true",
    }
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in (facts | changes).items() if value is not None}
    (folder / "evaluation" / f"{domain}.json").write_text(json.dumps(kept))
    np.savez_compressed(folder / "evaluation" / f"{domain}.npz", confusion=counts)


def write_metrics(path, points):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", "train/loss", "val/miou"])
        for step, miou in points:
            writer.writerow([step, 0, 1.5, ""])
            writer.writerow([step, 0, "", miou])


def write_run(folder, variant, seed=0, counts=None, source=None, evaluation=(), model=(), **summary):
    """A run folder as training and evaluation leave it; None for an entry of the summary leaves it out."""
    folder.mkdir(parents=True)
    untrained = variant == "none"
    lora = variant.startswith("lora")
    config = {
        "variant": variant,
        "name": "test",
        "seed": seed,
        "model": {"use_lora": lora, "lora_rank": 8, "img_size": [64, 128], "freeze": []} | dict(model),
        "trainer": {"precision": "32-true"},
        "callbacks": {"save_best": {"keep": "last"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    artefact = "adapter" if lora else "model"
    size = 4 * PARAMETERS.get(variant, 700)
    facts = {
        "schema_version": 1,
        "status": "finished",
        "miou": 0.5,
        "class_iou": dict.fromkeys(CLASSES, 0.5),
        "steps": 0 if untrained else 100,
        "trainable_parameters": PARAMETERS.get(variant, 700),
        "total_parameters": 4000,
        "artefact": artefact,
        "files": {f"{artefact}/a.safetensors": size, f"{artefact}/c.json": 10, "checkpoints/last.ckpt": 3 * size},
        "peak_memory": {"bytes": (100 + seed) << 20, "of": "resident set of the process"},
        "seconds_per_step": {"total": 0.5 + seed, "data": 0.1, "compute": 0.4 + seed},
        "wall_seconds": 60.0 + 60 * seed,
        "data": {"train": digest("train"), "val": digest("target"), "train_images": 40, "val_images": 20},
        "seed": seed,
        "lora_audit": {"targets_found": {"passed": True, "detail": ""}} if lora else None,
        "versions": {"python": "3.11.7", "torch": "2.7.0"},
        "git_commit": "0123456789abcdef",
        "machine": {"platform": "Linux", "threads": 2, "gpus": []},
        "command": ["train.py", f"variant={variant}", f"seed={seed}"],
        "start_fingerprint": digest(f"start {seed}"),
        "batches": None if untrained else digest(f"batches {seed}"),
        "flops_per_step": 3 * 10**9,
    } | summary
    (folder / "summary.json").write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))
    if not untrained:
        write_metrics(folder / "metrics.csv", [(s - 1, 0.3 + s / 500 + seed / 100) for s in (25, 50, 75, 100)])
    write_evaluation(folder, confusion(0.8, seed) if counts is None else counts, **dict(evaluation))
    if source is not None:
        write_evaluation(folder, source, "source")
    return folder


def write_anomalies(run, benchmark="toy_anomalies", scores=None, anomalous=2000, **changes):
    """anomaly/`benchmark`.json; `scores` are (AuPRC, FPR95) by score."""
    results = [
        {
            **{"score": score.partition("@")[0], "temperature": float(score.partition("@")[2] or 1)},
            **{"auprc": auprc, "fpr95": fpr95, "error": 0.0, "threshold": 0.1, "f1": 0.5},
            **{"anomalous": anomalous, "valid": 100_000, "siou": 0.3, "ppv": 0.3, "component_f1": 0.3},
        }
        for score, (auprc, fpr95) in (scores or {"rba": (0.5, 0.2)}).items()
    ]
    facts = {
        "schema_version": 1,
        "benchmark": benchmark,
        "title": BENCHMARKS[benchmark].title,
        "images": 60,
        "data": digest(f"images of {benchmark}"),
        "precision": "32-true",
        "img_size": [64, 128],
        "results": results,
    }
    (run / "anomaly").mkdir(exist_ok=True)
    (run / "anomaly" / f"{benchmark}.json").write_text(json.dumps(facts | changes))


def write_failed(folder, variant, seed, error="CUDA out of memory"):
    folder.mkdir(parents=True)
    facts = {"variant": variant, "seed": seed, "status": "failed", "error": error, "command": ["train.py"]}
    (folder / "cell.json").write_text(json.dumps(facts))
    return folder


def write_matrix(root):
    """Three variants of two seeds, and one failed cell."""
    root.mkdir()
    (root / "matrix.json").write_text(json.dumps({"variants": ["none", "lora_r8", "full"], "seeds": [0, 1, 2]}))
    quality = {"none": 0.5, "lora_r8": 0.85, "full": 0.87}
    for seed in (0, 1):
        for variant, accuracy in quality.items():
            counts, source = confusion(accuracy, seed), confusion(round(1.4 - accuracy, 2), 7 + seed)
            write_run(root / variant / f"seed_{seed}", variant, seed, counts, source)
    write_failed(root / "lora_r8" / "seed_2", "lora_r8", 2)
    return root


@pytest.fixture
def matrix(tmp_path):
    return write_matrix(tmp_path / "matrix")


def rewrite(path, **changes):
    facts = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(facts))


# ---------------------------------------------------------------------------------------------------------- reading


def test_variants_come_in_the_order_of_the_matrix_and_others_by_size(matrix, tmp_path):
    write_run(tmp_path / "more" / "b", "lora_r16")
    write_run(tmp_path / "more" / "a", "head")
    runs = load_runs([tmp_path / "more", matrix])
    assert list(dict.fromkeys(run.variant for run in runs)) == ["none", "lora_r8", "full", "head", "lora_r16"]
    assert [run.seed for run in runs if run.variant == "lora_r8"] == [0, 1, 2]


def test_a_folder_given_twice_is_one_run_and_copied_configurations_are_none(tmp_path):
    run = write_run(tmp_path / "run", "full")
    for folder in (run / ".hydra", tmp_path / ".old"):
        folder.mkdir()
        shutil.copy(run / "config.yaml", folder)
    assert [r.path for r in load_runs([tmp_path, run])] == [run]


def test_old_runs_load_and_are_labelled_by_their_settings(tmp_path):
    for name, model, label in (
        ("a", {"use_lora": True, "lora_rank": 4}, "lora_r4"),
        ("b", {"freeze": ["backbone"]}, "head"),
        ("c", {"unfreeze_last_n": 2}, "last_2"),
        ("d", {"freeze": ["queries"]}, "without_queries"),
        ("e", {}, "full"),
    ):
        run = write_run(tmp_path / name, "", model=model, start_fingerprint=None, flops_per_step=None)
        shutil.rmtree(run / "evaluation")
        (loaded,) = load_runs([run])
        assert (loaded.variant, loaded.target.miou, loaded.target.counts) == (label, 0.5, None)
    comparison = compare(load_runs([tmp_path / "a", tmp_path / "e"]))
    assert comparison["lora_r4"].delta.value == 0
    assert comparison["lora_r4"].delta.reading == "unknown"


def test_parts_of_a_resumed_run_are_joined_and_what_was_repeated_counts_once(tmp_path):
    run = write_run(tmp_path / "run", "full")
    write_metrics(run / "metrics_1.csv", [(10, 0.1), (20, 0.2), (30, 0.3)])
    write_metrics(run / "metrics_2.csv", [(25, 0.25), (35, 0.35)])
    for part in range(3, 10):
        write_metrics(run / f"metrics_{part}.csv", [])
    write_metrics(run / "metrics_10.csv", [(36, 0.36)])
    write_metrics(run / "metrics.csv", [(40, 0.4), (50, 0.5)])
    (loaded,) = load_runs([run])
    assert loaded.curve == [(10, 0.1), (20, 0.2), (25, 0.25), (35, 0.35), (36, 0.36), (40, 0.4), (50, 0.5)]
    assert any("Resumed: full seed 0" in note for note in compare([loaded]).notes)


def test_folders_without_runs_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_runs([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="holds no run"):
        load_runs([tmp_path])
    run = write_run(tmp_path / "run", "full")
    rewrite(run / "evaluation" / "target.json", miou=0.1)
    with pytest.raises(ValueError, match=r"target.npz counts mIoU 0\.\d+, target.json says 0.1000"):
        load_runs([run])
    (run / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json cannot be read: it is no JSON"):
        load_runs([run])


# ------------------------------------------------------------------------------------------------------- statistics


def test_mean_and_deviation_over_seeds_are_those_computed_by_hand(matrix):
    comparison = compare(load_runs([matrix]))
    for variant, accuracy in (("lora_r8", 0.85), ("full", 0.87)):
        scores = [iou_per_class(torch.from_numpy(confusion(accuracy, seed).sum(0))).nanmean().item() for seed in (0, 1)]
        assert comparison[variant].miou.mean == pytest.approx(sum(scores) / 2)
        assert comparison[variant].miou.sd == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    change = [mean_iou(hits_and_unions(confusion(a, 7 + s)).sum(0)) for a in (0.55, 0.9) for s in (0, 1)]
    assert comparison["lora_r8"].source_change == pytest.approx(np.mean(change[:2]) - np.mean(change[2:]))
    assert comparison["none"].source_change is None


def test_iou_of_many_counts_is_that_of_training_and_classes_in_neither_map_do_not_count():
    counts = confusion(0.7, images=6, classes=4)
    counts[:, 2, :] = counts[:, :, 2] = 0
    found = iou(hits_and_unions(counts))
    for row, image in zip(found, counts, strict=True):
        np.testing.assert_array_equal(row, iou_per_class(torch.from_numpy(image)).numpy())
    assert np.isnan(found[:, 2]).all()
    assert mean_iou(hits_and_unions(counts)[0]) == pytest.approx(np.nanmean(found[0]))


def widened(count):
    """By SciPy's own distributions."""
    return math.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1) / stats.norm.ppf(0.975)


def test_few_things_widen_an_interval_to_student_s_and_many_do_not():
    assert widening(np.array([1, 2, 3, 10])) == pytest.approx([1, *map(widened, (2, 3, 10))])
    assert widening(10_000) == pytest.approx(1, abs=1e-3)


def test_the_bootstrap_is_that_of_a_plain_loop_over_the_same_seeds_and_images_widened(tmp_path):
    ours, theirs = ([confusion(accuracy, seed, images=8, pixels=60) for seed in (0, 1)] for accuracy in (0.70, 0.72))
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", "lora_r8", seed, ours[seed])
        write_run(tmp_path / f"b{seed}", "full", seed, theirs[seed])
    indices = resample(8)

    def change(images, seeds):
        return statistics.fmean(
            (
                iou_per_class(torch.from_numpy(ours[seed][images].sum(0))).nanmean()
                - iou_per_class(torch.from_numpy(theirs[seed][images].sum(0))).nanmean()
            ).item()
            for seed in seeds
        )

    whole = change(range(8), (0, 1))
    changes = [
        whole + widened(8) * (change(row, (0, 1)) - whole) + widened(2) * (change(row, seeds) - change(row, (0, 1)))
        for row, seeds in zip(indices, resample(2, seed=1), strict=True)
    ]
    delta = compare(load_runs([tmp_path]))["lora_r8"].delta
    assert (delta.low, delta.high) == pytest.approx(tuple(np.percentile(changes, [2.5, 97.5])), abs=1e-12)
    vectorised = bootstrap_iou(hits_and_unions(ours[0]), times_drawn(indices))
    np.testing.assert_allclose(vectorised[5], iou(hits_and_unions(ours[0])[indices[5]].sum(0)))


def test_class_intervals_are_those_of_the_class(tmp_path):
    ours, theirs = confusion(0.70, images=12), confusion(0.72, images=12)
    ours[:, 2, :] = theirs[:, 2, :] = ours[:, :, 2] = theirs[:, :, 2] = 0
    write_run(tmp_path / "a", "lora_r8", 0, ours)
    write_run(tmp_path / "b", "full", 0, theirs)
    deltas = compare(load_runs([tmp_path]))["lora_r8"].class_delta
    assert list(deltas) == ["sky", "road"], "a class that does not occur has no difference"
    weights = image_weights(units(12))
    whole, *change = bootstrap_iou(hits_and_unions(ours), weights) - bootstrap_iou(hits_and_unions(theirs), weights)
    for k, name in enumerate(deltas):
        low, high = whole[k] + widened(12) * (np.percentile(np.array(change)[:, k], [2.5, 97.5]) - whole[k])
        assert (deltas[name].low, deltas[name].high) == pytest.approx((low, high))


def test_the_interval_covers_a_planted_difference_and_excludes_zero(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / f"a{seed}", "lora_r8", seed, confusion(0.80, seed, images=40))
        write_run(tmp_path / f"b{seed}", "full", seed, confusion(0.85, seed, images=40))
    expected = [  # of networks with these accuracies, on far more images
        mean_iou(hits_and_unions(confusion(accuracy, images=4000)).sum(0)) for accuracy in (0.80, 0.85)
    ]
    planted = expected[0] - expected[1]
    delta = compare(load_runs([tmp_path]))["lora_r8"].delta
    assert delta.low < planted < delta.high < 0
    assert delta.reading == "below"


def test_seeds_that_vary_widen_the_interval_however_many_images_there_are(tmp_path):
    for seed, accuracy in enumerate((0.70, 0.75, 0.80, 0.85)):
        write_run(tmp_path / f"a{seed}", "lora_r8", seed, confusion(accuracy, seed, images=100))
        write_run(tmp_path / f"b{seed}", "full", seed, confusion(0.76, seed, images=100))
    comparison = compare(load_runs([tmp_path]))
    delta = comparison["lora_r8"].delta
    assert delta.low < 0 < delta.high and delta.reading == "no measurable difference"
    error = stats.t.ppf(0.975, 3) * delta.seed_sd / 2  # of the mean of four, when images say nothing
    assert (delta.low, delta.high) == pytest.approx((delta.value - error, delta.value + error), abs=0.15 * error)
    assert comparison["lora_r8"].class_delta["sky"].low < 0 < comparison["lora_r8"].class_delta["sky"].high


def test_about_19_of_20_intervals_hold_the_true_difference_with_several_seeds():
    rng, held = np.random.default_rng(0), []
    weights = image_weights(units(40))
    for _ in range(100):  # 5 points, that vary over seeds by 1 and over images by 6
        points = 5 + rng.normal(0, 1, (8, 1)) + rng.normal(0, 6, 40)
        hits = np.stack([6000 + 100 * points, np.full_like(points, 6000)])
        counts = np.stack([hits, np.full_like(hits, 10_000)], -1)[..., None]
        ours, theirs = ([bootstrap_iou(seed, weights)[:, 0] for seed in variant] for variant in counts)
        low, high = np.percentile(mean_over_seeds(np.stack(ours) - np.stack(theirs), units(40)), [2.5, 97.5])
        held.append(low <= 0.05 <= high)
    assert 0.88 <= np.mean(held) <= 0.99


def test_the_coverage_in_the_docs_is_that_of_the_simulation():
    facts = json.loads((ROOT / "benchmarks" / "coverage.json").read_text())
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "comparing.md").read_text().splitlines()]
    for drawn in ("images alone", "seeds and images"):
        for ratio in (0.3, 1, 3):
            found = [r[drawn] for r in facts["by_seeds"] if r["seed_sd_in_standard_errors_of_images"] == ratio]
            assert [f"{ratio:g}", drawn, *(f"{100 * share:.1f} %" for share in found)] in rows
    for rho in (0, 0.5, 0.8):
        found = [r["seeds and images"] for r in facts["by_correlation"] if r["correlation_of_neighbours"] == rho]
        assert [f"{rho:g}", *(f"{100 * share:.1f} %" for share in found)] in rows


# ---------------------------------------------------------------------------------------------------- sequences


def test_images_of_no_sequence_or_of_one_each_are_drawn_one_by_one():
    for sequences in ((), [None] * 7, [f"city_{k}" for k in range(7)]):
        assert units(7, sequences).members.tolist() == list(range(7))
        assert units(7, sequences).kind == "images"


def test_many_sequences_are_drawn_whole():
    found = units(36, [f"s{k % 12}" for k in range(36)])
    assert found.kind == "sequences" and found.words == "12 sequences"
    assert found.members.tolist() == [k % 12 for k in range(36)]


def test_few_sequences_are_cut_into_blocks_of_neighbouring_frames():
    found = units(101, ["0016E5"] * 101)
    assert found.kind == "blocks" and found.words == "10 blocks of up to 11 neighbouring frames"
    assert (np.diff(found.members) >= 0).all()
    found = units(500, ["frankfurt"] * 267 + [f"munster_{k}" for k in range(233)])
    assert found.count == 12 + 233 and found.kind == "blocks", "one sequence that is half of everything is no sequence"


@given(st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1, max_size=60))
def test_a_unit_holds_neighbouring_frames_of_one_sequence(sequences):
    found = units(len(sequences), sequences)
    assert sorted(set(found.members.tolist())) == list(range(found.count))
    for unit in range(found.count):
        members = np.flatnonzero(found.members == unit)
        name = sequences[members[0]]
        assert len(members) == 1 or name is not None
        assert [k for k in range(members[0], members[-1] + 1) if sequences[k] == name] == members.tolist()
        assert found.kind == "sequences" or len(members) <= np.ceil(np.sqrt(len(sequences)))


def test_frames_of_a_sequence_make_a_wider_interval_than_as_many_independent_images(tmp_path):
    accuracies = np.repeat([0.7, 0.9, 0.6, 0.85, 0.75, 0.95, 0.65, 0.8], 8)  # neighbours are alike
    counts = np.concatenate([confusion(a, k, images=1) for k, a in enumerate(accuracies)])
    widths = {}
    for name, sequences in (("known", ["0016E5"] * 64), ("unknown", None)):
        write_run(tmp_path / name / "a", "lora_r8", 0, counts, evaluation={"sequences": sequences})
        write_run(tmp_path / name / "b", "full", 0, confusion(0.8, images=64), evaluation={"sequences": sequences})
        comparison = compare(load_runs([tmp_path / name]))
        widths[name] = comparison["lora_r8"].delta.high - comparison["lora_r8"].delta.low
        notes = " ".join(table(comparison).footnotes)
        assert ("8 blocks of up to 8 neighbouring frames" in notes) == (name == "known")
        assert ("no sequences are known here" in notes) == (name == "unknown")
    assert widths["known"] > 1.8 * widths["unknown"]


def test_sequences_that_are_not_one_for_each_image_are_named(tmp_path):
    run = write_run(tmp_path / "run", "full", evaluation={"sequences": ["a"]})
    with pytest.raises(ValueError, match=r"target\.json has 1 sequences for 20 images: evaluate again"):
        load_runs([run])
    write_evaluation(run, confusion(0.8), sequences="a")
    with pytest.raises(ValueError, match=r"target\.json has sequences 'a': a list of names is meant"):
        load_runs([run])


def test_identical_variants_have_no_measurable_difference(tmp_path):
    for variant in ("lora_r8", "full"):
        write_run(tmp_path / variant, variant, 0, confusion(0.8))
    delta = compare(load_runs([tmp_path]))["lora_r8"].delta
    assert (delta.value, delta.low, delta.high) == (0, 0, 0)
    assert delta.reading == "no measurable difference"


def test_gains_of_images_are_differences_of_their_own_scores(tmp_path):
    ours, theirs = confusion(0.6, 1, images=4), confusion(0.8, 2, images=4)
    write_run(tmp_path / "a", "lora_r8", 0, ours)
    write_run(tmp_path / "b", "full", 0, theirs)
    gains = image_gains(*load_runs([tmp_path]))
    wanted = [
        (iou_per_class(torch.from_numpy(a)).nanmean() - iou_per_class(torch.from_numpy(b)).nanmean()).item()
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert gains.tolist() == pytest.approx(wanted)


def test_failed_cells_are_told_and_change_no_mean(matrix):
    runs = load_runs([matrix])
    comparison = compare(runs)
    assert [(str(run), run.error) for run in comparison.failed] == [("lora_r8 seed 2", "CUDA out of memory")]
    without = compare([run for run in runs if run.error is None])
    for name in ("none", "lora_r8", "full"):
        assert comparison[name].miou == without[name].miou
        assert comparison[name].delta == without[name].delta
    assert comparison["lora_r8"].seeds == "2 of 3"
    shutil.rmtree(matrix / "full" / "seed_1")
    only = compare(load_runs([matrix]))["lora_r8"]
    assert (only.delta_seeds, len(only.runs)) == (1, 2)


@pytest.mark.parametrize("status", ["failed: no more disk", "interrupted"])
def test_a_run_that_did_not_finish_has_no_place_in_a_mean(tmp_path, status):
    write_run(tmp_path / "a", "full", 0)
    write_run(tmp_path / "b", "full", 1, confusion(0.3), status=status)
    comparison = compare(load_runs([tmp_path]))
    assert [run.error for run in comparison.failed] == [status.removeprefix("failed: ")]
    assert comparison["full"].miou.sd is None


def test_the_baseline_is_full_or_else_the_largest_or_the_one_named(matrix):
    runs = load_runs([matrix])
    wide = write_run(matrix / "wide", "wide", 0, trainable_parameters=9000)
    assert compare([*runs, *load_runs([wide])]).baseline == "full"
    assert compare(runs, "none").baseline == "none"
    assert compare([run for run in runs if run.variant != "full"]).baseline == "lora_r8", "none trains nothing"
    with pytest.raises(ValueError, match="baseline 'ful' is no variant with a score; choose from none, lora_r8, full"):
        compare(runs, "ful")
    with pytest.raises(ValueError, match="No run has a score to compare: lora_r8 seed 2: CUDA out of memory"):
        compare([run for run in runs if run.error])


def test_another_baseline_than_the_usual_one_is_pointed_out_where_that_has_no_score(matrix):
    for seed in (0, 1):
        shutil.rmtree(matrix / "full" / f"seed_{seed}")
    write_failed(matrix / "full" / "seed_0", "full", 0)
    comparison = compare(load_runs([matrix]))
    words = "full, the usual baseline, has no score: differences are to lora_r8."
    assert comparison.baseline == "lora_r8" and words in warnings_of(comparison)
    shutil.rmtree(matrix / "full")
    assert words not in warnings_of(compare(load_runs([matrix])))


def test_an_untrained_run_stands_beside_every_seed_that_starts_from_its_weights(tmp_path):
    for variant, seeds in (("none", (0,)), ("full", (0, 1, 2))):
        for seed in seeds:
            counts = confusion(0.5 if variant == "none" else 0.8 + seed / 100, seed)
            source = confusion(0.9 - (variant == "full") * seed / 10, 7)
            write_run(
                tmp_path / f"{variant}{seed}", variant, seed, counts, source, start_fingerprint=digest("one start")
            )
    comparison = compare(load_runs([tmp_path]))
    none = comparison["none"]
    wanted = [none.miou.mean - run.target.miou for run in comparison["full"].runs]
    assert list(none.delta.seeds) == wanted and none.delta_seeds == 3
    changes = [run.evaluations["source"].miou - none.source.mean for run in comparison["full"].runs]
    assert comparison["full"].source_change == pytest.approx(np.mean(changes))
    assert compare(load_runs([tmp_path]), "none")["full"].delta.value == pytest.approx(-np.mean(wanted))
    notes = " ".join(table(comparison).footnotes)
    assert "none depends on no seed: its one run stands beside every seed." in notes and "One seed" not in notes
    for start in (digest("another"), None):
        rewrite(tmp_path / "full2" / "summary.json", start_fingerprint=start)
        assert compare(load_runs([tmp_path]))["none"].delta_seeds == 2, "that one starts elsewhere, or does not tell"


def test_the_same_variant_and_seed_twice_names_both_folders_before_one_is_evaluated(tmp_path, monkeypatch):
    for name in ("first", "second"):
        write_run(tmp_path / name, "full")
    with pytest.raises(ValueError, match=r"full seed 0 occurs twice, in .*first and .*second"):
        compare(load_runs([tmp_path]))
    monkeypatch.setattr(evaluations, "outdated", lambda *_: pytest.fail("a run was looked at for its evaluation"))
    with pytest.raises(ValueError, match="full seed 0 occurs twice"):
        evaluations.report_runs([tmp_path], tmp_path / "report", None, None, allow_different=False)


# ---------------------------------------------------------------------------------------------------- comparability

SUMMARY = {
    "training data": {"data": {"train": "b" * 20, "val": digest("target")}},
    "validation data": {"data": {"train": digest("train"), "val": "b" * 20}},
    "start weights of seed 0": {"start_fingerprint": "b" * 20},
    "training batches of seed 0": {"batches": "b" * 20},
    "numbers of steps": {"steps": 99},
}
EVALUATION = {
    "evaluated images": {"data": "b" * 20},
    "classes": {"classes": ("sky", "road", "sign")},
    "evaluation sizes": {"img_size": [32, 128]},
    "evaluation precisions": {"precision": "bf16-mixed"},
}


def test_a_matrix_whose_cells_share_all_conditions_has_no_differences(matrix):
    assert differences(load_runs([matrix])) == []


@pytest.mark.parametrize("aspect", [*SUMMARY, *EVALUATION])
def test_every_condition_that_differs_is_named_with_runs_and_values(tmp_path, aspect):
    write_run(tmp_path / "a", "lora_r8", 0, evaluation=EVALUATION.get(aspect, ()), **SUMMARY.get(aspect, {}))
    write_run(tmp_path / "b", "full", 0)
    write_run(tmp_path / "c", "full", 1)
    (found,) = differences(load_runs([tmp_path]))
    assert str(found).startswith(f"{aspect} differ: ")
    assert found.variants("full") == {"lora_r8"}
    assert "lora_r8 seed 0" in str(found)
    assert "full seed" in str(found)
    if "b" * 20 in str(SUMMARY.get(aspect, EVALUATION.get(aspect))):
        assert "b" * 12 + " in lora_r8" in str(found), "hashes are shortened"
        assert "b" * 13 not in str(found)


@pytest.mark.parametrize(
    ("part", "setting", "aspect"),
    [
        ("callbacks", {"save_best": {"keep": "best"}}, "choices of the evaluated network"),
        ("trainer", {"accumulate_grad_batches": 4}, "images per step"),
        ("data", {"batch_size": 2}, "images per step"),
    ],
)
def test_settings_that_make_a_run_another_experiment_are_named(tmp_path, part, setting, aspect):
    write_run(tmp_path / "a", "lora_r8")
    write_run(tmp_path / "b", "full")
    lora, full = load_runs([tmp_path])
    lora.config[part] = lora.config.get(part, {}) | setting
    (found,) = differences([lora, full])
    assert str(found).startswith(f"{aspect} differ: ")


@pytest.mark.parametrize("aspect", ["training data", "validation data", "evaluated images"])
def test_hashes_of_another_version_are_not_said_to_be_of_other_data(tmp_path, aspect):
    new = "sha256:" + "b" * 64
    evaluation = {"data": new} if aspect == "evaluated images" else {}
    data = {"training data": {"train": new}, "validation data": {"val": new}}.get(aspect, {})
    write_run(
        tmp_path / "a",
        "lora_r8",
        0,
        evaluation=evaluation,
        data={"train": digest("train"), "val": digest("target")} | data,
    )
    write_run(tmp_path / "b", "full", 0)
    (found,) = differences(load_runs([tmp_path]))
    assert str(found).startswith(f"{aspect} are not known to be equal: ") and "an earlier version" in str(found)
    assert f"sha256:{'b' * 12} in lora_r8" in str(found) and found.variants("full") == {"lora_r8"}


def test_other_contents_are_said_to_differ(tmp_path):
    for letter, variant in (("b", "lora_r8"), ("c", "full")):
        write_run(tmp_path / letter, variant, data={"train": f"sha256:{letter * 64}", "val": digest("target")})
    (found,) = differences(load_runs([tmp_path]))
    assert str(found).startswith("training data differ: ") and "earlier version" not in str(found)


MISSING = {
    "training data": {"data": {"val": digest("target")}},
    "validation data": {"data": {"train": digest("train")}},
    "start weights of seed 0": {"start_fingerprint": None},
    "training batches of seed 0": {"batches": None},
    "numbers of steps": {"steps": None},
    "evaluated images": {"evaluation": {"data": None}},
    "evaluation sizes": {"evaluation": {"img_size": None}},
    "evaluation precisions": {"evaluation": {"precision": None}},
}


@pytest.mark.parametrize("aspect", MISSING)
def test_what_a_run_does_not_tell_is_unknown_and_not_equal(tmp_path, aspect):
    for variant in ("lora_r8", "full"):
        write_run(tmp_path / variant, variant, **MISSING[aspect])
    (found,) = differences(load_runs([tmp_path]))
    assert str(found) == f"{aspect} are not known to be equal: unknown in lora_r8, full seed 0"
    assert found.variants("full") == {"lora_r8", "full"}


def test_start_and_batches_may_differ_between_seeds_and_a_run_of_no_steps_has_neither_steps_nor_batches(tmp_path):
    write_run(tmp_path / "a", "none", 0)
    write_run(tmp_path / "b", "full", 0)
    write_run(tmp_path / "c", "full", 1)
    assert differences(load_runs([tmp_path])) == []
    rewrite(tmp_path / "a" / "summary.json", start_fingerprint="other")
    assert [d.aspect for d in differences(load_runs([tmp_path]))] == ["start weights"]


def test_source_evaluations_are_compared_where_there_are_some(matrix):
    rewrite(matrix / "none" / "seed_0" / "evaluation" / "source.json", precision="bf16-true")
    (matrix / "full" / "seed_0" / "evaluation" / "source.json").unlink()
    (found,) = differences(load_runs([matrix]))
    assert found.aspect == "source evaluation precisions"


def test_other_machines_libraries_and_code_are_notes(tmp_path):
    write_run(tmp_path / "a", "lora_r8", machine={"platform": "Linux", "threads": 8, "gpus": ["H100"]})
    write_run(tmp_path / "b", "full", versions={"torch": "2.8.0"}, git_commit=None)
    runs = load_runs([tmp_path])
    comparison = compare(runs)
    assert differences(runs) == []
    assert not comparison.same_machinery
    text = " ".join(comparison.notes)
    for part in ("H100 (Linux) in lora_r8 seed 0", "torch 2.8.0 in full seed 0", "unknown in full", "not comparable"):
        assert part in text


# ------------------------------------------------------------------------------------------------------------ table


def cells(comparison, name):
    content = table(comparison)
    row = next(row for row in content.rows if row[0].values["variant"] == name)
    return {title: cell.text for (title, _), cell in zip(content.columns, row, strict=True)}


def test_the_table_tells_scores_and_costs(matrix):
    comparison = compare(load_runs([matrix]))
    lora, none = cells(comparison, "lora_r8"), cells(comparison, "none")
    assert lora["seeds"] == "2 of 3"
    assert lora["trainable parameters"] == "500 (12 %)"
    assert lora["artefact, MiB"] == f"{2010 / 2**20:.1f}"
    assert lora["peak memory, MiB"] == "101.0", "the most over seeds"
    assert lora["compute, s/step"] == "0.900", "the median"
    assert lora["wall time, min"] == "1.5", "the mean"
    assert lora["GFLOP/step"] == "3.0"
    assert (none["trainable parameters"], none["compute, s/step"]) == ("0 (0 %)", NONE)
    assert cells(comparison, "full")["reading"] == "baseline"
    assert "resident set of the process" in " ".join(table(comparison).footnotes)


def test_one_seed_has_no_deviation_and_columns_without_values_are_left_out(tmp_path):
    write_run(tmp_path / "a", "lora_r8", flops_per_step=None)
    write_run(tmp_path / "b", "full", flops_per_step=None)
    shown = cells(compare(load_runs([tmp_path])), "lora_r8")
    assert shown["mIoU, %"].endswith(f" ± {NONE}")
    assert "GFLOP/step" not in shown
    assert "source mIoU, %" not in shown


@pytest.mark.parametrize(("images", "warned"), [(9, True), (10, False)])
def test_few_images_are_warned_of(tmp_path, images, warned):
    write_run(tmp_path / "a", "lora_r8", 0, confusion(0.8, images=images))
    write_run(tmp_path / "b", "full", 0, confusion(0.8, images=images))
    notes = " ".join(table(compare(load_runs([tmp_path]))).footnotes)
    assert (f"Only {images} images" in notes) == warned
    assert "seeds and images are both drawn again" in notes
    assert "One seed in the difference of lora_r8: its interval is over images alone." in notes


# -------------------------------------------------------------------------------------------------------- anomalies

AUPRC = {"full": (0.30, 0.34, 0.29), "lora_r8": (0.41, 0.39, 0.44)}


@pytest.fixture
def scored(tmp_path):
    """Two variants of three seeds with toy anomalies by two scores."""
    for variant, values in AUPRC.items():
        for seed, auprc in enumerate(values):
            run = write_run(tmp_path / "scored" / variant / str(seed), variant, seed)
            write_anomalies(run, scores={"msp": (0.1, 0.9), "rba": (auprc, 1 - auprc)})
    return tmp_path / "scored"


def test_anomaly_columns_follow_miou_in_the_order_of_the_benchmarks_and_only_those_present(tmp_path):
    for variant, benchmarks in (
        ("lora_r8", ["toy_anomalies"]),
        ("full", ["toy_anomalies", "fs_static", "road_anomaly_21"]),
    ):
        run = write_run(tmp_path / variant, variant)
        for benchmark in benchmarks:
            write_anomalies(run, benchmark)
    content = table(compare(load_runs([tmp_path])))
    (part,) = content.parts(("anomalies",))
    names = part.titles
    assert names[:2] == ["variant", "mIoU, %"] and "by the score rba" in part.caption
    assert names[2:] == [
        f"{title} {metric}, %"
        for title in ("RoadAnomaly21", BENCHMARKS["fs_static"].title, "Toy anomalies")
        for metric in ("AuPRC", "FPR95")
    ]


def test_without_anomaly_results_the_table_has_no_anomaly_columns_and_says_nothing_of_them(matrix):
    comparison = compare(load_runs([matrix]))
    content = table(comparison)
    assert content.parts(("anomalies",), ("differences",)) == []
    assert not any("AuPRC" in text for text in (*content.footnotes, *(title for title, _ in content.columns)))
    assert comparison.score is None


def test_one_score_serves_the_whole_table_rba_unless_another_is_asked_for(scored):
    runs = load_runs([scored])
    assert cells(compare(runs), "full")["Toy anomalies AuPRC, %"] == "31.00 ± 2.65"
    comparison = compare(runs, score="msp")
    assert cells(comparison, "full")["Toy anomalies AuPRC, %"] == "10.00 ± 0.00"
    assert cells(comparison, "full")["Toy anomalies FPR95, %"] == "90.00 ± 0.00"
    assert "ranked by the score msp in every column" in " ".join(table(comparison).footnotes)
    with pytest.raises(ValueError, match="score 'energy': no run has anomaly results of it; choose from msp, rba"):
        compare(runs, score="energy")


def test_max_logit_stands_beside_rba_and_chance_below_them_by_benchmark(tmp_path):
    for variant in ("lora_r8", "full"):
        run = write_run(tmp_path / variant, variant)
        both = {"rba": (0.3, 0.8), "max_logit": (0.4, 0.5), "msp": (0.1, 0.9)}
        write_anomalies(run, scores=both, anomalous=1560)
        write_anomalies(run, "fs_static", scores=both, anomalous=700)
    comparison = compare(load_runs([tmp_path]))
    (part,) = table(comparison).parts(("anomalies",))
    assert part.caption == "Anomaly segmentation, by the scores rba and max_logit."
    shown = dict(zip(part.titles, zip(*part.rows, strict=True), strict=True))
    assert shown["variant"][-1] == "chance" and shown["mIoU, %"][-1] == NONE
    assert shown["Toy anomalies AuPRC, %"][1:] == (f"30.00 ± {NONE}", "1.56")
    assert shown["Toy anomalies AuPRC by max_logit, %"][1:] == (f"40.00 ± {NONE}", "1.56")
    assert shown["Toy anomalies FPR95 by max_logit, %"][1:] == (f"50.00 ± {NONE}", "95.00")
    assert shown["FS Static AuPRC by max_logit, %"][-1] == "0.70"
    notes = " ".join(table(comparison).footnotes)
    assert "ranked by the score rba in every column and row but those by max_logit" in notes
    values = {key: value for cell in table(comparison).rows[0] for key, value in cell.values.items()}
    assert values["toy_anomalies_max_logit_auprc_percent"] == 40 and values["toy_anomalies_auprc_percent"] == 30
    assert compare(load_runs([tmp_path]), score="msp").scores == ["msp"]


def test_temperatures_are_scores_of_their_own_and_the_first_score_stands_in_for_rba(tmp_path):
    run = write_run(tmp_path / "run", "full")
    write_anomalies(run, scores={"msp": (0.1, 0.9), "msp@0.5": (0.2, 0.8)})
    runs = load_runs([run])
    assert compare(runs).score == "msp"
    assert cells(compare(runs, score="msp@0.5"), "full")["Toy anomalies AuPRC, %"] == f"20.00 ± {NONE}"


def test_differences_in_anomalies_have_students_interval_over_the_common_seeds(scored):
    (row,) = (row for row in table(compare(load_runs([scored]))).rows if row[0].text == "lora_r8")
    values = {key: value for cell in row for key, value in cell.values.items()}
    ours, theirs = AUPRC["lora_r8"], AUPRC["full"]
    interval = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert values["toy_anomalies_auprc_difference_points"] == pytest.approx(100 * (np.mean(ours) - np.mean(theirs)))
    assert values["toy_anomalies_auprc_low_points"] == pytest.approx(100 * interval.low, abs=1e-5)
    assert values["toy_anomalies_auprc_high_points"] == pytest.approx(100 * interval.high, abs=1e-5)
    assert values["toy_anomalies_fpr95_difference_points"] == pytest.approx(100 * (np.mean(theirs) - np.mean(ours)))
    shutil.rmtree(scored / "full" / "1")
    shutil.rmtree(scored / "full" / "2")
    assert cells(compare(load_runs([scored])), "lora_r8")["Toy anomalies AuPRC difference, points"] == (
        "+11.00 over 1 seed"
    ), "no interval for one seed"


def test_results_that_are_missing_or_undefined_leave_an_empty_cell_and_a_note(scored):
    (scored / "lora_r8" / "0" / "anomaly" / "toy_anomalies.json").unlink()
    write_anomalies(scored / "lora_r8" / "1", scores={"msp": (0.1, 0.9), "rba": (None, None)})
    comparison = compare(load_runs([scored]))
    assert cells(comparison, "lora_r8")["Toy anomalies AuPRC, %"] == f"44.00 ± {NONE} over 1 seed"
    assert "No result of rba on Toy anomalies: lora_r8 seeds 0, 1." in table(comparison).footnotes
    values = {key: value for cell in table(comparison).rows[0] for key, value in cell.values.items()}
    assert values["variant"] == "lora_r8" and values["toy_anomalies_auprc_seeds"] == 1
    assert values["anomaly_score"] == "rba" and values["seeds"] == 3
    assert headline(comparison)[-1].endswith("lora_r8 +15.00 over 1 seed.")
    (scored / "lora_r8" / "2" / "anomaly" / "toy_anomalies.json").unlink()
    assert cells(compare(load_runs([scored])), "lora_r8")["Toy anomalies AuPRC, %"] == NONE


ANOMALY_CONDITIONS = {
    "Toy anomalies: evaluated images": {"data": "other"},
    "Toy anomalies: numbers of images": {"images": 59},
    "Toy anomalies: labels": {"anomalous": 1999},
    "Toy anomalies: evaluation sizes": {"img_size": [128, 128]},
    "Toy anomalies: evaluation precisions": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("aspect", ANOMALY_CONDITIONS)
def test_benchmarks_that_were_run_differently_do_not_belong_in_one_table(scored, aspect):
    assert differences(load_runs([scored])) == []
    write_anomalies(scored / "lora_r8" / "0", **ANOMALY_CONDITIONS[aspect])
    (found,) = differences(load_runs([scored]))
    assert str(found).startswith(f"{aspect} differ: ") and found.variants("full") == {"lora_r8"}


def test_results_of_a_version_that_did_not_tell_its_images_may_be_compared(scored):
    write_anomalies(scored / "lora_r8" / "0", data=None)
    assert differences(load_runs([scored])) == []


def test_the_error_of_counting_in_bins_is_the_largest_of_the_runs_and_of_the_score_that_is_shown(scored):
    for variant, error in (("lora_r8", 0.004), ("full", 0.001)):
        path = scored / variant / "0" / "anomaly" / "toy_anomalies.json"
        facts = json.loads(path.read_text())
        facts["results"][1]["error"] = error  # of rba
        path.write_text(json.dumps(facts))
    notes = {score: " ".join(table(compare(load_runs([scored]), score=score)).footnotes) for score in ("rba", "msp")}
    assert "counted in bins, within 0.4 points" in notes["rba"] and "in bins" not in notes["msp"]


def set_up(run, part, **settings):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[part] = config.get(part, {}) | settings
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_another_class_head_starts_from_other_weights_and_pasted_objects_make_other_batches(tmp_path):
    for name in ("arcface", "arcface_lora"):
        run = write_run(tmp_path / name, name, start_fingerprint="other head")
        set_up(run, "model", head="arcface")
    for name in ("rba", "rba_lora"):
        run = write_run(tmp_path / name, name, batches="with objects")
        set_up(run, "data", cut_paste={"probability": 0.5})
        write_anomalies(run)
    write_run(tmp_path / "baseline", "baseline")
    comparison = compare(load_runs([tmp_path]))
    assert comparison.differences == [] and comparison.baseline == "baseline"
    notes = table(comparison).footnotes
    assert "Trained on scenes with pasted objects: rba, rba_lora seed 0." in notes
    assert "With the class head of ArcFace: arcface, arcface_lora seed 0." in notes
    rewrite(tmp_path / "arcface" / "summary.json", start_fingerprint="yet another")
    rewrite(tmp_path / "rba" / "summary.json", batches="with other objects")
    assert [d.aspect for d in differences(load_runs([tmp_path]))] == ["start weights", "training batches"]


def test_an_anomaly_file_without_results_is_named(tmp_path):
    run = write_run(tmp_path / "run", "full")
    write_anomalies(run, results=[])
    with pytest.raises(ValueError, match=r"toy_anomalies\.json holds no results of anomaly scores"):
        load_runs([run])


@pytest.mark.parametrize("ended", ["finished", "interrupted", "failed: no space left"])
def test_a_cell_is_finished_only_if_its_own_summary_says_so(tmp_path, ended):
    (tmp_path / "cell.json").write_text('{"status": "finished"}')
    (tmp_path / "summary.json").write_text(json.dumps({"status": ended}))
    assert finished(tmp_path, {"source": [], "anomaly": []}) is (ended == "finished")


def test_start_weights_of_two_machines_are_one_value_and_others_another(tmp_path):
    def start(exact, stored, value):
        sums = " ".join([f"{value:.8g}"] + ["1"] * 15)
        return {
            "start_fingerprint": exact * 64,
            "start_weights": {"stored": stored, "computed": {"pos_embed": {"shape": [2], "sums": sums}}},
        }

    starts = {"none": start("a", "S", 1.0), "lora_r8": start("b", "S", 1.0 + 1e-7), "full": start("c", "other", 1.0)}
    runs = [run for name, facts in starts.items() for run in load_runs([write_run(tmp_path / name, name, **facts)])]
    (found,) = [each for each in differences(runs) if each.aspect == "start weights"]
    assert list(found.values) == ["a" * 12, "c" * 12] and found.variants("none") == {"full"}
    assert not [each for each in differences(runs[:2]) if each.aspect == "start weights"]


def test_scores_are_of_the_network_with_their_id_and_without_ids_no_older_than_the_run(tmp_path):
    run = write_run(tmp_path / "run", "full", artefact_id="a", evaluation={"artefact_id": "a"})
    scores, summary = run / "evaluation" / "target.json", run / "summary.json"
    os.utime(scores, (0, 0))
    assert not outdated(run, scores)
    write_evaluation(run, confusion(0.8), artefact_id="b")
    assert outdated(run, scores)
    write_evaluation(run, confusion(0.8))
    assert not outdated(run, scores)
    os.utime(scores, (0, 0))
    assert outdated(run, scores) and outdated(run, summary.with_name("none.json"))
