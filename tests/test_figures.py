"""Every measured figure in README and docs comes from a JSON file in benchmarks/ that says where it is from."""

import json
import re
import subprocess
from pathlib import Path

import pytest

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
