"""Panels, measurements, and the check of the installation."""

from __future__ import annotations

import argparse
from contextlib import suppress
from dataclasses import replace

from nbpeft.errors import AdapterError, CellError, did_you_mean, few
from nbpeft.magics.front_end import front_end_checks
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ON_MODEL, subcommand
from nbpeft.session import MemoryReport
from nbpeft.session.results.base import TracebackResult
from nbpeft.session.results.kept_runs import RunCard
from nbpeft.state import ENDED

PANELS = ("adapters", "blend")
"""The panels of ``%lora panel``; the first one if none is named."""
_MOVED = {"compare": "compare --panel", "plan": "plan --panel", "training": "watch"}
"""Panel of another command -> that command."""


@subcommand(
    "panel",
    "Show a panel: the adapters, with buttons to switch, save and delete them; or blend, with a slider for each "
    "adapter's weight.",
    argument("kind", nargs="?", metavar="PANEL", words=PANELS, help=f"one of {', '.join(PANELS)}"),
    ON_MODEL,
    example="%lora panel blend",
)
def panel(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Show a panel; by default that of the adapters."""
    kind = options.kind or PANELS[0]
    if kind in _MOVED:
        raise CellError(f"%lora panel has no panel {kind!r}; it is called %lora {_MOVED[kind]} now")
    if kind not in PANELS:
        hint = (
            f" A model is named with --model {kind}" if kind in notebook.model_names() else did_you_mean(kind, PANELS)
        )
        raise CellError(f"%lora panel has no panel {kind!r}.{hint or f' It has: {few(PANELS, quoted=False)}'}")
    return show_panel(notebook, kind, options.model, f"%lora panel {kind} --model")


@subcommand(
    "watch",
    "Show the card of a training: live while it runs, else its final state, even after its kernel has ended. "
    "With --wait, wait for its end and return its result.",
    argument(
        "run", nargs="?", metavar="RUN", completes="run", help="the run (default: the running one, else the last)"
    ),
    argument("--wait", action="store_true", help="wait for its end; an interrupt stops only the waiting"),
    example="%lora watch sql-3",
)
def watch(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Show the card of a training, or its result in one line once it has ended."""
    session = notebook.session
    found = session.find_run(options.run)
    if not isinstance(found, RunCard):
        running, model_name = found
        if options.wait:
            return replace(session.result(model_name, wait=True), shown="")
        from nbpeft.widgets import show_run

        show_run(running, session, model_name, ui=notebook.ui)
        return None
    if options.wait and found.train.status not in ENDED:
        raise CellError(f"run {found.train.run_id} is trained by another process, which cannot be waited for here")
    if options.wait and found.record is None:
        with suppress(AdapterError):  # a training that failed has no result
            result = session.result(found.model_name)
            if result.state.run_id == found.train.run_id:
                return replace(result, shown="")  # whose card may be all that was shown of it
    return found


def show_panel(notebook: NotebookContext, kind: str, variable: str | None, command: str, **content: object) -> object:
    """Create a panel of a model; the command shows how a model is named, if there are several.

    Raises:
        AdapterError: there is no such model.
        CellError: no model is named, and there are several; or it cannot answer prompts.
    """
    session, name = notebook.session, notebook.adapted_model(variable, command)
    state = session.state.model(name)
    if kind == "compare" and state is not None and not state.generates:
        raise CellError(
            f"{name} is a {state.class_name}, which cannot answer prompts: it has no generate() "
            "(%lora score --data DATA scores a classifier)"
        )
    from nbpeft.widgets import AdaptersPanel, BlendPanel, ComparePanel

    panel_class = {"adapters": AdaptersPanel, "compare": ComparePanel, "blend": BlendPanel}[kind]
    # The panel gets a function, because the tokenizer's variable may be set after the panel is shown.
    return panel_class(session, name, ui=notebook.ui, tokenizer=notebook.tokenizer, **content)


@subcommand(
    "inspect",
    "Show where an adapter changes the model: how far it moves each layer's weight.",
    argument("name", nargs="?", metavar="NAME", completes="adapter", help="the adapter (default: the active one)"),
    argument(
        "--intruders",
        action="store_true",
        help="also count intruder dimensions, a sign of forgetting; takes minutes for a large model",
    ),
    ON_MODEL,
    example="%lora inspect orders",
)
def inspect(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Inspect an adapter; the command for the loss on a general text says what the change costs elsewhere."""
    model = notebook.chosen(options.model)
    result = notebook.session.inspect(options.name, model=model, intruders=options.intruders)
    where = f" --model {result.model_name}" if len(notebook.session.state.models) > 1 else ""
    command = f"%lora score {result.adapter} --general{where}"
    return replace(result, commands=(("Loss on general text", command),))


@subcommand("memory", "Measure the memory a model uses, by part.", ON_MODEL)
def memory(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Measure memory."""
    return MemoryReport(notebook.session.memory(notebook.chosen(options.model)))


@subcommand(
    "doctor",
    "Check the installation: versions, problems, and what to install; or show why a command failed.",
    argument("--traceback", action="store_true", help="show the whole traceback of the last command that failed"),
    example="%lora doctor",
)
def doctor(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Check the installation and the front end, or show the last traceback, which is stored as text."""
    if options.traceback:
        return TracebackResult(notebook.session.last_traceback)
    return notebook.session.doctor().with_checks(*front_end_checks(notebook.shell))
