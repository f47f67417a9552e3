"""The start of a run: everything that can be said without torch is said before."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from compute_answer_weights import read_answer_weights
from vqa_config import read_config
from vqa_questions import Data, find_pictures, read_questions, split
from vqa_scenes import write_scenes
from vqa_settings import DRAWN, Settings

from eomt.files import check_place, claimed, read_json
from eomt.training.run_folder import newest_checkpoint

log = logging.getLogger(__name__)


def train(settings: Settings, folder: Path) -> dict[str, Any]:
    """One run in a folder of its own; returns its summary, of a finished one that which is there.

    Raises:
        ValueError: the folder holds another run, or is in use; or the data cannot be read.
    """
    check_place(folder)
    if settings.resume and (folder / "summary.json").is_file():
        return tell_finished(folder)
    if not settings.resume:
        check_new(folder)
        check_network(settings)
    with claimed(folder):
        checkpoint = newest_checkpoint(folder) if (folder / "settings.json").exists() else None
        if settings.resume and not checkpoint:
            raise FileNotFoundError(
                f"{folder / 'checkpoints'} holds no whole checkpoint: the run had not finished an epoch; leave "
                "--resume out, and give its flags again"
            )
        if not settings.resume:
            check_new(folder)  # another run may have come first
            forget_begin(folder)
        start = settings.start
        if start == DRAWN and not checkpoint:
            start = drawn_source(settings, folder / "source")
        data = read_data(settings, folder)
        from vqa_run import run

        return run(settings, folder, data, checkpoint, start and Path(start))


def check_new(folder: Path) -> None:
    """Raises ValueError where a run has come to the end of its first epoch."""
    if (folder / "summary.json").exists() or any((folder / "checkpoints").glob("*.ckpt")):
        raise ValueError(f"{folder} holds a run: go on with --resume, or name a new folder")


def forget_begin(folder: Path) -> None:
    """Deletes what a run left that did not come to the end of its first epoch; scenes stay."""
    for name in ("settings.json", "metrics.csv"):
        (folder / name).unlink(missing_ok=True)


def tell_finished(folder: Path) -> dict[str, Any]:
    """Prints the scores of a finished run, and returns its summary."""
    from vqa_scores import Score, table, type_line

    summary = read_json(folder / "summary.json")
    scores = {name: Score(**score) for name, score in summary["scores"].items()}
    told = type_line(summary["type_accuracy"])
    print(f"{folder} is finished\n\nkept: {summary['kept']}\n\n{table(scores)}\n{told}")
    return summary


def check_network(settings: Settings) -> None:
    """Warns of frozen weights that are random.

    Raises:
        ValueError: the decoder's are, or the text encoder has fewer layers than are to train.
        FileNotFoundError: there is no configuration, or no file of weights.
    """
    layers = read_config(settings.config).text.get("encoder_layers", 12)  # as MBartConfig has it
    sized_here = not settings.pretrained and settings.start in (None, DRAWN)
    if sized_here and settings.unfreeze_encoder_layers > layers:
        raise ValueError(
            f"--unfreeze_encoder_layers {settings.unfreeze_encoder_layers}: the text encoder has {layers}, give 0 to "
            f"{layers}"
        )
    for name in ("vision_weights", "start"):
        if (path := getattr(settings, name)) and path != DRAWN and not Path(path).exists():
            raise FileNotFoundError(f"--{name} {path}: there is no such file or folder")
    if settings.train_all or settings.start or settings.pretrained:
        return
    if not settings.unfreeze_decoder:
        raise ValueError(
            "without --unfreeze_decoder the decoder is frozen, and its weights are random: add it, or start from "
            "trained ones with --start or --pretrained"
        )
    random = "text encoder is" if settings.vision_weights else "encoders are"
    log.warning("the frozen %s random: start from trained weights with --start or --pretrained", random)


def drawn_source(settings: Settings, folder: Path) -> Path:
    """`model/` of a network that is trained in full on scenes by day, of another seed than those of the run."""
    kept = ("config", "img_size", "batch_size", "gradient_accumulation_steps", "lr", "dropout", "weight_decay", "seed")
    kept += ("scheduler", "use_type_loss", "precision", "num_workers")
    source = Settings(
        scenes=settings.source_scenes or settings.scenes,
        epochs=settings.source_epochs or settings.epochs,
        data_seed=settings.data_seed + 1,
        domain="day",
        train_all=True,
        output_dir=str(folder),
        **{name: getattr(settings, name) for name in kept},
    )
    once(source, folder)
    return folder / "model"


def once(settings: Settings, folder: Path) -> None:
    """Trains unless the folder holds the finished run; one that was interrupted goes on.

    Raises:
        ValueError: it holds a run of other settings.
    """
    before = read_json(folder / "settings.json", {})
    wanted = settings.as_dict()
    ignored = ("num_workers", "logger", "resume", "output_dir")
    differ = [name for name in wanted if before and name not in ignored and before.get(name) != wanted[name]]
    if differ:
        raise ValueError(
            f"{folder} holds a run with --{differ[0]} {before.get(differ[0])}, and now it is {wanted[differ[0]]}: name "
            "a new folder"
        )
    if (folder / "summary.json").is_file():
        return
    print(f"\n{folder}")
    train(replace(settings, resume=newest_checkpoint(folder) is not None), folder)


def read_data(settings: Settings, folder: Path) -> Data:
    """The questions, from CSVs or about scenes that are drawn in the run's folder.

    Raises:
        ValueError: they cannot be read, or lack pictures or weights.
    """
    csv, pictures = settings.train_csv, settings.image_dir
    if not csv:
        write_scenes(folder / "scenes", settings.scenes, settings.data_seed, domain=settings.domain)
        csv, pictures = folder / "scenes" / "questions.csv", folder / "scenes" / "images"
    questions = read_questions(csv)
    if settings.val_csv:
        held_out = read_questions(settings.val_csv)
        if both := {q.img_id for q in questions} & {q.img_id for q in held_out}:
            log.warning("%d pictures of %s are in %s, too: they are no test", len(both), settings.val_csv, csv)
    else:
        questions, held_out = split(questions, settings.val_split, settings.data_seed)
    find_pictures([*questions, *held_out], pictures)
    weights = read_answer_weights(settings.answer_weights) if settings.answer_weights else None
    lacking = sorted({q.answer for q in questions if weights and q.answer not in weights})
    if lacking:
        raise ValueError(
            f"{settings.answer_weights} has no weight for {len(lacking)} answers, such as {lacking[0]!r}: run "
            "compute_answer_weights.py on the CSV that is trained on"
        )
    return Data(questions, held_out, Path(pictures), weights)
