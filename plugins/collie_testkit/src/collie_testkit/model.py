"""Checks of model families, against the model of transformers and against one process.

They need a small config and files with random weights. Of a family whose files transformers reads, the kit makes both;
others give `config`, `write` and `stock`, see `Material`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from collie_core.api import CollieError, ConfigError, RunConfig, Trainer
from collie_testkit.context import Context
from collie_testkit.launches import Planned, outcome
from collie_testkit.registry import Skipped, check, expect
from collie_testkit.training import (
    LLAMA,
    Record,
    has_deepspeed,
    largest_difference,
    questions,
    ranks_of,
    require_deepspeed,
    sections_on,
    train,
)

SMALL = {key: value for key, value in LLAMA.items() if key != "model_type"} | {
    "num_hidden_layers": 4,
    "head_dim": 8,  # wide heads have gradients so small that AdamW makes steps of their rounding
    "query_pre_attn_scalar": 8,
    "num_experts": 4,
    "tie_word_embeddings": False,
}
STEPS, RATE = 8, 1e-3


# -- a small model of the family ------------------------------------------------------------------------------------


def small_config(context: Context) -> dict[str, Any]:
    """A config.json of the family: the author's, or its own with the sizes of `SMALL`, as far as it has them."""
    family = context.plugins.load("model", context.name)
    if context.material.config is not None:
        return {"model_type": family.model_type, **context.material.config}
    known = family.make_config({"model_type": family.model_type})
    fields = {*inspect.signature(type(known).__init__).parameters, *known.to_dict(), *known.attribute_map}
    sizes = {key: value for key, value in SMALL.items() if key in fields}
    dropouts = {key: 0.0 for key, value in known.to_dict().items() if "drop" in key and value}
    return {"model_type": family.model_type, **sizes, **dropouts}


def write_files(context: Context, folder: Path, raw: Mapping[str, Any]) -> Path:
    """config.json and random weights in the layout of the family."""
    folder.mkdir(parents=True, exist_ok=True)
    if context.material.write is not None:
        context.material.write(folder, raw)
        return folder
    family = context.plugins.load("model", context.name)
    if getattr(family, "weights", None):
        raise Skipped("its files have a layout of their own: checks(..., write=..., stock=...) says how to write them")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(family.make_config(raw), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms and biases are not 1 and 0
            vector = 0.1 * torch.randn_like(parameter)
            parameter.copy_(1 + vector if parameter.ndim == 1 and "norm" in name else vector)
    model.save_pretrained(folder)
    if getattr(family, "stock_type", ""):  # read by another name
        (folder / "config.json").write_text(json.dumps({**raw, "torch_dtype": "float32"}), encoding="utf-8")
    return folder


def stock_model(context: Context, folder: Path) -> Any:
    """The same in transformers, which knows nothing of the family's own declarations."""
    if context.material.stock is not None:
        return context.material.stock(folder).eval()
    family = context.plugins.load("model", context.name)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config: PretrainedConfig | None = None
    if stock := getattr(family, "stock_type", ""):
        if family.translate is not dict:
            raise Skipped("its config.json is translated: checks(..., stock=...) says what it is in transformers")
        options = {key: value for key, value in raw.items() if key not in ("model_type", "torch_dtype")}
        config = AutoConfig.for_model(stock, **options)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def _sections(folder: str, topology: str, output: Path, *, steps: int, optimizer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = sections_on(topology, Path(folder).parent, output, steps=steps)
    return found | {"model": {"model_name_or_path": folder}, "optimizer": optimizer}


def _prepared(context: Context, **changes: Any) -> Path:
    """A folder with a small model of the family, beside the questions."""
    questions(context.folder)
    return write_files(context, context.folder / "files", small_config(context) | changes)


def _built(folder: Path, output: Path) -> Any:
    config = RunConfig(**_sections(str(folder), "dp1", output, steps=1, optimizer={"type": "sgd", "lr": 1e-3}))
    return Trainer(config, observers=()).model.eval()


# -- level 1 --------------------------------------------------------------------------------------------------------


@check("model", level=1, mutant="drops-a-key")
def config(context: Context) -> None:
    """A config.json that is read, written and read again says the same."""
    family = context.plugins.load("model", context.name)
    raw = small_config(context)
    first = family.make_config(raw)
    first.dtype = torch.float32  # as it has one when a model is saved
    written = family.write_config(first, raw)
    expect(written.get("model_type") == family.model_type, f"written is model_type={written.get('model_type')!r}")
    again = family.make_config(json.loads(json.dumps(written)))
    expect(_facts(first) == _facts(again), f"these differ: {_differences(_facts(first), _facts(again))}")


def _facts(config: Any) -> dict[str, Any]:
    left_out = ("transformers_version", "architectures", "dtype", "torch_dtype")
    return {key: value for key, value in config.to_dict().items() if key not in left_out}


def _differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return ", ".join(f"{key}: {one.get(key)!r} becomes {other.get(key)!r}" for key in keys)


@check("model", level=1, mutant="other-epsilon")
def logits(context: Context) -> None:
    """Loaded weights give the logits of transformers, all at once and token by token with a cache."""
    folder = _prepared(context)
    ids = torch.arange(3, 27)[None] * 7 % 250
    with torch.no_grad():
        wanted = stock_model(context, folder)(ids).logits
        model = _built(folder, context.folder / "built")
        _expect_near(model(ids).logits, wanted, "logits")
        steps, cache = [], None
        for position in range(ids.shape[1]):
            found = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            steps.append(found.logits)
            cache = found.past_key_values
        _expect_near(torch.cat(steps, dim=1), wanted, "logits with a cache")


def _expect_near(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-4) -> None:
    off = float((found - wanted).abs().max())
    expect(
        off <= tolerance * max(1.0, float(wanted.abs().max())), f"{what} differ from those of transformers by {off:.1e}"
    )


@check("model", level=1, mutant="forgets-ties")
def tied(context: Context) -> None:
    """With the output head tied to the embeddings it loads, has the logits of transformers, and stays tied."""
    family = context.plugins.load("model", context.name)
    raw = small_config(context)
    if not hasattr(family.make_config(raw), "tie_word_embeddings"):
        raise Skipped("its config has no tie_word_embeddings")
    folder = _prepared(context, tie_word_embeddings=True)
    ids = torch.arange(3, 27)[None] * 7 % 250
    model = _built(folder, context.folder / "built")
    with torch.no_grad():
        _expect_near(model(ids).logits, stock_model(context, folder)(ids).logits, "tied logits")
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    expect(ends[0] is ends[1], "the head has weights of its own")


class _Batches:
    """Keeps what a run trained on."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[Tensor, Tensor]]] = []

    def collie_before_step(self, batch: Any) -> None:
        self.steps.append([(one.input_ids.clone(), one.labels.clone()) for one in batch.micro_batches])


@check("model", level=1, mutant="hidden-dropout")
def training(context: Context) -> None:
    """Losses and gradient norms of 8 steps are those of transformers in a plain loop of torch."""
    folder = _prepared(context)
    batches = _Batches()
    optimizer = {"type": "adamw", "lr": RATE, "weight_decay": 0.0}
    record = train(_sections(str(folder), "dp1", context.folder / "run", steps=STEPS, optimizer=optimizer), batches)
    losses, norms = _plain_loop(stock_model(context, folder), batches)
    for what, found, wanted in (("losses", record.losses, losses), ("gradient norms", record.norms, norms)):
        off = largest_difference(found, wanted)
        expect(off <= 1e-4, f"{what} differ from those of transformers by {off:.1e}: {found} instead of {wanted}")


def _plain_loop(model: Any, batches: _Batches) -> tuple[list[float], list[float]]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses, norms = [], []
    for step in batches.steps:
        targets = sum(int((labels[:, 1:] != -100).sum()) for _, labels in step)
        total = 0.0
        for ids, labels in step:
            found = model(ids).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(found, labels[:, 1:].flatten(), reduction="sum") / targets
            loss.backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


@check("model", level=1, mutant="rewrites-files")
def export(context: Context) -> None:
    """A model that was not changed is saved as it was read: the same tensors, and a config that says the same."""
    folder = _prepared(context)
    too_small = {"type": "sgd", "lr": 1e-30}  # to change a bit of the weights
    train(_sections(str(folder), "dp1", context.folder / "run", steps=1, optimizer=too_small))
    _expect_same_files(context, folder, context.folder / "run" / "run" / "model")


def _expect_same_files(context: Context, folder: Path, saved: Path, within: float = 0.0) -> None:
    """Of the norm of each tensor."""
    family = context.plugins.load("model", context.name)
    before, after = _tensors(folder), _tensors(saved)
    expect(before.keys() == after.keys(), f"saved are other tensors: {sorted(before.keys() ^ after.keys())[:4]}")
    changed = [name for name, value in before.items() if not (after[name] - value).norm() <= within * value.norm()]
    expect(not changed, f"{len(changed)} saved tensors are not what they should be, as {changed[:2]}")
    raws = [json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (folder, saved)]
    first, second = (_facts(family.make_config(raw)) for raw in raws)
    expect(first == second, f"in config.json {_differences(first, second)}")


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


# -- level 2 --------------------------------------------------------------------------------------------------------


@check("model", level=2, mutant="takes-any-size")
def refuses(context: Context) -> None:
    """Ranks that its heads cannot be shared by, and more stages than layers, are refused before any training."""
    folder = _shared_files(context)
    family = context.plugins.load("model", context.name)
    sizes = family.make_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    uneven = next(size for size in range(2, 99) if sizes.num_attention_heads % size)
    for topology in (f"tp{uneven}", f"pp{sizes.num_hidden_layers + 1}"):
        if _is_refused(folder, topology, context.folder):
            continue
        args = (str(folder), topology, str(context.folder / topology))
        for reason in context.on_ranks(refusal, ranks_of(topology), *args):
            expect("parallel." in reason, f"{topology} was tried, and the reason against it is {reason or 'none'}")


def refusal(folder: str, topology: str, output: str) -> str:
    """Why a run on these ranks ends before its first step; "" where it does not."""
    record = Record()
    sections = _sections(folder, topology, Path(output), steps=1, optimizer={"type": "sgd", "lr": 1e-3})
    try:
        train(sections, record)
    except CollieError as error:
        return "" if record.losses else str(error)
    return ""


@check("model", level=2, mutant="cut-wrongly")
def tp2(context: Context) -> None:
    """Two tensor-parallel ranks have the losses and gradients of one process, and save the same weights."""
    _same_on(context, "tp2")


@check("model", level=2, mutant="stubbed-wrongly")
def pp2(context: Context) -> None:
    """Two pipeline stages have the losses and gradients of one process, and save the same weights."""
    _same_on(context, "pp2")


@check("model", level=2, mutant="four-is-too-many")
def meshes(context: Context) -> None:
    """So do two stages of two ranks, four tensor-parallel ranks and ZeRO 3, as far as the sizes allow."""
    require_deepspeed()
    _same_on(context, *MESHES)


FOR_ALL, MESHES = ("tp2", "pp2"), ("tp2pp2", "tp4", "dp2zero3")
"""What no small config makes impossible, and what one may."""


def _same_on(context: Context, *topologies: str) -> None:
    folder = _shared_files(context)
    wished = ("dp1", *FOR_ALL, *MESHES)
    taken = [one for one in wished if one in FOR_ALL or not _is_refused(folder, one, context.folder)]
    planned = {
        one: Planned(ranks_of(one), moving, (str(folder), one, str(context.shared.folder / one)))
        for one in taken
        if "zero" not in one or has_deepspeed()
    }
    for topology in (one for one in topologies if one in planned):
        found = outcome(context, topology, planned)[0]
        (alone,) = outcome(context, "dp1", planned)
        for what, numbers, wanted in zip(("losses", "gradient norms"), found, alone, strict=True):
            off = largest_difference(numbers, wanted)
            expect(off <= 1e-5 if what == "losses" else off <= 1e-4, f"on {topology} {what} differ by {off:.1e}")
        wanted_files, saved = (context.shared.folder / one / "run" / "model" for one in ("dp1", topology))
        _expect_same_files(context, wanted_files, saved, within=1e-4)


def moving(folder: str, topology: str, output: str) -> tuple[list[float], list[float]]:
    """Losses and norms of three steps, the last of which tell of all gradients before; and an export."""
    optimizer = {"type": "sgd", "lr": 0.1}
    record: Record = train(_sections(folder, topology, Path(output), steps=3, optimizer=optimizer))
    return record.losses, record.norms


def _shared_files(context: Context) -> Path:
    """The same as `_prepared`, for all checks on ranks."""
    folder = context.shared.folder / "files"
    if not folder.exists():
        questions(context.shared.folder)
        write_files(context, folder, small_config(context))
    return folder


def _is_refused(folder: Path, topology: str, output: Path) -> bool:
    """Whether the configuration refuses to cut the model so, before any process starts."""
    try:
        RunConfig(**_sections(str(folder), topology, output, steps=1, optimizer={"type": "sgd", "lr": 1e-3}))
    except ConfigError as error:
        return any(problem.key.startswith("parallel.") for problem in error.problems)
    return False
