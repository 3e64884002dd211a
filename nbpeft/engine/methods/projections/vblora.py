"""VB-LoRA: low-rank factors put together from one bank of vectors (Li et al. 2024, arXiv:2405.15179).

    y = W x + B A x        each piece of A and of B: the softmax mixture of the k vectors with the largest logits

Each row of A and each column of B is split into pieces of the length of a vector. The bank is trained and shared by all
layers. With ``save_only_topk_weights`` a file contains the indices and shares of each piece's k vectors instead of all
logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_divides, check_linear
from nbpeft.engine.config.layers_config import HasFanInFanOut, TrainsBiases
from nbpeft.engine.config.targets import usual_wide_targets
from nbpeft.engine.contract.adapter import AdapterSite, SharedSite, SharedState
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.bindable import axis_size, stored
from nbpeft.engine.contract.initial_draws import Fill, drawn, normal_, uniform_
from nbpeft.engine.contract.method_records import FileFormat, Listing, SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import ComputedFactors, keeping_inputs
from nbpeft.errors import CheckpointError, ConfigError, TrainingError, shown

LOGITS_A, LOGITS_B, BANK = "vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_LEFT_OUT = -1e4
"""The logit of a vector that a file with the largest ones alone leaves out; no training gets there."""


@dataclass
class VBLoRAConfig(HasFanInFanOut, TrainsBiases):
    """Config of VB-LoRA. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: rank of the two factors.
        num_vectors: vectors in the bank.
        vector_length: length of a vector, which divides the inputs and the outputs of each layer.
        topk: how many vectors a piece mixes.
        save_only_topk_weights: save of each piece which vectors it mixes and their shares, which is much smaller, and
            cannot be trained further.
        vblora_dropout: dropout probability of the adapter's input, from 0 to 1.
        init_vector_bank_bound: the bank starts with uniform numbers up to this one, to both sides.
        init_logits_std: standard deviation of the logits at the start.
    """

    r: int = field(default=4)
    num_vectors: int = field(default=256)
    vector_length: int = field(default=256)
    topk: int = field(default=2)
    save_only_topk_weights: bool = field(default=False)
    vblora_dropout: float = field(default=0.0)
    init_vector_bank_bound: float = field(default=0.02)
    init_logits_std: float = field(default=0.1)

    not_negative: ClassVar[tuple[str, ...]] = ("init_vector_bank_bound", "init_logits_std")
    method_type: ClassVar[str] = "VBLORA"
    counts: ClassVar[tuple[str, ...]] = ("r", "num_vectors", "vector_length", "topk")
    shares: ClassVar[tuple[str, ...]] = ("vblora_dropout",)
    value_fields: ClassVar[tuple[str, ...]] = (
        *("topk", "save_only_topk_weights", "vblora_dropout", "init_vector_bank_bound", "init_logits_std"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise ConfigError(
                f"topk = {self.topk} is more than the num_vectors = {self.num_vectors} of the bank; lower it",
                field="topk",
            )


class VectorBank(SharedState):
    """The vectors, (num_vectors, vector_length), which are trained."""

    in_layers: ClassVar[bool] = True

    is_new: bool

    vectors: Tensor = stored(BANK)

    @classmethod
    def tensor_shapes(cls, config: VBLoRAConfig, features: Mapping[str, tuple[int, int]]) -> Shapes:
        return {BANK: (config.num_vectors, config.vector_length)}

    @classmethod
    def create(cls, config: VBLoRAConfig, site: SharedSite, tensors: Mapping[str, Tensor] | None) -> Self:
        made = super().create(config, site, tensors)
        made.bind(is_new=tensors is None)
        return made

    @torch.no_grad()
    def draw_(self, config: VBLoRAConfig) -> None:
        """Draws a new bank once more: each layer does, and the bank of the last one counts."""
        if self.is_new:
            bank = self.vectors
            bank.copy_(drawn(bank.shape, _bank_fill(config), bank.device, bank.dtype))


def _bank_fill(config: VBLoRAConfig) -> Fill:
    return partial(uniform_, bound=config.init_vector_bank_bound)


def _new_logits(config: VBLoRAConfig, site: AdapterSite) -> dict[str, Tensor]:
    """New logits of a layer."""
    normal = partial(normal_, std=config.init_logits_std)
    return {name: site.new(shape, normal) for name, shape in site.shapes.items()}


def _index_dtype(count: int) -> torch.dtype:
    """The smallest integer dtype of a file's indices for so many vectors."""
    return torch.uint8 if count < 2**8 else torch.int16 if count < 2**15 else torch.int32


def _packed(config: VBLoRAConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Which vectors each piece mixes and all of their shares but the last, in place of the logits."""
    if not config.save_only_topk_weights:
        return tensors
    packed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith((LOGITS_A, LOGITS_B)):
            largest, indices = tensor.detach().topk(config.topk)
            packed[key + _INDICES] = indices.to(_index_dtype(config.num_vectors))
            packed[key + _WEIGHTS] = largest.softmax(-1)[..., :-1].contiguous()
        else:
            packed[key] = tensor
    return packed


def _unpacked(config: VBLoRAConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Logits that mix those vectors in those shares.

    Raises:
        CheckpointError: the file's tensors cannot be logits.
    """
    packed = [key.removesuffix(_INDICES) for key in tensors if key.endswith(_INDICES)]
    if not packed:
        return tensors
    others = {key: value for key, value in tensors.items() if not key.endswith((_INDICES, _WEIGHTS))}
    return others | {key: _logits(config, tensors, key) for key in packed}


def _logits(config: VBLoRAConfig, tensors: Mapping[str, Tensor], key: str) -> Tensor:
    indices, shares = tensors[key + _INDICES], tensors.get(key + _WEIGHTS)
    whole = not indices.is_floating_point() and indices.dtype != torch.bool and indices.ndim == 3
    fits = whole and shares is not None and shares.shape == (*indices.shape[:2], indices.shape[2] - 1)
    if fits and not indices.is_meta:  # as those of a file's header are
        fits = bool(((indices >= 0) & (indices < config.num_vectors)).all())
    if not fits or shares is None:
        raise CheckpointError(
            f"{shown(key + _INDICES, 150)} and {_WEIGHTS[1:]} do not say which of {config.num_vectors} vectors each "
            "piece mixes",
            key=key,
        )
    wide = shares.float()
    wide = torch.cat([wide, 1 - wide.sum(-1, keepdim=True)], -1).clamp_min(torch.finfo(torch.float32).tiny)
    logits = wide.new_full((*indices.shape[:2], config.num_vectors), _LEFT_OUT)
    return logits.scatter(-1, indices.long(), wide.log()).to(shares.dtype)


def savable_parameters(manager: Any, adapter: str = "default") -> tuple[int, int]:
    """The sizes of an adapter's file and of the model's other trained parameters, both in numbers of 4 bytes.

    Args:
        manager: manager of the model.
        adapter: which adapter.
    """
    manager.require(adapter)
    config, layers = manager.configs[adapter], manager.layers.values()
    held = [found for layer in layers if isinstance(found := layer.adapters._modules.get(adapter), VBLoRA)]
    logits = sum(one.tensor(name).numel() for one in held for name in (LOGITS_A, LOGITS_B))
    if config.save_only_topk_weights:
        bytes_of_index = _index_dtype(config.num_vectors).itemsize
        logits = int(logits / config.num_vectors * (config.topk - 1 + config.topk * bytes_of_index / 4))
    adapters = (one for layer in layers for one in layer.adapters._modules.values() if isinstance(one, VBLoRA))
    own = {id(parameter) for one in adapters for parameter in (*one.parameters(), *one.bank.parameters())}
    others = sum(one.numel() for one in manager.model.parameters() if one.requires_grad and id(one) not in own)
    return logits + manager.shared(adapter).vectors.numel(), others


def print_savable_parameters(manager: Any, adapter: str = "default") -> None:
    """Prints both numbers of ``savable_parameters``."""
    own, others = savable_parameters(manager, adapter)
    print(f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + others:,d}")


@register(
    VBLoRAConfig,
    label="VB-LoRA",
    listing=Listing(
        when="very many adapters: the smallest files, vectors from a shared bank",
        paper="arXiv:2405.15179",
        summary=lambda config: {"r": str(config.r), "vectors": str(config.num_vectors), "k": str(config.topk)},
    ),
    default_targets=usual_wide_targets,
    sample_configs={
        "k2": {"r": 3, "num_vectors": 20, "vector_length": 8, "init_vector_bank_bound": 0.0},
    },
    shares=SharedTensors(state=VectorBank),
    files=FileFormat(pack=_packed, unpack=_unpacked),
)
class VBLoRA(ComputedFactors):
    """The logits of the pieces of one layer."""

    peft: ClassVar[PeftNames] = PeftNames(
        "vblora_logits_A vblora_logits_B vblora_vector_bank",
        "r topk vblora_dropout",
        model_functions={
            "get_nb_savable_parameters": savable_parameters,
            "print_savable_parameters": print_savable_parameters,
        },
        attributes={"r": "rank", "topk": "count", BANK: "bank.vectors"},
    )
    from_config: ClassVar[Mapping[str, str]] = {"count": "topk", "dropout": "vblora_dropout"}

    bank: VectorBank
    count: int
    is_picked: bool

    @classmethod
    def parameter_shapes(cls, config: VBLoRAConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """Logits of A, (r, in / length, vectors), and of B, (out / length, r, vectors)."""
        check_linear("VB-LoRA", path, kind)
        length, (in_features, out_features) = config.vector_length, kind.features(module)
        check_divides("vector_length", length, path, (in_features, out_features))
        return {
            LOGITS_A: (config.r, in_features // length, config.num_vectors),
            LOGITS_B: (out_features // length, config.r, config.num_vectors),
        }

    @classmethod
    def create(cls, config: VBLoRAConfig, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Looks whether the logits of a file mix only some vectors."""
        made = super().create(config, site, tensors)
        made.bind(is_picked=any(bool((one <= _LEFT_OUT).any()) for one in (tensors or {}).values()))
        return made

    @classmethod
    def initial_tensors(cls, config: VBLoRAConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        assert isinstance(site.shared, VectorBank)
        site.shared.draw_(config)
        return _new_logits(config, site)

    def prepare(self, config: VBLoRAConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        """Refers to the bank, which the first layer has as a module."""
        self.bind(bank=site.shared)

    rank: int = axis_size(LOGITS_A)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, (r, in), and B, (out, r)."""
        logits_A, logits_B = self.tensor(LOGITS_A), self.tensor(LOGITS_B)
        held = self.bank.vectors.to(logits_A.device)
        first = keeping_inputs(self._mixed, logits_A, held).flatten(1)
        second = keeping_inputs(self._mixed, logits_B, held).transpose(1, 2).flatten(0, 1)
        return first, second

    def _mixed(self, logits: Tensor, vectors: Tensor) -> Tensor:
        """The mixture of each piece, (…, length)."""
        largest, indices = logits.topk(self.count, dim=-1)
        return (largest.softmax(-1).unsqueeze(-1) * vectors[indices]).sum(-2)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``B A dropout(x)``; see ``Adapter``.

        Raises:
            TrainingError: it is trained, and came from a file that holds the largest logits alone.
        """
        if self.is_picked and self.training and self.tensor(LOGITS_A).requires_grad:
            raise TrainingError(
                "a VB-LoRA saved with save_only_topk_weights=True cannot be trained further: the other logits are gone"
            )
        return super().forward(x, base_output, base)
