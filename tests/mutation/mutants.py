"""Faults that a programmer might make, found in a source by its syntax tree and drawn with a seed."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle

Replacements = Iterator[tuple[ast.expr | ast.stmt, str]]
"""Nodes of the tree, and the text that replaces each."""

FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPPOSITE: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
}
OF_FIXED_ORDER = {"isinstance", "issubclass", "getattr", "hasattr", "setattr", "cast", "super", "warn"}
"""Functions that raise at once when their arguments are swapped, and those that only speak."""
CHECKS = ("check", "require", "refuse", "validate", "forbid")


@dataclass(frozen=True)
class Mutant:
    """One fault in one file.

    Attributes:
        path: the file, below the root of the repository.
        operator: which of `OPERATORS` made it.
        lines: the first and the last line that it changes.
        start: where the changed text begins, in bytes.
        before: the text there.
        after: what replaces it.
        in_function: whether it acts when a function runs, and not when the module is imported.
    """

    path: str
    operator: str
    lines: tuple[int, int]
    start: int
    before: str
    after: str
    in_function: bool

    def apply(self, source: str) -> str:
        """The source with the fault."""
        encoded, before = source.encode(), self.before.encode()
        assert encoded[self.start : self.start + len(before)] == before, f"{self.path} is another source"
        return (encoded[: self.start] + self.after.encode() + encoded[self.start + len(before) :]).decode()

    @property
    def text(self) -> str:
        """What it changes, without the line where."""
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.operator}: {before:.90} -> {after:.90}"

    def __str__(self) -> str:
        return f"{self.path}:{self.lines[0]} {self.text}"


def flip_comparison(node: ast.AST) -> Replacements:
    """``<`` for ``<=``, ``==`` for ``!=``, ``in`` for ``not in``."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[index] = FLIPPED[type(operator)]()
            yield node, f"({ast.unparse(changed)})"


def flip_sign(node: ast.AST) -> Replacements:
    """``+`` for ``-``, ``*`` for ``/``, no minus."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPPOSITE:
        changed = copy.deepcopy(node)
        changed.op = OPPOSITE[type(node.op)]()
        yield node, f"({ast.unparse(changed)})" if isinstance(changed, ast.expr) else ast.unparse(changed)


def negate_condition(node: ast.AST) -> Replacements:
    """``if not c`` for ``if c``, ``or`` for ``and``."""
    if isinstance(node, ast.If | ast.IfExp):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.comprehension):
        for condition in node.ifs:
            yield condition, f"(not ({ast.unparse(condition)}))"
    elif isinstance(node, ast.BoolOp):
        changed = copy.deepcopy(node)
        changed.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield node, f"({ast.unparse(changed)})"


def drop_check(node: ast.AST) -> Replacements:
    """No ``if …: raise``, no ``if …: return``, no call of a function that checks."""
    match node:
        case ast.If(orelse=[], body=[*_, ast.Raise() | ast.Return() | ast.Continue()]):
            yield node, "pass"
        case ast.Expr(value=ast.Call() as call) if called(call).strip("_").startswith(CHECKS):
            yield node, "pass"


def swap_arguments(node: ast.AST) -> Replacements:
    """Two neighbours among the positional arguments of a call."""
    if not isinstance(node, ast.Call) or called(node) in OF_FIXED_ORDER:
        return
    for index in range(len(node.args) - 1):
        pair = node.args[index : index + 2]
        if not any(isinstance(each, ast.Starred) for each in pair) and ast.dump(pair[0]) != ast.dump(pair[1]):
            changed = copy.deepcopy(node)
            changed.args[index : index + 2] = changed.args[index + 1], changed.args[index]
            yield node, ast.unparse(changed)


def change_constant(node: ast.AST) -> Replacements:
    """A number one larger, the other truth value; texts are left alone."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield node, repr(not node.value) if isinstance(node.value, bool) else f"({node.value + 1!r})"


def drop_statement(node: ast.AST) -> Replacements:
    """No call, no change of an attribute or an item, no deletion."""
    match node:
        case ast.Expr(value=ast.Call() as call) if not called(call).strip("_").startswith((*CHECKS, "warn")):
            yield node, "pass"
        case ast.AugAssign() | ast.Delete():
            yield node, "pass"
        case ast.Assign(targets=targets) if all(isinstance(each, ast.Attribute | ast.Subscript) for each in targets):
            yield node, "pass"


def return_early(node: ast.AST) -> Replacements:
    """``return`` where a statement of a function's body was."""
    if isinstance(node, ast.FunctionDef):
        for statement in node.body:
            constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not constant and not isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.Pass | ast.Raise):
                yield statement, "return"


OPERATORS: dict[str, Callable[[ast.AST], Replacements]] = {
    "flip a comparison": flip_comparison,
    "flip a sign": flip_sign,
    "negate a condition": negate_condition,
    "drop a check": drop_check,
    "swap two arguments": swap_arguments,
    "change a constant": change_constant,
    "drop a statement": drop_statement,
    "return early": return_early,
}


def called(call: ast.Call) -> str:
    """The name of the function that is called, without what it belongs to."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def mutants_of(path: str, source: str) -> list[Mutant]:
    """All faults that the operators make in a source, in its order.

    Args:
        path: the file's, for the mutants.
        source: its text.
    """
    offsets = [0]
    for line in source.encode().splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    found = []
    for node, in_function in code(ast.parse(source), in_function=False):
        for operator, replacements in OPERATORS.items():
            for target, after in replacements(node):
                assert target.end_lineno is not None and target.end_col_offset is not None
                start = offsets[target.lineno - 1] + target.col_offset
                before = source.encode()[start : offsets[target.end_lineno - 1] + target.end_col_offset].decode()
                lines = (target.lineno, target.end_lineno)
                inside = in_function or operator == "return early"
                found.append(Mutant(path, operator, lines, start, before, after, inside))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.operator, mutant.after))


def code(node: ast.AST, *, in_function: bool) -> Iterator[tuple[ast.AST, bool]]:
    """The nodes that decide what is computed, each with whether it is part of a function.

    Left out are what only speaks (errors, their messages, f-strings), what a program claims of itself (``assert``,
    ``strict`` of ``zip``), annotations, decorators and what type checkers alone read.
    """
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert) or is_for_type_checkers(node):
        return
    if isinstance(node, ast.keyword) and node.arg in ("strict", "stacklevel"):
        return
    yield node, in_function
    inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params", "format_spec"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from code(child, in_function=inside)


def is_for_type_checkers(node: ast.AST) -> bool:
    """Whether it is a block under ``if TYPE_CHECKING`` or a function that is declared and does nothing."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test).endswith("TYPE_CHECKING")
    if isinstance(node, ast.FunctionDef):
        return any(ast.unparse(decorator).endswith(("overload", "abstractmethod")) for decorator in node.decorator_list)
    return False


def draw(mutants: Iterable[Mutant], number: int, seed: int, read: Callable[[str], str]) -> list[Mutant]:
    """So many of the mutants, as many by each operator as there are; the same for the same sources and seed.

    Args:
        mutants: what is drawn from.
        number: how many, or fewer if there are not so many.
        seed: of the draw.
        read: the source of a path. A mutant that is no Python (parentheses in a pattern) is left out.
    """
    pools: dict[str, list[Mutant]] = {operator: [] for operator in OPERATORS}
    for mutant in mutants:
        pools[mutant.operator].append(mutant)
    for operator, pool in pools.items():
        random.Random(f"{seed} {operator}").shuffle(pool)
    chosen: list[Mutant] = []
    for operator in cycle(OPERATORS):
        while pools[operator]:
            mutant = pools[operator].pop()
            if is_python(mutant.apply(read(mutant.path))):
                chosen.append(mutant)
                break
        if len(chosen) >= number or not any(pools.values()):
            return chosen
    return chosen


def is_python(source: str) -> bool:
    """Whether it can be compiled."""
    try:
        compile(source, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True
