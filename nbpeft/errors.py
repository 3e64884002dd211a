"""Every error nbpeft raises on purpose.

    NbpeftError
    ├── ConfigError               a field is unknown or its value is impossible
    │   ├── UnknownMethodError    the config names a method that is not registered
    │   └── BiasError             ``bias`` is none of its values
    ├── TargetError               nothing (or not everything asked for) in the model matches
    │   └── LayerKindError        what is asked for does not work on layers of that kind
    ├── AdapterError
    │   ├── UnknownAdapterError   no adapter of that name
    │   ├── ConversionError       no adapter of another method can stand for it
    │   └── AdapterExistsError    the name is taken
    ├── MergeError                these weights cannot be merged, or are merged already
    ├── CheckpointError
    │   ├── CheckpointNotFoundError
    │   │   └── BaseNotFoundError     the base model that an adapter names cannot be loaded
    │   ├── CorruptCheckpointError    truncated, tampered with, or not a checkpoint
    │   │   └── UntypedConfigError    a config does not say of which method it is
    │   └── BaseMismatchError         the checkpoint belongs to another base model
    ├── HotSwapError              the new adapter cannot take the old one's place
    ├── NotSupportedError         a name of PEFT that nbpeft has nothing for was used
    ├── StaleModelError           the handle's adapters were merged away, unloaded or taken over
    ├── BusyError                 another command is running on the model
    ├── TrainingError             the run cannot start or cannot learn
    ├── MissingPackageError       what only a part of nbpeft needs is not installed
    └── CellError                 a magic's line or cell cannot be read

and TrainingInterrupted, a KeyboardInterrupt.

Classes also derive from the built-in error that PEFT raises in the same place, so that
``except ValueError`` in existing code keeps working. The message is one line for a person;
the values behind it are in ``details``.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from typing import Any, ClassVar

from nbpeft.confidential import masked

_LONGEST_MESSAGE = 500
_LONGEST_NAME = 200
_MOST_CHOICES = 2_000
"""As many names are compared with one that was not found."""


class NbpeftError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: One line: what is wrong, what was expected, the nearest valid choice. Access tokens in it
            are masked, and a long one loses its middle, so that no value can flood the screen.
        **details: The values the message speaks of, for code that handles the error.
    """

    longest: ClassVar[int] = _LONGEST_MESSAGE

    def __init__(self, message: str, **details: object) -> None:
        self.message = shortened(masked(message), self.longest)
        super().__init__(self.message)
        self.details = details

    def __str__(self) -> str:
        return self.message


class ConfigError(NbpeftError, ValueError):
    """A config field is unknown or has an impossible value."""


class UnknownMethodError(ConfigError, KeyError):
    """The config names a method that is not registered."""


class BiasError(ConfigError, NotImplementedError):
    """``bias`` is none of its values."""


class TargetError(NbpeftError, ValueError):
    """Targets of a config match nothing in the model, or something that cannot be adapted."""


class LayerKindError(TargetError, TypeError):
    """What is asked for does not work on a layer of that kind."""


class AdapterError(NbpeftError, ValueError):
    """An adapter command cannot be carried out."""


class UnknownAdapterError(AdapterError, KeyError):
    """No adapter of that name."""


class ConversionError(AdapterError, TypeError):
    """An adapter cannot be written as one of another method."""


class AdapterExistsError(AdapterError):
    """The adapter name is taken."""


class MergeError(NbpeftError, ValueError, RuntimeError):
    """Weights cannot be merged, or are merged when they must not be."""


class CheckpointError(NbpeftError, ValueError):
    """A checkpoint cannot be read or written."""


class CheckpointNotFoundError(CheckpointError):
    """There is no checkpoint at that place."""


class BaseNotFoundError(CheckpointNotFoundError, OSError):
    """The base model that an adapter names is not there or cannot be loaded."""


class CorruptCheckpointError(CheckpointError):
    """The files are truncated, tampered with, or not a checkpoint."""


class UntypedConfigError(CorruptCheckpointError, KeyError, TypeError):
    """A config does not say of which method it is."""


class BaseMismatchError(CheckpointError, RuntimeError):
    """The checkpoint belongs to another base model."""


class HotSwapError(NbpeftError, ValueError, RuntimeError):
    """The new adapter cannot take the place of the old one."""


class NotSupportedError(NbpeftError, NotImplementedError):
    """A name of PEFT was used that nbpeft has nothing for: it can only be imported."""


class StaleModelError(NbpeftError, RuntimeError):
    """The handle is dead: its adapters were merged away, unloaded or taken over."""


class BusyError(NbpeftError, RuntimeError):
    """Another command is running on the model."""


class TrainingError(NbpeftError, RuntimeError):
    """A training run cannot start or cannot learn."""

    longest = 1_000  # out of memory: where it went, and each change that would help


class MissingPackageError(NbpeftError, ImportError):
    """A package is not installed that nbpeft needs for this alone."""


class TrainingInterrupted(KeyboardInterrupt):
    """An interruption (Ctrl-C, the kernel's stop button) ended a run; the message says what became of what it learned.

    It is raised after everything is in order, so that the cells queued behind do not run. A notebook shows it as
    one line.

    Args:
        message: one line.
        result: the ``TrainResult`` of the run, where there is one.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


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
    """Returns a message without line breaks and repeated spaces."""
    return " ".join(str(message).split())


def shortened(text: str, limit: int = _LONGEST_MESSAGE) -> str:
    """Returns a text without its middle where it is longer than that."""
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 3]} … {text[-tail:]}"


def shown(value: object, limit: int = 60) -> str:
    """Returns a value for a message: its repr, cut where it is long."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"  # such as a number with more digits than Python writes
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def few(names: Iterable[object], count: int = 5) -> str:
    """Returns the first of some names for a person, and how many more there are: ``'a', 'b' and 3 more``."""
    given = list(names)
    more = f" and {len(given) - count} more" if len(given) > count else ""
    return ", ".join(shown(name) for name in given[:count]) + more


def near(word: str, choices: Iterable[str], count: int = 3, *, cutoff: float = 0.5) -> list[str]:
    """Returns the choices most like ``word``, best first; none for a word that is too long to be a name."""
    if len(word) > _LONGEST_NAME:
        return []
    return difflib.get_close_matches(word, list(itertools.islice(choices, _MOST_CHOICES)), n=count, cutoff=cutoff)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`` Did you mean 'x' or 'y'?`` with a leading space, or the empty string."""
    names = near(word, choices)
    return f" Did you mean {' or '.join(repr(name) for name in names)}?" if names else ""


def with_article(value: object) -> str:
    """Returns what a value is: ``an int``, ``a Llama``, ``None``."""
    kind = type(value).__name__
    return "None" if value is None else f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


class PeftWarning(UserWarning):
    """Category, as in PEFT, of the warning that an adapter cannot be merged where it is put."""


PeftError = NbpeftError
NoMatchingPeftModuleError = TargetError
"""PEFT's names for the two."""
