"""Every measured figure in README, docs and examples comes from a JSON file that says where it is from."""

import json
import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest
from test_comparison import confusion, set_up, write_run

from benchmarks import exchange_figures, figures, quantised_base, tables
from eomt.comparison import demo
from eomt.comparison.page import write_report
from eomt.comparison.runs import load_runs
from eomt.comparison.table import NONE
from eomt.files import write_json
from eomt.reporting.run_summary import provenance
from eomt.settings.formats import SUMMARY, stamped

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*/results.json"))
FILES = [*sorted((ROOT / "benchmarks").rglob("*.json")), *EXAMPLES]
ORIGIN = {"commands": list, "git_commit": str, "machine": dict, "versions": dict, "seeds": list}


def git(*arguments):
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)


@cache
def in_history(commit):
    """Whether it is one of this history; a copy without history is not asked."""
    if not (ROOT / ".git").exists() or git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        return True
    return git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0


def missing(facts):
    """What does not say where figures are from."""
    faults = [f"no {name}" for name, kind in ORIGIN.items() if not (facts.get(name) and isinstance(facts[name], kind))]
    if "machine" in facts and not facts["machine"].get("processor"):
        faults.append("machine without processor")
    commit = str(facts.get("git_commit"))
    if not re.fullmatch("[0-9a-f]{40}", commit):
        faults.append("git_commit is not of a clean checkout")
    elif not in_history(commit):
        faults.append(f"git_commit {commit} is not in this history")
    return faults


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_file_of_figures_names_command_commit_machine_versions_and_seeds(path):
    facts = json.loads(path.read_text())
    assert [fault for part in facts.get("parts", {"": facts}).values() for fault in missing(part)] == []


# ------------------------------------------------------------------------------------------------------- the pages

PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in tables.PAGES}
READMES = {f"examples/{path.parent.name}/README.md": path for path in EXAMPLES}
ALL_PAGES = PAGES | {name: path.with_name("README.md").read_text(encoding="utf-8") for name, path in READMES.items()}
RESULTS = re.compile(r"<!-- results\.json -->\n(.*?)<!-- end of results\.json -->", re.DOTALL)  # of an example
BLOCKS = [
    pytest.param(name, block, id=f"{name}-{block['name']}")
    for name, text in PAGES.items()
    for block in tables.BLOCK.finditer(text)
]
NO_MEASUREMENT = {  # tables with digits and units: what stands in their first cell
    "docs/camvid.md": ["network"],  # others' figures, with their source
    "docs/data.md": ["found"],  # an example of a warning
    "docs/exported.md": ["`--precision`"],  # limits
    "docs/own_images.md": ["weights"],  # names with digits
}
MEASURED = re.compile(r"±|\d ?(%|x|s|ms|min|points|[KMGT]i?B|[GT]FLOPs?)(?![\w^])")
UNIT = re.compile(r"%|, (s|ms|points|[KMGT]i?B)\b|\b([KMGT]i?B|[GT]FLOPs?|mIoU|seconds)\b")  # in the title of a column


def cells(text):
    """{(row, column): cell} of a table, named by their first cell and title; of sentences, their words by number."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:1] == "|"]
    if not lines:
        return {("words", str(number)): word for number, word in enumerate(text.split())}
    titles = dict(enumerate(lines[0]))
    return {
        (f"{number}, {line[0]}", titles.get(column, str(column)) + f" ({column + 1})"): cell
        for number, line in enumerate(lines)
        for column, cell in enumerate(line)
    }


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_every_cell_is_that_of_its_json_file(page, block):
    wanted, found = cells(tables.rendered(block)), cells(block["text"])
    wrong = [
        f"{page}, {block['kind']} {block['name']}, row {row}, column {column}: {found.get((row, column))!r} instead of "
        f"{wanted.get((row, column))!r}"
        for row, column in dict.fromkeys([*wanted, *found])
        if found.get((row, column)) != wanted.get((row, column))
    ]
    assert not wrong, "\n".join([*wrong[:9], "python benchmarks/tables.py writes what is in the files"])


SIZE_OR_TIME = re.compile(r"\d[\d.,]* (?:[KMGT]i?B|[GT]FLOPs?|m?s|minutes|seconds)\b")
BY_HAND = {  # what follows from shapes or settings, and was not measured
    "docs/anomaly.md": ["26 MB", "160 MiB", "0.5 GiB"],
    "docs/data.md": ["1.5 GB", "32 MiB", "32 MiB"],
    "docs/exported.md": ["2 GiB", "1.2 GiB"],
    "docs/lora.md": ["131.9 GiB", "25.7 GiB"],
    "docs/training.md": ["8.4 MB", "1 GiB"],
}


MARK_IT = "mark it: <!-- figures NAME: benchmarks/FILE.json -->"
SCORE = re.compile(r"\d[\d.,]*\s(?:%|points?\b|mIoU\b|times\s(?:as|smaller|larger|less|more|fewer|faster|slower)\b)")
SCORES_BY_HAND = {  # thresholds, tolerances, definitions and settings, which nobody measured
    "docs/anomaly.md": ["95 %", "0.1 point"],
    "docs/claims.md": ["20 times faster"],  # what others say
    "docs/comparing.md": ["0.1 point", "95 %", "95 %", "95 %"],
    "docs/data.md": ["40 %", "99 %", "30 %"],
    "docs/doctor.md": ["40 %"],
    "docs/exchange.md": ["99.9 %"],
    "docs/exported.md": ["2 %"],
    "docs/publishing.md": ["95 %"],
    "docs/training.md": ["19 %"],
}


def sentences_outside(text):
    """What stands in no block, in no table and in no code."""
    code = re.compile(r"^```.*?^```|^    .*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
    return re.sub(r"^\|.*$", "", code.sub("", outside(text)), flags=re.MULTILINE)


@pytest.mark.parametrize("page", ALL_PAGES)
def test_sizes_and_times_in_sentences_come_from_a_file_or_follow_from_shapes(page):
    assert SIZE_OR_TIME.findall(sentences_outside(ALL_PAGES[page])) == BY_HAND.get(page, []), MARK_IT


@pytest.mark.parametrize("page", PAGES)
def test_scores_and_ratios_in_sentences_come_from_a_file_or_were_not_measured(page):
    assert SCORE.findall(sentences_outside(PAGES[page])) == SCORES_BY_HAND.get(page, []), MARK_IT


def test_a_score_in_a_sentence_is_seen():
    text = "LoRA reaches 61.0 mIoU, 2.3\npoints below full,\n`--share 5 %`\n\n| 12 % |\nand is 7 times smaller, 12 %."
    found = [" ".join(words.split()) for words in SCORE.findall(sentences_outside(text))]
    assert found == ["61.0 mIoU", "2.3 points", "7 times smaller", "12 %"]


def test_a_page_that_is_not_what_the_files_hold_is_written_and_others_are_left_alone(tmp_path, monkeypatch):
    start = "<!-- table coverage_by_correlation: benchmarks/coverage.json -->\n"
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text(f"before\n\n{start}| 0 | 12 % |\n<!-- end of table -->\nafter\n")
    other.write_text("| 0 | 12 % |\n")
    os.utime(other, (0, 0))
    monkeypatch.setattr(tables, "PAGES", [page, other])
    assert tables.main() == 0
    written = page.read_text()
    assert written.startswith(f"before\n\n{start}| correlation") and written.endswith("-->\nafter\n")
    facts = json.loads((ROOT / "benchmarks" / "coverage.json").read_text())
    assert figures.coverage_by_correlation(facts) in written and other.stat().st_mtime == 0


def test_a_block_of_an_unknown_name_is_refused():
    block = tables.BLOCK.search("<!-- table by_hand: benchmarks/demo.json -->\n<!-- end of table -->")
    with pytest.raises(ValueError, match=r"table by_hand: .* names no function"):
        tables.rendered(block)


def test_every_mark_opens_or_ends_a_block():
    for page, text in PAGES.items():
        marks = len(re.findall(r"<!-- (?:table|figures|end of)\b", text))
        assert marks == 2 * len(list(tables.BLOCK.finditer(text))), page


def outside(text):
    """What stands in no block."""
    return RESULTS.sub("", tables.BLOCK.sub("", text))


@pytest.mark.parametrize("page", READMES)
def test_an_example_shows_its_results_between_marks_and_the_commands_that_made_them(page):
    """That the table is the one of the file is a matter of the example's own test, which knows how it is made."""
    text, results = ALL_PAGES[page], json.loads(READMES[page].read_text())
    assert [part.strip().startswith("| ") for part in RESULTS.findall(text)] == [True]
    commands = re.sub(r" \\\n +", " ", text)
    assert not [command for command in results["commands"] if command not in commands]


def is_measured(head, rule, *rows):
    """Whether a cell has a figure with its unit, or a figure under a title that has the unit."""
    under_units = [k for k, title in enumerate(head.split("|")) if UNIT.search(title)]
    figures = [row.split("|")[k] for row in rows for k in under_units]
    return bool(MEASURED.search("\n".join(rows)) or any(re.search(r"\d", cell) for cell in figures))


@pytest.mark.parametrize("page", ALL_PAGES)
def test_every_measured_table_comes_from_a_file_or_holds_no_measurement(page):
    tables_by_hand = re.findall(r"(?:^\|.*\n)+", outside(ALL_PAGES[page]), re.MULTILINE)
    measured = [table for table in tables_by_hand if is_measured(*table.splitlines())]
    found = [table.strip("| ").split("|")[0].strip() for table in measured]
    assert found == NO_MEASUREMENT.get(page, []), "mark it: <!-- table NAME: benchmarks/FILE.json -->"


# -------------------------------------------------------------------------------------------------- what writes them


def test_the_benchmark_of_quantised_bases_reads_the_command_that_it_shows(monkeypatch):
    shown = re.search(r"python (benchmarks/quantised_base\.py .*)", quantised_base.__doc__)[1]
    monkeypatch.setattr("sys.argv", shlex.split(shown))
    args = quantised_base.parse()
    assert args.seeds == [0, 1, 2] and args.name == "toy streets" and "variant=lora_r8" in args.overrides


def test_provenance_names_all_five_and_a_script_of_the_checkout_by_its_place_in_it(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "coverage.py"), "a file.json"])
    facts = provenance(range(2))
    assert facts["commands"] == ["python benchmarks/coverage.py 'a file.json'"] and facts["seeds"] == [0, 1]
    assert not set(missing(facts)) - {"git_commit is not of a clean checkout"}


def test_the_demo_writes_its_table_with_seconds_and_provenance(monkeypatch, tmp_path):
    rows = {"variant": "", "miou_clear": 0.5, "miou_night_fog": 0.4, "trainable_parameters": 9, "artefact_bytes": 9}
    rows |= {"peak_memory_bytes": 9, "seconds_per_step": 0.1}

    def train(overrides, output):
        write_json(output / "summary.json", stamped(SUMMARY, {"status": "finished", "seed": 7}))

    for name, fake in {
        "train": lambda overrides, output: output.mkdir(parents=True) or train(overrides, output),
        "open_network": lambda run: run.name,
        "table_row": lambda name, run, network: rows | {"variant": name},
        "draw": lambda networks, path: None,
    }.items():
        monkeypatch.setattr(demo, name, fake)
    assert demo.run_demo(tmp_path / "demo", json=tmp_path / "demo.json") == 0
    facts = json.loads((tmp_path / "demo.json").read_text())
    assert facts == json.loads((tmp_path / "demo" / "table.json").read_text())
    assert [row["variant"] for row in facts["rows"]] == ["source", "full fine-tune", "LoRA"]
    assert facts["seeds"] == [7] and facts["seconds_in_all"] >= 0 and set(ORIGIN) < set(facts)


# -------------------------------------------------------------------------------------------- matrices of compare.py


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """report.json of two variants with a source domain, three numbers of images, two seeds; one variant has one."""
    root = tmp_path_factory.mktemp("runs")
    for variant, quality in (("full", 0.8), ("lora_r8", 0.85), ("none", 0.5)):
        for size, lack in ((16, 0.2), (None, 0.0)):
            for seed in (0, 1) if variant != "none" else (0,):
                counts = confusion(round(quality - lack, 2), seed)
                data = {"train": f"train {size}", "val": "val", "train_images": size or 367}
                run = write_run(root / f"{variant}_{size}_{seed}", variant, seed, counts, counts, data=data)
                set_up(run, "data", train_images=size)
    write_report(load_runs([root]), root / "report")
    return json.loads((root / "report" / "report.json").read_text())


def test_a_matrix_is_a_row_a_variant_with_scores_and_what_they_cost(reported):
    found = cells(figures.matrix(reported))
    titles = list(dict.fromkeys(column for _, column in found))
    assert [title.rpartition(" (")[0] for title in titles] == [
        *("variant", "mIoU, %", "difference to `full` (95 % interval), points", "change on source, points"),
        *("trainable parameters", "artefact, MiB", "peak memory, MiB", "s per step", "GFLOP per step"),
    ]
    rows = {row.split("`")[1]: row for row, _ in found if "`" in row}
    values = {row["variant"]: row for row in reported["table"]}
    full, lora, none = ([found[rows[name], title] for title in titles] for name in ("full", "lora_r8", "none"))
    assert full[1] == f"{values['full']['miou_percent']:.2f} ± {values['full']['miou_sd']:.2f}"
    ends = (values["lora_r8"][f"{end}_points"] for end in ("difference", "low", "high"))
    assert lora[2] == "{:+.2f} ({:.2f} to {:.2f})".format(*ends).replace("-", "\N{MINUS SIGN}")
    assert full[2] == "baseline" and none[3] == NONE and none[4] == "0" and none[7:] == [NONE, NONE]
    assert lora[4] == "500 (12 %)" and lora[8] == "3.0" and lora[7] == f"{0.9 + 0.1:.3f}"


def test_numbers_of_images_are_columns_with_score_and_difference(reported):
    found = cells(figures.images(reported))
    assert list(dict.fromkeys(column for _, column in found)) == ["variant (1)", "16 images (2)", "367 images (3)"]
    small = next(row for row in reported["fewer_images"][0]["table"] if row["variant"] == "lora_r8")
    cell = next(text for (row, column), text in found.items() if "lora_r8" in row and column == "16 images (2)")
    assert cell.startswith(f"{small['miou_percent']:.2f} ± ") and "; +" in cell
    assert next(text for (row, column), text in found.items() if "full" in row and column == "16 images (2)").endswith(
        "baseline"
    )


def test_a_figure_without_its_origin_is_told():
    facts = json.loads((ROOT / "benchmarks" / "coverage.json").read_text())
    assert not missing(facts)
    for changes, fault in (
        ({"git_commit": facts["git_commit"][:7]}, "git_commit is not of a clean checkout"),
        ({"git_commit": facts["git_commit"] + "-dirty"}, "git_commit is not of a clean checkout"),
        ({"machine": {"platform": "Linux"}}, "machine without processor"),
        ({"seeds": []}, "no seeds"),
    ):
        assert missing(facts | changes) == [fault]


def test_tables_of_other_programs_say_what_was_measured_and_leave_out_what_was_not():
    same = {"reader": "ours", "difference": 1.2e-6, "same": 1.0}
    parts = {"one": {"rows": [same | {"file": "ours"}]}, "two": {"rows": [same | {"file": "published", "same": 0.5}]}}
    text = exchange_figures.exchange({"parts": parts})
    assert f"| ours | ours | 1e-06 | 100.00 % | {NONE} | {NONE} |" in text
    assert f"| published | ours | {NONE} | {NONE} | 1e-06 | 50.00 % |" in text
    row = {"variant": "onnx fp16", "miou": 0.4567, "bytes": 2**20, "seconds": 0.25}
    text = exchange_figures.quantised({"parts": {"toy": {"rows": [row]}}})
    assert text.endswith("| toy | onnx fp16 | 45.67 | 1.0 | 0.250 |")
    row = {"base": "float32", "runs": [{}, {}], "miou": 0.5, "peak_memory": 2**30}
    text = exchange_figures.quantised_base({"parts": {"toy": {"rows": [row]}}})
    assert text.endswith("| toy | float32 | 2 | 50.00 | 1,024 |")


def test_a_table_of_what_ranks_keep_ends_with_the_fine_tune_itself():
    scores = {"0": 0.1, "4": 0.2, "targets": 0.3, "full": 0.4}
    part = {"kept": {"4": 0.5}, "miou": scores, "left_out_share": 0.06}
    part["left_out"] = {"norm.weight": {"tensors": 2, "norm": 1.0, "relative": 0.25}}
    lines = exchange_figures.extraction({"parts": {"toy": part}}).splitlines()[2:]
    assert lines[1] == "| toy | 4 | 50.0 | 20.00 |" and lines[-1] == f"| toy | full | {NONE} | 40.00 |"
    assert len(lines) == 4 and "in 2 other tensors" in exchange_figures.extraction_left_out({"parts": {"toy": part}})
