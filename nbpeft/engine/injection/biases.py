"""Parameters of the base model that belong to an adapter: biases that it trains, embeddings from its file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.tree.model_tree import bare_modules
from nbpeft.errors import ConfigError


class BaseBiases:
    """Which base parameters belong to which adapter, and their original values.

    These are biases that an adapter trains (``bias="all"`` or ``"lora_only"``), which only one adapter
    of a model may do, and parameters loaded from its file, which stay frozen. Disabling an adapter does
    not restore the original values; deleting it does.

    Args:
        model: the base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._originals: dict[str, dict[str, Tensor]] = {}
        self._trained: dict[str, tuple[str, ...]] = {}

    @property
    def are_trained(self) -> bool:
        """Whether an adapter trains biases of the base model."""
        return bool(self._trained)

    def check(self, adapter: str, names: Collection[str]) -> None:
        """Checks that an adapter can train biases.

        Args:
            adapter: its name.
            names: names of the biases.

        Raises:
            ConfigError: another adapter trains biases already, or a bias has no data.
        """
        others = [other for other in self._trained if other != adapter]
        if names and others:
            raise ConfigError(
                f"a model supports only 1 adapter with bias. When using multiple adapters, set bias='none' for "
                f"{adapter!r}: {others[0]!r} trains the biases"
            )
        absent = next((name for name, bias in self._owners(names).items() if bias.is_meta), None)
        if absent is not None:
            raise ConfigError(f"{absent} has no data (meta device): use bias='none', or load the whole model")

    def keep(self, change: Transaction) -> None:
        """Records which parameters belong to which adapter, so that a failure can restore it."""
        change.keep_attributes(self, "_originals", "_trained")
        for originals in self._originals.values():
            change.keep(originals)

    def start(
        self, adapter: str, names: Collection[str], values: Mapping[str, Tensor] | None, change: Transaction
    ) -> None:
        """Assigns base parameters to an adapter, and sets new values.

        Args:
            adapter: its name.
            names: names of the biases that it trains.
            values: name -> new value of these biases, and of further parameters, which stay frozen.
            change: records the old values.
        """
        parameters = self._owners([*names, *(values or {})])
        if not parameters:
            return
        change.keep_values(list(parameters.values()))
        self._originals[adapter] = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
        if names:
            self._trained[adapter] = tuple(name for name in names if name in parameters)
        with torch.no_grad():
            for name, value in (values or {}).items():
                if name in parameters:
                    parameters[name].copy_(value)

    def stop(self, adapter: str, change: Transaction) -> None:
        """Restores the original values of an adapter's parameters.

        If a later adapter has overwritten a parameter, the parameter is not changed, and the original value is passed
        on to the record of that adapter.

        Args:
            adapter: its name.
            change: records what is written.
        """
        adapters = list(self._originals)
        later = adapters[adapters.index(adapter) + 1 :] if adapter in adapters else []
        originals = self._originals.pop(adapter, {})
        trained = self._trained.pop(adapter, ())
        parameters = self._owners(originals)
        change.keep_values(list(parameters.values()))
        change.set_requires_grad([parameters[name] for name in originals if name in trained], False)
        with torch.no_grad():
            for name, value in originals.items():
                heir = next((self._originals[other] for other in later if name in self._originals[other]), None)
                if heir is not None:
                    heir[name] = value
                    continue
                parameters[name].copy_(value)

    def forget(self, adapter: str) -> None:
        """Makes the present values permanent."""
        self._originals.pop(adapter, None)
        self._trained.pop(adapter, None)

    def rename(self, old: str, new: str) -> None:
        """Renames an adapter; its position in the order does not change."""
        self._originals = {new if name == old else name: kept for name, kept in self._originals.items()}
        if old in self._trained:
            self._trained[new] = self._trained.pop(old)

    def of(self, adapter: str) -> dict[str, nn.Parameter]:
        """Name in the base model without adapters -> bias that an adapter trains."""
        return self._owners(self._trained.get(adapter, ()))

    def originals(self, adapter: str) -> dict[str, Tensor]:
        """Name -> original value of all parameters that belong to an adapter."""
        return dict(self._originals.get(adapter, {}))

    def present(self, adapter: str) -> dict[str, Tensor]:
        """Name -> present value of all parameters that belong to an adapter."""
        return {name: parameter.detach() for name, parameter in self._owners(self._originals.get(adapter, ())).items()}

    def _owners(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        wanted: dict[str, list[str]] = {}
        for name in names:
            path, _, key = name.rpartition(".")
            wanted.setdefault(path, []).append(key)
        found: dict[str, nn.Parameter] = {}
        for path, module in bare_modules(self._model) if wanted else ():
            for key in dict.fromkeys(wanted.get(path, ())):
                parameter = module._parameters.get(key)
                if parameter is not None:
                    found[f"{path}.{key}" if path else key] = parameter
        return found
