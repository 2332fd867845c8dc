"""How long a step of each optimizer takes, beside other packages and beside copying as many bytes.

The parameters are those of a llama of 49.9 million in float32, with random gradients. The contenders for one rule take
turns, a step each, in one process, and so does a plain copy from one block of memory to another: a machine whose speed
drifts slows all alike. The shortest of the rounds counts, in CPU time on one thread and in wall time on several.

The floor is the time in which the copy moves the bytes that a rule must read and write: weights, gradients and states
once each, unless said otherwise. A step can be below it, as it writes where it has just read, which a copy does not.
Muon multiplies matrices: its floor is the time that the multiplications of Newton-Schulz take at the speed of a product
of two large matrices in the same precision. It steps over the hidden matrices alone, as the rest is AdamW's.

What other packages run in backward is timed as the function that their hooks call, over gradients that are there.

    python benchmarks/optimizer_step.py [--rounds 7] [--threads 1] [--only Lion] \\
        [--write benchmarks/results/optimizer_step.md]

Exit code 1 when one of ours takes longer than a peer, or 1.5 times the floor. Two runs of one kernel differ by some
percent, and of some rules all have the same: up to 3 % do not count.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import adan_pytorch
import lion_pytorch
import lomo_optim
import pytorch_optimizer
import torch
from lion_pytorch.foreach import Lion as ForeachLion
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from collie_core.optimizers.adamw import adamw
from collie_core.optimizers.sgd import sgd
from collie_optim.adalomo import AdaLomo
from collie_optim.adan import Adan
from collie_optim.lion import Lion
from collie_optim.lomo import Lomo
from collie_optim.muon import Muon
from collie_optim.sophia import Sophia

OURS = "CoLLiE"
PACKAGES = ("lion-pytorch", "pytorch-optimizer", "adan-pytorch", "lomo-optim")
FLOOR_TARGET = 1.5
NOISE = 1.03
WARM_UP = 2
NEWTON_SCHULZ = 5  # iterations, the default of all
SIDE = 2048  # of the matrices whose product says how fast this machine multiplies
SHAPE: dict[str, Any] = {
    "vocab_size": 24_000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
Make = Callable[[list[nn.Parameter]], Any]


@dataclass(frozen=True)
class Rule:
    """An update rule and who offers it.

    Args:
        name: of the rule.
        numbers: of 4 bytes that a step must read and write per weight.
        ours: by what they are called in the table.
        peers: the same of other packages.
        multiplies: the precision of a rule that is for matrices and whose time goes into multiplying them.
    """

    name: str
    numbers: int = 0
    ours: dict[str, Make] = field(default_factory=dict)
    peers: dict[str, Make] = field(default_factory=dict)
    multiplies: torch.dtype | None = None


class Estimating(Sophia):
    """Sophia whose steps are estimates of the curvature."""

    def step(self, closure: Any = None) -> Any:
        with self.estimating(1000):
            return super().step(closure)


def sophia_h(params: list[nn.Parameter]) -> Any:
    """The step of `SophiaH` after the first, which is given the curvature instead of estimating it."""
    optimizer = pytorch_optimizer.SophiaH(params, update_period=10**9)
    optimizer.step(hessian=[torch.ones_like(param) for param in params])
    for state in optimizer.state.values():
        state.pop("hessian", None)
    return optimizer


class InBackward:
    """Another package's update in backward as a step: what its hooks call, for every parameter that has a gradient."""

    def __init__(self, params: list[nn.Parameter], *, make: Callable[[nn.Module], Any]) -> None:
        self.optimizer = make(nn.ParameterList(params))
        self.gradients = [(param, param.grad) for param in params]

    def step(self) -> None:
        if hasattr(self.optimizer, "num_steps"):
            self.optimizer.num_steps += 1
        self.optimizer.grad_func(0)
        for param, gradient in self.gradients:
            param.grad = gradient  # which it dropped


def ours_of_torch(make: Any) -> Make:
    """An optimizer of the core, which takes groups."""
    return lambda params: make([{"params": params}])


def muon_of_pytorch_optimizer(params: list[nn.Parameter], *, foreach: bool) -> Any:
    return pytorch_optimizer.Muon([{"params": params, "use_muon": True}], foreach=foreach)


RULES = [
    Rule(
        "SGD",
        3,  # reads the weight and gradient; writes the weight
        ours={OURS: ours_of_torch(partial(sgd, lr=1e-4))},
        peers={f"torch, {kind}": partial(torch.optim.SGD, lr=1e-4, **{kind: True}) for kind in ("foreach", "fused")},
    ),
    Rule(
        "AdamW",
        7,  # reads the weight, gradient and two averages; writes all but the gradient
        ours={OURS: ours_of_torch(adamw)},
        peers={f"torch, {kind}": partial(torch.optim.AdamW, **{kind: True}) for kind in ("foreach", "fused")},
    ),
    Rule(
        "Lion",
        5,  # reads the weight, gradient and momentum; writes the weight and momentum
        ours={OURS: Lion, f"{OURS}, kernel: eager": partial(Lion, kernel="eager")},
        peers={
            "lion-pytorch": lion_pytorch.Lion,
            "lion-pytorch, foreach": ForeachLion,
            "pytorch-optimizer, loop": partial(pytorch_optimizer.Lion, foreach=False),
            "pytorch-optimizer, foreach": partial(pytorch_optimizer.Lion, foreach=True),
        },
    ),
    Rule(
        "Adan",
        11,  # reads the weight, gradient, three averages and the previous gradient; writes all but the gradient
        ours={OURS: Adan, f"{OURS}, kernel: eager": partial(Adan, kernel="eager")},
        peers={
            "adan-pytorch": adan_pytorch.Adan,
            "pytorch-optimizer, loop": partial(pytorch_optimizer.Adan, weight_decay=0.02, foreach=False),
            "pytorch-optimizer, foreach": partial(pytorch_optimizer.Adan, weight_decay=0.02, foreach=True),
        },
    ),
    Rule(
        "Sophia",
        6,  # reads the weight, gradient, momentum and curvature; writes the weight and momentum
        ours={OURS: Sophia, f"{OURS}, kernel: eager": partial(Sophia, kernel="eager")},
        peers={"pytorch-optimizer, SophiaH": sophia_h},
    ),
    Rule(
        "Sophia's estimate",
        3,  # reads the gradient and curvature; writes the curvature
        ours={OURS: Estimating, f"{OURS}, kernel: eager": partial(Estimating, kernel="eager")},
    ),
    Rule(
        "LOMO",
        3,  # as SGD, which stands above: it makes one call where an update in backward makes one per parameter
        ours={OURS: partial(Lomo, lr=1e-4)},
        peers={
            "lomo-optim": partial(InBackward, make=lomo_optim.Lomo),
            "pytorch-optimizer": partial(InBackward, make=pytorch_optimizer.LOMO),
        },
    ),
    Rule(
        "AdaLomo",
        # Reads the gradient for its factored squares, again for the RMS of the update, and again for the update itself:
        # each needs all of the one before. Reads the weight for its RMS and for the update; writes it.
        6,
        ours={OURS: AdaLomo},
        peers={  # without lomo-optim's, which calls .cuda() when it is made
            "pytorch-optimizer": partial(InBackward, make=partial(pytorch_optimizer.AdaLOMO, loss_scale=0)),
            "torch, Adafactor": torch.optim.Adafactor,
            "torch, Adafactor, foreach": partial(torch.optim.Adafactor, foreach=True),
        },
    ),
    Rule("Muon, float32", ours={OURS: partial(Muon, ns_dtype="float32")}, multiplies=torch.float32),
    Rule(
        "Muon, bfloat16",  # the only precision of the others; slow where a CPU has no instructions for it
        ours={OURS: partial(Muon, ns_dtype="bfloat16")},
        peers={
            "torch": torch.optim.Muon,
            "pytorch-optimizer, loop": partial(muon_of_pytorch_optimizer, foreach=False),
            "pytorch-optimizer, foreach": partial(muon_of_pytorch_optimizer, foreach=True),
        },
        multiplies=torch.bfloat16,
    ),
]


def llama_parameters() -> list[nn.Parameter]:
    """Parameters of the shapes of the model, with gradients."""
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in LlamaForCausalLM(LlamaConfig(**SHAPE)).parameters()]
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def fastest(calls: Sequence[Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> list[float]:
    """The shortest seconds of each call, which take turns; the first rounds do not count."""
    shortest = [float("inf")] * len(calls)
    for turn in range(WARM_UP + rounds):
        for number, call in enumerate(calls):
            began = clock()
            call()
            taken = clock() - began
            if turn >= WARM_UP:
                shortest[number] = min(shortest[number], taken)
    return shortest


def hidden_matrices(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """The matrices that are neither embedding nor head."""
    return [param for param in params if param.ndim == 2 and SHAPE["vocab_size"] not in param.shape]


def multiplications(matrix: Tensor) -> int:
    """Floating-point operations of Newton-Schulz: X X^T, the square of that, and that times X, in each iteration."""
    short, long = sorted(matrix.shape)
    return NEWTON_SCHULZ * 2 * (2 * short * short * long + short**3)


def floor_of(rule: Rule, params: list[nn.Parameter]) -> tuple[Callable[[], Any], float]:
    """A call, and how many times its duration the floor is."""
    if rule.multiplies is None:
        there, back = (torch.zeros(sum(param.numel() for param in params)) for _ in range(2))
        return partial(Tensor.copy_, there, back), rule.numbers / 2  # a copy reads one number and writes one
    square = torch.randn(SIDE, SIDE).to(rule.multiplies)
    return partial(torch.mm, square, square), sum(map(multiplications, params)) / (2 * SIDE**3)


def work_of(rule: Rule, params: list[nn.Parameter]) -> tuple[str, float]:
    """A sentence about the speed that the floor assumes, and the bytes or multiplications of the floor."""
    if rule.multiplies is None:
        return "a copy moves {:.1f} GB/s", 4 * rule.numbers * sum(param.numel() for param in params)
    name = str(rule.multiplies).removeprefix("torch.")
    return f"products of {name} take {{:.0f}} GFLOP/s", sum(map(multiplications, params))


def measure(
    rule: Rule, params: list[nn.Parameter], rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, float], float]:
    """Seconds of a step by contender, and of the floor."""
    contenders = rule.ours | rule.peers
    steps = [make(params).step for make in contenders.values()]
    call, times = floor_of(rule, params)
    *seconds, unit = fastest([*steps, call], rounds, clock)
    return dict(zip(contenders, seconds, strict=True)), unit * times


def rows_of(rule: Rule, seconds: dict[str, float], floor: float) -> tuple[list[str], bool]:
    """Lines of the table, and whether the targets are met by ours as it is used: without a choice of kernel."""
    best = min((seconds[name] for name in rule.peers), default=None)
    lines, met = [], True
    for name, taken in seconds.items():
        compared = ""
        if name in rule.ours and best is not None:
            compared = f"{best / taken:.2f}"
        if name == OURS:
            met = taken <= FLOOR_TARGET * floor and (best is None or taken <= NOISE * best)
        moved = 4 * rule.numbers or ""
        lines.append(f"| {rule.name} | {name} | {moved} | {taken * 1e3:.1f} | {taken / floor:.2f} | {compared} |")
    return lines, met


def main() -> int:
    """Exit code: 0 when every target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append", choices=[rule.name for rule in RULES], help="measure this rule")
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    params = llama_parameters()
    elements = sum(param.numel() for param in params)
    lines: list[str] = []
    rates: dict[str, float] = {}
    all_met = True
    for rule in RULES:
        if args.only and rule.name not in args.only:
            continue
        stepped = params if rule.multiplies is None else hidden_matrices(params)
        seconds, floor = measure(rule, stepped, args.rounds, clock)
        more, met = rows_of(rule, seconds, floor)
        lines += more
        all_met &= met
        sentence, amount = work_of(rule, stepped)
        rates[sentence] = max(rates.get(sentence, 0.0), amount / floor / 1e9)
        gc.collect()  # the states of this rule, before the next one's
    packages = [f"{name} {version(name)}" for name in PACKAGES]
    facts = [
        f"{elements / 1e6:.1f} M parameters, float32, threads: {args.threads}, shortest of {args.rounds} rounds",
        *(sentence.format(rate) for sentence, rate in rates.items()),
        ", ".join([f"torch {torch.__version__}", *packages]),
    ]
    head = [
        "| rule | package | bytes per weight | ms | over the floor | speed over the best peer |",
        "|---|---|--:|--:|--:|--:|",
    ]
    text = "\n".join(["; ".join(facts), "", *head, *lines, ""])
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
