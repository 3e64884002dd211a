"""Which adapters act: one object that every adapted layer of a model reads.

Switching replaces one immutable value, whatever the number of modules and adapters. A call of
the model pins the value for its own thread, so that a switch made meanwhile by another thread
(a click during ``generate``) acts from the next call on, never inside one. Commands that change
tensors or modules wait until no call runs (``exclusive``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nbpeft.errors import AdapterError, BusyError


@dataclass(frozen=True)
class Rows:
    """Which adapter serves which row of a mixed batch.

    Attributes:
        names: distinct adapter names, without the base.
        index: for each row the position in ``names``, or -1 for the base alone.
        scales: factor on each adapter's delta.
        cache: what layers prepare once for the call this assignment belongs to.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]
    scales: tuple[float, ...]
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def expanded(self, batch: int, device: torch.device) -> Tensor:
        """``index`` as int64 (batch,), each row repeated where the batch holds beams or tokens.

        Raises:
            AdapterError: the batch is no multiple of the rows.
        """
        key = (batch, device)
        found = self.cache.get(key)
        if found is None:
            repeats, rest = divmod(batch, len(self.index))
            if rest:
                raise AdapterError(
                    f"adapter_names has {len(self.index)} names for {batch} rows: give one name for each row"
                )
            index = torch.tensor(self.index, dtype=torch.long, device=device)
            found = self.cache[key] = index.repeat_interleave(repeats)
        return found

    def spread(self, values: Tensor) -> Tensor:
        """One row that serves the whole batch (positions) once for each row; anything else as it is."""
        count = len(self.index)
        return values.expand(count, *values.shape[1:]) if values.shape[0] == 1 < count else values

    def rows_of(self, name: str, batch: int, device: torch.device) -> Tensor:
        """Row numbers, int64, that an adapter serves."""
        key = (name, batch, device)
        found = self.cache.get(key)
        if found is None:
            found = (self.expanded(batch, device) == self.names.index(name)).nonzero().flatten()
            self.cache[key] = found
        return found


@dataclass(frozen=True)
class Active:
    """What acts in a forward.

    Attributes:
        names: active adapters, in order.
        scales: factor on each one's delta.
        rows: the assignment of a mixed batch; ``names`` is then ignored.
    """

    names: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    rows: Rows | None = None


NOTHING = Active()


class Switch:
    """The shared value and the gate around it.

    Attributes:
        live: what acts in the next call.
    """

    def __init__(self) -> None:
        self.live = NOTHING
        self._start()

    def _start(self) -> None:
        self._local = threading.local()
        self._condition = threading.Condition()
        self._calls = 0
        self._waiting = 0
        self._writer: int | None = None
        self._writer_depth = 0

    def current(self) -> Active:
        """What acts for the calling thread."""
        if torch.compiler.is_compiling():
            return self.live
        pinned: Active | None = getattr(self._local, "pinned", None)
        return self.live if pinned is None else pinned

    @contextmanager
    def call(self, active: Active | Callable[[], Active] | None = None) -> Iterator[None]:
        """One call of the model: pins what acts, for this thread, until it ends.

        Args:
            active: act with this instead of the live value (a mixed batch); a function is asked
                once no command can change the adapters any more.
        """
        local = self._local
        outer: Active | None = getattr(local, "pinned", None)
        if outer is None:
            self._enter()
        try:
            chosen = active() if callable(active) else active
            local.pinned = chosen if chosen is not None else (outer or self.live)
            yield
        finally:
            local.pinned = outer
            if outer is None:
                self._leave()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds calls of other threads back while tensors or modules change.

        Raises:
            BusyError: this thread is inside a call of the model itself.
        """
        if getattr(self._local, "pinned", None) is not None:
            raise BusyError("adapters cannot be changed from inside a call of the model")
        me = threading.get_ident()
        with self._condition:
            if self._writer != me:
                self._waiting += 1
                try:
                    self._condition.wait_for(lambda: self._calls == 0 and self._writer is None)
                finally:
                    self._waiting -= 1
                self._writer = me
            self._writer_depth += 1
        try:
            yield
        finally:
            with self._condition:
                self._writer_depth -= 1
                if self._writer_depth == 0:
                    self._writer = None
                    self._condition.notify_all()

    def _enter(self) -> None:
        me = threading.get_ident()
        with self._condition:
            if self._writer != me:
                self._condition.wait_for(lambda: self._waiting == 0 and self._writer is None)
            self._calls += 1

    def _leave(self) -> None:
        with self._condition:
            self._calls -= 1
            self._condition.notify_all()

    def __getstate__(self) -> dict[str, Any]:
        return {"live": self.live}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.live = state["live"]
        self._start()
