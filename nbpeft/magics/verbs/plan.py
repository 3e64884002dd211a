"""Will it fit?"""

from __future__ import annotations

import argparse
from typing import Any

from nbpeft.errors import ConfigError
from nbpeft.magics.body import parse_fields
from nbpeft.magics.desk import Desk
from nbpeft.magics.parse import argument, positive
from nbpeft.magics.planning import SETTINGS, no_such_source, plan_panel, settings_of, source_of
from nbpeft.magics.registry import verb


@verb(
    "plan",
    "Say what training will need, part by part, whether it fits, and what to change so that it does. "
    "Nothing is loaded: of a repository or folder only its config is read.",
    argument(
        "target",
        nargs="?",
        metavar="MODEL",
        completes="model",
        help="a variable with a model, a folder, a .gguf file or a repository",
    ),
    *SETTINGS,
    argument("--rank", type=positive, metavar="R", help="of the adapter (default: the active adapter's, or 16)"),
    argument("--targets", metavar="NAMES", help="all-linear, or names with commas (default: all-linear)"),
    argument("--panel", action="store_true", help="show a panel with sliders"),
    fields="config",
    example="%lora plan meta-llama/Llama-3.1-8B --batch 4 --seq 1024 --device 16GB --quant nf4 --checkpointing",
)
def plan(options: argparse.Namespace, desk: Desk) -> object:
    """Plans memory, or shows the panel for it."""
    settings, config = settings_of(options), _config(options, desk)
    if options.panel:
        return plan_panel(desk, options.target, config, settings)
    source, title = source_of(options.target, desk)
    try:
        return desk.session.plan_memory(source, config, variable=title, **settings)
    except ConfigError as error:
        if isinstance(source, str) and "source" in error.details:
            raise no_such_source(source, desk, str(error)) from None
        raise


def _config(options: argparse.Namespace, desk: Desk) -> dict[str, Any] | None:
    """Fields of the adapter; None where none is given."""
    fields: dict[str, Any] = dict(parse_fields(options.fields, desk.namespace))
    if options.rank is not None:
        fields["r"] = options.rank
    if options.targets is not None:
        names = [name.strip() for name in options.targets.split(",") if name.strip()]
        fields["target_modules"] = names if len(names) > 1 or options.targets != "all-linear" else "all-linear"
    if not fields:
        return None
    return {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | fields
