"""Answers that the model writes, for metrics that compare texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from collie_core.data.formats import chat_template
from collie_core.data.prompts import Prompt, PromptReader, cut_left
from collie_core.errors import ConfigError, Problem
from collie_core.generate import SampleText, answer_text

if TYPE_CHECKING:
    from collie_core.evaluate.context import EvaluationContext, Outcome


class Answers(NamedTuple):
    """What came back for a turn."""

    texts: list[str]
    truncated: int  # prompts whose beginning was cut off


class GenerationEvaluator:
    """Lets the model answer the prompt of every row.

    Args:
        max_new_tokens: the longest answer.
        stop: texts at which an answer ends.
        temperature, top_p, top_k, num_beams, repetition_penalty: see `collie_core.generate.generate`.
    """

    def __init__(
        self,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        num_beams: int = 1,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
    ) -> None:
        self.options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "num_beams": num_beams,
            "repetition_penalty": repetition_penalty,
            "stop": stop,
        }

    def evaluate(self, context: EvaluationContext) -> Outcome:
        """See `Evaluator`. `truncated_prompts` counts prompts that did not fit: their beginning is cut off.

        Raises:
            ConfigError: the longest answer leaves no room for a prompt.
            DataError: a row has no prompt, or no right answer although a metric compares with it.
        """
        template = chat_template(context.data.chat_template, context.tokenizer)
        read = PromptReader(context.tokenizer, template, references=context.wants("texts"))
        truncated = 0
        for number, share in context.deal(enumerate(map(read, context.rows()))):
            prompts = [prompt for _, prompt in share]
            answers = answer(context, prompts, number, self.options)
            truncated += answers.truncated
            references = [prompt.references for prompt in prompts]
            context.feed("texts", answers.texts, references)
            context.record(
                [_row(index, prompt, text) for (index, prompt), text in zip(share, answers.texts, strict=True)],
                [_sample(prompt, text) for prompt, text in zip(prompts, answers.texts, strict=True)],
            )
        totals = context.total(truncated_prompts=truncated)
        return context.outcome({name: count for name, count in totals.items() if count})


def answer(context: EvaluationContext, prompts: Sequence[Prompt], number: int, options: dict[str, Any]) -> Answers:
    """The answers to the prompts of a turn; `number` is that of the batch, which the drawing of tokens follows.

    Raises:
        ConfigError: the longest answer leaves no room for a prompt.
    """
    tokenizer, room = context.tokenizer, prompt_room(context, options["max_new_tokens"])
    cut = [cut_left(prompt.tokens(tokenizer), room, tokenizer.bos_token_id) for prompt in prompts]
    found = context.generate([ids for ids, _ in cut], seed=context.seed + number, **options)
    texts = [answer_text(tokenizer, ids, options.get("stop", ())) for ids in found]
    return Answers(texts, sum(was_cut for _, was_cut in cut))


def prompt_room(context: EvaluationContext, max_new_tokens: int) -> int | None:
    """Tokens that a prompt may have before an answer of this length; None: any number.

    Raises:
        ConfigError: there is room for none.
    """
    if context.positions is None:
        return None
    if max_new_tokens >= context.positions:
        rule = f"leaves no room for a prompt in the {context.positions} positions of the model"
        raise ConfigError([Problem(f"evaluation.evaluators: {context.name}.max_new_tokens", rule, max_new_tokens)])
    return context.positions - max_new_tokens


def _row(index: int, prompt: Prompt, text: str) -> dict[str, Any]:
    return {
        "index": index,
        "origin": prompt.origin,
        "prompt": prompt.text,
        "prediction": text,
        "references": list(prompt.references),
    }


def _sample(prompt: Prompt, text: str) -> SampleText:
    return SampleText(prompt.text, prompt.references[0] if prompt.references else "", text)
