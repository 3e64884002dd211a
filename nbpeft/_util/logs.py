"""Collapses equal warnings in the logs of other libraries into one line with a count.

bitsandbytes and transformers log the same warning for every layer and every step. Inside ``collapsed()`` such a warning
is delayed and counted, and shown once when the block ends::

    MatMul8bitLt: inputs will be cast from torch.float32 to float16 during quantization (210 times)

Except for those in ``DROPPED``, each distinct warning is shown. Errors, and all records of other libraries, are not
delayed. In a long block a warning is shown after ten seconds, and further ones are counted.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nbpeft._util.interrupts import DeferredInterrupts

LIBRARIES = ("bitsandbytes", "transformers", "accelerate")
HOLD_SECONDS = 10.0
"""Longest delay of a warning in seconds, provided that another one follows."""

DROPPED = (
    "Failed to load CPU gemm_4bit_forward",
    "The tokenizer has new PAD/BOS/EOS tokens",
    "Warning: The following arguments do not match the ones in the `trainer_state.json`",
)
"""Beginnings of warnings that are dropped. bitsandbytes logs the first one on import if an optional kernel is not
installed, even if nothing is quantized; transformers' Trainer logs the second one when it uses the tokens of its
tokenizer, as it should, and the third one for fields of a resumed run, which ``resume`` names itself."""

_MARK = "_nbpeft_counted"
_SHOWN = "_nbpeft_shown"

_Key = tuple[str, str]


class RepeatFilter(logging.Filter):
    """A logging filter that delays warnings of ``LIBRARIES`` and counts them until ``flush``.

    It is added to handlers, because the filter of a logger does not see records of its child loggers.

    Args:
        clock: returns a monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.RLock()
        self._delayed: dict[_Key, list[logging.LogRecord]] = {}
        self._counts: dict[_Key, int] = {}
        self._shown_before: set[_Key] = set()
        self._since = clock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether a handler should show a record now."""
        if record.levelno != logging.WARNING or hasattr(record, _SHOWN):
            return True
        if record.name.partition(".")[0] not in LIBRARIES:
            return True
        if record.getMessage().startswith(DROPPED):
            return False
        if not hasattr(record, _MARK):  # several handlers filter the same record: count it once
            setattr(record, _MARK, True)
            self._count(record)
        return False

    def _count(self, record: logging.LogRecord) -> None:
        key = (record.name, record.getMessage())
        with DeferredInterrupts(), self._lock:
            if not self._counts:
                self._since = self._clock()
            self._delayed.setdefault(key, [record])
            self._counts[key] = self._counts.get(key, 0) + 1
            late = self._clock() - self._since > HOLD_SECONDS and key not in self._shown_before
        if late:
            self.flush()

    def flush(self) -> None:
        """Shows every delayed warning with its count, in the order of first occurrence."""
        with DeferredInterrupts(), self._lock:
            delayed, counts = self._delayed, self._counts
            self._delayed, self._counts = {}, {}
            before = set(self._shown_before)
            self._shown_before.update(delayed)
        for key, (record,) in delayed.items():
            count, more = counts[key], " more" if key in before else ""
            times = f" ({count:,}{more} time{'' if count == 1 else 's'})" if count > 1 or more else ""
            record.msg, record.args = key[1] + times, None
            setattr(record, _SHOWN, True)
            logging.getLogger(record.name).handle(record)

    def forget(self) -> None:
        """Forgets which warnings have been shown."""
        with DeferredInterrupts(), self._lock:
            self._shown_before.clear()


class _Block:
    """Identifies one ``collapsed`` block.

    It is referenced only by its frame. So it disappears with the frame even if an interruption prevented a clean exit.
    """


class _Collapsing:
    """Adds the filter of the process to every handler that could show the libraries' records, and removes it."""

    def __init__(self) -> None:
        self._filter = RepeatFilter()
        self._handlers: list[logging.Handler] = []
        self._blocks: weakref.WeakSet[_Block] = weakref.WeakSet()
        self._lock = threading.RLock()

    def enter(self, block: _Block) -> None:
        with DeferredInterrupts(), self._lock:
            self._blocks.add(block)
            for handler in _handlers():
                if handler not in self._handlers:
                    handler.addFilter(self._filter)
                    self._handlers.append(handler)

    def leave(self, block: _Block) -> None:
        """Ends a block; does nothing if an interruption prevented ``enter``."""
        with DeferredInterrupts(), self._lock:
            if block not in self._blocks:
                return
            self._blocks.remove(block)
            if self._blocks:
                return
            try:
                self._filter.flush()
            finally:
                for handler in self._handlers:
                    handler.removeFilter(self._filter)
                self._handlers.clear()
                self._filter.forget()


_collapsing = _Collapsing()


@contextmanager
def collapsed() -> Iterator[None]:
    """Collapses equal warnings of other libraries inside the block into one line with a count at its end.

    Blocks may be nested; the outermost one shows the warnings. An inner block also adds the filter to handlers created
    since, such as the one that transformers creates when it is imported.
    """
    block = _Block()
    try:
        _collapsing.enter(block)
        yield
    finally:
        _collapsing.leave(block)


def _handlers() -> list[logging.Handler]:
    found = list(logging.getLogger().handlers)
    for library in LIBRARIES:
        found += logging.getLogger(library).handlers
    return found + ([logging.lastResort] if logging.lastResort is not None else [])
