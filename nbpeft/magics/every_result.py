"""Shows the result of each of these magics in a cell; IPython shows that of the last line alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Collection
from typing import Any

from IPython.display import display


def show(result: object) -> None:
    """Displays a result, as the last line of a cell is displayed."""
    if result is not None:
        display(result)


class _ShowEach(ast.NodeTransformer):
    """Displays what IPython would drop: the results of these magics in lines other than a cell's last expression.

    Such a line is the statement ``get_ipython().run_line_magic(name, text)``. An assigned result is not displayed.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    def visit_Module(self, node: ast.Module) -> ast.Module:
        *before, last = node.body or [ast.Pass()]
        shown_by_ipython = isinstance(last, ast.Expr)
        changed = [self.visit(statement) for statement in (before if shown_by_ipython else node.body)]
        node.body = [*changed, last] if shown_by_ipython else changed
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        match node.value:
            case ast.Call(func=ast.Attribute(attr="run_line_magic"), args=[ast.Constant(value=name), *_]):
                if name in self._names:
                    return ast.copy_location(_shown(node.value), node)
        return node


def _shown(call: ast.expr) -> ast.Expr:
    statement = ast.parse(f"__import__({__name__!r}, fromlist=['show']).show(None)").body[0]
    assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    statement.value.args = [call]
    return statement


def _change_running_cell(transformer: _ShowEach) -> None:
    """Changes the rest of the cell that loads the extension, which IPython has transformed already.

    IPython compiles each statement when it is its turn. Where it keeps them is not part of its interface: if they are
    not found, the results of this one cell are shown as IPython shows them.
    """
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_name != "run_ast_nodes":
        frame = frame.f_back
    statements = frame.f_locals.get("nodelist")
    if isinstance(statements, list):
        for old, new in zip(statements, transformer.visit(ast.Module([*statements], [])).body, strict=True):
            vars(old).update(vars(new))


def install(shell: Any, names: Collection[str]) -> Callable[[], None]:
    """Display the result of each of these magics, wherever it is in a cell.

    Returns:
        A function that uninstalls it.
    """
    transformer = _ShowEach(names)
    shell.ast_transformers.append(transformer)
    _change_running_cell(transformer)

    def remove() -> None:
        shell.ast_transformers[:] = [item for item in shell.ast_transformers if item is not transformer]

    return remove
