"""Parses the line of a magic into a request. Pure functions, without IPython or a model.

A magic has subcommands (``%lora use``); a subcommand has arguments. ``parse_line`` finds the subcommand and parses its
arguments; every mistake is a ``CellError`` with a one-line message that names the nearest valid word.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from nbpeft.errors import CellError, did_you_mean, near, with_article
from nbpeft.magics.tokenize import Word, folder, option_value, own_names, reference, tokenize
from nbpeft.names import RENAMED
from nbpeft.session.fields import meant_field
from nbpeft.session.handles import is_module

_REQUIRED = "the following arguments are required: "
_CLOSE = 0.8
"""The ``difflib`` ratio above which a ``name=value`` word after an option belongs to the option and is not a field."""
_EXPRESSION = re.compile(r"\{[^\W\d]\w*[.\[(][^{}]*\}.*")
"""Expressions such as ``{runs[0]}``, which IPython's own magics evaluate."""
_NAMED = re.compile(r"\{([^\W\d]\w*)\}")
_VARIABLE = re.compile(r"([^\W\d]\w*)(?:[.\[].*)?", re.DOTALL)
"""A variable, or an expression that begins with one."""
_SHARE = re.compile(r"[^\s=-][^\s=]*\*(?:\d+\.?\d*|\.\d+)")
"""A part of a mixture of data: ``rows*0.7``."""
_OF_ADAPTER = re.compile(r"[\w+-]+=(?!=)\S")
"""The rows of an adapter: ``a=rows``."""
_GIVEN = "given so far"
"""The attribute of a namespace, while it is filled, with the names of the options that are given."""
_DIGITS = 18
"""The greatest number of digits of a whole number in an option."""


@dataclass(frozen=True)
class Argument:
    """One argument of a subcommand, as argparse takes it.

    Attributes:
        flags: ``("names",)`` or ``("--name", "-n")``.
        options: keywords of ``add_argument``.
        completes: the kind of its value, for completion: ``adapter``, ``weight`` (of an adapter), ``combination``,
            ``method``, ``model``, ``modules`` (of a model), ``variable``, ``data``, ``path``, ``saved`` (a saved
            adapter), ``name`` (a new one), or empty.
        words: further values to complete. A word such as ``prompt=`` declares that ``prompt=value`` after the option
            belongs to the option and is not a field.
        reads: called with the notebook and the value; returns what a method of the session takes. None for the value.
    """

    flags: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    completes: str = ""
    words: tuple[str, ...] = ()
    reads: Callable[[Any, Any], Any] | None = None

    @property
    def dest(self) -> str:
        """The name under which argparse stores its value."""
        return self.options.get("dest") or self.flags[0].lstrip("-").replace("-", "_")

    @property
    def positional(self) -> bool:
        """Whether it is a positional argument."""
        return not self.flags[0].startswith("-")

    @property
    def takes_value(self) -> bool:
        """Whether a value follows it."""
        return self.options.get("action") not in ("store_true", "store_false", "store_const")

    @property
    def many(self) -> bool:
        """Whether it takes several values."""
        return self.options.get("nargs") in ("+", "*")


def argument(
    *flags: str,
    completes: str = "",
    words: tuple[str, ...] = (),
    reads: Callable[[Any, Any], Any] | None = None,
    **options: Any,
) -> Argument:
    """Create an ``Argument``, with the keywords of argparse's ``add_argument`` as ``options``."""
    return Argument(flags, options, completes, words, reads)


@dataclass(frozen=True)
class Subcommand:
    """A subcommand of ``%lora``, or a cell magic.

    Attributes:
        name: the word after ``%lora``, or the cell magic.
        summary: one line for the help.
        run: called with the parsed options and the notebook; returns a result to show.
        arguments: its arguments.
        fields: the kind of fields that ``name=value`` words set: ``config``, ``training``, ``qlora`` or none.
        example: shown in the help.
        refused: name of an option or field of a similar command that it does not have -> why.
    """

    name: str
    summary: str
    run: Callable[[argparse.Namespace, Any], object]
    arguments: tuple[Argument, ...] = ()
    fields: str = ""
    example: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A parsed line.

    Attributes:
        command: the subcommand.
        options: its arguments; ``options.fields`` are the ``name=value`` words.
        help: whether only its help is requested.
    """

    command: Subcommand
    options: argparse.Namespace
    help: bool = False


class LineParser(argparse.ArgumentParser):
    """The parser of a subcommand; it neither prints nor exits.

    Args:
        command: the subcommand.
        prog: how the line begins, e.g. ``%lora use``.
    """

    def __init__(self, command: Subcommand, prog: str) -> None:
        field_words = "\n\nField words: name=value, as in the cell form." if command.fields else ""
        super().__init__(
            prog=prog,
            description=command.summary + field_words,
            epilog=f"example:\n  {command.example}" if command.example else None,
            add_help=False,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.command = command
        self._words: Sequence[str] = ()
        self.register("action", None, _Once)
        self.register("type", None, _plain)
        self.register("type", int, _whole)
        self.register("type", float, _number)
        for item in command.arguments:
            self.add_argument(*item.flags, **item.options)

    def error(self, message: str) -> NoReturn:
        """Turn argparse's message into a one-line error.

        Raises:
            CellError: always.
        """
        message = re.sub(r"(--[\w-]+)/-\w\b", r"\1", message)
        needed = message.removeprefix(_REQUIRED)
        if needed != message:
            raise CellError(f"{self.prog} needs {needed}" + (f", e.g. {self._example}" if self._example else ""))
        refused = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        choices = [name.strip("'") for name in refused[2].split(", ")] if refused else []
        hint = did_you_mean(refused[1], choices) if refused else ""
        dashed = next((word for word in self._words if self._is_unknown(word)), "") if " expected " in message else ""
        if dashed:
            hint = f' A value that begins with a dash is put in quotes: "{dashed:.60}"'
        ending = f".{hint}" if hint else f"; see {self.prog} --help"
        raise CellError(f"{self.prog}: {message.removeprefix('argument ')}{ending}")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse words.

        Raises:
            CellError: an argument is unknown, missing or invalid.
        """
        self._words = words
        options, unknown = self.parse_known_args(list(words))
        vars(options).pop(_GIVEN, None)
        if not unknown:
            return options
        first = unknown[0]
        if first.startswith("-"):
            # Without the dashes, which would make all options look similar.
            known = [flag[2:] for item in self.command.arguments for flag in item.flags if flag.startswith("--")]
            word = first.split("=")[0].lstrip("-")
            meant = [FORMER_OPTIONS[word]] if FORMER_OPTIONS.get(word) in known else near(word, known)
            named_field = meant_field(self.command.fields, word)
            close = " or ".join(f"'--{name}'" for name in meant)
            hint = f" Did you mean {close}?" if close else ""
            if word in _COUNTS and any(item.completes == "data" for item in self.command.arguments):
                hint = " Part of the rows is written with their name: train.csv[:4]"
            elif value := self._given_bare(word):
                hint = f" {value} is given without an option: {self.prog} {value}"
            elif named_field or (word and self.command.fields and not close):
                hint = f" A field is set without dashes: {named_field or word:.60}=…"
            raise CellError(f"{self.prog} has no option {first:.60}.{hint or self._usage}")
        raise CellError(f"{self.prog}: unexpected argument {first!r:.60}.{self._usage}")

    def _parse_optional(self, arg_string: str) -> Any:
        """The option that a word names, as argparse finds it; text in quotes names none."""
        return None if isinstance(arg_string, Quoted) else super()._parse_optional(arg_string)

    def _is_unknown(self, word: str) -> bool:
        """Whether a word is read as an option and the command has none of that name."""
        known = {flag for item in self.command.arguments for flag in item.flags}
        return word.startswith("-") and not isinstance(word, Quoted) and word.partition("=")[0] not in known

    @property
    def _example(self) -> str:
        """The first line of the command's example; empty if it has none."""
        return self.command.example.partition("\n")[0]

    @property
    def _usage(self) -> str:
        """How the command is used, to follow what was wrong with a line."""
        explained = f"{self.prog} --help explains it"
        return f" Example: {self._example} ({explained})" if self._example else f" {explained}"

    def _given_bare(self, word: str) -> str:
        """The value that has no option in this command and is meant by a word, in the singular or the plural."""
        for item in self.command.arguments:
            value = str(item.options.get("metavar"))
            if item.positional and word.removesuffix("s") in {
                name.removesuffix("s") for name in (item.dest, item.completes, value.lower()) if name
            }:
                return value
        return ""


def parse_arguments(command: Subcommand, prog: str, words: Sequence[Word], namespace: Mapping[str, Any]) -> Request:
    """Parses the arguments of one command; ``{name}`` and ``$name`` in them are variables of the namespace.

    Raises:
        CellError: an argument is unknown, missing or invalid.
    """
    if any(word.text in ("-h", "--help") and not word.quoted for word in words):
        return Request(command, argparse.Namespace(), help=True)
    for word in words:
        name = word.text.partition("=")[0].lstrip("-")
        if name in command.refused and (word.text.startswith("-") or _is_field(word)):
            raise CellError(f"{prog} takes no {name}: {command.refused[name]}")
        _refuse_former(command, prog, word)
    words = _rows_joined(command, words)
    own_pairs = _own_pairs(command, words)
    fields = [word for word in words if command.fields and _is_field(word) and word not in own_pairs]
    rest = [expand(word, namespace) for word in words if word not in fields]
    options = LineParser(command, prog).read(_mixtures_joined(rest))
    options.fields = fields
    return Request(command, options)


def _refuse_former(command: Subcommand, prog: str, word: Word) -> None:
    """Refuse the former name of an option of this command, with its present one."""
    flag = word.text.partition("=")[0]
    known = {flag for item in command.arguments for flag in item.flags}
    if word.quoted or not flag.startswith("--") or flag in known:
        return
    present = FORMER_OPTIONS.get(flag[2:])
    if f"--{present}" in known:
        raise CellError(f"{prog} has no option {flag}. It is called '--{present}' now")
    if flag[2:] in _PYTHON_ALONE.get(command.name, ()):
        raise CellError(
            f"{prog} has no option {flag}: it is an argument of get_session().{command.name} in Python alone"
        )


def is_mixture(text: str) -> bool:
    """Whether the text of an option names a mixture of data: ``a*0.7 b*0.3``."""
    words = text.split()
    return len(words) > 1 and all(map(_SHARE.fullmatch, words))


def parts_of(text: str) -> list[tuple[str, float]]:
    """The parts of a mixture, each with its share."""
    parts = [word.rpartition("*") for word in text.split()]
    return [(name, float(share)) for name, _, share in parts]


def _mixtures_joined(words: Sequence[str]) -> list[str]:
    """The words of a line, with the parts of a mixture as one word."""
    found: list[str] = []
    for word in words:
        if found and is_mixture(f"{found[-1]} {word}"):
            found[-1] = f"{found[-1]} {word}"
        else:
            found.append(word)
    return found


def rows_by_adapter(text: str) -> dict[str, str]:
    """The rows of each adapter in the text of an option: ``a=rows_a b=rows_b``; empty for the text of other data."""
    try:
        words = [word.text.partition("=") for word in tokenize(text)] if _OF_ADAPTER.match(text) else []
    except CellError:  # a quote that is not closed
        return {}
    return {name: rows for name, _, rows in words} if all(equals for _, equals, _ in words) else {}


def _rows_joined(command: Subcommand, words: Sequence[Word]) -> list[Word]:
    """The words of a line, with the rows of several adapters after an option for data as one word."""
    found: list[Word] = []
    # Whether the next word may be such rows: after an option for data, after the rows of an adapter, or as an argument.
    after = any(item.positional and item.completes == "data" for item in command.arguments)
    for word in words:
        of_adapter = after and not word.quoted and bool(_OF_ADAPTER.match(word.text))
        if of_adapter and found and not found[-1].text.startswith("-"):
            found[-1] = Word(f"{found[-1].text} {word.text}", found[-1].start, word.end, quoted=True)
        else:
            found.append(replace(word, quoted=True) if of_adapter else word)
        option = next((item for item in command.arguments if word.text in item.flags), None)
        after = of_adapter or (option is not None and option.completes == "data")
    return found


def _own_pairs(command: Subcommand, words: Sequence[Word]) -> list[Word]:
    """The ``name=value`` words that belong to an option and are not fields, as in ``--columns prompt=question``."""
    pairs: list[Word] = []
    names: list[str] = []
    first = False
    for word in words:
        if word.text.startswith("-"):
            option = next((item for item in command.arguments if word.text in item.flags), None)
            names = [name[:-1] for name in option.words if name.endswith("=")] if option is not None else []
            first = bool(names)
        elif names and _is_field(word) and (first or near(word.text.partition("=")[0], names, cutoff=_CLOSE)):
            pairs.append(word)
            first = False
        elif names and word.quoted and word.text.partition("=")[0] in names:
            first = False
        else:
            names = []
    return pairs


def parse_line(
    line: str,
    subcommands: Mapping[str, Subcommand],
    namespace: Mapping[str, Any],
    *,
    cells: Iterable[str] = (),
) -> Request | None:
    """Find the subcommand of a line and parse its arguments, in which ``{name}`` and ``$name`` are variables.

    Returns:
        None for an empty line.

    Raises:
        CellError: there is no such subcommand, or its arguments are invalid.
    """
    words = tokenize(line)
    if not words:
        return None
    name = words[0].text
    if name not in subcommands:
        if name in namespace and is_module(namespace[name]):
            add = f"a cell that begins with %%lora {name:.60}, or %lora add {name:.60} …"
            raise CellError(f"%lora has no command {name!r:.60}, which is a variable; to adapt it: {add}")
        hint = _command_hint(name, subcommands, cells) or " %lora help lists the commands"
        raise CellError(f"%lora has no command {name!r:.60}.{hint}")
    return parse_arguments(subcommands[name], f"%lora {name}", words[1:], namespace)


FORMER_OPTIONS = {old: new[0].replace("_", "-") for old, new in RENAMED.items()} | {
    "as": "name",
    "continue": "follow-up",
    "frozen": "no-trainable",
    "raw": "no-chat",
    "tokens": "max-new-tokens",
    "train": "trainable",
}
"""Former name of an option -> its name."""
_PYTHON_ALONE = {"combine": ("density", "seed", "sign"), "merge": ("safe",), "unload": ("merge", "safe")}
"""Command -> its former options that are arguments of the session's method alone."""
_COUNTS = ("limit", "max-rows", "max_rows", "num-rows", "num_rows")
"""Options of other tools for the number of rows."""
_SYNONYMS = {
    "list": "",
    "ls": "",
    "status": "",
    "show": "",
    "remove": "delete",
    "rm": "delete",
    "set": "use",
    "activate": "use",
    "enable": "use",
    "disable": "use base",
    "generate": "ask",
    "eval": "score",
    "evaluate": "score",
    "upload": "push",
}
"""Words that other tools use for a command; empty for the magic alone."""
FORMER_COMMANDS = {
    "result": "watch --wait",
    "on": "use NAME",
    "off": "use base",
    "unfreeze": "freeze NAME --off",
    "continue": "resume",
    "traceback": "doctor --traceback",
}
"""Former command -> the one that does it."""


def _command_hint(name: str, subcommands: Iterable[str], cells: Iterable[str]) -> str:
    """The hint at the command that an unknown word probably means, with a leading space; empty if none is close."""
    if name in FORMER_COMMANDS:
        return f" It is called '%lora {FORMER_COMMANDS[name]}' now"
    if name in _SYNONYMS:
        return f" Did you mean {f'%lora {_SYNONYMS[name]}'.strip()!r}?"
    forms = {word: word for word in subcommands}
    forms |= {cell: f"%%{cell}" for cell in cells} | {
        cell.removeprefix("lora_"): f"%%{cell}" for cell in cells if cell != "lora"
    }
    close = [name] if name in forms else near(name, forms)
    found = list(dict.fromkeys(forms[word] for word in close))
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""


def expand(word: Word, namespace: Mapping[str, Any]) -> str:
    """Return a word with its variable, ``{name}`` or ``$name``, replaced by the value.

    The variable may be the whole word, the first folder of a path, or the value after an equals sign:
    ``--rank={r}``, ``orders={weight}``. ``{name}`` may also be a part of a word without quotes: ``runs/seed-{i}``.

    Raises:
        CellError: the variable is not defined, or is not text, a number or a path.
    """
    head, text = "", word.text
    before, equals, after = word.text.partition("=")
    if equals and not word.quoted and (before.startswith("--") or reference(after) is not None):
        head, text = before + equals, after
    whole = reference(text)
    match = None if word.quoted else folder(text) if whole is None else (whole, "")
    if match is None:
        variable = None if word.quoted else _VARIABLE.fullmatch(text)
        if variable is not None and variable[1] in namespace:
            return Expression(text)
        if not word.quoted and _EXPRESSION.fullmatch(text):
            message = f"{text:.60} is an expression; only a variable, as in {{name}}, is replaced: assign it first"
            raise CellError(message, column=word.start)
        if not word.quoted and _NAMED.search(word.text):
            return Verbatim(_NAMED.sub(lambda found: _text_of(found[1], found[0], word, namespace), word.text))
        return Quoted(word.text) if word.quoted and not option_value(word.text) else word.text
    name, rest = match
    value = namespace.get(name)
    if _has_messages(value) and not (head or rest):
        return Expression(name)
    value = _text_of(name, text, word, namespace)
    return head + value + rest if head else Verbatim(f"{value}{rest}")


def _text_of(name: str, text: str, word: Word, namespace: Mapping[str, Any]) -> str:
    """The value of a variable that a word names, as text."""
    if name not in namespace:
        near = did_you_mean(name, own_names(namespace))
        raise CellError(f"name {name!r:.60} is not defined.{near}", column=word.start)
    value = namespace[name]
    if isinstance(value, str | int | float) or hasattr(value, "__fspath__"):
        return str(value)
    raise CellError(f"{text:.60} is {with_article(value)}, not text, a number or a path", column=word.start)


def _has_messages(value: object) -> bool:
    """Whether a value is a conversation, or a list of them."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping | list | tuple)


class Expression(str):
    """Text without quotes that begins with a variable of the notebook, such as ``rows[0]``: it can be evaluated."""


class Quoted(str):
    """Text that was in quotes: a value, even if it begins with a dash."""


class Verbatim(str):
    """Text from a variable, in which a backslash is an ordinary character."""


def prompt_text(text: str) -> str:
    r"""A prompt with its escapes replaced: ``\n``, ``\t`` and ``\\`` are a line break, a tab and a backslash."""
    if isinstance(text, Expression):
        return text
    if isinstance(text, Verbatim):
        return str(text)
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), text)


def pair(text: str) -> tuple[str, str]:
    """Parse ``name=value``, with quotes around the value or not; for the ``type`` of an argument.

    Raises:
        argparse.ArgumentTypeError: the text is not of this form.
    """
    name, equals, value = text.partition("=")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(
            f'expected name=column, e.g. prompt=question, not {text!r:.60} (with spaces: prompt="my question")'
        )
    return name, value


def variable(text: str) -> tuple[str, Any]:
    """Parse ``name=value`` for the ``type`` of an argument; the value is a literal (``False``, ``3``) or a word.

    Raises:
        argparse.ArgumentTypeError: the text is not of this form.
    """
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals and value):
        raise argparse.ArgumentTypeError(f"expected name=value, e.g. enable_thinking=False, not {text!r:.60}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return name, {"true": True, "false": False}.get(value, value)


class AsMapping(argparse.Action):
    """Stores the pairs of an argument as a dict, of one that is repeated all of them; for ``action`` of an argument."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None) -> None:
        """Stores the values of the argument, a list of pairs.

        Raises:
            CellError: a name is given twice.
        """
        found = dict(getattr(namespace, self.dest) or {})
        for name, value in values:
            if name in found:
                raise CellError(f"{option}: {name} is given twice: {found[name]!s:.60} and {value!s:.60}")
            found[name] = value
        setattr(namespace, self.dest, found)


class _Once(argparse.Action):
    """Stores the value of an argument, as argparse does by default, but refuses an option that is given twice."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None) -> None:
        """Stores the value.

        Raises:
            CellError: the option has a value already.
        """
        given: set[str] = vars(namespace).setdefault(_GIVEN, set())
        if self.dest in given:
            earlier, later = (_as_given(value) for value in (getattr(namespace, self.dest), values))
            raise CellError(f"{option} is given twice: {earlier} and {later}")
        if option is not None:
            given.add(self.dest)
        setattr(namespace, self.dest, values)


def _as_given(value: Any) -> str:
    """The value of an option as text of limited length."""
    return f"{' '.join(map(str, value)) if isinstance(value, list) else value!s:.60}"


def positive(text: str) -> int:
    """Parse a whole number of at least 1; for the ``type`` of an argument.

    Raises:
        argparse.ArgumentTypeError: the text is not such a number.
    """
    if not text.isdecimal() or len(text) > _DIGITS or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r:.60}")
    return int(text)


def _plain(text: str) -> str:
    """The text of a value; whether it was in quotes no longer matters."""
    return str(text) if isinstance(text, Quoted) else text


def _whole(text: str) -> int:
    try:
        if len(text) <= _DIGITS:
            return int(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a whole number, not {text!r:.60}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, not {text!r:.60}") from None


def _is_field(word: Word) -> bool:
    name, equals, _ = word.text.partition("=")
    return bool(equals) and name.isidentifier() and not word.quoted
