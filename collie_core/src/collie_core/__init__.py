"""The core of CoLLiE. Plugin authors and programs that embed it import `collie_core.api`, nothing else."""

__version__ = "0.1.0"
