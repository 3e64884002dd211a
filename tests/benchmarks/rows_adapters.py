"""Loading adapters from files and switching between them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import PEFT, Measure, Row, Size, library, timed
from tests.benchmarks.models import Chain, adapted


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


def many(name: str, size: Size) -> tuple[Any, list[str]]:
    """A model with many adapters, and their names."""
    source = library(name)
    settings: dict[str, Any] = {"r": 4, "target_modules": ["proj"]}
    model = source.get_peft_model(Chain(size.modules, size.small), source.LoraConfig(**settings), adapter_name="a0")
    names = [f"a{number}" for number in range(size.adapters)]
    for adapter in names[1:]:
        model.add_adapter(adapter, source.LoraConfig(**settings))
    return model, names


def switch(name: str, size: Size) -> Measure:
    """``set_adapter`` to the next one."""
    model, names = many(name, size)
    turn = iter(range(10**9))
    return lambda: timed(lambda: model.set_adapter(names[next(turn) % len(names)]))


def disable(name: str, size: Size) -> Measure:
    """Into ``disable_adapter()`` and out again."""
    model, _ = many(name, size)

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
