"""From `model:` in the config to a model with its weights, strictly: what does not fit is an error by name."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from collie_core import storage
from collie_core.errors import ModelError
from collie_core.model.family import StockFamily, unknown_keys
from collie_core.model.initialize import initialize
from collie_core.model.part import Part, part_of
from collie_core.model.partition import plan
from collie_core.model.vocabulary_extension import ExtendedCheckpoint, VocabularyExtension, grown
from collie_core.model.weights import Checkpoint, Store, assign, canonical, layout, load
from collie_core.topology import Topology

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from collie_core.config.model import ModelConfig
    from collie_core.config.parallel import ParallelConfig
    from collie_core.hookspecs import ModelFamily
    from collie_core.plugins import Plugins

ALONE = Topology()  # one process
ADAPTER = "collie_adapter.json"  # ours, beside what the adapter plugin writes
PEFT_ADAPTER = "adapter_config.json"


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of forward and backward; `auto` is bfloat16 where the GPU has it, float32 on CPU."""
    if name != "auto":
        return cast(torch.dtype, getattr(torch, name))
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def architecture(
    section: ModelConfig, registry: Plugins, tokenizer: PreTrainedTokenizerBase
) -> tuple[ModelFamily, PretrainedConfig]:
    """The family plugin (or the stock family) and the transformers config of the run.

    A `model.config` without a vocabulary size takes the tokenizer's.

    Raises:
        ModelError: no readable config.json, an unknown family, or a key that the family does not have.
    """
    family, config, _ = _architecture(section, registry, tokenizer)
    return family, config


def _architecture(
    section: ModelConfig,
    registry: Plugins,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: VocabularyExtension | None = None,
) -> tuple[ModelFamily, PretrainedConfig, Mapping[str, Any]]:
    """The family, the config, and the raw config that they were made from."""
    raw = dict(section.config) if section.config is not None else _read_config(section)
    family = _family(section, raw, registry)
    if section.config is not None:
        raw.setdefault("vocab_size", len(tokenizer))
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            raw.setdefault(role, getattr(tokenizer, role))
    if vocabulary is not None:
        raw["vocab_size"] = vocabulary.size
    config = family.make_config(raw)
    if section.config is not None:
        _refuse_unknown_keys(config, raw)
    if vocabulary is not None and config.vocab_size != vocabulary.size:
        raise ModelError(f"model.resize_vocabulary: the config.json of {family.model_type} has no vocab_size to change")
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary only {config.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    return family, config, raw


def rows_of_files(section: ModelConfig, registry: Plugins) -> int:
    """The size of the vocabulary of pretrained weights, by their config.json.

    Raises:
        ModelError: they are those of an adapter, or see `architecture`.
    """
    name = str(section.model_name_or_path)
    if _saved_adapter(Path(storage.local_folder(name))) is not None:
        raise ModelError(
            f"model.resize_vocabulary: {name} holds an adapter, whose vocabulary is what it was trained with; name its "
            "base model here, and the folder in adapter.adapter_name_or_path"
        )
    raw = _read_config(section)
    return cast(int, _family(section, raw, registry).make_config(raw).vocab_size)


def check_length(config: PretrainedConfig, max_length: int, virtual_tokens: int = 0) -> None:
    """Refuse positions the model was never built for.

    Raises:
        ModelError: `max_length`, with the virtual tokens of an adapter, exceeds `max_position_embeddings`.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and max_length + virtual_tokens > limit:
        more = f" with {virtual_tokens} virtual tokens" if virtual_tokens else ""
        raise ModelError(
            f"data.max_length={max_length}{more} exceeds the model's max_position_embeddings={limit}; "
            f"set data.max_length to at most {limit - virtual_tokens}"
        )


def build_model(
    target: ModelFamily,
    config: PretrainedConfig,
    weights: str | None,
    *,
    vocabulary: VocabularyExtension | None = None,
    topology: Topology = ALONE,
    parallel: ParallelConfig | None = None,
    store: Store | None = None,
) -> PreTrainedModel:
    """This rank's part of the model in `config.dtype` on the CPU, with `weights` of a folder or hub id, or random ones.

    Random weights are a function of torch's random state alone, the same on every topology. Collective.

    Args:
        target: the family.
        config: of the stock model.
        weights: folder or hub id; None: random.
        vocabulary: the rows that the files lack; `config` has the size with them.
        topology: of the run.
        parallel: its section; only how the model is cut matters here.
        store: what puts a parameter into its module; None: `weights.assign`.

    Raises:
        ModelError: a missing, unexpected, misshapen or non-finite weight, a file that is not safetensors, or a model
            that cannot be shared by so many ranks.
    """
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{weights or 'model.config'} is quantized, and training needs its weights before that")
    checkpoint = None
    if weights is not None:
        checkpoint = Checkpoint.open(weights)
        config.name_or_path = weights
    model = empty_model(target, config)
    model.config.architectures = [type(model).__name__]  # now, since a stage has a class of its own
    if vocabulary is not None and checkpoint is not None:
        checkpoint = _extended(checkpoint, vocabulary, model, target)
    found = layout(model, target, checkpoint)
    partition = plan(
        model,
        target,
        tensor_size=topology.tp.size,
        pipeline_size=topology.pp.size,
        cuts="parameters" if parallel is None else parallel.pipeline_cuts,
    )
    _take_apart(model, Part(partition, topology, target, canonical(found, model.base_model_prefix), {}), parallel)
    dtype, store = cast(torch.dtype, config.dtype), store or assign
    if checkpoint is not None:
        load(model, checkpoint, found, partition, topology, dtype=dtype, store=store)
        _read_generation_config(model, storage.local_folder(checkpoint.name))
    else:
        seed = int(torch.randint(2**63 - 1, ()))
        initialize(model, empty_model(target, config), partition, topology, seed=seed, dtype=dtype, store=store)
    model.eval()
    return model


def empty_model(family: ModelFamily, config: PretrainedConfig) -> PreTrainedModel:
    """The whole model of a family without memory: parameters on the meta device, buffers such as rope real."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.tie_weights()  # `init_empty_weights` makes each parameter anew and so loses the ties
    return model


def _extended(
    files: Checkpoint, vocabulary: VocabularyExtension, model: PreTrainedModel, family: ModelFamily
) -> Checkpoint:
    """The files as they would be with all rows of the empty `model`."""
    config = copy.deepcopy(model.config)
    config.vocab_size = vocabulary.old_size
    old = empty_model(family, config)
    before, after = ({name: tuple(value.shape) for name, value in one.state_dict().items()} for one in (old, model))
    return ExtendedCheckpoint(files, vocabulary, grown(before, after, layout(old, family, files), vocabulary))


def _take_apart(model: PreTrainedModel, part: Part, parallel: ParallelConfig | None) -> None:
    """Leave of the empty model what this rank holds."""
    if part.topology.pp.size > 1:
        from collie_core.model.stages import cut

        cut(model, part.partition, part.family, part.topology)
    if part.topology.tp.size > 1:
        from collie_core.model.shard import shard

        sequence_parallel = parallel is not None and parallel.sequence_parallel
        shard(model, part.partition, part.family, part.topology, sequence_parallel=sequence_parallel)
    model.collie_part = part  # type: ignore[assignment]


def load_pretrained(
    section: ModelConfig,
    registry: Plugins,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    *,
    vocabulary: VocabularyExtension | None = None,
    topology: Topology = ALONE,
    parallel: ParallelConfig | None = None,
    store: Store | None = None,
) -> nn.Module:
    """The model of a folder, URL or hub id; of an adapter's folder, the base model it names with the adapter on it.

    An adapter's folder says itself which `vocabulary` it was trained with.

    Raises:
        ModelError: see `architecture` and `build_model`.
    """
    folder = Path(storage.local_folder(str(section.model_name_or_path)))
    saved = _saved_adapter(folder)
    if saved is not None:
        section = section.model_copy(update={"model_name_or_path": saved.base})
        vocabulary = saved.vocabulary
    options: dict[str, Any] = {"topology": topology, "parallel": parallel, "store": store}
    model = new_model(section, registry, tokenizer, dtype, vocabulary=vocabulary, **options)
    return model if saved is None else load_adapter(model, folder, registry, topology)


class SavedAdapter(NamedTuple):
    """What an adapter's folder says of itself."""

    type: str  # the plugin's name
    base: str  # folder or hub id of the model it sits on
    base_fingerprint: str = ""  # of its weights; "" where peft wrote the folder
    vocabulary: VocabularyExtension | None = None  # rows that the base model got
    name: str = ""  # what it is called beside others of its base; "": it was given no name


def describe_adapter(
    folder: Path, type: str, base: str, vocabulary: VocabularyExtension | None = None, name: str = ""
) -> None:
    """Write down which plugin reads the adapter in `folder`, and its base model (a local one by its full path)."""
    fingerprint = Checkpoint.open(base).fingerprint() if base else ""
    base = str(Path(base).resolve()) if Path(base).exists() else base
    written = SavedAdapter(type, base, fingerprint, name=name)._asdict()
    written["vocabulary"] = None if vocabulary is None else vocabulary.to_json()
    (folder / ADAPTER).write_text(json.dumps(written, indent=2) + "\n")


def base_of_adapter(folder: Path) -> SavedAdapter:
    """What the adapter in `folder` says of itself.

    Raises:
        ModelError: there is none.
    """
    saved = _saved_adapter(folder)
    if saved is None and (below := adapters_below(folder)):
        raise ModelError(f"{folder} has adapters in folders below it; name one: {', '.join(map(str, below))}")
    if saved is None:
        raise ModelError(f"{folder} holds no adapter: neither {ADAPTER} nor {PEFT_ADAPTER} is there")
    return saved


def adapters_below(folder: Path) -> list[Path]:
    """The folders of adapters in a folder that is none itself: peft saves named ones so."""
    if _saved_adapter(folder) is not None or not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if _saved_adapter(path) is not None]


def load_adapter(model: nn.Module, folder: Path, registry: Plugins, topology: Topology) -> nn.Module:
    """`model`, or this rank's part of one, with the adapter in `folder` on it. Collective.

    Raises:
        ModelError: the folder holds none, or one of another base model; a value is missing, misshapen or not finite.
        PluginError: no installed plugin reads it.
    """
    from collie_core.model.adapters import attach, fill

    saved = base_of_adapter(folder)
    config: Any = model.config
    base = str(config.name_or_path or "")
    if saved.base_fingerprint and base and saved.base_fingerprint != Checkpoint.open(base).fingerprint():
        raise ModelError(
            f"the adapter in {folder} was trained on other weights than those of {base}: on {saved.base} as it was then"
        )
    part = part_of(model)
    if saved.base_fingerprint and part is not None and part.vocabulary != saved.vocabulary:
        was = "no" if saved.vocabulary is None else f"another, to {saved.vocabulary.size} rows"
        raise ModelError(
            f"model.resize_vocabulary: the adapter in {folder} was trained with {was}; set it as it was then"
        )
    adapter = registry.load("adapter", plugin_of(saved, registry))
    model = attach(model, adapter, lambda part: adapter.load(part, folder), topology, seed=0)
    fill(model, adapter.state(folder), str(folder))
    return model


def plugin_of(saved: SavedAdapter, registry: Plugins) -> str:
    """The name of the plugin that reads a saved adapter; peft's own folders say what peft calls it."""
    names = registry.names("adapter")
    if saved.type in names:
        return saved.type
    called = {getattr(registry.component("adapter", name).can, "peft_type", "").lower(): name for name in names}
    return called.get(saved.type, saved.type)


def _saved_adapter(folder: Path) -> SavedAdapter | None:
    """The adapter in a folder that CoLLiE or peft wrote; None when it holds none."""
    if (folder / ADAPTER).is_file():
        saved = json.loads((folder / ADAPTER).read_text())
        vocabulary = saved.pop("vocabulary", None)
        return SavedAdapter(**saved, vocabulary=vocabulary and VocabularyExtension.from_json(vocabulary))
    if (folder / PEFT_ADAPTER).is_file():
        found = json.loads((folder / PEFT_ADAPTER).read_text())
        return SavedAdapter(found["peft_type"].lower(), found["base_model_name_or_path"])
    return None


def new_model(
    section: ModelConfig,
    registry: Plugins,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    *,
    vocabulary: VocabularyExtension | None = None,
    topology: Topology = ALONE,
    parallel: ParallelConfig | None = None,
    store: Store | None = None,
) -> PreTrainedModel:
    """The model that `model:` describes, or this rank's part of it, on the CPU in `dtype`."""
    family, config, raw = _architecture(section, registry, tokenizer, vocabulary)
    config.dtype = dtype
    config._attn_implementation = section.attn_implementation
    arguments: dict[str, Any] = {"config": config, "weights": section.model_name_or_path, "vocabulary": vocabulary}
    arguments |= {"topology": topology, "parallel": parallel, "store": store}
    model = cast("PreTrainedModel", registry.build_target("model", family, **arguments))
    part = part_of(model)
    if part is not None:
        model.collie_part = replace(part, raw_config=raw, vocabulary=vocabulary)  # type: ignore[assignment]
    return model


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """All and trainable parameters of the whole model, shared ones counted once."""
    from collie_core.model.adapters import adapter_of

    part, adapter = part_of(model), adapter_of(model)
    if part is None or (part.topology.model.size == 1 and adapter is None):
        # ZeRO-3 leaves an empty tensor behind that knows how long it was.
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        return sum(size for size, _ in sizes), sum(size for size, trainable in sizes if trainable)
    placements = part.partition.placements
    total = sum(math.prod(placement.shape) for placement in placements.values() if not placement.tied_to)
    if adapter is not None:
        added = sum(math.prod(placement.shape) for placement in adapter.placements.values())
        return total + added, added
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return total, total - sum(math.prod(placements[name].shape) for name in frozen)


def _family(section: ModelConfig, raw: Mapping[str, Any], registry: Plugins) -> ModelFamily:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{_source(section)} names no model_type, so its family is unknown")
    names = registry.names("model")
    plain = model_type.replace("_", "-").lower()
    return cast("ModelFamily", registry.load("model", plain) if plain in names else StockFamily(model_type))


def _source(section: ModelConfig) -> str:
    return "model.config" if section.config is not None else str(section.model_name_or_path)


def _read_config(section: ModelConfig) -> dict[str, Any]:
    from transformers import PretrainedConfig

    name = str(section.model_name_or_path)
    try:
        raw, _ = PretrainedConfig.get_config_dict(storage.local_folder(name))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.model_name_or_path={name}: {_first_sentence(error)}") from error
    if not raw:
        raise ModelError(f"model.model_name_or_path={name}: no config.json there")
    return raw


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _refuse_unknown_keys(config: PretrainedConfig, raw: dict[str, Any]) -> None:
    # A key that the class does not declare but that is gone from the instance was understood (rope_theta).
    ignored = [key for key in unknown_keys(config, list(raw)) if key in vars(config)]
    if not ignored:
        return
    known = [name for name in vars(config) if not name.startswith("_") and name not in ignored]
    near = [f"{key} (did you mean {match[0]}?)" if (match := get_close_matches(key, known)) else key for key in ignored]
    raise ModelError(f"model.config: the {config.model_type} family has no {', '.join(near)}")


def _read_generation_config(model: PreTrainedModel, weights: str) -> None:
    """As from_pretrained does: of generation_config.json, else of what config.json says of generation."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    read: Any = GenerationConfig.from_pretrained
    for options in ({}, {"config_file_name": "config.json", "_from_model_config": True}):
        try:
            model.generation_config = read(weights, **options)
        except OSError:
            continue
        return
