"""Adapters on every topology against peft's own model in a plain torch loop: losses, files, and what is left alone."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import runs
import torch
from combos import more
from families import reference, write_family
from plain import PlainRun
from runs import changed, largest_difference, sections_on
from safetensors.torch import load_file, save_file
from topologies import sizes_of, world_size_of

from collie_core.api import CollieError, RunConfig, Trainer

STEPS, BATCH, SEED = 8, 8, 7
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": LINEAR},
    "ia3": {
        "type": "ia3",
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "prompt_tuning": {"type": "prompt_tuning", "num_virtual_tokens": 5},
    "p_tuning": {"type": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 32},
    "prefix_tuning": {"type": "prefix_tuning", "num_virtual_tokens": 5},
    "projected": {
        "type": "prefix_tuning",
        "num_virtual_tokens": 5,
        "prefix_projection": True,
        "encoder_hidden_size": 24,
    },
    "llama_adapter": {"type": "llama_adapter", "adapter_len": 4, "adapter_layers": 3},
}
PEFT: dict[str, type[Any]] = {
    "lora": peft.LoraConfig,
    "ia3": peft.IA3Config,
    "prompt_tuning": peft.PromptTuningConfig,
    "p_tuning": peft.PromptEncoderConfig,
    "prefix_tuning": peft.PrefixTuningConfig,
    "projected": peft.PrefixTuningConfig,
    "llama_adapter": peft.AdaptionPromptConfig,
}
MERGED = ("lora", "ia3")
REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TOPOLOGIES = ["dp1", "tp2", "pp2", "tp2pp2", "tp4", "dp2zero3", "tp2dp2"]


def train(
    topology: str, adapter: dict[str, Any], model: Path, data: Path, output: Path, changes: dict[str, Any]
) -> Any:
    """This rank's losses and norms."""
    sections = sections_on(topology, model, data, output, steps=STEPS, micro_batch=BATCH // 2)
    sections["train"] |= {"gradient_accumulation_steps": 2, "seed": SEED}
    sections["optimizer"] = {"type": "adamw", "lr": rate_for(model.name), "weight_decay": 0.01}
    sections["adapter"] = adapter
    record = runs.train(changed(sections, changes))
    return record.losses, record.norms


def rate_for(family: str) -> float:
    """Trained weights take smaller steps: in larger ones rounding errors grow."""
    return 2e-3 if family == "tied" else 1e-2


def train_all(topology: str, pairs: list[tuple[str, str]], folder: Path, data: Path, output: Path, changes: Any) -> Any:
    """One rank's numbers of every (family, method)."""
    return {
        (family, method): train(topology, METHODS[method], folder / family, data, output / family / method, changes)
        for family, method in pairs
    }


def runs_on(topology: str) -> list[tuple[str, str]]:
    """Families and methods: every method with one of two families, by turns; with COLLIE_TEST_ALL, with both."""
    turn, families = TOPOLOGIES.index(topology), ("tied", "internlm2")
    return [
        (family, method)
        for number, method in enumerate(METHODS)
        for place, family in enumerate(families)
        if "COLLIE_TEST_ALL" in os.environ or (turn + number + place) % 2 == 0
        if method != "llama_adapter" or sizes_of(topology)["tp"] == 1
    ]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models: tied, of real weights where they are, and two of random ones."""
    folder = tmp_path_factory.mktemp("families")
    write_family(folder / "llama_tied", "llama_tied")
    write_family(folder / "internlm2", "internlm2", changes={"num_key_value_heads": 2})  # four ranks hold copies
    real = REAL_DATA / "stories260K-hf"
    (folder / "tied").symlink_to(real if real.is_dir() else folder / "llama_tied")
    return folder


def base_model(families: Path, family: str) -> Any:
    """As transformers has it."""
    return reference(families / family, "llama_tied" if family == "tied" else family)


Plain = Callable[[str, str], tuple[PlainRun, torch.Tensor]]


@pytest.fixture(scope="session")
def plain(families: Path, instructions: Path) -> Plain:
    """The same in peft and plain torch, by family and method: what came out, and logits at the end."""

    @functools.cache
    def train_plainly(family: str, method: str) -> tuple[PlainRun, torch.Tensor]:
        model = peft_model(base_model(families, family), method)
        run = PlainRun(steps=STEPS, batch=BATCH, lr=rate_for(family)).train(model, families / family, instructions)
        return run, logits(model)

    return train_plainly


def peft_model(base: Any, method: str) -> Any:
    torch.manual_seed(SEED)
    options = {key: value for key, value in METHODS[method].items() if key != "type"}
    return peft.get_peft_model(base, PEFT[method](task_type="CAUSAL_LM", **options))


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))).hexdigest()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize("topology", [more(name) if name not in ("dp1", "tp2pp2") else name for name in TOPOLOGIES])
def test_a_topology_trains_an_adapter_as_peft_does(
    topology: str, zygote: Any, families: Path, plain: Plain, instructions: Path, tmp_path: Path
) -> None:
    trained = runs_on(topology)
    before = {family: digest(families / family) for family, _ in trained}
    ranks = zygote.run(
        __file__,
        "train_all",
        world_size=world_size_of(topology),
        args=(topology, trained, families, instructions, tmp_path, {}),
        limit_s=400,
    )
    for key in trained:
        family, method = key
        run, expected = plain(family, method)
        losses, norms = ranks[0][key]
        assert all(rank[key][0] == losses for rank in ranks), key
        assert min(losses) < losses[0]
        assert largest_difference(losses, run.losses) <= 1e-5, key
        assert largest_difference(norms, run.norms) <= 1e-5 * max(1.0, *run.norms), key
        saved = tmp_path / family / method / "run" / "model"
        loaded = peft.PeftModel.from_pretrained(base_model(families, family), str(saved))
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)
        if method in MERGED:
            torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=0, atol=1e-4)
    assert before == {family: digest(families / family) for family, _ in trained}


# -- with everything else -------------------------------------------------------------------------------------------

LORA = METHODS["lora"]


def run_one(
    zygote: Any, topology: str, adapter: dict[str, Any], *args: Any, changes: dict[str, Any] | None = None
) -> tuple[list[float], list[float]]:
    """What the first rank sees; all see the same losses."""
    ranks = zygote.run(
        __file__,
        "train",
        world_size=world_size_of(topology),
        args=(topology, adapter, *args, changes or {}),
        limit_s=300,
    )
    assert all(losses == ranks[0][0] for losses, _ in ranks)
    first: tuple[list[float], list[float]] = ranks[0]
    return first


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("topology", "adapter", "changes"),
    [
        ("tp2", {}, {"parallel.sequence_parallel": True}),
        ("tp2pp2", {"lora_dropout": 0.2}, {"model.gradient_checkpointing": "full"}),
        ("tp2", {"modules_to_save": ["lm_head"]}, {}),
        ("pp2", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, {}),
        ("pp2", {"layers_to_transform": [0]}, {}),  # nothing to train on the second stage
        ("pp2dp2zero1", {"layers_to_transform": [3]}, {}),  # nor on the first
        ("tp2pp2", {"target_modules": r".*\.(up|down)_proj", "use_rslora": True, "bias": "lora_only"}, {}),
        ("tp2", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}}, {"data.packing": True}),
        ("dp2zero2", {"use_dora": True}, {}),
        ("pp2", {"use_dora": True}, {}),
        ("dp2zero3", {}, {"parallel.offload_param": True, "parallel.offload_optimizer": True}),
        more("tp2dp2zero3", {}, {"optimizer": {"type": "sophia", "lr": 1e-3, "hessian_interval": 3}}),
        ("tp2", {}, {"optimizer": {"type": "muon", "lr": 1e-2}}),
        ("tp2pp2", {"type": "bottleneck", "reduction_factor": 4}, {}),
        ("tp2", {"type": "bottleneck", "placement": "pfeiffer"}, {"parallel.sequence_parallel": True}),
        ("pp2dp2zero1", {"type": "prefix_tuning", "num_virtual_tokens": 3, "prefix_projection": True}, {}),
        ("tp2pp2", {"type": "prompt_tuning", "prompt_tuning_init": "SAMPLE_VOCAB"}, {}),
        ("tp2dp2zero1", {"type": "p_tuning", "encoder_reparameterization_type": "LSTM"}, {}),
        ("pp2", {"type": "prompt_tuning"}, {"model.gradient_checkpointing": "full"}),
        more("tp2dp2", {}, {"optimizer": {"type": "adalomo", "lr": 1e-2}, "train.gradient_accumulation_steps": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "-",
)
def test_options_are_the_same_on_every_topology(
    topology: str, adapter: Any, changes: Any, zygote: Any, families: Path, instructions: Path, tmp_path: Path
) -> None:
    changes = {**changes}
    optimizer = changes.pop("optimizer", None)
    if optimizer is not None:
        changes |= {"optimizer.weight_decay": 0.0} | {f"optimizer.{key}": value for key, value in optimizer.items()}
    alone = {key: value for key, value in changes.items() if not key.startswith("parallel.")}
    if "train.gradient_accumulation_steps" in changes:  # the same global batch
        changes["train.per_device_train_batch_size"] = BATCH // sizes_of(topology)["dp"]
        alone["train.per_device_train_batch_size"] = BATCH
    chosen = adapter if "type" in adapter else {**LORA, **adapter}
    if "layers_to_transform" in adapter or "modules_to_save" in adapter:
        chosen["target_modules"] = adapter.get("target_modules", ["q_proj", "up_proj"])
    family = families / "internlm2"  # untied
    expected, expected_norms = run_one(zygote, "dp1", chosen, family, instructions, tmp_path / "one", changes=alone)
    losses, norms = run_one(zygote, topology, chosen, family, instructions, tmp_path / "many", changes=changes)
    assert min(losses[-3:]) < losses[0]
    assert largest_difference(losses, expected) <= 1e-5
    assert largest_difference(norms, expected_norms) <= 1e-4 * max(1.0, *expected_norms)
    one, many = (saved_tensors(tmp_path / name) for name in ("one", "many"))
    assert one.keys() == many.keys()
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=0, atol=2e-3, msg=name)


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "model" / "adapter_model.safetensors")


# -- going on, and using it -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_goes_on_on_another_topology_and_from_peft(
    zygote: Any, families: Path, instructions: Path, tmp_path: Path
) -> None:
    family = families / "internlm2"
    run_one(zygote, "tp2pp2", LORA, family, instructions, tmp_path / "first")
    saved = tmp_path / "first" / "run" / "model"
    model = peft.PeftModel.from_pretrained(reference(family, "internlm2"), str(saved), is_trainable=True)
    peft_saved = tmp_path / "by-peft"
    model.save_pretrained(str(peft_saved))
    assert not (peft_saved / "collie_adapter.json").exists()
    expected = PlainRun(steps=STEPS, batch=BATCH, lr=1e-2).train(model, family, instructions).losses
    for number, (topology, start) in enumerate([("dp1", saved), ("dp2zero3", saved), ("tp2", peft_saved)]):
        adapter = {"type": "lora", "adapter_name_or_path": str(start)}
        losses, _ = run_one(zygote, topology, adapter, family, instructions, tmp_path / str(number))
        assert largest_difference(losses, expected) <= 1e-5, topology


def use(topology: str, saved: Path, data: Path, output: Path) -> tuple[float, list[str]]:
    """Perplexity and answers of a saved adapter."""
    sizes = sizes_of(topology)
    config = RunConfig(
        model={"model_name_or_path": str(saved)},
        data={"eval": str(data), "max_length": 256, "cache_dir": str(output / "cache")},
        parallel={"tensor_parallel_size": sizes["tp"], "pipeline_parallel_size": sizes["pp"]},
        evaluation={"per_device_eval_batch_size": 3, "print_samples": 2},
        train={"output_dir": str(output / "run")},
    )
    seen: list[str] = []

    class Answers:
        def collie_evaluated(self, samples: Any) -> None:
            seen.extend(sample.prediction for sample in samples)

    results = Trainer(config, callbacks=[Answers()], observers=()).evaluate()
    return results["eval/perplexity"], seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
def test_a_saved_adapter_is_evaluated_and_answers_alike_everywhere(
    method: str, zygote: Any, families: Path, instructions: Path, tmp_path: Path
) -> None:
    run_one(zygote, "dp1", METHODS[method], families / "llama_tied", instructions, tmp_path)
    saved = tmp_path / "run" / "model"
    ((perplexity, answers),) = zygote.run(__file__, "use", world_size=1, args=("dp1", saved, instructions, tmp_path))
    assert len(answers) == 2
    for topology in ("tp2", "pp2"):
        found, said = zygote.run(
            __file__, "use", world_size=2, args=(topology, saved, instructions, tmp_path / topology)
        )[0]
        assert found == pytest.approx(perplexity, rel=1e-5)
        assert said == answers


def test_a_model_that_is_handed_in_gets_the_adapter(families: Path, instructions: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "tokenizer": {"type": "byte"},
        "data": {"train": str(instructions), "max_length": 128, "cache_dir": str(tmp_path / "cache")},
        "train": {"max_steps": 1, "output_dir": str(tmp_path / "run"), "overwrite_output_dir": True},
        "adapter": METHODS["prefix_tuning"],
    }
    model = base_model(families, "llama_tied")
    Trainer(RunConfig(**sections), model=model, observers=()).train()
    assert list(saved_tensors(tmp_path)) == ["prompt_embeddings"]
    with pytest.raises(CollieError, match="the model has an adapter already"):
        Trainer(RunConfig(**sections), model=model, observers=()).train()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:Merge lora module")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_on_quantized_weights_trains_as_in_peft(
    kind: str, families: Path, instructions: Path, tmp_path: Path
) -> None:
    from collie_core.model.quantize import replace_linear_layers

    def quantized() -> Any:
        model = base_model(families, "llama_tied")
        replace_linear_layers(model, kind, torch.float32)
        return model.to("cpu")

    sections = sections_on("dp1", families / "llama_tied", instructions, tmp_path, steps=STEPS, micro_batch=BATCH)
    sections["optimizer"] = {"type": "adamw", "lr": 1e-2, "weight_decay": 0.01}
    sections |= {"adapter": LORA, "model": {}, "tokenizer": {"name_or_path": str(families / "llama_tied")}}
    record = runs.Record()
    model = quantized()
    Trainer(RunConfig(**sections), model=model, callbacks=[record], observers=()).train()
    weight = model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert weight.dtype == (torch.int8 if kind == "int8" else torch.uint8)
    assert weight.grad is None
    expected = PlainRun(steps=STEPS, batch=BATCH, lr=1e-2).train(
        peft_model(quantized(), "lora"), families / "llama_tied", instructions
    )
    assert largest_difference(record.losses, expected.losses) <= 1e-5
    exact = PlainRun(steps=STEPS, batch=BATCH, lr=1e-2).train(
        peft_model(base_model(families, "llama_tied"), "lora"), families / "llama_tied", instructions
    )
    assert 1e-5 < largest_difference(record.losses, exact.losses) < 0.3  # it is another model, and a near one


# -- what it costs --------------------------------------------------------------------------------------------------


def test_only_the_adapter_has_gradients_and_states(families: Path, instructions: Path, tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    class Look:
        def collie_before_update(self, run: Any) -> None:
            seen["gradients"] = sum(p.grad.nbytes for p in run.model.parameters() if p.grad is not None)
            seen["trainable"] = run.facts["trainable_parameters"]

    sections: dict[str, Any] = {
        "model": {"model_name_or_path": str(families / "llama_tied")},
        "data": {"train": str(instructions), "cache_dir": str(tmp_path / "cache")},
        "train": {"max_steps": 1, "output_dir": str(tmp_path / "run")},
        "adapter": LORA,
    }
    trainer = Trainer(RunConfig(**sections), callbacks=[Look()], observers=())
    trainer.train()
    held = sum(value.numel() for value in saved_tensors(tmp_path).values())
    assert seen == {"gradients": 4 * held, "trainable": held}
    optimizer = trainer.parts.step.optimizer  # type: ignore[attr-defined]
    assert sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim) == 8 * held


@pytest.mark.filterwarnings("ignore")
def test_frozen_layers_in_the_precision_of_the_run_change_no_loss(
    families: Path, instructions: Path, tmp_path: Path, zygote: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = {"model.dtype": "bfloat16"}

    def losses(family: str, output: Path) -> tuple[list[float], dict[str, torch.dtype]]:
        sections = sections_on("dp1", families / family, instructions, output, steps=3, micro_batch=BATCH)
        record = runs.Record()
        config = RunConfig(**changed(sections | {"adapter": LORA}, half))
        trainer = Trainer(config, callbacks=[record], observers=())
        trainer.train()
        parts: Any = trainer.parts
        return record.losses, {name: value.dtype for name, value in parts.model.named_parameters()}

    for family in ("internlm2", "llama_tied"):
        found, dtypes = losses(family, tmp_path / family)
        with monkeypatch.context() as patch:
            patch.setattr("collie_core.parts.narrow_frozen", lambda model, dtype: None)
            expected, whole = losses(family, tmp_path / f"{family}-whole")
        assert set(whole.values()) == {torch.float32}
        assert found == expected
        narrow = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
        linear = {name for name in dtypes if name.endswith(("base_layer.weight", "output.weight", "lm_head.weight"))}
        assert narrow == linear  # no adapter, no norm, and no embedding, even where it is the head too
    one, two = (
        run_one(zygote, topology, LORA, families / "llama_tied", instructions, tmp_path / topology, changes=half)[0]
        for topology in ("dp1", "pp2")
    )
    assert largest_difference(one, two) <= 2e-2


# -- what is refused ------------------------------------------------------------------------------------------------


def refused(adapter: dict[str, Any], model: Path, data: Path, output: Path, **parallel: Any) -> str:
    sections: dict[str, Any] = {
        "model": {"model_name_or_path": str(model)},
        "data": {"train": str(data), "cache_dir": str(output / "cache")},
        "train": {"max_steps": 1, "output_dir": str(output / "run")},
        "parallel": parallel,
        "adapter": adapter,
    }
    with pytest.raises(CollieError) as caught:
        Trainer(RunConfig(**sections), observers=()).train()
    assert not (output / "run").exists()
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_bad_input_is_one_sentence(families: Path, instructions: Path, tmp_path: Path, zygote: Any) -> None:
    family = families / "llama_tied"
    args = (family, instructions, tmp_path / "bad")
    assert "did you mean q_proj" in refused({**LORA, "target_modules": ["q_prj"]}, *args)
    assert "use_dora needs the norms of whole layers' weights" in refused(
        {**LORA, "use_dora": True}, *args, tensor_parallel_size=2
    )
    run_one(zygote, "dp1", LORA, family, instructions, tmp_path / "good")
    saved = tmp_path / "good" / "run" / "model"
    go_on = {"type": "lora", "adapter_name_or_path": str(saved)}
    assert "a saved adapter brings its own options" in refused({**go_on, "r": 8}, *args)
    assert "was trained on other weights than those of" in refused(go_on, families / "internlm2", *args[1:])
    assert "has an adapter already" in refused(LORA, saved, *args[1:])
    assert "set adapter.type to lora" in refused({"type": "ia3", "adapter_name_or_path": str(saved)}, *args)
    virtual = {"type": "prompt_tuning", "num_virtual_tokens": 400}
    assert "with 400 virtual tokens exceeds" in refused(virtual, *args)
    torn = tmp_path / "torn"
    shutil.copytree(saved, torn)
    tensors = load_file(torn / "adapter_model.safetensors")
    first, *_ = tensors
    save_file({key: value for key, value in tensors.items() if key != first}, torn / "adapter_model.safetensors")
    there = {"type": "lora", "adapter_name_or_path": str(torn)}
    assert "does not fit the model: it lacks" in refused(there, *args)
    save_file(tensors | {first: tensors[first][:1]}, torn / "adapter_model.safetensors")
    assert "has the shape [1, 128] and should have [4, 128]" in refused(there, *args)
    save_file(tensors | {first: tensors[first] * torch.nan}, torn / "adapter_model.safetensors")
    assert "is damaged: not finite" in refused(there, *args)
    (torn / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in refused(there, *args)
    empty = {"type": "lora", "adapter_name_or_path": str(family)}
    assert "holds no adapter: neither collie_adapter.json nor adapter_config.json" in refused(empty, *args)


# -- an adapter from elsewhere --------------------------------------------------------------------------------------

OUTSIDE = '''
"""VeRA through peft, as another package has it; it knows nothing of ranks."""

import peft
from safetensors.torch import load_file

from collie_core.api import Component

class Vera:
    def attach(self, model, config):
        options = {"r": 8, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "projection_prng_key": 3}
        options["save_projection"] = False
        return peft.get_peft_model(model, peft.VeraConfig(task_type="CAUSAL_LM", **options))

    def save(self, model, path, state):
        model.save_pretrained(str(path), state_dict=dict(state))

    def load(self, model, path):
        return self.attach(model, None)

    def state(self, path):
        return {f"{key}.default": value for key, value in load_file(path / "adapter_model.safetensors").items()}

VERA = Component(build="collie_vera:Vera")
'''


def train_outside(topology: str, site: Path, *args: Any) -> Any:
    sys.path.insert(0, str(site))  # where the fork finds the entry points
    return train(topology, {"type": "vera"}, *args)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_from_elsewhere_trains_on_shared_layers(
    zygote: Any, families: Path, instructions: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    info = site / "collie_vera-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: collie-vera\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[collie.adapter]\nvera = collie_vera:VERA\n")
    (site / "collie_vera.py").write_text(OUTSIDE)
    found = []
    for topology in ("dp1", "tp2", "pp2"):
        args = (topology, site, families / "llama_tied", instructions, tmp_path / topology, {})
        ranks = zygote.run(__file__, "train_outside", world_size=world_size_of(topology), args=args)
        found.append(ranks[0][0])
    assert found[0][-1] < found[0][0]
    for losses in found[1:]:
        assert largest_difference(losses, found[0]) <= 1e-5
