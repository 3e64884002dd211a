"""The command line: ``python -m tests.gpu``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.benchmarks import harness, table

_ROWS = ("inject", "switch", "merge", "combine", "step", "mixed", "saved")
"""Rows of the benchmark that a card does; others measure files and imports."""


def main(given: list[str] | None = None) -> int:
    """Runs what a card is used for and prints, or writes, a table; without a card it says so."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="What nbpeft does on the card here.")
    parser.add_argument("--device", default="", help="cuda, cuda:1, …; cpu runs it shortened, to see that it runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the Markdown goes; printed if left out")
    options = parser.parse_args(given)
    if not options.device and not torch.cuda.is_available():
        print("There is no CUDA device here, so nothing was measured; --device cpu runs it shortened.")
        return 0
    device = torch.device(options.device or "cuda")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    lines = []
    for part in report(device, short=device.type == "cpu"):
        print(part, file=sys.stderr, flush=True)
        lines.append(part)
    text = "\n\n".join(lines) + "\n"
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0


def report(device: torch.device, *, short: bool) -> Iterator[str]:
    """The parts of the report, in Markdown, as they come."""
    from tests.gpu.card import card_of

    yield card_of(device) + (". Shortened: the figures mean nothing." if short else "")
    yield _matrix(device, short)
    yield _swaps(device, short)
    yield _costs(device, short)
    yield _benchmark(device, short)


def _matrix(device: torch.device, short: bool) -> str:
    from tests.gpu.matrix import check_matrix

    count, failures = check_matrix(device, every=9 if short else 1)
    text = f"The engine's matrix: {count - len(failures)} of {count} pairs of method and layer as on the CPU."
    return "\n".join([text, *(f"- {pair}: {reason}" for pair, reason in failures.items())])


def _swaps(device: torch.device, short: bool) -> str:
    from tests.gpu.hot_swap import check_swaps

    how = "CUDA graphs" if not short else "torch.compile without a backend"
    try:
        found = check_swaps(device, count=2 if short else 6, graphs=not short)
    except Exception as error:
        return f"Hot-swap under {how}: failed, {type(error).__name__}: {error}".splitlines()[0]
    return (
        f"Hot-swap under {how}: {found.count} swaps, {found.recompiled} graphs compiled anew, largest difference "
        f"{found.largest_error:.1e}, {table.quantity(found.seconds, 'seconds')} a swap from a file."
    )


def _costs(device: torch.device, short: bool) -> str:
    from tests.gpu.costs import SHORT, WORKS, cost_of

    lines = ["| training | peft: step, peak | nbpeft: step, peak | ratios |", "|---|---:|---:|---:|"]
    for work in SHORT if short else WORKS:
        theirs, ours = (cost_of(library, work, device, 4 if short else 12) for library in ("peft", "nbpeft"))
        sides = [
            ", ".join((table.quantity(cost.seconds, "seconds"), table.quantity(cost.peak or math.nan, "bytes")))
            for cost in (theirs, ours)
        ]
        memory = "–" if not ours.peak or not theirs.peak else f"{ours.peak / theirs.peak:.2f}"
        lines.append(f"| {work.title} | {sides[0]} | {sides[1]} | {ours.seconds / theirs.seconds:.2f}, {memory} |")
    return "\n".join(lines)


def _benchmark(device: torch.device, short: bool) -> str:
    size = harness.TOY if short else dataclasses.replace(harness.FULL, repeats=1.0)
    results, left_out = [], []
    torch.set_default_device(device)
    try:
        for row in harness.rows(_ROWS[:1] if short else _ROWS):
            try:
                results.append(harness.measure(row, size))
            except Exception as error:
                left_out.append(f"- {row.title}: not measured here, {type(error).__name__}: {error}".splitlines()[0])
    finally:
        torch.set_default_device(None)
    return "\n".join([table.as_markdown(results), *left_out])


if __name__ == "__main__":
    sys.exit(main())
