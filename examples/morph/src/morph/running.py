"""A training from settings to a summary, and a test of what it saved."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor

from eomt.command_line import RunError
from eomt.files import read_json, replacing, write_json, write_text
from eomt.fingerprints import hash_tensors
from eomt.lora.report import subtotals, trainable_report
from eomt.reporting.loggers import EventFile, MetricsFile, append_rows
from eomt.reporting.run_summary import git_commit, machine
from eomt.reporting.wandb_logger import wandb_logger
from eomt.training.audit_callback import AuditAdapters
from eomt.training.checkpoint_files import CheckpointFiles, MovableCheckpoint
from eomt.training.finite_steps import FiniteSteps
from eomt.training.run_folder import check_resume, finished_before, run_folder
from lora_config import listed
from morph.data import FaceData
from morph.metrics import detection_metrics, draw_det, error_rates
from morph.module import MorphDetector
from morph.pretraining import base_weights
from morph.saved import BASE, load_detector, save_base, save_detector
from morph.settings import MADE, Settings

log = logging.getLogger(__name__)
code_version = functools.cache(git_commit)  # when it was loaded, also where files change while it runs


def train(settings: Settings, output: str | Path, resume: str | None = None) -> dict[str, Any]:
    """Trains a detector and tests it, if there is something to test with; returns what `summary.json` says.

    The folder gets `config.yaml`, `metrics.csv`, `checkpoints/last.ckpt`, `model/` and `test/`.

    Args:
        output: the folder of the run.
        resume: a checkpoint to go on from, or "auto": the newest in the folder, if there is one.

    Raises:
        ValueError: the folder holds a run that is not continued, or one of other settings; data or weights do not fit.
        AuditError: adapters do not train.
    """
    output, values = Path(output), dataclasses.asdict(settings)
    code_version()
    data = FaceData(settings)
    data.check_training()
    if resume not in (None, "auto"):
        check_resume(resume, values)
    with run_folder(output, resume, values) as checkpoint:
        config = yaml.safe_dump(values, sort_keys=False)
        if checkpoint and (summary := finished_before(output, config)):
            return summary
        write_text(output / "config.yaml", config)
        summary = fit(settings, output, data, checkpoint)
        if len(data.splits["test"]):
            summary |= {"test": test(output / "model", settings, output / "test")}
        write_json(output / "summary.json", {"status": "finished", **summary})
    return read_json(output / "summary.json")


def fit(settings: Settings, output: Path, data: FaceData, checkpoint: str | None) -> dict[str, Any]:
    """Trains, and saves the detector as `model/`; returns what there is to say of it.

    Raises:
        KeyboardInterrupt: it was ended; how to go on is said.
    """
    module = MorphDetector(settings, run_base(settings, output, checkpoint))
    if settings.weights in MADE and not checkpoint:
        save_base(module, output / BASE)  # another machine would make others, by their last bits
    parts = {"backbone": module.encoder.backbone, "head": module.head}
    log.info(trainable_report(module, parts=parts))
    before, clock, audit = hash_tensors(frozen_tensors(module)), Clock(), AuditAdapters()
    trainer = make_trainer(settings, output, audit, clock)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as ended:  # what Lightning makes of a signal
        print(f"\ngo on with the same settings and --output {output} --resume auto")
        raise KeyboardInterrupt(*getattr(ended.__context__, "args", ())) from None
    spent = clock.spent()
    if changed := [name for name, digest in hash_tensors(frozen_tensors(module)).items() if before.get(name) != digest]:
        raise RunError(f"frozen weights changed in training: {listed(changed)}; look for code that writes to them")
    save_detector(module, output / "model", output / BASE)
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return {
        "trainable_parameters": sum(size for size, trains in sizes if trains),
        "total_parameters": sum(size for size, _ in sizes),
        "trainable_by_part": subtotals(module, parts),
        "steps": trainer.global_step,
        "skipped_steps": next(one.skipped for one in trainer.callbacks if isinstance(one, FiniteSteps)),
        **{name: round(seconds, 1) for name, seconds in spent.items()},
        "training_images": len(data.splits["train"]),
        "audit": audit.audit.results if audit.audit else None,
        "frozen_tensors": len(before),
        "frozen_unchanged": True,  # anything else is an error
        "git_commit": code_version(),
        "machine": machine(),
    }


class Clock(Callback):
    """Seconds that training took, by the clock and of the processor, over all parts of a run up to their checkpoints.

    Those of the processor are the same, but for little, on a machine that is busy with other work.
    """

    def __init__(self) -> None:
        self.earlier = dict.fromkeys(self.now(), 0.0)
        self.started = self.now()

    def now(self) -> dict[str, float]:
        return {"seconds": time.monotonic(), "cpu_seconds": time.process_time()}

    def spent(self) -> dict[str, float]:
        """So far, by name."""
        return {name: self.earlier[name] + value - self.started[name] for name, value in self.now().items()}

    def state_dict(self) -> dict[str, float]:
        return self.spent()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.earlier, self.started = state, self.now()


def run_base(settings: Settings, output: Path, checkpoint: str | None) -> Path | None:
    """The base weights of a run; one that goes on takes those that were made for it from beside its checkpoint."""
    kept = checkpoint and Path(checkpoint).parents[1] / BASE
    if settings.weights in MADE and kept and kept.is_file():
        if kept.resolve() != (output / BASE).resolve():
            shutil.copy(kept, output / BASE)
        return output / BASE
    return base_weights(settings)


def frozen_tensors(module: MorphDetector) -> dict[str, Tensor]:
    """The parameters of a detector that do not train."""
    return {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}


def make_trainer(settings: Settings, output: Path, *callbacks: Callback) -> Trainer:
    """Lightning's trainer with progress bar, checkpoints, and the loggers that the settings ask for."""
    last = MovableCheckpoint(
        output / "checkpoints", filename="last", save_on_train_epoch_end=True, enable_version_counter=False
    )
    loggers = make_loggers(settings, output)
    return Trainer(
        max_epochs=settings.epochs,
        precision=settings.precision,
        devices=1,
        logger=loggers,
        callbacks=[FiniteSteps(output, lr="lr", precision="precision"), *callbacks, last, LearningRateMonitor("step")],
        plugins=[CheckpointFiles()],
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_model_summary=False,
    )


def make_loggers(settings: Settings, output: Path) -> list[Logger]:
    """`metrics.csv`, and TensorBoard's events or wandb's run."""
    loggers: list[Logger] = [MetricsFile(output)]
    if settings.logger == "tensorboard":
        loggers.append(EventFile(output, name="tensorboard", version=""))
    if settings.logger == "wandb":
        loggers.append(wandb_logger("morph", output.name, save_dir=output))
    return loggers


def test(model_path: Path, settings: Settings, output: Path) -> dict[str, float | int | None]:
    """Scores the test pictures with a saved detector; writes `scores.csv`, `metrics.json` and `det.png`.

    Raises:
        ValueError: there are no test pictures, or the saved files do not fit.
    """
    data = FaceData(settings)
    if not len(data.splits["test"]):
        raise ValueError(f"data {settings.data} has no test pictures: put some below test, or give the split test")
    module = load_detector(model_path, settings)
    scores, labels = score_all(module, data)
    metrics = detection_metrics(scores, labels)
    names = [getattr(picture, "path", index) for index, picture in enumerate(data.splits["test"].pictures)]
    write_scores(output / "scores.csv", names, scores, labels)
    write_json(output / "metrics.json", metrics)
    if metrics["d_eer"] is not None:
        draw_det({model_path.parent.name or "detector": error_rates(scores, labels)}, output / "det.png")
    return metrics


@torch.inference_mode()
def score_all(module: MorphDetector, data: FaceData) -> tuple[Tensor, Tensor]:
    """Scores and labels [N] of the test pictures, in order."""
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    found = [(module.score(images.to(module.device)).cpu(), labels) for images, labels in data.test_dataloader()]
    scores, labels = (torch.cat(part) for part in zip(*found, strict=True))
    return scores, labels


def write_scores(path: Path, names: Sequence[object], scores: Tensor, labels: Tensor) -> None:
    """A line for each picture: its name or number, label (1: morph) and score (higher: a morph)."""
    rows = zip(names, labels.tolist(), scores.tolist(), strict=True)
    with replacing(path) as draft:
        append_rows(draft, [{"picture": str(name), "label": label, "score": score} for name, label, score in rows])
