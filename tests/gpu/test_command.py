"""The command runs as a whole, shortened, where there is no card; what is special to CUDA is not run by this."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.__main__ import main


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("There is no CUDA device here, so nothing was measured")


@pytest.mark.slow
def test_the_report_holds_matrix_swaps_costs_and_benchmark(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--out", str(tmp_path / "table.md")]) == 0
    card, matrix, swaps, costs, benchmark = (tmp_path / "table.md").read_text().split("\n\n", 4)
    assert f"torch {torch.__version__}" in card and "CPU" in card
    done, _, count = matrix.removeprefix("The engine's matrix: ").partition(" pairs")[0].partition(" of ")
    assert done == count and int(count) > 5
    assert "2 swaps, 0 graphs compiled anew" in swaps
    assert costs.splitlines()[2].startswith("| a toy, 2 x 16, loss on a quarter |")
    assert "| work | peft | nbpeft | ratio | target |" in benchmark and "not measured here" not in benchmark
