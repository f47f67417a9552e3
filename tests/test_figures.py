"""Every measured figure in README and docs comes from a JSON file in benchmarks/ that says where it is from."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from eomt.comparison import demo
from eomt.files import write_json
from eomt.reporting.run_summary import provenance
from eomt.settings.formats import SUMMARY, stamped

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "benchmarks").rglob("*.json"))
ORIGIN = {"commands": list, "git_commit": str, "machine": dict, "versions": dict, "seeds": list}
MEASURE_AGAIN = {  # what these files lack and nobody can add afterwards
    "speed_cpu.json": ["git_commit is not of a clean checkout"],
    "startup_many.json": ["no versions"],
}


def git(*arguments):
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def in_history(commit):
    """Whether it is one of this history; a copy without history is not asked."""
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_of_figures_names_command_commit_machine_versions_and_seeds(path):
    facts = json.loads(path.read_text())
    faults = {fault for part in facts.get("parts", {"": facts}).values() for fault in missing(part)}
    assert sorted(faults) == MEASURE_AGAIN.get(path.name, [])


# -------------------------------------------------------------------------------------------------- what writes them


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
