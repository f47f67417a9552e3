"""Importing this lets a script run from a checkout that is not installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "eomt").is_dir():  # a wheel has the scripts inside the package
    sys.path.insert(0, str(ROOT))
