"""Every error nbpeft raises on purpose.

    NbpeftError
    ├── ConfigError               a field is unknown or its value is impossible
    │   └── UnknownMethodError    the config names a method that is not registered
    ├── TargetError               nothing (or not everything asked for) in the model matches
    │   └── LayerKindError        what is asked for does not work on layers of that kind
    ├── AdapterError
    │   ├── UnknownAdapterError   no adapter of that name
    │   └── AdapterExistsError    the name is taken
    ├── MergeError                these weights cannot be merged, or are merged already
    ├── CheckpointError
    │   ├── CheckpointNotFoundError
    │   ├── CorruptCheckpointError    truncated, tampered with, or not a checkpoint
    │   └── BaseMismatchError         the checkpoint belongs to another base model
    ├── HotSwapError              the new adapter cannot take the old one's place
    ├── StaleModelError           the handle's adapters were merged away, unloaded or taken over
    ├── BusyError                 another command is running on the model
    ├── TrainingError             the run cannot start or cannot learn
    └── CellError                 a magic's line or cell cannot be read

Classes also derive from the built-in error that PEFT raises in the same place, so that
``except ValueError`` in existing code keeps working. The message is one line for a person;
the values behind it are in ``details``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from nbpeft.confidential import masked


class NbpeftError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: One line: what is wrong, what was expected, the nearest valid choice. Access tokens in it are masked.
        **details: The values the message speaks of, for code that handles the error.
    """

    def __init__(self, message: str, **details: object) -> None:
        message = masked(message)
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return self.message


class ConfigError(NbpeftError, ValueError):
    """A config field is unknown or has an impossible value."""


class UnknownMethodError(ConfigError, KeyError):
    """The config names a method that is not registered."""


class TargetError(NbpeftError, ValueError):
    """Targets of a config match nothing in the model, or something that cannot be adapted."""


class LayerKindError(TargetError, TypeError):
    """What is asked for does not work on a layer of that kind."""


class AdapterError(NbpeftError, ValueError):
    """An adapter command cannot be carried out."""


class UnknownAdapterError(AdapterError, KeyError):
    """No adapter of that name."""


class AdapterExistsError(AdapterError):
    """The adapter name is taken."""


class MergeError(NbpeftError, ValueError, RuntimeError):
    """Weights cannot be merged, or are merged when they must not be."""


class CheckpointError(NbpeftError, ValueError):
    """A checkpoint cannot be read or written."""


class CheckpointNotFoundError(CheckpointError):
    """There is no checkpoint at that place."""


class CorruptCheckpointError(CheckpointError):
    """The files are truncated, tampered with, or not a checkpoint."""


class BaseMismatchError(CheckpointError, RuntimeError):
    """The checkpoint belongs to another base model."""


class HotSwapError(NbpeftError, ValueError, RuntimeError):
    """The new adapter cannot take the place of the old one."""


class StaleModelError(NbpeftError, RuntimeError):
    """The handle is dead: its adapters were merged away, unloaded or taken over."""


class BusyError(NbpeftError, RuntimeError):
    """Another command is running on the model."""


class TrainingError(NbpeftError, RuntimeError):
    """A training run cannot start or cannot learn."""


class CellError(NbpeftError, ValueError):
    """A magic's line or cell body cannot be read.

    Args:
        message: What is wrong, in one line.
        line: 1-based line in the cell body, or None.
        column: 0-based column in that line, or None.
    """

    def __init__(self, message: str, *, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message, line=line, column=column)
        self.line = line
        self.column = column


def in_one_line(message: object) -> str:
    """A message without line breaks and repeated spaces."""
    return " ".join(str(message).split())


def near(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The choices most like ``word``, best first."""
    return difflib.get_close_matches(word, list(choices), n=count, cutoff=0.5)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`` Did you mean 'x' or 'y'?`` with a leading space, or the empty string."""
    names = near(word, choices)
    return f" Did you mean {' or '.join(repr(name) for name in names)}?" if names else ""


def with_article(value: object) -> str:
    """What a value is: ``an int``, ``a Llama``, ``None``."""
    kind = type(value).__name__
    return "None" if value is None else f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


class PeftWarning(UserWarning):
    """Category, as in PEFT, of the warning that an adapter cannot be merged where it is put."""


PeftError = NbpeftError
NoMatchingPeftModuleError = TargetError
"""PEFT's names for the two."""
