"""The modules in `support/` can be imported."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "support"))  # --import-mode=importlib adds no folder by itself
