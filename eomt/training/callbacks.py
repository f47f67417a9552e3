"""Callbacks around the training steps: the audit, the progress bar, the artefact of the best epoch."""

import logging
import math
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from eomt.command_line import RunError, print_to_nobody
from eomt.files import Tolerated, new_folder, replacing_folder, restored
from eomt.fingerprints import checksums
from eomt.inference.saved import ARTEFACTS, artefact_id_in
from eomt.lora.audit import LoRAAudit
from eomt.training.audit_callback import AuditAdapters
from eomt.training.class_scores import score_words
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

logger = logging.getLogger(__name__)


class AuditLoRA(AuditAdapters):
    """The audit of a segmentation network: of a random image, before the first batch is read."""

    def make_audit(self, module: MaskClassificationSemantic) -> LoRAAudit | None:
        if module.lora is None:
            return None
        heads = [p for part in module.trained_heads() for p in part.parameters()]
        base = module.base and module.base.exact
        return LoRAAudit(module.network, module.backbone, module.lora_settings, heads, base_fingerprint=base)

    def on_fit_start(self, trainer: Trainer, module: MaskClassificationSemantic) -> None:
        super().on_fit_start(trainer, module)
        if self.audit is None:
            return
        height, width = module.hparams.img_size
        image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(module.device)

        def forward() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            with module.network.deployed():
                return module.network(image)

        self.begin(trainer, module, forward)


class SaveBest(Callback):
    """Keeps the artefact to ship, `adapter/` or `model/`, and in `best` its mIoU, IoU per class and step.

    `artefact_id` is that of the network that this run saved last; None: none so far.

    Args:
        directory: the run's folder.
        keep: "best" keeps that of the best `val/miou` so far; "last" that of the latest validation, so that the score
            is no choice among the images that it is measured on. Without any validation: the end of the run.
    """

    def __init__(self, directory: str | Path, keep: Literal["best", "last"] = "best") -> None:
        self.directory, self.keep = Path(directory), keep
        self.best: dict[str, Any] = {"miou": -math.inf}
        self.artefact_id: str | None = None
        self.before: float | None = None  # mIoU of the validation before

    def folder(self, module: MaskClassificationSemantic) -> Path:
        return self.directory / ("model" if module.lora is None else "adapter")

    def on_fit_start(self, trainer: Trainer, module: MaskClassificationSemantic) -> None:
        """Raises ValueError where a run that is new would mix with what another one left."""
        new = not (trainer.ckpt_path or self.artefact_id)
        for name in ARTEFACTS if new and trainer.is_global_zero else ():
            if (self.directory / name).exists():
                raise ValueError(
                    f"{self.directory} holds {name}/ of another run: choose another folder, or give resume=auto"
                )

    def on_validation_epoch_end(self, trainer: Trainer, module: MaskClassificationSemantic) -> None:
        # `first_to_save` lets this run before any callback that swaps an average in puts the trained weights back
        if trainer.sanity_checking:
            return
        if checksums(module) != module.scored:
            raise RunError(
                "the weights after a validation are not those that were scored: a callback that swaps them puts them "
                "into their place in on_validation_epoch_start, and back in on_validation_epoch_end or later"
            )
        miou = module.score()
        if trainer.is_global_zero:
            logger.info("step %d: %s", trainer.global_step, score_words(miou, module.class_iou, self.before))
        self.before = miou
        if self.keep == "best" and not miou > self.best["miou"]:
            return
        self.best = {"miou": miou, "class_iou": module.class_iou, "step": trainer.global_step}
        if trainer.is_global_zero:
            self.save(module)

    def on_fit_end(self, trainer: Trainer, module: MaskClassificationSemantic) -> None:
        if trainer.is_global_zero and not math.isfinite(self.best["miou"]):
            self.save(module)

    def save(self, module: MaskClassificationSemantic) -> None:
        with replacing_folder(self.folder(module)) as draft:
            self.artefact_id = module.save_pretrained(draft)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "directory": str(self.directory.resolve()), "artefact_id": self.artefact_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A resumed run goes on from the best so far, if its artefact is still there to be kept.

        Raises:
            ValueError: it goes on in a folder that holds another network.
        """
        for name in ARTEFACTS:
            earlier, here = (restored(Path(folder) / name) for folder in (state["directory"], self.directory))
            if here.is_dir() and earlier.is_dir() and not here.samefile(earlier) and not is_saved(here, state):
                raise ValueError(f"{here} is no network of the run that is continued: choose another folder")
            if earlier.is_dir() and not here.is_dir():
                with new_folder(here) as draft:  # each process of the run tries
                    shutil.copytree(earlier, draft, dirs_exist_ok=True)
            if here.is_dir() and is_saved(here, state):
                self.best, self.artefact_id = state["best"], artefact_id_in(here)


def first_to_save(callbacks: Mapping[str, Callback]) -> dict[str, Callback]:
    """Returns the callbacks with `SaveBest` before all others: none has changed the weights since they were scored."""
    return dict(sorted(callbacks.items(), key=lambda item: not isinstance(item[1], SaveBest)))


def is_saved(folder: Path, state: dict[str, Any]) -> bool:
    """Whether the folder holds the network that the state of a `SaveBest` tells of, which early ones did not name."""
    return "artefact_id" not in state or state["artefact_id"] == artefact_id_in(folder)


class LearningRates(Callback):
    """Logs `lr/heads`, `lr/backbone` and `lr/adapters`; where rates decay by layer, the largest of the backbone."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        rates: dict[str, float] = {}
        for group in trainer.optimizers[0].param_groups:
            name = "adapters" if group["kind"] == "lora" else group["kind"]
            rates[f"lr/{name}"] = max(group["lr"], rates.get(f"lr/{name}", 0.0))
        self.log_dict(rates)


class MayBeClosed:
    """A stream, or none, whose reader may be gone: what cannot be written is passed over."""

    def __init__(self, stream: TextIO | None, tolerated: Tolerated) -> None:
        self.stream, self.tolerated = stream, tolerated

    def write(self, text: str) -> None:
        """Writes and flushes, so that an error comes here."""
        with self.tolerated:
            try:
                print(text, end="", file=self.stream or StringIO(), flush=True)
            except BrokenPipeError:
                print_to_nobody()
                raise

    def flush(self) -> None:
        """Nothing waits."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class RunProgressBar(TQDMProgressBar):
    """The time left of the whole run, loss and mIoU: a bar on a screen, a line an epoch in a log."""

    BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"

    def __init__(self) -> None:
        self.on_screen = bool(sys.stdout) and sys.stdout.isatty()
        super().__init__(refresh_rate=int(self.on_screen))
        self.tolerated = Tolerated("the progress bar")
        self.started, self.first_step = 0.0, 0  # of the training, which a validation may precede

    def init_sanity_tqdm(self) -> Tqdm:
        with redirect_stdout(MayBeClosed(sys.stdout, self.tolerated)):
            return super().init_sanity_tqdm()

    def init_train_tqdm(self) -> Tqdm:
        with redirect_stdout(MayBeClosed(sys.stdout, self.tolerated)):
            return super().init_train_tqdm()

    def init_validation_tqdm(self) -> Tqdm:
        with redirect_stdout(MayBeClosed(sys.stdout, self.tolerated)):
            return super().init_validation_tqdm()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.started, self.first_step = time.monotonic(), trainer.global_step
        super().on_train_start(trainer, module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, module)
        if not self.on_screen and trainer.is_global_zero:
            told = self.get_metrics(trainer, module).items()
            figures = (f"{name} {value}" for name, value in told if name != "miou")  # a validation has its own line
            logger.info("epoch %d, step %d: %s", trainer.current_epoch, trainer.global_step, ", ".join(figures))

    def on_exception(self, *args: Any) -> None:
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()  # ends its line, so that the error has one of its own

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, int | str | float | dict]:
        """Returns the figures behind the bar, under short names, the time left first."""
        left: dict[str, str] = {}
        done, more = trainer.global_step - self.first_step, module.total_steps - trainer.global_step
        if done and self.started:
            seconds = int((time.monotonic() - self.started) / done * more)
            left["left"] = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        metrics = {name.split("/")[-1]: value for name, value in super().get_metrics(trainer, module).items()}
        metrics.pop("v_num", None)
        return left | {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in metrics.items()}
