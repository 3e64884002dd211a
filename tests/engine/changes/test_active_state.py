"""Switching: what a running call sees, and who waits for whom."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nbpeft.engine.changes.active_state import (
    _ENTERED_BY,
    NO_ADAPTERS,
    ActiveAdapters,
    ActiveState,
    Call,
    RowAssignment,
)
from nbpeft.errors import AdapterError, BusyError
from nbpeft.model.handle.serving import blended
from tests.tiny_models import adapted, tokens
from tests.waiting import PATIENCE


@contextmanager
def exclusive(switch: ActiveState) -> Iterator[None]:
    """What a command does: nobody else's calls run in the block."""
    switch.close()
    try:
        yield
    finally:
        switch.open()


def test_the_block_of_a_call_is_that_of_who_calls_the_model() -> None:
    model = adapted()
    files: list[str] = []

    def look(*_: object) -> None:
        blocks = [call._block for call in model.manager.active_state._calls]
        files.extend(Path(block._frame.f_code.co_filename).name for block in blocks if block is not None)

    model.get_base_model().register_forward_pre_hook(look)
    model(input_ids=tokens())
    model(input_ids=tokens(), adapter_names=["default", "__base__"])
    with blended(model.manager, {"default": 0.5}):
        look()
    assert files == ["peft_model.py", "peft_model.py", Path(__file__).name]
    assert importlib.util.find_spec(_ENTERED_BY) is not None


def test_a_running_call_keeps_what_it_started_with() -> None:
    switch = ActiveState()
    switch.live = ActiveAdapters(("a",), (1.0,))
    seen = []
    started, go_on = threading.Event(), threading.Event()

    def call() -> None:
        with switch.call():
            seen.append(switch.current().names)
            started.set()
            go_on.wait(PATIENCE)
            with switch.call():
                seen.append(switch.current().names)
        seen.append(switch.current().names)

    thread = threading.Thread(target=call)
    thread.start()
    started.wait(PATIENCE)
    switch.live = ActiveAdapters(("b",), (1.0,))
    assert switch.current().names == ("b",)
    go_on.set()
    thread.join(PATIENCE)
    assert seen == [("a",), ("a",), ("b",)]


def test_changes_wait_for_calls_and_calls_for_changes() -> None:
    switch = ActiveState()
    order: list[str] = []
    inside = threading.Event()

    def call() -> None:
        with switch.call():
            inside.set()
            time.sleep(0.05)
            order.append("call")

    thread = threading.Thread(target=call)
    thread.start()
    inside.wait(PATIENCE)
    with exclusive(switch):
        order.append("change")
        late = threading.Thread(target=lambda: [switch.call().__enter__(), order.append("late")])
        late.start()
        time.sleep(0.05)
        order.append("changed")
    late.join(PATIENCE)
    thread.join(PATIENCE)
    assert order == ["call", "change", "changed", "late"]


def test_a_change_from_inside_a_call_is_refused() -> None:
    switch = ActiveState()
    with switch.call(), pytest.raises(BusyError, match="inside a call"), exclusive(switch):
        pass


def test_the_thread_that_changes_may_call() -> None:
    switch = ActiveState()
    with exclusive(switch), exclusive(switch), switch.call():
        assert switch.current() is NO_ADAPTERS


def test_copies_have_their_own_gate() -> None:
    switch = ActiveState()
    switch.live = ActiveAdapters(("a",), (1.0,))
    for twin in (copy.deepcopy(switch), pickle.loads(pickle.dumps(switch))):
        assert twin.live == switch.live
        with exclusive(switch), twin.call():
            assert twin.current().names == ("a",)


def test_rows_are_repeated_for_beams_and_must_fit() -> None:
    rows = RowAssignment(("a", "b"), (0, -1, 1), (1.0, 1.0))
    device = torch.device("cpu")
    assert rows.repeat_to(6, device).tolist() == [0, 0, -1, -1, 1, 1]
    assert rows.rows_of("b", 6, device).tolist() == [4, 5]
    assert rows.repeat_to(6, device) is rows.repeat_to(6, device)
    with pytest.raises(AdapterError, match="3 names for 4 rows"):
        rows.repeat_to(4, device)


class Records(torch.autograd.Function):
    """Notes in backward which adapters are active there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, switch: ActiveState, seen: list[ActiveAdapters]) -> Tensor:
        ctx.noted = switch, seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        switch, seen = ctx.noted
        seen.append(switch.current())
        return gradients[0], None, None


def test_backward_runs_with_the_adapters_of_the_call_that_recorded_the_node() -> None:
    switch, seen = ActiveState(), list[ActiveAdapters]()
    switch.live = now = ActiveAdapters(("now",), (1.0,))
    calls = [ActiveAdapters((name,), (1.0,)) for name in ("first", "second", "elsewhere")]
    x = torch.ones(1, requires_grad=True)
    total, outputs = Records.apply(x, switch, seen), []
    for active in calls[:2]:
        first = torch._C._autograd._get_sequence_nr()
        outputs.append(Records.apply(x, switch, seen))
        switch.remember(first, active)
    begin = switch._prepared[0][0]
    other = threading.Thread(target=switch._prepared.append, args=((begin, begin + 99, -1, calls[2]),))
    other.start()
    other.join(PATIENCE)
    for output in (total, *outputs):
        output.sum().backward()
    assert seen == [now, *calls[:2]] and switch.current() is now
    switch._prepared.popleft()
    outputs = [Records.apply(x, switch, seen)]  # recorded in no call of this thread
    outputs[0].sum().backward()
    assert seen[-1] is calls[2]


def test_a_call_whose_end_was_skipped_chooses_nothing_for_the_next_one() -> None:
    switch = ActiveState()
    switch.publish(ActiveAdapters(("a",), (1.0,)))

    def cut_off() -> Call:
        call = switch.call(ActiveAdapters(("b",), (1.0,)))
        return call.__enter__()

    left = cut_off()
    assert not left.runs()
    with switch.call():
        assert switch.current().names == switch.traced.names == ("a",)


def test_what_is_traced_is_what_the_running_call_has() -> None:
    switch, chosen = ActiveState(), ActiveAdapters(("a",), (1.0,))
    with switch.call(chosen):
        assert switch.traced is chosen
    assert switch.traced is switch.live


def test_equal_assignments_are_equal_whatever_their_calls_have_left_in_them() -> None:
    one, other = (RowAssignment(("a", "b"), (0, 1), (1.0, 1.0)) for _ in range(2))
    one.call.note([(2, 3)], 2)
    one.cache["rows"] = 2
    assert one == other
    assert repr(one) == "RowAssignment(names=('a', 'b'), index=(0, 1), scales=(1.0, 1.0))"


def test_rows_of_one_adapter_are_one_run() -> None:
    assert RowAssignment(("a",), (0, 0), (1.0,)).runs(4) == [("a", slice(0, 4))]
    assert RowAssignment((), (-1, -1), ()).runs(4) == [("", slice(0, 4))]
    assert RowAssignment(("a",), (0, 0, -1), (1.0,)).runs(6) == [("a", slice(0, 4)), ("", slice(4, 6))]


def test_what_has_one_row_is_for_all_rows() -> None:
    rows = RowAssignment(("a",), (0, -1), (1.0,))
    assert rows.broadcast(torch.zeros(1, 3)).shape == (2, 3)
    for shape in ((2, 3), (3, 3)):
        values = torch.zeros(shape)
        assert rows.broadcast(values) is values
    rows.call.note([(4, 3)], 2)
    assert rows.broadcast(torch.zeros(1, 3)).shape == (4, 3)
