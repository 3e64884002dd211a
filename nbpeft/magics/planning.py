"""Options of a memory forecast, and what they mean."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from typing import Any

from nbpeft.errors import CellError, did_you_mean
from nbpeft.magics.desk import Desk, is_module
from nbpeft.magics.parse import Argument, argument, positive
from nbpeft.names import OPTIMIZERS, QUANTIZATIONS, SHORT_DTYPES

_QUANTIZATIONS = ("none", *QUANTIZATIONS)

SIZES: tuple[Argument, ...] = (
    argument("--batch", type=positive, metavar="N", help="sequences in a step (default: 4)"),
    argument("--seq", type=positive, metavar="N", help="tokens of each (default: 1024)"),
    argument("--device", metavar="SIZE", words=("cpu", "cuda"), help="16GB, cuda:0, … (default: this machine's)"),
)
DRY_SIZES: tuple[Argument, ...] = tuple(
    replace(item, options={**item.options, "help": f"for --dry-run: {item.options['help']}"}) for item in SIZES
)
SETTINGS: tuple[Argument, ...] = (
    *SIZES,
    argument("--dtype", metavar="DTYPE", words=tuple(SHORT_DTYPES), help="bf16, fp16 or fp32 (default: the model's)"),
    argument("--quant", metavar="KIND", words=_QUANTIZATIONS, help="none, nf4, fp4, int8 (default: as it is)"),
    argument("--checkpointing", action="store_true", help="compute layers again in backward"),
    argument("--optimizer", metavar="NAME", words=OPTIMIZERS, help="as for TrainingArguments.optim (default: adamw)"),
    argument("--inference", action="store_true", help="reading a prompt of that length, no training"),
)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options as keywords of ``Session.plan_memory``; what was left out is left out.

    Raises:
        CellError: a size has no unit, or a word is not known.
    """
    given = vars(options)
    found: dict[str, Any] = {}
    for option, name in (("batch", "batch_size"), ("seq", "sequence_length")):
        if given.get(option) is not None:
            found[name] = given[option]
    device = str(given.get("device") or "")
    if re.fullmatch(r"[\d.]+", device):  # it would be read as bytes, which nobody means
        raise CellError(f"--device {device} has no unit. Did you mean '{device}GB'?")
    for option in ("device", "optimizer"):
        if given.get(option) is not None:
            found[option] = given[option]
    if given.get("dtype") is not None:
        found["dtype"] = SHORT_DTYPES.get(given["dtype"], given["dtype"])
        if found["dtype"] not in SHORT_DTYPES.values():
            raise CellError(f"--dtype {given['dtype']!r} is not one of {', '.join(SHORT_DTYPES)}")
    if given.get("quant") is not None:
        if given["quant"] not in _QUANTIZATIONS:
            near = did_you_mean(given["quant"], _QUANTIZATIONS)
            raise CellError(f"--quant {given['quant']!r} is not one of {', '.join(_QUANTIZATIONS)}.{near}")
        found["quantization"] = None if given["quant"] == "none" else given["quant"]
    if given.get("checkpointing"):
        found["gradient_checkpointing"] = True
    if given.get("inference"):
        found["training"] = False
    return found


def without_dry_run() -> CellError:
    """What to say where sizes are given and nothing is forecast."""
    return CellError("--batch, --seq and --device say what --dry-run forecasts; they mean nothing without it")


def source_of(name: str | None, desk: Desk) -> tuple[Any, str]:
    """What to plan for: a model or config in a variable, or a folder or hub id; and what to call it.

    Raises:
        CellError: a variable holds something else.
    """
    desk.session.adopt(desk.namespace)
    if name is None:
        current = desk.session.state.current
        if current is not None:
            return None, current
        name = desk.only_model("%lora plan")
    if name in desk.namespace:
        value = desk.namespace[name]
        if isinstance(value, str):
            return value, value
        if not is_module(value) and not hasattr(value, "model_type"):
            return desk.module(name), name
        return value, name
    close = did_you_mean(name, desk.model_names())
    if close and "/" not in name and not os.path.exists(name):  # a slip of the pen need not go to the hub
        raise CellError(f"no variable is called {name!r}.{close}")
    return name, name


def no_such_source(name: str, desk: Desk, reason: str) -> CellError:
    """What to say where a word is neither a variable nor a place."""
    if "/" in name or "." in name:
        return CellError(reason)
    return CellError(f"no variable is called {name!r}, and as a repository: {reason}")


def plan_panel(desk: Desk, name: str | None, config: Any, settings: dict[str, Any]) -> object:
    """The panel with sliders."""
    from nbpeft.widgets import PlanPanel

    source, title = source_of(name, desk)
    return PlanPanel(desk.session.memory_planner(source, config, variable=title, **settings), ui=desk.ui)
