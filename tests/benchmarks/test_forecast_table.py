"""The tables of the memory forecast: every row can be forecast, and errors are grouped right."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.benchmarks.forecast_table import PUBLISHED, accuracy_table, forecast_of, published_table, words


def test_errors_are_grouped() -> None:
    case = {"shape": "llama", "dtype": torch.float32, "quantization": None, "training": True}
    cases = [
        case | {"gradient_checkpointing": False},
        case | {"gradient_checkpointing": True, "quantization": "nf4"},
        case | {"gradient_checkpointing": True, "training": False},
    ]
    lines = accuracy_table(cases, [0.01, 0.03, 0.002]).split("\n")
    assert lines[2] == "| **all** | 3 | 1.00 % | 3.00 % |"
    assert "| stored: nf4 | 1 | 3.00 % | 3.00 % |" in lines
    assert "| step: inference | 1 | 0.20 % | 0.20 % |" in lines


@pytest.mark.slow
def test_a_row_tells_settings_figure_and_source() -> None:
    row = next(row for row in PUBLISHED if row.model == "LLaMA 65B")
    assert words(row.settings, row.adapter) == (
        "QLoRA, r 64 on all-linear, nf4, batch 4, length 528, checkpointing, paged_adamw_32bit"
    )
    line = published_table([row]).split("\n")[-1]
    assert "one 48 GB GPU" in line and "arXiv 2305.14314" in line


@pytest.mark.slow
def test_every_source_is_named_and_every_setting_known() -> None:
    assert all(row.source and row.figure for row in PUBLISHED)
    for row in {row.model: row for row in PUBLISHED}.values():
        smaller = dataclasses.replace(row, settings={**row.settings, "batch_size": 1, "max_length": 16})
        assert forecast_of(smaller).peak_bytes > 10**9
