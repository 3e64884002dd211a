"""What the processes of a training exchange."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from nbpeft.errors import TrainingError
from nbpeft.training.disk import agreement
from nbpeft.training.disk.agreement import gathered, own_share, save_collectively


@pytest.fixture
def in_the_first_of_two(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """This process is the first one of two; what the second one sends is in the list."""
    other: list[Any] = []

    def all_gather(found: list[Any], own: Any, group: Any = None) -> None:
        found[:] = [own, other[0]]

    monkeypatch.setattr(agreement, "is_distributed", lambda: True)
    monkeypatch.setattr(agreement, "_on_the_cpu", lambda: None)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "all_gather_object", all_gather)
    return other


def test_each_process_has_a_share_and_gets_the_parts_of_all(in_the_first_of_two: list[Any]) -> None:
    assert own_share([1, 2, 3]) == [1, 3]
    in_the_first_of_two.append((20, ""))
    assert gathered(lambda: 10) == [10, 20]


def test_an_error_of_another_process_is_raised_here_too(in_the_first_of_two: list[Any]) -> None:
    in_the_first_of_two.append((None, "the metric fails at row 3"))
    with pytest.raises(TrainingError, match="the metric fails at row 3"):
        gathered(lambda: 10)


def test_an_error_of_this_process_is_sent_and_raised(in_the_first_of_two: list[Any]) -> None:
    in_the_first_of_two.append((20, ""))
    with pytest.raises(ZeroDivisionError):
        gathered(lambda: 1 / 0)


def test_a_single_process_has_everything() -> None:
    assert own_share([1, 2, 3]) == [1, 2, 3]
    assert gathered(lambda: 10) == [10]


@pytest.mark.parametrize("announced", [True, False])
def test_another_process_writes_its_part_where_the_first_one_says(
    announced: bool, in_the_first_of_two: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(agreement, "broadcast_from_rank0", lambda value: tmp_path if announced else None)
    in_the_first_of_two.append("")
    written: list[Path] = []
    save_collectively(lambda write: pytest.fail("only the first process makes the folder"), written.append)
    assert written == ([tmp_path] if announced else [])
