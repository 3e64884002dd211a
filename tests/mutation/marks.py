"""Sources whose statements leave a mark before they run: a byte in memory that forked processes share."""

from __future__ import annotations

import ast
from itertools import accumulate
from mmap import mmap
from types import CodeType

from tests.mutation.scope import ROOT, paths, read

MARKS = "__marks_of_the_mutation_tests__"
"""The global variable of a module by which its statements know the memory."""


def offsets() -> dict[str, int]:
    """Where the bytes of each file begin: the mark of a statement is that of its first line."""
    lengths = [read(path).count("\n") + 2 for path in paths()]
    return dict(zip(paths(), accumulate(lengths, initial=0), strict=False))


def memory() -> mmap:
    """A byte for each line of each file."""
    return mmap(-1, sum(read(path).count("\n") + 2 for path in paths()))


def marked(path: str, offset: int) -> CodeType:
    """The code of a file whose statements leave marks.

    Args:
        path: the file's.
        offset: where its bytes begin.
    """
    tree = ast.parse(read(path))
    for node in list(ast.walk(tree)):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, [each for statement in statements for each in _with_mark(statement, offset)])
    return compile(tree, str(ROOT / path), "exec", dont_inherit=True)


def _with_mark(statement: ast.stmt, offset: int) -> list[ast.stmt]:
    text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    if text or (isinstance(statement, ast.ImportFrom) and statement.module == "__future__"):
        return [statement]
    (mark,) = ast.parse(f"{MARKS}[{offset + statement.lineno}] = 1").body
    for node in ast.walk(mark):
        ast.copy_location(node, statement)
    return [mark, statement]


def statement_line(path: str, first: int, last: int) -> int:
    """The first line of the innermost statement that holds some lines."""
    statements = (node for node in ast.walk(ast.parse(read(path))) if isinstance(node, ast.stmt))
    return max(each.lineno for each in statements if each.lineno <= first and last <= (each.end_lineno or each.lineno))
