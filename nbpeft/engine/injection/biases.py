"""Tensors of the base that belong to an adapter: biases it trains, embeddings that its file brought."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.tree.model_tree import bare_modules
from nbpeft.errors import ConfigError


class BaseBiases:
    """Which tensors of the base belong to which adapter, and what they were before.

    They are the base model's own parameters: biases that train along (``bias="all"`` or
    ``"lora_only"``), which only one adapter may do, and others that a file brought, which stay
    frozen. Disabling an adapter does not bring the old values back; removing it does.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._originals: dict[str, dict[str, Tensor]] = {}
        self._trained: dict[str, tuple[str, ...]] = {}

    @property
    def are_trained(self) -> bool:
        """Whether an adapter trains some."""
        return bool(self._trained)

    def check(self, adapter: str, names: Collection[str]) -> None:
        """Raises ConfigError if another adapter trains base biases already, or one has no data to train."""
        others = [other for other in self._trained if other != adapter]
        if names and others:
            raise ConfigError(
                f"a model supports only 1 adapter with bias. When using multiple adapters, set bias='none' for "
                f"{adapter!r}: {others[0]!r} trains the biases"
            )
        absent = next((name for name, bias in self._owners(names).items() if bias.is_meta), None)
        if absent is not None:
            raise ConfigError(f"{absent} has no data here (meta device): use bias='none', or load the model whole")

    def keep(self, change: Transaction) -> None:
        """Records whose parameters of the base are taken."""
        change.keep_attributes(self, "_originals", "_trained")
        for originals in self._originals.values():
            change.keep(originals)

    def start(
        self, adapter: str, names: Collection[str], values: Mapping[str, Tensor] | None, change: Transaction
    ) -> None:
        """Takes parameters of the base for an adapter, with new values where given.

        Args:
            adapter: the adapter.
            names: biases it trains.
            values: name -> value, of those and of others, which stay frozen.
            change: records the parameters.
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
        """Puts the old values back; where a later adapter has put its own over them, it inherits the old ones."""
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
        """Keeps the new values for good."""
        self._originals.pop(adapter, None)
        self._trained.pop(adapter, None)

    def rename(self, old: str, new: str) -> None:
        """Moves the record to another adapter name, at the same place in the order."""
        self._originals = {new if name == old else name: kept for name, kept in self._originals.items()}
        if old in self._trained:
            self._trained[new] = self._trained.pop(old)

    def of(self, adapter: str) -> dict[str, nn.Parameter]:
        """Name in the bare base model -> bias that an adapter trains."""
        return self._owners(self._trained.get(adapter, ()))

    def originals(self, adapter: str) -> dict[str, Tensor]:
        """Name -> what was there before the adapter, of all that it took."""
        return dict(self._originals.get(adapter, {}))

    def present(self, adapter: str) -> dict[str, Tensor]:
        """Name -> what is there now, of all that an adapter took."""
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
