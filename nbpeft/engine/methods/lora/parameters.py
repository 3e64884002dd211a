"""LoRA on a bare parameter (``target_parameters``): the experts of a mixture, each with its own factors.

    W_e + s * B_e A_e        A (experts * r, in), B (out, r * experts), as in PEFT's files

A contains the rows of one expert after those of another; in B their columns are interleaved. Dropout applies to the
input of an expert's A, if the module is known to do nothing but multiply; PEFT, which changes the weight, refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from nbpeft.engine.contract.adapter import AdapterSite, MergesInPlace, NotConvertible
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shape, Shapes
from nbpeft.engine.layer_kinds.parameter import ParameterView
from nbpeft.engine.methods.lora.adapter import LowRankAdapter
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.low_rank import LowRankParameter, add_product_
from nbpeft.engine.wrappers.factored_weight import AdaptsParameters, Product
from nbpeft.engine.wrappers.parameter_layer import only_multiplies
from nbpeft.errors import ConfigError


class ParameterLoRA(LowRankAdapter, AdaptsParameters, MergesInPlace, NotConvertible):
    """A LoRA adapter on one parameter of 2 or 3 dimensions.

    Attributes:
        count: number of matrices in the parameter.
    """

    unconvertible: ClassVar[str] = "bare parameters (target_parameters) have a LoRA of their own"
    count: int
    low_rank: LowRankParameter

    @classmethod
    def parameter_shapes(cls, config: LoraConfig, path: str, module: Any, kind: LayerKind) -> Shapes:
        """A and B; see ``Adapter``.

        Raises:
            ConfigError: the config has a setting that does not work on a bare parameter.
        """
        refused = {
            "lora_dropout": config.lora_dropout != 0 and not only_multiplies(module.owner),
            "lora_bias": config.lora_bias,
            "init_lora_weights": config.init_name not in ("default", "random", "gaussian"),
        }
        for field, asked in refused.items():
            if asked:
                raise ConfigError(
                    f"{path} (target_parameters) does not work with {field}={getattr(config, field)!r}; leave that out",
                    field=field,
                    path=path,
                )
        return super().parameter_shapes(config, path, module, kind)

    def prepare(self, config: LoraConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        view: Any = site.base.module
        self.bind(count=view.count)

    @property
    def rank(self) -> int:
        return int(self.trained_factors[0].shape[0]) // self.count

    delta_rank = rank

    @classmethod
    def size_of(cls, shapes: Mapping[str, Shape]) -> int | None:
        """None: the shapes do not contain the number of experts among which the rows of A are divided."""
        return None

    def used_part(self, key: str, tensor: Tensor, shape: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Views of the part of a factor that an adapter of some shape uses, for each expert, and of the rest."""
        if tensor.shape == tuple(shape) or key not in self.factor_names:
            return tensor, []
        if key == self.factor_names[0]:
            blocks, used = tensor.view(self.count, -1, tensor.shape[1]), shape[0] // self.count
        else:
            blocks, used = tensor.view(tensor.shape[0], -1, self.count), shape[1] // self.count
        return blocks[:, :used], [blocks[:, used:]]

    def parameter_products(self, base: BaseLayer) -> tuple[Product]:
        view = base.module
        assert isinstance(view, ParameterView)
        dropout = self.dropout if self.training else 0.0
        return (Product(*self.low_rank.factors(view, *self.trained_factors), self.scaling, dropout),)

    def add_to_(self, weight: Tensor, base: BaseLayer, scale: float) -> None:
        """Adds ``scale * s * B A`` to the parameter in place, one expert at a time."""
        view: Any = base.module
        left, right = self.low_rank.factors(view, *self.detached_factors)
        factor = float(self.scaling) * scale
        for matrix, lora_B, lora_A in zip(*(t if t.ndim == 3 else t[None] for t in (weight, left, right)), strict=True):
            add_product_(matrix, lora_A, lora_B, factor)
