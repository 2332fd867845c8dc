"""Weights in and out: each tensor as transformers reads it, and written back bit for bit, from any topology."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, FUSED, config_of, family_of, tensors, write
from torch import nn
from transformers import AutoModelForCausalLM, LlamaModel, PreTrainedModel

from collie_core.config.parallel import ParallelConfig
from collie_core.errors import ModelError, RunError
from collie_core.model import files
from collie_core.model.build import build_model, empty_model, parameter_counts
from collie_core.model.export import save_pretrained, write_folder
from collie_core.model.family import StockFamily
from collie_core.model.part import part_of
from collie_core.model.weights import Checkpoint, layout, save, whole_tensors
from collie_core.topology import Topology

FLOAT = torch.float32


def build(folder: Path | None, name: str, dtype: torch.dtype = FLOAT, **options: Any) -> PreTrainedModel:
    return build_model(family_of(name), config_of(name, dtype), None if folder is None else str(folder), **options)


def save_as(folder: Path, model: PreTrainedModel, dtype: torch.dtype = FLOAT, **options: Any) -> Path:
    part = part_of(model)
    assert part is not None
    folder.mkdir(exist_ok=True)
    save(folder, model, part, dtype=dtype, **options)
    return folder


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Names, types, shapes and bits."""
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value, second[name]) for name, value in first.items()
    )


def edited(folder: Path, edit: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# -- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["1GB", "4KB"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_is_read_as_transformers_reads_it_and_written_back_exactly(
    tmp_path: Path, name: str, max_shard_size: str
) -> None:
    expected = write(tmp_path, name, "1GB" if name == "fused" else max_shard_size)
    model = build(tmp_path, name)
    assert same(dict(model.state_dict()), dict(expected.state_dict()))
    assert len(list(model.parameters())) == len(list(expected.parameters()))  # ties are ties
    assert parameter_counts(model)[0] == sum(parameter.numel() for parameter in expected.parameters())
    assert same(tensors(save_as(tmp_path / "again", model)), tensors(tmp_path))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_random_weights_are_written_under_the_names_that_transformers_gives_them(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    assert tensors(save_as(tmp_path / "new", build(None, name))).keys() == tensors(tmp_path).keys()


def test_an_export_loads_in_transformers_with_its_configs(tmp_path: Path) -> None:
    write(tmp_path / "old", "llama_tied")
    (tmp_path / "old" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    model = build(tmp_path / "old", "llama_tied")
    assert model.generation_config.temperature == 0.5
    write_folder(tmp_path / "new", lambda folder: save_pretrained(folder, model, None, dtype=torch.bfloat16))
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(report.values())
    assert theirs.dtype == torch.bfloat16
    assert theirs.generation_config.temperature == 0.5
    assert theirs.config.architectures == ["LlamaForCausalLM"]
    assert model.config.dtype == FLOAT  # the model itself stays as it is
    for name, value in model.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value.bfloat16())


def test_the_config_of_a_family_of_its_own_is_written_back(tmp_path: Path) -> None:
    from dataclasses import replace

    write(tmp_path / "old", "fused")
    model = build(tmp_path / "old", "fused")
    raw = json.loads((tmp_path / "old" / "config.json").read_text()) | {"only_here": 3}
    model.collie_part = replace(part_of(model), raw_config=raw)
    write_folder(tmp_path / "new", lambda folder: save_pretrained(folder, model, None, dtype=FLOAT))
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["model_type"] == "fused"
    assert written["only_here"] == 3
    assert same(tensors(tmp_path / "new"), tensors(tmp_path / "old"))


def test_a_model_that_a_program_hands_in_is_saved_by_itself(tmp_path: Path) -> None:
    model = write(tmp_path / "old", "llama")
    write_folder(tmp_path / "new", lambda folder: save_pretrained(folder, model, None, dtype=FLOAT))
    assert same(tensors(tmp_path / "new"), tensors(tmp_path / "old"))


def test_precision_is_the_models_and_that_of_integers_is_kept(tmp_path: Path) -> None:
    expected = write(tmp_path, "llama", dtype=torch.bfloat16)
    model = build(tmp_path, "llama", torch.float64)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.double())
    assert same(tensors(save_as(tmp_path / "again", model, torch.bfloat16)), tensors(tmp_path))


def test_what_overflows_in_the_models_precision_is_not_finite(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    edited(tmp_path, lambda weights: weights["model.norm.weight"].fill_(1e6))
    with pytest.raises(ModelError, match=r"not finite: model\.norm\.weight"):
        build(tmp_path, "llama", torch.float16)


def test_weights_are_copies_and_not_views_of_the_file(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    model = build(tmp_path, "llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with (tmp_path / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(4096)
        file.write(b"\0" * (size - 4096))
    assert same(dict(model.state_dict()), before)


def test_files_of_a_base_model_are_written_back_with_the_names_of_the_whole_one(tmp_path: Path) -> None:
    base = LlamaModel(config_of("llama_tied"))
    base.save_pretrained(tmp_path)
    assert "norm.weight" in tensors(tmp_path)
    model = build(tmp_path, "llama_tied")
    assert torch.equal(model.model.norm.weight, base.norm.weight)
    again = tensors(save_as(tmp_path / "again", model))
    assert same(again, {f"model.{name}": value for name, value in tensors(tmp_path).items()})


def test_a_redundant_head_of_a_tied_model_is_ignored_and_a_lone_one_is_its_embedding(tmp_path: Path) -> None:
    embedding = "model.embed_tokens.weight"
    write(tmp_path, "llama_tied")
    values = load_file(tmp_path / "model.safetensors")[embedding]
    edited(tmp_path, lambda weights: weights.update({"lm_head.weight": values + 1}))
    assert torch.equal(build(tmp_path, "llama_tied").get_input_embeddings().weight, values)
    edited(tmp_path, lambda weights: weights.pop(embedding))
    model = build(tmp_path, "llama_tied")
    assert torch.equal(model.get_input_embeddings().weight, values + 1)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_rotary_frequencies_of_old_files_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edited(tmp_path, lambda weights: weights.update({key: torch.ones(2)}))
    build(tmp_path, "llama")


def test_everything_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights.pop("model.norm.weight")
        weights["stray"] = torch.ones(1)
        weights["lm_head.weight"] = torch.ones(3, 16)
        weights["model.layers.1.input_layernorm.weight"] = torch.ones(2)

    write(tmp_path, "llama")
    edited(tmp_path, edit)
    with pytest.raises(ModelError) as caught:
        build(tmp_path, "llama")
    assert str(caught.value) == (
        f"the weights of {tmp_path} do not fit llama: missing: model.norm.weight; unexpected: stray; "
        "shape of lm_head.weight: [3, 16] in the file, [37, 16] in the model; "
        "shape of model.layers.1.input_layernorm.weight: [2] in the file, [16] in the model"
    )


def test_a_missing_expert_shows(tmp_path: Path) -> None:
    write(tmp_path, "mixtral")
    edited(tmp_path, lambda weights: weights.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight"))
    with pytest.raises(
        ModelError, match=r"shape of model\.layers\.1\.mlp\.experts\.down_proj: \[3, 16, 24\] in the file"
    ):
        build(tmp_path, "mixtral")


def test_a_fused_matrix_of_another_size_is_named(tmp_path: Path) -> None:
    write(tmp_path, "fused")
    edited(tmp_path, lambda weights: weights.update({"blocks.1.wqkv": torch.ones(40, 16)}))
    with pytest.raises(ModelError, match=r"shape of blocks\.1\.wqkv: \[40, 16\] in the file, \[32, 16\] in the model"):
        build(tmp_path, "fused")


def test_a_declaration_that_leaves_a_hole_is_refused() -> None:
    declared = dict(FUSED.weights)
    del declared["model.layers.*.self_attn.k_proj.weight"]
    family = StockFamily("holes", stock_type="llama", weights=declared)
    with pytest.raises(ModelError, match=r"the holes family uses 384 of the 512 entries of blocks\.0\.wqkv"):
        layout(empty_model(family, config_of("fused")), family, None)


def test_a_conversion_that_is_no_box_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    write(tmp_path, "llama")
    turned = [WeightConverter("self_attn.o_proj.weight", "self_attn.o_proj.weight", [Transpose(0, 1)])]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model, **_: turned)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.o_proj\.weight cannot be read .*\(Transpose\)"):
        build(tmp_path, "llama")


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    config = config_of("llama")
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="quantized"):
        build_model(StockFamily("llama"), config, str(tmp_path))


@contextmanager
def counted(parameters: list[nn.Parameter], live: list[int]) -> Iterator[None]:
    """A `gathered` in which a parameter has its values, and outside it none; `live` counts those that have."""
    for parameter in parameters:
        parameter.data = parameter.kept  # type: ignore[attr-defined]
    live.append(live[-1] + len(parameters))
    yield
    for parameter in parameters:
        parameter.data = torch.empty(0)
    live.append(live[-1] - len(parameters))


def test_one_tensor_is_gathered_at_a_time(tmp_path: Path) -> None:
    write(tmp_path, "mixtral")
    model = build(tmp_path, "mixtral")
    for parameter in model.parameters():
        parameter.kept, parameter.data = parameter.data, torch.empty(0)  # type: ignore[attr-defined]
    live = [0]
    save_as(tmp_path / "again", model, gathered=lambda parameters: counted(parameters, live))
    assert max(live) == 1
    assert len(live) == 1 + 2 * len(list(model.parameters()))
    assert same(tensors(tmp_path / "again"), tensors(tmp_path))


def test_a_disk_that_is_full_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "llama")
    model = build(tmp_path, "llama")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.TensorFile, "write", full)
    with pytest.raises(RunError, match=r"the model cannot be written: .*No space left"):
        save_as(tmp_path / "again", model)


# -- several ranks ------------------------------------------------------------------------------------------------


def start(tp: int, pp: int) -> tuple[Topology, ParallelConfig]:
    parallel = ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    return Topology.start(parallel), parallel


def round_trips(tp: int, pp: int, folder: str, names: list[str]) -> None:
    """Read and write every model; a rank reads no more than it holds, and the main rank alone sees whole tensors."""
    topology, parallel = start(tp, pp)
    read: list[int] = []
    original = Checkpoint.read

    def counting(self: Checkpoint, key: str, box: Any) -> torch.Tensor:
        value = original(self, key, box)
        read.append(value.nbytes)
        return value

    Checkpoint.read = counting  # type: ignore[method-assign]
    for name in names:
        read.clear()
        model = build(Path(folder) / name, name, topology=topology, parallel=parallel)
        part = part_of(model)
        assert part is not None
        own = {key: value for key, value in model.state_dict().items() if value.device.type != "meta"}
        assert sum(read) == sum(value.nbytes for key, value in own.items() if key in part.layout)
        for _, value in whole_tensors(model, part):
            assert (value is not None) == topology.is_main
        assert parameter_counts(model) == parameter_counts(build(None, name))
        target = Path(folder) / f"{name}-{tp}-{pp}"
        write_folder(target, functools.partial(save_pretrained, model=model, tokenizer=None, dtype=FLOAT), topology)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_read_their_own_and_write_the_whole(zygote: Any, tmp_path: Path, tp: int, pp: int) -> None:
    names = [name for name in CONFIGS if name not in ("gpt2", "phi3")]  # they say little of a partition by themselves
    for name in names:
        write(tmp_path / name, name)
    zygote.run(__file__, "round_trips", world_size=tp * pp, args=(tp, pp, str(tmp_path), names))
    for name in names:
        assert same(tensors(tmp_path / f"{name}-{tp}-{pp}"), tensors(tmp_path / name)), name


def data_parallel_round_trip(folder: str) -> None:
    topology, parallel = start(1, 1)
    assert topology.dp.size == 2
    model = build(Path(folder), "llama", topology=topology, parallel=parallel)
    save_as(Path(folder) / "again", model)


def test_copies_of_a_model_write_it_once(zygote: Any, tmp_path: Path) -> None:
    write(tmp_path, "llama")
    zygote.run(__file__, "data_parallel_round_trip", world_size=2, args=(str(tmp_path),))
    assert same(tensors(tmp_path / "again"), tensors(tmp_path))


def failures(folder: str) -> list[str]:
    """What every rank says of a damaged weight that one of them reads, and of a disk that one of them finds full."""
    topology, parallel = start(1, 2)
    said = []
    try:
        build(Path(folder) / "damaged", "llama", topology=topology, parallel=parallel)
    except ModelError as error:
        said.append(str(error))
    model = build(Path(folder) / "good", "llama", topology=topology, parallel=parallel)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    files.TensorFile.write = full  # type: ignore[method-assign]
    try:
        save_as(Path(folder) / "again", model)
    except RunError as error:
        said.append(str(error))
    return said


def test_what_one_rank_finds_every_rank_says(zygote: Any, tmp_path: Path) -> None:
    for name in ("good", "damaged"):
        write(tmp_path / name, "llama")
    edited(tmp_path / "damaged", lambda weights: weights["model.norm.weight"].fill_(torch.nan))
    for said in zygote.run(__file__, "failures", world_size=2, args=(str(tmp_path),)):
        assert len(said) == 2
        assert "not finite: model.norm.weight" in said[0]
        assert "No space left" in said[1]
