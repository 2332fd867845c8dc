"""Dropout that belongs to samples: the same for every cut, packing, padding and topology, and otherwise dropout."""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import Any

import pytest
import torch
from sharded import assert_same, batches, config_of, sharded_model, slice_of, start, whole_model
from torch import Tensor, nn
from transformers import CodeGenConfig, CodeGenForCausalLM, PretrainedConfig

from collie_core.errors import ModelError
from collie_core.model.dropout import KERNEL, DropoutState, SampleDropout, install
from collie_core.model.layers import RowParallel
from collie_core.model.partition import Rule
from collie_core.model.shard import cross_entropy, install_gradient_hooks, sharded_logits, vocabulary_of
from collie_core.topology import Axis, Topology
from collie_testkit.zygote import Zygote

SEED = 5
WIDTH = 6

Layout = tuple[tuple[tuple[int, int], ...], ...]


def dropout_model(probability: float = 0.5) -> tuple[nn.Module, DropoutState]:
    model = nn.ModuleDict({"first": nn.Dropout(probability), "second": nn.Dropout(probability)})
    return model, install(model, Topology())


def mask_of(model: nn.Module, state: DropoutState, layout: Layout, length: int, seed: int = SEED) -> Tensor:
    """What the module `first` keeps of rows of so many positions, [B, L, WIDTH]."""
    with state.samples(seed, layout):
        output: Tensor = model.get_submodule("first")(torch.ones(len(layout), length, WIDTH))
    return output != 0


def test_a_sample_drops_the_same_wherever_it_lies() -> None:
    model, state = dropout_model()
    alone = {position: mask_of(model, state, (((position, 4 + position),),), 4 + position)[0] for position in range(3)}
    together = mask_of(model, state, (((0, 4),), ((2, 6),), ((1, 5),)), 9)
    packed = mask_of(model, state, (((2, 6), (0, 4), (1, 5)),), 16)
    for masks in (
        {0: together[0, :4], 2: together[1, :6], 1: together[2, :5]},
        {2: packed[0, :6], 0: packed[0, 6:10], 1: packed[0, 10:15]},
    ):
        for position, mask in masks.items():
            assert torch.equal(mask, alone[position])


def test_masks_differ_by_sample_module_and_seed() -> None:
    model, state = dropout_model()
    layout = (((0, 40),), ((1, 40),))
    masks = mask_of(model, state, layout, 40)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(mask_of(model, state, layout, 40, seed=6), masks)
    with state.samples(SEED, layout):
        assert not torch.equal(model.get_submodule("second")(torch.ones(2, 40, WIDTH)) != 0, masks)


def test_as_many_are_dropped_as_asked_and_the_rest_is_scaled() -> None:
    model, state = dropout_model(0.3)
    inputs = torch.rand(2, 500, 100) + 1
    inputs.requires_grad_()
    before = torch.get_rng_state()
    with state.samples(SEED, (((0, 500),), ((1, 500),))):
        output = model.get_submodule("first")(inputs)
    kept = output != 0
    assert abs(kept.float().mean().item() - 0.7) < 0.005  # 3.5 standard deviations of 10^5 draws
    assert kept.float().mean(1).std() < 1.3 * (0.7 * 0.3 / 500) ** 0.5  # no feature is dropped more than another
    torch.testing.assert_close(output[kept], inputs[kept] / 0.7)
    output.sum().backward()
    torch.testing.assert_close(inputs.grad, kept / 0.7)
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_and_no_probability_change_nothing() -> None:
    model, state = dropout_model(0.5)
    never = nn.ModuleDict({"never": nn.Dropout(0.0)})
    install(never, Topology())
    assert type(never["never"]) is nn.Dropout
    inputs = torch.rand(1, 4, WIDTH)
    with state.samples(SEED, (((0, 4),),)):
        assert model.eval().get_submodule("first")(inputs) is inputs


def test_outside_of_samples_it_is_torch_dropout() -> None:
    model, _ = dropout_model(0.5)
    outputs = []
    for module in (model.get_submodule("first"), nn.Dropout(0.5)):
        torch.manual_seed(0)
        outputs.append(module(torch.ones(3, 7)))
    assert torch.equal(*outputs)


def test_what_is_no_hidden_state_is_refused_where_ranks_must_agree() -> None:
    model = nn.ModuleDict({"gate": nn.Dropout(0.5)})
    alone = copy.deepcopy(model)
    state = install(alone, Topology())
    with state.samples(SEED, (((0, 4),),)):
        assert (alone["gate"](torch.ones(100, 100)) == 0).any()
    state = install(model, Topology(tp=Axis(2, 0)))
    with (
        state.samples(SEED, (((0, 4),),)),
        pytest.raises(ModelError, match=r"dropout in gate of a tensor of shape \[4, 6\]"),
    ):
        model["gate"](torch.ones(4, 6))
    with state.samples(SEED, (((0, 4),),)), pytest.raises(ModelError, match=r"shape \[1, 3, 6\]"):
        model["gate"](torch.ones(1, 3, 6))  # shorter than the sample


def test_an_adapter_on_a_cut_input_takes_its_features_of_the_mask() -> None:
    """As peft has it: `lora_dropout` beside `base_layer`, whose inputs are cut."""
    from collie_core.model.family import StockFamily
    from collie_core.model.partition import Partition, Placement
    from collie_core.model.shard import shard

    masks = []
    for axis in (Axis(), Axis(2, 0), Axis(2, 1)):
        model = nn.ModuleDict({"base_layer": nn.Linear(7, 3, bias=False)})
        placement = Placement("base_layer.weight", (3, 7), 0, Rule(1, (7,)))
        styles = {"base_layer": "rowwise"}
        partition = Partition(axis.size, (0, 0), {"base_layer.weight": placement}, styles, (), "", "", "", "")
        shard(model, partition, StockFamily("none"), Topology(tp=axis))
        assert isinstance(model["base_layer"], RowParallel) == (axis.size == 2)
        adapted = nn.Module()
        adapted.base_layer = model["base_layer"]
        adapted.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.5)})
        whole = nn.ModuleDict({"down": adapted})
        state = install(whole, Topology(tp=axis))
        with state.samples(SEED, (((0, 9),),)):
            width = 7 if axis.size == 1 else (4, 3)[axis.rank]
            masks.append(adapted.lora_dropout["default"](torch.ones(1, 9, width)) != 0)
    assert torch.equal(masks[0], torch.cat(masks[1:], -1))


# -- attention ------------------------------------------------------------------------------------------------------


def attention_config(name: str = "llama", probability: float = 0.3, **changes: Any) -> PretrainedConfig:
    return config_of(name, attention_dropout=probability, **changes)


LAYOUTS: list[Layout] = [(((0, 7),), ((1, 5),)), (((2, 4), (3, 6)),)]
"""Of the samples in `batches()`."""


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_attention_weights_are_dropped_by_sample_head_and_query(name: str) -> None:
    """Against attention written out, whose masks are drawn head by head."""
    model = whole_model(attention_config(name))
    state = install(model, Topology())
    layer = model.model.layers[1].self_attn
    caught: list[Tensor] = []
    for module in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
        module.register_forward_hook(lambda module, inputs, output: caught.extend([inputs[0], output]))
    with state.samples(SEED, LAYOUTS[1]), torch.no_grad():
        model(**batches()[1], use_cache=False)
    query, key, value = (caught[place].view(1, 10, -1, 8).transpose(1, 2) for place in (1, 3, 5))
    cos, sin = model.model.rotary_emb(query, batches()[1]["position_ids"])

    def turn(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin

    expected = torch.zeros(1, 10, 4, 8)
    for begin, end, position in ((0, 4, 2), (4, 10, 3)):
        for head in range(4):
            q, k = turn(query)[0, head, begin:end], turn(key)[0, head // 2, begin:end]
            scores = q @ k.T * 8**-0.5
            if name == "gemma2":
                scores = 50 * torch.tanh(scores / 50)
            reach = torch.ones(end - begin, end - begin).tril()
            if name == "gemma2" and model.config.layer_types[1] == "sliding_attention":
                reach = reach.triu(-3)
            weights = scores.masked_fill(reach == 0, -torch.inf).softmax(-1)
            shape, place = (end - begin, end - begin), (position, "model.layers.1.self_attn", head)
            with state.samples(SEED, ()):
                dropped = state.draw(shape, 0.3, torch.device("cpu"), *place)
            assert 0 < dropped.float().mean() < 0.8
            expected[0, begin:end, head] = (weights / 0.7).masked_fill(dropped, 0.0) @ value[0, head // 2, begin:end]
    assert_same(caught[6].view(1, 10, 4, 8), expected)


def test_without_attention_dropout_the_kernel_stays_and_evaluation_is_exact() -> None:
    plain = whole_model(config_of("llama"))
    assert install(plain, Topology())
    assert plain.config._attn_implementation == "sdpa"
    for name in ("llama", "gemma2"):
        config = attention_config(name)
        model, reference = whole_model(config), whole_model(config).eval()
        state = install(model, Topology())
        assert model.config._attn_implementation == KERNEL
        with state.samples(SEED, LAYOUTS[1]):
            assert_same(model.eval()(**batches()[1]).logits, reference(**batches()[1]).logits, within=1e-6)
        assert "_attn_implementation" not in model.config.to_dict()


def test_a_kernel_without_masks_is_refused() -> None:
    flex = whole_model(attention_config())
    flex.config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match=r"model.config.attention_dropout=0.3: the flex_attention attention of llama"):
        install(flex, Topology())
    codegen = CodeGenForCausalLM(
        CodeGenConfig(vocab_size=8, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, attn_pdrop=0.1)
    )
    with pytest.raises(ModelError, match=r"model.config.attn_pdrop=0.1: .* set model.config.attn_pdrop=0"):
        install(codegen, Topology())


# -- whole models ---------------------------------------------------------------------------------------------------


def losses_of(model: Any, state: DropoutState) -> list[Tensor]:
    """Accumulate gradients of both micro-batches, both forwards before the first backward as in 1F1B."""
    losses = []
    for batch, layout in zip(batches(), LAYOUTS, strict=True):
        targets = nn.functional.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)
        for row, samples in enumerate(layout):
            ends = list(accumulate(tokens for _, tokens in samples))
            targets[row, [end - 1 for end in ends]] = -100
            targets[row, ends[-1] :] = -100
        with state.samples(SEED, layout), sharded_logits(model):
            logits = model(**batch, use_cache=False).logits
        losses.append(cross_entropy(logits, targets, vocabulary_of(model)).sum())
    for loss, layout in zip(losses, LAYOUTS, strict=True):
        with state.samples(SEED, layout):
            loss.backward()
    return [loss.detach() for loss in losses]


GPT2 = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
PHI3 = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attention_dropout": 0.2}
LLAMA = {"attention_dropout": 0.2}
CASES: list[tuple[str, dict[str, Any], bool, bool]] = [
    (name, changes, sequence_parallel, checkpointing)
    for name, changes in (("gpt2", GPT2), ("phi3", PHI3), ("llama one kv", LLAMA), ("olmo2", LLAMA))
    for sequence_parallel, checkpointing in ((False, False), (True, True))
]


def models_of_rank() -> None:
    topology = start()
    for name, changes, sequence_parallel, checkpointing in CASES:
        print(name, sequence_parallel, flush=True)
        config = config_of(name, **changes)
        whole = whole_model(config)
        part, partition = sharded_model(whole, config, topology, sequence_parallel=sequence_parallel)
        install_gradient_hooks(part)
        if checkpointing:
            part.gradient_checkpointing_enable({"use_reentrant": False})
        expected = losses_of(whole, install(whole, Topology()))
        torch.manual_seed(topology.rank)  # ranks need not agree about anything but the seed of the samples
        for mine, theirs in zip(losses_of(part, install(part, topology)), expected, strict=True):
            assert_same(mine, theirs, name)
        for path, parameter in part.named_parameters():
            gradient = whole.get_parameter(path).grad
            assert_same(
                parameter.grad, slice_of(gradient, partition.placements[path].rule, topology), path, within=5e-5
            )
        modules = sum(isinstance(module, SampleDropout) for module in part.modules())
        assert modules == {"gpt2": 10, "phi3": 6}.get(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_and_sequence_parallel_ranks_drop_what_one_process_does(zygote: Zygote, ranks: int) -> None:
    zygote.run(__file__, "models_of_rank", world_size=ranks)


def test_another_cut_into_micro_batches_trains_the_same() -> None:
    config = config_of("gpt2", **GPT2)
    first, second = whole_model(config), whole_model(config)
    losses = losses_of(first, install(first, Topology()))
    state = install(second, Topology())
    singles = []
    for batch, layout in zip(batches(), LAYOUTS, strict=True):
        for row, samples in enumerate(layout):
            begin = 0
            for position, tokens in samples:
                ids = batch["input_ids"][row : row + 1, begin : begin + tokens]
                begin += tokens
                with state.samples(SEED, (((position, tokens),),)):
                    logits = second(ids, use_cache=False).logits
                singles.append(cross_entropy(logits[:, :-1], ids[:, 1:], None).sum())
    torch.stack(singles).sum().backward()
    assert_same(torch.stack([singles[0] + singles[1], singles[2] + singles[3]]).detach(), torch.stack(losses))
    for name, parameter in first.named_parameters():
        assert_same(second.get_parameter(name).grad, parameter.grad, name, within=5e-5)
