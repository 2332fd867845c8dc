"""The section `server:`: who may ask the model while it trains, and how much time that may take."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, PositiveInt

from collie_core.config.base import ComponentConfig


class ServerConfig(ComponentConfig):
    """The section of a server."""

    for_the_core: ClassVar[frozenset[str]] = frozenset(
        {"type", "train_share", "compare", "max_batch_size", "max_queue"}
    )

    train_share: float = Field(
        0.2, gt=0, le=0.9, description="The share of a run's time that answers may take, while there are requests."
    )
    compare: str | None = Field(
        None,
        min_length=1,
        description="A second model to ask, which does not change: base, for model.model_name_or_path as it is, or a "
        "folder. It takes the memory of its weights on the first rank.",
    )
    max_batch_size: PositiveInt = Field(32, description="Answers that are generated at the same time.")
    max_queue: int = Field(128, ge=0, description="Answers that may wait for their turn; more are refused for now.")
