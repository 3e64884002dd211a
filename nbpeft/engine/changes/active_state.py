"""Which adapters act: one object that every adapted layer of a model reads.

Switching replaces one immutable value, whatever the number of modules and adapters. A call of
the model pins the value for its own thread, so that a switch made meanwhile by another thread
(a click during ``generate``) acts from the next call on, never inside one. A scope (``use``,
``disable_adapter``) has a value of its own for the thread or asyncio task that opened it.
Commands that change tensors or modules wait until no call runs (``close``).
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from nbpeft._util.interrupts import HeldInterrupts, RunningBlock, wait_for
from nbpeft.engine.changes.step_gate import StepGate
from nbpeft.errors import AdapterError, BusyError

_MOST_PREPARED = 256
"""Calls of a training whose backward has yet to come, of which is kept what methods prepared for them."""
_ENTERED_BY = "nbpeft.model.handle.serving"
"""The module with the contexts around a call, whose own frames are not those of the block."""


@dataclass
class CallShape:
    """The shape of a call of the model with a mixed batch, by which layers tell rows from positions.

    Attributes:
        batch: rows, those for beams counted; None where the call does not show it.
        lengths: how many positions a row may have.
        first: the length of a row, and what else the second size of an input is.
    """

    batch: int | None = None
    lengths: set[int] = field(default_factory=set)
    first: set[int] = field(default_factory=set)

    def note(self, shapes: Sequence[tuple[int, ...]], rows: int) -> None:
        """Notes the shapes of the tensors of a call, without features, that which tells the batch first.

        Args:
            shapes: (batch, positions) mostly.
            rows: how many adapters were named.
        """
        having = [shape for shape in shapes if shape and shape[0] and shape[0] % rows == 0]
        self.batch = having[0][0] if having else None
        self.lengths, self.first = set(), set()
        for shape in having:
            if shape[0] == self.batch and len(shape) > 1:
                self.first.add(shape[1])
                self.add_positions(shape)

    def add_positions(self, shape: tuple[int, ...]) -> None:
        """Notes how many positions of a row follow each other where a tensor of some shape is flattened."""
        self.lengths.update(math.prod(shape[1:end]) for end in range(2, len(shape) + 1))

    def holds(self, count: int) -> bool:
        """Whether so many rows are those of the batch, or all their positions."""
        assert self.batch is not None
        return count == self.batch or any(count == self.batch * length for length in self.lengths)

    def is_positions_first(self, shape: tuple[int, ...], values: Tensor) -> bool:
        """Whether a tensor has the positions in front of the batch, as far as that can be told."""
        return shape[1] == self.batch and (shape[0] in self.first or values.stride(0) < values.stride(1))


@dataclass(frozen=True)
class RowAssignment:
    """Which adapter serves which row of a mixed batch.

    Attributes:
        names: distinct adapter names, without the base.
        index: for each row the position in ``names``, or -1 for the base alone.
        scales: factor on each adapter's delta.
        cache: what layers prepare once for the call this assignment belongs to.
        call: the shape of the call that runs.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]
    scales: tuple[float, ...]
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    call: CallShape = field(default_factory=CallShape, compare=False, repr=False)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether one adapter serves all rows."""
        return len(set(self.index)) < 2

    def repeat_to(self, batch: int, device: torch.device) -> Tensor:
        """``index`` as int64 (batch,), each row repeated where the batch holds beams or tokens.

        Raises:
            AdapterError: the batch is no multiple of the rows.
        """
        key = (batch, device)
        found = self.cache.get(key)
        if found is None:
            repeats, rest = divmod(batch, len(self.index))
            if rest and not self.is_uniform:
                raise AdapterError(
                    f"adapter_names has {len(self.index)} names for {batch} rows: give one name for each row"
                )
            index = torch.tensor(self.index, dtype=torch.long, device=device)
            index = index[:1].expand(batch) if self.is_uniform else index.repeat_interleave(repeats)
            found = self.cache[key] = index
        return found

    def broadcast(self, values: Tensor) -> Tensor:
        """One row that serves the whole batch (positions) once for each row; anything else as it is."""
        count = self.call.batch or len(self.index)
        return values.expand(count, *values.shape[1:]) if values.shape[0] == 1 < count else values

    def runs(self, batch: int) -> list[tuple[str, slice]]:
        """Neighbouring rows that one adapter serves: its name, or the empty string for the base alone, and the rows.

        Args:
            batch: rows, a multiple of those that were assigned.
        """
        if self.is_uniform:
            return [(self.names[0] if self.names else "", slice(0, batch))]
        repeats, start, found = batch // len(self.index), 0, []
        for place, group in groupby(self.index):
            end = start + len(list(group)) * repeats
            found.append((self.names[place] if place >= 0 else "", slice(start, end)))
            start = end
        return found

    def rows_of(self, name: str, batch: int, device: torch.device) -> Tensor:
        """Row numbers, int64, that an adapter serves."""
        key = (name, batch, device)
        found = self.cache.get(key)
        if found is None:
            found = (self.repeat_to(batch, device) == self.names.index(name)).nonzero().flatten()
            self.cache[key] = found
        return found


@dataclass(frozen=True)
class ActiveAdapters:
    """What acts in a forward.

    Attributes:
        names: active adapters, in order.
        scales: factor on each one's delta.
        rows: the assignment of a mixed batch; ``names`` is then ignored.
        context: adapter name -> what its method prepared for the call that runs, or finds in a first pass of it.
    """

    names: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    rows: RowAssignment | None = None
    context: Mapping[str, Any] = field(default_factory=dict, compare=False)


NO_ADAPTERS = ActiveAdapters()


@dataclass(eq=False)
class Scope:
    """What acts for one thread or asyncio task inside a block, and for the tasks that are started there.

    Attributes:
        names: selected adapters.
        enabled: whether they act.
        chooses: whether the selection is its own; else one made in it is made around it, too, as in PEFT.
        apart: whether its adapters learn side by side: the first acts, unless a call names others.
        outer: the scope around it.
        active: names as the layers read them.
        closed: whether its block has ended; a task that outlives it goes on without it.
    """

    names: tuple[str, ...]
    enabled: bool
    chooses: bool = True
    apart: bool = False
    outer: Scope | None = None
    active: ActiveAdapters = NO_ADAPTERS
    closed: bool = False

    @property
    def effective(self) -> tuple[str, ...]:
        """Names of the adapters that act together."""
        return (self.names[:1] if self.apart else self.names) if self.enabled else ()


@dataclass(frozen=True, eq=False)
class _Pin:
    """What a running call has pinned.

    An interruption between two instructions can keep a context from ending. The call is therefore held
    weakly, and asked whether its block still runs before anything else is pinned.

    Attributes:
        call: the call.
        active: what acts in it.
        outer: what was in its place before.
    """

    call: weakref.ref[Call]
    active: ActiveAdapters
    outer: Scope | _Pin | None


_HERE: ContextVar[Mapping[ActiveState, Scope | _Pin]] = ContextVar("nbpeft_active", default={})  # noqa: B039
"""For this thread or asyncio task: state -> its innermost scope, or what a running call has pinned."""


class ActiveState:
    """The shared value and the gate around it.

    Attributes:
        live: what acts in the next call, outside of scopes.
        traced: the same for compiled code, whose guards cannot tell threads apart: what the scope that was
            opened last says, or ``live``.
        gate: of a training in the background, while one runs: when the model may be called, and by whom.
        layer_commands: what layers ask for; see ``nbpeft.engine.runtime.layer_commands``.
        apart: layers that have a ``LayerState`` of their own.
    """

    def __init__(self) -> None:
        self.live = self.traced = NO_ADAPTERS
        self._start()

    def _start(self) -> None:
        self._condition = threading.Condition()
        self._calls: weakref.WeakSet[Call] = weakref.WeakSet()
        self._scopes: list[Scope] = []
        self._waiting = 0
        self._writer: int | None = None
        self._depth = 0
        self.gate: StepGate | None = None
        self.layer_commands: Any = None
        self.apart: weakref.WeakSet[Any] = weakref.WeakSet()
        self._prepared: deque[tuple[int, int, int, ActiveAdapters]] = deque(maxlen=_MOST_PREPARED)

    def gather(self) -> None:
        """Lets layers on which something else was active act with the others again; see ``LayerState``."""
        for layer in tuple(self.apart):
            layer.__dict__["active_state"] = self
        self.apart.clear()

    def hold(self, *inside: str) -> AbstractContextManager[None]:
        """Context manager for calls of the model: while a training runs in the background, between its steps.

        Args:
            inside: modules that enter it for somebody else.
        """
        gate = self.gate  # the training may end, and take it away, at any moment
        return nullcontext() if gate is None else gate.hold(*inside)

    def refuse_changes(self) -> None:
        """Refuses a change of the adapters while a training in the background has them.

        Raises:
            BusyError: one does.
        """
        gate = self.gate
        if gate is not None:
            gate.refuse()

    def current(self) -> ActiveAdapters:
        """What acts for the calling thread or task."""
        if torch.compiler.is_compiling():
            return self.traced
        here = self._here()
        if here is not None:
            return here.active
        if self._prepared and (found := self._recomputed()) is not None:
            return found
        # Autograd has threads of its own on accelerators: what checkpointing computes again there belongs
        # to the thread that called backward(), and so to its scope.
        if self._scopes and torch._C._current_graph_task_id() != -1:
            return self.traced
        return self.live

    def remember(self, first: int, active: ActiveAdapters) -> None:
        """Keeps what was prepared for a call that ends now, for checkpointing, which computes its layers again.

        Args:
            first: autograd's next sequence number when the call began.
            active: what acted in it.
        """
        self._prepared.append((first, torch._C._autograd._get_sequence_nr(), threading.get_ident(), active))

    def _recomputed(self) -> ActiveAdapters | None:
        """What acted in the call whose layers autograd computes again: it recorded the node that runs now."""
        node = None if torch._C._current_graph_task_id() == -1 else torch._C._current_autograd_node()
        if node is None:
            return None
        number, me = node._sequence_nr(), threading.get_ident()
        fitting = [(thread, active) for first, end, thread, active in list(self._prepared) if first <= number < end]
        # Every thread counts for itself. On accelerators autograd computes in threads of its own.
        own = [active for thread, active in fitting if thread == me] or [active for _, active in fitting]
        return own[-1] if own else None

    def _here(self) -> Scope | _Pin | None:
        here = _HERE.get().get(self)
        while here is not None and (here.closed if type(here) is Scope else here.call() is None):  # type: ignore[union-attr]
            here = here.outer
        return here

    def _tidy(self) -> None:
        """Forgets calls of which an interruption has kept the end; the caller holds the condition."""
        for ended in [call for call in self._calls if not call.runs()]:
            self._calls.discard(ended)
        here = self._here()
        while isinstance(here, _Pin) and (call := here.call()) is not None and call not in self._calls:
            here = here.outer
            _set_here(self, here)

    def publish(self, live: ActiveAdapters) -> None:
        """Sets what acts outside of scopes."""
        self.live = live
        self.trace()

    def trace(self) -> None:
        """Brings ``traced`` up to date after a scope has changed."""
        self.traced = self._scopes[-1].active if self._scopes else self.live

    # Scopes

    @property
    def scope(self) -> Scope | None:
        """The innermost scope of this thread or task."""
        here = self._here()
        while isinstance(here, _Pin) or (here is not None and here.closed):
            here = here.outer
        return here

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """All that are open, in any thread or task."""
        return tuple(self._scopes)

    def enter(self, scope: Scope) -> None:
        """Opens a scope here."""
        self._scopes.append(scope)
        _set_here(self, scope)
        self.trace()

    def leave(self, scope: Scope) -> None:
        """Ends a scope; what was around it acts here again. One inside of it that is still open goes on."""
        scope.closed = True
        if scope in self._scopes:
            self._scopes.remove(scope)
        _set_here(self, self._here())
        self.trace()

    # Calls

    def call(self, active: ActiveAdapters | Callable[[], ActiveAdapters | None] | None = None) -> Call:
        """One call of the model, to be used as a context: pins what acts, for this thread, until it ends.

        Args:
            active: act with this instead of the live value (a mixed batch); a function is asked once no command can
                change the adapters any more, and may give None, too.
        """
        return Call(self, active)

    def _begin(self, call: Call) -> None:
        with self._condition:
            if self._inside(call.thread):
                self._tidy()
            if self._writer != call.thread and not self._inside(call.thread):
                wait_for(self._condition, until=lambda: self._waiting == 0 and self._writer is None)
            if not self._calls:
                # A mixed batch whose end an interruption has prevented may have left its assignment there.
                self.trace()
            self._calls.add(call)

    def _end(self, call: Call) -> None:
        with self._condition:
            self._calls.discard(call)
            if self._waiting:
                self._condition.notify_all()

    def _is_free(self) -> bool:
        self._tidy()
        return not self._calls and self._writer is None

    def _inside(self, thread: int) -> bool:
        """Whether a thread is inside a call."""
        return any(call.thread == thread for call in self._calls)

    # The gate

    def close(self, *, wait: bool = True) -> None:
        """Waits until no call runs and holds those of other threads back until ``open``; may be nested.

        To be called, with ``open``, while interruptions are held back.

        Args:
            wait: False to raise instead of waiting.

        Raises:
            BusyError: this thread is inside a call of the model itself, or another is and ``wait`` is False.
        """
        me = threading.get_ident()
        with self._condition:
            self._tidy()
            if self._inside(me):
                raise BusyError("adapters cannot be changed from inside a call of the model")
            if self._writer != me:
                if not wait and (self._calls or self._writer is not None):
                    raise BusyError("adapters cannot be changed while the model runs; try again when it has finished")
                self._waiting += 1
                try:
                    wait_for(self._condition, until=self._is_free)
                finally:
                    self._waiting -= 1
                    self._condition.notify_all()
                self._writer = me
            self._depth += 1

    def open(self) -> None:
        """Ends what ``close`` began."""
        with self._condition:
            self._depth -= 1
            if self._depth == 0:
                self._writer = None
                self._condition.notify_all()

    def __getstate__(self) -> dict[str, Any]:
        return {"live": self.live}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.live = self.traced = state["live"]
        self._start()


class LayerState:
    """What acts on one layer where it was told so by itself, as PEFT's layers can be; a command on the model ends it.

    Args:
        shared: of the model.
        names: adapters active on the layer.
        enabled: whether they act.
        active: what acts, with its scales; the adapters at their trained strength if None.
        is_back: for a layer that was taken out of the model: whether it hangs in its old place again. Scopes then
            hold for it at once, before a command finds it there.
    """

    def __init__(
        self,
        shared: ActiveState,
        names: Sequence[str],
        *,
        enabled: bool,
        active: ActiveAdapters | None = None,
        is_back: Callable[[], bool] | None = None,
    ) -> None:
        self.shared, self.names, self.enabled = shared, tuple(names), enabled
        alone = ActiveAdapters(self.names, (1.0,) * len(self.names)) if enabled and names else NO_ADAPTERS
        self._own = alone if active is None else active
        self._is_back = is_back

    def current(self) -> ActiveAdapters:
        """What acts on the layer."""
        in_scope = self._is_back is not None and self._is_back() and self.shared.scope is not None
        return self.shared.current() if in_scope else self._own

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_is_back": None}  # a copy is in no old place


class ReplicaState:
    """What a replica of nn.DataParallel reads, which runs in a thread of torch's: what acted where it was made."""

    def __init__(self, active_state: ActiveState | LayerState) -> None:
        self._active = active_state.current()

    def current(self) -> ActiveAdapters:
        """What acts in the replica."""
        return self._active


class Call:
    """A running call of a model: a context that pins what acts for its thread.

    It counts as running while it exists and its block is on the stack of its thread.
    """

    def __init__(
        self, active_state: ActiveState, active: ActiveAdapters | Callable[[], ActiveAdapters | None] | None
    ) -> None:
        self._state = active_state
        self._asked = active
        self._active: ActiveAdapters | None = None
        self._outer: Scope | _Pin | None = None
        self._block: RunningBlock | None = None
        self._pinned = False
        self._begun: tuple[int, ActiveAdapters] | None = None
        self.thread = threading.get_ident()

    def runs(self) -> bool:
        """Whether its block still runs."""
        return self._block is not None and self._block.runs()

    def __enter__(self) -> Self:
        self._block = RunningBlock(__name__, _ENTERED_BY)
        try:
            with HeldInterrupts():
                self._state._begin(self)
                self._outer = self._state._here()
                self._active = active = self._asked() if callable(self._asked) else self._asked
                chosen = self._state.current() if active is None else active
                _set_here(self._state, _Pin(weakref.ref(self), chosen, self._outer))
                self._begun = (torch._C._autograd._get_sequence_nr(), chosen) if chosen.context else None
                self._pinned = True
                if self._active is not None:
                    self._state.traced = chosen
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with HeldInterrupts():
            pinned, self._pinned = self._pinned, False
            if pinned:
                if self._begun is not None and torch.is_grad_enabled():
                    self._state.remember(*self._begun)
                _set_here(self._state, self._outer)
                self._state.trace()
                outer = self._state._here()
                if isinstance(outer, _Pin) and (call := outer.call()) is not None and call._active is not None:
                    self._state.traced = outer.active  # what this call was made in goes on, its backward too
            self._state._end(self)
            self._block = None  # which keeps a frame and its variables


def _set_here(active_state: ActiveState, value: Scope | _Pin | None) -> None:
    here = {key: held for key, held in _HERE.get().items() if key is not active_state}
    if value is not None:
        here[active_state] = value
    _HERE.set(here)
