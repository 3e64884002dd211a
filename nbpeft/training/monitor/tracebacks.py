"""Releases tensors that a stored traceback would keep alive.

An exception keeps the frames it went through, and a frame keeps its local variables: after an
error the activations of the failed step stay on the device until the next error replaces it.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from types import FrameType, TracebackType

import torch


def release_frames(error: BaseException, *, everything: bool = False) -> None:
    """Clears the local variables of the frames in the traceback of ``error``.

    Frames that are still running, such as that of the cell itself, are not cleared.

    Args:
        error: the exception; its causes and contexts are cleared too.
        everything: whether to clear frames without tensors too, which a debugger can otherwise still inspect.
    """
    seen: set[int] = set()
    for link in _chain(error):
        step: TracebackType | None = link.__traceback__
        while step is not None:
            frame = step.tb_frame
            if id(frame) not in seen and (everything or _holds_tensor(frame)):
                seen.add(id(frame))
                with contextlib.suppress(RuntimeError):  # the frame is still executing
                    frame.clear()
            step = step.tb_next


def _chain(error: BaseException) -> Iterator[BaseException]:
    pending, seen = [error], set[int]()
    while pending:
        link = pending.pop()
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        pending += [other for other in (link.__cause__, link.__context__) if other is not None]


def _holds_tensor(frame: FrameType) -> bool:
    # Reading frame.f_locals would create a dictionary of the variables, which outlives frame.clear().
    return any(_is_heavy(value, depth=2) for value in gc.get_referents(frame))


def _is_heavy(value: object, depth: int) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if depth and isinstance(value, Mapping):
        return any(_is_heavy(item, depth - 1) for item in list(value.values())[:64])
    if depth and isinstance(value, (list, tuple)):
        return any(_is_heavy(item, depth - 1) for item in value[:64])
    return False
