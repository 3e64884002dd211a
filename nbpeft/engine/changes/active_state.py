"""Which adapters are active: one object that every adapted layer of a model reads.

Switching adapters replaces one immutable value, whatever the number of modules and adapters. A call
of the model pins the value for its own thread, so that a switch by another thread (a click during
``generate``) takes effect with the next call and never inside one. A scope (``use``,
``disable_adapter``) has a separate value for the thread or asyncio task that opened it. Commands
that change tensors or modules wait until no call is running (``close``).
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

from nbpeft._util.interrupts import DeferredInterrupts, RunningBlock, wait_for
from nbpeft.engine.changes.step_gate import StepGate
from nbpeft.errors import AdapterError, BusyError

_MOST_PREPARED = 256
"""Number of recent training calls whose prepared contexts are stored for activation checkpointing in backward."""
_ENTERED_BY = "nbpeft.model.handle.serving"
"""The module whose context managers enter a call for their caller, so that its frames are not those of the block."""


@dataclass
class CallShape:
    """The shape of a call of the model with a mixed batch, so that layers can tell rows from positions.

    Attributes:
        batch: number of rows, those for beams included; None if the call's inputs do not show it.
        lengths: the numbers of positions that a row may have.
        first: the second sizes of the inputs, among them the length of a row.
    """

    batch: int | None = None
    lengths: set[int] = field(default_factory=set)
    first: set[int] = field(default_factory=set)

    def note(self, shapes: Sequence[tuple[int, ...]], rows: int) -> None:
        """Records the shapes of a call's input tensors.

        Args:
            shapes: without the features, so usually (batch, positions); the main input first.
            rows: length of ``adapter_names``, of which the batch is a multiple.
        """
        having = [shape for shape in shapes if shape and shape[0] and shape[0] % rows == 0]
        self.batch = having[0][0] if having else None
        self.lengths, self.first = set(), set()
        for shape in having:
            if shape[0] == self.batch and len(shape) > 1:
                self.first.add(shape[1])
                self.add_positions(shape)

    def add_positions(self, shape: tuple[int, ...]) -> None:
        """Adds the numbers of positions of a row that are adjacent when a tensor of this shape is flattened."""
        self.lengths.update(math.prod(shape[1:end]) for end in range(2, len(shape) + 1))

    def holds(self, count: int) -> bool:
        """Whether ``count`` rows can be those of the batch, or all positions of these rows."""
        assert self.batch is not None
        return count == self.batch or any(count == self.batch * length for length in self.lengths)

    def is_positions_first(self, shape: tuple[int, ...], values: Tensor) -> bool:
        """Whether a tensor is (positions, batch, …), as far as its shape and strides show it."""
        return shape[1] == self.batch and (shape[0] in self.first or values.stride(0) < values.stride(1))


def other_row_count(names: int, rows: int) -> AdapterError:
    """The error for a batch with other than one name for each row."""
    return AdapterError(f"adapter_names has {names} names for {rows} rows: give one name for each row")


@dataclass(frozen=True)
class RowAssignment:
    """Which adapter serves each row of a mixed batch.

    Attributes:
        names: distinct adapter names, without the base model.
        index: for each row the position in ``names``, or -1 for the base model.
        scales: factor on the delta of each adapter in ``names``.
        cache: values that layers prepare once for all calls with this assignment.
        call: the shape of the running call.
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
        """``index`` for a batch in which each row occurs several times, for its beams or tokens.

        Args:
            batch: size of the first dimension of a layer's input, a multiple of the rows.
            device: device of the result.

        Returns:
            int64, (batch,).

        Raises:
            AdapterError: ``batch`` is not a multiple of the rows.
        """
        key = (batch, device)
        found = self.cache.get(key)
        if found is None:
            repeats, rest = divmod(batch, len(self.index))
            if rest and not self.is_uniform:
                raise other_row_count(len(self.index), batch)
            index = torch.tensor(self.index, dtype=torch.long, device=device)
            index = index[:1].expand(batch) if self.is_uniform else index.repeat_interleave(repeats)
            found = self.cache[key] = index
        return found

    def broadcast(self, values: Tensor) -> Tensor:
        """Expands a tensor with a single row, such as position ids, to the batch; others are returned unchanged."""
        count = self.call.batch or len(self.index)
        return values.expand(count, *values.shape[1:]) if values.shape[0] == 1 < count else values

    def runs(self, batch: int) -> list[tuple[str, slice]]:
        """Groups neighbouring rows with the same adapter.

        Args:
            batch: number of rows in a layer's input, a multiple of the assigned rows.

        Returns:
            (adapter name, or the empty string for the base model; its rows), in order.
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
        """The indices of the rows that an adapter serves.

        Args:
            name: name of the adapter.
            batch: number of rows in a layer's input, a multiple of the assigned rows.
            device: device of the result.

        Returns:
            int64, one-dimensional.
        """
        key = (name, batch, device)
        found = self.cache.get(key)
        if found is None:
            found = (self.repeat_to(batch, device) == self.names.index(name)).nonzero().flatten()
            self.cache[key] = found
        return found


@dataclass(frozen=True)
class ActiveAdapters:
    """The active adapters of a forward pass; immutable.

    Attributes:
        names: names of the active adapters, in order.
        scales: factor on the delta of each.
        rows: the assignment of a mixed batch; if it is set, ``names`` is ignored.
        context: adapter name -> value that its method prepared for the running call; ``BaseLayer.context``.
    """

    names: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    rows: RowAssignment | None = None
    context: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def call_names(self) -> tuple[str, ...]:
        """Names of the active adapters, or of all adapters of a mixed batch."""
        return self.names if self.rows is None else self.rows.names

    @property
    def call_scales(self) -> tuple[float, ...]:
        """Factor on the delta of each adapter in ``call_names``."""
        return self.scales if self.rows is None else self.rows.scales


NO_ADAPTERS = ActiveAdapters()


@dataclass(eq=False)
class Scope:
    """The adapters that are selected for one thread or asyncio task inside a block, and for tasks started in it.

    Attributes:
        names: selected adapters.
        enabled: whether they are active.
        chooses: whether a selection made inside is local to the block; otherwise it is also made outside, as in PEFT.
        apart: whether its adapters are trained independently: only the first one is active unless a call names others.
        outer: the enclosing scope.
        active: the selection in the form that layers read.
        closed: whether its block has ended; a task that outlives the block uses the enclosing scope.
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
        """Names of the active adapters."""
        return (self.names[:1] if self.apart else self.names) if self.enabled else ()


@dataclass(frozen=True, eq=False)
class _Pin:
    """The value that a running call has pinned.

    An interruption between two instructions can skip the ``__exit__`` of a call. The pin therefore has only a
    weak reference to its call, and ``_tidy`` checks whether the call's block is still running.

    Attributes:
        call: the call.
        active: the adapters that are active in it.
        outer: the scope or pin that it replaced.
    """

    call: weakref.ref[Call]
    active: ActiveAdapters
    outer: Scope | _Pin | None


_HERE: ContextVar[Mapping[ActiveState, Scope | _Pin]] = ContextVar("nbpeft_active", default={})  # noqa: B039
"""For this thread or asyncio task: state -> its innermost scope, or the pin of a running call.

A ``ContextVar`` and not a thread-local, because tasks of one asyncio thread need separate values.
"""


class ActiveState:
    """The value that all layers of a model read, and the lock between its calls and changes.

    Attributes:
        live: the active adapters of the next call outside of scopes.
        traced: the active adapters for compiled code. Guards of ``torch.compile`` cannot depend on the thread, so this
            is the value of the scope that was opened last, or else ``live``.
        gate: gate of a background training while one runs; decides when other threads may call the model.
        layer_commands: executes commands given to single layers; see ``nbpeft.engine.runtime.layer_commands``.
        apart: layers with a separate ``LayerState``.
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
        """Removes the separate states of layers, so that all layers read this object again; see ``LayerState``."""
        for layer in tuple(self.apart):
            layer.__dict__["active_state"] = self
        self.apart.clear()

    def hold(self, *inside: str) -> AbstractContextManager[None]:
        """Context manager for calls of the model; during a background training it waits for the end of a step.

        Args:
            *inside: names of modules that enter it for their caller; see ``StepGate.hold``.
        """
        gate = self.gate  # read once: the training may end and remove it at any time
        return nullcontext() if gate is None else gate.hold(*inside)

    def refuse_changes(self) -> None:
        """Refuses changes of the adapters during a background training.

        Raises:
            BusyError: a training runs in another thread.
        """
        gate = self.gate
        if gate is not None:
            gate.refuse()

    def current(self) -> ActiveAdapters:
        """The active adapters for the calling thread or task."""
        if torch.compiler.is_compiling():
            return self.traced
        here = self._here()
        if here is not None:
            return here.active
        if self._prepared and (found := self._recomputed()) is not None:
            return found
        # On accelerators autograd runs backward in its own threads, which have no context variables of the caller.
        # What activation checkpointing computes again there belongs to the thread that called backward(), and so to
        # the scope that is open there.
        if self._scopes and torch._C._current_graph_task_id() != -1:
            return self.traced
        return self.live

    def remember(self, first: int, active: ActiveAdapters) -> None:
        """Stores the prepared context of a call that ends now, for checkpointing, which runs its layers in backward.

        Args:
            first: autograd's next sequence number when the call began.
            active: the active adapters of the call.
        """
        self._prepared.append((first, torch._C._autograd._get_sequence_nr(), threading.get_ident(), active))

    def _recomputed(self) -> ActiveAdapters | None:
        """The active adapters of the call whose layers autograd is running again; None outside of backward.

        The call is the one during which the node that runs now was recorded, found by its sequence number.
        """
        node = None if torch._C._current_graph_task_id() == -1 else torch._C._current_autograd_node()
        if node is None:
            return None
        number, me = node._sequence_nr(), threading.get_ident()
        fitting = [(thread, active) for first, end, thread, active in list(self._prepared) if first <= number < end]
        # Sequence numbers are counted for each thread, so prefer calls of this one. On accelerators backward runs in
        # autograd's own threads, where calls of any thread are considered.
        own = [active for thread, active in fitting if thread == me] or [active for _, active in fitting]
        return own[-1] if own else None

    def _here(self) -> Scope | _Pin | None:
        here = _HERE.get().get(self)
        while here is not None and (here.closed if type(here) is Scope else here.call() is None):  # type: ignore[union-attr]
            here = here.outer
        return here

    def _tidy(self) -> None:
        """Removes calls whose ``__exit__`` was skipped by an interruption; the caller must hold the condition."""
        for ended in [call for call in self._calls if not call.runs()]:
            self._calls.discard(ended)
        here = self._here()
        while isinstance(here, _Pin) and (call := here.call()) is not None and call not in self._calls:
            here = here.outer
            _set_here(self, here)

    def publish(self, live: ActiveAdapters) -> None:
        """Sets the active adapters outside of scopes."""
        self.live = live
        self.trace()

    def trace(self) -> None:
        """Updates ``traced`` after a scope or ``live`` has changed."""
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
        """All open scopes, of any thread or task."""
        return tuple(self._scopes)

    def enter(self, scope: Scope) -> None:
        """Opens a scope for this thread or task."""
        self._scopes.append(scope)
        _set_here(self, scope)
        self.trace()

    def leave(self, scope: Scope) -> None:
        """Closes a scope and returns to the enclosing one; an inner scope that is still open stays in effect."""
        scope.closed = True
        if scope in self._scopes:
            self._scopes.remove(scope)
        _set_here(self, self._here())
        self.trace()

    # Calls

    def call(self, active: ActiveAdapters | Callable[[], ActiveAdapters | None] | None = None) -> Call:
        """A context manager for one call of the model, which pins the active adapters of this thread.

        Args:
            active: the active adapters of the call, for a mixed batch, or a function that returns them; it is called
                when no command can change the adapters any more. None, given or returned, for the current value.

        Returns:
            The context manager.
        """
        return Call(self, active)

    def _begin(self, call: Call) -> None:
        with self._condition:
            if self._inside(call.thread):
                self._tidy()
            # A call waits for commands that wait, too: else a model that is always called would never change.
            if self._writer != call.thread and not self._inside(call.thread):
                wait_for(self._condition, until=lambda: self._waiting == 0 and self._writer is None)
            if not self._calls:
                # If an interruption skipped `__exit__` of a mixed batch, its assignment may still be in `traced`.
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
        """Waits until no call is running, and makes calls of other threads wait until ``open``; may be nested.

        Call it, and ``open``, inside ``DeferredInterrupts``, so that an interruption cannot skip ``open``.

        Args:
            wait: False to raise instead of waiting.

        Raises:
            BusyError: this thread is inside a call of the model, or another thread is and ``wait`` is False.
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
        """Undoes one ``close``; after the outermost one other threads may call the model again."""
        with self._condition:
            self._depth -= 1
            if self._depth == 0:
                self._writer = None
                self._condition.notify_all()

    def __getstate__(self) -> dict[str, Any]:
        # The rest belongs to running threads, and locks cannot be copied.
        return {"live": self.live}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.live = self.traced = state["live"]
        self._start()


class LayerState:
    """The active adapters of a single layer, after a command on that layer, which PEFT allows.

    The next command on the model replaces it with the model's state again.

    Args:
        shared: the state of the model.
        names: adapters selected on the layer.
        enabled: whether they are active.
        active: the active adapters with their scales; None for those in ``names`` with scale 1.
        is_back: for a layer that was taken out of the model: returns whether it is in its old place again. Scopes then
            apply to it at once, before a command finds it there.
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
        """The active adapters of the layer."""
        in_scope = self._is_back is not None and self._is_back() and self.shared.scope is not None
        return self.shared.current() if in_scope else self._own

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_is_back": None}  # a copy was never in the model


class ReplicaState:
    """The state of an ``nn.DataParallel`` replica, which runs in a thread of torch.

    It has the value of the thread that created the replica, because context variables are not passed to that thread.
    """

    def __init__(self, active_state: ActiveState | LayerState) -> None:
        self._active = active_state.current()

    def current(self) -> ActiveAdapters:
        """The active adapters of the replica."""
        return self._active


class Call:
    """A running call of a model: a context manager that pins the active adapters of its thread.

    It counts as running as long as it exists and its block is on the stack of its thread, so that a skipped
    ``__exit__`` cannot block commands for ever.
    """

    def __init__(
        self, active_state: ActiveState, active: ActiveAdapters | Callable[[], ActiveAdapters | None] | None
    ) -> None:
        self._state = active_state
        self._requested = active
        self._active: ActiveAdapters | None = None
        self._outer: Scope | _Pin | None = None
        self._block: RunningBlock | None = None
        self._pinned = False
        self._begun: tuple[int, ActiveAdapters] | None = None
        self.thread = threading.get_ident()

    def runs(self) -> bool:
        """Whether its block is still running."""
        return self._block is not None and self._block.runs()

    def __enter__(self) -> Self:
        self._block = RunningBlock(__name__, _ENTERED_BY)
        try:
            with DeferredInterrupts():
                self._state._begin(self)
                self._outer = self._state._here()
                self._active = active = self._requested() if callable(self._requested) else self._requested
                chosen = self._state.current() if active is None else active
                _set_here(self._state, _Pin(weakref.ref(self), chosen, self._outer))
                self._begun = (torch._C._autograd._get_sequence_nr(), chosen) if chosen.context else None
                self._pinned = True
                if self._active is not None:
                    self._state.traced = chosen
        # Python calls __exit__ only if __enter__ returned.
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with DeferredInterrupts():
            pinned, self._pinned = self._pinned, False
            if pinned:
                if self._begun is not None and torch.is_grad_enabled():
                    self._state.remember(*self._begun)
                _set_here(self._state, self._outer)
                self._state.trace()
                outer = self._state._here()
                if isinstance(outer, _Pin) and (call := outer.call()) is not None and call._active is not None:
                    self._state.traced = outer.active  # the enclosing call continues, and its backward follows
            self._state._end(self)
            self._block = None  # it has a reference to a frame, and so to all its variables


def _set_here(active_state: ActiveState, value: Scope | _Pin | None) -> None:
    here = {key: other for key, other in _HERE.get().items() if key is not active_state}
    if value is not None:
        here[active_state] = value
    _HERE.set(here)
