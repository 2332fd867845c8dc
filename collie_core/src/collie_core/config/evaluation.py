"""`evaluation:`"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from collie_core.config.base import ComponentConfig, ConfigModel
from collie_core.config.component import OfKind
from collie_core.config.data import Sources


class PerplexityConfig(ComponentConfig):
    """exp of the mean loss per target token."""

    type: Literal["perplexity"] = Field("perplexity", description="exp of the mean loss per target token.")


class EvaluatorConfig(ComponentConfig):
    """The section of an evaluator."""

    for_the_core: ClassVar[frozenset[str]] = frozenset({"type", "name", "data", "metrics", "batch_size"})

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        max_length=100,
        description="Stands before its results, and in the names of its files; default: `type`.",
    )
    data: Sources = Field([], description="Its own samples, written as data.eval is; default: data.eval.")
    metrics: list[Annotated[ComponentConfig, OfKind("metric")]] = Field(
        [], description="What is counted: metrics that read what the evaluator gives."
    )
    batch_size: PositiveInt | None = Field(
        None, description="Samples per forward on one device; default: per_device_eval_batch_size."
    )

    @property
    def known_as(self) -> str:
        """Its name, or its type without the distribution."""
        return self.name or self.type.rpartition(":")[2]

    @property
    def prefix(self) -> str:
        """What stands before the names of its results."""
        return f"{self.known_as}/"


class PerplexityEvaluatorConfig(EvaluatorConfig):
    """The losses of the target tokens."""

    type: Literal["perplexity"] = Field("perplexity", description="The losses of the target tokens.")
    metrics: list[Annotated[ComponentConfig, OfKind("metric")]] = Field(
        [PerplexityConfig()], description="What is counted: metrics that read what the evaluator gives."
    )
    stride: PositiveInt | None = Field(
        None,
        description="Texts longer than `window` are not cut: a window moves over them by so many tokens, and each "
        "token is scored once, with the rest of the window before it. null: data.long_samples decides.",
    )
    window: PositiveInt | None = Field(
        None, ge=2, description="Tokens that the model sees at once, with `stride`; default: data.max_length."
    )

    @property
    def prefix(self) -> str:
        """None without a name of its own: the results are eval/loss and eval/perplexity."""
        return "" if self.name is None else f"{self.name}/"

    @model_validator(mode="after")
    def _window_moves(self) -> PerplexityEvaluatorConfig:
        if self.window is not None and self.stride is None:
            raise PydanticCustomError("window", "window says how far a moving window sees: set stride too")
        if self.window is not None and self.stride is not None and self.stride >= self.window:
            raise PydanticCustomError(
                "stride", "stride must be below window, so that every token has one before it in its window"
            )
        return self


def _texts(value: object) -> object:
    return [value] if isinstance(value, str) else value


Texts = Annotated[
    list[Annotated[str, Field(min_length=1)]], BeforeValidator(_texts, json_schema_input_type=str | list[str])
]


class GenerationEvaluatorConfig(EvaluatorConfig):
    """Answers that the model writes."""

    type: Literal["generation"] = Field("generation", description="Answers that the model writes.")
    max_new_tokens: PositiveInt = Field(128, description="Longest answer, in tokens.")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token each time; above, tokens are drawn.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from this probability mass.")
    top_k: NonNegativeInt = Field(0, description="Draw from so many tokens; 0: all.")
    num_beams: PositiveInt = Field(1, description="Beams of a beam search; 1: none.")
    repetition_penalty: float = Field(
        1.0, gt=0, description="Logits of tokens that occurred are divided by it (arXiv 1909.05858); 1: as they are."
    )
    stop: Texts = Field([], description="Texts at which an answer ends; they do not belong to it.")


class ClassificationEvaluatorConfig(EvaluatorConfig):
    """Choices among given answers."""

    type: Literal["classification"] = Field("classification", description="Choices among given answers.")
    prompt: str = Field(
        "{input}", min_length=1, description="The text before a choice; {name} stands for that column of the row."
    )
    choices: str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)] = Field(
        "output", description="The choices of every row as a list, or the name of the column that holds a row's own."
    )
    label: str = Field(
        "target", min_length=1, description="The column of the right choice: its number, from 0, or its text."
    )
    by: Literal["likelihood", "generation"] = Field(
        "likelihood",
        description="likelihood: the choice with the highest log-likelihood after the prompt. generation: the choice "
        "that a greedy answer begins with.",
    )
    normalise: Literal["none", "length", "unconditional"] = Field(
        "none",
        description="length: log-likelihood per token. unconditional: less that after `unconditional_prompt`.",
    )
    unconditional_prompt: str = Field("Answer:", min_length=1, description="A prompt that says nothing of the sample.")
    max_new_tokens: PositiveInt = Field(16, description="Longest answer with `by: generation`, in tokens.")


Mode = Literal["min", "max"]


def _result(name: str) -> str:
    """Evaluation results are known by one name, the one that metrics.jsonl has."""
    if not name.removeprefix("eval/") or not name.startswith("eval/"):
        raise PydanticCustomError("result", "must be a result as metrics.jsonl names it, for example eval/loss")
    return name


class BestConfig(ConfigModel):
    """The best model so far, kept in `<output_dir>/best`."""

    metric: Annotated[str, AfterValidator(_result)] = Field(
        description="The result to go by, as metrics.jsonl names it: eval/perplexity."
    )
    mode: Mode | None = Field(
        None, description="Whether less or more of it is better; default: as its metric declares it."
    )
    patience: PositiveInt | None = Field(
        None, description="Stop the run after so many evaluations in a row without improvement."
    )
    min_delta: float = Field(0.0, ge=0, description="Patience takes only a change above this for an improvement.")


class EvaluationConfig(ConfigModel):
    """When and how the model is measured on `data.eval`."""

    steps: PositiveInt | None = Field(None, description="Steps between evaluations; always one at the end.")
    epochs: PositiveInt | None = Field(None, description="Epochs between evaluations.")
    on_start: bool = Field(False, description="Also evaluate before the first step.")
    per_device_eval_batch_size: PositiveInt | None = Field(
        None, description="Samples per forward on one device; default: as in training."
    )
    evaluators: list[Annotated[EvaluatorConfig, OfKind("evaluator")]] = Field(
        [PerplexityEvaluatorConfig()],
        min_length=1,
        description="What is measured, each by `type` and the evaluator's own fields.",
    )
    best: BestConfig | None = Field(None, description="Keep the best model beside the last one, and stop early.")
    print_samples: NonNegativeInt = Field(0, le=100, description="Held-out prompts to answer at each evaluation.")
