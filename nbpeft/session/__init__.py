"""Sessions: the shared state behind magics, panels and scripts.

    get_session()   returns the session of this process, created on first use
    Session         the commands; publishes frozen ``SessionState`` objects

Importing this package imports neither torch nor transformers; the first command does.

Files:

    background.py     Training in the background: the cell returns, and the training continues in its own thread
    checks.py         Checks of command arguments; each error message is one line
    configs.py        Building configs from the fields that a user writes, and comparing the meaning of configs
    context.py        The common context of a session's commands: the models, the lock, and publishing the state
    core.py           Session: the shared state of a notebook or a script. It has the commands, and publishes
                      ``SessionState`` objects
    description.py    The state of a session as JSON of limited size, for programs that drive a notebook
    doctor.py         Diagnosis of the installation: versions, problems and what to install. Imports no large packages
    fields.py         The fields that a cell may set, with values and help: those of a config, of quantization and of
                      training
    first_weights.py  The initial weights of adapters, for ``reset`` and for trainings that restart from them
    handles.py        The PeftModels of adapted models: which one is live, and creating a new one if the last was
                      deleted
    history.py        Adapters that commands deleted or replaced, stored in host memory so that ``undo`` can restore
                      them
    init_rows.py      Rows for data-dependent inits of adapters
    lock.py           The lock that allows one command at a time
    past_models.py    Restoring the unsaved adapters of a model that no longer exists, or that no variable refers to
    preview.py        Planning a config on a model, and counting what ``add`` would do
    prompts.py        Tokenizing prompts with the session's tokenizer, in the form of the rows that the adapters were
                      trained on
    registry.py       The models that a session knows, by the name of their notebook variable, referenced weakly
    sampling.py       How the next token is chosen: the most likely one, or sampled with separate random numbers
    snapshot.py       Builds the frozen ``ModelState`` of an adapted model, which panels display
    sweeps.py         Sweeps in a session: adapters that a cell adds for several values, and which of them the next
                      training trains
    trained.py        Description of a model's last training, for the model card of its adapters
    undoable.py       Recording an adapter before a command deletes or replaces it, so that ``undo`` can restore it
    variables.py      The variables of a notebook: which variable refers to which model, and what happens when a
                      variable changes
"""

from __future__ import annotations

import os
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
    "start_run",
]

_session: Session | None = None


def get_session() -> Session:
    """Return the session of this process, created on first use; magics, panels and scripts share it."""
    global _session
    if _session is None:
        _session = Session()
    return _session


def start_run(model: Any = None, total_steps: int | None = None, **options: Any) -> Run:
    """Create a run for a custom training loop, through the session; see ``Session.start_run``."""
    return get_session().start_run(model, total_steps, **options)


def runs_folder(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder of the runs, or use another one from now on; see ``Session.runs_folder``."""
    return get_session().runs_folder(folder)


def close_session() -> None:
    """End the session of this process. Adapters stay on their models, and the next call creates a new session."""
    global _session
    if _session is not None:
        _session.close()
    _session = None
