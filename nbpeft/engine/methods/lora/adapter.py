"""Base class of the methods whose weights are two low-rank factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter import (
    Adapter,
    AdapterSite,
    ChangesBase,
    HotSwaps,
    InitialComponent,
    MeasuresDelta,
    Paddable,
    QuantizationAware,
    Rescales,
    ShowsModules,
    WeightInitialized,
    norm_of_delta,
    source_of,
)
from nbpeft.engine.contract.base import BaseLayer, Composite, LayerKind, Shape, Shapes
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.kernels.numerics import widened
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.initialization.decompositions import nearest_product
from nbpeft.engine.methods.lora.initialization.inits import (
    RANDOM,
    Factors,
    Start,
    check_init,
    init_factors,
    start_of,
)
from nbpeft.engine.methods.lora.low_rank import FactorShapes, LowRank, low_rank_of
from nbpeft.engine.methods.lora.peft_modules import AdapterDropout, factor_module
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import ConfigError

MAGNITUDE = "lora_magnitude_vector"
"""DoRA's parameter in addition to the factors."""

_INITIAL = ("init_A", "neg_init_B")
_ENERGY = 0.9
"""``delta_size`` counts the singular values that make up this share of ‖Δ‖²."""


@torch.no_grad()
def reset_factors(adapted: AdaptedLayer, adapter_name: str, init_lora_weights: bool | str) -> None:
    """Reinitializes the factors of an adapter on one layer in place; as in PEFT, DoRA's magnitude is unchanged.

    Args:
        adapted: the layer with its adapters.
        adapter_name: the adapter; ignored if the layer does not have it.
        init_lora_weights: as in ``LoraConfig``; False leaves the factors unchanged.

    Raises:
        ConfigError: the adapter is, or would be, initialized from the weight.
    """
    layer, adapter = adapted.base, adapted._named().get(adapter_name)
    if init_lora_weights is False or not isinstance(adapter, LowRankAdapter) or source_of(adapter) is not None:
        return
    config = LoraConfig(r=adapter.rank, init_lora_weights=init_lora_weights)
    check_init(config, "the layer", layer.module, layer.kind)
    if config.initialised_from_weight or adapter.initial is not None or config.init_name == "mica":
        raise ConfigError(
            "an adapter that starts in the weight cannot be reset on a layer: delete it and add it again",
            field="init_lora_weights",
        )
    parameters = {name: parameter for name, parameter in adapter.named_parameters() if name != MAGNITUDE}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    site = AdapterSite("", layer, shapes, adapter.trained_factors[0].dtype)
    for name, value in init_factors(config, site, None, are_new=False).items():
        parameters[name].copy_(value)


def update_layer(
    adapted: AdaptedLayer, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any
) -> None:
    """Replaces the factors of an adapter on one layer; as in PEFT's layers, but the saved config includes the change.

    An adapter that the model does not have is added on this layer only, and is not active.

    Args:
        adapted: the layer with its adapters.
        adapter_name: the adapter.
        r: its rank on this layer.
        lora_alpha: its alpha on this layer.
        config: the other settings: init, dropout, rsLoRA. Its targets and patterns are ignored.
        **kwargs: ignored; accepted as in PEFT.

    Raises:
        ConfigError: the config is not a ``LoraConfig``, or one config cannot express both it and the adapter's own.
        MergeError: the adapter is merged.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"update_layer takes a LoraConfig, not a {type(config).__name__}")
    if r <= 0:
        raise ConfigError(f"`r` should be a positive integer value but the value passed is {r}", field="r")
    here = config.copy(r=r, lora_alpha=lora_alpha, rank_pattern={}, alpha_pattern={})
    adapted._commands().rebuild(adapted, adapter_name, here)


class LowRankAdapter(
    Adapter,
    Rescales,
    Paddable,
    ChangesBase,
    ShowsModules,
    WeightInitialized,
    QuantizationAware,
    MeasuresDelta,
    HotSwaps,
):
    """Two factors A and B whose product, times a scaling, is added to a weight.

    Args:
        tensors: parameter name -> tensor.
        kind: the kind of layer.
        config: the adapter's config.
        path: path of the layer.
        start: the initial factors; their product is subtracted if it is a component of the weight.

    Attributes:
        scaling: factor on the product; a 0-d tensor once the model is prepared for compiled hot-swapping.
        dropout: dropout probability of the adapter's input.
        alpha: the config's alpha for the layer.
        use_rslora: whether the scaling is alpha / sqrt(r).
        padded: whether the factors have more rows than the adapter uses, filled with zeros.
        started_as: the init that computed the trained component of the weight; empty if there is none.
    """

    low_rank: LowRank
    scaling: float | Tensor
    dropout: float
    alpha: float
    use_rslora: bool
    padded: bool
    started_as: str
    _remembered: tuple[Any, str]
    _start: Start = RANDOM

    peft: ClassVar[PeftNames] = PeftNames(
        f"lora_A lora_B lora_embedding_A lora_embedding_B {MAGNITUDE}",
        "r lora_alpha scaling lora_dropout use_dora use_rslora lora_bias",
        wrapped=("lora_A", "lora_B", MAGNITUDE),
        modules=("lora_dropout",),
        mappings=(*("lora_dropout", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", MAGNITUDE),),
        attributes={
            "r": "rank",
            "lora_alpha": "alpha",
            "use_dora": "reads_weight",
            "use_rslora": "use_rslora",
            "lora_bias": "has_bias",
        },
        functions={
            "reset_lora_parameters": reset_factors,
            "update_layer": update_layer,
        },
    )
    from_config: ClassVar[Mapping[str, str]] = {
        "scaling": "scaling_at",
        "dropout": "dropout",
        "alpha": "alpha_at",
        "use_rslora": "use_rslora",
        "is_quantization_aware": "is_quantization_aware",
    }

    @classmethod
    def parameter_shapes(cls, config: LoraConfig, path: str, module: Any, kind: LayerKind) -> Shapes:
        """A and B."""
        low_rank = low_rank_of(kind)
        return dict(zip(low_rank.factor_names, low_rank.shapes(module, config.rank_at(path)), strict=True))

    @classmethod
    def drawn_tensors(cls, config: LoraConfig, site: AdapterSite, initial: Factors | None) -> dict[str, Tensor]:
        """The tensors of a new adapter by name, with factors from ``start_of`` unless they are random."""
        return init_factors(config, site, initial)

    @classmethod
    def create(cls, config: LoraConfig, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        start = start_of(config, site, is_new=tensors is None)
        given = cls.drawn_tensors(config, site, start.factors) if tensors is None else tensors
        made = cls({name: given[name] for name in site.shapes}, site.base.kind, config, site.path, start)
        made.prepare(config, site, given)
        return made

    def __init__(
        self, tensors: Mapping[str, Tensor], kind: LayerKind, config: Any, path: str, start: Start = RANDOM
    ) -> None:
        super().__init__()
        self.bind(
            tensors,
            low_rank=low_rank_of(kind),
            padded=False,
            loses_start=start.is_from_data,
            started_as=start.init,
            **self._config_values(config, path),
        )
        if start.remembered is not None:
            self.bind(_remembered=(start.remembered, path))
        if start.quantized is not None or start.found:
            self.bind(_start=start)
        if start.is_subtracted and start.factors is not None:
            for name, tensor in zip(_INITIAL, (start.factors[0], -start.factors[1]), strict=True):
                self.register_buffer(name, tensor, persistent=False)

    def change_base(self, base: BaseLayer, change: Transaction) -> None:
        """Stores LoftQ's quantized weight, and deletes CorDA's and LoRA-GA's data on the layer."""
        start = self._start
        if start is RANDOM:
            return
        self.bind(_start=RANDOM)
        if start.found:
            change.keep_attributes(base.module, start.found)
            vars(base.module).pop(start.found, None)
        if start.quantized is not None:
            snapshot = base.backend.snapshot(base.module)
            change.on_undo(lambda: base.backend.restore(base.module, snapshot))
            base.backend.store(base.module, start.quantized.dequantize())

    @property
    def factor_names(self) -> tuple[str, str]:
        """Names of A and B."""
        return self.low_rank.factor_names

    @property
    def initial(self) -> tuple[Tensor, Tensor] | None:
        """A0 and -B0 if the adapter was initialized from a component of the weight, else None."""
        name_A, name_B = _INITIAL
        init_A, neg_init_B = self._buffers.get(name_A), self._buffers.get(name_B)
        return None if init_A is None or neg_init_B is None else (init_A, neg_init_B)

    @property
    def taken_over(self) -> InitialComponent | None:
        if self.initial is None:
            return None
        return InitialComponent(*self.initial, self.started_as, self.factor_names)

    def take_out_(self, weight: Tensor) -> None:
        assert self.initial is not None
        init_A, neg_init_B = map(widened, self.initial)
        weight.copy_(widened(weight) + self.trained_scaling * (neg_init_B @ init_A))

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B whose product is added to the weight; of twice the trained rank if there is an ``initial``."""
        lora_A, lora_B = self.own_factors
        if self.initial is None:
            return lora_A, lora_B
        init_A, neg_init_B = self.initial
        return torch.cat([lora_A, init_A]), torch.cat([lora_B, neg_init_B], 1)

    @property
    def own_factors(self) -> tuple[Tensor, Tensor]:
        """A and B without ``initial``: the parameters, or in subclasses differentiable functions of them."""
        return self.trained_factors

    @property
    def computes_factors(self) -> bool:
        """Whether ``own_factors`` are not the parameters themselves."""
        return any(own is not trained for own, trained in zip(self.own_factors, self.trained_factors, strict=True))

    @property
    def trained_factors(self) -> tuple[Tensor, Tensor]:
        """A and B, the parameters."""
        name_A, name_B = self.factor_names
        return self.tensor(name_A), self.tensor(name_B)

    @property
    def detached_factors(self) -> tuple[Tensor, Tensor]:
        """A and B, detached."""
        lora_A, lora_B = self.factors
        return lora_A.detach(), lora_B.detach()

    @property
    def rank(self) -> int:
        """Rows of A, padding included."""
        return int(self.tensor(self.factor_names[0]).shape[0])

    @property
    def has_bias(self) -> bool:
        """Whether B has a bias."""
        return self.tensor(f"{self.factor_names[1]}_bias", optional=True) is not None

    def peft_module(self, name: str, base: BaseLayer) -> nn.Module | None:
        if name in self.peft.modules:
            return AdapterDropout(self)
        if name not in self.factor_names:
            return None
        return factor_module(base, tuple(self.tensor(name).shape), is_first=name == self.factor_names[0])

    @property
    def delta_rank(self) -> int | None:
        return int(self.factors[0].shape[0])

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``s * B A``, shaped like the canonical weight."""
        return self.low_rank.product(base.module, *self.detached_factors) * self.scaling

    def delta_size(self, weight: Tensor, base: BaseLayer) -> tuple[float, int | None]:
        """Computes the norm of the change from the factors, without building their product."""
        if self.reads_weight or weight.ndim != 2:
            return norm_of_delta(self, weight, base), None
        lora_A, lora_B = map(widened, self.detached_factors)
        core = torch.linalg.qr(lora_B).R @ torch.linalg.qr(lora_A.T).R.T
        energies = torch.linalg.svdvals(core * float(self.scaling)).square()
        total = float(energies.sum())
        reached = energies.cumsum(0) >= _ENERGY * total
        return total**0.5, (int(reached.int().argmax()) + 1 if total > 0 else 0)

    def row_scale(self, base: BaseLayer) -> Tensor | None:
        """The factor (out,) on the rows of the adapted weight ``W + s B A``, detached; None means 1."""
        return None

    def shapes_with_start(self) -> Shapes:
        """Shapes of its tensors in a file that also contains the initial component."""
        (name_A, name_B), (lora_A, lora_B) = self.factor_names, self.factors
        own = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        return own | {name_A: tuple(lora_A.shape), name_B: tuple(lora_B.shape)}

    def split_start(self, tensors: Mapping[str, Tensor], change: Transaction) -> dict[str, Tensor]:
        """Sets the initial component from a file's tensors, and returns the parameters'."""
        (name_A, name_B), (init_A, neg_init_B) = self.factor_names, self.initial or self.trained_factors
        rank = self.rank
        change.keep(self._buffers)
        whole_A, whole_B = tensors[name_A], tensors[name_B]
        start = whole_A[rank:].to(init_A), whole_B[:, rank:].to(neg_init_B)
        self._buffers.update(zip(_INITIAL, start, strict=True))
        remembered, path = self._remembered
        change.keep(remembered)
        remembered[path] = (start[0], -start[1])
        return {**tensors, name_A: whole_A[:rank], name_B: whole_B[:, :rank]}

    @torch.no_grad()
    def approximate_(self, delta: Tensor, base: BaseLayer) -> None:
        """Sets the factors so that their product is as close as their rank allows to a change of the weight.

        Args:
            delta: shaped like the canonical weight, of a linear layer or an embedding.
            base: the layer.
        """
        scaling = float(self.scaling)
        factors = nearest_product(delta if scaling > 0 else -delta, self.rank)
        for factor, value in zip(self.trained_factors, factors, strict=True):
            factor.copy_(value / abs(scaling) ** 0.5)
        self.set_row_scale_(None, base)

    def started_at(self, directions: Tensor) -> dict[str, Tensor]:
        """Factors with A set to some directions of the input, (rank, in), and B zero."""
        (name_A, name_B), lora_B = self.factor_names, self.trained_factors[1]
        return {name_A: directions.to(lora_B), name_B: lora_B.new_zeros(lora_B.shape[0], len(directions))}

    def set_row_scale_(self, row_scale: Tensor | None, base: BaseLayer) -> None:
        """Sets the factor of ``row_scale``, if the method has one."""

    def unmergeable_reason(self, base: BaseLayer) -> str:
        return self.low_rank.no_product_reason(base.module)

    @classmethod
    def config_warnings(cls, config: Any, modules: Sequence[tuple[str, nn.Module, LayerKind]]) -> Iterable[str]:
        """Warns about layers on which the adapter cannot be merged."""
        bare = [path for path, module, _ in modules if getattr(module, "bias", None) is None]
        if config.lora_bias and bare:
            layer = next(type(module).__name__ for path, module, _ in modules if path == bare[0])
            more = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
            yield (
                f"`lora_bias=True` was passed but the targeted layer of type {layer} has no bias: the adapter "
                f"cannot be merged at {bare[0]}{more}"
            )
        inside = [path for path, _, kind in modules if isinstance(kind, Composite)]
        if config.lora_dropout and inside:
            yield f"lora_dropout={config.lora_dropout:g} does not act at {inside[0]}: adapters there change the weights"
        for path, module, kind in modules:
            refusal = low_rank_of(kind).no_product_reason(module)
            if refusal:
                yield f"{path} cannot be merged: it is {refusal}"
                return

    # Saving and swapping

    def saved_tensors(self, shapes: Callable[[], Mapping[str, Shape]]) -> dict[str, Tensor]:
        """Its parameters without padding: views, but a copy of the A of a grouped convolution."""
        tensors = super().saved_tensors(shapes)
        if not self.padded:
            return tensors
        unpadded = {key: shape for key, shape in shapes().items() if key in tensors}
        return tensors | {key: self.used_part(key, tensors[key], to)[0].reshape(to) for key, to in unpadded.items()}

    @property
    def _groups(self) -> int:
        """Groups of a convolution: each has its own rows of A, which B uses."""
        lora_A, lora_B = self.trained_factors
        return int(lora_A.shape[0] // lora_B.shape[1])

    @property
    def room(self) -> int:
        return self.rank

    @classmethod
    def size_of(cls, shapes: Mapping[str, Shape]) -> int | None:
        """The rank of an adapter with these shapes: the number of rows of A, which comes first."""
        return next(iter(shapes.values()))[0]

    def used_part(self, key: str, tensor: Tensor, shape: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The A of a grouped convolution has one block of rows for each group, and each block is padded."""
        if tensor.shape == tuple(shape) or key not in self.factor_names:
            return tensor, []
        if key == self.factor_names[1]:
            return tensor[:, : shape[1]], [tensor[:, shape[1] :]]
        groups = self._groups
        if groups == 1:
            return tensor[: shape[0]], [tensor[shape[0] :]]
        blocks = tensor.view(groups, tensor.shape[0] // groups, *tensor.shape[1:])
        return blocks[:, : shape[0] // groups], [blocks[:, shape[0] // groups :]]

    def shapes_at(self, size: int, base: BaseLayer) -> FactorShapes:
        """Shapes of A and B for a rank."""
        return self.low_rank.shapes(base.module, size)

    def enlarged(self, size: int, base: BaseLayer) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yields the factors' parameters, each with its values padded with zeros to a rank."""
        for key, shape in zip(self.factor_names, self.shapes_at(size, base), strict=True):
            parameter = self.get_parameter(key)
            larger = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
            used, _ = self.used_part(key, larger, tuple(parameter.shape))
            used.copy_(parameter.detach().reshape(used.shape))
            yield parameter, larger

    def mark_padded(self) -> None:
        self.padded = True

    def swap_refusal(self) -> str:
        return "" if self.initial is None else "started in a part of the base weights"

    def keep_settings(self, change: Transaction) -> None:
        change.keep_attributes(self, "padded")
