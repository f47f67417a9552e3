"""The folder of a run: which checkpoint it goes on from, and that no other run writes there meanwhile.

Importing this needs no torch.
"""

import csv
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from eomt.files import claimed, read_json, read_yaml, replacing
from eomt.processes import is_first_process
from eomt.settings.backbone_choice import plain_backbone
from eomt.settings.backbones import NO_EOMT
from eomt.settings.model import check_same_settings
from eomt.settings.run import LEFT_BY_RUNS, check_output_dir, remove_empty

DERIVED = ("num_classes", "class_names", "class_colors", "class_weights")  # settings that the data decide


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint of a run's folder with the most steps, of those that are whole; None without any."""
    found = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.name != "last.ckpt")
    whole = [path for path in found if is_whole(path)]
    return max(whole, key=steps_in, default=None) if len(whole) > 1 else next(iter(whole), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint, which is a zip, ends as it should and has the contents that its checksums say."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def finished_before(folder: Path, config: str) -> dict[str, Any] | None:
    """Returns the summary of a run of this configuration that finished in the folder; None if none did."""
    summary, earlier = read_json(folder / "summary.json", {}), read_yaml(folder / "config.yaml", {})
    same = earlier | {"resume": None} == (yaml.safe_load(config) or {}) | {"resume": None}
    return summary if same and summary.get("status") == "finished" else None


def steps_in(checkpoint: Path) -> int:
    """The optimiser steps that a checkpoint has behind it."""
    from eomt.inference.artefacts import read_lightning

    return read_lightning(checkpoint).get("global_step", 0)


def check_resume(checkpoint: str | Path, model: Mapping[str, Any]) -> None:
    """Raises ValueError where a run with these settings of its model cannot go on from there."""
    from eomt.inference.artefacts import read_lightning

    content = read_lightning(Path(checkpoint)) if Path(checkpoint).suffix != ".safetensors" else {}
    if "optimizer_states" not in content:
        backbone = plain_backbone(checkpoint)
        what = (
            f"{checkpoint} holds {backbone}, {NO_EOMT}" if backbone else f"{checkpoint}: it is no checkpoint of a run"
        )
        raise ValueError(
            f"resume {what}; give checkpoints/last.ckpt of a run, or start a new run from these weights with "
            f"{'model.backbone_weights' if backbone else 'model.ckpt_path'}"
        )
    asked = {key: value for key, value in model.items() if key not in DERIVED}
    if asked.get("backbone_name") is None:  # what that comes to is compared where the network is built
        asked.pop("backbone_name", None)
    check_same_settings(content.get("hyper_parameters", {}), asked)


@contextmanager
def run_folder(folder: Path, resume: str | None, model: Mapping[str, Any]) -> Iterator[str | None]:
    """Holds the folder until the end of the block, and yields the checkpoint that a run goes on from, or None.

    Args:
        folder: of the run. In the first process alone it is held, and made ready for what the run will write.
        resume: a checkpoint, None, or "auto" for the newest whole one in the folder, if there is any.
        model: settings of the run's model, which must be those of the checkpoint.

    Raises:
        ValueError: another run is at work there, or one that is not continued lies there, or of other settings.
    """
    with claimed(folder) if is_first_process() else nullcontext():
        check_output_dir(folder, resume)  # another run may have come first
        checkpoint = newest_checkpoint(folder) if resume == "auto" else resume and Path(resume)
        if resume == "auto" and checkpoint:
            check_resume(checkpoint, model)
        if is_first_process():
            cut_metrics(folder, steps_in(checkpoint)) if checkpoint else set_aside(folder)
        yield checkpoint and str(checkpoint)


def forgetting(folder: Path, log: str, kept: Path) -> Callable[[], None]:
    """Returns what removes the files of a run that was refused before its first step, if they are all there is.

    Args:
        folder: of the run, as it is before the start.
        log: the name of its log file, the only one there so far.
        kept: the folder, or one that it lies in, that was there before.
    """
    written = {folder / name for name in ("config.yaml", ".lock", log)}
    fresh = set(folder.iterdir()) <= {folder / log}

    def forget() -> None:
        if not fresh or not set(folder.iterdir()) <= written:
            return
        for path in written:
            path.unlink(missing_ok=True)
        remove_empty(folder, kept)

    return forget


def set_aside(folder: Path) -> None:
    """Moves what an earlier run left, which never came to a whole checkpoint, to a folder of its own."""
    left = [folder / name for name in ("summary.json", *LEFT_BY_RUNS) if (folder / name).exists()]
    if left:
        place = folder / f"earlier_{len(list(folder.glob('earlier_*'))) + 1}"
        place.mkdir()
        for path in left:
            path.rename(place / path.name)


def cut_metrics(folder: Path, steps: int) -> None:
    """Drops from `metrics.csv` what the run will log again, going on after so many steps."""
    file = folder / "metrics.csv"
    summary = read_json(folder / "summary.json", {})
    if not file.is_file() or (summary.get("status") == "finished" and summary.get("steps") == steps):
        return
    with file.open(newline="") as content:
        reader = csv.DictReader(content)
        rows = [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) < steps]  # one may be half
    with replacing(file) as draft, draft.open("w", newline="") as content:
        writer = csv.DictWriter(content, reader.fieldnames or [])
        writer.writeheader()
        writer.writerows(rows)
