"""Every option of the magics: its commands, its keyword in Python, its meaning and its page, as a page of the guide.

``python -m tests.option_table`` writes ``notebooks/guide/options.md``. An option ``--x-y`` of a command and the keyword
``x_y`` of the session's method are one word; the exceptions are here, with the reason of each.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbpeft
from nbpeft.magics.lora import CELLS, SUBCOMMANDS
from nbpeft.magics.parse import Argument
from nbpeft.session import Session
from nbpeft.training.request import TrainRequest

GUIDE = Path(__file__).resolve().parent.parent / "notebooks" / "guide"
PAGE = GUIDE / "options.md"
METHODS = {"lora": "add", "lora_train": "train", "watch": "result"}
"""Commands that are not called as their method."""
HANDED_ON: dict[str, tuple[Callable[..., Any], ...]] = {
    "add": (Session.preview, nbpeft.forecast),
    "lora": (Session.preview, nbpeft.forecast),
    "lora_train": (TrainRequest,),
    "merge": (nbpeft.merge_to_folder,),
    "methods": (nbpeft.forecast,),
    "plan": (nbpeft.forecast, TrainRequest),
    "qlora": (Session.preview_qlora, nbpeft.forecast),
    "resume": (TrainRequest,),
    "score": (nbpeft.score,),
}
"""What a method hands its ``**keywords`` on to, and what a command calls beside its method: its own keywords count."""
IN_THE_NOTEBOOK_ALONE = {
    "--method": "in Python the config's class says it",
    "--panel": "shows widgets",
    "--replace": "of %%qlora: overwrites a variable",
    "--dry-run": "in Python another method previews",
    "--new": "says what is the default",
    "--delete": "is the method delete_run",
    "--rename": "is the method rename_run",
    "--note": "is the method note_run",
    "--folder": "is the method runs_folder",
    "--traceback": "is the property last_traceback",
}
"""Options that no keyword corresponds to, and why."""
ANOTHER_WORD = {
    "--no-base": ("include_base", "base is the folder of a base model where there is a keyword base"),
    "--template": ("chat_template_kwargs", "a cell has name=value after it, no dictionary"),
    "--for": ("engine", "for is a word of Python"),
    "--inference": ("training", "a switch names what is not the default"),
}
"""Option -> the keyword that is called otherwise, and why."""


PAGES = {
    **dict.fromkeys(("lora_train", "resume", "clone", "runs"), "training"),
    **dict.fromkeys(("merge", "ship", "push"), "serving"),
    **{"plan": "memory", "memory": "memory", "methods": "choosing-a-method", "data": "data", "score": "scoring"},
    **{"qlora": "quantization", "export": "several-cards"},
}
"""Command -> the page that explains it, where it is not that of all commands."""
_HEAD = """# Options

Every option of the commands, with its keyword in Python: that of the [session's method](commands.md), or of the
function beside it. `%lora help COMMAND` explains those of one command.

| option | value | of | in Python | meaning | more |
|---|---|---|---|---|---|
"""


def keywords_of(name: str) -> set[str]:
    """The keywords of a command's method, and of what it hands them on to."""
    method = getattr(Session, METHODS.get(name, name), None)
    functions = (*HANDED_ON.get(name, ()), *(() if method is None else (method,)))
    return {keyword for function in functions for keyword in inspect.signature(function).parameters}


def flag_of(item: Argument) -> str:
    """The long form of an option."""
    return next(flag for flag in item.flags if flag.startswith("--"))


def keyword_of(name: str, item: Argument) -> str | None:
    """The keyword of an option of a command; None for an option of the notebook alone."""
    flag, known = flag_of(item), keywords_of(name)
    word = flag.removeprefix("--").replace("-", "_")
    if word in known:
        return word
    if flag in IN_THE_NOTEBOOK_ALONE:
        return None
    if flag in ANOTHER_WORD:
        return ANOTHER_WORD[flag][0]
    return "variable" if (name, flag) == ("qlora", "--as") else word.removeprefix("no_")


def table() -> str:
    """The page."""
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, command in {**CELLS, **SUBCOMMANDS}.items():
        for item in command.arguments:
            if not item.positional:
                keyword = None if name == "panel" else keyword_of(name, item)
                alone = IN_THE_NOTEBOOK_ALONE.get(flag_of(item), "")
                rows[flag_of(item), _flags(item), _value(item), keyword or alone, _meaning(item)].append(name)
    lines = [
        f"| {flags} | {value} | {_commands(names)} | {f'`{word}`' if word.isidentifier() else word} | {meaning} "
        f"| {_page(names[0])} |\n"
        for (_, flags, value, word, meaning), names in sorted(rows.items())
    ]
    return _HEAD + "".join(lines)


def _flags(item: Argument) -> str:
    return ", ".join(f"`{flag}`" for flag in sorted(item.flags, key=len, reverse=True))


def _value(item: Argument) -> str:
    shown: Any = item.options.get("metavar") or ""
    text = " ".join(shown) if isinstance(shown, tuple) else str(shown)
    return _cell(f"`{text}`") if text else ""


def _meaning(item: Argument) -> str:
    return _cell(str(item.options["help"]).replace("%%", "%"))


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*").replace("_svd", r"\_svd")


def _commands(names: list[str]) -> str:
    if len(names) > 12:
        return f"{len(names)} commands"
    return ", ".join(f"`%%{name}`" if name in CELLS else f"`{name}`" for name in names)


def _page(name: str) -> str:
    """A link to the page that explains a command."""
    page = PAGES.get(name, "commands")
    title = (GUIDE / f"{page}.md").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    return f"[{title}]({page}.md)"


if __name__ == "__main__":
    PAGE.write_text(table(), encoding="utf-8")
