"""Checks of optimizers: what runs, restarts and topologies rely on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from collie_core.api import ConfigError, CurvatureOptimizer, FusedOptimizer, RunConfig
from collie_testkit.context import Context
from collie_testkit.launches import Planned, outcome
from collie_testkit.registry import Skipped, check, expect
from collie_testkit.training import (
    has_deepspeed,
    largest_difference,
    questions,
    ranks_of,
    require_deepspeed,
    sections_on,
    train,
)

SHAPES: list[tuple[int, ...]] = [(5,), (3, 4), (2, 3, 4), (6, 4)]
SHAPES_OF_MODELS: list[tuple[int, ...]] = [(512, 1376), (704,)]
STEPS, TOKENS = 12, 64

Grads = Sequence[Sequence[Tensor | None]]
"""Of all parameters, step by step."""


# -- parameters, gradients, steps -----------------------------------------------------------------------------------


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    """Of the size of weights; the last one does not lie in one piece."""
    generator = torch.Generator().manual_seed(1)
    values = [(0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]
    return [nn.Parameter(value) for value in [*values[:-1], values[-1].t() if values[-1].ndim == 2 else values[-1]]]


def gradients(params: Sequence[Tensor], steps: int = STEPS, seed: int = 2) -> list[list[Tensor]]:
    """Random ones, rounded to float32, so that every precision is given the same."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(param.shape, generator=generator).to(param.dtype) for param in params] for _ in range(steps)]


def build(context: Context, params: Sequence[nn.Parameter], options: Sequence[dict[str, Any]] = ({},)) -> Any:
    """The optimizer over the parameters in turn in groups with these options, as a run gives them."""
    groups = []
    for number, chosen in enumerate(options):
        members = params[number :: len(options)]
        hidden = [param for param in members if param.ndim == 2] if context.can.parameter_roles else []
        rest = [param for param in members if not any(param is other for other in hidden)]
        roles: list[tuple[list[nn.Parameter], dict[str, Any]]] = [(rest, {})]
        if context.can.parameter_roles:
            roles = [(hidden, {"role": "hidden"}), (rest, {"role": "other"})]
        groups += [{"params": found, "weight_decay": 0.0, **role, **chosen} for found, role in roles if found]
    return context.build(params=groups)


def run(context: Context, optimizer: Any, params: Sequence[nn.Parameter], grads: Grads, skip: int = 0) -> None:
    """Steps as a run makes them: in backward where the optimizer wants that, with estimates of curvature when due.

    `skip`: so many steps were made before, which decides what an estimate is given.
    """
    drawn = gradients(params, skip + len(grads), seed=3)[skip:]
    for step, present in enumerate(grads):
        if context.can.estimates_curvature and optimizer.curvature_due():
            _give(params, [None if grad is None else other for grad, other in zip(present, drawn[step], strict=True)])
            with optimizer.estimating(TOKENS):
                optimizer.step()
        if context.can.fuses_backward:
            _give(params, [None] * len(params))
            for param, grad in zip(params, present, strict=True):
                if grad is not None:
                    optimizer.update(param, grad.clone())
        else:
            _give(params, present)
        optimizer.step()


def _give(params: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.to(param.dtype, copy=True)


def weights_after(context: Context, grads: Grads, options: Sequence[dict[str, Any]] = ({},)) -> list[nn.Parameter]:
    """New parameters after a step for each of the gradients."""
    params = parameters()
    run(context, build(context, params, options), params, grads)
    return params


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """To the last bit."""
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# -- level 0 --------------------------------------------------------------------------------------------------------


@check("optimizer", level=0, mutant="any-rate")
def bounds(context: Context) -> None:
    """The section refuses a learning rate of 0, below 0 or NaN, and a negative weight decay."""
    model = context.plugins.config_model("optimizer", context.name)
    for field, value in [("lr", 0), ("lr", -1e-3), ("lr", float("nan")), ("weight_decay", -0.1)]:
        try:
            model.model_validate({**context.written, field: value})
        except ValidationError:
            continue
        expect(False, f"optimizer.{field}={value} was taken; bound the field, as OptimizerConfig does")


# -- level 1 --------------------------------------------------------------------------------------------------------


@check("optimizer", level=1, mutant="secret-update")
def declares(context: Context) -> None:
    """It is a FusedOptimizer or a CurvatureOptimizer exactly where its `can` says so."""
    optimizer = build(context, parameters())
    for protocol, field in ((FusedOptimizer, "fuses_backward"), (CurvatureOptimizer, "estimates_curvature")):
        has, says = isinstance(optimizer, protocol), getattr(context.can, field)
        expect(has == says, f"can.{field} is {says}, and it {'has' if has else 'lacks'} the methods of that Protocol")


@check("optimizer", level=1, mutant="noisy")
def repeatable(context: Context) -> None:
    """The same gradients give the same weights, to the last bit, and other weights than before."""
    grads = gradients(parameters())
    first, second = (weights_after(context, grads) for _ in range(2))
    expect(same(first, second), "two runs from the same start differ")
    still = [f"of shape {tuple(a.shape)}" for a, b in zip(first, parameters(), strict=True) if torch.equal(a, b)]
    expect(not still, f"parameters {', '.join(still)} have not moved")


@check("optimizer", level=1, mutant="decays-unused")
def no_gradient(context: Context) -> None:
    """A parameter without a gradient is left alone, weight decay too, and one that misses some steps goes on."""
    params = parameters()
    optimizer = build(context, params, [{"weight_decay": 0.5}])
    before = [param.detach().clone() for param in params]
    grads = [[grad if number % 2 else None for number, grad in enumerate(row)] for row in gradients(params, 3)]
    run(context, optimizer, params, grads)
    expect(same(params[::2], before[::2]), "parameters without a gradient have moved")
    run(context, optimizer, params, gradients(params, 3, seed=4), skip=3)
    expect(not any(map(torch.equal, params, before)), "a parameter whose first gradient comes late does not move")
    expect(all(param.isfinite().all() for param in params), "a parameter whose first gradient comes late is not finite")


@check("optimizer", level=1, mutant="one-rate")
def groups(context: Context) -> None:
    """A group has its own learning rate and weight decay: the weights are those of an optimizer for each group."""
    grads = gradients(parameters())
    options = [{"lr": 1e-3, "weight_decay": 0.1}, {"lr": 4e-3, "weight_decay": 0.0}]
    together = weights_after(context, grads, options)
    for number, chosen in enumerate(options):
        alone = weights_after(context, grads, [chosen])
        mine = slice(number, None, 2)
        expect(
            _near(together[mine], alone[mine], 1e-7), f"a group with {chosen} beside another is not what it is alone"
        )


@check("optimizer", level=1, mutant="keeps-rate")
def schedule(context: Context) -> None:
    """The learning rate of a group may change between steps: a step at 0 moves nothing."""
    params = parameters()
    optimizer = build(context, params)
    grads = gradients(params)
    run(context, optimizer, params, grads[:3])
    before = [param.detach().clone() for param in params]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(context, optimizer, params, grads[3:6], skip=3)
    expect(same(params, before), "with a learning rate of 0 the weights have moved; read group['lr'] at every step")


@check("optimizer", level=1, mutant="forgets")
def resume(context: Context) -> None:
    """After `state_dict`, a file without code and `load_state_dict` it goes on to the same bits."""
    grads = gradients(parameters())
    straight = weights_after(context, grads)
    first, second = parameters(), parameters()
    before, after = build(context, first), build(context, second)
    run(context, before, first, grads[:5])
    for param, saved in zip(second, first, strict=True):
        param.data.copy_(saved.data)
    after.load_state_dict(through_a_file(before.state_dict()))
    run(context, after, second, grads[5:], skip=5)
    expect(same(straight, second), "the weights differ from those of a run that was not interrupted")


@check("optimizer", level=1, mutant="greedy")
def state_bytes(context: Context) -> None:
    """It keeps no more bytes for each parameter than `can.state_bytes_per_parameter` says."""
    declared = context.can.state_bytes_per_parameter
    for shapes in (SHAPES_OF_MODELS[:1], SHAPES_OF_MODELS):
        params = [nn.Parameter(torch.full(shape, 0.01)) for shape in shapes]
        optimizer = build(context, params)
        run(context, optimizer, params, gradients(params, 1))
        held = sum(_bytes(state) for state in optimizer.state.values())
        most = declared * sum(param.numel() for param in params) + 4 * sum(max(param.shape) for param in params)
        expect(
            held <= most, f"{held} bytes of state for {sum(p.numel() for p in params)} parameters, not {declared} each"
        )


@check("optimizer", level=1, mutant="boastful")
def state_is_kept(context: Context) -> None:
    """Of some parameter it keeps as much as that, so that no plan finds room for what is never there."""
    declared = context.can.state_bytes_per_parameter
    params = [nn.Parameter(torch.full(shape, 0.01)) for shape in SHAPES_OF_MODELS]
    optimizer = build(context, params)
    run(context, optimizer, params, gradients(params, 1))
    most = max(_bytes(optimizer.state[param]) / param.numel() for param in params)
    expect(most >= 0.9 * declared, f"it keeps at most {most:g} bytes for each parameter, and declares {declared:g}")


@check("optimizer", level=1, mutant="brittle")
def extremes(context: Context) -> None:
    """Gradients from 0 to 1e18 leave finite weights, in float32 and in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        for size in (0.0, 1e-30, 1e-8, 1.0, 1e18):
            params = parameters(dtype)
            grads = [[size * grad for grad in row] for row in gradients(params, 3)]
            run(context, build(context, params), params, grads)
            expect(
                all(param.isfinite().all() for param in params),
                f"gradients of size {size:g} in {dtype} give no numbers",
            )


@check("optimizer", level=1, mutant="coarse")
def precision(context: Context) -> None:
    """In float32 the weights follow those in float64: nothing is rounded on the way."""
    found = []
    for dtype in (torch.float32, torch.float64):
        params = parameters(dtype)
        rounded = [[grad.to(dtype) for grad in row] for row in gradients(parameters())]
        run(context, build(context, params), params, rounded)
        found.append([param.detach().double() for param in params])
    moved = [
        (param - before).detach().norm() for param, before in zip(found[1], parameters(torch.float64), strict=True)
    ]
    for single, double, way in zip(*found, moved, strict=True):
        share = float((single - double).norm() / way)
        expect(share <= 5e-4, f"a parameter of shape {tuple(single.shape)} is off by {share:.1e} of its way")


@check("optimizer", level=1, mutant="other-momentum")
def reference(context: Context) -> None:
    """The weights are those of the reference that its author gives."""
    if context.material.reference is None:
        raise Skipped("no reference was given: checks(..., reference=...)")
    params = parameters(torch.float64)
    grads = gradients(params)
    options = context.config.model_dump(exclude={*context.config.for_the_core, "weight_decay"})
    expected = [
        context.material.reference(param.detach().clone(), [row[number] for row in grads], **options, weight_decay=0.0)
        for number, param in enumerate(params)
    ]
    run(context, build(context, params), params, grads)
    for param, wanted in zip(params, expected, strict=True):
        off = float((param.detach() - wanted).abs().max())
        expect(off <= 1e-10, f"a parameter of shape {tuple(param.shape)} differs by {off:.1e} from the reference")


@check("optimizer", level=1, mutant="after-care", concerns=lambda can: can.fuses_backward)
def empty_step(context: Context) -> None:
    """It has updated in backward: `step` after that, when no gradient is left, changes nothing."""
    params = parameters()
    optimizer = build(context, params)
    for param, grad in zip(params, gradients(params, 1)[0], strict=True):
        optimizer.update(param, grad)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    expect(same(params, before), "step() has moved the weights")


@check("optimizer", level=1, mutant="eager-to-move", concerns=lambda can: can.estimates_curvature)
def curvature(context: Context) -> None:
    """A step inside `estimating` moves no weight."""
    params = parameters()
    optimizer = build(context, params)
    before = [param.detach().clone() for param in params]
    expect(optimizer.curvature_due(), "curvature is not due before the first step")
    _give(params, gradients(params, 1)[0])
    with optimizer.estimating(TOKENS):
        optimizer.step()
    expect(same(params, before), "weights have moved in estimating()")


@check("optimizer", level=1, mutant="ascends")
def converges(context: Context) -> None:
    """With one of some learning rates it brings a quadratic loss to a tenth, and a logistic one to a third."""
    for problem, share in ((_quadratic, 0.1), (_logistic, 0.33)):
        left: dict[float, float] = {}
        for rate in (0.1, 0.3, 0.03, 1.0, 0.01, 0.003):
            left[rate] = problem(context, rate)
            if left[rate] <= share:
                break
        found = ", ".join(f"{value:.2g} with lr={rate}" for rate, value in left.items())
        expect(left[rate] <= share, f"{problem.__doc__} Of the loss is left: {found}")


def _quadratic(context: Context, rate: float) -> float:
    """A quadratic whose curvature varies by a factor of 30."""
    generator = torch.Generator().manual_seed(5)
    curve = torch.logspace(-0.75, 0.75, 32).reshape(8, 4)
    goal = torch.randn(8, 4, generator=generator)
    return _descend(context, rate, nn.Parameter(torch.zeros(8, 4)), lambda w: (curve * (w - goal).square()).mean())


def _logistic(context: Context, rate: float) -> float:
    """The classes of two clouds of points."""
    generator = torch.Generator().manual_seed(6)
    labels = torch.arange(64) % 2
    points = torch.randn(64, 8, generator=generator) + 1.5 * (2 * labels[:, None] - 1)
    return _descend(
        context, rate, nn.Parameter(torch.zeros(2, 8)), lambda w: nn.functional.cross_entropy(points @ w.t(), labels)
    )


def _descend(context: Context, rate: float, param: nn.Parameter, loss_of: Any, steps: int = 100) -> float:
    """The share of the loss that is left."""
    optimizer = build(context, [param], [{"lr": rate}])
    first = float(loss_of(param.detach()))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        (grad,) = torch.autograd.grad(loss_of(param), [param])
        run(context, optimizer, [param], [[grad]], skip=step)
    return float(loss_of(param.detach())) / first


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """What comes back from `torch.save` and a `torch.load` that loads no code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def _bytes(state: dict[str, Any]) -> int:
    """Of the tensors that are no mere counts."""
    return sum(value.nbytes for value in state.values() if isinstance(value, Tensor) and value.ndim)


def _near(first: Sequence[Tensor], second: Sequence[Tensor], tolerance: float) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(first, second, strict=True))


# -- level 2 --------------------------------------------------------------------------------------------------------


@check("optimizer", level=2, mutant="ranked")
def dp2(context: Context) -> None:
    """Two data-parallel ranks have the losses of one process."""
    _same_losses(context, "dp2")


@check("optimizer", level=2, mutant="own-share")
def tp2(context: Context) -> None:
    """Two tensor-parallel ranks have the losses of one process."""
    _same_losses(context, "tp2")


@check("optimizer", level=2, mutant="counts-parameters")
def pp2(context: Context) -> None:
    """Two pipeline stages have the losses of one process, or are refused by name."""
    _same_losses(context, "pp2")


@check("optimizer", level=2, mutant="flattened")
def zero(context: Context) -> None:
    """ZeRO 1 and 3 have the losses of one process, or are refused by name."""
    require_deepspeed()
    _same_losses(context, *ZERO)


@check("optimizer", level=2, mutant="misfiled")
def checkpoint(context: Context) -> None:
    """A checkpoint of two tensor-parallel ranks goes on in one process with the same losses."""
    planned = _planned(context)
    outcome(context, "interrupted", planned)
    ((losses, _),) = outcome(context, "resumed", planned)
    ((expected, _),) = outcome(context, "dp1", planned)
    _expect_same("after a restart on one process", losses, expected[STOP:])


RUN_STEPS, STOP = 6, 3
ZERO = ("dp2zero1", "dp2zero3")


def _planned(context: Context) -> dict[str, Planned]:
    """The runs of all checks; those with DeepSpeed last, since it leaves things behind."""
    folder, section = context.shared.folder, context.section
    questions(folder)
    zero = ZERO if has_deepspeed() else ()
    places = [place for place in ("dp1", "dp2", "tp2", "pp2", *zero) if not _refusal(context, place)]
    found = {place: Planned(ranks_of(place), trained, (section, place, str(folder))) for place in places}
    restart = {
        "interrupted": Planned(2, interrupted, (section, str(folder))),
        "resumed": Planned(1, gone_on, (section, str(folder))),
    }
    return restart | found


def _same_losses(context: Context, *topologies: str) -> None:
    planned = _planned(context)
    for topology in topologies:
        if reason := _refusal(context, topology):
            expect("optimizer" in reason or "parallel." in reason, f"{topology} is refused without a name: {reason}")
            continue
        found = outcome(context, topology, planned)
        ((losses, norms),) = outcome(context, "dp1", planned)
        _expect_same(f"on {topology}", found[0][0], losses)
        _expect_same(f"on {topology}, gradient norms", found[0][1], norms, 1e-4)
        expect(all(rank[0] == found[0][0] for rank in found), f"on {topology} the ranks have different losses")


def _expect_same(where: str, found: list[float], wanted: list[float], tolerance: float = 1e-5) -> None:
    difference = largest_difference(found, wanted)
    expect(
        difference <= tolerance,
        f"{where}: {_short(found)} instead of {_short(wanted)}, a difference of {difference:.1e}",
    )


def _short(numbers: list[float]) -> str:
    return ", ".join(f"{number:.5f}" for number in numbers)


def _refusal(context: Context, topology: str) -> str:
    """Why the configuration refuses the topology; "" when it does not."""
    try:
        RunConfig(**_sections(context.section, topology, str(context.folder)))
    except ConfigError as error:
        return str(error)
    return ""


def _sections(section: dict[str, Any], topology: str, folder: str, name: str = "") -> dict[str, Any]:
    found: dict[str, Any] = sections_on(topology, Path(folder), Path(folder) / (name or topology), steps=RUN_STEPS)
    return found | {"optimizer": section}


def trained(section: dict[str, Any], topology: str, folder: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a run."""
    record = train(_sections(section, topology, folder))
    return record.losses, record.norms


class _Stop:
    def collie_after_step(self, run: Any) -> None:
        if run.step == STOP:
            run.request_stop()


def interrupted(section: dict[str, Any], folder: str) -> None:
    """A run that ends after `STOP` steps and leaves a checkpoint."""
    sections = _sections(section, "tp2", folder, "interrupted")
    sections["checkpoint"] = {"save_steps": STOP}
    train(sections, _Stop())


def gone_on(section: dict[str, Any], folder: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms after that."""
    sections = _sections(section, "dp1", folder, "resumed")
    sections["checkpoint"] = {"resume_from_checkpoint": f"{folder}/interrupted/run"}
    record = train(sections)
    return record.losses, record.norms


# -- level 3 --------------------------------------------------------------------------------------------------------


@check("optimizer", level=3, mutant="stays-on-cpu")
def cuda(context: Context) -> None:
    """On a GPU the weights are those of the CPU."""
    if not torch.cuda.is_available():
        raise Skipped("torch.cuda.is_available() is False: there is no GPU here, or torch was built without it")
    grads = gradients(parameters())
    on_cpu = weights_after(context, grads)
    params = [nn.Parameter(param.detach().cuda()) for param in parameters()]
    run(context, build(context, params), params, [[grad.cuda() for grad in row] for row in grads])
    expect(
        _near([param.cpu() for param in params], on_cpu, 1e-6), "the weights on the GPU differ from those on the CPU"
    )
