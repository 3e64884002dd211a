"""BD-LoRA: LoRA with one factor block-diagonal (Wang et al. 2025, arXiv:2510.23346).

    y = W x + b + s * B A dropout(x)          A: (r, in / n), B: (out, r), or A: (r, in), B: (out, r / n)

Only the n diagonal blocks of the block-diagonal factor are stored, stacked along the rows. A model that is sharded
among n devices can be served with such an adapter without additional communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from nbpeft.engine.contract.adapter import AdapterSite
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.registry import register
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.family import FAMILY, listing
from nbpeft.engine.methods.lora.initialization.inits import Factors, init_whole_factors
from nbpeft.engine.methods.lora.peft_modules import BlockDiagonalFactor, block_diagonal
from nbpeft.engine.methods.lora.plain import LowRankProduct
from nbpeft.errors import ConfigError, HotSwapError

_ANYWHERE = ["target", "first", "proj"]
"""Parts of the paths of the layers that tests adapt."""


@register(
    LoraConfig,
    label="BD-LoRA",
    listing=listing(
        when="serving many adapters of a model that is split over several devices",
        paper="arXiv:2510.23346",
        listed_with={
            "use_bdlora": {
                "target_modules_bd_a": ["o_proj", "out_proj", "down_proj", "c_proj"],
                "target_modules_bd_b": ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"],
                "nblocks": 2,
                "match_strict": False,
            }
        },
    ),
    applies=lambda config: config.variant == "use_bdlora",
    sample_configs={
        "first": {"r": 4, "lora_alpha": 8, "use_bdlora": {"nblocks": 2, "target_modules_bd_a": _ANYWHERE}},
        "second": {"r": 4, "use_bdlora": {"nblocks": 4, "target_modules_bd_b": _ANYWHERE}},
    },
    **FAMILY,
)
class BDLoRA(LowRankProduct):
    """A BD-LoRA adapter on one layer.

    Attributes:
        blocks: how many blocks A and B have.
    """

    linear_setting: ClassVar[str] = "use_bdlora"
    from_config: ClassVar[Mapping[str, str]] = {**LowRankProduct.from_config, "blocks": "use_bdlora.blocks_at"}

    blocks: tuple[int, int]

    @classmethod
    def parameter_shapes(cls, config: LoraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The blocks of A and those of B."""
        assert config.use_bdlora is not None
        shapes, blocks = super().parameter_shapes(config, path, module, kind), config.use_bdlora.blocks_at(path)
        for (name, (rows, columns)), count in zip(shapes.items(), blocks, strict=True):
            if rows % count or columns % count:
                raise ConfigError(
                    f"{path}: {name}, {rows} x {columns}, cannot have nblocks = {count} blocks on its diagonal: choose "
                    "a number that divides both, or exclude the layer",
                    field="use_bdlora",
                    path=path,
                )
            shapes[name] = rows, columns // count
        return shapes

    @classmethod
    def drawn_tensors(cls, config: LoraConfig, site: AdapterSite, initial: Factors | None) -> dict[str, Tensor]:
        """The blocks, drawn after full factors as in PEFT."""
        assert config.use_bdlora is not None
        made = init_whole_factors(config, site)
        fills = nn.init.kaiming_uniform_, None
        for name, count, fill in zip(site.shapes, config.use_bdlora.blocks_at(site.path), fills, strict=True):
            if count > 1:
                made[name] = site.new(site.shapes[name], fill)
        return made

    @property
    def own_factors(self) -> tuple[Tensor, Tensor]:
        first, second = (
            block_diagonal(held, count) if count > 1 else held
            for held, count in zip(self.trained_factors, self.blocks, strict=True)
        )
        return first, second

    def peft_module(self, name: str, base: BaseLayer) -> nn.Module | None:
        blocks = dict(zip(self.factor_names, self.blocks, strict=True)).get(name, 1)
        return BlockDiagonalFactor(blocks) if blocks > 1 else super().peft_module(name, base)

    def used_part(self, key: str, tensor: Tensor, shape: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The whole tensor: with another rank the blocks would be at other positions.

        Raises:
            HotSwapError: the shape is of another rank.
        """
        if tuple(tensor.shape) != tuple(shape):
            raise HotSwapError(f"a BD-LoRA takes no other rank than its own, {self.rank}: load it under another name")
        return tensor, []

    def enlarged(self, size: int, base: BaseLayer) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Always refuses; see ``used_part``."""
        raise HotSwapError(f"a BD-LoRA of rank {self.rank} cannot be padded to rank {size}: load it under another name")
