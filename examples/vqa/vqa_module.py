"""Training: the LightningModule around a `DeterministicVQA`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import LightningModule
from model_no_latent import DeterministicVQA
from torch import Tensor
from vqa_scores import Answered, Score, scores_by_type, type_accuracy
from vqa_tokens import decode

from eomt.fingerprints import combine_hashes, hash_tensors
from eomt.lora.groups import parameter_groups
from eomt.training.adapter_checkpoints import leave_out_frozen, put_back_frozen
from eomt.training.schedules import lr_factor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INPUTS = ("pixel_values", "input_ids", "attention_mask")
TARGETS = ("labels", "types", "weights")
WARMUP = 0.05  # of the steps


class VQAModule(LightningModule):
    """Teaches a network to answer; validation generates the answers, with the picture and with a blank one.

    Args:
        network: frozen and adapted as it is to be trained.
        tokenizer: of questions and answers.
        lr: the learning rate. lora_lr: that of the adapters; None: the same.
        weight_decay: of everything but adapters.
        scheduler: "cosine", to zero after a warm-up of 5 %, or "none".
        seed: of each epoch's dropout, which is the same in a run that goes on.
    """

    def __init__(
        self,
        network: DeterministicVQA,
        tokenizer: PreTrainedTokenizerBase,
        lr: float,
        lora_lr: float | None = None,
        weight_decay: float = 0.01,
        scheduler: Literal["cosine", "none"] = "cosine",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        self.lr, self.lora_lr, self.weight_decay, self.scheduler = lr, lora_lr, weight_decay, scheduler
        self.seed = seed
        self.answered: list[Answered] = []
        self.scores: dict[str, Score] = {}

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(1000 * self.seed + self.current_epoch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.network(**{name: batch[name] for name in (*INPUTS, *TARGETS)}).loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.answered = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        targets = {name: batch[name] for name in ("labels", "types")}  # weights are of the training alone
        loss = self.network(**{name: batch[name] for name in INPUTS}, **targets).loss
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        self.answered += answer(self.network, self.tokenizer, batch)

    def on_validation_epoch_end(self) -> None:
        self.scores = scores_by_type(self.answered)
        for name, score in self.scores.items():
            end = "" if name == "all" else f"_{name}"
            values = {"em": score.em, "f1": score.f1, "blank_em": score.blank_em}
            self.log_dict({f"val/{key}{end}": value for key, value in values.items()}, prog_bar=name == "all")
        if (told := type_accuracy(self.answered)) is not None:
            self.log("val/type_accuracy", told)

    def configure_optimizers(self) -> dict[str, Any]:
        groups = parameter_groups(self, self.lr, self.lora_lr, self.weight_decay)
        if not groups:
            raise ValueError("nothing trains: unfreeze the decoder, or give LoRA")
        optimizer = torch.optim.AdamW(groups)
        if self.scheduler == "none":
            return {"optimizer": optimizer}
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(WARMUP * total)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step + 1, total + 1, 0, warmup + 1, "cosine")
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def trained_keys(self) -> set[str]:
        """The names of what trains, all those of tensors that are tied."""
        return {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}

    @cached_property
    def frozen(self) -> str:
        """A fingerprint of what does not train, taken once."""
        return combine_hashes(hash_tensors({n: p.detach() for n, p in self.named_parameters() if not p.requires_grad}))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        leave_out_frozen(checkpoint, self.trained_keys())
        checkpoint["frozen"] = self.frozen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("frozen") != self.frozen:
            raise ValueError("the checkpoint was trained beside other frozen weights than base.safetensors holds now")
        put_back_frozen(checkpoint, self.trained_keys(), self.state_dict())


@torch.no_grad()
def answer(network: DeterministicVQA, tokenizer: PreTrainedTokenizerBase, batch: dict[str, Any]) -> list[Answered]:
    """What the network says to the questions of a batch, with their pictures and with blank ones."""
    inputs = {name: batch[name] for name in INPUTS}
    blank = inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}  # the mean colour
    said, blind = (decode(tokenizer, network.generate(**one).tolist()) for one in (inputs, blank))
    told = network.tell_type(inputs["input_ids"], inputs["attention_mask"])
    types = [None] * len(said) if told is None else told.tolist()
    return [
        Answered(q.question, q.type, q.answer, prediction, without, type_told)
        for q, prediction, without, type_told in zip(batch["questions"], said, blind, types, strict=True)
    ]


@torch.no_grad()
def answer_all(
    network: DeterministicVQA, tokenizer: PreTrainedTokenizerBase, batches: Iterable[dict[str, Any]]
) -> list[Answered]:
    """The same of all batches, in eval mode, on the network's device."""
    network.eval()
    device = next(network.parameters()).device
    rows: list[Answered] = []
    for batch in batches:
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        rows += answer(network, tokenizer, batch)
    return rows
