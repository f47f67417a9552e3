"""One run: data, network, training, scores, and what is left in its folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from model_no_latent import DeterministicVQA
from vqa_config import VQAConfig, from_dict, read_config
from vqa_data import Collate, EpochOrder, Questions, loader
from vqa_files import BASE, base_of, save_model, save_tensors, start_of
from vqa_module import VQAModule, answer_all
from vqa_questions import Data, Question
from vqa_report import Samples, describe, draw_analysis
from vqa_scores import Answered, scores_by_type, table
from vqa_settings import PARTS, Settings
from vqa_tokens import load_tokenizer, open_tokenizer

from eomt.files import read_json, read_pickle, read_tensors, write_json
from eomt.lora.report import subtotals
from eomt.reporting.loggers import EventFile, MetricsFile
from eomt.training.audit_callback import AuditAdapters
from eomt.training.finite_steps import FiniteSteps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
CLIP = 1.0  # norm of the gradients
LIMIT = 3  # steps in a row without a finite loss, which end a run
MONITOR = "val/loss"


def run(settings: Settings, folder: Path, data: Data) -> dict[str, Any]:
    """Trains, or goes on, and returns the summary that is left in the folder.

    Raises:
        ValueError, OSError, ImportError: with a sentence, before training where that can be.
    """
    seed_everything(settings.seed, verbose=False)
    if settings.analyze_dataset:
        print(describe(data.train))
        draw_analysis(data.train, folder / "analysis.png")
    network, tokenizer = build(settings, folder, data.train)
    train_set = Questions(data.train, data.pictures, network.config.img_size, data.weights)
    val_set = Questions(data.val, data.pictures, network.config.img_size)
    collate = Collate(tokenizer, network.language.config.max_position_embeddings - 1)
    print(network.report())

    preset = settings.preset(count_pictures(data.train))
    lora_lr = settings.lora_lr or (preset.lr if preset else None)
    module = VQAModule(
        network, tokenizer, settings.lr, lora_lr, settings.weight_decay, settings.scheduler, settings.seed
    )
    order = EpochOrder(len(train_set), settings.seed, lambda: module.current_epoch)
    train_batches = loader(train_set, collate, settings.batch_size, order, settings.num_workers)
    val_batches = loader(val_set, collate, settings.batch_size, num_workers=settings.num_workers)
    base = base_of(network)
    if not settings.resume:
        save_tensors(base, folder / BASE)
        write_json(folder / "network.json", network.config.as_dict())
        tokenizer.save_pretrained(folder / "tokenizer")
        write_json(folder / "settings.json", settings.as_dict())  # last: from here on the folder holds a run
    callbacks = make_callbacks(settings, folder, val_set, collate)
    trainer = make_trainer(settings, folder, callbacks)
    started = time.monotonic()
    last = folder / "checkpoints" / "last.ckpt" if settings.resume else None
    try:
        trainer.fit(module, train_batches, val_batches, ckpt_path=last)
    except SystemExit as ended:  # what Lightning makes of a signal
        print(f"\ngo on with: --output_dir {folder} --resume")
        raise KeyboardInterrupt(*getattr(ended.__context__, "args", ())) from None
    seconds = time.monotonic() - started
    kept = keep_best(module, callbacks) if settings.early_stopping else f"epoch {trainer.current_epoch}, the last"
    rows = answer_all(network, tokenizer, val_batches)
    save_model(network, tokenizer, base, folder / "model")
    return report(folder, settings, network, rows, {"kept": kept, "seconds": seconds, "audit": audited(callbacks)})


def build(
    settings: Settings, folder: Path, questions: Sequence[Question]
) -> tuple[DeterministicVQA, PreTrainedTokenizerBase]:
    """The network, frozen and adapted, and its tokeniser; those of a run that goes on are the ones it began with."""
    pretrained, vision_weights, start = settings.pretrained, settings.vision_weights, None
    if settings.resume:
        begun = folder / "network.json"
        config, tokenizer = from_dict(read_json(begun), begun), load_tokenizer(folder / "tokenizer")
        pretrained, vision_weights, (start, _) = False, None, read_tensors(folder / BASE)
    elif settings.start:
        start_facts = Path(settings.start) / "network.json"
        config = from_dict(read_json(start_facts).get("config", {}), start_facts)
        tokenizer, start = load_tokenizer(Path(settings.start) / "tokenizer"), start_of(settings.start)
    else:
        config = read_config(settings.config)
        config = replace(config, img_size=settings.img_size) if settings.img_size else config
        tokenizer = make_tokenizer(settings, config, questions)
        config = config if pretrained else fitted(config, tokenizer)
    count = count_pictures(questions)
    lora = {name: value for part in PARTS for name, value in settings.lora(part, count).items()}
    network = DeterministicVQA(
        config,
        pretrained,
        vision_weights,
        start,
        settings.dropout,
        settings.use_type_loss,
        use_vision_lora=settings.use_vision_lora,
        use_text_lora=settings.use_text_lora,
        **lora,
    )
    if len(tokenizer) > (words := network.language.config.vocab_size):
        raise ValueError(f"the tokeniser has {len(tokenizer)} words, and the text weights {words}: give their own one")
    if not settings.train_all:
        network.freeze_pretrained(settings.unfreeze_encoder_layers, settings.unfreeze_decoder)
    return network, tokenizer


def count_pictures(questions: Sequence[Question]) -> int:
    """How many pictures are asked about."""
    return len({question.img_id for question in questions})


def make_tokenizer(settings: Settings, config: VQAConfig, questions: Sequence[Question]) -> PreTrainedTokenizerBase:
    """BARTpho's, or one of the training questions and answers."""
    texts = [text for q in questions for text in (q.question, q.answer)]
    return open_tokenizer(config.tokenizer, texts, config.text.get("vocab_size", 1024), settings.pretrained)


def fitted(config: VQAConfig, tokenizer: PreTrainedTokenizerBase) -> VQAConfig:
    """The configuration with as many words as the tokeniser has, and its special ones."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "pad", "eos")}
    return replace(config, text={**config.text, "vocab_size": len(tokenizer), **special})


def make_callbacks(settings: Settings, folder: Path, val_set: Questions, collate: Collate) -> list[Callback]:
    """Checkpoints, the audit, an end where losses are no numbers; early stopping and samples where asked for."""
    best = {"monitor": MONITOR, "filename": "best"} if settings.early_stopping else {"filename": "epoch"}
    callbacks = [
        ModelCheckpoint(folder / "checkpoints", save_last=True, save_on_train_epoch_end=True, **best),
        AuditAdapters(),
        FiniteSteps(folder, LIMIT),
    ]
    if settings.early_stopping:
        callbacks.append(EarlyStopping(MONITOR, patience=settings.early_stopping_patience))
    if settings.sample_every:
        callbacks.append(Samples(val_set, collate, folder / "samples", settings.sample_every))
    return callbacks


def make_trainer(settings: Settings, folder: Path, callbacks: list[Callback]) -> Trainer:
    """Lightning's trainer, of one device."""
    loggers: list[Logger] = [MetricsFile(folder)]
    if settings.logger == "tensorboard":
        loggers.append(EventFile(folder, name="tensorboard", version=""))
    elif settings.logger == "wandb":
        from eomt.reporting.wandb_logger import wandb_logger

        loggers.append(wandb_logger("vqa", save_dir=folder))
    return Trainer(
        devices=1,
        max_epochs=settings.epochs,
        accumulate_grad_batches=settings.gradient_accumulation_steps,
        gradient_clip_val=CLIP,
        precision=settings.precision,
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        log_every_n_steps=10,
    )


def keep_best(module: VQAModule, callbacks: Sequence[Callback]) -> str:
    """Puts the best epoch's weights in place; says which it is."""
    best = next(one for one in callbacks if isinstance(one, ModelCheckpoint))
    content = read_pickle(Path(best.best_model_path))
    module.load_state_dict(content["state_dict"])
    return f"epoch {content['epoch'] + 1}, of the lowest {MONITOR}"


def audited(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """The results of the audit; none without adapters."""
    audit = next(one for one in callbacks if isinstance(one, AuditAdapters)).audit
    return audit.results if audit else {}


def report(
    folder: Path, settings: Settings, network: DeterministicVQA, rows: Sequence[Answered], facts: dict[str, Any]
) -> dict[str, Any]:
    """Prints the scores, and writes `summary.json` and `predictions.json`."""
    scores = scores_by_type(rows)
    summary = {
        "scores": {name: score.as_dict() for name, score in scores.items()},
        "trainable": subtotals(network, network.parts()),
        "parameters": sum(p.numel() for p in network.parameters()),
        "settings": settings.as_dict(),
        "torch": torch.__version__,
        **facts,
    }
    write_json(folder / "predictions.json", {"questions": [vars(row) for row in rows]})
    write_json(folder / "summary.json", summary)
    print(f"\nkept: {facts['kept']}\n\n{table(scores)}\n\nWrote the network to {folder / 'model'}")
    return summary
