"""Combining adapters, comparing their answers, and swapping one for another in place."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from nbpeft.errors import CellError, ConfigError
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument, positive, prompt_text
from nbpeft.magics.registry import ON_MODEL, TOKENIZER, answer_limit, subcommand
from nbpeft.magics.subcommands.asking import CHAT, NO_CHAT, PROMPT_HELP, SAMPLING, SYSTEM, chat_of, sampling_of
from nbpeft.magics.subcommands.panels import show_panel
from nbpeft.session.handles import is_module


@subcommand(
    "combine",
    "Combine adapters into a new one by a weighted sum, and report the approximation error. "
    "The default, exact, is the true sum of the adapters' deltas (reduced to rank --r by a truncated SVD). "
    "The other types are PEFT's: linear mixes one adapter's A with the other's B and can be far from the sum.",
    argument(
        "weights",
        nargs="+",
        metavar="NAME=WEIGHT",
        completes="weight",
        help="NAME alone has weight 1; a negative weight subtracts",
    ),
    argument("--name", required=True, metavar="NAME", help="name of the new adapter"),
    argument(
        "--type",
        default="exact",
        metavar="TYPE",
        completes="combination",
        help="for LoRA exact, linear, cat or svd; other methods have their own. Types with a density (ties, dare, "
        "magnitude_prune) are for get_session().combine",
    ),
    argument("--r", type=positive, metavar="R", help="rank of the result; for exact, svd and ..._svd"),
    argument("--replace", action="store_true", help="replace an adapter of that name"),
    ON_MODEL,
    example="%lora combine orders=0.7 pirate=0.3 --name both",
)
def combine(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Combine adapters."""
    try:
        return notebook.session.combine(
            _weights(options.weights, "%lora combine"),
            name=options.name,
            type=options.type,
            r=options.r,
            replace=options.replace,
            model=notebook.chosen(options.model),
        )
    except ConfigError as error:
        if error.details.get("missing") != "density":
            raise
        way = f"nbpeft.get_session().combine({{…}}, name={options.name!r}, type={options.type!r}, density=0.5)"
        raise CellError(f"%lora combine: type {options.type} needs a density, which is set in Python: {way}") from None


@subcommand(
    "compare",
    "Compare the answers of all adapters and the base model to the same prompt, side by side, in one batch.",
    argument("prompt", nargs="?", type=prompt_text, metavar="PROMPT", help=PROMPT_HELP),
    argument("--prompts", metavar="LIST", completes="variable", help="a variable or expression with several prompts"),
    argument("--adapters", "-a", nargs="+", metavar="NAME", completes="adapter", help="only these adapters"),
    argument(
        "--blend",
        nargs="+",
        action="append",
        metavar="NAME=WEIGHT",
        completes="weight",
        help="a weighted sum as an additional column; may be repeated",
    ),
    answer_limit(64, "maximum length of an answer in tokens (default: 64)"),
    SYSTEM,
    *SAMPLING,
    argument("--no-base", dest="include_base", action="store_false", help="leave the base model out"),
    NO_CHAT,
    CHAT,
    argument("--panel", action="store_true", help="show a panel with a box for the prompt"),
    TOKENIZER,
    ON_MODEL,
    example='%lora compare "Order: Ana from Lima needs 12 chairs." --blend orders=0.7 pirate=0.3',
)
def compare(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Compare answers, which appear while they are generated, or show the panel for it."""
    if options.panel:
        prompt = notebook.prompt(options.prompt) or ""
        if not isinstance(prompt, str):
            raise CellError("--panel takes a prompt as text; compare a conversation without --panel")
        initial = {"prompt": prompt, "max_new_tokens": options.max_new_tokens, "chat": chat_of(options)}
        initial |= {"system": notebook.prompt(options.system, "--system"), **sampling_of(options)}
        return show_panel(notebook, "compare", options.model, "%lora compare --panel --model", **initial)
    model = notebook.chosen(options.model)
    prompts: Any = _prompts(options, notebook)
    blends = [_weights(words, "--blend") for words in options.blend or ()]
    from nbpeft.widgets import LiveAnswers

    with closing(LiveAnswers(ui=notebook.ui)) as live:
        return notebook.session.compare(
            prompts,
            adapters=options.adapters,
            blend=blends,
            include_base=options.include_base,
            max_new_tokens=options.max_new_tokens,
            **sampling_of(options),
            tokenizer=notebook.tokenizer(options.tokenizer),
            chat=chat_of(options),
            system=notebook.prompt(options.system, "--system"),
            on_text=live.draw,
            model=model,
        )


@subcommand(
    "swap",
    "Replace an adapter of the model by a saved one in place, after checks and without recompiling.",
    argument("path", metavar="PATH", completes="saved", help="a folder, or a repository on the Hub"),
    argument("--into", "-i", metavar="NAME", completes="adapter", help="adapter to replace (default: the active one)"),
    argument(
        "--check-prompt",
        type=prompt_text,
        metavar="PROMPT",
        help="answer this prompt before and after; logits that are not finite undo the swap",
    ),
    argument(
        "--validate",
        metavar="FUNCTION",
        completes="variable",
        help="called with the model; False or an exception undoes the swap",
    ),
    answer_limit(32, "maximum length of the answer to --check-prompt in tokens (default: 32)"),
    argument("--replace", action="store_true", help="replace an adapter even if its training is not saved"),
    NO_CHAT,
    CHAT,
    TOKENIZER,
    ON_MODEL,
    example='%lora swap adapters/orders_v2 --into orders --check-prompt "Order: Ana from Lima needs 12 chairs."',
)
def swap(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Swap an adapter in place."""
    validate = None if options.validate is None else notebook.value(options.validate, "--validate")
    if validate is not None and not callable(validate):
        raise CellError(f"--validate: {options.validate!r} is not a function")
    return notebook.session.swap(
        options.path,
        into=options.into,
        validate=validate,
        check_prompt=notebook.prompt(options.check_prompt, "--check-prompt"),
        max_new_tokens=options.max_new_tokens,
        tokenizer=None if options.check_prompt is None else notebook.tokenizer(options.tokenizer),
        chat=chat_of(options),
        replace=options.replace,
        model=_compiled(notebook.chosen(options.model), notebook, options.into),
    )


def _weights(words: Sequence[str], what: str) -> dict[str, float]:
    """Read ``a=0.7 b`` as ``{"a": 0.7, "b": 1.0}``."""
    weights: dict[str, float] = {}
    for word in words:
        name, _, number = word.rpartition("=") if "=" in word else (word, "", "1")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise CellError(f"{what}: {word!r} is not name=weight, e.g. {name or 'orders'}=0.7")
        if name in weights:
            raise CellError(f"{what}: {name!r} is given twice")
        weights[name] = weight
    return weights


def _prompts(options: argparse.Namespace, notebook: NotebookContext) -> Any:
    if (options.prompt is None) == (options.prompts is None):
        raise CellError('%lora compare needs a prompt in quotes: %lora compare "…" (or --prompts LIST, or --panel)')
    if options.prompts is None:
        return notebook.prompt(options.prompt)
    prompts = notebook.value(options.prompts, "--prompts")
    if isinstance(prompts, str):
        return prompts
    try:
        return list(prompts)
    except TypeError:
        raise CellError(f"--prompts: {options.prompts!r} is not a list of prompts") from None


def _compiled(model: Any, notebook: NotebookContext, into: str | None) -> Any:
    """The ``torch.compile``d form of a model, if a variable has it, so that the swap keeps the compiled graphs."""
    if hasattr(model, "_orig_mod"):
        return model
    handle = notebook.session.model(model, command="swap", adapters=(into,))
    inner = (handle, handle.get_base_model())
    for key, value in list(notebook.namespace.items()):
        if not key.startswith("_") and is_module(value) and getattr(value, "_orig_mod", None) in inner:
            return value
    return handle
