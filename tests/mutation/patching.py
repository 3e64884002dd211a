"""Puts a fault into functions that are imported already, which costs nothing beside importing them again."""

from __future__ import annotations

import gc
import inspect
from collections import defaultdict
from collections.abc import Iterator
from types import CodeType, FunctionType

from tests.mutation.mutants import Mutant
from tests.mutation.scope import ROOT, read

Functions = dict[tuple[str, CodeType], list[FunctionType]]


def functions() -> Functions:
    """The functions of nbpeft that there are, by their file and code."""
    found: Functions = defaultdict(list)
    gc.unfreeze()
    for each in gc.get_objects():
        if type(each) is FunctionType and each.__code__.co_filename.startswith(str(ROOT / "nbpeft")):
            found[each.__code__.co_filename, each.__code__].append(each)
    gc.freeze()
    return found


def put(mutant: Mutant, found: Functions) -> bool:
    """Gives functions the code that has a fault. Returns False where it acts when its module is imported."""
    file = str(ROOT / mutant.path)
    source = read(mutant.path)
    first, second = (compile(text, file, "exec", dont_inherit=True) for text in (source, mutant.apply(source)))
    changes = list(changed(first, second))
    pairs = [(function, new) for old, new in changes if old is not None for function in found.get((file, old), ())]
    fit = all(len(function.__code__.co_freevars) == len(new.co_freevars) for function, new in pairs)
    if not pairs or not fit or any(old is None for old, _ in changes):
        return False
    for function, new in pairs:
        function.__code__ = new
    return True


def changed(first: CodeType, second: CodeType) -> Iterator[tuple[CodeType | None, CodeType]]:
    """The functions of one module that differ in another; None for one that does so outside of functions."""
    if meaning(first) == meaning(second):
        return
    is_function = bool(first.co_flags & inspect.CO_OPTIMIZED)
    if is_function:
        yield first, second
    elif meaning(first, inside=False) != meaning(second, inside=False):
        yield None, second
    for one, other in zip(parts(first), parts(second), strict=False):
        yield from changed(one, other)


def parts(code: CodeType) -> list[CodeType]:
    """The code objects in another."""
    return [each for each in code.co_consts if isinstance(each, CodeType)]


def meaning(code: CodeType, *, inside: bool = True) -> tuple[object, ...]:
    """What a code object does, wherever it stands.

    Args:
        code: which.
        inside: with what is in its functions.
    """
    first = code.co_firstlineno if "__firstlineno__" in code.co_names else None  # a class says where it begins
    constants = [
        (meaning(each) if inside else CodeType) if isinstance(each, CodeType) else (type(each), repr(each))
        for each in code.co_consts
        if each != first
    ]
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, tuple(constants)
