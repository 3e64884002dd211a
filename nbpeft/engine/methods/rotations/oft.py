"""OFT: orthogonal rotation of blocks of a layer's input (Qiu et al. 2023, arXiv:2306.07280; OFTv2, arXiv:2506.19847).

    y = W R x        R: block-diagonal, one rotation for each block of b inputs

A rotation is the Cayley transform of a skew-symmetric matrix, whose upper triangle is trained; with
``use_cayley_neumann`` its inverse is a Neumann series. Embeddings are rotated in their output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_ungrouped, warn_of_unused
from nbpeft.engine.config.layers_config import HasFanInFanOut, TrainsBiases
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, TransformsInput, TransformsOutput
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import normal_
from nbpeft.engine.contract.method_records import FileFormat, Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import apply_delta
from nbpeft.engine.kernels.numerics import cayley, composes, neumann_cayley, without_autocast
from nbpeft.errors import ConfigError

ROTATION, EMBEDDING_ROTATION = "oft_R", "oft_embedding_R"
_MOST_TERMS = 64


@dataclass
class OFTConfig(HasFanInFanOut, TrainsBiases):
    """Config of OFT. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: number of blocks of a layer; 0 with oft_block_size.
        oft_block_size: number of inputs of a block; 0 with r. The nearest divisor of a layer's inputs is used.
        module_dropout: share of the blocks that are not rotated in a call of the training, from 0 to 1.
        init_weights: start at the base model; False for random rotations.
        coft: keep the rotations small (constrained OFT).
        eps: how small, with coft.
        block_share: one rotation for all blocks of a layer.
        use_cayley_neumann: approximate the Cayley transform by a series: faster, and not exactly orthogonal.
        num_cayley_neumann_terms: number of its terms.
    """

    r: int = field(default=0)
    oft_block_size: int = field(default=32)
    module_dropout: float = field(default=0.0)
    init_weights: bool = field(default=True)
    coft: bool = field(default=False)
    eps: float = field(default=6e-5)
    block_share: bool = field(default=False)
    use_cayley_neumann: bool = field(default=True)
    num_cayley_neumann_terms: int = field(default=5)

    method_type: ClassVar[str] = "OFT"
    shares: ClassVar[tuple[str, ...]] = ("module_dropout",)
    value_fields: ClassVar[tuple[str, ...]] = (
        *("module_dropout", "init_weights", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.r, self.oft_block_size) < 0 or (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"give either r or oft_block_size, a positive whole number, and 0 for the other, not r={self.r} and "
                f"oft_block_size={self.oft_block_size}",
                field="r",
            )
        if not 0 < self.num_cayley_neumann_terms <= _MOST_TERMS:
            raise ConfigError(
                f"num_cayley_neumann_terms must be from 1 to {_MOST_TERMS}, not {self.num_cayley_neumann_terms:.3g}",
                field="num_cayley_neumann_terms",
            )
        warn_of_unused(self, {"use_cayley_neumann": True}, "num_cayley_neumann_terms")
        warn_of_unused(self, {"coft": True}, "eps")

    def blocks_of(self, features: int) -> tuple[int, int]:
        """The number and the size of the blocks of a layer with so many inputs."""
        if self.r:
            count = nearest_divisor(features, self.r)
            return count, features // count
        size = nearest_divisor(features, self.oft_block_size)
        return features // size, size

    @property
    def terms(self) -> int | None:
        """Number of terms of the series that approximates the inverse; None for the exact inverse."""
        return self.num_cayley_neumann_terms if self.use_cayley_neumann else None

    @property
    def freedom(self) -> float | None:
        """Bound on the distance of a rotation from the identity; None for no bound."""
        return self.eps if self.coft else None


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of a number that is nearest to a wanted one, the smaller one of two; the number itself at most."""
    if wanted >= number:
        return number
    return min((one for one in range(1, number + 1) if number % one == 0), key=lambda one: (abs(one - wanted), one))


@register(
    OFTConfig,
    label="OFT",
    listing=Listing(
        when="preserving the base model's knowledge: rotations keep angles between neurons",
        paper="arXiv:2306.07280",
        summary=lambda config: {"r": str(config.r)} if config.r else {"block": str(config.oft_block_size)},
        smaller=lambda config: (
            config.copy(oft_block_size=config.oft_block_size // 2) if config.oft_block_size > 3 else None
        ),
    ),
    default_targets=usual_targets,
    sample_configs={
        "whole": {"r": 1, "oft_block_size": 0, "use_cayley_neumann": False},
        "blocks": {"oft_block_size": 4},
        "shared": {"oft_block_size": 4, "block_share": True, "coft": True, "eps": 0.05},
    },
    files=FileFormat(keys={ROTATION: f"{ROTATION}.weight", EMBEDDING_ROTATION: f"{EMBEDDING_ROTATION}.weight"}),
)
class OFT(Adapter):
    """The skew-symmetric matrices of one layer, as their upper triangles (blocks, b (b - 1) / 2)."""

    reads_weight: ClassVar[bool] = True
    peft: ClassVar[PeftNames] = PeftNames(
        "oft_R oft_embedding_R",
        "r oft_block_size oft_dropout",
        wrapped=(ROTATION, EMBEDDING_ROTATION),
        attributes={"r": "count", "oft_block_size": "size"},
    )
    from_config: ClassVar[Mapping[str, str]] = {"dropout": "module_dropout", "eps": "freedom", "terms": "terms"}

    @classmethod
    def parameter_shapes(cls, config: OFTConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The upper triangles."""
        count, size = config.blocks_of(_rotated(module, kind))
        if size < 2:
            raise ConfigError(f"{path}: a block of one input cannot be rotated; choose larger blocks", path=path)
        check_ungrouped("OFT", path, module)
        name = EMBEDDING_ROTATION if kind.takes_ids else ROTATION
        return {name: (1 if config.block_share else count, size * (size - 1) // 2)}

    @classmethod
    def _class_for(cls, config: OFTConfig, site: AdapterSite) -> type[OFT]:
        kind = site.base.kind
        return OFTOnLinear if kind.is_linear else OFTOnEmbedding if kind.takes_ids else OFTOnConvolution

    @classmethod
    def initial_tensors(cls, config: OFTConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        fill = None if config.init_weights else partial(normal_, std=0.1)
        return {name: site.new(shape, fill) for name, shape in site.shapes.items()}

    def prepare(self, config: OFTConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        count, size = config.blocks_of(_rotated(site.base.module, site.base.kind))
        self.bind(parameter_name=next(iter(site.shapes)), count=count, size=size)

    parameter_name: str
    count: int
    size: int
    dropout: float
    eps: float | None
    terms: int | None

    @property
    def triangles(self) -> Tensor:
        """The parameter; in training with ``coft``, it is first projected to a small norm in place."""
        triangles: Tensor = self.tensor(self.parameter_name)
        if self.eps is not None and self.training and triangles.requires_grad:
            with torch.no_grad():
                factor = self._shrinking(triangles, self.eps)
                if bool((factor < 1 - 1e-6).any()):
                    triangles.mul_(factor)
        return triangles

    @staticmethod
    def _shrinking(triangles: Tensor, eps: float) -> Tensor:
        """Factors (blocks, 1), at most 1, that bring the norm of each skew-symmetric matrix down to its bound."""
        bound = eps / math.sqrt(triangles.shape[0])
        norm = math.sqrt(2) * triangles.norm(dim=1, keepdim=True)
        return (bound / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)

    def rotations(self, triangles: Tensor, kept: Tensor | None = None) -> Tensor:
        """The rotations, (blocks, b, b).

        Args:
            triangles: the parameter.
            kept: (blocks, 1, 1), False for a block that is not rotated; None for all.
        """
        if self.eps is not None:
            triangles = triangles * self._shrinking(triangles, self.eps).detach()
        skew = triangles.new_zeros(triangles.shape[0], self.size, self.size)
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=triangles.device)
        skew[:, rows, columns] = triangles
        skew = skew - skew.mT
        identity = torch.eye(self.size, device=skew.device, dtype=skew.dtype)
        rotations = cayley(skew) if self.terms is None else neumann_cayley(skew, self.terms)
        rotations = rotations if rotations.shape[0] == self.count else rotations.expand(self.count, -1, -1)
        return rotations if kept is None else torch.where(kept, rotations, identity)

    def _kept(self, device: torch.device) -> Tensor | None:
        """Which blocks are rotated in this call of a training; None for all."""
        dropped = int(self.dropout * self.count) if self.training else 0
        if not dropped or self.count == 1:
            return None
        return (torch.randperm(self.count) >= dropped).view(-1, 1, 1).to(device)

    def rotated(self, rows: Tensor, kept: Tensor | None, triangles: Tensor, *, transposed: bool = False) -> Tensor:
        """Vectors (…, features) whose blocks are rotated, or rotated back."""
        blocks = self.rotations(triangles, kept)
        return _blockwise(rows.to(blocks.dtype), blocks.mT if transposed else blocks)

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``W R - W``, in the dtype of the parameter."""
        return self._change_of_weight(weight, self.tensor(self.parameter_name).detach(), None)

    def _change_of_weight(self, weight: Tensor, triangles: Tensor, kept: Tensor | None) -> Tensor:
        rows = weight.to(triangles.dtype).flatten(1)
        return (self.rotated(rows, kept, triangles, transposed=True) - rows).view(weight.shape)

    @classmethod
    def config_warnings(cls, config: OFTConfig, modules: Sequence[tuple[str, nn.Module, LayerKind]]) -> Iterable[str]:
        """Warns about layers whose inputs cannot be divided into blocks of the config's size."""
        wanted, what = (config.r, "r") if config.r else (config.oft_block_size, "oft_block_size")
        others = []
        for path, module, kind in modules:
            taken = config.blocks_of(_rotated(module, kind))[0 if config.r else 1]
            if taken != wanted:
                others.append((path, taken))
        if others:
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            yield f"{what}={wanted} does not divide the inputs of {others[0][0]}{more}: {others[0][1]} is taken there"


class OFTOnLinear(OFT, TransformsInput):
    """Rotates the input."""

    def transform_input(self, x: Tensor, base: BaseLayer) -> Tensor:
        """``R x``, (…, in), in the dtype of ``x``."""
        kept, triangles = self._kept(x.device), self.triangles
        if composes():
            return self.rotated(x, kept, triangles).to(x.dtype)
        rotations = partial(self.rotations, kept=kept)
        return _Rotate.apply(x, triangles, rotations)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``W (R x - x)``."""
        rotated = self.rotated(x, self._kept(x.device), self.triangles)
        return base.kind.apply(base.module, rotated - x.to(rotated.dtype), base.weight().to(rotated.dtype))


class OFTOnEmbedding(OFT, TransformsOutput):
    """Rotates the embedding's output."""

    def transform_output(self, output: Tensor, base: BaseLayer) -> Tensor:
        """``R y``, (…, features), in the dtype of ``y``."""
        return self.rotated(output, self._kept(output.device), self.triangles).to(output.dtype)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``R y - y``."""
        rotated = self.rotated(base_output, self._kept(base_output.device), self.triangles)
        return rotated - base_output.to(rotated.dtype)

    def _change_of_weight(self, weight: Tensor, triangles: Tensor, kept: Tensor | None) -> Tensor:
        columns = weight.to(triangles.dtype).T
        return (self.rotated(columns, kept, triangles) - columns).T


class OFTOnConvolution(OFT):
    """Rotates the rows of the weight."""

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The convolution with ``W R - W``."""
        weight, kept = base.weight(), self._kept(x.device)
        return apply_delta(
            x, base, lambda triangles: self._change_of_weight(weight, triangles, kept), (self.triangles,)
        )


class _Rotate(torch.autograd.Function):
    """An input times its rotations, which backward computes again; autograd stores the input and the triangles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, triangles: Tensor, rotations: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.rotations = rotations
        ctx.save_for_backward(x, triangles)
        with without_autocast(x.device.type):
            return _blockwise(x.to(triangles.dtype), rotations(triangles)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, triangles = ctx.saved_tensors
        leaf = triangles.detach().requires_grad_()
        with without_autocast(x.device.type):
            with torch.enable_grad():
                blocks = ctx.rotations(leaf)
            of_output = gradients[0].to(blocks.dtype)
            of_x = _blockwise(of_output, blocks.detach().mT).to(x.dtype) if ctx.needs_input_grad[0] else None
            if not ctx.needs_input_grad[1]:
                return of_x, None, None
            shape = -1, *blocks.shape[:2]
            of_blocks = torch.einsum("nrk,nrc->rkc", x.to(blocks.dtype).reshape(shape), of_output.reshape(shape))
            return of_x, torch.autograd.grad(blocks, leaf, of_blocks)[0], None


def _blockwise(rows: Tensor, blocks: Tensor) -> Tensor:
    """Multiplies each part of vectors, (…, blocks * b), with its block, (blocks, b, b)."""
    parts = rows.reshape(*rows.shape[:-1], *blocks.shape[:2])
    return torch.einsum("...rk,rkc->...rc", parts, blocks).flatten(-2)


def _rotated(module: nn.Module, kind: LayerKind) -> int:
    """Number of rotated features: those of an input, of a patch of it, or of an embedding's output."""
    shape = kind.weight_shape(module)
    return shape[0] if kind.takes_ids else math.prod(shape[1:])
