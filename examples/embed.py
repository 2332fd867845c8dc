"""CoLLiE inside a program: train on rows that the program makes, look at every step, and answer with the result.

python examples/embed.py
"""

from __future__ import annotations

import torch

from collie_core.api import Run, RunConfig, Trainer, load_for_generation

ROWS = [{"input": f"What is {a} plus {b}? ", "output": str(a + b)} for a in range(4) for b in range(4)]
CONFIG = RunConfig(
    model={
        "config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    },
    tokenizer={"type": "byte"},
    train={
        "max_steps": 150,
        "per_device_train_batch_size": 16,
        "output_dir": "runs/embedded",
        "overwrite_output_dir": True,
    },
    optimizer={"type": "adamw", "lr": 1e-2},
)


class Watch:
    """Any object with hooks: it takes the arguments it names."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def collie_after_step(self, run: Run, loss: torch.Tensor) -> None:
        """Keep the loss, and stop when it is low."""
        self.losses.append(loss.item())
        if self.losses[-1] < 0.05:
            run.request_stop("it knows all of them")


def main() -> None:
    """Train, then ask."""
    watch = Watch()
    trainer = Trainer(CONFIG, train_dataset=ROWS, callbacks=[watch], observers=())
    trainer.train()
    print(f"loss {watch.losses[0]:.2f} -> {watch.losses[-1]:.2f} in {len(watch.losses)} steps")
    model, tokenizer = load_for_generation("runs/embedded/model")
    prompt = tokenizer("What is 2 plus 2? ", return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    print("2 + 2 =", tokenizer.decode(answer, skip_special_tokens=True))


if __name__ == "__main__":
    main()
