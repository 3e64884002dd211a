"""Merging into quantized weights with rounding that is calibrated on the layers' inputs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import check_interrupt
from nbpeft.engine.kernels.rounding import HasGrid, round_with_feedback, share_lost
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import is_quantized_layer, manager_of
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import ConfigError, MergeError
from nbpeft.jsonable import AsDict
from nbpeft.model.from_data.observing import evaluated, input_hooks
from nbpeft.model.saving.merge_deltas import LayerDelta, deltas_of

_GRAM_BYTES = 2**30
"""Memory in bytes for the Gram matrices of inputs. Layers that do not fit need another pass over the data."""
_NO_GRID = "no adapted layer is quantized by bitsandbytes to 4 or 8 bits: use merge_adapter, which needs no rows"
_UNEVEN = (
    "blocks of the adapted 4-bit layers extend over several rows of the weight: use merge_adapter, which rounds to the "
    "nearest level"
)


@dataclass(frozen=True)
class CalibratedMerge(AsDict):
    """The error of a calibrated merge into quantized weights.

    Attributes:
        names: the merged adapters.
        lost: path of a quantized layer -> root mean square error of its outputs on the data, divided by that of the
            adapters' contribution.
        token_count: number of tokens in the data.
    """

    names: tuple[str, ...]
    lost: Mapping[str, float]
    token_count: int

    def __str__(self) -> str:
        path = max(self.lost, key=self.lost.__getitem__)
        median, worst, count = statistics.median(self.lost.values()), self.lost[path], len(self.lost)
        return (
            f"calibrated on {self.token_count:,} tokens: rounding loses {100 * median:.0f} % of what "
            f"{' and '.join(self.names)} adds to a layer's outputs (median of {count} layers), "
            f"{100 * worst:.0f} % at worst ({path})"
        )


def merge_calibrated(
    model: nn.Module,
    data: Iterable[Mapping[str, Tensor]],
    adapter_names: str | Sequence[str] | None = None,
    *,
    safe_merge: bool = False,
) -> CalibratedMerge:
    """Merges adapters into a model with quantized weights, and preserves their effect on data like the given.

    ``merge_adapter`` rounds each merged value to the nearest quantization level. That is often the level it had before,
    so that the update is lost. Here rounding errors in the columns of a weight compensate each other for the inputs
    that the layer has in these batches (GPTQ, https://arxiv.org/abs/2210.17323), on the weight's existing grid.
    The resulting state is that of ``merge_adapter``: ``unmerge_adapter`` restores every bit, and ``merge_and_unload``
    removes the adapters. Other layers (full precision, or quantized by other libraries than bitsandbytes) are merged
    as by ``merge_adapter``.

    Args:
        model: an adapted model with linear layers in 4 or 8 bits.
        data: keyword arguments of the model's forward, one mapping per batch; some hundred rows of the training
            data. They are stored in a list, because layers whose inputs do not fit into 1 GiB need another pass.
        adapter_names: adapters to merge; None for the active ones.
        safe_merge: raise an error if a merged weight would not be finite.

    Returns:
        The remaining error of each quantized layer.

    Raises:
        MergeError: adapters are merged already or cannot be merged, or no layer is quantized.
        ConfigError: there are no batches, or they do not reach one of these layers.
        BusyError: a block of ``use`` or ``disable_adapter`` is open.
    """
    manager = manager_of(model)
    if manager is None:
        raise MergeError(f"{type(model).__name__} has no adapters to merge")
    chosen = (adapter_names,) if isinstance(adapter_names, str) else adapter_names
    names = tuple(manager.active if chosen is None else chosen)
    if any(layer.is_quantization_aware(names) for layer in manager.layers.values()):
        raise MergeError(
            f"{' and '.join(map(repr, names))} was trained with rounding to the nearest level: merge without rows, "
            "which preserves the outputs"
        )
    deltas = deltas_of(manager, names).layers
    layers = {path: layer for path, layer in manager.layers.items() if path in deltas and _has_known_grid(layer)}
    if not layers:
        raise MergeError(_NO_GRID)
    rows, rounded, lost = list(data), {}, {}
    for group in _groups(layers):
        for path, gram in _grams(manager, names, group, rows).items():
            check_interrupt()
            found = _rounded(group[path], deltas[path], gram)
            if found is not None:
                rounded[path], lost[path] = found
    if not rounded:
        raise MergeError(_UNEVEN)
    with manager.transaction():
        manager.merge(names, safe=safe_merge)
        for path, stored in rounded.items():
            check_interrupt()
            layers[path].backend.restore(layers[path].base_layer, stored)
    return CalibratedMerge(names, lost, sum(_token_count(batch) for batch in rows))


def _has_known_grid(layer: AdaptedLayer) -> bool:
    return layer.kind.name == "linear" and isinstance(layer.backend, HasGrid) and is_quantized_layer(layer.base_layer)


def _groups(layers: Mapping[str, AdaptedLayer]) -> Iterator[dict[str, AdaptedLayer]]:
    """Yields groups of layers whose Gram matrices fit into memory together, one pass over the data each."""
    group: dict[str, AdaptedLayer] = {}
    taken = 0
    for path, layer in layers.items():
        size = 4 * layer.base.in_features**2
        if group and taken + size > _GRAM_BYTES:
            yield group
            group, taken = {}, 0
        group[path] = layer
        taken += size
    yield group


class _Grams:
    """Sums of x xᵀ over the inputs of layers; layers with the same input tensor share one product."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.mask: Tensor | None = None
        self._last: tuple[Tensor, Tensor, int] | None = None

    def see(self, path: str, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        if self._last is None or self._last[0] is not x:
            rows = self._seen(x).float()
            self._last = (x, rows.t() @ rows, len(rows))
        _, product, count = self._last
        if path in self.sums:
            self.sums[path] += product
        else:
            self.sums[path] = product.clone()
        self.counts[path] = self.counts.get(path, 0) + count

    def _seen(self, x: Tensor) -> Tensor:
        if self.mask is not None and self.mask.shape == x.shape[:-1]:
            return x[self.mask.to(x.device)]
        return x.reshape(-1, x.shape[-1])

    def next_batch(self, batch: Mapping[str, Any]) -> None:
        mask = batch.get("attention_mask")
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._last = None


def _grams(
    manager: AdapterManager,
    names: tuple[str, ...],
    layers: Mapping[str, AdaptedLayer],
    batches: Sequence[Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Returns the mean of x xᵀ over the inputs of each layer with the adapters active, (in, in) float32."""
    grams, model = _Grams(), manager.model
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    with torch.no_grad(), evaluated(model), manager.use(names), input_hooks(layers, grams.see):
        for batch in batches:
            check_interrupt()
            grams.next_batch(batch)
            model(**{name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)})
    missing = [path for path in layers if not grams.counts.get(path)]
    if missing:
        raise ConfigError(
            f"a calibrated merge needs rows, and none reached {missing[0]}"
            + (f" ({len(missing)} layers in all)" if len(missing) > 1 else "")
        )
    return {path: grams.sums[path] / grams.counts[path] for path in layers}


@torch.no_grad()
def _rounded(layer: AdaptedLayer, delta: LayerDelta, gram: Tensor) -> tuple[Any, float] | None:
    """Returns the backend's merged weight and the lost share of the adapters' effect; None if the grid is unknown."""
    backend = layer.backend
    assert isinstance(backend, HasGrid)
    frozen, gram = layer.base.weight().float(), gram.to(layer.base.device)
    wanted = frozen.clone()
    delta.add_to_(wanted)
    grid = backend.grid(layer.base_layer, wanted)
    if grid is None:
        return None
    places = round_with_feedback(wanted, gram, grid)
    return grid.stored(places), share_lost(grid.values(places), wanted, frozen, gram)


def _token_count(batch: Mapping[str, Any]) -> int:
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor):
        return int(mask.sum())
    return ids.numel() if isinstance(ids, Tensor) else 0
