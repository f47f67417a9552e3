"""The start of a run: everything that can be said without torch is said before."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from compute_answer_weights import read_answer_weights
from vqa_config import read_config
from vqa_questions import Data, find_pictures, read_questions, split
from vqa_scenes import write_scenes
from vqa_settings import Settings

from eomt.files import check_place, claimed

log = logging.getLogger(__name__)


def train(settings: Settings, folder: Path) -> dict[str, Any]:
    """One run in a folder of its own; returns its summary.

    Raises:
        ValueError: the folder holds another run, or is in use; or the data cannot be read.
    """
    check_place(folder)
    if not settings.resume and (folder / "settings.json").exists():
        raise ValueError(f"{folder} holds a run: go on with --resume, or name a new folder")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if settings.resume and not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint} is missing: the run had not finished an epoch, start it in a new folder")
    for name in ("vision_weights", "start"):
        if (path := getattr(settings, name)) and not Path(path).exists():
            raise FileNotFoundError(f"--{name} {path}: there is no such file or folder")
    read_config(settings.config)
    with claimed(folder):
        data = read_data(settings, folder)
        from vqa_run import run

        return run(settings, folder, data)


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
