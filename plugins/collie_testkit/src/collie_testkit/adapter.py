"""Checks of adapters: on a small llama in one process, then on ranks and on every installed family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from collie_core.api import ConfigError, ModelError, RunConfig, with_adapters
from collie_testkit import model as families
from collie_testkit.context import Context
from collie_testkit.launches import Planned, outcome
from collie_testkit.registry import Skipped, check, expect
from collie_testkit.training import LLAMA, largest_difference, questions, ranks_of, sections_on, train

STEPS, FEW_STEPS, RATE, SEED = 6, 2, 1e-2, 7
IDS = torch.arange(3, 33).reshape(2, 15) * 7 % 250


# -- one small model ------------------------------------------------------------------------------------------------


def base_model() -> Any:
    """A llama with random weights, the same each time."""
    torch.manual_seed(1)
    options = {key: value for key, value in LLAMA.items() if key != "model_type"}
    return AutoModelForCausalLM.from_config(LlamaConfig(**options), dtype=torch.float32).eval()


def attached(context: Context, model: Any = None) -> Any:
    """The small model with the adapter on it, as a run has it."""
    torch.manual_seed(2)
    return context.build(model=base_model() if model is None else model).eval()


def trainable(model: Any) -> dict[str, Tensor]:
    """The parameters of the adapter by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model: Any) -> Tensor:
    """Of the tokens, without those of virtual ones."""
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits[:, -IDS.shape[1] :]
    return found


def changed(context: Context) -> Any:
    """The small model with an adapter that is not as it was at the start."""
    model = attached(context)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def _off(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@check("adapter", level=1, mutant="trains-the-base")
def base(context: Context) -> None:
    """It has parameters to train, the rest is frozen, and training them leaves the base as it was to the last bit."""
    before = base_model()
    values = {_ending(parameter) for parameter in before.parameters()}
    model = attached(context)
    learning = trainable(model)
    expect(learning, "nothing is trainable")
    ours = [name for name, parameter in learning.items() if _ending(parameter) in values and parameter.numel() > 1]
    expect(not ours, f"{', '.join(ours[:3])} of the base model is trainable")
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name not in learning}
    found = logits(model)
    optimizer = torch.optim.AdamW(learning.values(), lr=RATE)
    for _ in range(3):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expect(_off(logits(model), found) > 1e-4, "three steps of AdamW change nothing")
    moved = [name for name, value in start.items() if not torch.equal(dict(model.named_parameters())[name], value)]
    expect(not moved, f"{', '.join(moved[:3])} has changed")


def _ending(parameter: Tensor) -> tuple[Any, ...]:
    """Shape and some values, which tell one random tensor from another."""
    return (*parameter.shape, *(float(value) for value in parameter.detach().flatten()[-3:]))


@check("adapter", level=1, mutant="loud-start", concerns=lambda can: getattr(can, "starts_as_identity", False))
def identity(context: Context) -> None:
    """Before it is trained the logits are those of the base model."""
    off = _off(logits(attached(context)), logits(base_model()))
    expect(off <= 1e-5, f"they differ by {off:.1e}")


@check("adapter", level=1, mutant="saves-coarsely")
def saved(context: Context) -> None:
    """What `save` writes, `load` and `state` put onto the plain model, with the same logits."""
    target = context.plugins.load("adapter", context.name)
    model = changed(context)
    own = {name: parameter.detach() for name, parameter in trainable(model).items()}
    folder = context.folder / "saved"
    folder.mkdir()
    target.save(model, folder, own)
    again = target.load(base_model(), folder)
    state = target.state(folder)
    names = set(trainable(again))
    expect(state.keys() == names, f"state() has other names than the parameters: {sorted(state.keys() ^ names)[:4]}")
    with torch.no_grad():
        for name, parameter in trainable(again).items():
            parameter.copy_(state[name])
    off = _off(logits(again), logits(model))
    expect(off <= 1e-5, f"the logits differ by {off:.1e}")
    expect(_off(logits(again), logits(base_model())) > 1e-3, "the adapter has no effect on the logits")


@check("adapter", level=1, mutant="merges-half")
def merged(context: Context) -> None:
    """Merged into the weights of the base, the plain model has the logits of the adapter."""
    target = context.plugins.load("adapter", context.name)
    if not hasattr(target, "merge"):
        raise Skipped("it has no merge(module)")
    model = changed(context)
    wanted = logits(model)
    plain = base_model()
    for name, module in list(model.named_modules()):
        if not hasattr(module, "base_layer"):
            continue
        target.merge(module)
        (place,) = [inner for inner, _ in plain.named_modules() if inner and f".{name}".endswith(f".{inner}")][-1:]
        plain.get_submodule(place).load_state_dict(module.base_layer.state_dict())
    off = _off(logits(plain), wanted)
    expect(off <= 1e-4, f"the logits differ by {off:.1e}")
    expect(_off(wanted, logits(base_model())) > 1e-3, "the adapter has no effect on the logits")


# -- runs -----------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an adapter is trained: on which model, on which topology, with how many steps."""

    base: Path
    topology: str
    steps: int = STEPS


def _planned(context: Context) -> dict[str, Planned]:
    """The runs of all checks on a llama, and what is made of them."""
    folder = context.shared.folder
    base = folder / "base"
    if not base.exists():
        questions(folder)
        base_model().save_pretrained(base)
    found = _same_as_alone(context, base, ("tp2", "pp2"), STEPS)
    for seed, name in enumerate(PAIR):
        found[name] = _plan(context, Place(base, "dp1"), folder / name, seed)
    if _merges(context):
        found["merged"] = Planned(1, merge, (str(base), str(_saved(context, PAIR[0])), str(folder / "merged")))
    return found


PAIR = ("first", "second")


def _merges(context: Context) -> bool:
    return hasattr(context.plugins.load("adapter", context.name), "merge")


def _saved(context: Context, name: str) -> Path:
    return context.shared.folder / name / "run" / "model"


def _plan(context: Context, place: Place, output: Path, seed: int = SEED) -> Planned:
    return Planned(ranks_of(place.topology), trained, (context.section, place, str(output), seed))


def _same_as_alone(context: Context, base: Path, topologies: Sequence[str], steps: int) -> dict[str, Planned]:
    """A run on each that the configuration does not refuse, and one in one process, by `base/topology`."""
    places = [Place(base, topology, steps) for topology in ("dp1", *topologies)]
    taken = [place for place in places if not _is_refused(context.section, place)]
    return {_name(place): _plan(context, place, base.parent / f"{base.name}-{place.topology}") for place in taken}


def _name(place: Place) -> str:
    return f"{place.base.name}/{place.topology}"


def trained(section: dict[str, Any], place: Place, output: str, seed: int) -> Any:
    """Losses and norms of a run, which exports the adapter; or by which field it refuses the model."""
    try:
        record = train(_sections(section, place, output, seed))
    except ModelError as error:
        if str(error).startswith("adapter"):
            return str(error)
        raise
    return record.losses, record.norms


def _sections(section: dict[str, Any], place: Place, output: str, seed: int = SEED) -> dict[str, Any]:
    found: dict[str, Any] = sections_on(place.topology, place.base.parent, Path(output), steps=place.steps)
    found["train"]["seed"] = seed
    own = {"model": {"model_name_or_path": str(place.base)}, "adapter": section}
    return found | own | {"optimizer": {"type": "adamw", "lr": RATE}}


def _is_refused(section: dict[str, Any], place: Place) -> bool:
    """Whether the configuration says that this adapter cannot be trained so."""
    try:
        RunConfig(**_sections(section, place, str(place.base)))
    except ConfigError as error:
        return any(problem.key.startswith("adapter") for problem in error.problems)
    return False


def _same_on(context: Context, place: Place, planned: Mapping[str, Planned]) -> bool:
    """Whether it was tried; the adapter may refuse the model, as one without the layers that its section names."""
    if _name(place) not in planned:
        return True  # the configuration refuses it
    found = outcome(context, _name(place), planned)[0]
    (wanted,) = outcome(context, _name(place._replace(topology="dp1")), planned)
    if isinstance(wanted, str):
        expect(isinstance(found, str), f"{place.base.name} is refused in one process alone: {wanted}")
        return False
    where = f"{place.base.name} on {place.topology}"
    expect(not isinstance(found, str), f"{where} is refused, and not in one process: {found}")
    for what, numbers, alone in zip(("losses", "gradient norms"), found, wanted, strict=True):
        off = largest_difference(numbers, alone)
        limit = 1e-5 if what == "losses" else 1e-4
        expect(off <= limit, f"{where}: {what} differ by {off:.1e} from those of one process")
    return True


@check("adapter", level=2, mutant="shared-by-all")
def two(context: Context) -> None:
    """Two trained adapters on one base model each have their own logits, and the base keeps its own."""
    planned = _planned(context)
    for name in PAIR:
        outcome(context, name, planned)
    saved = {name: _saved(context, name) for name in PAIR}
    folder = context.shared.folder / "base"
    alone = {
        name: logits(with_adapters(_on_disk(folder), {name: path}, context.plugins)[name])
        for name, path in saved.items()
    }
    expect(_off(*alone.values()) > 1e-6, "adapters of different seeds have the same logits")
    base = _on_disk(folder)
    together = with_adapters(base, saved, context.plugins)
    for name, wanted in alone.items():
        expect(_off(logits(together[name]), wanted) <= 1e-6, f"beside another, the {name} adapter has other logits")
    expect(_off(logits(base), logits(_on_disk(folder))) == 0, "the base model has other logits beside adapters")


def _on_disk(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@check("adapter", level=2, mutant="tidies-files")
def merged_files(context: Context) -> None:
    """`collie merge` makes of a saved adapter and its base a model with its logits, and changes neither on the disk.

    An adapter cannot take a merge back, and need not: the base is where it was.
    """
    if not _merges(context):
        raise Skipped("it has no merge(module)")
    planned, folder = _planned(context), context.shared.folder
    outcome(context, PAIR[0], planned)
    (changed,) = outcome(context, "merged", planned)
    expect(not changed, f"merging has changed {', '.join(changed)}")
    wanted = logits(with_adapters(_on_disk(folder / "base"), {"it": _saved(context, PAIR[0])}, context.plugins)["it"])
    off = _off(logits(_on_disk(folder / "merged")), wanted)
    expect(off <= 1e-4, f"the logits of the merged model differ by {off:.1e}")
    expect(_off(wanted, logits(_on_disk(folder / "base"))) > 1e-3, "the adapter has no effect on the logits")


def merge(base: str, adapter: str, out: str) -> list[str]:
    """Files of base and adapter that are not as they were, once somebody has merged them from the command line."""
    folders = Path(base), Path(adapter)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(base)
    before = _contents(*folders)
    (command,) = entry_points(group="console_scripts", name="collie")
    code = command.load()(["merge", "--adapter", adapter, "--out", out])
    expect(code == 0, f"collie merge has the exit code {code}")
    after = _contents(*folders)
    return [str(file) for file in before | after if before.get(file) != after.get(file)]


def _contents(*folders: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for folder in folders for file in folder.rglob("*") if file.is_file()}


@check("adapter", level=2, mutant="main-rank-only")
def tp2(context: Context) -> None:
    """Two tensor-parallel ranks have the losses of one process, or the configuration refuses them by name."""
    expect(_same_on(context, Place(context.shared.folder / "base", "tp2"), _planned(context)), "it refuses a llama")


@check("adapter", level=2, mutant="other-on-stages")
def pp2(context: Context) -> None:
    """Two pipeline stages have the losses of one process, or the configuration refuses them by name."""
    expect(_same_on(context, Place(context.shared.folder / "base", "pp2"), _planned(context)), "it refuses a llama")


@check("adapter", level=2, mutant="llamas-only")
def every_family(context: Context) -> None:
    """On every installed family whose files the kit can make it trains on two ranks the same, or refuses by a field."""
    questions(context.folder)
    planned: dict[str, Planned] = {}
    places = []
    for name in context.plugins.names("model"):
        other = Context("model", name, context.folder, context.zygote, plugins=context.plugins)
        raw = families.small_config(other)
        if "num_experts" in raw:
            continue  # the core refuses an adapter on experts that ranks share
        try:
            folder = families.write_files(other, context.folder / name, raw)
        except (Skipped, ModelError):  # its config is not what the kit makes; its own author gives one
            continue
        places.append(Place(folder, "tp2", FEW_STEPS))
        planned |= _same_as_alone(context, folder, ("tp2",), FEW_STEPS)
    tried = [place for place in places if _same_on(context, place, planned)]
    expect(tried, "no installed model family can be tried: pip install collie-llama")
