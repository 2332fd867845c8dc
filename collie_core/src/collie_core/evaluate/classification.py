"""Choices among given answers: by how likely the model finds each, or by what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from collie_core.data.loader import IGNORE
from collie_core.data.prompts import Prompt, cut_left, filled
from collie_core.data.sources import Row
from collie_core.errors import DataError
from collie_core.evaluate.generation import answer
from collie_core.evaluate.scoring import target_scores, targets_per_row
from collie_core.generate import SampleText

if TYPE_CHECKING:
    from collie_core.evaluate.context import EvaluationContext, Outcome

NO_CHOICE = ""  # what an answer counts as that begins with none of the choices


class Question(NamedTuple):
    """A row as a question."""

    origin: str
    prompt: str
    choices: Sequence[str]
    label: int

    @property
    def right(self) -> str:
        """The right choice, as metrics are given it."""
        return self.choices[self.label].strip()


class Verdict(NamedTuple):
    """What the model chose."""

    choice: str
    facts: dict[str, Any]  # for the file of predictions


class ClassificationEvaluator:
    """Lets the model choose.

    Args:
        prompt: a template; {name} stands for that column of a row.
        choices: those of every row, or the column that holds them.
        label: the column of the right choice: its number, from 0, or its text.
        by: "likelihood" of each choice after the prompt, or "generation" of an answer.
        normalise: divide log-likelihoods by the tokens of the choice ("length"), or subtract those after
            `unconditional_prompt` ("unconditional").
        max_new_tokens: of a generated answer.
    """

    def __init__(
        self,
        prompt: str = "{input}",
        choices: str | Sequence[str] = "output",
        label: str = "target",
        by: Literal["likelihood", "generation"] = "likelihood",
        normalise: Literal["none", "length", "unconditional"] = "none",
        unconditional_prompt: str = "Answer:",
        max_new_tokens: int = 16,
    ) -> None:
        self.prompt = prompt
        self.choices = choices
        self.label = label
        self.by = by
        self.normalise = normalise
        self.unconditional_prompt = unconditional_prompt
        self.max_new_tokens = max_new_tokens
        self._truncated = self._unmatched = 0  # of the evaluation that is running

    def evaluate(self, context: EvaluationContext) -> Outcome:
        """See `Evaluator`. `truncated_prompts` counts prompts that did not fit: their beginning is cut off;
        `unmatched_answers` generated answers that begin with none of the choices.

        Raises:
            DataError: a row lacks a column, its label is none of its choices, or a choice fills the whole context.
        """
        self._truncated = self._unmatched = 0
        choose = self._by_likelihood if self.by == "likelihood" else self._by_generation
        for number, share in context.deal(enumerate(map(self._question, context.rows()))):
            questions = [question for _, question in share]
            verdicts = choose(context, questions, number)
            if context.counts:
                rights = [question.right for question in questions]
                context.feed("choices", [verdict.choice for verdict in verdicts], rights)
            context.record(*_recorded(share, verdicts))
        totals = context.total(truncated_prompts=self._truncated, unmatched_answers=self._unmatched)
        return context.outcome({name: count for name, count in totals.items() if count})

    def _question(self, row: Row) -> Question:
        choices = self._choices(row)
        return Question(row.origin, filled(self.prompt, row), choices, self._right(row, choices))

    def _choices(self, row: Row) -> Sequence[str]:
        if not isinstance(self.choices, str):
            return self.choices
        found = row.values.get(self.choices)
        if not isinstance(found, list) or len(found) < 2 or not all(isinstance(text, str) and text for text in found):
            raise DataError(
                f"{row.origin}: the column {self.choices} must be a list of two or more texts, the choices; set "
                "`choices` to another column, or to the choices of every row"
            )
        return found

    def _right(self, row: Row, choices: Sequence[str]) -> int:
        found = row.values.get(self.label)
        if isinstance(found, str):
            texts = [choice.strip() for choice in choices]
            if found.strip() in texts:
                return texts.index(found.strip())
            if not found.strip().isdecimal():
                raise DataError(f"{row.origin}: {self.label}={found!r} is none of the choices: {', '.join(texts)}")
            found = int(found)  # as a CSV file has it
        if isinstance(found, bool) or not isinstance(found, int):
            what = "is missing" if found is None else f"is a {type(found).__name__}"
            raise DataError(f"{row.origin}: the column {self.label} {what}; it must hold the right choice")
        if not 0 <= found < len(choices):
            raise DataError(f"{row.origin}: {self.label}={found}, but the {len(choices)} choices count from 0")
        return found

    # -- by likelihood -------------------------------------------------------------------------------------

    def _by_likelihood(self, context: EvaluationContext, questions: Sequence[Question], number: int) -> list[Verdict]:
        """On the ranks that have logits; none elsewhere."""
        samples = [
            self._sample(context, question.origin, question.prompt, choice) for question, choice in _all(questions)
        ]
        self._truncated += sum(any(cut for _, cut in own) for own in _grouped(samples, questions))
        scores = _likelihoods(context, [sample for sample, _ in samples])
        if self.normalise == "unconditional":
            neutral = [
                self._sample(context, question.origin, self.unconditional_prompt, choice)[0]
                for question, choice in _all(questions)
            ]
            without = _likelihoods(context, neutral)
            scores = [score - base for score, base in zip(scores, without, strict=True)]
        if self.normalise == "length":
            lengths = [int((sample["labels"] != IGNORE).sum()) for sample, _ in samples]
            scores = [score / length for score, length in zip(scores, lengths, strict=False)]
        if not context.counts:
            return []
        return [_likeliest(question, own) for question, own in zip(questions, _grouped(scores, questions), strict=True)]

    def _sample(self, context: EvaluationContext, origin: str, prompt: str, choice: str) -> tuple[dict[str, Any], bool]:
        """Tokens and targets of a choice after its prompt, and whether the prompt had to be cut.

        As in training, a token that reaches into the choice belongs to it.
        """
        tokenizer, text = context.tokenizer, prompt + choice
        encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids, offsets = ids[:-1], offsets[:-1]
        before = sum(stop <= len(prompt) for _, stop in offsets)
        if before == 0 or before == len(ids):
            what = "the prompt" if before == 0 else f"the choice {choice!r}"
            raise DataError(f"{origin}: {what} has no token of its own, so the choice cannot be scored")
        tail, limit = ids[before:], context.positions
        if limit is not None and len(tail) >= limit:
            raise DataError(f"{origin}: a choice of {len(tail)} tokens leaves no room for its prompt in {limit}")
        head, cut = cut_left(ids[:before], None if limit is None else limit - len(tail), tokenizer.bos_token_id)
        labels = np.array([IGNORE] * len(head) + tail)
        return {"input_ids": np.array(head + tail), "labels": labels}, cut

    # -- by generation -------------------------------------------------------------------------------------

    def _by_generation(self, context: EvaluationContext, questions: Sequence[Question], number: int) -> list[Verdict]:
        prompts = [Prompt(question.origin, question.prompt, None, ()) for question in questions]
        answers = answer(context, prompts, number, {"max_new_tokens": self.max_new_tokens})
        self._truncated += answers.truncated
        verdicts = [_matched(question, text) for question, text in zip(questions, answers.texts, strict=True)]
        self._unmatched += sum(verdict.choice == NO_CHOICE for verdict in verdicts)
        return verdicts


def _all(questions: Sequence[Question]) -> list[tuple[Question, str]]:
    return [(question, choice) for question in questions for choice in question.choices]


def _grouped(items: Sequence[Any], questions: Sequence[Question]) -> list[list[Any]]:
    """What there is for each choice, question by question."""
    rest = iter(items)
    return [[*islice(rest, len(question.choices))] for question in questions]


def _likelihoods(context: EvaluationContext, samples: Sequence[Any]) -> list[float]:
    """The sum of the log-likelihoods of the targets of each sample, in nats, in one forward; none without logits."""
    found: list[float] = []
    for batch, logits in context.forward([context.collate(samples)]):
        if logits is not None:
            losses = target_scores(logits, batch.labels, context.vocabulary).losses.double()
            found = [-float(own.sum()) for own in losses.split(targets_per_row(batch.labels))]
    return found[: len(samples)]


def _likeliest(question: Question, scores: Sequence[float]) -> Verdict:
    best = max(range(len(scores)), key=lambda place: scores[place])  # the first of equals
    return Verdict(question.choices[best].strip(), {"scores": list(scores)})


def _matched(question: Question, text: str) -> Verdict:
    """The longest choice that the answer begins with, whole words and without regard to case."""
    written = text.strip().casefold()
    places = {choice.strip().casefold(): choice.strip() for choice in reversed(question.choices)}
    fits = [own for own in places if written.startswith(own) and not written[len(own) : len(own) + 1].isalnum()]
    return Verdict(places[max(fits, key=len)] if fits else NO_CHOICE, {"answer": text})


def _recorded(
    share: Sequence[tuple[int, Question]], verdicts: Sequence[Verdict]
) -> tuple[list[dict[str, Any]], list[SampleText]]:
    """The rows of the file, and the same for a person."""
    rows: list[dict[str, Any]] = [
        {
            "index": index,
            "origin": question.origin,
            "prompt": question.prompt,
            "choices": list(question.choices),
            **verdict.facts,
            "prediction": verdict.choice,
            "target": question.right,
        }
        for (index, question), verdict in zip(share, verdicts, strict=False)
    ]
    return rows, [SampleText(row["prompt"], row["target"], row["prediction"]) for row in rows]
