"""The results as text, Markdown or JSON."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.harness import OURS, PEFT, Result

HEADINGS = ("work", "peft", "nbpeft", "ratio", "target", "")


def quantity(value: float, kind: str) -> str:
    """``3.2 ms``, ``1.10 s`` or ``11.5 MB``; ``–`` for what could not be measured."""
    if math.isnan(value):
        return "–"
    if kind == "bytes":
        return f"{value / 1e6:.1f} MB"
    if kind == "kernels":
        return f"{value:,.0f}"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"


def cells(result: Result) -> tuple[str, ...]:
    """One line of the table. What a row takes off both sides is told in parentheses."""
    row = result.row
    rival = quantity(result.rival, row.kind) + (f" (base {quantity(result.floor, row.kind)})" if row.floor else "")
    ratio = "–" if math.isnan(result.ratio) else f"{result.ratio:.3f}" if result.ratio < 0.1 else f"{result.ratio:.2f}"
    target = "≤ " + (quantity(row.target, row.kind) if row.absolute else f"{row.target:g}")
    verdict = {None: result.problem[:60] or "–", True: "met", False: "missed"}[result.met]
    return row.title, rival, quantity(result.ours, row.kind), ratio, target, verdict


def as_text(results: Sequence[Result]) -> str:
    """Columns for a terminal."""
    lines = [HEADINGS, *map(cells, results)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" if column in (0, 5) else f"{cell:>{width}}" for column, (cell, width) in pairs)
        for pairs in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
    )


def as_markdown(results: Sequence[Result]) -> str:
    """A table for the guide."""
    head = "| work | peft | nbpeft | ratio | target |\n|---|---:|---:|---:|---:|"
    lines = []
    for result in results:
        *columns, target, verdict = cells(result)
        lines.append(" | ".join([*columns, f"**{target} missed**" if verdict == "missed" else target]))
    return "\n".join([head, *(f"| {line} |" for line in lines), "", machine()])


def as_dict(result: Result) -> dict[str, Any]:
    """Everything about one result, for JSON; NaN is None there."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "name": result.row.name,
        "title": result.row.title,
        "unit": result.row.kind,
        "rival": result.row.rival,
        "ours": number(result.ours),
        "theirs": number(result.rival),
        "floor": result.floor,
        "ratio": number(result.ratio),
        "target": result.row.target,
        "absolute": result.row.absolute,
        "met": result.met,
        "problem": result.problem,
        "samples": result.samples,
    }


def machine() -> str:
    """Versions and processor, in one line."""
    import torch

    versions = [f"{name} {importlib.metadata.version(name)}" for name in (OURS, PEFT, "torch", "transformers")]
    threads = torch.get_num_threads()
    return ", ".join([*versions, f"{platform.machine()} CPU", f"{threads} thread{'s' if threads > 1 else ''}"])
