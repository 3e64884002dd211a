"""Changes to a model that either succeed as a whole or are undone: record the old state, then write.

    with manager.transaction() as change:
        change.keep(layer.adapters._modules)        # before the first write
        layer.adapters["sql"] = adapter

Inside the block no call of the model runs and interruptions (Ctrl+C) are delayed. Any exception restores
everything that was recorded. Blocks nest: an inner block is part of the outer one, and if the caller
catches an error of the inner block, only the inner changes are undone. Subscribers are notified once,
when the outermost block has succeeded.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import DeferredInterrupts, check_interrupt
from nbpeft.engine.changes.active_state import ActiveState
from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.changes.spill_file import SpillFile
from nbpeft.errors import BusyError, NbpeftError

_EXCHANGED_AT_ONCE = 16
"""Tensors of one shape that are exchanged together; the copies of their values should fit the processor's cache."""
CHANGED_MEANWHILE = "another thread has changed the adapters in the meantime: try again"


class Transaction:
    """The changes of a command and how to undo them. Each manager has one; only one thread at a time can use it.

    Args:
        active_state: state of the model; blocks its calls during changes.
        done: called after the outermost block, if it succeeded and is not quiet.

    Attributes:
        revision: increases with every change, before another thread can make the next one.
        spill: stores backups of large tensors until the outermost block ends.
    """

    def __init__(self, active_state: ActiveState, done: Callable[[], None]) -> None:
        self.active_state = active_state
        self._done = done
        self.revision = 0
        self._changed_by: int | None = None
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._marks: list[int] = []
        self._has_changes = False
        self._undo: list[Callable[[], None]] = []
        self.spill = SpillFile()

    def block(self, *, during_calls: bool = False, quiet: bool = False) -> Block:
        """A block of changes; a context manager that returns this transaction.

        Args:
            during_calls: do not wait for running calls of the model: the change takes effect with the next call.
            quiet: do not raise ``revision``, and do not call ``done``.

        Returns:
            The context manager.
        """
        return Block(self, during_calls, quiet)

    def begin(self) -> None:
        """Waits until this thread has the transaction, and records where the new block's changes begin."""
        me = threading.get_ident()
        if self._owner != me:
            # Ctrl-C is deferred here, so it would not end a wait without a timeout.
            while not self._lock.acquire(timeout=0.05):
                check_interrupt()
            self._owner = me
        self._marks.append(len(self._undo))

    def end(self, *, failed: bool, quiet: bool) -> bool:
        """Ends the innermost block, and undoes its changes if it failed.

        Args:
            failed: whether it failed.
            quiet: see ``block``.

        Returns:
            Whether it was the outermost block and succeeded.
        """
        mark = self._marks.pop()
        self._has_changes = self._has_changes or not (failed or quiet)
        try:
            if failed:
                self._undo_to(mark)
        finally:
            outermost = not self._marks
            if outermost:
                if self._has_changes:
                    self.revision, self._changed_by = self.revision + 1, self._owner
                self._has_changes = False
                self._undo.clear()
                self.spill.close()
                self.spill = SpillFile()
                self._owner = None
                self._lock.release()
        return outermost and not failed

    def reading(self) -> Block:
        """A block in which no other thread changes the adapters; calls of the model may run."""
        return self.block(during_calls=True, quiet=True)

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Context manager for long reads of the adapters without a block, which would make other threads wait.

        Raises:
            BusyError: the code inside failed, and another thread has changed the adapters, which may be the cause.
        """
        revision = self.revision
        try:
            yield
        except NbpeftError:
            raise
        except Exception as error:
            if self.revision == revision or self._changed_by == threading.get_ident():
                raise
            raise BusyError(CHANGED_MEANWHILE) from error

    def report(self) -> None:
        """Raises ``revision`` for a change that was made outside of a block, and calls ``done``."""
        with self.reading():
            self._has_changes = True
        self._done()

    def notify(self) -> None:
        """Calls ``done``."""
        self._done()

    @property
    def is_open(self) -> bool:
        """Whether any thread is inside a block."""
        return self._owner is not None

    @property
    def is_mine(self) -> bool:
        """Whether this thread is inside a block."""
        return self._owner == threading.get_ident()

    @torch.no_grad()
    def _undo_to(self, mark: int) -> None:
        """Undoes changes in reverse order; if one fails, the others are undone before its error is raised."""
        failures = []
        while len(self._undo) > mark:
            try:
                self._undo.pop()()
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]

    def on_undo(self, undo: Callable[[], None]) -> None:
        """Records a function that undoes a write; call it before that write."""
        self._undo.append(undo)

    def keep(self, *mappings: MutableMapping[Any, Any]) -> None:
        """Records the entries of mappings and their order."""
        snapshots = [(mapping, dict(mapping)) for mapping in mappings]

        def undo() -> None:
            for mapping, items in snapshots:
                mapping.clear()
                mapping.update(items)

        self._undo.append(undo)

    def keep_attributes(self, thing: object, *names: str) -> None:
        """Records attributes of an object, and the contents of those that are sets or dictionaries.

        Args:
            thing: the object.
            *names: keys of its ``__dict__``; one that is absent now is removed when the change is undone.
        """
        own = thing.__dict__
        present = {name: own[name] for name in names if name in own}
        items = {name: type(value)(value) for name, value in present.items() if type(value) in (dict, set)}

        def undo() -> None:
            for name in names:
                if name not in present:
                    own.pop(name, None)
                    continue
                own[name] = present[name]
                if name in items:
                    present[name].clear()
                    present[name].update(items[name])

        self._undo.append(undo)

    def set_item(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Replaces the value of an existing entry, which keeps its position in the order.

        Args:
            mapping: a mapping with the entry.
            key: key of the entry.
            value: the new value.
        """
        present = mapping[key]
        self._undo.append(lambda: mapping.__setitem__(key, present))
        mapping[key] = value

    def set_requires_grad(self, parameters: Iterable[Tensor], requires_grad: bool) -> None:
        """Sets ``requires_grad`` of tensors.

        Args:
            parameters: the tensors.
            requires_grad: the new value.
        """
        others = [parameter for parameter in parameters if parameter.requires_grad is not requires_grad]
        if others:
            self._undo.append(lambda: _set_requires_grad(others, not requires_grad))
            _set_requires_grad(others, requires_grad)

    def keep_modes(self, model: nn.Module) -> None:
        """Records which modules of a model are in training mode."""
        modes = [(module, module.training) for module in called_modules(model)]

        def undo() -> None:
            for module, training in modes:
                module.training = training

        self._undo.append(undo)

    def keep_values(self, tensors: Sequence[Tensor]) -> None:
        """Records the values of tensors, in one flat copy for each dtype and device."""
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(
                tensor.detach() if tensor.requires_grad else tensor
            )
        for group in groups.values():
            self._undo.append(
                functools.partial(_write_back, group, torch.cat([tensor.reshape(-1) for tensor in group]))
            )

    @torch.no_grad()
    def exchange(self, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Exchanges the values of tensors, so that recording the old ones takes no memory.

        Args:
            tensors: tensors of the model.
            others: as many of the same shapes, dtypes and devices. No two of all these tensors may share memory.
        """
        alike: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
        for pair in zip(tensors, others, strict=True):
            alike.setdefault((pair[0].shape, pair[0].dtype, pair[0].device), []).append(pair)
        for pairs in alike.values():
            copies = [torch.empty_like(tensor) for tensor, _ in pairs[:_EXCHANGED_AT_ONCE]]
            for start in range(0, len(pairs), _EXCHANGED_AT_ONCE):
                block, new = map(list, zip(*pairs[start : start + _EXCHANGED_AT_ONCE], strict=True))
                old = copies[: len(block)]
                torch._foreach_copy_(old, block)
                # An error may come before the others have all old values; until then the copies restore them.
                self._undo.append(functools.partial(_copy_all_, block, old))
                torch._foreach_copy_(block, new)
                torch._foreach_copy_(new, old)
                self._undo[-1] = functools.partial(_copy_all_, block, new)

    def keep_data(self, parameters: Iterable[nn.Parameter]) -> None:
        """Records ``data`` and ``grad`` of parameters, without a copy; for writes that replace both."""
        snapshots = [(parameter, parameter.data, parameter.grad) for parameter in parameters]

        def undo() -> None:
            for parameter, data, gradient in snapshots:
                parameter.data = data
                parameter.grad = gradient

        self._undo.append(undo)


class Block:
    """One block of a transaction; see ``Transaction.block``."""

    def __init__(self, transaction: Transaction, during_calls: bool, quiet: bool) -> None:
        self._transaction = transaction
        self._quiet = quiet
        self._gate = None if during_calls else transaction.active_state
        self._held = DeferredInterrupts()

    def __enter__(self) -> Transaction:
        gate = self._transaction.active_state.gate
        # During a background training only blocks that change nothing for other threads may run (quiet, during calls).
        if gate is not None and not (self._quiet and self._gate is None):
            gate.refuse()
        self._held.__enter__()
        closed = False
        try:
            if self._gate is not None:
                # A thread that has the transaction must not wait for calls: one of them may wait for the transaction.
                self._gate.close(wait=not self._transaction.is_mine)
                closed = True
            self._transaction.begin()
        except BaseException as error:
            if closed and self._gate is not None:
                self._gate.open()
            self._held.__exit__(type(error), error, error.__traceback__)
            raise
        return self._transaction

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                succeeded = self._end(failed=kind is not None)
            finally:
                if self._gate is not None:
                    self._gate.open()
            if succeeded and not self._quiet:
                self._transaction.notify()
        finally:
            self._held.__exit__(kind, error, trace)

    def _end(self, *, failed: bool) -> bool:
        """Ends the block; a delayed interruption undoes it, since the caller will not get its result."""
        try:
            if not failed:
                check_interrupt()
        except BaseException:
            self._transaction.end(failed=True, quiet=self._quiet)
            raise
        return self._transaction.end(failed=failed, quiet=self._quiet)


def _copy_all_(tensors: list[Tensor], values: list[Tensor]) -> None:
    torch._foreach_copy_(tensors, values)


def _write_back(tensors: list[Tensor], flat: Tensor) -> None:
    """Copies the parts of a flat tensor back into the tensors that it was made from."""
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])


def _set_requires_grad(tensors: Iterable[Tensor], requires_grad: bool) -> None:
    for tensor in tensors:
        tensor.requires_grad = requires_grad
