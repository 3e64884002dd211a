"""Cells while the extension is loaded: repeated warnings are collapsed, magics need no body, each result is shown."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

from IPython.display import display

from nbpeft._util.logs import collapsed

_HEAD = re.compile(r"%%(\w+)(?![\w?])")


def appended(items: list[Any], item: Any) -> Callable[[], None]:
    """Append an item to a list of the shell; return a function that removes it."""
    items.append(item)

    def remove() -> None:
        items[:] = [other for other in items if other is not item]

    return remove


def collapse_warnings(shell: Any) -> Callable[[], None]:
    """Collapse repeated warnings of bitsandbytes and transformers within each cell.

    Cells may be nested (``get_ipython().run_cell``). A cell that began before the installation has no block.
    """
    blocks: list[ExitStack] = []

    def begin(*_: Any) -> None:
        block = ExitStack()
        block.enter_context(collapsed())
        blocks.append(block)

    def end(*_: Any) -> None:
        if blocks:
            blocks.pop().close()

    def remove() -> None:
        shell.events.unregister("pre_run_cell", begin)
        shell.events.unregister("post_run_cell", end)
        while blocks:
            end()

    shell.events.register("pre_run_cell", begin)
    shell.events.register("post_run_cell", end)
    return remove


def allow_empty_bodies(shell: Any, names: Collection[str]) -> Callable[[], None]:
    """Give these cell magics an empty line as their body if they have none: IPython would refuse them."""

    def with_body(lines: list[str]) -> list[str]:
        head = _HEAD.match(lines[0]) if lines else None
        if head is None or head[1] not in names or "".join(lines[1:]).strip() or lines[0].rstrip().endswith("?"):
            return lines
        return [lines[0].rstrip("\n") + "\n", "\n"]

    # Otherwise IPython in a terminal would run this while the cell is being typed, and take its first line as complete.
    with_body.has_side_effects = True  # type: ignore[attr-defined]
    return appended(shell.input_transformers_cleanup, with_body)


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


def show_every_result(shell: Any, names: Collection[str]) -> Callable[[], None]:
    """Display the result of each of these magics in a cell; IPython shows that of the last line alone."""
    transformer = _ShowEach(names)
    remove = appended(shell.ast_transformers, transformer)
    _change_running_cell(transformer)
    return remove
