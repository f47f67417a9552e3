"""What scripts need to open a data set by its configuration."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also runs from a checkout that is not installed

from eomt.settings.compose import build_data, data_of_run, datasets_known, open_data  # noqa: E402, F401


def run_of(model: Path) -> Path:
    """The run's folder that an artefact or checkpoint lies in, or the folder itself."""
    folder = model if model.is_dir() else model.parent
    return next((place for place in (folder, folder.parent) if (place / "config.yaml").is_file()), folder)
