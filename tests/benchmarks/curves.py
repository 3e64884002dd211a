"""What the work costs as adapters and modules get more: ``python -m tests.benchmarks.curves``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.benchmarks import rows_adapters, rows_combine, rows_inject, rows_mixed, table
from tests.benchmarks.harness import FULL, OURS, PEFT, Measure, Result, Row, Size, measure

Axis = Literal["adapters", "modules"]
COUNTS: dict[Axis, tuple[int, ...]] = {"adapters": (1, 4, 16, 64, 256), "modules": (16, 64, 256, 1001)}
_FIXED = dataclasses.replace(FULL, adapters=4, modules=16, file_modules=16, wide=512, wide_layers=1, batch=256)
"""What stays when the other number grows; small layers, so that the library's own share shows."""


@dataclass(frozen=True)
class Curve:
    """One piece of work over one axis.

    Attributes:
        name: how ``--only`` calls it.
        title: what is measured.
        axis: what grows.
        prepare: (library, size) -> a measure, as a row has it.
    """

    name: str
    title: str
    axis: Axis
    prepare: Callable[[str, Size], Measure]

    def size(self, count: int, fixed: Size = _FIXED) -> Size:
        """The size at one point of the axis."""
        if self.axis == "adapters":
            return dataclasses.replace(fixed, adapters=count, batch_adapters=count)
        return dataclasses.replace(fixed, modules=count, file_modules=count, wide_layers=min(count, 64))


CURVES = [
    Curve("inject", "inject one more", "adapters", rows_inject.one_more),
    Curve("inject", "inject one more", "modules", rows_inject.one_more),
    Curve("load", "load one more from a file", "adapters", rows_adapters.one_more),
    Curve("load", "load one more from a file", "modules", rows_adapters.one_more),
    Curve("switch", "switch", "adapters", rows_adapters.switch),
    Curve("switch", "switch", "modules", rows_adapters.switch),
    Curve("hot-swap", "hot-swap from a file", "adapters", rows_combine.swapped_beside),
    Curve("hot-swap", "hot-swap from a file", "modules", rows_combine.swapped_beside),
    Curve("combine", "combine them all by SVD", "adapters", rows_combine.all_by_svd),
    Curve("mixed", "a decode step of 256 rows, served by", "adapters", rows_mixed.decode),
]


def points(curve: Curve, counts: Iterable[int], repeats: float, fixed: Size = _FIXED) -> list[Result]:
    """The curve measured at each count, both libraries in turn."""
    row = Row(curve.name, curve.title, "seconds", math.inf, curve.prepare, repeats=3)
    return [measure(row, dataclasses.replace(curve.size(count, fixed), repeats=repeats)) for count in counts]


def as_markdown(measured: Sequence[tuple[Curve, Sequence[int], Sequence[Result]]]) -> str:
    """A table for each axis: nbpeft's time, and peft's in parentheses."""
    blocks = []
    for axis in COUNTS:
        lines = [(curve, counts, results) for curve, counts, results in measured if curve.axis == axis]
        if not lines:
            continue
        counts = lines[0][1]
        head = f"| number of {axis} | " + " | ".join(f"{count:,}" for count in counts) + " |"
        body = [
            f"| {curve.title} | " + " | ".join(_cell(result) for result in results) + " |"
            for curve, _, results in lines
        ]
        blocks.append("\n".join([head, "|---" * (len(counts) + 1) + "|", *body]))
    return "\n\n".join(blocks)


def _cell(result: Result) -> str:
    return f"{table.quantity(result.ours, 'seconds')} ({table.quantity(result.rival, 'seconds')})"


def main() -> int:
    """Measures and prints the curves."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.curves", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="CURVE", help="inject, load, switch, hot-swap, …")
    parser.add_argument("--threads", type=int, default=1, help="threads for torch (default 1: steadier)")
    parser.add_argument("--repeats", type=float, default=1.0, metavar="FACTOR", help="measure more or less often")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    import torch

    torch.set_num_threads(arguments.threads)
    measured = []
    for curve in CURVES:
        if not arguments.only or curve.name in arguments.only:
            print(f"  {curve.name} over {curve.axis} …", file=sys.stderr, flush=True)
            measured.append((curve, COUNTS[curve.axis], points(curve, COUNTS[curve.axis], arguments.repeats)))
    print(f"{as_markdown(measured)}\n\n{OURS} ({PEFT} in parentheses); {table.machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
