"""`collie generate PROMPT --model DIR`: text from a trained model, in one process."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The prompt, the model and how to sample."""
    parser.add_argument("prompt", help="the text to continue; - reads standard input")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model folder or hub id")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="an adapter on it, also several times: each answers by its name",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token each time (default: %(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this probability mass")
    parser.add_argument("--top-k", type=int, default=0, help="sample from so many tokens; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the chat template as a user's turn")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that the folder brings")


def run(args: argparse.Namespace) -> int:
    """Print what the model says after the prompt."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    from collie_core.cli._quiet import quiet_libraries
    from collie_core.generate import generate, load_for_generation, prompt_ids
    from collie_core.model.named_adapters import folders_by_name, with_adapters

    quiet_libraries()
    folders = folders_by_name(args.adapter)
    model, tokenizer = load_for_generation(args.model, trust_remote_code=args.trust_remote_code)
    models = with_adapters(model, folders) if folders else {"": model}
    for name, one in models.items():
        (new_ids,) = generate(
            one,
            tokenizer,
            [prompt_ids(tokenizer, prompt, chat=args.chat)],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            seed=args.seed,
        )
        text = tokenizer.decode(new_ids, skip_special_tokens=True)
        print(f"[{name}] {text}" if len(models) > 1 else text)
    return 0
