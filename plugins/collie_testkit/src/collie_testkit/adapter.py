"""Checks of adapters: on a small llama in one process, then on ranks and on every installed family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from collie_core.api import ConfigError, ModelError, Plugins, RunConfig, with_adapters
from collie_testkit import model as families
from collie_testkit.context import Context
from collie_testkit.registry import Skipped, check, expect
from collie_testkit.training import LLAMA, largest_difference, questions, ranks_of, sections_on, train

STEPS, RATE = 6, 1e-2
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


def _prepared(context: Context) -> Path:
    questions(context.folder)
    folder = context.folder / "base"
    base_model().save_pretrained(folder)
    return folder


def _train(section: dict[str, Any], base: str, topology: str, output: str, seed: int) -> Any:
    """Losses and norms of a run, which exports the adapter; or by which field it refuses the model."""
    try:
        record = train(_sections(section, base, topology, output, seed))
    except ModelError as error:
        if str(error).startswith("adapter"):
            return str(error)
        raise
    return record.losses, record.norms


def _sections(section: dict[str, Any], base: str, topology: str, output: str, seed: int = 7) -> dict[str, Any]:
    found: dict[str, Any] = sections_on(topology, Path(base).parent, Path(output), steps=STEPS)
    found["train"]["seed"] = seed
    own = {"model": {"model_name_or_path": base}, "adapter": section}
    return found | own | {"optimizer": {"type": "adamw", "lr": RATE}}


def _is_refused(section: dict[str, Any], base: Path, topology: str) -> bool:
    """Whether the configuration says that this adapter cannot be trained so."""
    try:
        RunConfig(**_sections(section, str(base), topology, str(base)))
    except ConfigError as error:
        return any(problem.key.startswith("adapter") for problem in error.problems)
    return False


def _same_on(context: Context, section: Mapping[str, Any], base: Path, topologies: tuple[str, ...]) -> bool:
    """Whether it was tried; the adapter may refuse the model, as one without the layers that its section names."""
    args = (dict(section), str(base))
    wanted = None
    for topology in topologies:
        if _is_refused(dict(section), base, topology):
            continue
        if wanted is None:
            (wanted,) = context.on_ranks(_train, 1, *args, "dp1", f"{base}-dp1", 7)
        if isinstance(wanted, str):
            return False
        found = context.on_ranks(_train, ranks_of(topology), *args, topology, f"{base}-{topology}", 7)[0]
        for what, numbers, alone in zip(("losses", "gradient norms"), found, wanted, strict=True):
            off = largest_difference(numbers, alone)
            limit = 1e-5 if what == "losses" else 1e-4
            expect(off <= limit, f"{base.name} on {topology}: {what} differ by {off:.1e} from those of one process")
    return True


@check("adapter", level=2, mutant="shared-by-all")
def two(context: Context) -> None:
    """Two trained adapters on one base model each have their own logits, and the base keeps its own."""
    folder = _prepared(context)
    outputs = [context.folder / name for name in ("first", "second")]
    for seed, output in enumerate(outputs):
        context.on_ranks(_train, 1, context.section, str(folder), "dp1", str(output), seed)
    saved = {output.name: output / "run" / "model" for output in outputs}

    def base_on_disk() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    plugins = Plugins.discover()
    alone = {name: logits(with_adapters(base_on_disk(), {name: path}, plugins)[name]) for name, path in saved.items()}
    expect(_off(*alone.values()) > 1e-6, "adapters of different seeds have the same logits")
    base = base_on_disk()
    together = with_adapters(base, saved, plugins)
    for name, wanted in alone.items():
        expect(_off(logits(together[name]), wanted) <= 1e-6, f"beside another, the {name} adapter has other logits")
    expect(_off(logits(base), logits(base_on_disk())) == 0, "the base model has other logits beside adapters")


@check("adapter", level=2, mutant="main-rank-only")
def tp2(context: Context) -> None:
    """Two tensor-parallel ranks have the losses of one process, or the configuration refuses them by name."""
    expect(_same_on(context, context.section, _prepared(context), ("tp2",)), "it refuses a llama")


@check("adapter", level=2, mutant="other-on-stages")
def pp2(context: Context) -> None:
    """Two pipeline stages have the losses of one process, or the configuration refuses them by name."""
    expect(_same_on(context, context.section, _prepared(context), ("pp2",)), "it refuses a llama")


@check("adapter", level=2, mutant="llamas-only")
def every_family(context: Context) -> None:
    """On every installed family whose files the kit can make it trains on two ranks the same, or refuses by a field."""
    questions(context.folder)
    tried = []
    for name in context.plugins.names("model"):
        other = Context("model", name, context.folder, context.zygote, plugins=context.plugins)
        raw = families.small_config(other)
        if "num_experts" in raw:
            continue  # the core refuses an adapter on experts that ranks share
        try:
            folder = families.write_files(other, context.folder / name, raw)
        except (Skipped, ModelError):  # its config is not what the kit makes; its own author gives one
            continue
        if _same_on(context, context.section, folder, ("tp2",)):
            tried.append(name)
    expect(tried, "no installed model family can be tried: pip install collie-llama")
