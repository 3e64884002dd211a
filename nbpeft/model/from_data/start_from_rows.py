"""Data-dependent inits in one call: runs the data through a model and initializes an adapter from the result.

EVA, CorDA and LoRA-GA have different interfaces (``initialize_lora_eva_weights``, ``preprocess_corda``,
``preprocess_loraga``), called before or after the adapter is created. Here all three analyse the data first, and the
attributes that they set on layers are removed when the block ends::

    with started_from(base, config, rows) as start:
        manager.add(name, config)
        print(start.finish(manager, name))
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import check_interrupt
from nbpeft.engine.methods.lora.initialization.gradients import GRADIENT
from nbpeft.engine.methods.lora.initialization.inits import DECOMPOSITION
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import walk
from nbpeft.errors import ConfigError, shown
from nbpeft.model.from_data.data_inits import has_file, preprocess_corda, preprocess_loraga
from nbpeft.model.from_data.eva import EvaBatches, find_directions, forward_fn_dict, start_at, targeted_layers
from nbpeft.model.from_data.observing import device_of, moved, progress

INITS = ("eva", "corda", "lora_ga")
"""Values of ``init_lora_weights`` that need data."""
_LEFT = {"corda": DECOMPOSITION, "lora_ga": GRADIENT}
_BATCH_SIZE = 8
"""Rows per batch, the default of ``TrainingArguments``."""


class Rows(Protocol):
    """Tokenized rows in the form that training gives to a model; see ``nbpeft.training.loop.rows.FirstRows``."""

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]: ...  # noqa: D102

    def batches(self, size: int = ..., *, labels: bool = ...) -> list[dict[str, Tensor]]: ...  # noqa: D102


@dataclass(frozen=True)
class DataStart:
    """The result of a data-dependent init.

    Attributes:
        words: description of the data and the init, for users.
        directions: path -> directions (rank, in); only for EVA.
    """

    description: str = ""
    directions: Mapping[str, Tensor] = field(default_factory=dict)

    def finish(self, manager: AdapterManager, name: str) -> str:
        """Completes the init of an adapter that was created inside the block.

        Args:
            manager: manager of the model.
            name: name of the adapter.

        Returns:
            A description of the init, for users.
        """
        if not self.directions:
            return self.description
        config: Any = manager.configs[name]
        ranks = {path: len(rows) for path, rows in self.directions.items()}
        own = {path: config.rank_at(path) for path in ranks}
        start_at(manager, name, self.directions)
        others = [path for path, rank in ranks.items() if rank not in (0, own[path])]
        empty = sum(not rank for rank in ranks.values())
        positive = [rank for rank in ranks.values() if rank]
        spread = f"{min(positive)} to {max(positive)} (median {statistics.median(positive):g})"
        shared = f"redistributed over {len(ranks)} layers: {spread}" if others or empty else "the same in all layers"
        return f"{self.description}; ranks {shared}{f'; {empty} without a rank get no adapter' if empty else ''}"


def init_from_data(config: Any) -> str:
    """Returns the name of a config's init if it needs data, else the empty string."""
    found = str(getattr(config, "init_name", ""))
    return found if found in INITS else ""


def lacks_rows(model: nn.Module, config: Any) -> bool:
    """Returns whether an adapter with this config needs data for its init.

    Args:
        model: the base model, which may already be prepared for the init.
        config: the adapter's config.
    """
    return bool(init_from_data(config)) and not _is_prepared(model, config) and not _has_files(config)


def reads_a_file(model: nn.Module, config: Any) -> bool:
    """Returns whether the init of this config reads a file, because the base model is not prepared for it.

    Args:
        model: the base model.
        config: the adapter's config.
    """
    return _has_files(config) and not _is_prepared(model, config)


@contextmanager
def started_from(
    model: nn.Module, config: Any, rows: Rows | None, *, show_progress: bool = True
) -> Iterator[DataStart]:
    """Runs rows through the base model without adapters, to initialize an adapter that is created in the block.

    Args:
        model: the base model, with or without adapters; its weights and adapters are not changed.
        config: config of the adapter to create.
        rows: tokenized rows; None if a file of ``corda_config`` has the results.
        show_progress: show a progress bar.

    Raises:
        ConfigError: the config's init needs no data, or there are too few rows. The model is not changed.
    """
    init = init_from_data(config)
    if not init:
        given = getattr(config, "init_lora_weights", None)
        names = " or ".join(map(repr, INITS))
        raise ConfigError(f"rows for the init require init_lora_weights={names}, not {shown(given)}")
    if (rows is None or not rows.rows) and not _has_files(config):
        raise ConfigError("there are no rows for the init")
    if init == "eva" and rows is not None:
        yield _eva(model, config, rows, show_progress=show_progress)
        return
    layers, attribute = [site.module for site in walk(model)], _LEFT[init]
    before = [layer.__dict__.get(attribute) for layer in layers]
    try:
        start = _corda if init == "corda" else _lora_ga
        batches = [] if rows is None else rows.batches(_BATCH_SIZE, labels=init != "corda")
        yield start(model, config, batches, show_progress=show_progress)
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.__dict__.pop(attribute, None)
            if value is not None:
                layer.__dict__[attribute] = value


def _is_prepared(model: nn.Module, config: Any) -> bool:
    """Returns whether the attributes that the init needs are set on layers."""
    attribute = _LEFT.get(init_from_data(config))
    return attribute is not None and any(attribute in site.module.__dict__ for site in walk(model))


def _has_files(config: Any) -> bool:
    """Returns whether a file has the results that CorDA needs."""
    if init_from_data(config) != "corda":
        return False
    settings = config.corda_config
    return has_file(settings.cache_file) or has_file(settings.covariance_file)


def _seen(batches: Sequence[Mapping[str, Any]]) -> str:
    """Returns the number of rows and tokens in batches, for users."""
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches if "attention_mask" in batch)
    rows = sum(len(next(iter(batch.values()))) for batch in batches)
    return f"{rows:,} row{'s' if rows != 1 else ''}" + (f", {tokens:,} tokens" if tokens else "")


def _calls(model: nn.Module, batches: Sequence[Mapping[str, Any]], title: str, *, show: bool) -> Iterator[Any]:
    """Yields the model's output for each batch."""
    device = device_of(model)
    with progress(len(batches), title, show=show) as report:
        for number, batch in enumerate(batches):
            check_interrupt()
            report(number)
            yield model(**moved(batch, device))


def _corda(model: nn.Module, config: Any, batches: Sequence[Mapping[str, Any]], *, show_progress: bool) -> DataStart:
    def run() -> None:
        for _ in _calls(model, batches, "CorDA: batches", show=show_progress):
            pass

    preprocess_corda(model, config, run_model=run if batches else None, show_progress=show_progress)
    which = "most" if config.corda_config.corda_method == "ipm" else "least"
    source = f"on {_seen(batches)}" if batches else "from the file of corda_config"
    return DataStart(f"initialized by CorDA: the {which} important directions of each weight {source}")


def _lora_ga(model: nn.Module, config: Any, batches: Sequence[Mapping[str, Any]], *, show_progress: bool) -> DataStart:
    def step() -> None:
        for output in _calls(model, batches, "LoRA-GA: batches", show=show_progress):
            loss = getattr(output, "loss", None)
            if loss is None:
                raise ConfigError("LoRA-GA needs a loss, but the model returns none: these rows have no labels")
            loss.backward()

    preprocess_loraga(model, config, step)
    return DataStart(f"initialized by LoRA-GA: the mean gradient of {len(batches)} batches ({_seen(batches)})")


def _eva(model: nn.Module, config: Any, rows: Rows, *, show_progress: bool) -> DataStart:
    modules = targeted_layers(model, config)
    need = max((round(config.rank_at(path) * config.eva_config.rho) for path, _ in modules.values()), default=0)
    tokens = statistics.mean(len(row.get("input_ids", ())) for row in rows.rows)
    # EVA ignores a batch with fewer tokens than the largest number of directions of a layer.
    size = max(_BATCH_SIZE, -(-2 * need // max(int(tokens), 1)))
    batches = rows.batches(size)
    data = EvaBatches(batches, forward_fn_dict, _tokens_that_count, _rows_that_count)
    found = find_directions(model, config, modules, data, False, show_progress)
    return DataStart(
        f"initialized by EVA: the principal components of its layers' inputs on up to {_seen(batches)}", found
    )


def _tokens_that_count(batch: Mapping[str, Any], config: Any) -> Tensor | None:
    """Returns a mask (batch, length) of the tokens to use: attended to and, if ``use_label_mask``, with a label."""
    ids = batch.get("input_ids")
    if ids is None:
        return None
    mask: Tensor = batch.get("attention_mask", torch.ones_like(ids)).bool()
    settings, labels = config.eva_config, batch.get("labels")
    if settings.use_label_mask and labels is not None and labels.shape == mask.shape:
        mask = mask & (labels != settings.label_mask_value)
    return mask


def _rows_that_count(layer_input: Any, mask: Tensor | None, layer_name: str) -> Tensor:
    """Returns a layer's inputs (tokens, in) at the masked tokens; all of them if the layer's inputs are not tokens."""
    inputs: Tensor = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if mask is not None and inputs.shape[:-1] == mask.shape:
        return inputs[mask.to(inputs.device)]
    flat = inputs.reshape(-1, inputs.shape[-1])
    return flat[mask.to(inputs.device).reshape(-1)] if mask is not None and len(flat) == mask.numel() else flat
