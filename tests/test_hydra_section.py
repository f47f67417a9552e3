"""The section `hydra` of somebody's configuration imports nothing that a run does not need."""

import sys

import pytest
import yaml

import train_with_lora


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported."""
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap/__init__.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'sprung')!r}).touch()\n"
        "class Data:\n    def __getattr__(self, name):\n        return lambda **_: None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "sprung"
    sys.modules.pop("trap", None)


def train(folder, section, *words, name="mine", header=""):
    """Calls the entry point with a configuration of somebody's, which stands in a folder of theirs."""
    path = folder / "configs" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + yaml.safe_dump(section))
    return train_with_lora.main(["--config-dir", str(folder / "configs"), f"output_dir={folder / 'out'}", *words])


def config(**hydra):
    return {"defaults": ["cityscapes", "_self_"], "hydra": hydra, "theirs": {"_target_": "trap.Data"}}


LATER = "${oc.select:hydra.job_logging.pick.${hydra.runtime.output_dir},trap.Data}"
SPRUNG = [
    ({"callbacks": {"theirs": {"_target_": "trap.Data"}}}, "hydra.callbacks.theirs._target_ 'trap.Data'"),
    ({"callbacks": {"theirs": [{"_target_": "os.system", "command": "true"}]}}, "_target_ 'os.system'"),
    ({"launcher": {"_target_": "trap.Data"}}, "hydra.launcher._target_ 'trap.Data'"),
    ({"sweeper": {"_target_": "hydra.utils.Path"}}, "hydra.sweeper._target_ 'hydra.utils.Path'"),
    ({"sweeper": {"_target_": "hydra_plugins.x.Y", "sampler": {"_target_": "trap.Data"}}}, "hydra.sweeper.sampler"),
    ({"sweeper": {"_target_": "hydra_plugins.x.Y", "other": {"_target_": "optuna.samplers.X"}}}, "hydra.sweeper.other"),
    ({"callbacks": {"theirs": "${theirs}"}}, "hydra.callbacks.theirs ${theirs}"),
    ({"callbacks": {"x": {"_target_": "${....output_subdir}"}}}, "hydra.callbacks.x._target_ '${....output_subdir}'"),
    ({"job_logging": {"handlers": {"x": {"class": LATER}}}}, "hydra.job_logging.handlers.x.class"),
    ({"job_logging": {"handlers": {"file": {"filename": "ext://trap.${hydra.job.num}"}}}}, "'ext://trap"),
    ({"job_logging": {"handlers": {"file": {"filename": "${hydra.sweep.dir}"}}}}, "'${hydra.sweep.dir}'"),
    ({"hydra_logging": {"x": "${hydra.runtime.output_dir}"}}, "'${hydra.runtime.output_dir}'"),
    ({"job_logging": {"handlers": {"file": {"class": "trap.Data"}}}}, "job_logging.handlers.file.class 'trap.Data'"),
    ({"job_logging": {"formatters": {"simple": {"()": "trap.Data"}}}}, "job_logging.formatters.simple.() 'trap.Data'"),
    ({"job_logging": {"formatters": {"simple": {"()": "logging.config.listen"}}}}, "'logging.config.listen'"),
    ({"hydra_logging": {"handlers": {"console": {"stream": "ext://trap.Data"}}}}, "'ext://trap.Data'"),
    ({"hydra_logging": {"filters": [{"x": {"()": ["trap.Data"]}}]}}, "hydra_logging.filters.0.x.()"),
    ({"job": {"env_set": {"LD_PRELOAD": "theirs.so"}}}, "hydra.job.env_set.LD_PRELOAD"),
    ({"job": {"env_set": {"GIT_CONFIG_COUNT": "1"}}}, "hydra.job.env_set.GIT_CONFIG_COUNT"),
    ({"job": {"env_set": {"CXX": "theirs.sh"}}}, "hydra.job.env_set.CXX"),
    ({"launcher": {"_target_": "hydra_plugins.x.Y", "setup": ["touch theirs"]}}, "hydra.launcher.setup"),
    ({"searchpath": ["pkg://trap"]}, "hydra.searchpath pkg://trap"),
    ({"searchpath": ["pk${name}"]}, "hydra.searchpath pk${name}"),
    ({"searchpath": "${theirs}"}, "hydra.searchpath ${theirs}"),
]


@pytest.mark.parametrize(("section", "said"), SPRUNG, ids=[said for _, said in SPRUNG])
@pytest.mark.parametrize("way", ["--run", "--multirun"])
def test_the_section_hydra_names_what_this_project_and_a_log_need(trap, tmp_path, capsys, section, said, way):
    assert train(tmp_path, config(**section), "--config-name", "mine", way) == 2
    assert said in (error := capsys.readouterr().err) and "Traceback" not in error
    assert not trap.exists(), "it was imported"
    assert not (tmp_path / "out").exists()


def test_a_run_of_a_sweep_is_checked_also_where_the_sweep_was_not(trap, tmp_path, capsys):
    logging = {"hydra": {"job_logging": {"handlers": {"file": {"class": "trap.Data"}}}}}
    train(tmp_path, logging, "-m", "experiment=mine", name="experiment/mine", header="# @package _global_\n")
    assert "'trap.Data'" in capsys.readouterr().err and not trap.exists()
    train(tmp_path, logging, "-m", "experiment=mine,toy_source", name="experiment/mine", header="# @package _global_\n")
    assert "'trap.Data'" in capsys.readouterr().err and not trap.exists()


def test_what_is_usual_in_the_section_passes_and_anything_does_if_it_is_allowed(trap, tmp_path, capsys):
    usual = config(
        callbacks={"job": {"_target_": "hydra.experimental.callbacks.LogJobReturnCallback"}},
        job_logging={"handlers": {"console": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr"}}},
        job={"env_set": {"OMP_NUM_THREADS": "1"}},
    )
    assert train(tmp_path, usual, "--config-name", "mine", "--cfg", "job") == 0
    assert "allow_any_target" in capsys.readouterr().out
    theirs = config(callbacks={"theirs": {"_target_": "trap.Data"}}) | {"allow_any_target": True}
    train(tmp_path, theirs, "--config-name", "mine", "data.root=/nowhere")
    assert trap.exists()
