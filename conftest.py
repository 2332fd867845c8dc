"""Import the packages before pytest does.

With --import-mode=importlib, `collie_core/tests/test_x.py` is the module `collie_core.tests.test_x`, and
pytest makes a namespace package out of the folder `collie_core/` unless that name is already imported.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

for pyproject in sorted(Path(__file__).parent.glob("*/pyproject.toml")):
    if find_spec(pyproject.parent.name) is not None:  # a distribution can be tested without the others
        import_module(pyproject.parent.name)
