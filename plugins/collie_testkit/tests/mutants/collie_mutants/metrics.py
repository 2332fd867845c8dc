"""Descriptions of the metrics."""

from collie_core.api import Component, MetricCan


def _component(attribute: str) -> Component:
    return Component(f"collie_mutants.match:{attribute}", "", "a mutant", MetricCan(reads="choices"))


IN_WORDS = _component("InWords")
OPTIMIST = _component("Optimist")
MEAN_OF_MEANS = _component("MeanOfMeans")
ASCII = _component("Ascii")
HOMEBOUND = _component("Homebound")
HALVES = _component("Halves")
OFF_BY_ONE = _component("OffByOne")
MAIN_RANK_ALONE = _component("MainRankAlone")
