"""Cell bodies: Python assignments, one per line, evaluated in the notebook's namespace."""

from __future__ import annotations

import ast
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nbpeft.confidential import masked_assignment
from nbpeft.errors import CellError, NbpeftError, cut, did_you_mean, in_one_line
from nbpeft.magics.tokenize import Word, own_names, reference
from nbpeft.sweeps import sweep

_KINDS = {
    ast.Import: "an import",
    ast.ImportFrom: "an import",
    ast.FunctionDef: "a function",
    ast.ClassDef: "a class",
    ast.For: "a loop",
    ast.While: "a loop",
    ast.If: "a condition",
    ast.With: "a with block",
    ast.AugAssign: "an augmented assignment",
    ast.Delete: "a del statement",
}


UNREADABLE = (SyntaxError, ValueError, MemoryError, RecursionError)
"""What ``ast.parse`` raises for text that is not Python; the last two for brackets that are nested too deeply."""
_WIDTH = 120
"""The greatest number of characters that a message shows of a line."""
_BITS = 1024
"""The longest integer of a field, in bits: a float cannot represent a longer one."""


@dataclass(frozen=True)
class Assignment:
    """One ``name = expression`` of a body.

    Attributes:
        name: the field.
        value: the expression, not evaluated.
        line: 1-based line in the body.
        column: 0-based column of the name.
    """

    name: str
    value: ast.expr
    line: int
    column: int


def parse_body(source: str) -> tuple[Assignment, ...]:
    """Parse a cell body into its assignments, in order; a body of comments only gives an empty tuple.

    Raises:
        CellError: the body is not Python, or contains something other than plain assignments; has
            the line and the column.
    """
    try:
        tree = ast.parse(source)
    except UNREADABLE as error:
        raise _syntax_error(error) from None
    assignments: dict[str, Assignment] = {}
    for statement in tree.body:
        assignment = _assignment(statement, source)
        earlier = assignments.get(assignment.name)
        if earlier is not None:
            message = f"{assignment.name} is set twice, in line {earlier.line} and in line {assignment.line}"
            raise CellError(message, line=assignment.line, column=assignment.column)
        assignments[assignment.name] = assignment
    return tuple(assignments.values())


def evaluate(assignments: Iterable[Assignment], namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate fields. An expression may use variables of the notebook and the fields above it.

    Returns:
        Field -> value.

    Raises:
        CellError: an expression fails; has its line.
    """
    scope = {"sweep": sweep, **namespace}
    values: dict[str, Any] = {}
    for assignment in assignments:
        value = evaluate_expression(assignment.value, scope, line=assignment.line)
        scope[assignment.name] = values[assignment.name] = value
    return values


def evaluate_expression(expression: ast.expr, scope: dict[str, Any], *, line: int | None = None) -> Any:
    """Evaluate one expression; every failure becomes an error with a one-line message.

    Raises:
        CellError: the expression fails.
    """
    failure = ""
    try:
        return _short(eval(compile(ast.Expression(expression), "<nbpeft>", "eval"), scope))
    except SyntaxError as error:  # await and yield are allowed only inside a function
        failure = in_one_line(error.msg)
    except NameError as error:
        name = getattr(error, "name", None) or ""
        hint = did_you_mean(name, own_names(scope)) or f" Text is written in quotes: {name!r}" if name else ""
        failure = f"name {name!r} is not defined.{hint}" if name else str(error)
    except NbpeftError as error:
        failure = in_one_line(error)
    except Exception as error:
        failure = f"{type(error).__name__}: {in_one_line(error)}"
    raise CellError(failure, line=line, column=expression.col_offset if line is not None else None)


def parse_fields(words: Iterable[Word], namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Read the one-line form of a body: ``r=8 target_modules=q_proj,v_proj``.

    A value is a Python literal if it can be read as one, else a list if it contains commas, else text.
    ``{name}`` or ``$name`` as the whole value is a variable of the notebook.

    Returns:
        Field -> value.

    Raises:
        CellError: a word is not ``name=value``, a field occurs twice, or a variable is not defined.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.text.partition("=")
        if not equals or not name.isidentifier():
            raise CellError(f"expected name=value, got {word.text!r:.60}", column=word.start)
        if name in values:
            raise CellError(f"{name:.60} is set twice", column=word.start)
        variable = reference(text)
        values[name] = _literal(text) if variable is None else look_up(variable, namespace, column=word.start)
    return values


def with_fields(options: Namespace, cell: str | None, namespace: Mapping[str, Any]) -> Namespace:
    """Evaluate the fields of a line and of the cell's body, and store them in ``options.fields``.

    Returns:
        The same options.

    Raises:
        CellError: a field cannot be read or evaluated.
    """
    options.fields = parse_fields(options.fields, namespace)
    if cell is not None:
        options.fields |= evaluate(parse_body(cell), namespace)
    return options


def look_up(name: str, namespace: Mapping[str, Any], *, column: int | None = None) -> Any:
    """Return the value of a notebook variable.

    Raises:
        CellError: it is not defined.
    """
    if name not in namespace:
        raise CellError(f"name {name!r:.60} is not defined.{did_you_mean(name, own_names(namespace))}", column=column)
    return namespace[name]


def expression_of(text: str, what: str) -> ast.expr:
    """Parse an expression that is part of a magic's line.

    Raises:
        CellError: it is not a valid expression.
    """
    try:
        return ast.parse(text, mode="eval").body
    except UNREADABLE as error:
        raise CellError(f"{what}: {text!r:.60} is not a valid expression: {_syntax_error(error)}") from None


def excerpt(source: str, error: CellError) -> str:
    """Return the line of a body that an error refers to, with a caret; empty if the error has no position."""
    lines = source.splitlines()
    if error.line is None or not 1 <= error.line <= len(lines):
        return ""
    line = lines[error.line - 1].rstrip()
    text = masked_assignment(line)
    if text != line:  # a secret is masked: the caret would point to the wrong column
        return f"    {text[:_WIDTH]}"
    column = min(max(error.column or 0, 0), len(text))
    if column > _WIDTH // 2:  # a long line is cut around the caret
        text, column = f"…{text[column - _WIDTH // 2 :]}", _WIDTH // 2 + 1
    text = cut(text, _WIDTH)
    return f"    {text}\n    {' ' * column}^"


def _short(value: Any) -> Any:
    """The value; an integer that is too long for any field, also inside a list or dict, raises a ValueError."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
    if any(isinstance(part, int) and part.bit_length() > _BITS for part in parts):
        raise ValueError(f"an integer of more than {_BITS} bits")
    return value


def _literal(text: str) -> Any:
    if text.startswith("sweep(") and text.endswith(")"):
        return evaluate_expression(expression_of(text, "sweep"), {"sweep": sweep})
    try:
        return ast.literal_eval(text)
    except (*UNREADABLE, TypeError):
        return [part.strip() for part in text.split(",") if part.strip()] if "," in text else text


def _assignment(statement: ast.stmt, source: str) -> Assignment:
    line, column = statement.lineno, statement.col_offset
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        name = statement.target.id
        if statement.value is None:
            annotation = ast.unparse(statement.annotation)
            raise CellError(
                f"expected '{name} = {annotation}', not '{name}: {annotation}'", line=line, column=column + len(name)
            )
        return Assignment(name, statement.value, line, column)
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        if isinstance(target, ast.Name):
            _refuse_comma(statement, source)
            return Assignment(target.id, statement.value, line, column)
        raise CellError(f"expected 'field = value', not an assignment to '{ast.unparse(target)}'", line=line, column=0)
    is_call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    what = _KINDS.get(type(statement), "a call" if is_call else "an expression")
    raise CellError(f"only lines like 'field = value' are allowed here, not {what}", line=line, column=column)


def _refuse_comma(statement: ast.Assign, source: str) -> None:
    """Refuse a comma at the end of a line that was copied out of a call: Python would make its value a tuple."""
    value = statement.value
    if not isinstance(value, ast.Tuple) or len(value.elts) != 1:
        return
    text = ast.get_source_segment(source, value) or ""
    if not text.startswith("("):
        line = value.end_lineno or statement.lineno
        raise CellError("remove the comma at the end of the line", line=line, column=(value.end_col_offset or 1) - 1)


def _syntax_error(error: BaseException) -> CellError:
    if isinstance(error, MemoryError | RecursionError):
        return CellError("brackets are nested too deeply")
    if not isinstance(error, SyntaxError):
        return CellError(f"this is not Python: {in_one_line(error)}")
    column = None if error.offset is None else max(error.offset - 1, 0)
    return CellError(in_one_line(error.msg), line=error.lineno, column=column)
