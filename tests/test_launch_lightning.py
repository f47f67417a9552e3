"""Launching on Lightning AI: what would be submitted, what stops before it, and what the job's shell runs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from eomt.launch.job import Job, find_machine

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "launch_lightning.py"
RUN = [
    "--config-name",
    "cityscapes_lora",
    "data.root=/data/my cities",
    "model.img_size=[640,640]",
    "model.lora_rank=16",
]
JOB = ["--machine", "l4", "--name", "night-1", "--folder", "eomt-lora", "--interruptible", "--max-runtime", "8h"]

SDK = """
import json, os
__version__ = "0"
class Machine:
    def __init__(self, name): self.name = name
    def __str__(self): return self.name
Machine.L4, Machine.A100 = Machine("L4"), Machine("A100")
class Studio:
    def __init__(self, name=None, teamspace=None, org=None, user=None, create_ok=True): self.name = name
class Job:
    link = "https://example.org/job"
    @classmethod
    def run(cls, name, machine, command=None, studio=None, env=None, interruptible=False):
        if name == "taken": raise RuntimeError("the name\\nis taken")
        with open(os.environ["SUBMITTED"], "w") as file:
            json.dump([name, str(machine), studio.name, env, interruptible], file)
        return cls()
"""  # with the signatures of lightning_sdk, as far as they are used


def launch(*words, **environment):
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, env=env)


@pytest.fixture
def offline(tmp_path):
    """An environment with a stand-in for the SDK, which notes what is submitted."""
    (tmp_path / "lightning_sdk.py").write_text(SDK)
    (tmp_path / "credentials.json").write_text("{}")
    return {
        "PYTHONPATH": str(tmp_path),
        "SUBMITTED": str(tmp_path / "submitted"),
        "LIGHTNING_CREDENTIAL_PATH": str(tmp_path / "credentials.json"),
        "LIGHTNING_API_KEY": "",
        "LIGHTNING_AUTH_TOKEN": "",
    }


def test_help_shows_examples_and_where_the_arguments_of_the_training_go():
    result = launch("--help")
    assert result.returncode == 0, result.stderr
    assert "--dry-run" in result.stdout and "-- --config-name cityscapes_lora" in result.stdout


def test_a_dry_run_prints_the_job_with_the_real_sdk_and_without_an_account():
    pytest.importorskip("lightning_sdk", reason="lightning-sdk is not installed")
    result = launch(*JOB, "--env", "NOTE=a b=c", "--dry-run", "--", *RUN)
    assert result.returncode == 0, result.stderr
    assert "machine       L4\n" in result.stdout and "interruptible True\n" in result.stdout
    assert "{'NOTE': 'a b=c'}" in result.stdout
    assert "results       /teamspace/jobs/night-1/eomt-lora/outputs/night-1\n" in result.stdout
    training = next(line for line in result.stdout.splitlines() if "train_with_lora.py" in line)
    words = ["timeout", "8h", "python", "train_with_lora.py", *RUN, "output_dir=outputs/night-1"]
    assert shlex.split(training)[:-1] == words


@pytest.mark.parametrize("machine", ["T4", "L4", "L40S", "A100", "H100_X_8"])
def test_the_machines_of_help_and_guide_exist(machine):
    sdk = pytest.importorskip("lightning_sdk", reason="lightning-sdk is not installed")
    assert find_machine(machine) == getattr(sdk.Machine, machine)


def test_an_sdk_that_takes_other_arguments_is_noticed(offline):
    sdk = Path(offline["PYTHONPATH"], "lightning_sdk.py")
    sdk.write_text(SDK.replace("interruptible=False", "spot=False"))
    result = launch("--machine", "L4", "--dry-run", "--", *RUN, **offline)
    assert result.returncode == 1
    assert "lightning-sdk 0 has another Job.run" in result.stderr and "interruptible" in result.stderr


def test_without_the_sdk_the_error_names_the_installation(offline):
    Path(offline["PYTHONPATH"], "lightning_sdk.py").write_text("raise ImportError")
    result = launch("--machine", "L4", "--dry-run", "--", *RUN, **offline)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and "pip install lightning-sdk" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--machine", "A1000", "--", *RUN], 1, "machine A1000 is unknown; did you mean A100?"),
        (["--machine", "L4", "--", *RUN, "model.lora_rnk=8"], 2, "did you mean lora_rank?"),
        (["--machine", "L4", "--", *RUN, "--lora_rnk", "8"], 2, "did you mean --lora_rank?"),
        (["--machine", "L4", "--", *RUN, "model.lora_rank=-1"], 1, "rank"),
        (["--machine", "L4", "--", "--use_lora"], 1, "data.root is required"),
        (["--machine", "L4", "--compare", "--", "experiment=toy_source", "--resolve"], 2, "a matrix has no option but"),
        (["--machine", "L4", "--", *RUN, "--multirun", "seed=0,1"], 1, "a job is one run"),
        (["--machine", "L4", "--max-runtime", "8 hours", "--", *RUN], 2, "as in 8h"),
        (["--machine", "L4", "--name", "my job", "--", *RUN], 2, "use letters"),
        (["--machine", "L4", "--env", "KEY", "--", *RUN], 2, "KEY=VALUE"),
    ],
)
def test_what_is_mistyped_stops_with_a_sentence_before_anything_is_submitted(offline, words, code, sentence):
    result = launch(*words, **offline)
    assert result.returncode == code, result.stderr
    assert sentence in result.stderr and "Traceback" not in result.stderr
    assert not Path(offline["SUBMITTED"]).exists()


def test_a_folder_that_holds_a_run_is_not_given_to_another(offline, tmp_path):
    (tmp_path / "metrics.csv").touch()
    result = launch("--machine", "L4", "--", *RUN, f"output_dir={tmp_path}", **offline)
    assert result.returncode == 1
    assert "holds a run" in result.stderr and not Path(offline["SUBMITTED"]).exists()


def test_a_job_is_submitted_although_files_of_the_studio_are_not_here(offline):
    words = ["--machine", "L4", "--studio", "streets", "--name", "night-1", "--env", "A=b"]
    result = launch(*words, "--", *RUN, "model.ckpt_path=/teamspace/nowhere", "resume=elsewhere.ckpt", **offline)
    assert result.returncode == 0, result.stderr
    assert "https://example.org/job" in result.stdout and "lightning job logs night-1" in result.stdout
    assert json.loads(Path(offline["SUBMITTED"]).read_text()) == ["night-1", "L4", "streets", {"A": "b"}, False]


def test_a_configuration_may_lie_in_a_folder_of_ones_own(offline, tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [cityscapes_lora, _self_]\nseed: 3\n")
    words = ["--config-dir", str(tmp_path), "--config-name", "mine", "data.root=/data/my cities"]
    assert launch("--machine", "L4", "--dry-run", "--", *words, **offline).returncode == 0
    (tmp_path / "mine.yaml").write_text("defaults: [cityscapes_lora, _self_]\nmodel: {lora_rank: -3}\n")
    wrong = launch("--machine", "L4", "--dry-run", "--", *words, **offline)
    assert wrong.returncode == 1 and "LoRA rank -3" in wrong.stderr


def test_a_matrix_of_runs_is_one_job(offline):
    words = ["experiment=toy_source", "variants=[head,full]", "seeds=[0,1]"]
    result = launch("--machine", "L4", "--name", "m", "--compare", "--dry-run", "--", *words, **offline)
    assert result.returncode == 0, result.stderr
    wrong = launch("--machine", "L4", "--compare", "--", *words[:1], "variants=[heads]", **offline)
    assert wrong.returncode == 1 and "heads is not in configs/variant" in wrong.stderr
    expected = shlex.join(["python", "scripts/compare.py", "run", *words, "output_dir=outputs/m"])
    assert expected in result.stdout


def test_a_refusal_of_the_platform_is_one_sentence(offline):
    result = launch("--machine", "L4", "--name", "taken", "--", *RUN, **offline)
    assert result.returncode == 1
    assert result.stderr == "error: Lightning AI answered: the name is taken\n"


def test_without_an_account_the_error_names_the_login(offline):
    Path(offline["LIGHTNING_CREDENTIAL_PATH"]).unlink()
    result = launch("--machine", "L4", "--", *RUN, **offline)
    assert result.returncode == 1 and "lightning login" in result.stderr
    assert not Path(offline["SUBMITTED"]).exists()


@pytest.fixture
def home(tmp_path):
    """A Studio's home with the repository, whose python notes its arguments."""
    python = tmp_path / "home" / "eomt-lora" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > arguments\n')
    python.chmod(0o755)
    return tmp_path / "home"


def run_job(home, output_dir=None):
    """The arguments that the job's shell gives to python, after the script's name."""
    given = ["data.root=a b", *([f"output_dir={output_dir}"] if output_dir else [])]
    command = Job("n", "train_with_lora.py", given, "eomt-lora", output_dir, "1h").command
    command = command.replace("/teamspace/jobs", str(home.parent / "jobs"))
    subprocess.run(["bash", "-e", "-c", command], cwd=home, check=True)
    script, *arguments = (home / "eomt-lora" / "arguments").read_text().splitlines()
    assert script == "train_with_lora.py" and arguments[: len(given)] == given
    return arguments[len(given) :]


OWN, RESUME = "output_dir=outputs/n", "resume=auto"


def test_each_start_of_a_job_goes_on_with_what_an_earlier_one_left(home):
    assert run_job(home) == [OWN, RESUME]
    assert run_job(home, str(home.parent / "my runs")) == [RESUME]


def test_a_new_machine_fetches_what_the_job_had_saved(home):
    saved = home.parent / "jobs/n/eomt-lora/outputs/n/checkpoints"
    saved.mkdir(parents=True)
    (saved / "last.ckpt").touch()
    assert run_job(home) == [OWN, RESUME]
    assert (home / "eomt-lora/outputs/n/checkpoints/last.ckpt").exists()


def test_a_checkpoint_that_the_arguments_name_is_not_chosen_anew():
    command = Job("n", "train_with_lora.py", ["resume=mine.ckpt"], "eomt-lora").command
    assert "resume=auto" not in command


@pytest.mark.parametrize(
    ("output_dir", "where"),
    [
        (None, "/teamspace/jobs/n/eomt-lora/outputs/n"),
        ("runs/a", "/teamspace/jobs/n/eomt-lora/runs/a"),
        ("/teamspace/studios/this_studio/a", "/teamspace/jobs/n/a"),
        ("/teamspace/s3_folders/a", "/teamspace/s3_folders/a"),
    ],
)
def test_results_are_looked_for_where_they_persist(output_dir, where):
    assert str(Job("n", "train_with_lora.py", [], "eomt-lora", output_dir).results) == where
