"""ModulesToSaveWrapper: a module trained as a whole, once per adapter (``modules_to_save``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.active_state import ActiveState, LayerState, ReplicaState, RowAssignment
from nbpeft.engine.views.part_modules import AdapterDict
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.engine.wrappers.row_order import check_row_order
from nbpeft.engine.wrappers.wrapper import Wrapper
from nbpeft.errors import AdapterError, LayerKindError


class ModulesToSaveWrapper(Wrapper):
    """A frozen module and its trained copies by adapter name.

    Calls and attributes go to the copy of the active adapter, or to the original module if no
    active adapter has a copy.

    Attributes:
        original_module: the frozen module.
        modules_to_save: adapter name -> trained copy.
    """

    original_module: nn.Module
    modules_to_save: AdapterDict

    def __init__(self, original_module: nn.Module, active_state: ActiveState, *, training: bool = False) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = AdapterDict()
        self.__dict__["active_state"] = active_state
        self.training = training or original_module.training

    active_state: ActiveState | LayerState

    def _named(self) -> dict[str, Any]:
        return self.modules_to_save._modules

    def chosen(self) -> nn.Module:
        """The module that calls go to now.

        Raises:
            AdapterError: more than one active adapter has a copy here.
        """
        return self.copy_of(self.active_state.current().names)

    def copy_of(self, names: Sequence[str]) -> nn.Module:
        """The copy of one of some adapters, or the original module if none of them has one.

        Raises:
            AdapterError: more than one of these adapters has a copy here.
        """
        copies = self.modules_to_save._modules
        having = [name for name in names if name in copies]
        if len(having) > 1:
            raise AdapterError(
                f"adapters {' and '.join(map(repr, having))} each trained their own copy of a "
                f"{type(self.original_module).__name__}; only one of them can be active"
            )
        module = copies[having[0]] if having else self.original_module
        assert module is not None
        return module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the copy of the active adapter, or the original module."""
        active = self.active_state.current()
        if active.rows is None:
            return self.chosen()(*args, **kwargs)
        return self._mixed(active.rows, *args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        replica.__dict__["active_state"] = ReplicaState(self.active_state)
        return replica

    def _mixed(self, rows: RowAssignment, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The output for a mixed batch ``x``, in which each row has the copy of its own adapter."""
        copies: Any = self.modules_to_save._modules
        present = [name for name in rows.names if name in copies]
        if present and isinstance(x, Tensor):
            check_row_order(rows, rows.broadcast(x), self)
        if self.training and isinstance(x, Tensor) and len(x) % len(rows.index) == 0:
            runs = [(copies.get(name, self.original_module), run) for name, run in rows.runs(len(x))]
            return torch.cat([module(x[run], *args, **kwargs) for module, run in runs])
        result = self.original_module(x, *args, **kwargs)
        if not (isinstance(result, Tensor) and isinstance(x, Tensor)):
            raise LayerKindError(
                f"adapter_names is not supported for a {type(self.original_module).__name__} trained as a whole: "
                "its input and output are not single tensors; use a separate batch for each adapter"
            )
        if not present:
            return result
        x, result = rows.broadcast(x.to(result.device)), rows.broadcast(result).clone()
        for name in present:
            chosen = rows.rows_of(name, x.shape[0], x.device)
            if len(chosen):
                result[chosen] = self.modules_to_save[name](x[chosen], *args, **kwargs).to(result.dtype)
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # private attributes, such as accelerate's _hf_hook, are not shared
            if "original_module" not in self.__dict__.get("_modules", {}) or name.startswith("_"):
                raise
        return getattr(self.chosen(), name)


def only_holds(wrapper: AdaptedLayer | ModulesToSaveWrapper | None, name: str | None) -> bool:
    """Whether a wrapper has exactly one adapter, with this name.

    Args:
        wrapper: the wrapper, or None.
        name: name of the adapter.
    """
    if wrapper is None:
        return False
    entries = wrapper.adapters if isinstance(wrapper, AdaptedLayer) else wrapper.modules_to_save
    return tuple(entries._modules) == (name,)
