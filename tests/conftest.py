"""Puts the repository root on sys.path, so that `pytest` finds the scripts from any directory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
