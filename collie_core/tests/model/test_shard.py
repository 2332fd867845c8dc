"""Tensor parallelism against the unsharded module or model of one process: outputs and all gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from sharded import assert_same, batches, config_of, family_of, sharded_model, slice_of, start, whole_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding as ScaledEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from collie_core.errors import ModelError
from collie_core.model import collectives
from collie_core.model.blocks import Positions, block_of, make_blocks
from collie_core.model.build import empty_model
from collie_core.model.collectives import Shares
from collie_core.model.family import StockFamily
from collie_core.model.partition import Partition, Placement, Rule, plan
from collie_core.model.shard import (
    cross_entropy,
    gathered_output,
    install_gradient_hooks,
    shard,
    sharded_logits,
    vocabulary_of,
)
from collie_core.model.stages import cut, own_part
from collie_core.topology import Axis, Topology
from collie_testkit.zygote import Zygote

# -- collectives ----------------------------------------------------------------------------------------------------


def collectives_of_rank() -> None:
    """x[r] and w[r] are the input and the gradient of the output of rank r; all of them are known here."""
    axis = start().tp
    rank = axis.rank
    torch.manual_seed(0)
    for length, dim in ((5, 0), (7, 1), (7, -1), (2, 0)):
        shape = (axis.size, 7, length) if dim == 0 else (axis.size, length, 5)
        x, w = (torch.randn(shape, dtype=torch.float64).mT for _ in range(2))  # transposed, so not contiguous
        shares = Shares.even(length, axis)

        def parts(whole: Tensor, shares: Shares = shares, dim: int = dim) -> list[Tensor]:
            return [shares.take(tensor, dim, of) for of, tensor in enumerate(whole)]

        summed, joined = (lambda t: t.sum(0)), (lambda t, s=shares, d=dim, p=parts: s.join(p(t), d))
        mine = lambda t, s=shares, d=dim: s.take(t, d)  # noqa: E731
        check = check_collective
        check("copy_to", (axis,), x[rank], x[rank], w[rank], summed(w))
        check("sum_from", (axis,), x[rank], summed(x), w[rank], w[rank])
        check("gather_from", (shares, dim), parts(x)[rank], joined(x), w[rank], mine(w[rank]))
        check("gather_summed", (shares, dim), parts(x)[rank], joined(x), w[rank], mine(summed(w)))
        check("split_to", (shares, dim), x[rank], mine(x[rank]), mine(w[rank]), joined(w))
        check("scatter_summed", (shares, dim), x[rank], mine(summed(x)), mine(w[rank]), joined(w))


def check_collective(
    name: str, options: tuple[Any, ...], given: Tensor, expected: Tensor, weight: Tensor, gradient: Tensor
) -> None:
    before = given.detach().clone()
    leaf = given.detach().requires_grad_()
    output = getattr(collectives, name)(leaf, *options)
    assert_same(output, expected, name, within=1e-12)
    branch = leaf * 3  # autograd gives one gradient to both branches: neither may write into it
    output.backward(weight, retain_graph=True)
    assert_same(leaf.grad, gradient, name, within=1e-12)
    torch.testing.assert_close(leaf.detach(), before)
    leaf.grad = None
    if output.shape == branch.shape:
        (output + branch).backward(weight)
        assert_same(leaf.grad, gradient + 3 * weight, f"{name} + 3", within=1e-12)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_collectives_and_their_gradients(zygote: Zygote, ranks: int) -> None:
    zygote.run(__file__, "collectives_of_rank", world_size=ranks)


def test_shares_of_a_fused_dimension_with_copies_join_to_the_whole() -> None:
    axis, whole = Axis(4, 1), torch.arange(24).view(2, 12)
    for rule in (Rule(1, (4, 8)), Rule(1, (6, 6), unit=3, copies=2), Rule(1, (12,), unit=3), Rule(1, (7, 5))):
        shares = Shares.by_rule(rule, axis)
        parts = [F.pad(shares.take(whole, 1, rank), (0, shares.longest - shares.size(rank))) for rank in range(4)]
        assert torch.equal(shares.join(parts, 1), whole)
        assert shares.whole == 12
        assert shares.size() == rule.length(4, 1)


# -- single modules -------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """h + row(f(column(h))), as the blocks of a model are."""

    def __init__(self, column: nn.Module, row: nn.Module, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.column, self.row, self.between = column, row, between

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = hidden + self.row(self.between(self.column(hidden)))
        return output


def glu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


def make_pair(kind: str) -> tuple[nn.Module, dict[str, Rule], dict[str, str]]:
    """A module, its rules and its styles. 22 and 11 are uneven over 4 ranks, 11 over 2 too."""
    styles = {"column": "colwise", "row": "rowwise"}
    if kind in ("linear", "no bias", "uneven"):
        width, bias = 11 if kind == "uneven" else 8, kind != "no bias"
        pair = Pair(nn.Linear(6, width, bias=bias), nn.Linear(width, 6, bias=bias), torch.tanh)
        rules = {"column.weight": Rule(0, (width,)), "row.weight": Rule(1, (width,))}
        return pair, rules | ({"column.bias": Rule(0, (width,))} if bias else {}), styles
    if kind == "conv1d":
        rules = {"column.weight": Rule(1, (22,)), "column.bias": Rule(0, (22,)), "row.weight": Rule(0, (22,))}
        return Pair(Conv1D(22, 6), Conv1D(6, 22), torch.tanh), rules, styles
    if kind == "packed":
        rules = {"column.weight": Rule(0, (11, 11)), "column.bias": Rule(0, (11, 11)), "row.weight": Rule(1, (11,))}
        return Pair(nn.Linear(6, 22), nn.Linear(11, 6), glu), rules, styles | {"column": "packed_colwise"}
    if kind == "packed row":
        rules = {"column.weight": Rule(1, (11, 11)), "column.bias": Rule(0, (11, 11)), "row.weight": Rule(0, (11, 11))}
        both = {"column": "packed_colwise:2", "row": "packed_rowwise:2"}
        return Pair(Conv1D(22, 6), Conv1D(6, 22), torch.tanh), rules, both
    assert kind == "whole between"
    rules = {"column.weight": Rule(0, (11, 11)), "column.bias": Rule(0, (11, 11)), "row.weight": Rule(1, (22,))}
    both = {"column": "colwise_gather_output", "row": "rowwise_split_input"}
    return Pair(nn.Linear(6, 22), nn.Linear(22, 6), lambda h: F.layer_norm(h, (22,)).sin()), rules, both


def partition_of(
    model: nn.Module, size: int, rules: Mapping[str, Rule], styles: Mapping[str, str], head: str = ""
) -> Partition:
    placements = {
        name: Placement(name, tuple(parameter.shape), 0, rules.get(name))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    return Partition(size, (0, 0), placements, styles, (), "", "", head, "")


PAIRS = ("linear", "no bias", "uneven", "conv1d", "packed", "packed row", "whole between")


def pairs_of_rank() -> None:
    topology = start()
    for kind in PAIRS:
        compare_pair(kind, topology)


def compare_pair(kind: str, topology: Topology) -> None:
    torch.manual_seed(0)
    whole, rules, styles = make_pair(kind)
    whole = whole.double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    part = copy.deepcopy(whole)
    shard(part, partition_of(part, topology.tp.size, rules, styles), StockFamily("none"), topology)
    install_gradient_hooks(part)
    for _ in range(2):
        hidden = torch.randn(3, 6, 5, dtype=torch.float64)
        hidden = hidden.mT.contiguous() if kind in ("conv1d", "packed row") else hidden.mT  # a Conv1D takes views
        inputs = [hidden.detach().requires_grad_() for _ in range(2)]
        outputs = [model(given) for model, given in zip((whole, part), inputs, strict=True)]
        assert_same(outputs[1], outputs[0], kind, within=1e-12)
        weight = torch.randn_like(outputs[0]).mT.contiguous().mT
        for output in outputs:
            output.backward(weight)
        assert_same(inputs[1].grad, inputs[0].grad, kind, within=1e-12)
    for name, parameter in part.named_parameters():
        gradient = whole.get_parameter(name).grad
        assert gradient is not None
        if name in rules:
            gradient = Shares.by_rule(rules[name], topology.tp).take(gradient, rules[name].dim)
        assert_same(parameter.grad, gradient, name, within=1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
def test_pairs_of_linear_modules(zygote: Zygote, ranks: int) -> None:
    zygote.run(__file__, "pairs_of_rank", world_size=ranks)


def embedding_of_rank() -> None:
    topology = start()
    torch.manual_seed(0)
    for make in (
        lambda: nn.Embedding(11, 6, padding_idx=8),
        lambda: ScaledEmbedding(11, 6, padding_idx=0, embed_scale=3.0),
        lambda: nn.Embedding(11, 6),
    ):
        whole = nn.ModuleDict({"table": make()}).double()
        part = copy.deepcopy(whole)
        rule = Rule(0, (11,))
        styles = {"table": "embedding_rowwise"}
        shard(part, partition_of(part, topology.tp.size, {"table.weight": rule}, styles), StockFamily("n"), topology)
        assert isinstance(part["table"], type(whole["table"]))
        ids = torch.randint(0, 11, (7, 4)).T
        outputs = [model["table"](ids) for model in (whole, part)]
        assert_same(outputs[1], outputs[0], within=1e-12)
        weight = torch.randn_like(outputs[0])
        for output in outputs:
            output.backward(weight)
        gradient = Shares.by_rule(rule, topology.tp).take(whole["table"].weight.grad, 0)
        torch.testing.assert_close(part["table"].weight.grad, gradient)


@pytest.mark.parametrize("ranks", [2, 4])
def test_embeddings_with_padding_and_a_scale(zygote: Zygote, ranks: int) -> None:
    zygote.run(__file__, "embedding_of_rank", world_size=ranks)


def experts_of_rank(width: int) -> None:
    topology = start()
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=6, intermediate_size=width, num_local_experts=3)
    config._experts_implementation = "eager"
    whole = nn.ModuleDict({"experts": MixtralExperts(config)}).double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    part = copy.deepcopy(whole)
    rules = {"experts.gate_up_proj": Rule(1, (width, width)), "experts.down_proj": Rule(2, (width,))}
    styles = {
        "experts": "moe_tp_experts",
        "experts.gate_up_proj": "packed_colwise",
        "experts.down_proj": "rowwise",
    }
    shard(part, partition_of(part, topology.tp.size, rules, styles), StockFamily("none"), topology)
    assert part["experts"].intermediate_dim == part["experts"].down_proj.shape[2]
    index = torch.randint(0, 3, (5, 2))
    inputs = [
        [
            torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            for shape in ((5, 6), (5, 2))
        ]
        for _ in range(2)
    ]
    outputs = []
    for model, (hidden, weights) in zip((whole, part), inputs, strict=True):
        output = model["experts"](hidden.requires_grad_(), index, weights.requires_grad_())
        (output * torch.arange(6)).sum().backward()
        outputs.append(output)
    assert_same(outputs[1], outputs[0], within=1e-12)
    for mine, theirs in zip(inputs[1], inputs[0], strict=True):
        assert_same(mine.grad, theirs.grad, within=1e-12)
    for name, rule in rules.items():
        gradient = whole.get_parameter(name).grad
        assert gradient is not None
        mine = Shares.by_rule(rule, topology.tp).take(gradient, rule.dim)
        assert_same(part.get_parameter(name).grad, mine, name, within=1e-12)


@pytest.mark.parametrize(("ranks", "width"), [(2, 8), (4, 7)])
def test_experts(zygote: Zygote, ranks: int, width: int) -> None:
    zygote.run(__file__, "experts_of_rank", world_size=ranks, args=(width,))


def linear_model(bias: bool = False) -> nn.ModuleDict:
    return nn.ModuleDict({"linear": nn.Linear(4, 4, bias=bias)})


@pytest.mark.parametrize(
    ("model", "rules", "styles", "message"),
    [
        (linear_model(), {}, {"linear": "mla_kv_a_proj"}, "linear has the tensor-parallel style 'mla_kv_a_proj'"),
        (
            linear_model(),
            {"linear.weight": Rule(0, (3,))},
            {"linear": "colwise"},
            r"linear.weight: its dimension of 3 leaves nothing .*tensor_parallel_size=4",
        ),
        (
            nn.ModuleDict({"table": nn.Embedding(8, 4, max_norm=1.0)}),
            {"table.weight": Rule(0, (8,))},
            {"table": "embedding_rowwise"},
            "table is split by its rows in the plan, which is not supported for a Embedding",
        ),
        (
            nn.ModuleDict({"bilinear": nn.Bilinear(4, 4, 4)}),
            {"bilinear.weight": Rule(0, (4,)), "bilinear.bias": Rule(0, (4,))},
            {"bilinear": "colwise"},
            "bilinear is split by its outputs",
        ),
        (
            nn.ModuleDict({"bilinear": nn.Bilinear(4, 4, 4)}),
            {"bilinear.weight": Rule(1, (4,))},
            {"bilinear": "rowwise"},
            "bilinear is split by its inputs",
        ),
        (
            nn.ModuleDict({"experts": nn.Bilinear(4, 4, 4)}),
            {"experts.weight": Rule(1, (4,))},
            {"experts": "moe_tp_experts"},
            "experts.bias acts on sums",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    model: nn.Module, rules: dict[str, Rule], styles: dict[str, str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        shard(model, partition_of(model, 4, rules, styles), StockFamily("none"), Topology(tp=Axis(4, 1)))


def test_an_attribute_that_cannot_be_divided_is_refused() -> None:
    model = linear_model()
    model["linear"].num_heads = 6
    family = StockFamily("none", divided={"linear": ("num_heads",)})
    with pytest.raises(ModelError, match=r"linear.num_heads=6 cannot be divided by parallel.tensor_parallel_size=4"):
        shard(model, partition_of(model, 4, {}, {}), family, Topology(tp=Axis(4, 1)))


def test_one_rank_changes_nothing() -> None:
    model = linear_model()
    before = {id(module): type(module) for module in model.modules()}
    shard(model, partition_of(model, 1, {}, {"linear": "colwise"}), StockFamily("none"), Topology())
    install_gradient_hooks(model)
    assert before == {id(module): type(module) for module in model.modules()}
    assert vocabulary_of(model) is None


# -- cross-entropy --------------------------------------------------------------------------------------------------


def cross_entropy_of_rank(vocabulary: int) -> None:
    topology = start()
    generator = torch.Generator().manual_seed(0)
    for dtype, scale, within in ((torch.float32, 3.0, 2e-6), (torch.float32, 1e4, 2e-6), (torch.bfloat16, 3.0, 1e-2)):
        whole = (scale * torch.randn(3, 5, vocabulary, generator=generator)).to(dtype)
        targets = torch.randint(0, vocabulary, (3, 5), generator=generator)
        targets[0, 1:3] = -100
        weight = torch.randn(3, 5, generator=generator)
        expected = whole.double().requires_grad_()
        losses = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
        (losses * weight).sum().backward()

        head = head_of(vocabulary, topology)
        facts = vocabulary_of(head)
        assert facts is not None
        share = slice(facts.begin, facts.begin + facts.size)
        mine = whole[..., share].detach().clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(no_float32_of(mine), lambda tensor: tensor):
            result = cross_entropy(mine, targets, facts)
        assert result.dtype == torch.float32
        assert (result[targets == -100] == 0).all()
        assert_same(result.double(), losses.detach(), "losses", within=2e-6)
        (result * weight).sum().backward()
        assert expected.grad is not None
        assert mine.grad is not None
        assert mine.grad.dtype == dtype
        assert_same(mine.grad.double(), expected.grad[..., share], "gradient", within=within)

    outside = torch.full((3, 5), vocabulary)
    assert cross_entropy(mine.detach(), outside, facts).isinf().all()


def no_float32_of(logits: Tensor) -> Callable[[Tensor], Tensor]:
    """Nothing of the size of the logits is kept for backward but the logits themselves."""

    def keep(tensor: Tensor) -> Tensor:
        assert tensor.shape != logits.shape or tensor.data_ptr() == logits.data_ptr()
        return tensor

    return keep


def head_of(vocabulary: int, topology: Topology) -> nn.Module:
    model = nn.ModuleDict({"head": nn.Linear(2, vocabulary, bias=False)})
    styles = {"head": "colwise"}
    rules = {"head.weight": Rule(0, (vocabulary,))}
    shard(model, partition_of(model, topology.tp.size, rules, styles, "head"), StockFamily("none"), topology)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "vocabulary"), [(2, 64), (2, 67), (4, 67)])
def test_cross_entropy_is_exact(zygote: Zygote, ranks: int, vocabulary: int) -> None:
    zygote.run(__file__, "cross_entropy_of_rank", world_size=ranks, args=(vocabulary,))


def test_cross_entropy_of_a_whole_vocabulary() -> None:
    logits, targets = torch.randn(2, 3, 7), torch.tensor([[1, -100, 3], [0, 6, -100]])
    losses = cross_entropy(logits, targets, None)
    assert losses.shape == (2, 3)
    assert (losses[targets == -100] == 0).all()
    torch.testing.assert_close(losses.sum(), F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))


# -- whole models ---------------------------------------------------------------------------------------------------


def loss_of(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The summed loss, over the share of the vocabulary that the model has, and the whole logits."""
    targets = F.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)
    with sharded_logits(model):
        logits = model(**batch, use_cache=False).logits
    facts = vocabulary_of(model)
    loss = cross_entropy(logits, targets, facts).sum()
    with torch.no_grad():
        return loss, model(**batch, use_cache=False).logits


def compare(whole: Any, part: Any, partition: Partition, topology: Topology) -> None:
    """Logits and accumulated gradients of two micro-batches; both forwards before the first backward, as in 1F1B."""
    install_gradient_hooks(part)
    install_gradient_hooks(part)
    losses = []
    for batch in batches():
        expected, expected_logits = loss_of(whole, batch)
        loss, logits = loss_of(part, batch)
        assert_same(logits, expected_logits, "logits")
        assert_same(loss, expected, "loss")
        losses += [(expected, loss)]
    for pair in losses:
        for loss in pair:
            loss.backward()
    squares = torch.zeros(())
    for name, parameter in part.named_parameters():
        gradient = whole.get_parameter(name).grad
        assert gradient is not None
        assert_same(parameter.grad, slice_of(gradient, partition.placements[name].rule, topology), name, within=5e-5)
        if topology.tp.rank == 0 or getattr(parameter, "tensor_model_parallel", False):
            squares += parameter.grad.square().sum()
    torch.distributed.all_reduce(squares, group=topology.tp.group)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in whole.parameters()])
    assert_same(squares.sqrt(), norm, "norm")


def models_of_rank(names: list[str], sequence_parallel: bool, checkpointing: bool) -> None:
    topology = start()
    for name in names:
        print(name, flush=True)  # into the log of a failure
        config = config_of(name)
        whole = whole_model(config)
        part, partition = sharded_model(whole, config, topology, sequence_parallel=sequence_parallel)
        if checkpointing:
            part.gradient_checkpointing_enable({"use_reentrant": False})
        compare(whole, part, partition, topology)


ON_TWO = ["llama", "llama tied", "llama biases", "llama one kv", "qwen3", "mixtral", "gemma2", "gpt2", "phi3"]
ON_FOUR = ["llama", "llama biases", "llama one kv", "qwen3 one kv", "olmo2", "gemma2"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("ranks", "names"), [(2, ON_TWO), (4, ON_FOUR)])
def test_models(zygote: Zygote, ranks: int, names: list[str], sequence_parallel: bool, checkpointing: bool) -> None:
    zygote.run(__file__, "models_of_rank", world_size=ranks, args=(names, sequence_parallel, checkpointing))


def facts_of_rank() -> None:
    """What stands on a sharded model, and what others ask it."""
    topology, config = start(), config_of("llama")
    whole = whole_model(config)
    part, _ = sharded_model(whole, config, topology)
    layer = part.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, nn.Linear)
    assert type(layer.self_attn.q_proj).__name__ == "ColumnParallelLinear"
    assert layer.self_attn.q_proj.out_features == 16
    assert layer.mlp.down_proj.in_features == 23

    ids = batches()[0]["input_ids"]
    outputs: list[Tensor] = []
    for model in (whole, part):
        hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *call: outputs.append(call[2]))
        model(ids, use_cache=False)
        hook.remove()
    expected, mine = outputs
    assert_same(gathered_output(layer.self_attn.k_proj, mine), expected)
    assert gathered_output(layer.mlp.down_proj, mine) is None
    assert gathered_output(part.lm_head, mine) is None
    with sharded_logits(part):
        assert part(ids).logits.shape[-1] == (34, 33)[topology.tp.rank]
    assert part(ids).logits.shape[-1] == 67

    sequence = sharded_model(whole, config, topology, sequence_parallel=True)[0]
    for name in ("input_layernorm", "self_attn", "self_attn.v_proj", "mlp.down_proj", "post_attention_layernorm", ""):
        wholes: list[Tensor] = []
        for model in (whole, part, sequence):
            module = model.model.layers[1].get_submodule(name)
            hook = module.register_forward_hook(lambda *call, wholes=wholes: wholes.append(whole_of(call[0], call[2])))
            model(ids, use_cache=False)
            hook.remove()
        for mine in wholes[1:]:
            assert_same(mine, wholes[0], name)

    twin = copy.deepcopy(part)  # as adapters do with single modules
    assert twin.lm_head.shares.axis.group is topology.tp.group
    install_gradient_hooks(twin)
    assert twin.lm_head.weight.tensor_model_parallel
    assert_same(twin(ids).logits, part(ids).logits)


def whole_of(module: nn.Module, output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, tuple) else output
    whole = gathered_output(module, tensor)
    return tensor if whole is None else whole


def test_what_others_ask_of_a_sharded_model(zygote: Zygote) -> None:
    zygote.run(__file__, "facts_of_rank", world_size=2)


# -- sequence parallelism -------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """What an adapter may put into a block: a parameter that works on what the block computes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.factor * self.inner(hidden)
        return output


class TwoInputs(nn.Module):
    """Like cross-attention: its sharded modules use two tensors that have gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.out = nn.Linear(6, 4, bias=False)

    def forward(self, hidden_states: Tensor, other: Tensor) -> Tensor:
        output: Tensor = self.out(self.first(hidden_states) * self.second(other))
        return output


def blocks_of_rank() -> None:
    """One collective for the modules that share an input, and one for each where that would miss another input."""
    topology, config = start(), config_of("llama")
    part, _ = sharded_model(whole_model(config), config, topology)
    calls: list[int] = []
    original, collectives.total = collectives.total, lambda *call: calls.append(1) or original(*call)
    part(batches()[0]["input_ids"], use_cache=False).logits.sum().backward()
    # Forward: the embedding and two per layer. Backward: the head and two per layer.
    assert len(calls) == 2 * (1 + 2 * 3)

    torch.manual_seed(0)
    whole = TwoInputs().double()
    block = copy.deepcopy(whole)
    rules = {"first.weight": Rule(0, (6,)), "second.weight": Rule(0, (6,)), "out.weight": Rule(1, (6,))}
    styles = {"first": "colwise", "second": "colwise", "out": "rowwise"}
    shard(block, partition_of(block, 2, rules, styles), StockFamily("none"), topology)
    layer = nn.ModuleDict({"block": block})
    for positions in (None, Positions(topology.tp)):
        make_blocks(layer, topology.tp, positions)
        inputs = [[torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]]
        inputs.append([given.detach().requires_grad_() for given in inputs[0]])
        if positions is not None:
            with pytest.raises(ModelError, match="a TwoInputs takes several tensors with gradients"):
                block(*inputs[1])
            continue
        for module, given in zip((whole, block), inputs, strict=True):
            module(given[0], other=given[1]).square().sum().backward()
        for mine, theirs in zip(inputs[1], inputs[0], strict=True):
            assert_same(mine.grad, theirs.grad, within=1e-12)


def test_blocks_sum_the_gradient_of_their_input_once(zygote: Zygote) -> None:
    zygote.run(__file__, "blocks_of_rank", world_size=2)


def sequence_of_rank() -> None:
    """Layers hold shares; blocks notice modules that come later; single positions work, as generation has them."""
    topology, config = start(), config_of("llama biases")
    whole = whole_model(config)
    part, partition = sharded_model(whole, config, topology, sequence_parallel=True)
    seen: list[tuple[str, int]] = []
    for name in ("input_layernorm", "self_attn.q_proj", "mlp", "post_attention_layernorm", "mlp.down_proj"):
        part.model.layers[1].get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.append((name, output.shape[1]))
        )
    ids = batches()[0]["input_ids"]
    part(ids)
    mine = (4, 3)[topology.tp.rank]
    assert seen == [
        ("input_layernorm", mine),
        ("self_attn.q_proj", 7),
        ("post_attention_layernorm", mine),
        ("mlp.down_proj", mine),
        ("mlp", mine),
    ]
    with torch.no_grad():
        assert_same(part(ids[:, :1], use_cache=False).logits, whole(ids[:, :1], use_cache=False).logits)
        options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
        texts = [model.eval().generate(ids[:, :3], **options) for model in (whole, part)]
        assert torch.equal(*texts)

    placements = dict(partition.placements)
    for path in ("model.layers.0.mlp.down_proj", "model.layers.2.self_attn.o_proj"):
        for model in (whole.train(), part.train()):
            model.set_submodule(path, Scale(model.get_submodule(path)))
        for leaf in ("weight", "bias"):
            placements[f"{path}.inner.{leaf}"] = placements[f"{path}.{leaf}"]
        placements[f"{path}.factor"] = Placement("", (), 0)
    compare(whole, part, replace(partition, placements=placements), topology)
    blocks = [block for layer in part.model.layers for child in layer.children() if (block := block_of(child))]
    assert [block.only_shards for block in blocks] == [True, False, True, True, False, True]


def test_sequence_parallel_layers_hold_shares_and_follow_changes(zygote: Zygote) -> None:
    zygote.run(__file__, "sequence_of_rank", world_size=2)


def stages_of_rank() -> None:
    """Each rank computes both pipeline stages of its share, one after the other."""
    topology, config = start(), config_of("llama")
    whole, family, ids = whole_model(config), family_of(config), batches()[0]["input_ids"]
    partition = plan(empty_model(family, config), family, tensor_size=2, pipeline_size=2)
    given: dict[str, Tensor] = {"input_ids": ids}
    for number in range(2):
        place = Topology(tp=topology.tp, pp=Axis(2, number))
        stage = copy.deepcopy(whole)
        cut(stage, partition, family, place)
        shard(stage, partition, family, place, sequence_parallel=True)
        with own_part(stage), torch.no_grad():
            given = {"inputs_embeds": stage(**given, use_cache=False).logits}
        assert (vocabulary_of(stage) is None) == (number == 0)
    assert_same(given["inputs_embeds"], whole(ids).logits)


def test_sequence_parallel_stages(zygote: Zygote) -> None:
    zygote.run(__file__, "stages_of_rank", world_size=2)


def test_a_layer_that_may_mix_positions_is_refused() -> None:
    config = config_of("llama")
    family, model = family_of(config), empty_model(family_of(config), config)
    partition = plan(model, family, tensor_size=2)
    model.model.layers[1].input_layernorm = nn.Conv1d(32, 32, 3, bias=False, device="meta")
    message = r"sequence_parallel: layers.1.input_layernorm.weight of shape \[32, 32, 3\] is neither split"
    with pytest.raises(ModelError, match=message):
        shard(model, partition, family, Topology(tp=Axis(2, 0)), sequence_parallel=True)
