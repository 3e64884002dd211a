"""Another thread changes the adapters in the middle of a command: that works, or is refused in a line of its own.

Wherever the command holds no lock, another thread may come between two of its lines: it takes an adapter out, renames
one, merges one or unloads all of them. Nothing depends on when threads happen to run: the command waits for the other
thread at the line.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import BusyError, NbpeftError
from tests.effort import TIER, drawn
from tests.faults.commands import COMMANDS, IDS, Stage, adapted, called, run_quietly, session_of, twin
from tests.faults.harness import traced

OTHERS: dict[str, Callable[[AdapterManager], object]] = {
    "a is taken out": lambda manager: manager.remove("a"),
    "b is taken out": lambda manager: manager.remove("b"),
    "a is renamed": lambda manager: manager.rename("a", "other"),
    "b is renamed": lambda manager: manager.rename("b", "other"),
    "a is merged": lambda manager: manager.merge(["a"]),
    "all are unloaded": lambda manager: manager.unload(merge=False),
}
QUICK = (
    *("copy", "merge", "unload", "combine", "swap", "adapter state dict", "switch merged", "sweep", "blocks"),
    *("mixed batch", "replace", "session delete", "session reset", "session keep weights", "undo delete"),
)
"""Commands that the quick run tries."""
_OF_THREADS = ("interrupts.py", "active_state.py", "transaction.py", "step_gate.py", "lock.py")
"""Files whose lines hold what the other thread would wait for."""

Point = tuple[str, int]


def holds_nothing(manager: AdapterManager) -> bool:
    """Whether this thread keeps no other one from changing the adapters."""
    state = manager.active_state
    return not (
        manager._transaction.is_mine
        or state._condition._is_owned()  # type: ignore[attr-defined]
        or state._inside(threading.get_ident())
        or state._writer is not None
    )


def points_of(made: Stage, command: Callable[[Stage], object]) -> list[Point]:
    """Lines of the package that a command runs while other threads may change the adapters."""
    stage, found = twin(made), set[Point]()

    def visit(file: str, line: int) -> None:
        if not file.endswith(_OF_THREADS) and holds_nothing(stage.model.manager):
            found.add((file, line))

    with traced(visit):
        command(stage)
    return sorted(found)


def interleaved(stage: Stage, command: Callable[[Stage], object], point: Point, other: Callable[..., object]) -> None:
    """Runs a command, and something else in another thread when it comes to a line."""
    manager = stage.model.manager
    left = [1]

    def act() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                other(manager)
            except NbpeftError:
                return

    def visit(file: str, line: int) -> None:
        if (file, line) == point and left and holds_nothing(manager):
            left.clear()
            thread = threading.Thread(target=act)
            thread.start()
            thread.join(30)
            assert not thread.is_alive()

    try:
        with traced(visit, only=point):
            command(stage)
    except NbpeftError:
        return
    except TypeError as error:  # what takes task ids was taken out before the call began
        if "unexpected keyword argument 'task_ids'" not in str(error):
            raise
    except RuntimeError as error:
        # Merged between a call and its backward pass: autograd refuses to differentiate what has changed since.
        if not any(words in str(error) for words in ("does not require grad", "modified by an inplace operation")):
            raise


def check_whole(stage: Stage) -> None:
    """What is on the layers is known to the manager, and can be read and run."""
    manager = stage.model.manager
    if not manager.alive:
        return
    held = {name for layer in manager.layers.values() for name in layer.adapters._modules}
    assert held <= set(manager.names) and set(manager.selected) <= set(manager.names)
    assert set(manager.merged) <= set(manager.names)
    for name in manager.names:
        assert manager.weights(name).adapters or manager.weights(name).copies
        assert manager.parameters(name)
    stage.model.eval()
    called(stage)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name in QUICK or TIER != "quick"])
def test_a_command_works_or_is_refused_when_another_thread_comes_between(name: str) -> None:
    made, command = COMMANDS[name].stage("dense"), COMMANDS[name]
    if made.model is None or made.pool is not None:
        pytest.skip("there are no adapters that another thread could change")
    points = points_of(made, lambda stage: run_quietly(command, stage))
    for number, point in enumerate(drawn(points, quick=6, full=20)):
        for other in drawn(list(OTHERS.values()), quick=2, seed=number):
            stage = twin(made)
            interleaved(stage, lambda stage: run_quietly(command, stage), point, other)
            check_whole(stage)


def test_a_call_and_another_thread_that_takes_its_adapter_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which waits from the moment on at which the call knows what acts in it."""
    stage = adapted("dense")
    manager = stage.model.manager
    current, threads = manager.active_state.current, list[threading.Thread]()

    def known() -> Any:
        found = current()
        if not threads:
            threads.append(threading.Thread(target=manager.remove, args=["a"]))
            threads[0].start()
            threads[0].join(0.2)
        return found

    monkeypatch.setattr(manager.active_state, "current", known)
    stage.model.eval()(IDS)
    threads[0].join(30)
    assert "a" not in manager.names


def test_a_change_counts_before_another_thread_may_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has built something for the adapters as they were would else put it onto others."""
    manager = adapted("dense").model.manager
    seen: list[int] = []
    lock, before = manager._transaction._lock, manager.revision

    class Watched:
        acquire = lock.acquire

        def release(self) -> None:
            seen.append(manager.revision)
            lock.release()

    monkeypatch.setattr(manager._transaction, "_lock", Watched())
    manager.freeze("a")
    assert seen == [before + 1]
    put = manager.prepare("a", manager.configs["b"], replace=True)
    manager.remove("b")
    put()
    assert seen[-1] == manager.revision


def test_no_other_command_comes_between_a_decision_and_its_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same adapter would be brought back twice, and another one be forgotten."""
    stage = adapted("dense")
    session = session_of(stage)
    session.delete("b")
    session.delete("dora")
    history, refused = session.context.history, list[BaseException]()
    of = history.of

    def other() -> None:
        try:
            session.undo()
        except BusyError as error:
            refused.append(error)

    def looked(manager: AdapterManager) -> Any:
        monkeypatch.setattr(history, "of", of)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(30)
        return of(manager)

    monkeypatch.setattr(history, "of", looked)
    assert str(session.undo()).startswith("'dora' is back")
    assert len(refused) == 1 and len(of(session.model().manager)) == 1
    assert str(session.undo()).startswith("'b' is back")
