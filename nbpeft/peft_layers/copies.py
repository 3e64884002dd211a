"""PEFT's attributes and methods of modules that are trained as a whole (``modules_to_save``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbpeft.engine.wrappers.extension import add_attributes
from nbpeft.engine.wrappers.modules_to_save import ModulesToSaveWrapper
from nbpeft.engine.wrappers.wrapper import Wrapper
from nbpeft.peft_layers.classes import refuse_pickle_of_peft
from nbpeft.peft_layers.commands import PeftWrapper, one_or_all


class PeftCopies(ModulesToSaveWrapper):
    """PEFT's attributes of a module with trained copies."""

    adapter_layer_names = ("modules_to_save",)
    other_param_names = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "active_state" not in state:
            refuse_pickle_of_peft(self, state)
        Wrapper.__setstate__(self, state)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes the copy of an adapter active and trainable; the other copies are frozen.

        Args:
            adapter_names: one name or several, of which at most one has a copy here.
            inference_mode: freeze that copy too.

        Raises:
            AdapterError: more than one of these adapters has a copy here.
        """
        self.copy_of([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        PeftWrapper.set_adapter(self, adapter_names, inference_mode)  # type: ignore[arg-type]

    @property
    def _adapters(self) -> set[str]:
        """Names of the adapters that have a copy; other libraries read it."""
        return set(self._named())

    def _get_available_adapters(self) -> set[str]:
        """Returns the names of the adapters that have a copy."""
        return self._adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether no adapter is active in the model."""
        return not self.active_state.current().names

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter that has a copy here, even if adapters are disabled; an empty list without one."""
        return one_or_all(self.active_adapters)

    @property
    def active_adapters(self) -> list[str]:
        """Name of the active adapter that has a copy here, as a list."""
        return [name for name in self.chosen_names() if name in self._named()]

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Returns key in an adapter's file -> key in the state dict, both below this module; transformers reads it."""
        copy = self._named().get(adapter_name)
        return {} if copy is None else {key: f"modules_to_save.{adapter_name}.{key}" for key in copy.state_dict()}


add_attributes(ModulesToSaveWrapper, PeftCopies)
