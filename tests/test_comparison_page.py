"""The report: words, formats, and the page as a browser shows it."""

import base64
import csv
import io
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latex import assert_fits_the_page, needs_latex
from PIL import Image
from test_comparison import (
    confusion,
    rewrite,
    set_up,
    write_anomalies,
    write_evaluation,
    write_failed,
    write_matrix,
    write_run,
)

from eomt.comparison import plots
from eomt.comparison.facts import audit_words, data_path, kept_network, weights, what_trains
from eomt.comparison.page import write_report
from eomt.comparison.runs import load_runs
from eomt.comparison.statistics import compare
from eomt.comparison.table import NONE, table, warnings_of
from eomt.comparison.verdicts import headline
from eomt.data.labels import LabelSet
from eomt.reporting.markup import markdown_escape, tex_escape

MINUS = "\N{MINUS SIGN}"


def pictures(path, names):
    """Predictions that are right but for a corner."""
    target = torch.zeros(96, 128, dtype=torch.uint8)
    target[:, 100:] = 255
    wrong = target.clone()
    wrong[:20, :20] = 1 if "lora" in str(path) else 2
    return {name: (torch.full((3, 96, 128), 90, dtype=torch.uint8), target, wrong) for name in names}


@pytest.fixture
def matrix(tmp_path):
    return write_matrix(tmp_path / "matrix")


@pytest.fixture
def report(matrix, tmp_path):
    write_report(load_runs([matrix]), tmp_path / "report", predictions=pictures)
    return tmp_path / "report"


@pytest.fixture
def anomaly_report(matrix, tmp_path):
    """A report of runs with results on two benchmarks, and pictures of one."""
    for variant, auprc in (("lora_r8", 0.45), ("full", 0.4)):
        for seed in (0, 1):
            run = matrix / variant / f"seed_{seed}"
            for benchmark in ("toy_anomalies", "fs_lost_and_found"):
                write_anomalies(run, benchmark, {"rba": (auprc + seed / 10, 0.2 + seed / 10), "msp": (0.1, 0.9)})
            Image.new("RGB", (2000, 500)).save(run / "anomaly" / "toy_anomalies.png")
    write_report(load_runs([matrix]), tmp_path / "report", predictions=pictures)
    return tmp_path / "report"


def numbers(text):
    """Every number in a formatted cell."""
    text = text.replace(MINUS, "-").replace("$-$", "-").replace(",", "")
    return [float(n) for n in re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?", text)]


# ------------------------------------------------------------------------------------------------------------ words


def two(tmp_path, *ours, theirs=0.8, images=30, **changes):
    """A comparison of two variants, ours with this accuracy in seed 0, 1, ..."""
    shutil.rmtree(tmp_path / "two", ignore_errors=True)
    for seed, accuracy in enumerate(ours):
        counts = confusion(accuracy, seed, images), confusion(theirs, seed, images)
        write_run(tmp_path / "two" / f"a{seed}", "lora_r8", seed, counts[0], **changes)
        write_run(tmp_path / "two" / f"b{seed}", "full", seed, counts[1])
    return compare(load_runs([tmp_path / "two"]))


def test_the_answer_says_worse_better_or_not_measurably_different_by_how_much_and_how_surely(tmp_path):
    for ours, verdict, side in ((0.7, "worse", "below"), (0.9, "better", "above")):
        comparison = two(tmp_path, ours, ours, ours)
        first, baseline, sentence = headline(comparison)
        delta, (low, high) = comparison["lora_r8"].delta, re.findall(r"interval (\S+) to (\S+)\)", first)[0]
        assert first.startswith(f"LoRA against full is measurably {verdict} with lora_r8 (")
        assert numbers(f"{low} {high}") == pytest.approx([100 * delta.low, 100 * delta.high], abs=0.0051)
        assert numbers(first.split("(")[1])[0] == pytest.approx(100 * delta.value, abs=0.0051)
        assert re.match(r"full, the baseline, reaches \d\d\.\d\d ± \d\.\d\d % mIoU \(3 seeds\)\.", baseline)
        interval = r"\(95 % interval \S+ to \S+; over seeds ± \d\.\d\d\)"
        assert re.match(rf"lora_r8 is \d+\.\d\d points {side} full {interval}, training 12 % of its", sentence)
    first, _, sentence = headline(two(tmp_path, 0.8))
    effect = "+0.00 points, 95 % interval over images alone 0.00 to 0.00"
    assert first == f"LoRA against full is not measurably different with lora_r8 ({effect})."
    assert f"shows no measurable difference to full ({effect})" in sentence


def test_times_are_set_against_each_other_only_on_equal_machines(tmp_path):
    assert "computing a step takes 1.00 times as long" in headline(two(tmp_path, 0.7))[-1]
    other = headline(two(tmp_path, 0.7, machine={"gpus": ["H100"]}))[-1]
    assert "times as" not in other


def test_lora_variants_with_another_method_say_nothing_about_lora(tmp_path):
    for name, model in (
        ("rba_lora", {"outlier_loss": "rba"}),
        ("baseline_lora", {}),
        ("arcface_lora", {"head": "arcface"}),
    ):
        write_run(tmp_path / name, name, 0, confusion(0.7), model={"use_lora": True, **model})
    write_run(tmp_path / "baseline", "baseline", 0)
    assert headline(compare(load_runs([tmp_path])))[0].startswith(
        "LoRA against baseline is worse on these images, in the one seed that was run, with baseline_lora ("
    )
    shutil.rmtree(tmp_path / "baseline_lora")
    assert headline(compare(load_runs([tmp_path])))[0].startswith("baseline, the baseline, reaches")


@pytest.mark.parametrize(("seeds", "those"), [(1, "the one seed that was run"), (2, "the 2 seeds that were run")])
def test_one_seed_or_two_measure_nothing_but_these_images(tmp_path, seeds, those):
    comparison = two(tmp_path, *[0.7] * seeds)
    first = headline(comparison)[0]
    assert first.startswith(f"LoRA against full is worse on these images, in {those}, with lora_r8 (")
    assert "measurabl" not in first and ("over images alone" in first) == (seeds == 1)
    (row,) = (row for row in table(comparison).rows if row[0].text == "lora_r8")
    assert f"below in {'one seed' if seeds == 1 else '2 seeds'}" in [cell.text for cell in row]
    notes = " ".join(table(comparison).footnotes)
    assert ("Few seeds in the difference of lora_r8" in notes) == (seeds == 2)


def test_few_images_or_blocks_measure_nothing_beyond_themselves_however_many_seeds(tmp_path):
    first = headline(two(tmp_path, 0.7, 0.7, 0.7, images=9))[0]
    assert first.startswith("LoRA against full is worse on these few images with lora_r8 (")
    comparison = two(tmp_path, 0.7, 0.7, 0.7, images=64, evaluation={"sequences": ["0016E5"] * 64})
    assert "measurably" in headline(comparison)[0], "the baseline's evaluation is of an earlier version"
    for run in (tmp_path / "two").glob("b*"):
        write_evaluation(run, confusion(0.8, 3, 64), sequences=["0016E5"] * 64)
    comparison = compare(load_runs([tmp_path / "two"]))
    assert headline(comparison)[0].startswith("LoRA against full is worse on these few images with lora_r8 (")
    assert "Only 8 blocks of up to 8 neighbouring frames were evaluated" in " ".join(table(comparison).footnotes)


@pytest.mark.parametrize(
    ("names", "words"),
    [(["0016E5"] * 101, "this one sequence"), (["0016E5"] * 50 + ["0001TP"] * 51, "these 2 sequences")],
)
def test_frames_of_few_sequences_measure_nothing_of_another(tmp_path, names, words):
    two(tmp_path, 0.7, 0.7, 0.7, images=101)
    for run in (tmp_path / "two").iterdir():
        rewrite(run / "evaluation" / "target.json", sequences=names)
    comparison = compare(load_runs([tmp_path / "two"]))
    assert headline(comparison)[0].startswith(f"LoRA against full is measurably worse on {words} with lora_r8 (")
    (row,) = (row for row in table(comparison).rows if row[0].text == "lora_r8")
    assert f"below on {words.split(' ', 1)[1]}" in [cell.text for cell in row]
    (warning,) = (text for text in warnings_of(comparison) if "sequence" in text)
    assert warning == f"All images come from {words.split(' ', 1)[1]}: nothing here says how another would turn out."
    assert warning in table(comparison).footnotes


def test_two_seeds_of_which_one_is_above_and_one_below_measure_no_difference(tmp_path):
    first, _, sentence = headline(two(tmp_path, 0.6, 0.85, images=200))
    assert first.startswith("LoRA against full is not measurably different with lora_r8 (")
    assert "), and the seeds disagree, training" in sentence


def test_seeds_that_disagree_leave_it_undecided_however_narrow_the_interval(tmp_path):
    comparison = two(tmp_path, *[0.6] * 9, 0.85, images=200)
    delta = comparison["lora_r8"].delta
    assert delta.high < 0 and delta.reading == "seeds disagree"
    first, _, sentence = headline(comparison)
    assert first.startswith("LoRA against full is undecided, since seeds disagree, with lora_r8 (")
    assert f"over seeds ± {100 * delta.seed_sd:.2f}), and the seeds disagree" in sentence


def test_sides_that_average_over_other_classes_are_pointed_out(tmp_path):
    ours, theirs = (np.zeros((12, 3, 3), int) for _ in range(2))
    ours[:, :2, :2] = theirs[:, :2, :2] = np.eye(2, dtype=int) * 50
    ours[0, 0, 2] = 1  # one pixel of a class that no image has
    write_run(tmp_path / "a", "lora_r8", 0, ours)
    write_run(tmp_path / "b", "full", 0, theirs)
    notes = " ".join(table(compare(load_runs([tmp_path]))).footnotes)
    assert "lora_r8 and full are not averaged over the same classes" in notes and "(traffic_sign)" in notes


def test_words_and_table_give_one_share_and_one_memory(tmp_path):
    comparison = two(tmp_path, 0.7, 0.7, trainable_parameters=700, total_parameters=7000)
    assert "training 10 % of its parameters" in headline(comparison)[-1]
    (row,) = (row for row in table(comparison).rows if row[0].text == "lora_r8")
    assert any(cell.text == "700 (10 %)" for cell in row)


def test_the_choice_of_the_network_and_the_audit_are_told(tmp_path):
    write_run(tmp_path / "run", "lora_r8", lora_audit={"a": {"passed": True}, "b_c": {"passed": False}})
    (run,) = load_runs([tmp_path])
    assert kept_network(run) == "after the last step, not chosen by validation"
    run.config["callbacks"]["save_best"]["keep"] = "best"
    assert kept_network(run) == "best of 4 validations on the evaluated images"
    run.summary["data"]["val"] = "other"
    assert kept_network(run) == "best of 4 validations on other images"
    assert audit_words(run) == "1 of 2 passed; not b_c"


# ---------------------------------------------------------------------------------------------------------- facts


def test_every_text_says_what_was_compared(tmp_path):
    lora = {"lora_alpha": 16, "lora_target_modules": ["attn.qkv"], "lora_blocks": 4, "lora_options": {"use_dora": True}}
    start = {"backbone_name": "vit_small", "backbone_kwargs": {"depth": 6}, "ckpt_path": "day/model"}
    machine = {"platform": "Linux", "processor": "Xeon", "threads": 2, "gpus": []}
    told = {"machine": machine, "finished_at": "2026-03-01T23:59:00+00:00", "command": ["train", "experiment=dusk"]}
    for name, variant, model in (("a", "lora_r8", lora), ("b", "full", {})):
        run = write_run(tmp_path / "runs" / name, variant, model=start | model, **told)
        set_up(run, "data", _target_="eomt.data.camvid.camvid", root="/data/camvid")
    write_report(load_runs([tmp_path / "runs"]), tmp_path / "out")
    wanted = (
        "dusk",
        "vit_small with depth 6",
        "day/model",
        "LoRA of rank 8, alpha 16, use_dora True, in attn.qkv of the last 4 blocks; queries and heads",
        "camvid in /data/camvid",
        "2026-03-01",
        "Xeon, 2 threads (Linux)",
    )
    for name in ("report.html", "report.md", "report.tex"):
        text = re.sub(r"\\(.)", r"\1", (tmp_path / "out" / name).read_text())
        assert [words for words in wanted if words not in text] == [], name


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"ckpt_path": "a/model", "load_ckpt_class_head": False}, "a/model, with a fresh class head"),
        ({"backbone_weights": "dino.pth"}, "backbone from dino.pth; queries and heads random"),
        ({"pretrained": True, "backbone_name": "vit"}, "backbone as timm has it for vit; queries and heads random"),
        ({"pretrained": False}, "random"),
        ({}, NONE),
    ],
)
def test_the_weights_at_the_start_are_named(tmp_path, model, words):
    assert weights(*load_runs([write_run(tmp_path / "run", "full", model=model)])) == words


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"ckpt_path": "a/model"}, "a/model, backbone (SHA-256 0123456789ab)"),
        ({"backbone_weights": "d.pth"}, "backbone (SHA-256 0123456789ab) from d.pth; queries and heads random"),
        ({"pretrained": False}, "random"),
    ],
)
def test_the_backbone_at_the_start_is_told_by_its_hash(tmp_path, model, words):
    run = write_run(tmp_path / "run", "full", model=model, start_backbone="0123456789abcdef")
    assert weights(*load_runs([run])) == words


def test_what_trains_is_named_for_variants_without_lora(tmp_path):
    for name, model, words in (
        ("none", {}, "nothing"),
        ("head", {"freeze": ["backbone"]}, "everything but backbone"),
        ("last", {"unfreeze_last_n": 3}, "the last 3 blocks, queries and heads"),
        ("full", {}, "everything"),
    ):
        assert what_trains(*load_runs([write_run(tmp_path / name, name, model=model)])) == words


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"_target_": "eomt.data.camvid.camvid", "root": "/data/camvid"}, "camvid in /data/camvid"),
        ({"_target_": "eomt.data.folder.folder", "images": "/photos", "masks": "/m"}, "folder in /photos, masks in /m"),
        ({"_target_": "eomt.data.toy_streets.toy_streets", "root": None}, "toy_streets"),
        ({}, NONE),
    ],
)
def test_the_data_and_their_folders_are_named(tmp_path, data, words):
    set_up(write_run(tmp_path / "run", "full"), "data", **data)
    assert data_path(*load_runs([tmp_path / "run"])) == words


def test_every_format_holds_the_iou_of_every_class(report, matrix):
    content = table(compare(load_runs([matrix]))).classes
    assert content.titles == ["class", "none", "lora_r8", "full"]
    scores = [run.target.class_iou["road"] for run in load_runs([matrix]) if run.variant == "full"]
    road = next(row for row in content.rows if row[0] == "road")
    assert numbers(road[3]) == pytest.approx([100 * np.mean(scores), 100 * np.std(scores, ddof=1)], abs=0.0051)
    html, markdown = ((report / f"report.{form}").read_text() for form in ("html", "md"))
    for row in content.rows:
        assert "| " + " | ".join(map(markdown_escape, row)) + " |" in markdown
        assert list(map(tex_escape, row)) in [found for table in tex_tables(report) for found in table]
        assert all(f"<td>{text}</td>" in html for text in row[1:])
    with (report / "report.csv").open(newline="") as file:
        values = {row["variant"]: row for row in csv.DictReader(file)}
    assert float(values["full"]["iou_percent_road"]) == pytest.approx(100 * np.mean(scores))


# ---------------------------------------------------------------------------------------------------------- formats


def tex_tables(report):
    """Rows of cells of every LaTeX table, titles first; lines of a cell are joined again."""
    cell = r"\\begin\{tabular\}\[.\]\{@\{\}r@\{\}\}(.*?)\\end\{tabular\}"
    text = re.sub(cell, r"\1", (report / "report.tex").read_text())
    bodies = re.findall(r"\\toprule\n(.*?)\\bottomrule", text, re.S)
    lines = [[line for line in body.splitlines() if line != r"\midrule"] for body in bodies]
    return [[[cell.replace(r"\\", " ") for cell in line[:-3].split(" & ")] for line in table] for table in lines]


def test_all_formats_hold_the_numbers_of_one_table(report, matrix):
    with (report / "report.csv").open(newline="") as file:
        values = {row["variant"]: row for row in csv.DictReader(file)}
    markdown = [line for line in (report / "report.md").read_text().splitlines() if line.startswith("| ")][2:]
    tex = [table[1:] for table in tex_tables(report)]
    content = table(compare(load_runs([matrix])))
    titles = [title for title, _ in content.columns]
    html = (report / "report.html").read_text()
    for k, (md_line, row) in enumerate(zip(markdown, content.rows, strict=False)):
        md_cells = [cell.strip() for cell in md_line.strip("|").split(" | ")]
        tex_cells = [tex[0][k][0], *(cell for table in tex for cell in table[k][1:])][: len(row)]
        assert md_cells == [markdown_escape(cell.text) for cell in row]
        assert tex_cells == [tex_escape(cell.text) for cell in row]
        for cell in row[1:]:
            assert f"<td>{cell.text}</td>" in html
        shown = dict(zip(titles, map(numbers, tex_cells), strict=True))
        raw = {key: float(v) for key, v in values[row[0].values["variant"]].items() if re.fullmatch(r"-?[\d.]+", v)}
        assert shown["mIoU, %"] == pytest.approx([raw["miou_percent"], raw["miou_sd"]], abs=0.0051)
        if "difference_points" in raw:
            ends = [raw[f"{key}_points"] for key in ("difference", "low", "high")]
            assert numbers(tex_cells[3]) == pytest.approx(ends, abs=0.0051)
        assert shown["trainable parameters"][0] == raw["trainable_parameters"]
        assert shown["wall time, min"] == pytest.approx([raw["wall_seconds"] / 60], abs=0.051)
        assert shown["peak memory, MiB"] == pytest.approx([raw["peak_memory_bytes"] / 2**20], abs=0.051)


def test_all_formats_hold_the_anomalies_beside_miou(anomaly_report, matrix):
    content = table(compare(load_runs([matrix])))
    shown, differing = content.parts(("anomalies",), ("differences",))
    assert [row[-2:] for row in shown.rows] == [
        [NONE, NONE],
        ["50.00 ± 7.07", "25.00 ± 7.07"],
        ["45.00 ± 7.07", "25.00 ± 7.07"],
        ["2.00", "95.00"],
    ]
    markdown = (anomaly_report / "report.md").read_text()
    tex = tex_tables(anomaly_report)
    html = (anomaly_report / "report.html").read_text()
    assert r"| variant | mIoU, % | FS L\&F AuPRC, % | FS L\&F FPR95, % | Toy anomalies AuPRC, % |" in markdown
    titles = [r"FS L\&F AuPRC, \%", r"FS L\&F FPR95, \%", r"Toy anomalies AuPRC, \%", r"Toy anomalies FPR95, \%"]
    assert ["variant", r"mIoU, \%", *titles] in [table[0] for table in tex]
    assert '<th scope="col">FS L&amp;F AuPRC, %</th>' in html
    assert "<td>50.00 / 25.00</td><td>10.00 / 90.00</td>" in html, "every score, apart"
    for row in (*shown.rows, *differing.rows):
        assert "| " + " | ".join(map(markdown_escape, row)) + " |" in markdown
        assert list(map(tex_escape, row)) in [found for table in tex for found in table]
        assert all(f"<td>{text}</td>" in html for text in row[1:])
    with (anomaly_report / "report.csv").open(newline="") as file:
        values = {row["variant"]: row for row in csv.DictReader(file)}
    assert values["lora_r8"]["toy_anomalies_auprc_percent"] == "50.0"
    assert values["lora_r8"]["fs_lost_and_found_fpr95_sd"] == "7.071068"
    assert values["lora_r8"]["toy_anomalies_auprc_difference_points"] == "5.0"
    assert values["none"]["toy_anomalies_auprc_percent"] == ""


def test_the_answer_ends_with_the_anomalies_of_each_benchmark(anomaly_report, matrix):
    words = headline(compare(load_runs([matrix])))
    assert words[-1] == (
        "Toy anomalies: by rba, full has an AuPRC of 45.00 %; the others against it, in points: "
        "lora_r8 +5.00 (5.00 to 5.00)."
    )
    assert words[-2].startswith("FS L&F: by rba, full has")


def test_latex_has_no_bare_special_character(report):
    body = (report / "report.tex").read_text().split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert r"lora\_r8" in body
    assert not re.search(r"(?<!\\)[_%#]", body)
    assert body.isascii()
    assert tex_escape("a_b & 5 % \\ {x}") == r"a\_b \& 5 \% \textbackslash{} \{x\}"


def test_latex_tables_have_at_most_seven_columns_and_each_column_once(anomaly_report, matrix):
    tables = tex_tables(anomaly_report)
    assert max(len(table[0]) for table in tables) <= 7
    content = table(compare(load_runs([matrix])))
    titles = [title for part in tables for title in part[0][1:]]
    assert titles.count(r"mIoU, \%") == 2, "beside the anomalies, too"
    assert {tex_escape(title) for title, _ in content.columns[1:]} < set(titles)
    assert {tex_escape(title) for title in content.classes.titles[1:]} < set(titles)


@needs_latex
def test_latex_tables_fit_the_page(anomaly_report):
    assert_fits_the_page(anomaly_report)


def test_the_console_shows_whole_cells_at_eighty_columns(matrix, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    comparison = write_report(load_runs([matrix]), tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for row in table(comparison).rows:
        for cell in row:
            assert any(f" {cell.text} " in line for line in lines), cell.text


def test_differences_stop_the_report_before_anything_is_written(tmp_path):
    write_run(tmp_path / "a", "lora_r8", steps=99, start_fingerprint="f" * 64)
    write_run(tmp_path / "b", "full")
    with pytest.raises(ValueError) as error:
        write_report(load_runs([tmp_path / "a", tmp_path / "b"]), tmp_path / "out")
    assert "numbers of steps differ: 99 in lora_r8 seed 0; 100 in full seed 0" in str(error.value)
    assert "start weights of seed 0 differ: ffffffffffff in lora_r8" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_allowed_differences_are_marked_in_every_format(tmp_path, capsys):
    write_run(tmp_path / "a", "lora_r8", steps=99)
    write_run(tmp_path / "b", "full")
    write_report(load_runs([tmp_path / "a", tmp_path / "b"]), tmp_path / "out", allow_different=True)
    reason = "numbers of steps differ: 99 in lora_r8 seed 0; 100 in full seed 0"
    for name in ("report.html", "report.md"):
        text = re.sub(r"\\(.)", r"\1", (tmp_path / "out" / name).read_text())
        assert "lora_r8 †" in text
        assert "full †" not in text
        assert f"† Not comparable with the other variants: {reason}" in text
    tex = (tmp_path / "out" / "report.tex").read_text()
    assert r"lora\_r8 $\dagger$ &" in tex
    assert r"$\dagger$ Not comparable" in tex
    with (tmp_path / "out" / "report.csv").open(newline="") as file:
        assert {r["variant"]: r["not_comparable"] for r in csv.DictReader(file)} == {
            "lora_r8": f"† {reason}",
            "full": "",
        }
    assert "lora_r8 †" in capsys.readouterr().out


def test_failed_cells_stand_in_every_text_with_their_error(matrix, tmp_path):
    write_failed(matrix / "full" / "seed_2", "full", 2, "<script>alert(1)</script>")
    write_report(load_runs([matrix]), tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert "<pre>CUDA out of memory</pre>" in html
    assert "<script" not in html
    for name in ("report.md", "report.tex"):
        assert "failed and counts in no mean: CUDA out of memory" in (tmp_path / "out" / name).read_text()


def test_what_is_not_there_is_explained(tmp_path):
    def unreachable(path, names):
        raise OSError("data.root is not there")

    write_run(tmp_path / "a", "lora_r8", 0, confusion(0.7))
    write_run(tmp_path / "b", "full")
    runs = load_runs([tmp_path / "a", tmp_path / "b"])
    write_report(runs, tmp_path / "out", predictions=unreachable)
    assert "No pictures of lora_r8: data.root is not there." in (tmp_path / "out" / "report.html").read_text()
    write_report(runs, tmp_path / "out")
    assert "No pictures: nobody predicted" in (tmp_path / "out" / "report.html").read_text()
    write_report(runs[1:], tmp_path / "out")
    assert "the baseline, reaches" in (tmp_path / "out" / "report.html").read_text()


def test_each_network_is_asked_once_for_the_images_of_largest_gain_and_loss(tmp_path):
    asked = []
    baseline = confusion(0.8, images=7, pixels=50_000)
    ours = baseline.copy()
    for image, accuracy in ((1, 0.95), (2, 0.9), (3, 0.5), (4, 0.6), (5, 0.85), (6, 0.7)):
        ours[image] = confusion(accuracy, image, images=1, pixels=50_000)[0]
    write_run(tmp_path / "a", "lora_r8", 0, ours)
    write_run(tmp_path / "b", "full", 0, baseline)

    def predictions(path, names):
        asked.append((path.name, names))
        return pictures(path, names)

    write_report(load_runs([tmp_path / "a", tmp_path / "b"]), tmp_path / "out", predictions=predictions)
    names = ["image_001", "image_002", "image_003", "image_004"]
    assert asked == [("a", names), ("b", names)]
    html = (tmp_path / "out" / "report.html").read_text()
    assert [float(gain.replace(MINUS, "-")) > 0 for gain in re.findall(r"image_00\d: (\S+) points mIoU", html)] == [
        True,
        True,
        False,
        False,
    ]


# ----------------------------------------------------------------------------------------------------- plots


def test_disagreements_have_the_colours_of_the_legend():
    target = torch.tensor([[0, 0, 0, 0, 0, 255]], dtype=torch.uint8)
    baseline = torch.tensor([[1, 0, 1, 1, 0, 0]], dtype=torch.uint8)
    variant = torch.tensor([[0, 1, 2, 1, 0, 1]], dtype=torch.uint8)
    picture = plots.disagreement_map(target, baseline, variant)
    assert [tuple(p[:3].tolist()) for p in picture[0, :5]] == list(plots.DISAGREEMENTS.values())
    assert picture[0, :, 3].tolist() == [255] * 5 + [0]


@pytest.mark.parametrize(("width", "shown"), [(1024, 1024), (8192, 4096)])
def test_pictures_keep_their_size_unless_it_is_huge_and_label_maps_mix_no_colours(width, shown):
    labels = torch.randint(0, 2, (64, width), dtype=torch.uint8)
    classes = LabelSet(("a", "b"), ((10, 20, 30), (200, 100, 0)))
    for uri in (plots.photo_uri(torch.zeros(3, 64, width, dtype=torch.uint8)), plots.labels_uri(labels, classes)):
        picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
        assert picture.size == (shown, 64 * shown // width)
    assert {color for _, color in picture.getcolors()} == set(classes.colors)


def test_curves_are_averaged_over_the_steps_that_all_seeds_have(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), "full", seed)
    (tmp_path / "1" / "metrics.csv").write_text("step,val/miou\n24,0.5\n60,0.6\n99,0.7\n")
    steps, values = plots.seed_curves(compare(load_runs([tmp_path]))["full"])
    assert steps == [24, 99]
    np.testing.assert_allclose(values, [[35, 50], [50, 70]])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=3), min_size=1, max_size=30, unique=True))
def test_variants_are_told_apart_whatever_their_names(names):
    look = plots.styles(names)
    by_color = Counter(style.color for style in look.values())
    pairs = {(style.color, style.marker) for style in look.values()}
    assert len(pairs) == len(names) or max(by_color.values()) > len(plots.MARKERS)


def test_a_variant_has_one_colour_in_every_report_whoever_it_stands_beside():
    usual = ["none", "head", "unfreeze_last_n", "lora_r4", "lora_r8", "lora_r16", "lora_r32", "lora_last_k", "full"]
    anomalies = ["baseline", "baseline_lora", "rba", "rba_lora", "arcface", "arcface_lora", "arcface_rba"]
    for names in (usual, anomalies):
        assert len({style.color for style in plots.styles(names).values()}) == len(names)
    for name in (*usual, *anomalies, "mine", "yours"):
        assert plots.styles([name])[name].color == plots.styles(["a", *usual, *anomalies, "mine", "yours"])[name].color


def test_maps_of_disagreement_have_the_colours_of_the_two_variants():
    look = plots.styles(["lora_r8", "full"])
    colors = plots.disagreement_colors(look["lora_r8"], look["full"])
    assert [f"#{bytes(color).hex()}" for color in colors[:2]] == [plots.COLORS["lora_r8"], plots.COLORS["full"]]
    assert len(set(plots.disagreement_colors(look["full"], look["full"]))) == len(plots.DISAGREEMENTS)


def test_class_panels_have_one_scale_and_one_order_without_what_never_trained(matrix, monkeypatch):
    write_run(matrix / "head" / "seed_0", "head", 0, confusion(0.6))
    drawn = []
    monkeypatch.setattr(plots, "finish", lambda figure, *_: drawn.append(figure.axes[0]))
    comparison = compare(load_runs([matrix]))
    plots.class_plots(comparison)
    alone = compare([run for run in load_runs([matrix]) if run.variant in ("none", "full")])
    assert [v.name for v in plots.in_panels(alone)] == ["none"], "nothing else is there to be read"
    assert [axes.get_title() for axes in drawn] == ["lora_r8", "head"]
    assert len({axes.get_xlim() for axes in drawn}) == 1
    labels = [[tick.get_text() for tick in axes.get_yticklabels()] for axes in drawn]
    assert labels == [["sky", "road", "traffic_sign"]] * 2
    assert all(bottom > top for bottom, top in (axes.get_ylim() for axes in drawn)), "the first stands on top"
    assert [bar.get_y() + bar.get_height() / 2 for bar in drawn[0].patches] == pytest.approx([0, 1, 2])


# ------------------------------------------------------------------------------------------------------------- page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(("kind", "tables"), [("report", 3), ("anomaly_report", 5)])
def test_the_page_is_whole_in_a_browser_and_never_scrolls_sideways(request, kind, tables, browser, width, scheme):
    report = request.getfixturevalue(kind)
    requests, problems = [], []
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((report / "report.html").resolve().as_uri())
    assert page.locator("table.comparison").count() == tables
    assert page.locator("table.comparison caption").count() == tables
    assert page.locator("table.comparison th:not([scope])").count() == 0
    images = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.alt.length, i.complete])")
    assert len(images) > 10
    assert all(width > 0 and alt > 0 and complete for width, alt, complete in images)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not problems
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    page.close()


def test_the_page_shows_the_anomaly_maps_of_one_seed_of_each_variant_that_has_some(anomaly_report):
    html = (anomaly_report / "report.html").read_text()
    section = html.split("<h2>Anomaly maps</h2>")[1].split("</section>")[0]
    assert re.findall(r"<h3>(.+?)</h3>", section) == ["Toy anomalies"]
    assert re.findall(r"<summary>(.+?)</summary>", section) == ["lora_r8 seed 0", "full seed 0"]
    for uri in re.findall(r'src="data:image/webp;base64,(.+?)"', section):
        assert Image.open(io.BytesIO(base64.b64decode(uri))).size == (2000, 500)


def test_a_page_without_anomalies_has_no_section_of_them(report):
    assert "Anomaly" not in (report / "report.html").read_text()


@pytest.mark.parametrize("width", [390, 1280])
def test_pictures_open_in_full_size_and_close_again(anomaly_report, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 700})
    page.goto((anomaly_report / "report.html").resolve().as_uri())
    images = "[...document.querySelectorAll('label img')].filter(i => i.checkVisibility())"
    sizes = f"{images}.map(i => [i.clientWidth, i.naturalWidth, i.currentSrc.startsWith('data:image/svg')])"
    count = len(page.evaluate(sizes))
    assert count > 8 and page.locator("figure img").count() == page.locator("label img").count()
    for k in range(count):
        small = page.evaluate(sizes)[k]
        page.evaluate(f"{images}[{k}].click()")
        shown, natural, drawing = page.evaluate(sizes)[k]
        assert (shown > 0.9 * width - 40 and shown >= small[0]) if drawing else shown == natural
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate(f"{images}[{k}].click()")
        assert page.evaluate(sizes)[k] == small
    page.close()


@pytest.mark.parametrize(("width", "said"), [(400, True), (1200, False)])
def test_a_narrow_page_says_that_tables_scroll(report, browser, width, said):
    page = browser.new_page(viewport={"width": width, "height": 700})
    page.goto((report / "report.html").resolve().as_uri())
    captions = [caption.inner_text() for caption in page.locator("caption").all()]
    assert captions and all(("scrolls sideways" in caption) == said for caption in captions)
    page.close()


def test_dark_pages_get_dark_drawings(report, browser):
    shown = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto((report / "report.html").resolve().as_uri())
        shown[scheme] = page.evaluate("document.images[0].currentSrc")
        page.close()
    assert shown["light"] != shown["dark"]


def test_the_page_stays_small_with_many_variants(tmp_path):
    counts = confusion(0.8, classes=19, images=12)
    names = tuple(f"class {k}" for k in range(19))
    for k in range(12):
        run = write_run(tmp_path / "runs" / str(k), f"lora_{k}", 0)
        write_evaluation(run, np.roll(counts, k, 0), classes=names)
    write_report(load_runs([tmp_path / "runs"]), tmp_path / "out", predictions=pictures)
    assert (tmp_path / "out" / "report.html").stat().st_size < 5e6
