"""Types of fields that several optimizers have."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Beta = Annotated[float, Field(ge=0, lt=1)]

Kernel = Annotated[
    Literal["auto", "eager", "compiled"],
    Field(
        description="How the update runs. compiled: through torch.compile, which takes some seconds once; eager: "
        "without; auto: compiled from 10 million parameters on, where that works."
    ),
]
