"""Loading adapters from files and switching between them."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import PEFT, Measure, Row, Size, library, timed
from tests.benchmarks.models import Chain, adapted, with_adapters


def saved_by_peft(size: Size, folder: Path) -> Path:
    """A folder with an adapter for ``file_modules`` layers, which both libraries read."""
    adapted(PEFT, Chain(size.file_modules, 16 * size.small), r=8).save_pretrained(folder)
    return folder


def first(name: str, size: Size) -> Measure:
    """``PeftModel.from_pretrained`` on a fresh base."""
    folder = tempfile.TemporaryDirectory()
    saved = saved_by_peft(size, Path(folder.name))

    def measure(kept: object = folder) -> float:
        model = Chain(size.file_modules, 16 * size.small)
        return timed(lambda: library(name).PeftModel.from_pretrained(model, str(saved)))

    return measure


def another(name: str, size: Size) -> Measure:
    """``load_adapter`` beside one that is there."""
    folder = tempfile.TemporaryDirectory()
    saved = saved_by_peft(size, Path(folder.name))
    model = library(name).PeftModel.from_pretrained(Chain(size.file_modules, 16 * size.small), str(saved))

    def measure(kept: object = folder) -> float:
        seconds = timed(lambda: model.load_adapter(str(saved), adapter_name="second"))
        model.delete_adapter("second")
        return seconds

    return measure


def one_more(name: str, size: Size) -> Measure:
    """``load_adapter`` beside ``adapters`` that are there."""
    folder = tempfile.TemporaryDirectory()
    saved = str(saved_by_peft(size, Path(folder.name)))
    model = with_adapters(name, Chain(size.file_modules, 16 * size.small), size.adapters, r=8)

    def measure(kept: object = folder) -> float:
        seconds = timed(lambda: model.load_adapter(saved, adapter_name="last"))
        model.delete_adapter("last")
        return seconds

    return measure


def many(name: str, size: Size) -> Any:
    """A model with many adapters."""
    return with_adapters(name, Chain(size.modules, size.small), size.adapters, r=4)


def switch(name: str, size: Size) -> Measure:
    """``set_adapter`` to the next one."""
    model = many(name, size)
    turn = itertools.count()
    return lambda: timed(lambda: model.set_adapter(f"a{next(turn) % size.adapters}"))


def disable(name: str, size: Size) -> Measure:
    """Into ``disable_adapter()`` and out again."""
    model = many(name, size)

    def once() -> None:
        with model.disable_adapter():
            pass

    return lambda: timed(once)


ROWS = [
    Row("load", "load a 2nd adapter, 301 modules, 9.9 MB", "seconds", 0.2, another),
    Row("load-first", "from_pretrained, 301 modules", "seconds", 0.2, first),
    Row("switch", "switch adapter, 1,001 modules, 16 adapters", "seconds", 0.02, switch),
    Row("disable", "disable_adapter(), the same model", "seconds", 0.02, disable),
]
