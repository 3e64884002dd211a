"""PEFT's commands on a single layer or module: ``layer.set_adapter("default")``, ``layer.enable_adapters(False)``.

The next command on the model overrides them.
"""

from __future__ import annotations

from collections.abc import Sequence

from nbpeft.engine.wrappers.extension import add_attributes
from nbpeft.engine.wrappers.wrapper import Wrapper


def one_or_all(names: list[str]) -> str | list[str]:
    """Returns the name if there is only one, else the list, as PEFT's ``active_adapter`` does."""
    return names[0] if len(names) == 1 else names


class PeftWrapper(Wrapper):
    """PEFT's commands on every wrapper."""

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activates adapters on this module and makes only them trainable; all other adapters here are frozen.

        Args:
            adapter_names: one name or several; names without an adapter here are ignored.
            inference_mode: freeze the active adapters too.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._activate_alone(names, enabled=True)
        for name, adapter in self._named().items():
            adapter.requires_grad_(name in names and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Enables or disables the adapters on this module; disabling also freezes them."""
        self._activate_alone(self.chosen_names(), enabled=enabled)
        for name, adapter in self._named().items():
            adapter.requires_grad_(enabled and name in self.chosen_names())

    @property
    def _active_adapter(self) -> str | list[str]:
        """PEFT's attribute for the active adapters; other libraries read and write it."""
        return one_or_all(self.chosen_names())

    @_active_adapter.setter
    def _active_adapter(self, names: str | Sequence[str]) -> None:
        self._activate_alone([names] if isinstance(names, str) else list(names), enabled=self.adapters_enabled)

    @property
    def _disable_adapters(self) -> bool:
        """PEFT's attribute for whether the active adapters are disabled; other libraries read and write it."""
        return not self.adapters_enabled

    @_disable_adapters.setter
    def _disable_adapters(self, disabled: bool) -> None:
        self._activate_alone(self.chosen_names(), enabled=not disabled)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes adapters on this module trainable or frozen, whether they are active or not.

        Args:
            adapter_names: one name or several; names without an adapter here are ignored.
            requires_grad: the ``requires_grad`` of their parameters.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self._named():
                self._named()[name].requires_grad_(requires_grad)


add_attributes(Wrapper, PeftWrapper)
