"""``peft.tuners.lora.eva``: PEFT's forward hooks that decompose or compare the inputs of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.methods.lora.initialization.incremental_pca import IncrementalPCA
from nbpeft.errors import ConfigError
from nbpeft.model.from_data.eva import all_rows
from nbpeft.model.from_data.eva_search import SEED, LayerInputsFn, gathered


class _InputHook:
    """A forward hook that reads a layer's input.

    Args:
        name: name of the layer, for messages.
        prepare_layer_inputs_fn: returns the rows of the input to use; None for all.
        gather_distributed_inputs: use the rows of all processes.

    Attributes:
        model_input: second argument of ``prepare_layer_inputs_fn``; the caller sets it for each batch.
    """

    def __init__(
        self, name: str, prepare_layer_inputs_fn: LayerInputsFn | None = None, gather_distributed_inputs: bool = True
    ) -> None:
        self.name = name
        self.gather_distributed_inputs = gather_distributed_inputs
        self._prepare_layer_inputs_fn = prepare_layer_inputs_fn or all_rows
        self.model_input: Any = None

    def prepare_layer_inputs(self, layer_input: Any) -> Tensor:
        """Returns the rows of an input to use, (n, in)."""
        return self._prepare_layer_inputs_fn(layer_input, self.model_input, self.name)

    def gather_layer_inputs(self, layer_input: Tensor) -> Tensor:
        """Returns the rows of all processes."""
        return gathered(layer_input) if self.gather_distributed_inputs else layer_input


class SVDHook(_InputHook):
    """Updates the principal components of a layer's inputs in each forward; for ``register_forward_hook``.

    Args:
        n_components: number of components.
        sim_thresh: cosine similarity to its previous value from which a component counts as converged: one number, or
            (n_components,).
        **base_class_kwargs: ``name``, ``prepare_layer_inputs_fn`` and ``gather_distributed_inputs``.

    Attributes:
        svd: the decomposition.
        converged: which components have converged, bool (n_components,).

    Raises:
        ConfigError: ``sim_thresh`` has another shape.
    """

    def __init__(self, n_components: int, sim_thresh: float | Tensor, **base_class_kwargs: Any) -> None:
        super().__init__(**base_class_kwargs)
        shape = tuple(sim_thresh.shape) if isinstance(sim_thresh, Tensor) else ()
        if shape not in ((), (1,), (n_components,)):
            raise ConfigError(f"sim_thresh must be a number or have the shape ({n_components},), not {shape}")
        self.n_components, self.sim_thresh = n_components, sim_thresh
        self.svd = IncrementalPCA(n_components, lowrank=True, lowrank_seed=SEED)
        self.converged = torch.zeros(n_components, dtype=torch.bool)

    @torch.no_grad()
    def __call__(self, model: nn.Module, input: Any, output: Any) -> None:
        """Takes the input of a forward into the decomposition, if it has enough rows."""
        before = getattr(self.svd, "components_", None)
        rows = self.gather_layer_inputs(self.prepare_layer_inputs(input))
        if len(rows) < self.n_components:
            print(f"skipping SVD for {self.name} because there are less than {self.n_components} examples")
            return
        self.svd.partial_fit(rows.float())
        if before is not None:
            self.converged = torch.cosine_similarity(self.svd.components_, before) >= self.sim_thresh


class HashHook(_InputHook):
    """Hashes a layer's input in each forward, to find layers with equal inputs; for ``register_forward_hook``.

    Args:
        **base_class_kwargs: ``name``, ``prepare_layer_inputs_fn`` and ``gather_distributed_inputs``.

    Attributes:
        hashed_inputs: one hash for each forward.
    """

    def __init__(self, **base_class_kwargs: Any) -> None:
        super().__init__(**base_class_kwargs)
        self.hashed_inputs: list[int] = []

    @staticmethod
    def hash_fn(tensor: Tensor) -> int:
        """Returns the hash of a tensor's values."""
        return hash(tuple(tensor.reshape(-1).tolist()))

    @torch.no_grad()
    def __call__(self, model: nn.Module, input: Any, output: Any) -> None:
        """Adds the hash of the input of a forward."""
        self.hashed_inputs.append(self.hash_fn(self.gather_layer_inputs(self.prepare_layer_inputs(input))))
