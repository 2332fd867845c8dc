"""Names that other tools use for what CoLLiE has: understood, with a note that says the name here.

A name is looked for in every section of the core, and at the root; `section.name` only in that section.
A name that is a field where it stands is never an alias.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from collie_core.errors import MISSING, Problem

if TYPE_CHECKING:
    from collie_core.config.document import Document
    from collie_core.config.problems import Guide

_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "bf16-true": "bfloat16",
    "bf16-mixed": "bfloat16",
}
_OPTIMIZERS = dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "AdamW"), "adamw")
_SELECTED = {True: "completion", False: "all"}


class Alias(NamedTuple):
    """`values` maps what is written there to what is written here; MISSING: it says nothing. Others stay."""

    target: str
    values: Mapping[Any, Any] = {}


ALIASES: Mapping[str, Alias] = {
    # model
    "base_model": Alias("model.model_name_or_path"),
    "model_id": Alias("model.model_name_or_path"),
    "torch_dtype": Alias("model.dtype", _DTYPES),
    "precision": Alias("model.dtype", _DTYPES),
    "bf16": Alias("model.dtype", {True: "bfloat16", False: MISSING}),
    "fp16": Alias("model.dtype", {True: "float16", False: MISSING}),
    "attn_impl": Alias("model.attn_implementation"),
    "flash_attn": Alias("model.attn_implementation", {True: "flash_attention_2", False: MISSING}),
    "use_flash": Alias("model.attn_implementation", {True: "flash_attention_2", False: MISSING}),
    "activation_checkpointing": Alias("model.gradient_checkpointing"),
    "checkpointing": Alias("model.gradient_checkpointing"),
    # data
    "train_file": Alias("data.train"),
    "validation_file": Alias("data.eval"),
    "max_seq_length": Alias("data.max_length"),
    "max_seq_len": Alias("data.max_length"),
    "sequence_len": Alias("data.max_length"),
    "seq_length": Alias("data.max_length"),
    "cutoff_len": Alias("data.max_length"),
    "sample_packing": Alias("data.packing"),
    "neat_packing": Alias("data.packing"),
    "train_on_inputs": Alias("data.train_on", {True: "all", False: "completion"}),
    "train_on_prompt": Alias("data.train_on", {True: "all", False: "completion"}),
    "mask_prompt": Alias("data.train_on", _SELECTED),
    "completion_only_loss": Alias("data.train_on", _SELECTED),
    "assistant_only_loss": Alias("data.train_on", {True: "assistant", False: MISSING}),
    # parallel
    "tp": Alias("parallel.tensor_parallel_size"),
    "tp_size": Alias("parallel.tensor_parallel_size"),
    "tensor_model_parallel_size": Alias("parallel.tensor_parallel_size"),
    "tensor_parallel_degree": Alias("parallel.tensor_parallel_size"),
    "pp": Alias("parallel.pipeline_parallel_size"),
    "pp_size": Alias("parallel.pipeline_parallel_size"),
    "pipeline_model_parallel_size": Alias("parallel.pipeline_parallel_size"),
    "pipeline_parallel_degree": Alias("parallel.pipeline_parallel_size"),
    "dp_size": Alias("parallel.data_parallel_size"),
    "dp_shard_size": Alias("parallel.data_parallel_size"),
    # train
    "micro_batch_size": Alias("train.per_device_train_batch_size"),
    "train_micro_batch_size": Alias("train.per_device_train_batch_size"),
    "local_batch_size": Alias("train.per_device_train_batch_size"),
    "batch_size": Alias("train.per_device_train_batch_size"),
    "train_batch_size": Alias("train.global_batch_size"),
    "num_epochs": Alias("train.num_train_epochs"),
    "train_epochs": Alias("train.num_train_epochs"),
    "epochs": Alias("train.num_train_epochs"),
    "gradient_clipping": Alias("train.max_grad_norm"),
    # optimizer and schedule
    "optim": Alias("optimizer.type", _OPTIMIZERS),
    "optimizer.name": Alias("optimizer.type"),
    "learning_rate": Alias("optimizer.lr"),
    "lr": Alias("optimizer.lr"),
    "lr_scheduler_type": Alias("lr_scheduler.type"),
    # evaluation
    "eval_steps": Alias("evaluation.steps"),
    "eval_per_n_steps": Alias("evaluation.steps"),
    "eval_per_n_epochs": Alias("evaluation.epochs"),
    "eval_batch_size": Alias("evaluation.per_device_eval_batch_size"),
    "evaluation.batch_size": Alias("evaluation.per_device_eval_batch_size"),
    # checkpoint
    "save_steps": Alias("checkpoint.save_steps"),
    "save_interval": Alias("checkpoint.save_steps"),
    "checkpoint_every": Alias("checkpoint.save_steps"),
    "save_total_limit": Alias("checkpoint.save_total_limit"),
    "resume_from_checkpoint": Alias("checkpoint.resume_from_checkpoint", {True: "auto", False: MISSING}),
    # adapter
    "adapter.method": Alias("adapter.type"),
    "adapter.rank": Alias("adapter.r"),
    "adapter.alpha": Alias("adapter.lora_alpha"),
    "adapter.dropout": Alias("adapter.lora_dropout"),
    "lora_r": Alias("adapter.r"),
    "lora_rank": Alias("adapter.r"),
    "lora_alpha": Alias("adapter.lora_alpha"),
    "lora_dropout": Alias("adapter.lora_dropout"),
    "lora_target": Alias("adapter.target_modules"),
    "lora_target_modules": Alias("adapter.target_modules"),
    # DeepSpeed
    "ds_config": Alias("deepspeed"),
}

# Sections that may be written as one word, and the key that the word stands for.
SHORT = {
    "model": "model_name_or_path",
    "tokenizer": "type",
    "optimizer": "type",
    "lr_scheduler": "type",
    "adapter": "type",
}
_FREE = ("deepspeed", "plugins")  # no names of other tools are looked for in there


def normalise(document: Document, guide: Guide) -> None:
    """Rename the aliases in `document` in place, and drop sections in which nothing is written."""
    data = document.data = _copy(document.data, guide.root.model_fields)
    _zero_shorthand(document)
    if isinstance(data.get("model"), str):
        _note(document, "model", "model.model_name_or_path")
        data["model"] = {"model_name_or_path": data["model"]}
    for key in list(data):
        _rename(document, guide, key)
        if isinstance(data.get(key), dict) and key in guide.root.model_fields and key not in _FREE:
            for name in list(data[key]):
                _rename(document, guide, f"{key}.{name}")


def _copy(data: Mapping[str, Any], sections: Container[str]) -> dict[str, Any]:
    """So that what a caller handed in stays as it is. A section in which nothing is written is none."""
    return {
        key: dict(value) if isinstance(value, dict) else value
        for key, value in data.items()
        if value is not None or key not in sections
    }


def find(guide: Guide, data: Mapping[str, Any], key: str) -> Alias | None:
    """What the dotted `key` is called here; None when it is a field, or nothing that anybody uses."""
    section, _, name = key.rpartition(".")
    if "." in section or (section and section not in guide.root.model_fields) or section in _FREE:
        return None
    if name in guide.fields([section] if section else [], data):
        return None
    alias = ALIASES.get(key) or ALIASES.get(name)
    return None if alias is None or alias.target == key else alias


def _rename(document: Document, guide: Guide, key: str) -> None:
    alias = find(guide, document.data, key)
    if alias is None:
        return
    section, _, name = key.rpartition(".")
    holder = document.data[section] if section else document.data
    if has(document.data, alias.target):
        other = document.origin(alias.target)
        hint = f"Keep one of them{f' (the other: {other})' if other else ''}."
        rule = f"is another name of {alias.target}, which is written as well"
        document.problems.append(Problem(key, rule, holder.pop(name), hint))
        return
    if put(document.data, alias.target, translated(alias, holder[name])):
        del holder[name]
        document.origins[alias.target] = document.origin(key)
        _note(document, key, alias.target)


def translated(alias: Alias, value: Any) -> Any:
    """The value in the words of this configuration; MISSING when it says nothing."""
    try:
        return alias.values.get(value, value)
    except TypeError:  # a list or a section: no word to translate
        return value


def has(data: Mapping[str, Any], key: str) -> bool:
    """Whether the dotted key (a section, or a field of one) is written."""
    section, _, name = key.rpartition(".")
    holder = data.get(section) if section else data
    if isinstance(holder, str):
        return SHORT.get(section) == name
    return isinstance(holder, Mapping) and name in holder


def put(data: dict[str, Any], key: str, value: Any) -> bool:
    """Set a section, or a field of one; False when what stands there is no section."""
    if value is MISSING:
        return True
    section, _, name = key.rpartition(".")
    holder = data
    if section:
        written = data.get(section, {})
        written = {SHORT[section]: written} if isinstance(written, str) and section in SHORT else written
        if not isinstance(written, dict):
            return False
        holder = data[section] = written
    holder[name] = value
    return True


def _zero_shorthand(document: Document) -> None:
    """`deepspeed: zero3`, as some launchers take it."""
    value = document.data.get("deepspeed")
    if isinstance(value, str) and value in ("zero0", "zero1", "zero2", "zero3"):
        document.data.pop("deepspeed")
        if put(document.data, "parallel.zero_stage", int(value[-1])):
            _note(document, "deepspeed", "parallel.zero_stage")


def _note(document: Document, written: str, here: str) -> None:
    origin = document.origin(written)
    document.notes.append(f"{f'{origin}: ' if origin else ''}{written} is called {here} here")
