"""How many bytes of gradients, of temporary tensors and of states a training step needs with each optimizer.

A llama of 49.9 million parameters in float32 trains on 1 x 128 tokens: ours driven by CoLLiE's own steps, those of
other packages by a bare loop. The second step is measured, when all states exist. Bytes are those of tensors, not of
the process, so they do not depend on the machine:

* A gradient counts from where autograd hands it to a parameter until its memory is free, which a weak reference to
  the memory tells, whoever holds it.
* A temporary tensor counts likewise when an operation makes it inside an update: in `step`, or in what runs in backward
  between two hooks, the first and the last of each parameter. A `TorchDispatchMode` sees these operations one by one.
  It cannot see into compiled code, so ours run with `kernel: eager`; compiled, they need no temporary tensors.
* States are the tensors that the optimizer holds.

    python benchmarks/optimizer_memory.py [--write benchmarks/results/optimizer_memory.md]

Exit code 1 when a state of ours is larger than it has to be, or when an update in backward ever needs more for
gradients and temporary tensors together than the gradient of the largest parameter and 5 %.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import adan_pytorch
import lion_pytorch
import lomo_optim
import pytorch_optimizer
import torch
from optimizer_step import OURS, PACKAGES, SHAPE, hidden_matrices, ours_of_torch, sophia_h
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from collie_core.data.loader import Batch, StepBatch
from collie_core.engine.curvature import drawn_labels
from collie_core.engine.fused_step import FusedStep
from collie_core.engine.step import Curvature, TorchStep
from collie_core.optimizers.adamw import adamw
from collie_core.optimizers.sgd import sgd
from collie_core.topology import Topology
from collie_optim.adalomo import AdaLomo
from collie_optim.adan import Adan
from collie_optim.lion import Lion
from collie_optim.lomo import Lomo
from collie_optim.muon import Muon
from collie_optim.sophia import Sophia

TOKENS, LR = 128, 1e-4
MARGIN = 1.05  # of the gradient of the largest parameter
COUNTERS = 1e-3  # bytes per parameter: the number of the step
NOTES = (
    "Adan's states: three averages, and 4 bytes for the previous gradient. Muon's: 4 bytes for hidden matrices, 8 for",
    "the rest. lomo-optim's AdaLomo is missing: it needs CUDA.",
)
Make = Callable[[list[nn.Parameter]], Any]


class Ledger(TorchDispatchMode):
    """Knows the memory of gradients and temporary tensors, and how much of it was in use at once."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {storage_of(tensor) for tensor in known}  # weights and states
        self.gradients: dict[StorageWeakRef, int] = {}
        self.temporary: dict[StorageWeakRef, int] = {}
        self.peak_gradients = self.peak = 0
        self.updating = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation; inside an update, take note of the tensors it makes."""
        result = func(*args, **(kwargs or {}))
        if self.updating:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.note(tensor, self.temporary)
        return result

    def note(self, tensor: Tensor, column: dict[StorageWeakRef, int]) -> None:
        """Count the memory of a tensor in a column, unless it is counted or known."""
        storage = storage_of(tensor)
        if not (storage in self.known or storage in self.gradients or storage in self.temporary):
            column[storage] = tensor.untyped_storage().nbytes()
        gradients = in_use(self.gradients)
        self.peak_gradients = max(self.peak_gradients, gradients)
        self.peak = max(self.peak, gradients + in_use(self.temporary))

    def begin(self, gradient: Tensor | None = None) -> None:
        """An update begins, with this gradient."""
        self.updating = True
        if gradient is not None:
            self.note(gradient, self.gradients)

    def end(self) -> None:
        """An update ends."""
        self.updating = False


def storage_of(tensor: Tensor) -> StorageWeakRef:
    """A weak reference to the memory of a tensor: equal for tensors that share it."""
    return StorageWeakRef(tensor.untyped_storage())


def in_use(column: dict[StorageWeakRef, int]) -> int:
    """The bytes of a column that are not free yet; forgets the others."""
    for storage in [storage for storage in column if storage.expired()]:
        del column[storage]
    return sum(column.values())


class Bracket:
    """Hooks before and after all others of every parameter, which tell a ledger where updates begin and end."""

    ledger: Ledger | None = None

    def first(self, params: list[nn.Parameter]) -> None:
        """To be called before the optimizer adds hooks of its own."""
        for param in params:
            param.register_hook(self._begin)
            param.register_post_accumulate_grad_hook(lambda param: self._begin(param.grad))

    def last(self, params: list[nn.Parameter], optimizer: Any) -> None:
        """To be called after it did."""
        for param in params:
            param.register_hook(self._end)
            param.register_post_accumulate_grad_hook(self._end)
        optimizer.register_step_pre_hook(lambda *_: self._begin(None))
        optimizer.register_step_post_hook(self._end)

    def _begin(self, gradient: Tensor | None) -> None:
        if self.ledger is not None:
            self.ledger.begin(gradient)

    def _end(self, *_: Any) -> None:
        if self.ledger is not None:
            self.ledger.end()


def new_model() -> LlamaForCausalLM:
    """The model that all train."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def batch() -> StepBatch:
    """One row of random tokens."""
    ids = torch.randint(0, SHAPE["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(1))
    return StepBatch([Batch(ids, ids, layout=(((0, TOKENS),),))], samples=1, tokens=TOKENS, epoch=0.0)


Runner = Callable[[nn.Module, Any, Bracket], tuple[Any, Callable[[], None]]]
"""(model, optimizer's maker, hooks to install) -> the optimizer, and a training step."""


def by_collie(
    model: nn.Module, make: Make, bracket: Bracket, *, engine: Any = TorchStep, clip: float | None = 1.0
) -> tuple[Any, Callable[[], None]]:
    """A `Runner` of ours."""
    params = list(model.parameters())
    optimizer = make(params)
    options: dict[str, Any] = {"topology": Topology(), "dtype": torch.float32, "max_grad_norm": clip}
    if isinstance(optimizer, Sophia):
        options["curvature"] = Curvature(optimizer, drawn_labels(0))
    bracket.first(params)
    step = engine(model, optimizer, LambdaLR(optimizer, lambda _: 1.0), **options)
    bracket.last(params, optimizer)

    def train() -> None:
        step.forward_backward(batch(), TOKENS - 1)
        step.update()

    return optimizer, train


def loss_of(model: nn.Module) -> Tensor:
    """The mean loss of the batch."""
    ids = batch().micro_batches[0].input_ids
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def by_loop(model: nn.Module, make: Make, bracket: Bracket) -> tuple[Any, Callable[[], None]]:
    """A `Runner` of a bare loop."""
    params = list(model.parameters())
    bracket.first(params)
    loss_of(model).backward()  # some optimizers are made with gradients
    optimizer = make(params)
    bracket.last(params, optimizer)

    def train() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return optimizer, train


def in_backward(
    model: nn.Module, make: Any, bracket: Bracket, *, clip: float | None = None
) -> tuple[Any, Callable[[], None]]:
    """A `Runner` of other packages' updates in backward: `make` takes the model."""
    params = list(model.parameters())
    bracket.first(params)
    optimizer = make(model, clip_grad_norm=clip)
    bracket.last(params, optimizer)

    def train() -> None:
        loss = loss_of(model)
        if clip is not None:
            optimizer.grad_norm(loss)
        optimizer.fused_backward(loss, lr=LR)

    return optimizer, train


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Args:
        rule: its name.
        package: its name.
        make: the optimizer.
        run: what drives it.
        state: bytes per parameter that it may hold; None: no target.
        fused: whether gradients and temporary tensors have a target too.
    """

    rule: str
    package: str
    make: Any
    run: Runner = by_loop
    state: float | None = None
    fused: bool = False


def muon(params: list[nn.Parameter]) -> Muon:
    """Muon with its groups."""
    hidden = hidden_matrices(params)
    kept = {id(param) for param in hidden}
    others = [param for param in params if id(param) not in kept]
    return Muon([{"params": hidden, "role": "hidden"}, {"params": others, "role": "other"}])


def contenders(params: list[nn.Parameter]) -> Iterator[Contender]:
    """All lines of the table."""
    hidden = sum(param.numel() for param in hidden_matrices(params)) / sum(param.numel() for param in params)
    yield Contender("SGD", OURS, ours_of_torch(partial(sgd, lr=LR)), by_collie, 0)
    yield Contender("AdamW", OURS, ours_of_torch(adamw), by_collie, 8)
    yield Contender("AdamW", "pytorch-optimizer", pytorch_optimizer.AdamW)
    yield Contender("Lion", OURS, partial(Lion, kernel="eager"), by_collie, 4)
    yield Contender("Lion", "lion-pytorch", lion_pytorch.Lion)
    yield Contender("Lion", "pytorch-optimizer", pytorch_optimizer.Lion)
    yield Contender("Adan", OURS, partial(Adan, kernel="eager"), by_collie, 16)  # 4 of them the previous gradient
    yield Contender("Adan", "adan-pytorch", adan_pytorch.Adan)
    yield Contender("Adan", "pytorch-optimizer", pytorch_optimizer.Adan)
    yield Contender("Sophia", OURS, partial(Sophia, kernel="eager"), by_collie, 8)
    yield Contender("Sophia", "pytorch-optimizer, SophiaH", sophia_h)
    yield Contender("Muon", OURS, muon, by_collie, 4 * hidden + 8 * (1 - hidden))
    for clip, name in ((None, ""), (1.0, ", clipped")):
        ours = partial(by_collie, engine=FusedStep, clip=clip)
        others = partial(in_backward, clip=clip)
        yield Contender(f"LOMO{name}", OURS, Lomo, ours, 0, fused=True)
        yield Contender(f"LOMO{name}", "lomo-optim", lomo_optim.Lomo, others)
        yield Contender(f"LOMO{name}", "pytorch-optimizer", pytorch_optimizer.LOMO, others)
        yield Contender(f"AdaLomo{name}", OURS, AdaLomo, ours, 0.05, fused=True)
        yield Contender(f"AdaLomo{name}", "pytorch-optimizer", pytorch_optimizer.AdaLOMO, others)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among the values of nested dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)


def states_of(optimizer: Any) -> list[Tensor]:
    """What an optimizer holds, in torch's `state` or in dictionaries of its own."""
    return [tensor for value in vars(optimizer).values() for tensor in tensors_in(value)]


def measure(contender: Contender) -> tuple[float, int, int]:
    """Bytes of state per parameter; bytes of gradients, and of them and temporary tensors, at their peak."""
    model, bracket = new_model().train(), Bracket()
    optimizer, train = contender.run(model, contender.make, bracket)
    train()
    gc.collect()
    states, params = states_of(optimizer), list(model.parameters())
    with Ledger([*params, *states]) as ledger:
        bracket.ledger = ledger
        train()
    held = {storage_of(state): state.untyped_storage().nbytes() for state in states}
    return sum(held.values()) / sum(param.numel() for param in params), ledger.peak_gradients, ledger.peak


def main() -> int:
    """Exit code: 0 when every target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="measure the rules whose name begins with this")
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    params = list(new_model().parameters())
    largest, total = max(4 * param.numel() for param in params), sum(param.numel() for param in params)
    lines, all_met = [], True
    for contender in contenders(params):
        if args.only and not contender.rule.startswith(args.only):
            continue
        state, gradients, peak = measure(contender)
        if contender.state is not None:
            all_met &= state <= contender.state + COUNTERS
        if contender.fused:
            all_met &= peak <= MARGIN * largest
        megabytes = f"{gradients / 1e6:.1f} | {peak / 1e6:.1f}"
        lines.append(f"| {contender.rule} | {contender.package} | {state:.2f} | {megabytes} | {peak / largest:.2f} |")
        gc.collect()
    facts = [
        f"{total / 1e6:.1f} M parameters, float32, 1 x {TOKENS} tokens",
        f"the gradient of the largest parameter takes {largest / 1e6:.1f} MB, all {4 * total / 1e6:.1f} MB",
        ", ".join([f"torch {torch.__version__}", *(f"{name} {version(name)}" for name in PACKAGES)]),
    ]
    head = [
        "| rule | package | bytes of state per parameter | gradients at their peak, MB "
        "| with temporary tensors of the update, MB | the same, in gradients of the largest parameter |",
        "|---|---|--:|--:|--:|--:|",
    ]
    text = "\n".join(["; ".join(facts), "", *head, *lines, "", *NOTES, ""])
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
