"""Panels, measurements, and the check of the installation."""

from __future__ import annotations

import argparse
from dataclasses import replace

from nbpeft.errors import CellError, did_you_mean
from nbpeft.magics.front_end import front_end_checks
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument
from nbpeft.magics.registry import ON_MODEL, subcommand
from nbpeft.magics.subcommands.planning import show_plan_panel
from nbpeft.magics.tokenize import reference
from nbpeft.session import MemoryReport, Result

PANELS = ("adapters", "compare", "blend", "plan", "training")
"""The panels of ``%lora panel``; the first one if none is named."""


@subcommand(
    "panel",
    "Show a panel: the adapters, with buttons to switch, save and delete them; or compare, blend, plan memory, or the "
    "card of a training.",
    argument("kind", nargs="?", metavar="PANEL", words=PANELS, completes="model", help=f"one of {', '.join(PANELS)}"),
    argument(
        "name",
        nargs="?",
        metavar="MODEL",
        completes="model",
        help=f"{ON_MODEL.options['help']}; for training, the run, as for watch",
    ),
    example="%lora panel compare",
)
def panel(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Show a panel; by default that of the adapters, as in ``%lora panel model``."""
    kind, variable = options.kind or PANELS[0], options.name
    if kind == "training":
        return _show_training(notebook, variable)
    if kind == "plan":
        return show_plan_panel(notebook, variable, {})
    if kind not in PANELS:
        models = notebook.model_names()
        is_model = reference(kind) or kind in notebook.namespace or kind in notebook.session.names
        if variable is not None or not is_model:
            near = did_you_mean(kind, [*PANELS, *models])
            also = f"; models: {', '.join(models)}" if models else ""
            raise CellError(f"%lora panel has no panel {kind!r}.{near} It has: {', '.join(PANELS)}{also}")
        kind, variable = PANELS[0], kind
    return show_panel(notebook, kind, variable)


@subcommand(
    "watch",
    "Show the card of a training: live while it runs, else its final state, even after its kernel has ended.",
    argument(
        "run", nargs="?", metavar="RUN", completes="run", help="the run (default: the running one, else the last)"
    ),
    example="%lora watch sql-3",
)
def watch(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Show the card of a training."""
    return _show_training(notebook, options.run)


def _show_training(notebook: NotebookContext, run: str | None) -> object:
    """Return the card of a training that has ended; that of a running one is shown live."""
    found = notebook.session.find_run(run)
    if isinstance(found, Result):
        return found
    from nbpeft.widgets import show_run

    running, model_name = found
    show_run(running, notebook.session, model_name, ui=notebook.ui)
    return None


def show_panel(notebook: NotebookContext, kind: str, variable: str | None, **content: object) -> object:
    """Create a panel of a model.

    Raises:
        AdapterError: there is no such model.
        CellError: no model is named, and there are several; or it cannot answer prompts.
    """
    session, name = notebook.session, notebook.adapted_model(variable, f"%lora panel {kind}")
    state = session.state.model(name)
    if kind == "compare" and state is not None and not state.generates:
        raise CellError(
            f"{name} is a {state.class_name}, which cannot answer prompts: it has no generate() "
            "(%lora score --data ROWS scores a classifier)"
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


@subcommand("doctor", "Check the installation: versions, problems, and what to install.")
def doctor(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Check the installation and the front end."""
    return notebook.session.doctor().with_checks(*front_end_checks(notebook.shell))
