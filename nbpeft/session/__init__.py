"""Sessions: the shared state that magics, panels and scripts act through.

    session()   the session of this process, made on first use
    Session     commands in, frozen ``SessionState`` out

Importing this imports neither torch nor transformers; the first command does. The module can be
called like its function ``session``, because both are ``nbpeft.session``.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

from nbpeft.session.core import Session
from nbpeft.session.results import (
    AddResult,
    CombineResult,
    CommandResult,
    CompareResult,
    ExportResult,
    InspectResult,
    LoadResult,
    MemoryReport,
    Preview,
    PreviewRow,
    Result,
    SavedAdapter,
    SaveResult,
    StatusReport,
    SwapResult,
    UnloadResult,
)

if TYPE_CHECKING:
    # For the annotations of those who meet runs only through a session.
    from nbpeft.training import Run as Run
    from nbpeft.training import RunControl as RunControl

__all__ = [
    "AddResult",
    "CombineResult",
    "CommandResult",
    "CompareResult",
    "ExportResult",
    "InspectResult",
    "LoadResult",
    "MemoryReport",
    "Preview",
    "PreviewRow",
    "Result",
    "SaveResult",
    "SavedAdapter",
    "Session",
    "StatusReport",
    "SwapResult",
    "UnloadResult",
    "close_session",
    "session",
    "track",
]

_session: Session | None = None


def session() -> Session:
    """The session of this process, made on first use."""
    global _session
    if _session is None:
        _session = Session()
    return _session


def track(model: Any = None, total_steps: int | None = None, **options: Any) -> Run:
    """A run for a training loop of one's own, through the session; see ``Session.track``."""
    return session().track(model, total_steps, **options)


def close_session() -> None:
    """Ends the session of this process; adapters stay in their models, the next call makes a new one."""
    global _session
    if _session is not None:
        _session.close()
    _session = None


class _CallableModule(types.ModuleType):
    """Lets ``nbpeft.session()`` work although importing this package makes ``nbpeft.session`` a module."""

    def __call__(self) -> Session:
        return session()


sys.modules[__name__].__class__ = _CallableModule
