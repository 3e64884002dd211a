"""Cell bodies: keyword assignments of Python, one a line, evaluated in the notebook's namespace."""

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
    ast.AugAssign: "a changed value",
    ast.Delete: "a del",
}


UNREADABLE = (SyntaxError, ValueError, MemoryError, RecursionError)
"""What Python raises for text that it cannot read: the last two for brackets nested too deep."""
_WIDTH = 120
"""Characters of a line that a message shows."""
_BITS = 1024
"""No field takes a longer whole number, and a float cannot represent it."""


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
    """Parse a cell body into its assignments, in order; an empty tuple for comments only.

    Raises:
        CellError: the body is not Python, or something other than plain assignments; carries
            the line and the column.
    """
    try:
        tree = ast.parse(source)
    except UNREADABLE as error:
        raise _syntax_error(error) from None
    assignments: dict[str, Assignment] = {}
    for statement in tree.body:
        found = _assignment(statement, source)
        earlier = assignments.get(found.name)
        if earlier is not None:
            message = f"{found.name} is set twice, in line {earlier.line} and in line {found.line}"
            raise CellError(message, line=found.line, column=found.column)
        assignments[found.name] = found
    return tuple(assignments.values())


def evaluate(assignments: Iterable[Assignment], namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate fields. A line may use variables of the notebook and fields above it.

    Raises:
        CellError: an expression fails; carries its line.
    """
    scope = {"sweep": sweep, **namespace}
    values: dict[str, Any] = {}
    for assignment in assignments:
        value = evaluate_expression(assignment.value, scope, line=assignment.line)
        scope[assignment.name] = values[assignment.name] = value
    return values


def evaluate_expression(expression: ast.expr, scope: dict[str, Any], *, line: int | None = None) -> Any:
    """Evaluate one expression; every failure is an error of one line.

    Raises:
        CellError: the expression fails.
    """
    failure = ""
    try:
        return _short(eval(compile(ast.Expression(expression), "<nbpeft>", "eval"), scope))
    except SyntaxError as error:  # what only a function may hold: await, yield
        failure = in_one_line(error.msg)
    except NameError as error:
        name = getattr(error, "name", None) or ""
        failure = f"name {name!r} is not defined.{did_you_mean(name, own_names(scope))}" if name else str(error)
    except NbpeftError as error:
        failure = in_one_line(error)
    except Exception as error:
        failure = f"{type(error).__name__}: {in_one_line(error)}"
    raise CellError(failure, line=line, column=expression.col_offset if line is not None else None)


def parse_fields(words: Iterable[Word], namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Read the one-line form of a body: ``r=8 target_modules=q_proj,v_proj``.

    A value is a Python literal where it reads as one, a list where it holds commas, and text
    otherwise; ``{name}`` or ``$name`` as the whole value is the notebook's variable.

    Raises:
        CellError: a word is not ``name=value``, a field comes twice, or a variable is not there.
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
    """Options of a line whose ``fields`` are evaluated, those of a cell's body among them.

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
    """Parse an expression in a line.

    Raises:
        CellError: it cannot be read; the message begins with ``what``.
    """
    try:
        return ast.parse(text, mode="eval").body
    except UNREADABLE as error:
        raise CellError(f"{what}: {text!r:.60} is not a valid expression: {_syntax_error(error)}") from None


def excerpt(source: str, error: CellError) -> str:
    """Return the line of a body that an error points at, with a caret; empty without a position."""
    lines = source.splitlines()
    if error.line is None or not 1 <= error.line <= len(lines):
        return ""
    line = lines[error.line - 1].rstrip()
    text = masked_assignment(line)
    if text != line:  # the caret would point into what is not shown
        return f"    {text[:_WIDTH]}"
    column = min(max(error.column or 0, 0), len(text))
    if column > _WIDTH // 2:  # a long line is cut around the place
        text, column = f"…{text[column - _WIDTH // 2 :]}", _WIDTH // 2 + 1
    text = cut(text, _WIDTH)
    return f"    {text}\n    {' ' * column}^"


def _short(value: Any) -> Any:
    """The value, unless it is, or holds, a whole number that no field takes.

    Raises:
        ValueError: it does.
    """
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
    if any(isinstance(part, int) and part.bit_length() > _BITS for part in parts):
        raise ValueError(f"a whole number of more than {_BITS} bits")
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
            given = ast.unparse(statement.annotation)
            raise CellError(f"expected '{name} = {given}', not '{name}: {given}'", line=line, column=column + len(name))
        return Assignment(name, statement.value, line, column)
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        if isinstance(target, ast.Name):
            _refuse_comma(statement, source)
            return Assignment(target.id, statement.value, line, column)
        raise CellError(f"expected 'field = value', not an assignment to '{ast.unparse(target)}'", line=line, column=0)
    what = _KINDS.get(type(statement), "a call" if _is_call(statement) else "an expression")
    raise CellError(f"only lines like 'field = value' can stand here, not {what}", line=line, column=column)


def _is_call(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)


def _refuse_comma(statement: ast.Assign, source: str) -> None:
    """A line copied out of a call ends with a comma, which would make its value a tuple."""
    value = statement.value
    if not isinstance(value, ast.Tuple) or len(value.elts) != 1:
        return
    text = ast.get_source_segment(source, value) or ""
    if not text.startswith("("):
        line = value.end_lineno or statement.lineno
        raise CellError("remove the comma at the end of the line", line=line, column=(value.end_col_offset or 1) - 1)


def _syntax_error(error: BaseException) -> CellError:
    if isinstance(error, MemoryError | RecursionError):
        return CellError("too many brackets in brackets")
    if not isinstance(error, SyntaxError):
        return CellError(f"this is not Python: {in_one_line(error)}")
    column = None if error.offset is None else max(error.offset - 1, 0)
    return CellError(in_one_line(error.msg), line=error.lineno, column=column)
