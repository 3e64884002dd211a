"""Asking one adapter, and what all verbs share that let adapters answer."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

from nbpeft.errors import CellError
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument, positive, prompt_text
from nbpeft.magics.registry import ON_MODEL, TOKENIZER, subcommand
from nbpeft.session.results.comparing import BASE

RAW = argument("--raw", action="store_true", help="send the prompt as it is, outside the tokenizer's chat template")
CHAT = argument("--chat", action="store_true", help="put the prompt into the chat template; default: as in training")
SAMPLING = (
    argument("--temperature", type=float, metavar="T", help="draw tokens, e.g. 0.7; 0, the default, is greedy"),
    argument("--top-p", type=float, metavar="P", help="draw among the likeliest tokens of this probability together"),
    argument("--seed", type=int, metavar="N", help="of the random numbers, so that the answer can be repeated"),
)


def chat_of(options: argparse.Namespace) -> bool | None:
    """What is done with the chat template; None where that is left open.

    Raises:
        CellError: both are asked for.
    """
    if options.raw and options.chat:
        raise CellError("--raw and --chat exclude each other")
    return True if options.chat else False if options.raw else None


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of ``SAMPLING`` as commands of the session take them."""
    return {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}


@subcommand(
    "ask",
    "Let the active adapter, or another, answer a prompt. Nothing that is active changes.",
    argument("prompt", type=prompt_text, metavar="PROMPT", help=r"in quotes; \n is a line break"),
    argument(
        "--adapter",
        "-a",
        metavar="NAME[,NAME]",
        completes="adapter",
        words=(BASE,),
        help="who answers; several add up; base is the model without adapters; the active one if left out",
    ),
    *SAMPLING,
    argument("--max-new-tokens", type=positive, default=256, metavar="N", help="longest answer (default: 256)"),
    argument("--continue", dest="go_on", action="store_true", help="go on with the last conversation with it"),
    argument("--new", action="store_true", help="begin a new conversation, which is the default"),
    RAW,
    CHAT,
    TOKENIZER,
    ON_MODEL,
    example='%lora ask "Order: Ana from Lima needs 12 chairs." --temperature 0.7 --seed 1',
)
def ask(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Ask; the answer appears while the cell runs.

    Raises:
        CellError: options exclude each other.
    """
    if options.go_on and options.new:
        raise CellError("--continue and --new exclude each other")
    model = notebook.chosen(options.model)
    from nbpeft.widgets import LiveAnswers

    with closing(LiveAnswers(ui=notebook.ui)) as live:
        return notebook.session.ask(
            options.prompt,
            adapter=None if options.adapter is None else options.adapter.split(","),
            go_on=options.go_on,
            max_new_tokens=options.max_new_tokens,
            **sampling_of(options),
            tokenizer=notebook.tokenizer(options.tokenizer),
            chat=chat_of(options),
            on_text=live.draw,
            model=model,
        )
