"""Checks a new adapter against a slot and collects all writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import (
    Adapter,
    Paddable,
    configure,
    is_configured,
    keep_settings,
    size_of,
    swap_refusal,
)
from nbpeft.engine.contract.base import Shape, Shapes
from nbpeft.engine.hotswap.padding import check_data, put_larger
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.errors import ConfigError, HotSwapError, few


class Writes:
    """All writes of a swap; collecting them changes nothing.

    Args:
        name: name of the slot, for messages.
        config: config of the new adapter, with the slot's targets.
        grow: whether a slot too small for the new rank gets larger tensors.
        shapes: path -> the shapes of the parameters of the new adapter, where they are known.
        consume: whether the new tensors may be overwritten.

    Attributes:
        zeroed: paths of the slot's layers for which there are no new tensors.
        reset: paths of the slot's ``modules_to_save`` for which there are no new tensors.
    """

    def __init__(
        self,
        name: str,
        config: Any,
        *,
        grow: bool,
        shapes: Mapping[str, Shapes] = MappingProxyType({}),
        consume: bool = False,
    ) -> None:
        self.name = name
        self.config = config
        self.grow = grow
        self._shapes = shapes
        self._consume = consume
        self.zeroed: list[str] = []
        self.reset: list[str] = []
        self._given: list[tuple[Tensor, Tensor]] = []  # (target, source)
        self._from_base: list[tuple[Tensor, Tensor]] = []  # the same; the sources belong to the base model
        self._zeros: list[Tensor] = []
        self._larger: list[tuple[nn.Parameter, Tensor]] = []
        self._adapters: list[tuple[str, Adapter]] = []
        self._padded: list[Paddable] = []
        self._reset: list[tuple[Adapter, AdaptedLayer]] = []

    def collect_layers(self, slot: Mapping[str, AdaptedLayer], given: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Collects the tensors of the adapters on layers.

        Raises:
            HotSwapError: the slot lacks layers, or a tensor does not fit.
        """
        unexpected = [path for path in given if path not in slot]
        if unexpected:
            raise HotSwapError(
                f"unexpected keys: the new adapter has {len(unexpected)} layers that {self.name!r} does not have "
                f"({_listed(unexpected)}); load it under another name",
                unexpected=tuple(unexpected),
            )
        for path, layer in slot.items():
            adapter = layer.adapter(self.name)
            refusal = swap_refusal(adapter)
            if refusal:
                raise HotSwapError(f"{path}: adapter {self.name!r} {refusal}", path=path)
            shapes = self._shapes[path] if path in self._shapes else self._shapes_at(path, layer, adapter)
            self._check_form(path, shapes, adapter)
            if path in given:
                self._check_shapes(path, shapes, given[path])
            else:
                self.zeroed.append(path)
                if adapter.reads_weight and layer.merged_names:
                    raise HotSwapError(
                        f"the new adapter lacks {path}, where {layer.merged_names[0]!r} is merged: unmerge first"
                    )
                self._reset.append((adapter, layer))
            # Layers without new tensors also get the new size, because saved tensors have to fit the new config.
            self._collect_adapter(path, layer, adapter, shapes, given.get(path, {}))
            is_padded = isinstance(adapter, Paddable) and self._padded[-1:] == [adapter]
            if is_padded or not is_configured(adapter, self.config, path):
                self._adapters.append((path, adapter))

    def _shapes_at(self, path: str, layer: AdaptedLayer, adapter: Adapter) -> Shapes:
        try:
            return type(adapter).parameter_shapes(self.config, path, layer.base.module, layer.kind)
        except ConfigError as error:
            raise HotSwapError(f"{path}: {error}", path=path) from None

    def _check_form(self, path: str, shapes: Mapping[str, Shape], adapter: Adapter) -> None:
        """Raises HotSwapError if the new adapter has other parameters than the slot."""
        constants, parameters = adapter.peft.constants, adapter._parameters
        read = {key: value for key, value in parameters.items() if value is not None and key not in constants}
        if read.keys() == shapes.keys() and (
            isinstance(adapter, Paddable) or all(value.shape == shapes[key] for key, value in read.items())
        ):
            return
        own = {key: tuple(value.shape) for key, value in read.items()}
        present, required = (
            _listed([f"{key} {shape}" for key, shape in one.items() if other.get(key) != shape]) or "nothing else"
            for one, other in ((own, shapes), (shapes, own))
        )
        raise HotSwapError(
            f"{path}: adapter {self.name!r} has {present} where the config of the new one requires {required}; load it "
            "under another name",
            path=path,
        )

    def _check_shapes(self, path: str, shapes: Mapping[str, Shape], given: Mapping[str, Tensor]) -> None:
        if given.keys() != shapes.keys():
            self._check_keys(path, given, shapes)
        for key, tensor in given.items():
            if tensor.shape != shapes[key]:
                raise HotSwapError(
                    f"{path}.{key} has shape {tuple(tensor.shape)}, expected {tuple(shapes[key])}: "
                    "the adapter belongs to another base model, or its config to another adapter",
                    path=path,
                )

    @staticmethod
    def _check_keys(path: str, given: Mapping[str, Tensor], shapes: Mapping[str, object]) -> None:
        unexpected = sorted(given.keys() - shapes.keys())
        if unexpected:
            raise HotSwapError(f"unexpected keys at {path}: {_listed(unexpected)}; the slot has {_listed(shapes)}")
        missing = sorted(key for key in shapes.keys() - given.keys() if not key.endswith("_bias"))
        if missing:
            raise HotSwapError(f"{path}: the new adapter lacks {_listed(missing)}")

    def _collect_adapter(
        self,
        path: str,
        layer: AdaptedLayer,
        adapter: Adapter,
        shapes: Mapping[str, Shape],
        given: Mapping[str, Tensor],
    ) -> None:
        larger: dict[nn.Parameter, Tensor] = {}
        parameters: dict[str, Any] = adapter._parameters
        pads = adapter if isinstance(adapter, Paddable) else None
        rank = size_of(type(adapter), shapes)
        if pads is not None and rank is not None:
            room = pads.room
            if rank > room and not self.grow:
                raise HotSwapError(
                    f"{path}: rank {rank} does not fit a slot of rank {room}; prepare the model for "
                    f"target_rank={rank} or more before it is compiled",
                    path=path,
                    rank=rank,
                )
            if rank > room:
                larger = dict(pads.enlarged(rank, layer.base))
                self._larger.extend(larger.items())
            elif rank < room:
                self._padded.append(pads)
        for key, shape in shapes.items():
            parameter = parameters[key]
            fresh = larger.get(parameter) if larger else None
            home = parameter.detach() if fresh is None else fresh
            if key not in given:
                used, rest = home[:0], [home]
            else:
                used, rest = (home, []) if home.shape == shape or pads is None else pads.used_part(key, home, shape)
            source = given.get(key, used)
            if source.shape != used.shape:
                source = source.reshape(used.shape)
            if fresh is not None:  # filled now; it replaces the parameter when everything is written
                used.copy_(source.detach())
                for part in rest:
                    part.zero_()
                continue
            self._zeros.extend(rest)
            if key in given:
                self._given.append((used, source))

    def collect_copies(
        self, slot: Mapping[str, ModulesToSaveWrapper], given: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Collects ``modules_to_save``; those without new tensors are reset to the base model's values.

        Raises:
            HotSwapError: the slot does not have them, or their tensors differ in names or shapes.
        """
        unexpected = [path for path in given if path not in slot]
        if unexpected:
            raise HotSwapError(
                f"the new adapter trained {_listed(unexpected)} as a whole (modules_to_save) and {self.name!r} did not",
                unexpected=tuple(unexpected),
            )
        for path, module in slot.items():
            own = module.modules_to_save[self.name].state_dict()
            if path in given:
                self._given.extend(self._equal(f"{path}.", own, given[path]))
            else:
                self.reset.append(path)
                self._from_base.extend(self._equal(f"{path}.", own, module.original_module.state_dict()))

    def collect_biases(self, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
        """Collects the trained biases of the base.

        Raises:
            HotSwapError: the slot and the new adapter trained different biases.
        """
        self._given.extend(self._equal("", own, given))

    def _equal(
        self, prefix: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (own, given) tensors; raises HotSwapError if their names or shapes differ."""
        differing = sorted(own.keys() ^ given.keys())
        if differing:
            where = prefix.rstrip(".") or "trained base biases"
            raise HotSwapError(f"{where}: only one of the new adapter and {self.name!r} has {_listed(differing)}")
        for key, tensor in own.items():
            if tensor.shape != given[key].shape:
                raise HotSwapError(
                    f"{prefix}{key} has shape {tuple(given[key].shape)}, expected {tuple(tensor.shape)}: "
                    "the adapter belongs to another base model"
                )
            yield tensor.detach(), given[key].detach()

    @torch.no_grad()
    def write(self, change: Transaction) -> None:
        """Writes everything that was collected.

        Args:
            change: records the current values.

        Raises:
            HotSwapError: a tensor of the slot has no data.
        """
        check_data([*self._zeros, *(target for target, _ in (*self._given, *self._from_base, *self._larger))])
        exchanged, copied = self._pairs()
        change.keep_values([*self._zeros, *(target for target, _ in copied)])
        change.keep_data(parameter for parameter, _ in self._larger)
        for _, adapter in self._adapters:
            keep_settings(adapter, change)
        if self._zeros:
            torch._foreach_zero_(self._zeros)
        if copied:
            torch._foreach_copy_([target for target, _ in copied], [source for _, source in copied])
        if exchanged:
            change.exchange([target for target, _ in exchanged], [source for _, source in exchanged])
        put_larger(self._larger)
        for pads in self._padded:
            pads.mark_padded()
        for path, adapter in self._adapters:
            configure(adapter, self.config, path)
        for adapter, layer in self._reset:
            adapter.reset_(layer.base)

    def _pairs(self) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Returns the (target, source) that can be exchanged, and those of which the source can only be copied."""
        if not self._consume:
            return [], [*self._from_base, *self._given]
        memory = [source.untyped_storage().data_ptr() for _, source in self._given]
        users = Counter(memory)
        exchanged: list[tuple[Tensor, Tensor]] = []
        copied = self._from_base.copy()
        for (target, source), place in zip(self._given, memory, strict=True):
            alike = target.dtype == source.dtype and target.device == source.device
            may = alike and users[place] == 1 and source.is_contiguous()
            (exchanged if may else copied).append((target, source))
        return exchanged, copied


def _listed(names: Iterable[str]) -> str:
    return few(names, 4, quoted=False)
