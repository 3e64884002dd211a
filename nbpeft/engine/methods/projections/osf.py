"""OSF: freezes the largest singular directions of a weight, and trains the others (Nayak et al., arXiv:2504.07097).

    y = W x + (U diag(s) V - U₀ diag(s₀) V₀) x        U₀ diag(s₀) V₀: W without its k largest singular directions

U, (out, r), s, (r,), and V, (r, in), start as U₀, s₀ and V₀, with r = min(out, in) - k. Gradients of U and V are
projected so that they have no part in the k directions. U₀, s₀ and V₀ are not saved: they are recomputed from the
weight when an adapter is loaded.

PEFT computes only with the first of several active adapters, merges all of them, and cannot unmerge them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_linear, check_positive, checked_pattern
from nbpeft.engine.config.layers_config import LayersConfig
from nbpeft.engine.config.patterns import ANYWHERE, check_patterns
from nbpeft.engine.config.targets import ALL_LINEAR
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, ConvertsToLora, LowRankDelta
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.method_records import FileFormat, Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.kernels.numerics import composes, compute_dtype, widened
from nbpeft.errors import ConfigError, few

LEFT, VALUES, RIGHT = "osf_U_low", "osf_S_low", "osf_V_low"
_FIRST = "_osf_{}_low_init"
LEFT_START, VALUES_START, RIGHT_START = (_FIRST.format(one) for one in "USV")
LEFT_KEPT, RIGHT_KEPT = "_osf_U_high", "_osf_V_high"
_TRAINED = "osf_svd_params"
_KEYS = {name: f"{_TRAINED}.{name.removeprefix('osf_')}" for name in (LEFT, VALUES, RIGHT)}

_TARGETS: dict[tuple[str, ...], str] = {
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"): (
        "gemma gemma2 gemma3_text llama llama4 mistral mixtral phi qwen2 qwen3"
    ),
    ("c_attn", "c_proj"): "gpt2 gpt_bigcode",
    ("query_key_value", "dense_4h_to_h"): "bloom falcon gpt_neox",
    ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"): "opt",
    ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"): "gptj",
}


def _targets(model_type: str | None) -> list[str] | str:
    found = (list(names) for names, model_types in _TARGETS.items() if model_type in model_types.split())
    return next(found, ALL_LINEAR)


@dataclass
class OSFConfig(LayersConfig):
    """Config of OSF. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        effective_rank: number of the largest singular directions that stay frozen; a fraction up to 1.0 is a share of
            the weight's smaller side; None for half of it.
        rank_pattern: expression that is found in a path -> another effective_rank.
        init_weights: start at the base model; False for random numbers.
        target_svd_config: unused, as in PEFT.
    """

    effective_rank: int | float | None = field(default=None)
    rank_pattern: dict[str, int | float] | None = field(default=None)
    init_weights: bool = field(default=True)
    target_svd_config: dict[str, int] | None = field(default=None)

    positive: ClassVar[tuple[str, ...]] = ("effective_rank",)
    method_type: ClassVar[str] = "OSF"
    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    value_fields: ClassVar[tuple[str, ...]] = ("init_weights", "target_svd_config")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_pattern is not None:
            self.rank_pattern = checked_pattern("rank_pattern", self.rank_pattern, check_positive)
            check_patterns(("rank_pattern", pattern, ANYWHERE) for pattern in self.rank_pattern)

    @property
    def initialised_from_weight(self) -> bool:
        """Always: the directions are computed from the weight."""
        return True

    def unused_patterns(self, paths: Sequence[str]) -> str:
        unused = [one for one in self.rank_pattern or () if not any(re.search(one, path) for path in paths)]
        effect = "has no effect" if len(unused) == 1 else "have no effect"
        return f"rank_pattern [{few(unused)}] did not match any targeted module and {effect}." if unused else ""

    def kept_at(self, path: str, shape: Sequence[int]) -> int:
        """How many directions of a weight are kept.

        Raises:
            ConfigError: none.
        """
        side = min(shape)
        found = (kept for pattern, kept in (self.rank_pattern or {}).items() if re.search(pattern, path))
        asked = next(found, self.effective_rank)
        if asked is None:
            kept = side // 2
        else:
            kept = int(side * asked) if isinstance(asked, float) and asked <= 1 else min(side, int(asked))
        if kept < 1:
            raise ConfigError(
                f"{path}: effective_rank = {asked} keeps none of the {side} directions of its weight; raise it",
                path=path,
                field="effective_rank",
            )
        return kept


class _Projected(torch.autograd.Function):
    """Returns a tensor unchanged, and projects its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, basis: Tensor, inside: bool) -> Tensor:
        ctx.basis, ctx.inside = basis, inside  # not save_for_backward: the basis is constant
        return tensor.view_as(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return projection(gradients[0], ctx.basis, ctx.inside), None, None


def projection(tensor: Tensor, basis: Tensor, inside: bool) -> Tensor:
    """The part of columns, (n, …), in the span of an orthonormal basis, (n, k), or the part outside of it."""
    basis = basis.to(tensor.dtype)
    part = basis @ (basis.T @ tensor)
    return part if inside else tensor - part


def _projected(tensor: Tensor, basis: Tensor, inside: bool) -> Tensor:
    """Returns a tensor unchanged; only the ``projection`` of its gradient is passed on."""
    if not composes():
        return _Projected.apply(tensor, basis, inside)
    part = projection(tensor, basis, inside)
    return tensor.detach() + (part - part.detach())


@register(
    OSFConfig,
    label="OSF",
    listing=Listing(
        when="continual learning: trains minor directions and preserves the main ones",
        paper="arXiv:2504.07097",
        summary=lambda config: {"kept": "half" if config.effective_rank is None else f"{config.effective_rank:g}"},
    ),
    default_targets=_targets,
    sample_configs={"half": {}, "most": {"effective_rank": 0.8}},
    files=FileFormat(keys=_KEYS),
)
class Osf(Adapter, ConvertsToLora):
    """s, U and V of one layer, and their initial values."""

    peft: ClassVar[PeftNames] = PeftNames(
        "osf_svd_params",
        "_osf_U_low_init _osf_S_low_init _osf_V_low_init _osf_U_high _osf_V_high effective_rank",
        grouped=_KEYS,
        attributes={
            "effective_rank": "kept",
            **{name: name for name in (LEFT_START, VALUES_START, RIGHT_START, LEFT_KEPT, RIGHT_KEPT)},
        },
    )

    kept: int

    @classmethod
    def parameter_shapes(cls, config: OSFConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """s, (r,), U, (out, r), and V, (r, in), with r the number of trained directions."""
        check_linear("OSF", path, kind)
        rows, columns = kind.weight_shape(module)
        rank = min(rows, columns) - config.kept_at(path, (rows, columns))
        return {VALUES: (rank,), LEFT: (rows, rank), RIGHT: (rank, columns)}

    @classmethod
    def create(cls, config: OSFConfig, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Binds loaded tensors or makes new ones, and takes the weight apart."""
        rank, (rows, columns) = site.shapes[VALUES][0], (site.shapes[LEFT][0], site.shapes[RIGHT][1])
        kept = min(rows, columns) - rank
        left, values, right = _parts(site)
        start = {LEFT: _own(left[:, kept:]), VALUES: _own(values[kept:]), RIGHT: _own(right[kept:])}
        if tensors is None:
            drawn = not config.init_weights
            # PEFT draws U first.
            tensors = {name: torch.randn_like(one) if drawn else one.clone() for name, one in start.items()}
        made = super().create(config, site, tensors)
        buffers = {_FIRST.format(name[4]): one for name, one in start.items()}
        if rows > columns:
            buffers[LEFT_KEPT] = _own(left[:, :kept])
        if columns > rows:
            buffers[RIGHT_KEPT] = _own(right[:kept])
        for name, one in buffers.items():
            made.register_buffer(name, one, persistent=False)
        made.bind(kept=kept)
        return made

    @property
    def delta_rank(self) -> int | None:
        return 2 * int(self.tensor(VALUES).shape[0])

    def _start(self) -> tuple[Tensor, Tensor, Tensor]:
        """U₀, s₀ and V₀."""
        left, values, right = map(self.tensor, (LEFT_START, VALUES_START, RIGHT_START))
        return left, values, right

    def _now(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, s and V; gradients of U and V are projected."""
        left, values, right = (self.tensor(name) for name in (LEFT, VALUES, RIGHT))
        if not torch.is_grad_enabled():
            return left, values, right
        tall, wide = left.shape[0] > right.shape[1], right.shape[1] > left.shape[0]
        left_basis = self.tensor(LEFT_KEPT if tall else LEFT_START)
        right_basis = self.tensor(RIGHT_KEPT if wide else RIGHT_START)
        return _projected(left, left_basis, not tall), values, _projected(right.T, right_basis.T, not wide).T

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``U diag(s) V x - U₀ diag(s₀) V₀ x``."""
        dtype = compute_dtype(x, self.tensor(LEFT))
        now, start = (_apply(x.to(dtype), *parts) for parts in (self._now(), self._start()))
        return now - start

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``U diag(s) V - U₀ diag(s₀) V₀``."""
        now, start = ((left * values) @ right for left, values, right in (self._now(), self._start()))
        return now - start

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta | None:
        """[V; V₀] and [U diag(s), -U₀ diag(s₀)]; None if all directions are frozen."""
        left, values, right = self._now()
        if not values.numel():
            return None
        left_start, values_start, right_start = self._start()
        up = torch.cat([left * values, -left_start * values_start], dim=1)
        return LowRankDelta(torch.cat([right, right_start]), up, 1.0)

    @torch.no_grad()
    def reset_(self, base: BaseLayer) -> None:
        for name, start in zip((LEFT, VALUES, RIGHT), self._start(), strict=True):
            self.get_parameter(name).copy_(start)


def _own(part: Tensor) -> Tensor:
    """A contiguous copy, so that the whole tensor can be freed."""
    return part.clone(memory_format=torch.contiguous_format)


def _apply(x: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """``U diag(s) V x``, in the dtype of ``x``."""
    return F.linear(F.linear(x, right.to(x.dtype)) * values.to(x.dtype), left.to(x.dtype))


def _parts(site: AdapterSite) -> tuple[Tensor, Tensor, Tensor]:
    """All singular directions of a weight, in the adapter's dtype but rounded to the weight's, as in PEFT.

    Raises:
        ConfigError: the decomposition fails, as for a weight with NaN.
    """
    weight = site.base.weight()
    try:
        left, values, right = taken_apart(weight, weight.dtype if weight.element_size() > 1 else site.dtype)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ConfigError(
            f"{site.path}: its weight has no singular directions: {str(error).splitlines()[0]:.100}", path=site.path
        ) from None
    return left.to(site.dtype), values.to(site.dtype), right.to(site.dtype)


def taken_apart(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Left directions, (out, n), values, (n,), and right directions, (n, in), of a weight, in a dtype."""
    left, values, right = torch.linalg.svd(widened(weight.detach()), full_matrices=False)
    return left.to(dtype), values.to(dtype), right.to(dtype)
