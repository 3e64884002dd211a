"""Equal warnings become one line with a count; nothing else is touched."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from nbpeft._util import logs
from nbpeft._util.logs import HOLD_SECONDS, LIBRARIES, RepeatFilter, collapsed
from tests.waiting import PATIENCE

FLOOD = "MatMul8bitLt: inputs will be cast from %s to float16 during quantization"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a handler on the root logger writes."""
    for library in LIBRARIES:
        # transformers keeps its records from the root logger once another test has imported it.
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger().addHandler(handler)
    yield text
    logging.getLogger().removeHandler(handler)


def warn(name: str, message: str, *values: object) -> None:
    logging.getLogger(name).warning(message, *values)


def test_equal_warnings_become_one_line_with_a_count(shown: io.StringIO) -> None:
    with collapsed():
        for _ in range(210):
            warn("bitsandbytes.autograd._functions", FLOOD, "torch.float32")
        assert shown.getvalue() == ""
    assert shown.getvalue() == (FLOOD % "torch.float32") + " (210 times)\n"


def test_others_are_told_each(shown: io.StringIO) -> None:
    with collapsed():
        warn("bitsandbytes.nn.modules", "first")
        warn("transformers.modeling", "second %d", 2)
        warn("bitsandbytes.nn.modules", "first")
        warn("bitsandbytes.autograd", "first")
    assert shown.getvalue().splitlines() == ["first (2 times)", "second 2", "first"]


def test_errors_and_other_libraries_pass_at_once(shown: io.StringIO) -> None:
    with collapsed():
        logging.getLogger("bitsandbytes").error("broken")
        warn("somebody", "hello")
        warn("somebody", "hello")
        warn("bitsandbytesque", "hello")
        assert shown.getvalue().splitlines() == ["broken", "hello", "hello", "hello"]
    assert len(shown.getvalue().splitlines()) == 4


def test_nothing_stays_afterwards(shown: io.StringIO) -> None:
    before = [list(handler.filters) for handler in logging.getLogger().handlers]
    with pytest.raises(ZeroDivisionError), collapsed():
        warn("bitsandbytes", "kept")
        raise ZeroDivisionError
    assert shown.getvalue() == "kept\n"
    assert [list(handler.filters) for handler in logging.getLogger().handlers] == before
    warn("bitsandbytes", "kept")
    assert shown.getvalue() == "kept\nkept\n"


def test_blocks_may_be_nested_and_take_in_new_handlers(shown: io.StringIO) -> None:
    text = io.StringIO()
    late = logging.StreamHandler(text)
    try:
        with collapsed():
            logging.getLogger("accelerate").addHandler(late)
            with collapsed():
                warn("accelerate.utils", "again")
            warn("accelerate.utils", "again")
            assert shown.getvalue() == text.getvalue() == ""
        assert shown.getvalue() == text.getvalue() == "again (2 times)\n"
    finally:
        logging.getLogger("accelerate").removeHandler(late)


def test_a_long_block_does_not_hold_a_warning_back_for_long(shown: io.StringIO) -> None:
    now = [0.0]
    repeats = RepeatFilter(clock=lambda: now[0])
    handler = next(item for item in logging.getLogger().handlers if getattr(item, "stream", None) is shown)
    handler.addFilter(repeats)
    warn("bitsandbytes", "again")
    warn("bitsandbytes", "again")
    now[0] = HOLD_SECONDS + 1
    warn("bitsandbytes", "again")
    assert shown.getvalue() == "again (3 times)\n"
    for _ in range(500):
        now[0] += 1
        warn("bitsandbytes", "again")
    repeats.flush()
    assert shown.getvalue() == "again (3 times)\nagain (500 more times)\n"


def test_talk_about_an_optional_kernel_and_a_resumed_run_is_dropped(shown: io.StringIO) -> None:
    with collapsed():
        warn("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: %s", "none")
        warn(
            "transformers.trainer_utils",
            "Warning: The following arguments do not match the ones in the `trainer_state.json`",
        )
        warn("bitsandbytes.backends.cpu.ops", "something else")
    assert shown.getvalue() == "something else\n"


def test_a_block_that_was_interrupted_anywhere_leaves_nothing(shown: io.StringIO) -> None:
    """At each line, also those of entering and leaving; another thread gets in afterwards."""
    seen = 0
    gc.collect()
    gc.freeze()  # what other tests have made is not gone over at each line
    for number in itertools.count(1):
        visits = itertools.count(1)

        def local(frame: FrameType, event: str, argument: object, number: int = number, visits: Any = visits) -> Any:
            if event == "line" and next(visits) == number:
                signal.raise_signal(signal.SIGINT)
            return local

        sys.settrace(lambda frame, *_: local if frame.f_code.co_filename == logs.__file__ else None)
        try:
            with collapsed():
                warn("transformers", "held")
        except KeyboardInterrupt:
            seen += 1
        finally:
            sys.settrace(None)
        gc.collect()
        other = threading.Thread(target=lambda: contextlib.ExitStack().enter_context(collapsed()), daemon=True)
        other.start()
        other.join(PATIENCE)
        assert not other.is_alive(), f"line {number}: another thread does not get in"
        gc.collect()
        assert not logs._collapsing._blocks, f"line {number}"
        if next(visits) <= number:
            break
    assert seen > 20
