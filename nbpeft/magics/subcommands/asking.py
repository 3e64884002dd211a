"""``%lora ask``, and the options shared by all commands in which adapters answer."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

from nbpeft.errors import CellError
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument, prompt_text
from nbpeft.magics.registry import ON_MODEL, TOKENIZER, answer_limit, subcommand
from nbpeft.session.results.comparing import BASE

PROMPT_HELP = r"in quotes, \n is a line break; or a variable or expression with a text or a list of messages"
NO_CHAT = argument(
    "--no-chat", action="store_true", help="send the prompt as it is, without the tokenizer's chat template"
)
CHAT = argument("--chat", action="store_true", help="apply the chat template to the prompt (default: as in training)")
SYSTEM = argument(
    "--system",
    type=prompt_text,
    metavar="TEXT",
    help='system prompt, "" for none (default: that of the rows the adapter was trained on)',
)
SAMPLING = (
    argument("--temperature", type=float, metavar="T", help="sample tokens, e.g. 0.7; 0, the default, is greedy"),
    argument("--top-p", type=float, metavar="P", help="sample from the most likely tokens with this total probability"),
    argument("--seed", type=int, metavar="N", help="random seed, for an answer that can be reproduced"),
)


def chat_of(options: argparse.Namespace) -> bool | None:
    """Whether to apply the chat template; None if neither option is given.

    Raises:
        CellError: both options are given.
    """
    if options.no_chat and options.chat:
        raise CellError("--no-chat and --chat exclude each other")
    return True if options.chat else False if options.no_chat else None


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options ``SAMPLING`` as keywords of the session's commands."""
    return {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}


@subcommand(
    "ask",
    "Answer a prompt with the active adapter or another one. The active adapters do not change.",
    argument("prompt", type=prompt_text, metavar="PROMPT", help=PROMPT_HELP),
    SYSTEM,
    argument(
        "--adapter",
        "-a",
        metavar="NAME[,NAME]",
        completes="adapter",
        words=(BASE,),
        help="the adapter that answers; several are summed; base is the model alone (default: the active one)",
    ),
    *SAMPLING,
    answer_limit(256, "maximum length of the answer in tokens (default: 256)"),
    argument("--follow-up", action="store_true", help="continue the last conversation with this adapter"),
    argument("--new", action="store_true", help="start a new conversation, which is the default"),
    NO_CHAT,
    CHAT,
    TOKENIZER,
    ON_MODEL,
    example='%lora ask "Order: Ana from Lima needs 12 chairs." --temperature 0.7 --seed 1',
)
def ask(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Answer a prompt; the answer appears while it is generated."""
    if options.follow_up and options.new:
        raise CellError("--follow-up and --new exclude each other")
    model = notebook.chosen(options.model)
    from nbpeft.widgets import LiveAnswers

    with closing(LiveAnswers(ui=notebook.ui)) as live:
        return notebook.session.ask(
            notebook.prompt(options.prompt),
            system=notebook.prompt(options.system, "--system"),
            adapter=None if options.adapter is None else options.adapter.split(","),
            follow_up=options.follow_up,
            max_new_tokens=options.max_new_tokens,
            **sampling_of(options),
            tokenizer=notebook.tokenizer(options.tokenizer),
            chat=chat_of(options),
            on_text=live.draw,
            model=model,
        )
