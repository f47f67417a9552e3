"""`--help` of every command line, and the demo's table, fit a screen of 80 columns."""

import argparse
import json
import runpy
import sys

import pytest
from conftest import ROOT

from eomt.comparison.demo import print_table
from eomt.flags import help_text, in_columns, positive

SCRIPTS = [path.name for path in sorted((ROOT / "scripts").glob("*.py")) if path.name != "_checkout.py"]
COMMANDS = [(name,) for name in SCRIPTS] + [("compare.py", command) for command in ("run", "report", "evaluate")]


def too_wide(text):
    return [line for line in text.splitlines() if len(line) > 80]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_help_of_every_script_is_at_most_80_columns_wide_on_any_screen(words, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [words[0], *words[1:], "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / words[0]), run_name="__main__")
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and printed.startswith("usage:") and not too_wide(printed)


def test_the_help_of_training_is_at_most_80_columns_wide():
    assert not too_wide(help_text(ROOT / "configs"))


def test_the_table_of_the_demo_is_at_most_80_columns_wide_and_whole_in_a_log_file(capsys):
    print_table(json.loads((ROOT / "benchmarks" / "demo.json").read_text())["rows"])
    printed = capsys.readouterr().out
    assert not too_wide(printed) and "…" not in printed and "full fine-tune" in printed and "parameters" in printed


def test_a_long_command_goes_on_behind_a_backslash_and_its_comment_stands_above():
    command = 'python scripts/x.py first "a quoted word with spaces" second=[1,2,3] third=4 --option value'
    assert in_columns(f"examples:\n  {command}   # why\n  python y.py   # short") == (
        "examples:\n"
        "  # why\n"
        '  python scripts/x.py first "a quoted word with spaces" second=[1,2,3] third=4 \\\n'
        "      --option value\n"
        "  python y.py   # short"
    )


def test_paragraphs_and_tables_are_wrapped_and_stay_apart():
    text = f"{'word ' * 20}\n{'more ' * 3}\n\nname     {'what ' * 20}\n         it is\nother    short"
    lines = in_columns(text).splitlines()
    assert not too_wide("\n".join(lines)) and lines[2] == ""
    assert lines[3].startswith("name     what") and lines[4].startswith("         what")
    assert lines[4].endswith("it is") and lines[-1] == "other    short"


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", ""])
def test_a_number_of_things_is_a_whole_one_from_1_on(text):
    assert positive("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match="give a whole number from 1 on"):
        positive(text)


WRITING = {  # how a script is called that writes, without the place
    "predict.py": ["model", "photos"],
    "convert.py": ["model", "--to", "hf"],
    "merge_lora.py": ["adapter"],
    "extract_lora.py": ["full", "base", "data=camvid", "data.root=x"],
    "import_masks.py": ["export.json", "photos"],
    "evaluate.py": ["model"],
    "evaluate_anomaly.py": ["model", "data=toy_anomalies"],
    "make_cut_paste.py": ["data=toy_streets"],
    "dataset_report.py": ["data=toy_streets"],
    "compare.py": ["report", "runs"],
}


@pytest.mark.parametrize("script", WRITING)
@pytest.mark.parametrize("way", [["output_dir=place"], ["--output_dir", "place"], ["--output_dir=place"]], ids=len)
def test_one_word_says_where_every_script_writes(script, way, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    names = runpy.run_path(str(ROOT / "scripts" / script))
    args = names.get("parse_arguments", names["parse"])([*WRITING[script], *way])
    assert str(args.output_dir) == "place" and str(getattr(args, "out", None) or "place") == "place"
    assert getattr(args, "overrides", []) in ([], [word for word in WRITING[script] if "=" in word])


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["predict.py", "model", "photos", "--outptu", "place"], "--output_dir"),
        (["convert.py", "model", "out", "--to=hf", "--imgsize=8"], "--img_size"),
        (["compare.py", "report", "runs", "--basline", "full"], "--baseline"),
        (["compare.py", "run", "--source", "data"], "source=VALUE"),
        (["compare.py", "run", "--dataset_root", "x"], "data.root=VALUE"),
        (["evaluate.py", "model", "--images", "photos"], "data.images=VALUE"),
        (["dataset_report.py", "data=folder", "--mask_template", "{name}"], "data.mask_template=VALUE"),
        (["cost.py", "--model", "vit_large"], "model=VALUE"),
        (["predict.py", "model", "photos", "--model=tiny"], None),
        (["doctor.py", "run", "--zzz"], None),
    ],
    ids=lambda value: value and value[0],
)
def test_a_mistyped_option_of_a_script_is_told_with_the_one_that_was_meant(words, meant, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    names = runpy.run_path(str(ROOT / "scripts" / words[0]))
    with pytest.raises(SystemExit):
        names.get("parse_arguments", names.get("parse", names["main"]))(words[1:])
    said = capsys.readouterr().err
    assert f"unrecognized arguments: {words[-2 if meant and '=' not in words[-1] else -1]}" in said
    assert said.rstrip().endswith(f"; did you mean {meant}?") if meant else "did you mean" not in said


@pytest.mark.parametrize("script", [name for name, words in WRITING.items() if "lora" in name or "masks" in name])
def test_where_to_write_is_said_once(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    parse = runpy.run_path(str(ROOT / "scripts" / script))["parse"]
    words = [word for word in WRITING[script] if "=" not in word]
    assert str(parse([*words, "place"]).out) == "place"
    for more, told in (([], "neither"), (["a", "--output_dir", "b"], "a and b")):
        with pytest.raises(SystemExit):
            parse([*words, *more])
        assert (
            f"say once where to write, behind what is read or with --output_dir; got {told}" in capsys.readouterr().err
        )
