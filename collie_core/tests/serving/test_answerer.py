"""The answerer alone: what it writes is what transformers' `generate` writes, whoever else is there."""

from __future__ import annotations

import queue
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

from collie_core.config.model import ModelConfig
from collie_core.config.tokenizer import TokenizerConfig
from collie_core.data.tokenizer import build_tokenizer
from collie_core.errors import ModelError, RunError
from collie_core.model.virtual_tokens import put_virtual_tokens
from collie_core.serving.answerer import Answerer, Closed, Event, Job, QueueFull
from collie_core.serving.batch import Batch
from collie_core.serving.sampling import Sampling, choose, likelihood
from collie_core.serving.text import TextStream

LENGTHS = (1, 17, 3, 40, 8, 2, 25, 11)


def prompts(vocabulary: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
    return output[0, len(prompt) :].tolist()


class Collected:
    """Jobs whose events are kept."""

    def __init__(self) -> None:
        self.events: queue.Queue[tuple[int, Event]] = queue.Queue()
        self.count = 0

    def job(self, prompt: list[int], *, seconds: float = 60, **way: Any) -> Job:
        index = self.count
        self.count += 1
        sampling = Sampling(**{"max_tokens": 12, "logprobs": 0} | way)
        return Job(prompt, sampling, lambda event: self.events.put((index, event)), time.monotonic() + seconds)

    def wait(self) -> list[list[Event]]:
        found: list[list[Event]] = [[] for _ in range(self.count)]
        missing = self.count
        while missing:
            index, event = self.events.get(timeout=30)
            found[index].append(event)
            missing -= event.finish is not None
        return found


def ids(events: list[Event]) -> list[int]:
    return [event.likelihood.token for event in events if event.likelihood]


def tiny(tokenizer: Any) -> LlamaForCausalLM:
    """A model whose greedy answers are lively: its weights are larger than usual."""
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)}, max_position_embeddings=256)).eval()


@pytest.fixture(scope="module")
def small() -> Any:
    tokenizer = build_tokenizer(TokenizerConfig(type="byte"), ModelConfig())
    return SimpleNamespace(tokenizer=tokenizer, model=tiny(tokenizer))


class Started(Answerer):
    """One whose model runs in a thread, as long as the context lasts."""

    def __enter__(self) -> Started:
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        return self

    def _work(self) -> None:
        while not self.closed:
            if self.busy:
                self.turn()
            else:
                time.sleep(0.0005)

    def __exit__(self, *_: Any) -> None:
        self.close()
        self._thread.join()


def engine(model: Any, tokenizer: Any, *, slots: int = 4, queue: int = 100, ends: tuple[int, ...] = ()) -> Started:
    one = Started(model, tokenizer, Batch(model), slots=slots, queue=queue)
    one._ends = frozenset(ends)
    return one


SIZES = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}
FAMILIES = {
    "mistral-window": MistralConfig(**SIZES, sliding_window=6),
    "gemma3-mixed": Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gpt2": GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
}


def arriving_one_by_one(model: Any, tokenizer: Any, slots: int) -> None:
    """Prompts of all lengths, at different times, more than there are slots."""
    given = prompts(257)
    wanted = [greedy(model, prompt, 6 + 3 * (place % 4)) for place, prompt in enumerate(given)]
    collected = Collected()
    with engine(model, tokenizer, slots=slots) as one:
        for place, prompt in enumerate(given):
            one.submit([collected.job(prompt, max_tokens=6 + 3 * (place % 4))])
            time.sleep(0.002 * (place % 3))
        assert [ids(events) for events in collected.wait()] == wanted
        assert one.load == (0, 0)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_greedy_answers_equal_those_of_generate(small: Any, slots: int) -> None:
    arriving_one_by_one(small.model, small.tokenizer, slots)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_families_too(small: Any, family: str, attention: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation=attention).eval()
    arriving_one_by_one(model, small.tokenizer, 3)


@pytest.mark.parametrize("form", ["embeddings", "keys"])
def test_virtual_tokens_of_an_adapter_stay_before_the_text(small: Any, form: Any) -> None:
    class Virtual(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, width))

        def forward(self) -> torch.Tensor:
            return self.weight

    model = tiny(small.tokenizer)
    put_virtual_tokens(model, Virtual(32 if form == "embeddings" else 2 * 2 * 2 * 8), 3, form)
    arriving_one_by_one(model, small.tokenizer, 3)


def test_a_seed_draws_the_same_whoever_else_is_there(small: Any) -> None:
    given = prompts(256)
    way = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "max_tokens": 15}
    alone = []
    for place, prompt in enumerate(given):
        collected = Collected()
        with engine(small.model, small.tokenizer) as one:
            one.submit([collected.job(prompt, seed=place, **way)])
            alone.append(ids(collected.wait()[0]))
    collected = Collected()
    with engine(small.model, small.tokenizer) as one:
        one.submit([collected.job(prompt, seed=place, **way) for place, prompt in enumerate(given)])
        assert [ids(events) for events in collected.wait()] == alone


def test_drawing_keeps_to_top_p_and_top_k() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    drawn = {
        name: {choose(logits, [way], [way.generator()])[0] for way in ways}
        for name, ways in {
            "all": [Sampling(1, temperature=2, seed=seed) for seed in range(100)],
            "top_k": [Sampling(1, temperature=2, top_k=2, seed=seed) for seed in range(50)],
            "top_p": [Sampling(1, temperature=1, top_p=0.7, seed=seed) for seed in range(50)],
            "tiny": [Sampling(1, temperature=1e-4, seed=seed) for seed in range(20)],
            "never nothing": [
                Sampling(1, temperature=1, top_p=5e-324, seed=seed) for seed in range(20)
            ],  # 0 in float32
        }.items()
    }
    assert drawn == {"all": {0, 1, 2, 3}, "top_k": {0, 1}, "top_p": {0, 1}, "tiny": {0}, "never nothing": {0}}


def test_probabilities_are_those_before_temperature() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0])
    named = likelihood(logits, 1, 2)
    assert named.logprob == pytest.approx(float(logits.log_softmax(0)[1]))
    assert [token for token, _ in named.top] == [0, 2]


def test_an_end_of_text_is_no_part_of_the_answer(small: Any) -> None:
    prompt = prompts(256)[1]
    wanted = greedy(small.model, prompt, 12)
    end = wanted[5]
    collected = Collected()
    with engine(small.model, small.tokenizer, ends=(end,)) as one:
        one.submit([collected.job(prompt)])
        events = collected.wait()[0]
    assert ids(events) == wanted[: wanted.index(end)]
    assert events[-1].finish == "stop"


def test_time_cancelling_and_closing_end_answers(small: Any) -> None:
    prompt, collected = prompts(256)[1], Collected()
    with engine(small.model, small.tokenizer, slots=1, queue=2) as one:
        one.submit([collected.job(prompt, seconds=-1), collected.job(prompt, seconds=-1)])
        assert [events[-1].finish for events in collected.wait()] == ["timeout", "timeout"]
        long = Collected()
        jobs = [long.job(prompt, max_tokens=200) for _ in range(3)]
        one.submit(jobs)
        with pytest.raises(QueueFull):
            one.submit([long.job(prompt)])
        one.cancel(jobs[:2])
        long.count = 3
        one.submit([])
        while one.load[1]:
            time.sleep(0.01)
        one.close()
        assert jobs[2].over
        with pytest.raises(Closed):
            one.submit([collected.job(prompt)])


def test_a_failing_pass_ends_its_answers_and_no_others(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts(256)[1]
    with engine(small.model, small.tokenizer) as one:
        with monkeypatch.context() as patch:
            patch.setattr(one._batch, "step", lambda tokens: 1 / 0)
            collected = Collected()
            one.submit([collected.job(prompt)])
            assert collected.wait()[0][-1].finish == "error"
        collected = Collected()
        one.submit([collected.job(prompt)])
        assert ids(collected.wait()[0]) == greedy(small.model, prompt, 12)


def test_models_with_another_memory_are_refused() -> None:
    config = MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match="models of type mamba cannot be served"):
        Batch(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ModelError, match="a Linear cannot be served"):
        Batch(torch.nn.Linear(1, 1))


def decoded(tokenizer: Any, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(lambda some: tokenizer.decode(list(some)), stop)
    pieces = [stream.push(token) for token in tokens]
    return [*pieces, stream.finish()], stream


def test_text_comes_in_whole_characters(small: Any) -> None:
    text = "naïve 日本語 🙂 end"
    pieces, _ = decoded(small.tokenizer, small.tokenizer(text)["input_ids"])
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    torn = small.tokenizer("é")["input_ids"][:1]
    assert "".join(decoded(small.tokenizer, torn)[0]) == small.tokenizer.decode(torn)


@pytest.mark.parametrize(
    ("stop", "rest"), [(("END",), "a E EN b "), (("EN", "b"), "a E "), (("zz",), "a E EN b END c EN"), (("a",), "")]
)
def test_nothing_of_a_stop_text_is_given_out(small: Any, stop: tuple[str, ...], rest: str) -> None:
    pieces, stream = decoded(small.tokenizer, small.tokenizer("a E EN b END c EN")["input_ids"], stop)
    assert "".join(pieces) == rest
    assert stream.stopped == (stop != ("zz",))


def test_a_small_server_asks_for_pieces_of_text(small: Any) -> None:
    with engine(small.model, small.tokenizer) as one:
        asked = small.tokenizer("a b")["input_ids"]
        asked = asked[:-1] if asked[-1] == small.tokenizer.eos_token_id else asked
        wanted = small.tokenizer.decode(greedy(small.model, asked, 9), skip_special_tokens=True)
        assert "".join(one.answer("a b", max_tokens=9)) == wanted
        with pytest.raises(RunError, match="1 to 255 tokens, and this one has"):
            next(one.answer("x" * 300))
        with pytest.raises(RunError, match="given up: timeout"):
            list(one.answer("a b", timeout=-0.5))
    with pytest.raises(RunError, match="no answer: Closed"):
        list(one.answer("a b"))
