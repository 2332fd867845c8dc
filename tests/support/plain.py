"""A training run in torch and transformers alone, to compare ours with; of CoLLiE it takes the order of the samples."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, get_scheduler

from collie_core.data.loader import sample_order


@dataclass
class PlainRun:
    """What to run, and then what came out."""

    steps: int = 8
    batch: int = 8
    lr: float = 1e-3
    clip: float = 1.0
    weight_decay: float = 0.01
    seed: int = 7
    max_length: int = 256
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def train(self, model: Any, tokenizer_folder: Path, data: Path) -> PlainRun:
        """Train `model` in place, in float32, on rows of {input, output}."""
        model.train()
        samples = self.samples(tokenizer_folder, data)
        optimizer = torch.optim.AdamW(self._groups(model), lr=self.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
        scheduler = get_scheduler("cosine", optimizer, round(0.1 * self.steps), self.steps)
        epochs = self.steps * self.batch // len(samples) + 1
        order = [int(index) for epoch in range(epochs) for index in sample_order(len(samples), self.seed, epoch)]
        for step in range(self.steps):
            chosen = [samples[index] for index in order[step * self.batch : (step + 1) * self.batch]]
            longest = max(len(ids) for ids, _ in chosen)
            ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in chosen])
            labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in chosen])
            loss = self.loss(model, ids, labels)
            loss.backward()
            self.before_update(model)
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)))
            optimizer.step()
            self.after_update(model)
            scheduler.step()
            optimizer.zero_grad()
            self.losses.append(loss.item())
        return self

    def loss(self, model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """transformers' own mean over the target tokens."""
        return model(input_ids=ids, labels=labels).loss

    def before_update(self, model: Any) -> None:
        """Between backward and clipping; for others to override."""

    def after_update(self, model: Any) -> None:
        """After the update; for others to override."""

    def samples(self, tokenizer_folder: Path, data: Path) -> list[tuple[list[int], list[int]]]:
        """Ids and labels of the rows that have a target."""
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        encoded = [self._sample(tokenizer, json.loads(line)) for line in data.read_text().splitlines()]
        return [(ids, labels) for ids, labels in encoded if any(label != -100 for label in labels)]

    def _sample(self, tokenizer: Any, row: dict[str, str]) -> tuple[list[int], list[int]]:
        """Prompt, answer and end of text; the tokens that reach beyond the prompt are the targets."""
        encoded = tokenizer(row["input"] + row["output"], return_offsets_mapping=True)
        ids = [*encoded["input_ids"], tokenizer.eos_token_id]
        ends = [end for _, end in encoded["offset_mapping"]]
        labels = [token if end > len(row["input"]) else -100 for token, end in zip(ids, ends, strict=False)]
        return ids[: self.max_length], [*labels, tokenizer.eos_token_id][: self.max_length]

    def _groups(self, model: Any) -> list[dict[str, Any]]:
        matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        return [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
