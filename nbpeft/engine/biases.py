"""Base biases trained along with an adapter (``bias="all"`` or ``"lora_only"``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nbpeft.engine.plan import walk
from nbpeft.engine.transaction import Transaction
from nbpeft.errors import ConfigError


class BaseBiases:
    """Which base biases belong to which adapter, and what they were before.

    They are the base model's own parameters, so only one adapter may train them, and disabling
    it does not bring the old values back; removing it does.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._originals: dict[str, dict[str, Tensor]] = {}

    def check(self, adapter: str, names: Sequence[str]) -> None:
        """Raises ConfigError if another adapter trains base biases already, or one has no data to train."""
        others = [other for other in self._originals if other != adapter]
        if names and others:
            raise ConfigError(
                f"only one adapter can train base biases and {others[0]!r} does: use bias='none' for {adapter!r}"
            )
        absent = next((name for name, bias in self._owners(names).items() if bias.is_meta), None) if names else None
        if absent is not None:
            raise ConfigError(f"{absent} has no data here (meta device): use bias='none', or load the model whole")

    def keep(self, change: Transaction) -> None:
        """Records whose biases are trained."""
        change.keep(self._originals)

    def start(
        self, adapter: str, names: Sequence[str], values: Mapping[str, Tensor] | None, change: Transaction
    ) -> None:
        """Makes biases trainable for an adapter, with loaded values where given."""
        if not names:
            return
        parameters = self._owners(names)
        change.keep_values(list(parameters.values()))
        self._originals[adapter] = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
        with torch.no_grad():
            for name, value in (values or {}).items():
                if name in parameters:
                    parameters[name].copy_(value)

    def stop(self, adapter: str, change: Transaction) -> None:
        """Puts the old values back."""
        originals = self._originals.pop(adapter, None)
        if originals is None:
            return
        parameters = self._owners(list(originals))
        change.keep_values(list(parameters.values()))
        change.set_requires_grad(parameters.values(), False)
        with torch.no_grad():
            for name, value in originals.items():
                parameters[name].copy_(value)

    def forget(self, adapter: str) -> None:
        """Keeps the trained values for good."""
        self._originals.pop(adapter, None)

    def rename(self, old: str, new: str) -> None:
        """Moves the record to another adapter name."""
        if old in self._originals:
            self._originals[new] = self._originals.pop(old)

    def of(self, adapter: str) -> dict[str, nn.Parameter]:
        """Name in the bare base model -> parameter, for an adapter."""
        names = list(self._originals.get(adapter, ()))
        return self._owners(names) if names else {}

    def _owners(self, names: Sequence[str]) -> dict[str, nn.Parameter]:
        wanted = set(names)
        found: dict[str, nn.Parameter] = {}
        places = [("", self._model), *((site.path, site.module) for site in walk(self._model))]
        for path, module in places:
            name = f"{path}.bias" if path else "bias"
            bias = module._parameters.get("bias")
            if name in wanted and bias is not None:
                found[name] = bias
        return found
