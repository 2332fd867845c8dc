"""What the site needs beside the pages: the file that a block stands for becomes its title."""

from __future__ import annotations

import re
from typing import Any

_FENCE = re.compile(r"^```(\w+) file=(\S+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with each page."""
    return _FENCE.sub(r'```\1 title="\2"', markdown)
