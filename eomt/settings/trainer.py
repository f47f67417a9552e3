"""Checks of the settings for Lightning: of its trainer, and of the callbacks of a run. They need no torch.

`docs/training.md` has a table of every argument and every callback; what it calls refused is refused here.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from eomt.settings.config_check import targets_in

CHECKPOINT_FILES = "eomt.training.checkpoint_files.CheckpointFiles"
PRECISIONS = ("bf16-mixed", "16-mixed", "32-true", "bf16", "16", "32", 16, 32, None)
SHARDED = (
    "of sharded weights each process has a part; the audit and the fingerprints read the bytes of whole weights, one "
    "process alone writes the adapter, and EoMT uses queries and positions outside of a forward, where nothing gathers "
    "them; a base too large for a device fits with model.base_quantisation=4bit"
)
STRATEGIES = {  # part of the name of a strategy: what cannot be
    "fsdp": SHARDED,
    "deepspeed": SHARDED,
    "modelparallel": SHARDED,
    "spawn": "it trains copies of the network, and the trained one does not come back",
    "fork": "it trains copies of the network, and the trained one does not come back",
    "notebook": "it trains copies of the network, and the trained one does not come back",
}


def _is_share(value: float) -> bool:
    """Of batches: a count from 1, or a float up to 1.0."""
    return 0 < value <= 1 if isinstance(value, float) else value >= 1


AT_LEAST_1 = ("at least 1", lambda value: value >= 1)
NOT_NEGATIVE = ("cannot be negative", lambda value: 0 <= value < math.inf)
SHARE = ("a whole number from 1 on, or a share up to 1.0", _is_share)
NUMBERS = {  # of Lightning's trainer: their rule, and whether a value holds it
    "max_epochs": ("at least 1, or -1 with max_steps", lambda value: value >= 1 or value == -1),
    "max_steps": ("how many, 0 to evaluate alone, or -1 with max_epochs", lambda value: value >= -1),
    "min_epochs": NOT_NEGATIVE,
    "min_steps": NOT_NEGATIVE,
    "fast_dev_run": NOT_NEGATIVE,
    "accumulate_grad_batches": AT_LEAST_1,
    "gradient_clip_val": NOT_NEGATIVE,
    "check_val_every_n_epoch": AT_LEAST_1,
    "val_check_interval": SHARE,
    "limit_train_batches": SHARE,
    "limit_val_batches": (f"0, {SHARE[0]}", lambda value: value == 0 or _is_share(value)),
    "overfit_batches": (f"0, {SHARE[0]}", lambda value: value == 0 or _is_share(value)),
    "log_every_n_steps": NOT_NEGATIVE,
    "num_sanity_val_steps": ("how many, or -1 for all", lambda value: value >= -1),
    "reload_dataloaders_every_n_epochs": NOT_NEGATIVE,
    "devices": ("at least 1, or -1 for all", lambda value: value >= 1 or value == -1),
    "num_nodes": AT_LEAST_1,
}
OR_TEXT = ("devices", "num_nodes", "val_check_interval")  # auto, 0,1 and times
TAKEN = {  # arguments of the trainer that a run has no use for, or gives itself: what to do
    "logger": "choose loggers with logger=csv, tensorboard or wandb",
    "callbacks": "they stand in the part callbacks: +callbacks.NAME={_target_: ...}",
    "default_root_dir": "give output_dir=FOLDER",
    "barebones": "a run leaves its log and its checkpoints; for speed alone see benchmarks/",
    "limit_test_batches": "a run has no test set; scripts/evaluate.py scores another data set",
    "limit_predict_batches": "a run predicts nothing; scripts/predict.py takes the images that it is given",
    "model_registry": "checkpoints stay in the folder of the run",
}
CALLBACKS = {  # Lightning's own that a run cannot have: why, and what to do
    "BackboneFinetuning": "it would change what the optimiser holds, against schedules and audit; the backbone waits "
    "by model.warmup_steps, and model.freeze or model.unfreeze_last_n leave it alone",
    "BaseFinetuning": "it would change what the optimiser holds, against schedules and audit; see model.freeze",
    "BasePredictionWriter": "a run predicts nothing; scripts/predict.py does",
    "BatchSizeFinder": "it would change the length of the run; scripts/cost.py names the largest batch",
    "GradientAccumulationScheduler": "schedules are planned for one number of batches a step; give "
    "trainer.accumulate_grad_batches",
    "LambdaCallback": "YAML holds no functions; write a class of your own and set allow_any_target=true",
    "LearningRateFinder": "there are several rates, and it would set one; sweep --multirun model.lr=1e-4,2e-4",
    "ModelPruning": "it would rename the weights that are saved; prune the artefact",
    "OnExceptionCheckpoint": "it would write one from the middle of a step, which cannot go on exactly; "
    "checkpoints/last.ckpt is from a whole step",
    "ProgressBar": "it shows nothing by itself; choose TQDMProgressBar or RichProgressBar",
    "StochasticWeightAveraging": "its average is never scored, and it replaces the schedule; give callbacks=ema, or "
    "lightning.pytorch.callbacks.WeightAveraging for the plain average",
    "ThroughputMonitor": "it needs a function, which YAML cannot hold; summary.json has seconds_per_step",
}
BARS = ("ProgressBar", "TQDMProgressBar", "RichProgressBar", "RunProgressBar")


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Raises ValueError for settings of Lightning's trainer that a run cannot have; their types are checked later."""
    for name, remedy in TAKEN.items():
        if trainer.get(name) is not None and (name, trainer[name]) != ("barebones", False):
            raise ValueError(f"trainer.{name} {trainer[name]}: a run does without; {remedy}")
    for name, (rule, holds) in NUMBERS.items():
        value = trainer.get(name)
        if isinstance(value, str) and name not in OR_TEXT:
            raise ValueError(f"trainer.{name} {value!r}: should be a number, {rule}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not holds(value):
            raise ValueError(f"trainer.{name} {value}: {rule}")
    if trainer.get("precision") not in PRECISIONS:
        raise ValueError(
            f"trainer.precision {trainer['precision']}: weights stay in 32 bits, which masks and losses need; give "
            "bf16-mixed, 16-mixed or 32-true"
        )
    strategy = str(trainer.get("strategy")).lower()
    for part, reason in STRATEGIES.items():
        if part in strategy:
            raise ValueError(f"trainer.strategy {trainer['strategy']}: {reason}; use ddp")
    check_processes(trainer)


def check_processes(trainer: Mapping[str, Any]) -> None:
    """Raises ValueError where so many processes cannot be."""
    devices, processors = trainer.get("devices"), max(2, os.cpu_count() or 1)
    if trainer.get("accelerator") == "cpu" and isinstance(devices, int) and devices > processors:
        raise ValueError(f"trainer.devices {devices} with accelerator cpu: {processors} processes at most here")
    if trainer.get("overfit_batches") and (trainer.get("devices"), trainer.get("num_nodes", 1)) != (1, 1):
        raise ValueError(
            f"trainer.overfit_batches {trainer['overfit_batches']}: Lightning would score images several times under "
            "several processes; give trainer.devices=1"
        )


def check_plugins(plugins: Any) -> None:
    """Raises ValueError where the plugins leave out what writes checkpoints, or choose a precision."""
    names = [node["_target_"] for _, node in targets_in(plugins)]
    if CHECKPOINT_FILES not in names:
        raise ValueError(
            f"trainer.plugins {names}: {CHECKPOINT_FILES} cannot be left out, without it a run that is killed while it "
            "writes may lose its checkpoints; ~trainer.plugins '+trainer.plugins=[...]' takes a list with it"
        )
    if wrong := [name for name in names if re.search(r"\.(?!Mixed)\w*Precision$", str(name))]:
        raise ValueError(f"trainer.plugins {wrong[0]}: a precision is chosen by trainer.precision")


def lightning_class(target: Any) -> str | None:
    """The name of a callback of Lightning's; None for any other."""
    name = str(target)
    return name.rpartition(".")[2] if name.startswith("lightning.pytorch.callbacks.") else None


def check_callbacks(callbacks: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any]) -> None:
    """Raises ValueError for a callback that a run cannot have.

    Args:
        callbacks: by name; each names its class.
        model: settings of the module.
    """
    classes = {name: str(node.get("_target_")).rpartition(".")[2] for name, node in callbacks.items()}
    for name, node in callbacks.items():
        kind = lightning_class(node.get("_target_"))
        if kind in CALLBACKS:
            raise ValueError(f"callbacks.{name} {kind}: {CALLBACKS[kind]}")
        frozen = model.get("use_lora") or model.get("freeze") or model.get("unfreeze_last_n")
        if kind == "EMAWeightAveraging" and frozen:
            raise ValueError(
                f"callbacks.{name} {kind}: its average rounds frozen weights, too, so that they would no longer be "
                f"those of the base; give callbacks=ema callbacks.ema.decay={node.get('decay', 0.999)}"
            )
        if kind == "WeightAveraging" and model.get("base_quantisation"):
            raise ValueError(
                f"callbacks.{name} {kind} with base_quantisation {model['base_quantisation']}: it would average the "
                "codes of the base, which are no numbers; give callbacks=ema"
            )
    bars = [name for name, kind in classes.items() if kind in BARS]
    if len(bars) > 1:
        raise ValueError(
            f"callbacks.{bars[1]}: callbacks.{bars[0]} is a progress bar already; leave that one out with "
            f"~callbacks.{bars[0]}"
        )


def left_out(trainer: Mapping[str, Any], callbacks: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Names the callbacks that switches of the trainer leave out: its progress bar, and checkpoints to go on from."""
    unwanted = () if trainer.get("enable_progress_bar", True) in (True, None) else BARS
    if trainer.get("enable_checkpointing", True) not in (True, None):
        unwanted += ("ModelCheckpoint", "BestCheckpoint")
    return {name for name, node in callbacks.items() if str(node["_target_"]).rpartition(".")[2] in unwanted}
