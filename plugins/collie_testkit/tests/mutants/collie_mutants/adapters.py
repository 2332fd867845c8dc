"""Descriptions of the adapters."""

from collie_core.api import AdapterCan, Component


def _component(attribute: str, **can: bool) -> Component:
    return Component(f"collie_mutants.low_ranks:{attribute}", "", "a mutant", AdapterCan(peft_type="LORA", **can))  # type: ignore[arg-type]


TRAINS_THE_BASE = _component("TrainsTheBase")
LOUD_START = _component("LoudStart", starts_as_identity=True)
SAVES_COARSELY = _component("SavesCoarsely")
MERGES_HALF = _component("MergesHalf")
SHARED_BY_ALL = _component("SharedByAll")
TIDIES_FILES = _component("TidiesFiles")
MAIN_RANK_ONLY = _component("MainRankOnly")
OTHER_ON_STAGES = _component("OtherOnStages")
LLAMAS_ONLY = _component("LlamasOnly")
