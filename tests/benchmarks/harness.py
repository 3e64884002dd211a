"""A row of the table, and how it is measured."""

from __future__ import annotations

import gc
import importlib
import math
import pkgutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal

import tests.benchmarks

OURS = "nbpeft"
PEFT = "peft"
Measure = Callable[[], float]
"""Does the work once and returns what it cost: seconds, bytes or kernels."""


@dataclass(frozen=True)
class Size:
    """How big the things are that rows measure on.

    Attributes:
        modules: adapted modules where their number matters.
        file_modules: adapted modules of the adapter that is loaded from a file.
        adapters: adapters on the model where their number matters.
        small: features of those many modules.
        wide: features of the single layers (d).
        wide_layers: how many such layers are merged.
        tokens: rows of input of a training step.
        few_tokens: the same where the layer's own work would hide the adapter's.
        batch_adapters: adapters that serve one batch.
        batch: rows of that batch.
        sequence: tokens that go through the language model's layers.
        hidden: hidden size of that language model.
        repeats: factor on the rows' repeats; 0 means once and no warm-up.
    """

    modules: int = 1001
    file_modules: int = 301
    adapters: int = 16
    small: int = 32
    wide: int = 2048
    wide_layers: int = 4
    tokens: int = 256
    few_tokens: int = 16
    batch_adapters: int = 32
    batch: int = 32
    sequence: int = 128
    hidden: int = 576
    repeats: float = 1.0


FULL = Size()
TOY = Size(
    modules=5,
    file_modules=3,
    adapters=3,
    small=8,
    wide=32,
    wide_layers=2,
    tokens=8,
    few_tokens=4,
    batch_adapters=3,
    batch=4,
    sequence=6,
    hidden=36,
    repeats=0,
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: how ``--only`` calls it.
        title: what is measured, for a person.
        kind: what a measure returns.
        target: the most that ours / rival may be; or the most that ours may be, if ``absolute``.
        prepare: (library name, size) -> a measure, with all that is not to be counted done.
        floor: size -> a measure of the work without any adapter, which is taken off both sides. What
            is left is small beside the noise, so such a row takes the least of its samples.
        rival: what ours is compared with, the name that ``prepare`` gets.
        absolute: whether the target is in seconds or bytes and not a ratio.
        repeats: how often it is measured; bytes are exact and need one.
    """

    name: str
    title: str
    kind: Literal["seconds", "bytes", "kernels"]
    target: float
    prepare: Callable[[str, Size], Measure]
    floor: Callable[[Size], Measure] | None = None
    rival: str = PEFT
    absolute: bool = False
    repeats: int = 7


@dataclass(frozen=True)
class Result:
    """What a row came to. ``ours`` is NaN when this version of nbpeft cannot do it yet."""

    row: Row
    ours: float
    rival: float
    floor: float = 0.0
    samples: dict[str, list[float]] = field(default_factory=dict)
    problem: str = ""

    @property
    def ratio(self) -> float:
        """ours / rival, both without the floor."""
        rest = self.rival - self.floor
        return (self.ours - self.floor) / rest if rest > 0 else math.nan

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None when there is nothing to compare."""
        value = self.ours if self.row.absolute else self.ratio
        return None if math.isnan(value) else value <= self.row.target


def rows(only: Iterable[str] = ()) -> list[Row]:
    """All rows in the order of the files, or those whose name begins with one of ``only``."""
    names = [info.name for info in pkgutil.iter_modules(tests.benchmarks.__path__) if info.name.startswith("rows_")]
    found: list[Row] = []
    for name in sorted(names):
        found += importlib.import_module(f"{tests.benchmarks.__name__}.{name}").ROWS
    beginnings = tuple(only)
    return [row for row in found if not beginnings or row.name.startswith(beginnings)]


def measure(row: Row, size: Size = FULL) -> Result:
    """Measures both sides in turn and takes the median of each (with a floor: the least).

    A failure of ours is a result (its ``problem``), so that one row does not stop the table; a
    failure of the rival is a mistake of the benchmark and is raised.
    """
    with quiet():
        measures = {row.rival: row.prepare(row.rival, size)}
        if row.floor:
            measures["floor"] = row.floor(size)
        problem = ""
        try:
            ours = row.prepare(OURS, size)
            ours()
            measures[OURS] = ours
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        samples = sample(measures, max(1, round(row.repeats * size.repeats)), warm_up=size.repeats > 0)
    typical = min if row.floor else statistics.median
    value = {name: typical(values) for name, values in samples.items()}
    return Result(row, value.get(OURS, math.nan), value[row.rival], value.get("floor", 0.0), samples, problem)


def sample(measures: dict[str, Measure], repeats: int, *, warm_up: bool) -> dict[str, list[float]]:
    """Each measure ``repeats`` times, in turn, so that a busy moment of the machine hits all."""
    if warm_up:
        for once in measures.values():
            once()
    samples: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repeats):
        for name, once in measures.items():
            gc.collect()
            samples[name].append(once())
    return samples


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what the libraries warn of: the rows do odd things on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def library(name: str) -> ModuleType:
    """nbpeft or peft; both have LoraConfig, get_peft_model and PeftModel."""
    return importlib.import_module(name)


def _finish() -> None:
    """Waits for what a card was given."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available():
        torch.accelerator.synchronize()


def timed(work: Callable[[], object], *, times: int = 1) -> float:
    """Seconds that the work took, per time."""
    start = time.perf_counter()
    for _ in range(times):
        work()
    _finish()
    return (time.perf_counter() - start) / times
