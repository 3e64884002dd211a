"""All error classes of nbpeft.

    NbpeftError
    ├── ConfigError               a field is unknown or its value is invalid
    │   ├── UnknownMethodError    the config's method is not registered
    │   ├── BiasError             the value of ``bias`` is invalid
    │   └── ConfigTypeError       the value of a field is of another type
    ├── TargetError               targets match nothing in the model, or not all of them do
    │   └── LayerKindError        the request is not supported on layers of that kind
    ├── AdapterError
    │   ├── UnknownAdapterError   there is no adapter of that name
    │   ├── ConversionError       the adapter cannot be converted to another method
    │   └── AdapterExistsError    the adapter name is already used
    ├── MergeError                these weights cannot be merged, or are merged already
    ├── CheckpointError
    │   ├── CheckpointNotFoundError
    │   │   └── BaseNotFoundError     the base model that an adapter names cannot be loaded
    │   ├── CorruptCheckpointError    the files are truncated, tampered with, or not a checkpoint
    │   │   └── UntypedConfigError    the config has no ``peft_type``
    │   ├── PathTypeError             a folder or hub id is neither a text nor a path
    │   └── BaseMismatchError         the checkpoint belongs to another base model
    ├── HotSwapError              the new adapter cannot take the old one's place
    ├── NotSupportedError         nbpeft does not support the used name of PEFT
    ├── StaleModelError           the ``PeftModel`` is no longer valid: its adapters were merged, unloaded or taken over
    ├── BusyError                 another command is running on the model
    ├── MethodCheckError          a method fails checks of ``check_method``
    ├── TrainingError             the run cannot start or cannot learn
    ├── MissingPackageError       an optional dependency is not installed
    └── CellError                 a magic's line or cell cannot be parsed

    Interrupted                   a KeyboardInterrupt: Ctrl-C or the kernel's stop button ended a command
    └── TrainingInterrupted       the same for a training, after it was ended cleanly

The classes of errors also derive from the built-in error that PEFT raises in the same situation, so that
``except ValueError`` in existing code continues to work. The message is one line; the values it
mentions are in ``details``. For programs, each class has a ``code``, its name in words
(``UnknownAdapterError`` has ``unknown-adapter``), and each error ``to_dict()``.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable
from typing import Any, ClassVar

from nbpeft.confidential import masked
from nbpeft.jsonable import as_json

_LONGEST_MESSAGE = 500
_LONGEST_NAME, _LONGEST_NAMED = 200, 120
_SHOWN_CONTROLS = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    **{0x7F: "\u2421"},
    **{code: "\ufffd" for code in range(0x80, 0xA0)},
}
"""Control character -> the character that shows it: ``\\x1b`` is shown as ``\u241b``."""
_MOST_CHOICES = 2_000
"""Most valid names that are compared with an unknown one, for speed."""
_AS_NEAR = 0.2
"""The most by which a name may be less similar than the nearest one."""


class _Coded:
    """An error that programs can read.

    Attributes:
        code: the name of its class in words, e.g. ``unknown-adapter``; it stays the same between versions.
    """

    code: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.code = re.sub(r"(?<=.)(?=[A-Z])", "-", cls.__name__.removesuffix("Error")).lower()

    def to_dict(self) -> dict[str, Any]:
        """Returns the error as JSON types: ``code``, ``type`` (its class), ``message`` and ``details``."""
        details = as_json(getattr(self, "details", {}))
        return {"code": self.code, "type": type(self).__name__, "message": masked(str(self)), "details": details}


def error_as_json(error: BaseException) -> dict[str, Any]:
    """Returns any error as ``NbpeftError.to_dict`` does; the code of one of Python or a library is ``unexpected``.

    Args:
        error: the error.
    """
    if isinstance(error, _Coded):
        return error.to_dict()
    message = shortened(masked(in_one_line(error)))
    code = Interrupted.code if isinstance(error, KeyboardInterrupt) else "unexpected"
    return {"code": code, "type": type(error).__name__, "message": message, "details": {}}


class NbpeftError(_Coded, Exception):
    """Base class of all errors that nbpeft raises.

    Args:
        message: one line: what is wrong, what was expected, the nearest valid choice. Access tokens in it are masked,
            and the middle of a long message is left out, so that no value can flood the output.
        **details: the values that the message mentions, for code that handles the error.

    Attributes:
        message: the message.
        details: the values that the message mentions, by name.
    """

    longest: ClassVar[int] = _LONGEST_MESSAGE

    def __init__(self, message: str, **details: object) -> None:
        self.message = visible(shortened(masked(message), self.longest))
        super().__init__(self.message)
        self.details = details

    def __str__(self) -> str:
        return self.message


class ConfigError(NbpeftError, ValueError):
    """A config field is unknown or has an invalid value."""


class UnknownMethodError(ConfigError, KeyError):
    """The config's method is not registered."""


class BiasError(ConfigError, NotImplementedError):
    """The value of ``bias`` is invalid."""


class ConfigTypeError(ConfigError, TypeError):
    """The value of a config field is of another type."""


class TargetError(NbpeftError, ValueError):
    """The targets of a config match nothing in the model, or a module that cannot be adapted."""


class LayerKindError(TargetError, ConfigError, TypeError, NotImplementedError):
    """The request is not supported on a layer of that kind."""


class AdapterError(NbpeftError, ValueError):
    """An adapter command cannot be carried out."""


class UnknownAdapterError(AdapterError, KeyError):
    """There is no adapter of that name."""


class ConversionError(AdapterError, TypeError):
    """An adapter cannot be converted to another method."""


class AdapterExistsError(AdapterError):
    """The adapter name is already used."""


class MergeError(NbpeftError, ValueError, NotImplementedError):
    """Weights cannot be merged, or are merged although the command needs unmerged ones."""


class CheckpointError(NbpeftError, ValueError):
    """A checkpoint cannot be read or written."""


class CheckpointNotFoundError(CheckpointError):
    """There is no checkpoint at that place."""


class BaseNotFoundError(CheckpointNotFoundError, OSError):
    """The base model that an adapter names does not exist or cannot be loaded."""


class CorruptCheckpointError(CheckpointError):
    """The files are truncated, tampered with, or not a checkpoint."""


class UntypedConfigError(CorruptCheckpointError, KeyError, TypeError):
    """A config has no ``peft_type``."""


class PathTypeError(CheckpointError, TypeError):
    """A folder or hub id is neither a text nor a path."""


class BaseMismatchError(CheckpointError, RuntimeError):
    """The checkpoint belongs to another base model."""


class HotSwapError(NbpeftError, ValueError, RuntimeError):
    """The new adapter cannot take the place of the old one."""


class NotSupportedError(NbpeftError, NotImplementedError):
    """A name of PEFT was used that nbpeft does not support; it can only be imported."""


class StaleModelError(NbpeftError, RuntimeError):
    """The ``PeftModel`` is no longer valid: its adapters were merged, unloaded or taken over by another one."""


class BusyError(NbpeftError, RuntimeError):
    """Another command is running on the model."""

    @classmethod
    def while_training(cls, description: str) -> BusyError:
        """The error while a training runs in the background, e.g. ``training sql``."""
        return cls(f"busy: {description}; try again when it has finished, or stop it", running=description)


class MethodCheckError(NbpeftError, AssertionError):
    """A method fails checks of ``check_method``."""


class TrainingError(NbpeftError, RuntimeError):
    """A training run cannot start or cannot learn."""

    longest = 1_000  # an out-of-memory message lists the parts of memory and each change that would help


class MissingPackageError(NbpeftError, ImportError):
    """An optional dependency that this feature needs is not installed."""


class Interrupted(_Coded, KeyboardInterrupt):
    """An interruption (Ctrl-C, the kernel's stop button) ended a command.

    It keeps the notebook from running the cells queued after it. A notebook shows it as one line instead of a
    traceback.

    Args:
        message: one line about what was interrupted.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class TrainingInterrupted(Interrupted):
    """An interruption ended a training run. It is raised after the run was ended cleanly.

    Args:
        message: one line that says what happened to the trained weights.
        result: the ``TrainResult`` of the run, or None.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class CellError(NbpeftError, ValueError):
    """A magic's line or cell body cannot be parsed.

    Args:
        message: what is wrong, in one line.
        line: 1-based line number in the cell body, or None.
        column: 0-based column in that line, or None.
    """

    def __init__(self, message: str, *, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message, line=line, column=column)
        self.line = line
        self.column = column


def in_one_line(message: object) -> str:
    """Returns a message as one line, with whitespace collapsed."""
    return " ".join(str(message).split())


def visible(text: str) -> str:
    """Returns a text whose control characters are shown instead of obeyed: names in files may contain escape sequences.

    Lines and tabs are kept. It is how every text of a result or an error reaches a terminal or a page.
    """
    return text.translate(_SHOWN_CONTROLS)


def shortened(text: str, limit: int = _LONGEST_MESSAGE) -> str:
    """Returns a text, with its middle replaced by an ellipsis if it is too long.

    Args:
        text: the text.
        limit: most characters of the result.
    """
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 3]} … {text[-tail:]}"


def shown(value: object, limit: int = 60) -> str:
    """Returns the repr of a value for a message.

    Args:
        value: the value; if its repr fails, its type is shown.
        limit: most characters of the result; the end of a longer repr is cut.
    """
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"  # e.g. an integer with more digits than Python converts to text
    return cut(text, limit)


def cut(text: str, limit: int) -> str:
    """Returns a text, cut at its end if it is longer than ``limit`` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def few(names: Iterable[object], count: int = 5, *, quoted: bool = True) -> str:
    """Returns the first names of a list for a message: ``'a', 'b' and 3 more``.

    Args:
        names: the names, or other objects.
        count: number of names to show.
        quoted: show each as its repr, and cut the end of a long one; else as text, and cut the middle.
    """
    items = list(names)
    more = f" and {len(items) - count} more" if len(items) > count else ""
    text = shown if quoted else _unquoted
    return ", ".join(text(name) for name in items[:count]) + more


def _unquoted(name: object) -> str:
    return shortened(in_one_line(name), _LONGEST_NAMED)


def near(word: str, choices: Iterable[str], count: int = 3, *, cutoff: float = 0.5) -> list[str]:
    """Returns the choices most similar to a word, best first; an empty list if the word is too long to be a name.

    Args:
        word: the word.
        choices: valid names.
        count: most names to return.
        cutoff: least similarity, 0 to 1, as in ``difflib.get_close_matches``.
    """
    if len(word) > _LONGEST_NAME:
        return []
    found = difflib.get_close_matches(word, list(itertools.islice(choices, _MOST_CHOICES)), n=count, cutoff=cutoff)
    ratios = [difflib.SequenceMatcher(None, name, word).ratio() for name in found]
    return [name for name, ratio in zip(found, ratios, strict=True) if ratio > ratios[0] - _AS_NEAR]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns a hint with similar names: `` Did you mean 'x' or 'y'?`` with a leading space, or the empty string.

    Args:
        word: an unknown name.
        choices: valid names.
    """
    names = near(word, choices)
    return f" Did you mean {' or '.join(repr(name) for name in names)}?" if names else ""


def with_article(value: object) -> str:
    """Returns the type of a value with its article: ``an int``, ``a Llama``; ``None`` for None."""
    kind = type(value).__name__
    return "None" if value is None else f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def check_bool(name: str, value: object) -> None:
    """Refuses a value that is neither True nor False, such as a text, which would count as true.

    Args:
        name: name of the argument.
        value: its value.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {value!r:.60}", field=name)


def check_text(name: str, value: object, *, optional: bool = False) -> None:
    """Refuses a value that is not a text.

    Args:
        name: name of the argument.
        value: its value.
        optional: whether None is valid too.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, str) and not (optional and value is None):
        raise ConfigError(f"{name} must be a text, not {in_one_line(shown(value))}", field=name)


class PeftWarning(UserWarning):
    """Category, as in PEFT, of the warning that an adapter cannot be merged into its layer."""


PeftError = NbpeftError
NoMatchingPeftModuleError = TargetError
"""PEFT's names for ``NbpeftError`` and ``TargetError``."""
