"""The tokenizer of a notebook: named in the line, or found among the variables."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from nbpeft.errors import CellError
from nbpeft.magics.desk import Desk
from nbpeft.magics.parse import argument

RAW = argument("--raw", action="store_true", help="send the prompt as it is, outside the tokenizer's chat template")
CHAT = argument("--chat", action="store_true", help="put the prompt into the chat template; default: as in training")
TOKENIZER = argument(
    "--tokenizer",
    "-t",
    metavar="TOKENIZER",
    completes="variable",
    help="variable that holds the tokenizer; the notebook's only one if left out",
)

_NAMES = ("tokenizer", "tok", "processor")


def usual_tokenizer(desk: Desk) -> Any:
    """A tokenizer in a variable of a usual name, or the only one there is; None otherwise. Imports nothing."""
    for name in _NAMES:
        if _is_tokenizer(found := desk.namespace.get(name)):
            return found
    others = _distinct(value for key, value in list(desk.namespace.items()) if not key.startswith("_"))
    return others[0] if len(others) == 1 else None


def chosen_tokenizer(desk: Desk, name: str | None) -> Any:
    """The tokenizer named, or a usual one; None where there is none.

    Raises:
        CellError: the variable is not there, or holds none.
    """
    if name is None:
        return usual_tokenizer(desk)
    found = desk.value(name, "--tokenizer")
    if not _is_tokenizer(found):
        raise CellError(f"--tokenizer: {name!r} holds no tokenizer")
    return found


def _is_tokenizer(value: object) -> bool:
    return callable(value) and hasattr(value, "decode")


def _distinct(values: Iterable[object]) -> list[object]:
    module = sys.modules.get("transformers.tokenization_utils_base")
    kind = getattr(module, "PreTrainedTokenizerBase", None)
    found = [] if kind is None else [value for value in values if isinstance(value, kind)]
    return list({id(value): value for value in found}.values())
