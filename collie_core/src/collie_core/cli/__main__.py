"""`python -m collie_core.cli`, for launchers that take a module (`torchrun -m collie_core.cli train ...`)."""

import sys

from collie_core.cli import main

sys.exit(main())
