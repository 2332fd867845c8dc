"""Puts the helpers of these tests on the path."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.append(str(Path(__file__).parent / "support"))  # --import-mode=importlib adds no folder by itself

# How long an example takes says nothing on a machine that does other things too.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
