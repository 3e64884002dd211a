"""Sessions: the shared state behind magics, panels and scripts.

    get_session()   returns the session of this process, created on first use
    Session         the commands; publishes frozen ``SessionState`` objects

Importing this package imports neither torch nor transformers; the first command does.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbpeft.session.core import Session
from nbpeft.session.results import (
    AddResult,
    CommandResult,
    ExportResult,
    LoadResult,
    MemoryReport,
    PushResult,
    Result,
    SavedAdapter,
    SaveResult,
    ShipResult,
    StatusReport,
    UnloadResult,
)
from nbpeft.session.results.combining import CombineResult, SwapResult
from nbpeft.session.results.comparing import CompareResult
from nbpeft.session.results.data import DataResult
from nbpeft.session.results.inspecting import InspectResult
from nbpeft.session.results.preview import Preview, PreviewRow

if TYPE_CHECKING:
    # For annotations of modules that may import runs only from the session.
    from nbpeft.training import Run as Run
    from nbpeft.training import RunControl as RunControl

__all__ = [
    "AddResult",
    "CombineResult",
    "CommandResult",
    "CompareResult",
    "DataResult",
    "ExportResult",
    "InspectResult",
    "LoadResult",
    "MemoryReport",
    "Preview",
    "PreviewRow",
    "PushResult",
    "Result",
    "SaveResult",
    "SavedAdapter",
    "Session",
    "ShipResult",
    "StatusReport",
    "SwapResult",
    "UnloadResult",
    "close_session",
    "get_session",
    "runs_folder",
    "session",
    "track",
]

_session: Session | None = None


def get_session() -> Session:
    """Return the session of this process, created on first use; magics, panels and scripts share it."""
    global _session
    if _session is None:
        _session = Session()
    return _session


session = get_session
"""Former name of ``get_session``."""


def track(model: Any = None, total_steps: int | None = None, **options: Any) -> Run:
    """Create a run for a custom training loop, through the session; see ``Session.track``."""
    return get_session().track(model, total_steps, **options)


def runs_folder(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder of the runs, or use another one from now on; see ``Session.runs_folder``."""
    return get_session().runs_folder(folder)


def close_session() -> None:
    """End the session of this process. Adapters stay on their models, and the next call creates a new session."""
    global _session
    if _session is not None:
        _session.close()
    _session = None


class _CallableModule(types.ModuleType):
    """Supports the former spelling ``nbpeft.session()``, because the import system binds that name to this package."""

    def __call__(self) -> Session:
        return get_session()


sys.modules[__name__].__class__ = _CallableModule
