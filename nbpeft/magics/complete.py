"""Completion of magics: the words that may follow at the cursor. Pure functions, without IPython."""

from __future__ import annotations

import ast
import glob
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbpeft.errors import CellError
from nbpeft.magics.help import FOR_AGENTS
from nbpeft.magics.notebook_context import DATA_SUFFIXES
from nbpeft.magics.parse import Argument, Subcommand
from nbpeft.magics.tokenize import Word, tokenize


@dataclass(frozen=True)
class Suggestions:
    """The completions at the cursor.

    Attributes:
        fragment: the part of the word typed so far.
        words: whole words that begin with the fragment.
        closed: whether nothing else is valid there, so that IPython's own completions are suppressed.
    """

    fragment: str
    words: tuple[str, ...]
    closed: bool = True


@dataclass(frozen=True)
class Values:
    """The values that a field takes.

    Attributes:
        choices: values, as Python objects.
        listed: texts that a list may contain; empty if the field takes no list.
    """

    choices: tuple[Any, ...] = ()
    listed: tuple[str, ...] = ()


Source = Callable[[], Iterable[str]]
FieldSource = Callable[[str], Iterable[str]]
"""Returns the fields of a method; the empty string means the default method."""

HELP = "help"
ADAPTER_CONFIG = "adapter_config.json"
_DEPTH = 3
"""The number of levels of folders that are searched for saved adapters."""
_STATEMENT = re.compile(r"([^\W\d]\w*)\s*(?::[^=]*)?=(?!=)")
_VALUE = re.compile(
    r"""\s*(?P<before>[\[({]\s*(?:(?:'[^']*'|"[^"]*"|[^\s,'"]+)\s*,\s*)*)?(?P<quote>['"])?(?P<typed>[^'"\[\](){},=\s]*)"""
)
_METHOD = re.compile(r"""(?:--method[ =]+|\bpeft_type\s*=\s*)["']?(\w+)""")


@dataclass(frozen=True)
class CompletionSources:
    """The sources of words; each is called only when it is needed.

    Attributes:
        models: variables that hold models.
        adapters: adapters of the models.
        variables: other variables of the notebook.
        runs: training runs stored on disk.
        methods: names of the methods.
        combinations: adapters that are combined -> the ways to combine them.
        fields: kind of fields (``config``, ``training``) -> their names.
        values: (kind of fields, field, method, model's variable) -> the values of the field.
        modules: model's variable -> names of its layers.
    """

    models: Source = tuple
    adapters: Source = tuple
    variables: Source = tuple
    runs: Source = tuple
    methods: Source = tuple
    combinations: Callable[[Sequence[str]], Iterable[str]] = lambda adapters: ()
    fields: Mapping[str, FieldSource] = field(default_factory=dict)
    values: Callable[[str, str, str, str], Values] = lambda kind, name, method, model: Values()
    modules: Callable[[str], Iterable[str]] = lambda model: ()


def complete_line(before: str, subcommands: Mapping[str, Subcommand], sources: CompletionSources) -> Suggestions:
    """Suggestions for ``COMMAND ARGUMENTS…``.

    Args:
        before: the line up to the cursor, without the magic's name and the space after it.
        subcommands: the subcommands of the magic.
        sources: the sources of names.
    """
    words, fragment = split(before)
    if not words:
        return choose(fragment, [*subcommands, HELP])
    if [word.text for word in words] == [HELP]:
        return choose(fragment, [FOR_AGENTS] if fragment.startswith("-") else subcommands)
    command = subcommands.get(words[0].text)
    if command is None:
        return Suggestions(fragment, ())
    return complete_arguments(command, words[1:], fragment, sources)


def complete_arguments(
    command: Subcommand, words: Sequence[Word], fragment: str, sources: CompletionSources
) -> Suggestions:
    """Suggestions for the arguments of a subcommand."""
    option = _open_option(command, words, fragment)
    if option is not None:
        return _without_named(option, _values(option, fragment, words, sources), words)
    if fragment.startswith("-"):
        flags = [flag for item in command.arguments for flag in item.flags if flag.startswith("--")]
        return choose(fragment, [*flags, "--help"])
    place = _next_positional(command, words)
    if place is None:
        return _field_words(command, words, fragment, sources)
    return _without_named(place, _values(place, fragment, words, sources), words)


def complete_body(
    source: str, line: int, column: int, names: Source, values: Callable[[str], Values] = lambda name: Values()
) -> Suggestions | None:
    """Suggestions in a cell body: fields at the start of a line, and values after their ``=``.

    Args:
        source: the body.
        line: 0-based line of the cursor in the body.
        column: 0-based column of the cursor.
        names: returns the fields.
        values: returns the values of a field.

    Returns:
        None where any Python expression is valid.
    """
    lines = source.split("\n")
    typed = lines[line][:column] if line < len(lines) else ""
    after = lines[line][column:] if line < len(lines) else ""
    inside = _inside_expression(lines[:line])
    start = next((at for at in range(line, -1, -1) if _STATEMENT.match(lines[at])), line) if inside else line
    statement = _STATEMENT.match("\n".join([*lines[start:line], typed]))
    if statement is not None and (inside or start == line):
        text = "\n".join([*lines[start:line], typed])[statement.end() :]
        return _python_values(text, after, values(statement[1]))
    match = re.fullmatch(r"([^\W\d]\w*)?", typed)
    if match is None or inside:
        return None
    assigned = {match.group(1) for text in lines[:line] + lines[line + 1 :] if (match := re.match(r"(\w+)\s*=", text))}
    matching = choose(typed, [name for name in names() if name not in assigned])
    return Suggestions(typed, tuple(f"{name} = " for name in matching.words), closed=bool(matching.words))


def _python_values(text: str, after: str, values: Values) -> Suggestions | None:
    """Values in a Python expression up to the cursor; None where anything else is valid too."""
    match = _VALUE.fullmatch(text)
    if match is None:
        return None
    before, quote, typed = match["before"] or "", match["quote"], match["typed"]
    given = re.findall(r"""['"]([^'"]*)['"]""", before)
    choices = [item for item in (values.listed if before else values.choices) if item not in given]
    sweeps = ["sweep("] if typed and not before and not quote and "sweep(".startswith(typed) else []
    if not choices and not sweeps:
        return None
    if not quote:
        words = [repr(choice) for choice in choices if str(choice).startswith(typed)] + sweeps
        return Suggestions(typed, tuple(words), closed=bool(words) and not sweeps)
    end = "" if after.startswith(quote) else quote
    texts = [choice for choice in choices if isinstance(choice, str) and choice.startswith(typed)]
    return Suggestions(typed, tuple(f"{text}{end}" for text in texts))


def _line_values(fragment: str, values: Values) -> Suggestions:
    """Values of a ``name=value`` word: after the ``=``, or after the last comma of a list."""
    name, _, text = fragment.partition("=")
    before, comma, typed = text.rpartition(",") if values.listed else ("", "", text)
    given = before.split(",")
    start = f"{name}={before}{comma}"
    texts = [str(choice) for choice in (values.listed if comma else values.choices) if str(choice) not in given]
    return Suggestions(fragment, tuple(f"{start}{choice}" for choice in texts if choice.startswith(typed)))


def split(before: str) -> tuple[list[Word], str]:
    """The complete words of a line, and the part of the next one (or of a comment) typed so far."""
    try:
        words = tokenize(before)
    except CellError:
        at = max(before.rfind(" "), before.rfind("\t")) + 1
        return split(before[:at])[0] if before[:at] != before else [], before[at:].lstrip("\"'")
    comment = before[words[-1].end if words else 0 :].lstrip()
    if comment or not words or before[-1].isspace():
        return words, comment
    return words[:-1], before[words[-1].start :]


def choose(fragment: str, names: Iterable[str]) -> Suggestions:
    """The names that begin with the fragment."""
    return Suggestions(fragment, tuple(name for name in dict.fromkeys(names) if name.startswith(fragment)))


def paths(fragment: str) -> Suggestions:
    """Files and folders that begin with the fragment; folders first, with a slash."""
    home = os.path.expanduser(fragment)
    matching = sorted(glob.glob(glob.escape(home) + "*"), key=lambda path: (not os.path.isdir(path), path))
    words = [fragment + path[len(home) :] + ("/" if os.path.isdir(path) else "") for path in matching]
    return Suggestions(fragment, tuple(f'"{word}"' if " " in word else word for word in words))


def _leads_to_adapter(path: str) -> bool:
    """Whether a path is a file of weights, or a folder with a saved adapter in it or in one of its folders."""
    place = os.path.expanduser(path)
    if not os.path.isdir(place):
        return place.endswith(".safetensors")
    inside = (glob.iglob(os.path.join(glob.escape(place), *["*"] * depth, ADAPTER_CONFIG)) for depth in range(_DEPTH))
    return any(next(found, None) is not None for found in inside)


def _values(item: Argument, fragment: str, words: Sequence[Word], sources: CompletionSources) -> Suggestions:
    if item.completes == "path":
        return paths(fragment)
    if item.completes == "saved":
        return Suggestions(
            fragment, tuple(word for word in paths(fragment).words if _leads_to_adapter(word.strip('"')))
        )
    if item.completes == "data":
        models = frozenset(sources.models())
        rows = [name for name in sources.variables() if name not in models]
        endings = ("/", *DATA_SUFFIXES) if fragment else DATA_SUFFIXES
        fitting = [word for word in paths(fragment).words if word.rstrip('"').endswith(endings)]
        return Suggestions(fragment, (*choose(fragment, rows).words, *fitting))
    if item.completes == "source":
        files_and_folders = paths(fragment) if fragment else Suggestions(fragment, ())
        return Suggestions(fragment, choose(fragment, sources.models()).words + files_and_folders.words)
    if item.completes == "modules":
        before, comma, _ = fragment.rpartition(",")
        names = [*item.words, *sources.modules(chosen_model(words))]
        return choose(fragment, [f"{before}{comma}{name}" for name in names if name not in before.split(",")])
    if item.options.get("choices"):
        return choose(fragment, [str(choice) for choice in item.options["choices"]])
    named: dict[str, Source] = {
        "model": sources.models,
        "adapter": sources.adapters,
        "variable": sources.variables,
        "run": sources.runs,
        "method": sources.methods,
        "combination": lambda: sources.combinations([word.text.partition("=")[0] for word in words]),
        "weight": lambda: [f"{name}=" for name in sources.adapters()],
    }
    return choose(fragment, [*item.words, *named.get(item.completes, tuple)()])


def _without_named(item: Argument, values: Suggestions, words: Sequence[Word]) -> Suggestions:
    """The suggestions without the adapters that the line already names."""
    if item.completes not in ("adapter", "weight"):
        return values
    given = {word.text.partition("=")[0] for word in words}
    return Suggestions(values.fragment, tuple(word for word in values.words if word.rstrip("=") not in given))


def _open_option(command: Subcommand, words: Sequence[Word], fragment: str) -> Argument | None:
    """The option whose value comes next: the last word, or an earlier one that takes several values."""
    for place in range(len(words) - 1, -1, -1):
        option = _option(command, words[place].text)
        if option is not None:
            last = place == len(words) - 1
            return option if option.takes_value and (last or (option.many and not fragment.startswith("-"))) else None
    return None


def _option(command: Subcommand, word: str) -> Argument | None:
    return next((item for item in command.arguments if not item.positional and word in item.flags), None)


def _next_positional(command: Subcommand, words: Sequence[Word]) -> Argument | None:
    """The positional argument that comes next."""
    given, skip = 0, False
    for word in words:
        option = _option(command, word.text)
        if skip:
            skip = False
        elif option is not None:
            skip = option.takes_value
        elif not word.text.startswith("-") and not (command.fields and "=" in word.text):
            given += 1
    places = [item for item in command.arguments if item.positional]
    for place in places:
        if place.many or given == 0:
            return place
        given -= 1
    return None


def _field_words(command: Subcommand, words: Sequence[Word], fragment: str, sources: CompletionSources) -> Suggestions:
    names = sources.fields.get(command.fields)
    if names is None:
        return Suggestions(fragment, ())
    method = chosen_method(" ".join(word.text for word in words))
    if "=" in fragment:
        name = fragment.partition("=")[0]
        return _line_values(fragment, sources.values(command.fields, name, method, chosen_model(words)))
    return choose(fragment, [f"{name}=" for name in names(method)])


def chosen_model(words: Sequence[Word]) -> str:
    """The variable with which the arguments of a command begin, or the empty string."""
    return next((word.text for word in words[:1] if word.text.isidentifier()), "")


def chosen_method(text: str) -> str:
    """The method named in a line or a body, or the empty string."""
    match = _METHOD.search(text)
    return match.group(1) if match else ""


def _inside_expression(lines: Sequence[str]) -> bool:
    """Whether a bracket or a string is still open after these lines."""
    text = "\n".join(lines)
    try:
        ast.parse(text)
    except SyntaxError as error:
        return "never closed" in str(error.msg) or "unterminated" in str(error.msg) or "EOF" in str(error.msg)
    return False
