"""Each command line starts in an interpreter of its own, and a fork of a warm one answers as it does."""

import subprocess
import sys
import time

import pytest
import warm
from conftest import ROOT, run_cold, run_python

SCRIPTS = sorted(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("[!_]*.py"))


@pytest.mark.parametrize("script", ["train_with_lora.py", *SCRIPTS])
def test_every_command_line_starts_in_an_interpreter_of_its_own(script):
    cold = run_cold(script, "--help")
    assert cold.returncode == 0 and cold.stdout and not cold.stderr
    assert run_python(script, "--help").stdout == cold.stdout


@pytest.mark.parametrize("script", ["train_with_lora.py", "scripts/evaluate.py", "scripts/cost.py"])
def test_a_mistake_has_the_same_exit_code_and_sentence_either_way(script):
    cold, warmed = (start(script, "data.rot=/nowhere", "--nothing") for start in (run_cold, run_python))
    assert cold.returncode == warmed.returncode > 0 and cold.stderr == warmed.stderr != ""


def test_a_fork_has_its_own_arguments_folder_environment_and_exit_code(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['A']); sys.exit('no')")
    result = run_python(script, "a b", cwd=tmp_path, A="1")
    assert (result.returncode, result.stdout, result.stderr) == (1, f"['a b'] {tmp_path} 1\n", "no\n")


def test_a_script_that_starts_the_interpreter_starts_a_fork_too(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys\n"
        "if sys.argv[1:]: sys.exit(3 if 'torch' in sys.modules else 4)\n"
        "sys.exit(subprocess.run([sys.executable, __file__, 'again']).returncode)"
    )
    assert run_python(script).returncode == (3 if warm.python() != sys.executable else 4)


def test_a_fork_ends_by_the_signal_that_ended_it_and_with_the_process_that_asked_for_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    assert run_python(script).returncode == -15
    script.write_text(f"import time; open({str(tmp_path / 'begun')!r}, 'w'); time.sleep(3)\nopen('ended', 'w')")
    process = subprocess.Popen([warm.python(), script], cwd=tmp_path)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(4)
    assert not (tmp_path / "ended").exists()
