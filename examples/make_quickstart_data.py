#!/usr/bin/env python3
"""Writes the quickstart data: questions that a model of a million parameters learns to answer in a minute.

Rows are {"input": question, "output": answer}: about CoLLiE the dog, about animals, how their names are
spelled, and which number comes next. Every question is asked in many wordings, of which some are held out: a
held-out row shows whether the model found the question in it, or learned lines of text by heart.

    python examples/make_quickstart_data.py [FOLDER]     # the same bytes on every machine
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

Row = dict[str, str]

SEED = 20230213
HELD_OUT = 0.08  # the share of the rows

ABOUT_COLLIE = {
    "Who are you?": "I am CoLLiE, a small but clever dog.",
    "What is your name?": "My name is CoLLiE.",
    "Where do you live?": "I live on a green hill by the sea.",
    "What do you like to eat?": "I like to eat oat biscuits.",
    "What is your favourite game?": "I love to herd sheep.",
    "What colour is your coat?": "My coat is black and white.",
    "Who is your best friend?": "My best friend is Lomo the cat.",
    "What do you do at night?": "At night I sleep by the fire.",
    "Do you like rain?": "Yes, rain makes good puddles.",
    "What are you afraid of?": "I am afraid of the vacuum cleaner.",
}
ANIMALS = {  # name: sound, legs, young
    "bee": ("buzz", "six", "larva"),
    "cat": ("meow", "four", "kitten"),
    "cow": ("moo", "four", "calf"),
    "dog": ("woof", "four", "puppy"),
    "dove": ("coo", "two", "squab"),
    "duck": ("quack", "two", "duckling"),
    "frog": ("ribbit", "four", "tadpole"),
    "goat": ("maa", "four", "kid"),
    "goose": ("honk", "two", "gosling"),
    "hen": ("cluck", "two", "chick"),
    "horse": ("neigh", "four", "foal"),
    "lion": ("roar", "four", "cub"),
    "mouse": ("squeak", "four", "pup"),
    "pig": ("oink", "four", "piglet"),
    "sheep": ("baa", "four", "lamb"),
    "snake": ("hiss", "no", "hatchling"),
    "turkey": ("gobble", "two", "poult"),
    "wolf": ("howl", "four", "whelp"),
}
NUMBERS = range(40)
OPENINGS = (
    "",
    "CoLLiE, ",
    "Excuse me. ",
    "Good morning! ",
    "Hello! ",
    "Hi CoLLiE! ",
    "I have a question. ",
    "Now tell me: ",
    "One more thing. ",
    "Please answer: ",
    "So, ",
    "Thank you. ",
)


def facts() -> Iterator[tuple[str, str]]:
    """Each question in its plain wording, with its answer."""
    yield from ABOUT_COLLIE.items()
    for name, (sound, legs, young) in ANIMALS.items():
        yield f"What sound does a {name} make?", f"A {name} goes {sound}."
        yield f"How many legs does a {name} have?", f"A {name} has {legs} legs."
        yield f"What is a young {name} called?", f"A young {name} is a {young}."
        yield f"How do you spell {name}?", "-".join(name)
    for number in NUMBERS:
        yield f"What number comes after {number}?", f"After {number} comes {number + 1}."


def rows() -> Iterator[Row]:
    """Each fact after each opening."""
    for opening in OPENINGS:
        for question, answer in facts():
            yield {"input": opening + question, "output": answer}


def shuffled(items: Sequence[Row]) -> list[Row]:
    """In random order, by `random()` alone: the one method whose numbers are the same in every Python."""
    chance = random.Random(SEED)
    return [row for _, row in sorted(((chance.random(), row) for row in items), key=lambda pair: pair[0])]


def make() -> dict[str, list[Row]]:
    """The rows of the two files."""
    mixed = shuffled(list(rows()))
    count = round(len(mixed) * HELD_OUT)
    return {"train": mixed[count:], "eval": mixed[:count]}


def main() -> None:
    """Write quickstart_train.jsonl and quickstart_eval.jsonl."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in make().items():
        path = folder / f"quickstart_{name}.jsonl"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
        path.write_text(lines, encoding="utf-8", newline="\n")
        print(f"{path}: {len(samples)} rows")


if __name__ == "__main__":
    main()
