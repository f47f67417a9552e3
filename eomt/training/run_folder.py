"""The folder of a run, continued with care."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eomt.files import write_text
from eomt.inference.artefacts import read_lightning
from eomt.settings.model import check_same_settings

DERIVED = ("num_classes", "class_names", "class_colors", "class_weights")  # settings that the data decide


def check_resume(checkpoint: str, model: Mapping[str, Any]) -> None:
    """Raises ValueError where a run with these settings of its model cannot go on from there."""
    content = read_lightning(Path(checkpoint))
    if "optimizer_states" not in content:
        raise ValueError(
            f"resume {checkpoint}: it is no checkpoint of a run; give checkpoints/last.ckpt of one, or start a new run "
            "from these weights with model.ckpt_path"
        )
    asked = {key: value for key, value in model.items() if key not in DERIVED}
    check_same_settings(content.get("hyper_parameters", {}), asked)


def begin(folder: Path, config: str) -> None:
    """Writes `config.yaml`; a run that goes on in its folder keeps the metrics so far under another name."""
    metrics = folder / "metrics.csv"
    if metrics.is_file():
        metrics.rename(folder / f"metrics_{len(list(folder.glob('metrics*.csv')))}.csv")
    write_text(folder / "config.yaml", config)
