"""Every argument of Lightning's trainer and every callback of Lightning's works, or is refused before it costs."""

import inspect
import json
import re
from pathlib import Path

import lightning
import lightning.pytorch.callbacks
import pytest
from conftest import ROOT, TOY_DATA, TOY_MODEL
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

import train_with_lora
from eomt.flags import HYDRA_FLAGS, translate_flags
from eomt.settings.run import check_run
from eomt.settings.trainer import CALLBACKS, TAKEN

CALLBACK = "lightning.pytorch.callbacks."


def rows(heading):
    """Of the table below a heading of the page: the first column, and whether the second says `refused`."""
    text = (ROOT / "docs" / "training.md").read_text().split(f"\n### {heading}\n")[1].split("\n#")[0]
    cells = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    return {name: "refused" in kind for names, kind in cells for name in re.findall(r"`([\w-]+)`", names)}


def check(*overrides):
    """What is checked of a configuration without torch."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("cityscapes", ["data=toy_streets", "output_dir=x", "name=test", *overrides])
    config.variant = None
    check_run(OmegaConf.to_container(config, resolve=True), OmegaConf.missing_keys(config))


def callback(name, **settings):
    inside = ",".join([f"_target_:{CALLBACK}{name}", *(f"{key}:{value}" for key, value in settings.items())])
    return f"+callbacks.mine={{{inside}}}"


def test_the_page_names_every_argument_of_the_trainer_and_says_which_are_refused():
    arguments = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    table = rows("The trainer")
    assert set(table) == arguments
    assert {name for name, refused in table.items() if refused} == set(TAKEN)


def test_the_page_names_every_callback_of_lightnings_and_says_which_are_refused():
    table = rows("Callbacks")
    assert set(table) == set(lightning.pytorch.callbacks.__all__)
    assert {name for name, refused in table.items() if refused} == set(CALLBACKS)


def test_the_page_names_every_flag_of_hydras_and_says_which_is_refused():
    options = [action.option_strings for action in get_args_parser()._actions if action.option_strings]
    flags = {next(name for name in names if name.startswith("--")) for names in options}
    table = rows("Hydra's flags")
    assert set(table) == flags
    assert [name for name, refused in table.items() if refused] == ["--experimental-rerun"]
    assert flags - {"--help", "--experimental-rerun"} == {name for name in HYDRA_FLAGS if name.startswith("--")}
    with pytest.raises(ValueError, match="--experimental-rerun opens a pickle"):
        translate_flags(["--experimental-rerun", "x"])


@pytest.mark.parametrize("name", TAKEN)
def test_an_argument_that_a_run_gives_itself_is_refused(name):
    with pytest.raises(ValueError, match=f"^trainer.{name} .*: a run does without; "):
        check(f"+trainer.{name}={'true' if name == 'barebones' else '[]' if name == 'callbacks' else '2'}")


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_that_a_run_cannot_have_is_refused(name):
    with pytest.raises(ValueError, match=f"^callbacks.mine {name}: "):
        check(callback(name))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trainer.precision=bf16-true"], "precision bf16-true: .* give bf16-mixed, 16-mixed or 32-true"),
        (["trainer.precision=64-true"], "precision 64-true"),
        (["trainer.precision=transformer-engine"], "precision transformer-engine"),
        (["trainer.strategy=ddp_spawn"], "strategy ddp_spawn: .* does not come back; use ddp"),
        (["trainer.strategy=ddp_notebook"], "strategy ddp_notebook"),
        (["trainer.strategy={_target_:lightning.pytorch.strategies.FSDPStrategy}"], "sharded weights .* use ddp"),
        (["trainer.strategy=deepspeed_stage_2"], "sharded weights"),
        (
            ["trainer.strategy=fsdp"],
            "bytes of whole weights.*one process.*outside of a forward.*base_quantisation=4bit",
        ),
        (["trainer.strategy={_target_:lightning.pytorch.strategies.ModelParallelStrategy}"], "outside of a forward"),
        (["trainer.plugins=null"], "plugins .*CheckpointFiles cannot be left out"),
        (["trainer.plugins._target_=lightning.pytorch.plugins.HalfPrecision"], "CheckpointFiles cannot be left out"),
        (["+trainer.overfit_batches=2", "trainer.devices=2"], "overfit_batches 2: .* give trainer.devices=1"),
        (["+trainer.fast_dev_run=-1"], "fast_dev_run -1: cannot be negative"),
        ([callback("RichProgressBar")], "callbacks.mine: callbacks.progress is a progress bar already; .*~callbacks.p"),
        ([callback("EMAWeightAveraging", decay=0.9), "lora=small"], "mine EMA.* callbacks=ema callbacks.ema.decay=0.9"),
        ([callback("EMAWeightAveraging"), "model.freeze=[backbone]"], "give callbacks=ema"),
    ],
)
def test_what_a_run_cannot_keep_is_refused_with_what_to_do(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(*words)


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.precision=32"],
        ["trainer.precision=bf16"],
        ["+trainer.barebones=false", "+trainer.overfit_batches=0"],
        ["trainer.strategy=ddp_find_unused_parameters_true", "trainer.devices=2"],
        ["~callbacks.progress", callback("RichProgressBar")],
        [callback("EMAWeightAveraging")],
        [callback("WeightAveraging"), "lora=small"],
        ["~trainer.plugins", "+trainer.plugins=[{_target_:eomt.training.checkpoint_files.CheckpointFiles}]"],
    ],
)
def test_what_works_passes(words):
    check(*words)


def run(toy_cache, folder, *words):
    """A short run in this process: its exit code."""
    settings = ["data.batch_size=2", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_epochs=1"]
    place = [f"data.root={toy_cache}", f"output_dir={folder}"]
    return train_with_lora.main([*TOY_DATA, *place, "model=tiny", *TOY_MODEL, *settings, *words])


def summary_of(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def test_a_run_with_the_usual_switches_of_a_cluster_leaves_what_it_should(toy_cache, tmp_path, capsys):
    names = "detect_anomaly benchmark sync_batchnorm deterministic enable_model_summary".split()
    switches = [f"++trainer.{name}=true" for name in names]
    off = ["enable_progress_bar", "enable_checkpointing", "inference_mode", "use_distributed_sampler"]
    switches += [f"+trainer.{name}=false" for name in (*off, "enable_autolog_hparams")]
    switches += ["+trainer.profiler=simple", "+trainer.gradient_clip_algorithm=value", "trainer.num_sanity_val_steps=1"]
    switches.append(callback("EarlyStopping", monitor="train/loss"))
    assert run(toy_cache, tmp_path, *switches, "+trainer.min_steps=3", "+trainer.max_time=00:01:00:00") == 0
    assert summary_of(tmp_path)["status"] == "finished" and (tmp_path / "model").is_dir()
    assert not list((tmp_path / "checkpoints").glob("*")) and "Epoch 0:" not in capsys.readouterr().err


def test_a_look_at_the_validation_before_training_changes_nothing_but_the_time(toy_cache, tmp_path):
    ids = []
    for steps in (0, 2):
        folder = tmp_path / str(steps)
        assert run(toy_cache, folder, f"trainer.num_sanity_val_steps={steps}") == 0
        ids.append(summary_of(folder)["artefact_id"])
        assert (folder / "metrics.csv").read_text().count("\n") == 2, "one validation is logged"
    assert ids[0] == ids[1]


def test_a_fast_dev_run_leaves_an_artefact_and_a_summary_of_its_steps(toy_cache, tmp_path):
    assert run(toy_cache, tmp_path, "+trainer.fast_dev_run=2", "model.warmup_steps=[0.1,0.1]") == 0
    summary = summary_of(tmp_path)
    assert (summary["steps"], summary["planned_steps"]) == (2, 2) and (tmp_path / "model").is_dir()


def test_another_progress_bar_takes_the_place_of_ours(toy_cache, tmp_path):
    words = [f"callbacks.progress._target_={CALLBACK}RichProgressBar", "trainer.limit_train_batches=1"]
    assert run(toy_cache, tmp_path, *words) == 0
