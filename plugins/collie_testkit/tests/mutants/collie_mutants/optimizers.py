"""Descriptions of the optimizers. What is not said here is right."""

from collie_core.api import Component, OptimizerCan


def _component(attribute: str, config: str = "", **can: object) -> Component:
    declared = OptimizerCan(**{"state_bytes_per_parameter": 4.0, **can})  # type: ignore[arg-type]
    build = f"collie_mutants.momentum:{attribute}"
    return Component(build, f"collie_mutants.optimizer_configs:{config}" if config else "", "a mutant", declared)


BOUNDLESS = _component("Momentum")
INCOMPLETE = _component("Incomplete")
UNDOCUMENTED = _component("Momentum", "Undocumented")
CARELESS = _component("Momentum", "Careless")
WORDLESS = _component("Wordless", "Wordless")
ANY_RATE = _component("Momentum", "AnyRate")
SECRET_UPDATE = _component("SecretUpdate")
NOISY = _component("Noisy")
DECAYS_UNUSED = _component("DecaysUnused")
ONE_RATE = _component("OneRate")
KEEPS_RATE = _component("KeepsRate")
FORGETS = _component("Forgets")
GREEDY = _component("Greedy")
BOASTFUL = _component("Momentum", state_bytes_per_parameter=8.0)
BRITTLE = _component("Brittle")
COARSE = _component("Coarse")
OTHER_MOMENTUM = _component("OtherMomentum")
AFTER_CARE = _component("AfterCare", fuses_backward=True)
EAGER_TO_MOVE = _component("EagerToMove", estimates_curvature=True)
ASCENDS = _component("Ascends")
RANKED = _component("Ranked")
OWN_SHARE = _component("OwnShare")
COUNTS_PARAMETERS = _component("CountsParameters")
FLATTENED = _component("Flattened")
MISFILED = _component("Misfiled")
STAYS_ON_CPU = _component("StaysOnCpu")
