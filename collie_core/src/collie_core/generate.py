"""Text from prompts, through transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from collie_core.data.prompts import text_ids
from collie_core.data.tokenizer import padding_id
from collie_core.model.stages import stage_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from collie_core.config.parallel import ParallelConfig
    from collie_core.topology import Topology


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
    num_beams: int = 1,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    streamer: Any = None,
    synced: bool = False,
) -> list[list[int]]:
    """The new token ids after each prompt (token ids), up to and without the end-of-text token.

    Prompts of different lengths are padded on the left and attend to their own tokens only. What the model's
    generation_config.json says about penalties, beams and sampling does not count; the ends of text that it names do.
    Collective over the ranks that hold a copy of the model: all give the same prompts and get the same answers.

    Args:
        model: a causal language model of transformers, or this rank's part of one.
        tokenizer: of the model; it may lack a padding token.
        prompts: token ids, at least one each.
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token each time; otherwise tokens are drawn, reproducibly for a seed.
        top_p, top_k: draw from this probability mass, from so many tokens (0: all).
        num_beams: beams of a beam search; 1: none.
        repetition_penalty: logits of tokens that occurred are divided by it (arXiv 1909.05858).
        stop: texts at which an answer ends. The ids go up to the token that completes one; see `answer_text`.
        seed: of the drawing. The caller's random state is left as it was.
        streamer: of transformers, on one rank: gets the prompt and then each token, of one prompt without beams.
        synced: ranks with other prompts hold shares of the same weights, so that all of them run each forward.
    """
    device = next(model.parameters()).device
    pad, ends = padding_id(tokenizer), end_ids(model, tokenizer)
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)  # [B, L]
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    options: dict[str, Any] = {"do_sample": False, "num_beams": num_beams, "repetition_penalty": repetition_penalty}
    options["no_repeat_ngram_size"] = 0
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    if stop:
        options |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = cast(Any, model).generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=ends or None,
            past_key_values=stage_cache(model),
            streamer=streamer,
            synced_gpus=synced,
            **options,
        )
    model.train(was_training)
    return [_answer(row[width:].tolist(), ends, pad if stop else None) for row in output]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a text: the tokenizer's, and those by which the model's own configuration ends a turn."""
    own = getattr(model.generation_config, "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    return [*dict.fromkeys(token for token in (tokenizer.eos_token_id, *named) if isinstance(token, int))]


def _answer(ids: list[int], ends: Collection[int], pad: int | None) -> list[int]:
    """The ids before the end of text; and before the padding that follows a text at which to stop."""
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    while pad is not None and length and ids[length - 1] == pad:
        length -= 1
    return ids[:length]


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """New ids as text without special tokens, up to the first of the texts at which to stop."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


def load_for_generation(
    folder: str,
    *,
    trust_remote_code: bool = False,
    topology: Topology | None = None,
    parallel: ParallelConfig | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or hub id, strictly loaded, in the precision of the device.

    With a topology, and the section of the configuration that it was started by, this rank's part of the model;
    collective.

    Raises:
        ModelError: the weights do not fit, or there is no tokenizer.
    """
    from collie_core.config.model import ModelConfig
    from collie_core.config.tokenizer import TokenizerConfig
    from collie_core.data.tokenizer import build_tokenizer
    from collie_core.model.build import ALONE, compute_dtype, load_pretrained
    from collie_core.model.stages import borrow_head, lend
    from collie_core.plugins import Plugins

    section = ModelConfig(model_name_or_path=folder, trust_remote_code=trust_remote_code)
    tokenizer = build_tokenizer(TokenizerConfig(), section)
    topology = topology or ALONE
    device = topology.device
    dtype = compute_dtype("auto", device)
    model = load_pretrained(section, Plugins.discover(), tokenizer, dtype, topology=topology, parallel=parallel)
    borrow_head(model)
    model = model.to(device)
    lend(model)
    return cast("PreTrainedModel", model), tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False) -> list[int]:
    """The token ids before the answer: the prompt as in training, or as a user's turn of the chat template."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return text_ids(tokenizer, prompt, special=not chat)


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
