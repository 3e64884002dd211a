"""The command that starts another host's processes: its arguments and its exit status."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import pytest

from nbpeft.training.launch import host
from nbpeft.training.launch.processes import Failure, Launch


class Started:
    """Processes that run for a number of looks; then they have ended, or one has failed."""

    def __init__(self, looks: int, failure: Failure | None) -> None:
        self.looks, self.end = looks, failure
        self.arguments: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any, **named: Any) -> Self:
        self.arguments = (*arguments, named)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    @property
    def running(self) -> bool:
        self.looks -= 1
        return self.looks >= 0

    def failure(self) -> Failure | None:
        return None if self.looks else self.end


@pytest.mark.parametrize("fails", [False, True])
def test_its_status_is_that_of_its_processes(
    fails: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = Started(3, Failure(5, "Error", "out of memory", 0.0, "") if fails else None)
    monkeypatch.setattr(host, "Processes", started)
    monkeypatch.setattr(host, "_POLL_INTERVAL", 0.0)
    assert host.main("/shared/job", "2", "3", "1", "10.0.0.1", "29500") == int(fails)
    assert capsys.readouterr().err == ("process 5 of 6: out of memory\n" if fails else "")
    folder, launch, named = started.arguments
    assert (folder, launch.processes) == (Path("/shared/job"), 2) and isinstance(launch, Launch)
    assert named == {"host": 1, "address": "10.0.0.1", "port": 29500}
