"""The wheel in an environment of its own, without a checkout: the command `eomt`, and what a notebook imports."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import ROOT, TOY_DATA, TOY_MODEL
from PIL import Image

from eomt import cli, places


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Where nothing but the wheel was installed; the libraries that it needs are taken from here."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:
        if name.startswith(("eomt/", "configs/", "scripts/")) or ("/" not in name and (ROOT / name).is_file()):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, f"{folder}/source"]
    subprocess.run(wheel, check=True, timeout=200)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    (built,) = folder.glob("*.whl")
    subprocess.run([*pip, f"--python={python}", "install", "--no-deps", built], check=True, timeout=200)
    libraries = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    paths = {"base": folder / "env", "platbase": folder / "env"}
    (Path(sysconfig.get_path("purelib", vars=paths)) / "libraries.pth").write_text("\n".join(libraries))
    return folder / "env" / "bin"


def call(environment, folder, *words, code=0):
    """Calls the command in a folder of its own; returns what it printed."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = [str(environment / word) if k == 0 else str(word) for k, word in enumerate(words)]
    result = subprocess.run(program, cwd=folder, env=variables, capture_output=True, text=True, timeout=240)
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def test_the_package_offers_its_names_and_knows_where_it_is(environment, tmp_path):
    code = """if True:
        import sys, eomt
        from eomt.places import INSTALLED, SCRIPTS, TRAIN
        assert "torch" not in sys.modules and INSTALLED and TRAIN.is_file() and (SCRIPTS / "compare.py").is_file()
        from eomt import LoRASettings, apply_lora
        print(eomt.__file__, eomt.MaskClassificationSemantic.__name__, LoRASettings(rank=4).rank, apply_lora.__name__)
    """
    said = call(environment, tmp_path, "python", "-c", code)
    assert str(environment.parent) in said and str(ROOT) not in said
    assert " MaskClassificationSemantic 4 apply_lora" in said


def test_every_command_is_listed_within_a_second(environment, tmp_path):
    call(environment, tmp_path, "eomt", "--version")  # compiles what it imports
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    said = call(environment, tmp_path, "eomt", "--help")
    assert (
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1
    )  # of the processor; a busy machine has no other measure
    assert all(f"  {name} " in said for name in places.COMMANDS)
    assert max(map(len, said.splitlines())) <= 80


def test_a_mistyped_command_and_a_mistyped_setting_are_told(environment, tmp_path):
    said = call(environment, tmp_path, "eomt", "evaluat", code=2)
    assert "error: eomt has no command evaluat; did you mean evaluate? (eomt --help lists them)" in said
    said = call(environment, tmp_path, "eomt", "train", "model.use_lor=true", code=2)
    assert "did you mean use_lora?" in said and not list(tmp_path.iterdir())


def test_a_network_is_trained_and_used_without_a_checkout(environment, tmp_path):
    words = [*TOY_DATA, "model=tiny", *TOY_MODEL, "--use_lora", "--max_steps", 1, "trainer.accelerator=cpu"]
    call(environment, tmp_path, "eomt", "train", *words, "output_dir=run")
    Image.new("RGB", (128, 64)).save(tmp_path / "street.png")
    call(environment, tmp_path, "eomt", "predict", "run/adapter", "street.png", "out")
    assert any((tmp_path / "out").rglob("street*.png"))


def test_each_command_names_a_script_that_is_there_and_every_script_has_one():
    scripts = {script for script, _, _ in places.COMMANDS.values()}
    there = {path.stem for path in (ROOT / "scripts").glob("[!_]*.py")} | {"train_with_lora"}
    assert scripts == there - {"launch_lightning"}  # which starts what stands in a checkout
    assert not [name for name, (script, _, _) in places.COMMANDS.items() if not places.script_path(script).is_file()]


def test_commands_are_named_as_the_user_has_them():
    line = "next: python scripts/compare.py report runs; python train_with_lora.py --config-name x; compare.pyc"
    assert places.as_typed(line, installed=False) == line
    assert places.as_typed(line, installed=True) == (
        "next: eomt compare report runs; eomt train --config-name x; compare.pyc"
    )


def test_a_command_runs_its_script_with_its_words(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [])
    assert cli.main(["report", "/nowhere/at/all"]) == 1
    assert "/nowhere/at/all" in capsys.readouterr().err
    assert cli.main(["train", "--no_such_flag"]) == 2
    assert sys.argv[0] == str(ROOT / "train_with_lora.py")  # which further processes are started by


def test_the_image_is_built_from_what_the_wheel_needs_and_the_linter_has_no_complaint():
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter:
        result = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
    text = (ROOT / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed and all((ROOT / name).exists() for name in copied)
    assert {"setup.py", "pyproject.toml", "configs", "scripts", "eomt", "lora_config.py"} <= copied


def test_the_container_for_developers_makes_what_the_makefile_has():
    settings = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    target = settings["postCreateCommand"].removeprefix("make ")
    assert re.search(f"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_page_completes_every_command():
    (line,) = re.findall(r"complete -o default -W \"(.*?)\" eomt", (ROOT / "docs" / "installing.md").read_text())
    assert line.split() == list(places.COMMANDS)
