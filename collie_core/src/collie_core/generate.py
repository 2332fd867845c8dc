"""Text from prompts, through transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from collie_core.model.stages import stage_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[list[int]]:
    """The new token ids after each prompt (token ids), up to and without the end-of-text token.

    `temperature` 0 is greedy; otherwise tokens are sampled, reproducibly for a seed: the caller's random state is
    left as it was. Prompts of different lengths are padded on the left and attend to their own tokens only.
    Collective over the ranks that hold a copy of the model: all give the same prompts and get the same answers.
    """
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)  # [B, L]
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = cast(Any, model).generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            past_key_values=stage_cache(model),
            **options,
        )
    model.train(was_training)
    return [_until(row[width:].tolist(), tokenizer.eos_token_id) for row in output]


def _until(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def load_for_generation(
    folder: str, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or hub id, strictly loaded, in the precision of the device.

    Raises:
        ModelError: the weights do not fit, or there is no tokenizer.
    """
    from collie_core.config.model import ModelConfig
    from collie_core.config.tokenizer import TokenizerConfig
    from collie_core.data.tokenizer import build_tokenizer
    from collie_core.model.build import compute_dtype, load_pretrained
    from collie_core.plugins import Plugins

    section = ModelConfig(model_name_or_path=folder, trust_remote_code=trust_remote_code)
    tokenizer = build_tokenizer(TokenizerConfig(), section)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_pretrained(section, Plugins.discover(), tokenizer, compute_dtype("auto", device))
    return cast("PreTrainedModel", model.to(device)), tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False) -> list[int]:
    """The token ids before the answer: the prompt as in training, or as a user's turn of the chat template."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids = list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers close every text


class SampleText(NamedTuple):
    """One evaluation sample as a person reads it."""

    prompt: str
    target: str
    prediction: str  # greedy


def sample_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Any], count: int
) -> list[SampleText]:
    """Greedy answers to the first `count` samples, each as long as its target may be.

    A sample's prompt is what comes before its first target token, at least one token.
    """
    cuts = [_first_turn(sample["input_ids"], sample["labels"]) for sample in samples[:count]]
    longest = max(len(target) for _, target in cuts)
    predictions = generate(model, tokenizer, [prompt for prompt, _ in cuts], max_new_tokens=longest)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    return [
        SampleText(decode(prompt), decode(target), decode(prediction))
        for (prompt, target), prediction in zip(cuts, predictions, strict=True)
    ]


def _first_turn(input_ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """The prompt, and the first run of target tokens after it."""
    start = next(index for index, label in enumerate(labels) if label != -100)
    end = next((index for index in range(start, len(labels)) if labels[index] == -100), len(labels))
    return list(input_ids[:start]), list(input_ids[start:end])
