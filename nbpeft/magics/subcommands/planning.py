"""``%lora plan``: the options of a memory forecast, and the forecast itself."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from nbpeft._util.device_names import DEVICES, THIS_MACHINE, named
from nbpeft.errors import CellError, ConfigError, did_you_mean
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument, positive
from nbpeft.magics.registry import COLUMNS, METHOD, TOKENIZER, fields_of, subcommand
from nbpeft.names import BASE, BATCH_SIZE, DTYPES, MAX_LENGTH, SHORT_DTYPES, START
from nbpeft.session.commands.planning import MemoryPlanner
from nbpeft.session.fields import PLAN_FIELDS
from nbpeft.session.handles import is_module
from nbpeft.session.results.planning import PlanResult

_FLAGS = {"inference": ("training", False), "packing": ("packing", True), "generation": ("generation", True)}
"""Option without a value -> the setting of ``Session.plan`` that it makes."""

SIZES = (
    argument("--batch-size", type=positive, metavar="N", help=f"rows per step (default: {BATCH_SIZE}, as in training)"),
    argument(
        "--max-length", type=positive, metavar="N", help=f"tokens per row (default: {MAX_LENGTH}, as in training)"
    ),
    argument(
        "--device",
        metavar="DEVICE",
        words=(THIS_MACHINE, "cpu", "cuda", *DEVICES),
        help="T4, A100-80GB, RTX4090, M2-16GB, …, or 16GB, cuda:0 (default: this machine's)",
    ),
)
DRY_RUN_SIZES = tuple(
    replace(item, options={**item.options, "help": f"for --dry-run: {item.options['help']}"}) for item in SIZES
)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given, as keywords of ``Session.plan``.

    Raises:
        CellError: a memory size has no unit, or a data type is unknown.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    names = ("batch_size", "max_length", "num_adapters", "device", "processes", "reference")
    settings: dict[str, Any] = {name: given[name] for name in names if name in given}
    device = str(given.get("device", ""))
    if re.fullmatch(r"[\d.]+", device) and named(device) is None:  # it would count as bytes
        raise CellError(f"--device {device} has no unit. Did you mean '{device}GB'?")
    if "dtype" in given:
        settings["dtype"] = SHORT_DTYPES.get(given["dtype"], given["dtype"])
        if settings["dtype"] not in DTYPES:
            raise CellError(f"--dtype {given['dtype']!r} is not one of {', '.join(SHORT_DTYPES)}")
    return settings | {name: value for flag, (name, value) in _FLAGS.items() if given.get(flag)}


def refuse_sizes(sizes: Mapping[str, Any]) -> None:
    """Refuse sizes without ``--dry-run``.

    Raises:
        CellError: there are some.
    """
    for name in sizes:
        raise CellError(f"--{name.replace('_', '-')} is an option of --dry-run, and has no effect without it")


@subcommand(
    "plan",
    "Forecast the memory of a training, part by part, whether it fits, and what to change so that it does. "
    "No weights are loaded: of a repository or folder only the config is read.",
    argument(
        "target",
        nargs="?",
        metavar="MODEL",
        completes="model",
        help="a variable with a model, a folder, a .gguf file or a repository",
    ),
    *SIZES,
    argument("--dtype", metavar="DTYPE", words=tuple(SHORT_DTYPES), help="bf16, fp16 or fp32 (default: the model's)"),
    argument(
        "--num-adapters",
        type=positive,
        metavar="N",
        help="number of adapters trained side by side (default: 1)",
    ),
    argument("--processes", type=positive, metavar="N", help="memory of each of N processes, which have own batches"),
    argument("--inference", action="store_true", help="forecast a forward pass over such a prompt, not a training"),
    argument(
        "--data",
        metavar="DATA",
        completes="data",
        help="training rows, which determine the sequence lengths; --max-length then cuts them",
    ),
    COLUMNS,
    TOKENIZER,
    argument("--packing", action="store_true", help="several rows in each sequence, as with %%lora_train --packing"),
    argument("--reference", metavar="NAME", words=(BASE, START), help="start counts a copy of the trained weights"),
    argument("--generation", action="store_true", help="completions are generated before each step, as by grpo"),
    argument("--trainer-class", metavar="CLASS", completes="variable", help="a Trainer class of another library"),
    METHOD,
    argument("--panel", action="store_true", help="show a panel with sliders"),
    fields="plan",
    example="%lora plan meta-llama/Llama-3.1-8B --batch-size 4 --max-length 1024 --device 16GB bits=4 r=16",
)
def plan(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Plan memory, or show the panel for it."""
    settings, changes = settings_of(options), fields_of(options)
    settings |= {name: changes.pop(name) for name in PLAN_FIELDS if name in changes}
    if options.trainer_class is not None:
        settings["trainer_class"] = notebook.value(options.trainer_class, "--trainer-class")
    settings["changes"] = changes
    if options.data is not None:
        settings |= {"data": notebook.data(options.data, "--data"), "tokenizer": notebook.tokenizer(options.tokenizer)}
        settings["columns"] = options.columns
    if options.panel:
        return show_plan_panel(notebook, options.target, settings)
    source, title = _source(options.target, notebook)
    try:
        return _displayed_in_two_steps(notebook.session.memory_planner(source, variable=title, **settings), notebook)
    except ConfigError as error:
        if not isinstance(source, str) or "source" not in error.details:
            raise
        if "/" in source or "." in source:
            raise CellError(str(error)) from None
        raise CellError(f"no variable is called {source!r}, and no repository could be read: {error}") from None


class _DisplayedPlan(PlanResult):
    """A plan that its cell has displayed already: the first display does nothing, later ones show it as usual."""

    def _ipython_display_(self) -> None:
        if "seen" in vars(self):
            from IPython.display import HTML, display

            display(HTML(self._repr_html_()))
        vars(self)["seen"] = True


def _displayed_in_two_steps(planner: MemoryPlanner, notebook: NotebookContext) -> PlanResult:
    """The plan; a front end shows the forecast at once, and the suggestions as soon as they are computed."""
    if not hasattr(notebook.shell, "kernel") or notebook.silent:
        return planner.plan()
    from IPython.display import display

    handle: Any = display(planner.plan(suggest=False), display_id=True)
    plan = planner.plan()
    handle.update(plan)
    return _DisplayedPlan(**{field.name: getattr(plan, field.name) for field in fields(plan)})


def show_plan_panel(notebook: NotebookContext, name: str | None, settings: dict[str, Any]) -> object:
    """Create the memory panel with sliders."""
    from nbpeft.widgets import PlanPanel

    source, title = _source(name, notebook)
    return PlanPanel(notebook.session.memory_planner(source, variable=title, **settings), ui=notebook.ui)


def _source(name: str | None, notebook: NotebookContext) -> tuple[Any, str]:
    """The object to plan for, a model or config in a variable, or a folder or Hub id; and its name."""
    if name is None:
        if notebook.session.names:
            return (found := notebook.adapted_model(None, "%lora plan")), found
        name = notebook.only_model("%lora plan")
    if name in notebook.namespace:
        value = notebook.namespace[name]
        if isinstance(value, str):
            return value, value
        is_source = is_module(value) or hasattr(value, "model_type")
        return (value if is_source else notebook.module(name)), name
    hint = did_you_mean(name, notebook.model_names())
    if hint and "/" not in name and not os.path.exists(name):  # a misspelt variable is not looked up on the Hub
        raise CellError(f"no variable is called {name!r}.{hint}")
    return name, name
