"""One run: data, network, training, scores, and what is left in its folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from model_no_latent import DeterministicVQA
from torch import Tensor
from torch.utils.data import DataLoader
from vqa_callbacks import audited, keep_best, make_callbacks, spent
from vqa_config import VQAConfig, from_dict, read_config
from vqa_data import Collate, EpochOrder, Questions, loader
from vqa_files import BASE, base_of, frozen_rest, save_model, save_tensors, start_of
from vqa_module import VQAModule, answer_all
from vqa_questions import Data, Question
from vqa_report import describe, draw_analysis
from vqa_scores import Answered, scores_by_type, table, type_accuracy, type_line
from vqa_settings import PARTS, Settings
from vqa_tokens import load_tokenizer, open_tokenizer
from vqa_weights import import_transformers

from eomt.files import read_json, read_tensors, write_json
from eomt.lora.report import subtotals
from eomt.reporting.loggers import EventFile, MetricsFile, finish_loggers
from eomt.reporting.run_summary import provenance
from eomt.training.checkpoint_files import CheckpointFiles
from eomt.training.run_folder import cut_metrics, newest_checkpoint, steps_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
CLIP = 1.0  # norm of the gradients


def run(settings: Settings, folder: Path, data: Data, checkpoint: Path | None, start: Path | None) -> dict[str, Any]:
    """Trains, or goes on, and returns the summary that is left in the folder.

    Args:
        settings, folder, data: of the run.
        checkpoint: to go on from; None: the run begins.
        start: `model/` of a trained network to begin with.

    Raises:
        ValueError, OSError, ImportError: with a sentence, before training where that can be.
    """
    origin = provenance([settings.seed])
    origin["versions"]["transformers"] = import_transformers().__version__
    seed_everything(settings.seed, verbose=False)
    if settings.analyze_dataset:
        print(describe(data.train))
        draw_analysis(data.train, folder / "analysis.png")
    network, tokenizer = build(settings, folder, data.train, start)
    train_set = Questions(data.train, data.pictures, network.config.img_size, data.weights)
    val_set = Questions(data.val, data.pictures, network.config.img_size)
    collate = Collate(tokenizer, network.language.config.max_position_embeddings - 1)
    print(network.report())

    own_rates = rates(settings, data.train)
    module = VQAModule(network, tokenizer, **own_rates, scheduler=settings.scheduler, seed=settings.seed)
    order = EpochOrder(len(train_set), settings.seed, lambda: module.current_epoch)
    train_batches = loader(train_set, collate, settings.batch_size, order, settings.num_workers)
    val_batches = loader(val_set, collate, settings.batch_size, num_workers=settings.num_workers)
    base = base_of(network)
    if checkpoint:
        cut_metrics(folder, steps_in(checkpoint))
    else:
        write_begin(settings, folder, network, tokenizer, base)
    callbacks = make_callbacks(settings, folder, val_set, collate)
    trainer = make_trainer(settings, folder, callbacks)
    fit(trainer, module, train_batches, val_batches, checkpoint)
    facts = {"steps": trainer.global_step, **spent(callbacks), "audit": audited(callbacks)}
    kept = keep_best(module, callbacks) if settings.early_stopping else f"epoch {trainer.current_epoch}, the last"
    network.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    rows = answer_all(network, tokenizer, val_batches)
    save_model(network, tokenizer, base, folder / "model")
    return report(folder, settings, network, rows, {"kept": kept, **facts, "rates": own_rates, **origin})


def rates(settings: Settings, questions: Sequence[Question]) -> dict[str, Any]:
    """The learning rates and the weight decay that a run has; the adapters' is None where it is that of the rest."""
    preset = settings.preset(count_pictures(questions))
    lora_lr = settings.lora_lr or (preset.lr if preset else None)
    return {"lr": settings.lr, "lora_lr": lora_lr, "weight_decay": settings.weight_decay}


def write_begin(
    settings: Settings,
    folder: Path,
    network: DeterministicVQA,
    tokenizer: PreTrainedTokenizerBase,
    base: dict[str, Tensor],
) -> None:
    """Writes what a run that goes on needs beside its checkpoint."""
    save_tensors(frozen_rest(network) | base, folder / BASE)
    write_json(folder / "network.json", network.config.as_dict())
    tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / "settings.json", settings.as_dict())  # last: from here on the folder holds a run


def fit(
    trainer: Trainer, module: VQAModule, train_batches: DataLoader, val_batches: DataLoader, checkpoint: Path | None
) -> None:
    """Trains; raises KeyboardInterrupt where it is ended, and says how to go on."""
    folder = Path(trainer.default_root_dir)
    try:
        trainer.fit(module, train_batches, val_batches, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as ended:  # what Lightning makes of a signal
        begun = newest_checkpoint(folder)
        again = f"go on with: --output_dir {folder} --resume" if begun else "no epoch was finished: begin again"
        print(f"\n{again}")
        raise KeyboardInterrupt(*getattr(ended.__context__, "args", ())) from None
    finally:
        finish_loggers(trainer.loggers)


def build(
    settings: Settings, folder: Path, questions: Sequence[Question], begin: Path | None
) -> tuple[DeterministicVQA, PreTrainedTokenizerBase]:
    """The network, frozen and adapted, and its tokeniser; those of a run that goes on are the ones it began with."""
    pretrained, vision_weights, start = settings.pretrained, settings.vision_weights, None
    if settings.resume:
        begun = folder / "network.json"
        config, tokenizer = from_dict(read_json(begun), begun), load_tokenizer(folder / "tokenizer")
        pretrained, vision_weights, (start, _) = False, None, read_tensors(folder / BASE)
    elif begin:
        config = from_dict(read_json(begin / "network.json").get("config", {}), begin / "network.json")
        tokenizer, start = load_tokenizer(begin / "tokenizer"), start_of(begin, settings.use_type_loss)
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
        freeze=False,
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
        plugins=[CheckpointFiles()],
        logger=loggers,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        log_every_n_steps=10,
    )


def report(
    folder: Path, settings: Settings, network: DeterministicVQA, rows: Sequence[Answered], facts: dict[str, Any]
) -> dict[str, Any]:
    """Prints the scores, and writes `summary.json` and `predictions.json`."""
    scores = scores_by_type(rows)
    summary = {
        "scores": {name: score.as_dict() for name, score in scores.items()},
        "type_accuracy": type_accuracy(rows),
        "trainable": subtotals(network, network.parts()),
        "adapters": {name: vars(part.settings) for name, part in network.adapted().items()},
        "parameters": sum(p.numel() for p in network.parameters()),
        "settings": settings.as_dict(),
        **facts,
        "status": "finished",
    }
    write_json(folder / "predictions.json", {"questions": [vars(row) for row in rows]})
    write_json(folder / "summary.json", summary)
    print(f"\nkept: {facts['kept']}\n\n{table(scores)}\n{type_line(summary['type_accuracy'])}")
    print(f"Wrote the network to {folder / 'model'}")
    return summary
