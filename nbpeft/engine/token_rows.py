"""Trainable rows of an embedding, for tokens that are new or mean something new.

    y = E'[ids]        E' is E with the rows of some tokens replaced by trained ones

The trained rows are stored whole, not as differences, so they mean the same on a base whose rows
of new tokens were drawn anew. They start as the base's rows. An output head that shares the
embedding's weight follows it: it has the trained rows too, and no tensors of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.adapter import Adapter, Base, Host

ROWS = "trainable_tokens_delta"


@dataclass(frozen=True)
class TokenRowsConfig:
    """What one module's trained rows need.

    Attributes:
        indices: the rows.
    """

    indices: tuple[int, ...]


class TokenRows(Adapter):
    """Trained rows of one embedding or of the head that shares its weight.

    Attributes:
        source: the adapter that has the rows, where this one only follows it.
    """

    adds_itself: ClassVar[bool] = True
    weight_free: ClassVar[bool] = False
    shares_rows: ClassVar[bool] = True

    token_indices: Tensor
    sorted_indices: Tensor
    order: Tensor

    def __init__(self, indices: tuple[int, ...], tensors: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__()
        self._parameters.update({name: nn.Parameter(tensor) for name, tensor in tensors.items()})
        self.__dict__["source"] = None
        rows = torch.tensor(indices, dtype=torch.long, device=None if device.type == "meta" else device)
        ordered, order = rows.sort()
        for name, tensor in (("token_indices", rows), ("sorted_indices", ordered), ("order", order)):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def parameter_shapes(
        cls, config: TokenRowsConfig, path: str, module: nn.Module, host: Host
    ) -> dict[str, tuple[int, ...]]:
        inside, outside = host.features(module)
        return {ROWS: (len(config.indices), outside if host.name == "embedding" else inside)}

    @classmethod
    def create(
        cls,
        config: TokenRowsConfig,
        path: str,
        base: Base,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Mapping[str, Tensor] | None,
        dtype: torch.dtype,
    ) -> Self:
        if tensors is None:
            rows = torch.tensor(config.indices, dtype=torch.long, device=base.device)
            tensors = {name: _table(base.weight(), base)[rows].to(dtype) for name in shapes}
        adapter = cls(config.indices, tensors, base.device)
        adapter.__dict__["home"] = base
        return adapter

    def follow(self, source: Adapter) -> None:
        """Takes the rows of another adapter from now on."""
        self.__dict__["source"] = source

    @property
    def rows(self) -> Tensor:
        """The trained rows, (tokens, features)."""
        rows = (self.__dict__["source"] or self).held[ROWS]
        assert isinstance(rows, Tensor)
        return rows.to(self.token_indices.device)

    def merged_elsewhere(self, base: Base) -> bool:
        source = self.__dict__["source"]
        if source is None:
            return False
        home: Base = source.__dict__["home"]
        return base.weight().data_ptr() == home.weight().data_ptr()

    def forward(self, x: Tensor, base_output: Tensor, base: Base, whole: bool = False) -> Tensor:
        rows = self.rows
        frozen = _table(base.weight(), base)[self.token_indices]
        change = rows - frozen.to(rows.dtype)
        if base.host.name == "embedding":
            delta = self._looked_up(x, change, base)
            return (base_output + delta).to(base_output.dtype) if whole else delta
        columns = F.linear(x.to(change.dtype), change)
        if not whole:
            return torch.zeros_like(base_output, dtype=columns.dtype).index_copy(-1, self.token_indices, columns)
        total = base_output.index_select(-1, self.token_indices) + columns
        return base_output.index_copy(-1, self.token_indices, total.to(base_output.dtype))

    def _looked_up(self, ids: Tensor, change: Tensor, base: Base) -> Tensor:
        place = torch.searchsorted(self.sorted_indices, ids).clamp_max(len(self.sorted_indices) - 1)
        hit = (self.sorted_indices[place] == ids).unsqueeze(-1)
        host: Any = base.host
        delta: Tensor = F.embedding(self.order[place], change) * hit * host.output_scale(base.module, change.dtype)
        return delta

    def delta_weight(self, weight: Tensor, base: Base) -> Tensor:
        delta = torch.zeros_like(weight)
        rows = self.rows.detach().to(weight.dtype)
        _table(delta, base)[self.token_indices] = rows - _table(weight, base)[self.token_indices]
        return delta

    def add_to_(self, weight: Tensor, base: Base, scale: float) -> None:
        table = _table(weight, base)
        frozen = table[self.token_indices]
        rows = self.rows.detach().to(weight.dtype)
        table[self.token_indices] = rows if scale == 1.0 else frozen + (rows - frozen) * scale

    def extra_repr(self) -> str:
        return f"tokens={len(self.token_indices)}"


def _table(weight: Tensor, base: Base) -> Tensor:
    """A canonical weight as (tokens, features), sharing its memory."""
    return weight.T if base.host.name == "embedding" else weight
