"""A trained model with a tokenizer of sentencepiece's kind: spaces belong to tokens, and some tokens are bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from collie_core.api import load_for_generation

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "stories260K-hf"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL.is_dir(), reason="the real weights do not lie beside this checkout"),
]

PROMPTS = ["Once upon a time", "The cat", "Lily and Ben went to the park. They", "One day, a little girl named Lily"]


def test_stories_are_those_of_generate_streamed_or_not(serve: Callable[..., Any]) -> None:
    model, tokenizer = load_for_generation(str(REAL))
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False, pad_token_id=0
            )
        wanted.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    one = serve(model, tokenizer)
    with httpx2.Client(base_url=one.url, timeout=60, trust_env=False) as client:
        body = {"prompt": PROMPTS, "max_tokens": 100, "temperature": 0}
        choices = client.post("/v1/completions", json=body).json()["choices"]
        assert [choice["text"] for choice in choices] == wanted
        streamed = [""] * len(PROMPTS)
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        streamed[choice["index"]] += choice["text"]
        assert streamed == wanted
