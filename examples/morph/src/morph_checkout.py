"""Importing this lets a script of the example run from a checkout that is not installed."""

import sys
from pathlib import Path

SRC = Path(__file__).resolve().parent
sys.path.insert(0, str(SRC.parents[2]))
