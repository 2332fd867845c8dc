"""OLMo 2 as transformers has it; its partition is derived."""

from collie_core.api import Component, StockFamily

FAMILY = StockFamily("olmo2")
OLMO2 = Component(build="collie_olmo2:FAMILY", summary="OLMo 2")
