"""KappaTune: adapts the layers with the best conditioned weights, and leaves specialized layers unchanged.

The condition number of a weight is its largest divided by its smallest singular value. A weight with a low one treats
all input directions alike, so that it can learn something new without losing what it knows.

Reference: https://arxiv.org/abs/2506.16289
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from nbpeft._util.interrupts import check_interrupt
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.registry import resolve_backend, resolve_layer_kind
from nbpeft.model.from_data.observing import progress

_EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
"""Suffixes of the names of parameters with the weights of all experts, (experts, in, out) or (experts, out, in)."""
_SMALLEST = 1e-8
"""Added to the smallest singular value to avoid division by zero."""


class KappaTuneSelector:
    """Selects the linear layers and experts of a model with the lowest condition numbers.

    The condition numbers are computed on first use, from the singular values of each weight in float32. This takes
    minutes for billions of parameters.

    Args:
        model: the model, dense or quantized.
        max_dim_size_to_analyze: weights with a longer side are skipped.
        moe_param_suffixes: suffixes of the names of expert parameters; None for the usual ones.
        show_progress: show a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = moe_param_suffixes or _EXPERTS
        self.show_progress = show_progress
        self._found: tuple[dict[str, float], dict[str, float]] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Returns paths of linear layers for ``target_modules``, best conditioned first.

        Args:
            top_p: share of the layers to select, from 0 to 1.
            num_modules: number of layers to select; takes precedence over ``top_p``.
            threshold: largest condition number; used only if the other two are None.
        """
        return _lowest(self._kappas()[0], top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Returns names of expert parameters for ``target_parameters``, by the mean condition number of the experts.

        Args:
            top_p: share of the parameters to select, from 0 to 1.
            num_modules: number of parameters to select; takes precedence over ``top_p``.
            threshold: largest condition number; used only if the other two are None.
        """
        return _lowest(self._kappas()[1], top_p, num_modules, threshold)

    @torch.no_grad()
    def _kappas(self) -> tuple[dict[str, float], dict[str, float]]:
        """Returns condition numbers: path -> value for linear layers, name -> value for expert parameters."""
        if self._found is None:
            layers = {path: layer for path, layer in self.model.named_modules() if isinstance(layer, nn.Linear)}
            experts = {
                name: parameter
                for name, parameter in self.model.named_parameters()
                if name.endswith(tuple(self.moe_param_suffixes)) and parameter.ndim == 3
            }
            with progress(len(layers) + len(experts), "KappaTune: weights seen", show=self.show_progress) as report:
                of_layers: dict[str, float] = {}
                of_experts: dict[str, float] = {}
                for path, layer in layers.items():
                    report(len(of_layers))
                    self._add(of_layers, path, [_weight(layer)])
                for name, parameter in experts.items():
                    report(len(of_layers) + len(of_experts))
                    self._add(of_experts, name, parameter.detach())
            self._found = of_layers, of_experts
        return self._found

    def _add(self, kappas: dict[str, float], name: str, weights: Sequence[Tensor] | Tensor) -> None:
        """Adds the mean condition number of weights of equal shape, unless they are too large."""
        if max(weights[0].shape) <= self.max_dim_size_to_analyze:
            found = list(map(_condition_number, weights))
            kappas[name] = sum(found) / len(found)


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Finds the best conditioned layers of a model, as fields of ``LoraConfig``.

    Args:
        model: the model, dense or quantized.
        top_p: share of the layers, and of the expert parameters, to select.
        max_dim_size_to_analyze: weights with a longer side are skipped.
        moe_param_suffixes: suffixes of the names of expert parameters; None for the usual ones.
        show_progress: show a progress bar.

    Returns:
        ``target_modules``, and ``target_parameters``, which is None if the model has no experts.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }


def _weight(layer: nn.Linear) -> Tensor:
    """Returns the weight (out, in), dequantized."""
    kind, backend = resolve_layer_kind(layer), resolve_backend(layer)
    return layer.weight.detach() if kind is None or backend is None else BaseLayer(layer, kind, backend).weight()


def _condition_number(weight: Tensor) -> float:
    check_interrupt()  # a large weight takes a minute
    values = torch.linalg.svdvals(weight.float())
    return float(values[0] / (values[-1] + _SMALLEST))


def _lowest(kappas: Mapping[str, float], top_p: float | None, count: int | None, threshold: float | None) -> list[str]:
    order: Iterable[str] = sorted(kappas, key=kappas.__getitem__)
    names = list(order)
    if count is not None:
        return names[:count]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return names if threshold is None else [name for name in names if kappas[name] <= threshold]
