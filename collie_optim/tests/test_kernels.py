"""However an update is applied, each element is updated once, by the same arithmetic."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from elementwise_cases import SHAPES, gradients, start
from torch import Tensor

from collie_core.api import RunError
from collie_optim import kernels
from collie_optim.adan import ADAN, Adan
from collie_optim.kernels import Row, Update, apply, blocks, bundles
from collie_optim.lion import LION, Lion
from collie_optim.sophia import ESTIMATE, SOPHIA, Sophia

lion, adan, sophia = Lion([torch.zeros(1)], weight_decay=0.1), Adan([torch.zeros(1)]), Sophia([torch.zeros(1)])
RULES: dict[str, tuple[Update, int, dict[str, float]]] = {  # the update, the tensors in a row, coefficients
    "lion": (LION, 3, lion.rule(lion.param_groups[0], 3)[1]),
    "adan": (ADAN, 6, adan.rule(adan.param_groups[0], 3)[1]),
    "sophia": (SOPHIA, 4, sophia.rule(sophia.param_groups[0], 3)[1]),
    "estimate": (ESTIMATE, 2, {"target_tokens": 10.0, "one_minus_beta2": 0.01}),
}
every_update = pytest.mark.parametrize("name", RULES)
SIZES: list[tuple[int, ...]] = [*SHAPES, (0,), (1,), (2,), (1000,)]


def rows_of(name: str, dtype: torch.dtype = torch.float32, sizes: list[tuple[int, ...]] = SIZES) -> list[Row]:
    """Rows of all sizes, one of them transposed. State is positive, as that of squares must be."""
    _, tensors, _ = RULES[name]
    rows = []
    for number, shape in enumerate(sizes):
        grad, *state = gradients(shape, tensors - 1, number)
        row = [start(shape, number), grad, *(tensor.abs() for tensor in state)]
        rows.append(tuple((tensor.t() if shape == SHAPES[-1] else tensor).to(dtype) for tensor in row))
    return rows


def plain(name: str, rows: list[Row]) -> list[Row]:
    """Copies of the rows after one update, without any of the ways to be faster."""
    update, _, coefficients = RULES[name]
    rows = copy.deepcopy(rows)
    for row in rows:
        update.one(*row, **coefficients)
    return rows


def assert_equal(rows: list[Row], expected: list[Row], **tolerance: float) -> None:
    for row, wanted in zip(rows, expected, strict=True):
        for tensor, value in zip(row, wanted, strict=True):
            if tolerance:
                torch.testing.assert_close(tensor, value, **tolerance)
            else:
                assert torch.equal(tensor, value)


# -- eager --------------------------------------------------------------------------------------------------


@every_update
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lists_and_single_tensors_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    """Not in bfloat16: on a CPU, where lists are not used, `_foreach_mul_` rounds its factor to the tensors' dtype."""
    update, _, coefficients = RULES[name]
    rows = rows_of(name, dtype)
    expected = plain(name, rows)
    update.many(*map(list, zip(*rows, strict=True)), **coefficients)
    assert_equal(rows, expected)
    assert any(not torch.equal(*pair) for pair in zip(rows[1], rows_of(name, dtype)[1], strict=True))


@every_update
def test_blocks_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    update, _, coefficients = RULES[name]
    rows = rows_of(name)
    expected = plain(name, rows)
    monkeypatch.setattr(kernels, "CACHE_BLOCK", 7)
    apply(update, rows, coefficients, kernel="eager", elements=0)
    assert_equal(rows, expected)


def test_blocks_are_small_and_cover_every_element() -> None:
    flat, transposed, scalar = torch.arange(20.0).reshape(4, 5), torch.zeros(4, 5).t(), torch.zeros(())
    parts = list(blocks([(flat, flat), (transposed, transposed), (scalar, scalar)], 6))
    assert [part[0].numel() for part in parts] == [6, 6, 6, 2, 20, 1]
    assert torch.equal(torch.cat([part[0] for part in parts[:4]]), torch.arange(20.0))
    assert all(part[0].data_ptr() == part[1].data_ptr() for part in parts)  # views, not copies
    assert next(blocks([(flat, transposed)], 6))[0] is flat  # one of a row lies in pieces: all stay whole


def test_bundles_are_bounded_and_cover_every_element() -> None:
    rows: list[Row] = [(torch.zeros(size),) for size in (3, 4, 25, 1, 1)]
    found = [[block[0].numel() for block in bundle] for bundle in bundles(rows, 10)]
    assert found == [[3, 4, 10], [10], [5, 1, 1]]


def test_devices_other_than_the_cpu_are_given_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "GPU_BUNDLE", 10)
    calls: list[list[int]] = []

    def many(params: list[Tensor], grads: list[Tensor], **_: float) -> None:
        calls.append([param.numel() for param in params])

    rows: list[Row] = [(torch.zeros(size, device="meta"),) * 2 for size in (4, 7, 3)]
    apply(Update(one=never, many=many), rows, {"lr": 1.0}, kernel="eager", elements=0)
    assert calls == [[4, 7], [3]]


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("must not be called")


# -- the choice ---------------------------------------------------------------------------------------------


def increment(param: Tensor, grad: Tensor, *, lr: float) -> None:
    param.add_(grad * lr)


def test_auto_compiles_what_is_large_only(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def instead(update: Update, rows: list[Row], coefficients: dict[str, float]) -> tuple[list[Row], str]:
        compiled.append(len(rows))
        return [], ""

    monkeypatch.setattr(kernels, "_compiled", instead)
    row = (torch.zeros(2), torch.ones(2))
    apply(Update(increment, never), [row], {"lr": 1.0}, kernel="auto", elements=9_999_999)
    assert (compiled, row[0].tolist()) == ([], [1.0, 1.0])
    apply(Update(increment, never), [row], {"lr": 1.0}, kernel="auto", elements=10_000_000)
    assert (compiled, row[0].tolist()) == ([1], [1.0, 1.0])
    apply(Update(increment, never), [row], {"lr": 1.0}, kernel="eager", elements=10_000_000)
    apply(Update(increment, never), [row], {"lr": 1.0}, kernel="compiled", elements=1)
    assert (compiled, row[0].tolist()) == ([1, 1], [2.0, 2.0])


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without a C++ compiler."""
    import torch._inductor.config as config

    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "_NOT_COMPILED", set())
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        yield
    torch._dynamo.reset()


def fresh() -> Callable[..., None]:
    """An update that was never compiled."""

    def update(param: Tensor, grad: Tensor, *, lr: float) -> None:
        param.add_(grad * lr)

    return update


def test_auto_without_a_compiler_is_eager_and_says_so_once(no_compiler: None, caplog: pytest.LogCaptureFixture) -> None:
    update = Update(fresh(), never)
    rows: list[Row] = [(torch.zeros(4), torch.ones(4)) for _ in range(2)]
    with caplog.at_level(logging.WARNING, "collie"):
        for _ in range(2):
            apply(update, rows, {"lr": 0.5}, kernel="auto", elements=kernels.WORTH_COMPILING)
    assert [row[0].tolist() for row in rows] == [[1.0] * 4] * 2
    assert len(caplog.messages) == 1
    assert "not compiled" in caplog.text
    assert "No working C++ compiler found" in caplog.text


def test_compiled_without_a_compiler_is_an_error(no_compiler: None) -> None:
    rows: list[Row] = [(torch.zeros(4), torch.ones(4))]
    with pytest.raises(RunError, match=r"kernel=compiled.*No working C\+\+ compiler found.*or choose kernel=auto"):
        apply(Update(fresh(), never), rows, {"lr": 0.5}, kernel="compiled", elements=4)
    assert rows[0][0].tolist() == [0.0] * 4


def test_a_failure_half_way_updates_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    def function(update: Callable[..., None]) -> Callable[..., None]:
        def run(param: Tensor, grad: Tensor, *, lr: Tensor) -> None:
            if param.numel() == 3:
                raise FailOnRecompileLimitHit("too many cases")
            update(param, grad, lr=lr)

        return run

    monkeypatch.setattr(kernels, "_function", function)
    monkeypatch.setattr(kernels, "_NOT_COMPILED", set())
    rows: list[Row] = [(torch.zeros(size), torch.ones(size)) for size in (2, 3, 2, 1)]
    apply(Update(increment, never), rows, {"lr": 1.0}, kernel="auto", elements=kernels.WORTH_COMPILING)
    assert all(torch.equal(param, grad) for param, grad in rows)


# -- compiled -----------------------------------------------------------------------------------------------


def compiler_is_missing() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return True
    return False


needs_compiler = pytest.mark.skipif(compiler_is_missing(), reason="torch.compile finds no C++ compiler here")


@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in RULES] + [("adan", torch.float64), ("lion", torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_compiled_once_for_all_shapes_and_coefficients(name: str, dtype: torch.dtype) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    update, _, coefficients = RULES[name]
    rows = rows_of(name, dtype)
    for step in range(1, 5):
        # Weights as parameters and as plain tensors, coefficients that change, 0 and 1 among them.
        rows = [(row[0].detach().requires_grad_(step == 2), *row[1:]) for row in rows]
        changed = {key: (value / step, 0.0, 1.0, value)[step - 1] for key, value in coefficients.items()}
        if "eps" in changed:
            changed["eps"] = coefficients["eps"]  # 0 / 0 is not to be compared
        before = copy.deepcopy(rows)
        with torch.no_grad():
            apply(update, rows, changed, kernel="compiled", elements=0)
            for row in before:
                update.one(*row, **changed)
        # One unit in the last place of the largest numbers, some 10; bfloat16 is rounded once, not at each operation.
        assert_equal(rows, before, rtol=0, atol={torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 0.02))
    assert counters["stats"]["unique_graphs"] == 1


@needs_compiler
def test_autograd_sees_that_compiled_code_changed_a_parameter() -> None:
    update, _, coefficients = RULES["lion"]
    param = torch.ones(4, requires_grad=True)
    loss = param.square().sum()
    with torch.no_grad():
        apply(update, [(param, torch.ones(4), torch.ones(4))], coefficients, kernel="compiled", elements=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
@pytest.mark.parametrize("name", ["lion", "adan"])
def test_half_precision_is_rounded_once(name: str) -> None:
    update, _, coefficients = RULES[name]
    rows = rows_of(name, torch.bfloat16, [(1000,)])
    exact = plain(name, [tuple(tensor.float() for tensor in rows[0])])[0]
    apply(update, rows, coefficients, kernel="compiled", elements=0)
    for tensor, wanted in zip(rows[0], exact, strict=True):
        assert torch.equal(tensor, wanted.bfloat16())
