"""The state of a session as JSON of limited size, for programs that drive a notebook."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nbpeft.errors import cut
from nbpeft.jsonable import as_json
from nbpeft.session.doctor import version_of

if TYPE_CHECKING:
    from nbpeft.session.context import SessionContext
    from nbpeft.state import AdapterState, ModelState, SessionState, TrainState
    from nbpeft.training import TrainResult

MOST_BYTES = 4096
_LIMITS = ((1000, 400), (100, 200), (40, 150), (20, 120), (12, 100), (8, 80), (5, 60), (3, 40), (1, 30), (1, 6))
"""(items of a list, characters of a text), from the most generous to what always fits."""
_MOST_VALUES, _LONGEST_NAME = 6, 20
"""Number of values of an error and of metrics, and characters of their names."""


def describe(ctx: SessionContext) -> str:
    """Return the state of a session as JSON of at most ``MOST_BYTES``."""
    whole = as_json(_whole(ctx))
    for items, characters in _LIMITS:
        text = json.dumps(_limited(whole, items, characters), ensure_ascii=False).encode("utf-8", "replace")
        if len(text) <= MOST_BYTES:
            break
    return text.decode("utf-8")


def _limited(value: Any, items: int, characters: int) -> Any:
    """A copy with at most so many items in each list and characters in each text, which counts what is left out."""
    if isinstance(value, str):
        return cut(value, characters)
    if isinstance(value, list):
        return [_limited(item, items, characters) for item in value[:items]]
    if isinstance(value, dict):
        return dict(_limited_items(value, items, characters))
    return value


def _limited_items(value: dict[str, Any], items: int, characters: int) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        yield key, _limited(item, items, characters)
        if isinstance(item, list) and len(item) > items:
            yield f"{key}_left_out", len(item) - items


def _whole(ctx: SessionContext) -> dict[str, Any]:
    """Everything that is described; what is in use comes first in each list."""
    state = ctx.state
    return {
        "nbpeft": version_of("nbpeft"),
        "busy": state.busy,
        "current": state.current,
        "models": _models(state),
        "deleted_models": [{"name": past.name, "adapters": past.adapters} for past in state.past],
        "last_result": _result(ctx.last_result),
        "last_error": ctx.last_error and {**ctx.last_error, "details": _values(ctx.last_error["details"])},
        "runs_folder": ctx.runs_folder,
        "notes": state.notes[::-1],
    }


def _models(state: SessionState) -> list[dict[str, Any]]:
    ordered = sorted(state.models, key=lambda model: model.name != state.current)
    return [_model(model) for model in ordered]


def _model(model: ModelState) -> dict[str, Any]:
    adapters = sorted(model.adapters, key=lambda adapter: (not adapter.active, not adapter.unsaved))
    return {
        "name": model.name,
        "class": model.class_name,
        "dtype": model.dtype,
        "device": model.device,
        "quantization": model.quantization,
        "parameters": model.parameter_count,
        "trainable": model.trainable_count,
        "enabled": model.enabled,
        "adapters": [_adapter(adapter) for adapter in adapters],
        "adapters_in_pool_only": model.offloaded_count,
        "training": None if model.training is None else _training(model.training),
    }


def _adapter(adapter: AdapterState) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "method": adapter.method,
        "settings": ", ".join(f"{name}={value}" for name, value in adapter.summary.items()),
        "targets": ", ".join(adapter.targets),
        "parameters": adapter.parameter_count,
        "active": adapter.active,
        "trainable": adapter.trainable,
        "merged": adapter.merged,
        "frozen": adapter.frozen,
        "unsaved": adapter.unsaved,
        "scale": adapter.scale,
    }


def _training(run: TrainState) -> dict[str, Any]:
    kept = ("run_id", "adapter", "status", "step", "total_steps", "loss", "eval_loss", "best_step")
    members = [{"name": member.name, "status": member.status, "step": member.step} for member in run.members]
    return {name: getattr(run, name) for name in kept} | {
        "metrics": _values(run.metrics),
        "seconds": round(run.elapsed, 1),
        "seconds_left": None if run.remaining is None else round(run.remaining, 1),
        "message": run.message,
        "folder": run.folder,
        "members": members,
    }


def _values(named: Mapping[str, Any]) -> dict[str, Any]:
    """The first of some named values; a list or dict as text, which is cut where it is too long."""
    first = itertools.islice(named.items(), _MOST_VALUES)
    return {cut(name, _LONGEST_NAME): _value(value) for name, value in first}


def _value(value: Any) -> Any:
    return json.dumps(as_json(value), ensure_ascii=False) if isinstance(value, list | dict) else value


def _result(result: TrainResult | None) -> dict[str, Any] | None:
    if result is None:
        return None
    kept = ("adapter", "status", "steps", "total_steps", "loss", "eval_loss", "best_step", "output_dir")
    return {"text": str(result), **{name: getattr(result, name) for name in kept}}
