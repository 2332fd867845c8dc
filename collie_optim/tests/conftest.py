"""Puts the helpers of these tests on the path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "support"))  # --import-mode=importlib adds no folder by itself
