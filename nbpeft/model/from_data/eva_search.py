"""Incremental search for the input directions of EVA, and the ranks that follow from them."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.kernels.numerics import bytes_of
from nbpeft.engine.methods.lora.initialization.incremental_pca import IncrementalPCA
from nbpeft.errors import ConfigError, few
from nbpeft.model.from_data.observing import input_hooks

SEED = 42
"""Seed of the randomized decompositions, the same as in PEFT."""

LayerInputsFn = Callable[[Any, Any, str], Tensor]
"""(inputs of a layer, value prepared from the batch, name of the layer) -> rows (n, in)."""


class EvaSearch:
    """The principal components of each distinct input, and the resulting ranks of the layers.

    Args:
        modules: name -> path and layer.
        functions: name -> function that returns the rows to use.
        config: the adapter's config.
        rho: largest rank of a layer, as a multiple of its rank in the config.
        gather: gather the rows of all processes.
    """

    def __init__(
        self,
        modules: Mapping[str, tuple[str, nn.Module]],
        functions: Mapping[str, LayerInputsFn],
        config: Any,
        rho: float,
        *,
        gather: bool,
    ) -> None:
        self._modules = {name: module for name, (_, module) in modules.items()}
        self._functions, self._tau, self._gather = functions, config.eva_config.tau, gather
        own = {name: config.rank_at(path) for name, (path, _) in modules.items()}
        self._budget = sum(own.values())
        self._most = {name: round(rank * rho) for name, rank in own.items()}
        self._same: dict[str, str] = {}  # name -> first layer with the same input
        self._pca: dict[str, IncrementalPCA] = {}
        self._settled: dict[str, Tensor] = {}
        self._ranks: dict[str, int] = {}
        self._fitted = False
        self.model_input: Any = None

    @property
    def _sources(self) -> list[str]:
        return [name for name in self._modules if name not in self._same]

    @contextmanager
    def look_for_equal_inputs(self) -> Iterator[None]:
        """Registers hooks that find the layers with equal inputs, which then share one decomposition."""
        groups: dict[bytes, list[str]] = defaultdict(list)

        def see(name: str, rows: Tensor) -> None:
            shape = str(tuple(rows.shape)).encode()[:16]
            groups[hashlib.blake2b(bytes_of(rows), person=shape).digest()].append(name)

        with self._hooks(self._modules, see):
            yield
        for names in groups.values():
            most = max(self._most[name] for name in names)
            self._most.update(dict.fromkeys(names, most))
            self._same.update(dict.fromkeys(names[1:], names[0]))
        unseen = sorted(self._modules.keys() - {name for names in groups.values() for name in names})
        if unseen:
            raise ConfigError(f"the model's call did not reach {few(unseen)}: exclude these layers")
        for name in self._sources:
            options: dict[str, Any] = {"lowrank": True, "lowrank_seed": SEED}
            self._pca[name] = IncrementalPCA(self._most[name], **options)
            self._settled[name] = torch.zeros(self._most[name], dtype=torch.bool)
        self._ranks = dict(self._most)

    def _is_settled(self, name: str) -> bool:
        return bool(self._settled[name][: self._ranks[name]].all())

    @property
    def has_converged(self) -> bool:
        """Whether the directions that the current ranks need have converged."""
        return all(self._is_settled(name) for name in self._sources)

    @property
    def converged_count(self) -> int:
        """Number of layers whose directions have converged."""
        return sum(self._is_settled(self._same.get(name, name)) for name in self._modules)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Registers hooks that update the decomposition of each layer that has not converged."""
        open_ = {name: self._modules[name] for name in self._sources if not self._is_settled(name)}
        with self._hooks(open_, self._take):
            yield

    def _take(self, name: str, rows: Tensor) -> None:
        pca = self._pca[name]
        before = getattr(pca, "components_", None)
        if len(rows) < self._most[name]:
            return
        pca.partial_fit(rows.float())
        self._fitted = True
        if before is not None:
            self._settled[name] = torch.cosine_similarity(pca.components_, before) >= self._tau

    def check_pass(self) -> None:
        """Raises ConfigError if a pass over the data changed nothing, because no batch was large enough."""
        if not self._fitted:
            need = max(self._most.values())
            raise ConfigError(f"no batch has {need} tokens, which EVA needs for {need} directions: use larger batches")
        self._fitted = False

    def share_ranks(self) -> None:
        """Distributes the total rank over the layers' components with the largest explained variance."""
        if not all(hasattr(pca, "components_") for pca in self._pca.values()):
            return
        source = {name: name for name in self._sources} | self._same
        shares = [
            (name, share)
            for name, first in source.items()
            for share in self._pca[first].explained_variance_ratio_[: self._most[first]]
        ]
        order = torch.stack([share for _, share in shares]).argsort(descending=True)
        counts = Counter(shares[place][0] for place in order[: self._budget].tolist())
        self._ranks = {name: counts.get(name, 0) for name in source}
        for name, first in self._same.items():  # the decomposed layer needs the largest rank of its group
            if self._ranks[first] < self._ranks[name]:
                self._ranks[first], self._ranks[name] = self._ranks[name], self._ranks[first]

    def result(self, *, whiten: bool) -> dict[str, Tensor]:
        """Returns name -> directions (rank, in); ``whiten`` divides them by the square root of the singular values."""
        found: dict[str, Tensor] = {}
        for name, rank in self._ranks.items():
            pca = self._pca[self._same.get(name, name)]
            rows = pca.components_[:rank]
            found[name] = rows / pca.singular_values_[:rank].sqrt()[:, None] if whiten else rows.clone()
        return found

    def _hooks(
        self, modules: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]
    ) -> AbstractContextManager[None]:
        def see(name: str, args: tuple[Any, ...]) -> None:
            rows = self._functions[name](args, self.model_input, name)
            take(name, gathered(rows) if self._gather else rows)

        return input_hooks(modules, see)


def gathered(rows: Tensor) -> Tensor:
    """Returns the rows of all processes, or the rows unchanged without ``torch.distributed``."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, rows.cpu())
    return torch.cat([part.to(rows.device) for part in parts])
