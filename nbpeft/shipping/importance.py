"""How much errors in each input of a model's matrices count, measured on rows: llama.cpp's importance matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import check_interrupt
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import walk
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.model.from_data.observing import device_of, evaluated, input_hooks, moved, progress

_LEAST = 1e-6
"""The least importance of an input, as a share of the mean."""


class Rows(Protocol):
    """Tokenized rows in the form that training gives to a model; see ``nbpeft.training.loop.rows.FirstRows``."""

    def batches(self, size: int, *, labels: bool) -> list[dict[str, Tensor]]: ...  # noqa: D102


def mean_squares(manager: AdapterManager, name: str, rows: Rows) -> dict[str, Tensor]:
    """Runs a model with one adapter on rows, and returns the mean square of each input of its linear layers.

    Output embeddings are left out, as llama.cpp does. The model is not changed.

    Args:
        manager: the adapters of the model.
        name: the adapter.
        rows: tokenized rows.

    Returns:
        Name of a weight -> the means, (in features,), float32 on the CPU. For an input that was always 0 the mean is
        small but positive: other rows may use the input, and the quantizer needs a scale for its weights.

    Raises:
        ConfigError: there are no rows.
        AdapterError: an input is not a finite number.
    """
    model = manager.model
    output = getattr(model, "get_output_embeddings", lambda: None)()
    places = ((site.path, site.wrapper or site.module) for site in walk(model) if isinstance(site.module, nn.Linear))
    modules: Mapping[str, nn.Module] = {path: module for path, module in places if module is not output}
    sums: dict[str, Any] = {}
    counts = dict.fromkeys(modules, 0)

    def see(path: str, inputs: tuple[Any, ...]) -> None:
        flat = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        sums[path] = sums.get(path, 0) + flat.square().sum(0)
        counts[path] += len(flat)

    device = device_of(model)
    batches = rows.batches(1, labels=False)  # one row each: padding is no input that counts
    if not batches:
        raise ConfigError("there are no rows to calibrate on (calibrate=…)")
    with (
        manager.use(name),
        evaluated(model),
        torch.no_grad(),
        input_hooks(modules, see),
        progress(len(batches), "calibrating", show=True) as report,
    ):
        for number, batch in enumerate(batches):
            check_interrupt()
            model(**moved(batch, device))
            report(number + 1)
    return {f"{path}.weight": _positive(path, total / counts[path]) for path, total in sums.items()}


def _positive(path: str, means: Tensor) -> Tensor:
    if not means.isfinite().all():
        raise AdapterError(f"the inputs of {path} are not finite numbers on the rows to calibrate on")
    return means.clamp(min=float(means.mean()) * _LEAST or 1.0).cpu()
