"""AdaLoRA: low-rank adaptation that allocates ranks to layers in training (Zhang et al. 2023, arXiv:2303.10512).

    y = W x + b + s B diag(E) A dropout(x)        A: (r, in), B: (out, r), E: (r, 1)
    s = alpha / init_r

A loss term keeps A and B nearly orthogonal, so that E are approximately the singular values. After each step the
importance of every triplet of a row of A, an entry of E and a column of B is measured by weight times gradient.
Between the steps ``tinit`` and ``total_step - tfinal`` the least important entries of E in the whole model are set to
zero, until ``target_r`` per layer are left on average. A file contains the ranks that are left, and its config says
which they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.config.config_checks import (
    check_choice,
    check_count,
    check_linear_or_conv2d,
    check_not_negative,
    check_share,
)
from nbpeft.engine.config.targets import usual_wide_targets
from nbpeft.engine.contract.adapter import (
    Adapter,
    AdapterSite,
    AdapterWeights,
    HotSwaps,
    IsLowRank,
    LowRankDelta,
    PeftType,
    Rescales,
    ShowsModules,
)
from nbpeft.engine.contract.allocator import Allocator, update_and_allocate
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shape, Shapes
from nbpeft.engine.contract.bindable import axis_size
from nbpeft.engine.contract.initial_draws import normal_, skip
from nbpeft.engine.contract.method_records import FileFormat, Listing, SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.dropout import Dropout
from nbpeft.engine.methods.lora.low_rank import low_rank_of
from nbpeft.engine.methods.lora.peft_modules import AdapterDropout
from nbpeft.engine.methods.lora.variant_configs import VARIANT_CONFIGS
from nbpeft.engine.methods.lora.variants.allocator_by_names import RankAllocator as AllocatorByNames
from nbpeft.errors import ConfigError, few, shown

_A, _B, _E = "lora_A", "lora_B", "lora_E"
_AVERAGES, _LEFT = ("importance", "uncertainty"), "left"
"""Names in the training state."""
_RANK = "ranknum"
_DEVIATION = 0.02
"""Standard deviation of new factors."""
_ROBERTA = ["query", "key", "value", "dense"]


@dataclass
class AdaLoraConfig(LoraConfig):
    """Config of AdaLoRA. Field names and defaults are PEFT's; see ``LoraConfig`` for those that are not here.

    Attributes:
        target_r: rank of a layer at the end, on average.
        init_r: rank of each layer at the start.
        tinit: steps before ranks are pruned.
        tfinal: steps at the end, after the last ranks were pruned.
        deltaT: number of steps between two prunings.
        beta1: decay of the moving average of the importance, above 0 and below 1.
        beta2: decay of the moving average of its uncertainty, above 0 and below 1.
        orth_reg_weight: weight of the loss term that keeps A and B orthogonal.
        total_step: number of optimizer steps of the training.
        rank_pattern: layer -> which of its init_r ranks are left; set in training.

    Raises:
        ConfigError: a value is invalid, or has no effect for AdaLoRA.
    """

    target_r: int = field(default=8)
    init_r: int = field(default=12)
    tinit: int = field(default=0)
    tfinal: int = field(default=0)
    deltaT: int = field(default=1)
    beta1: float = field(default=0.85)
    beta2: float = field(default=0.85)
    orth_reg_weight: float = field(default=0.5)
    total_step: int | None = field(default=None)
    rank_pattern: dict[str, list[bool]] | None = field(default=None)  # type: ignore[assignment]

    not_implemented: ClassVar[tuple[str, ...]] = (
        *LoraConfig.not_implemented,
        *("alora_invocation_tokens", "alpha_pattern", "lora_bias", "use_dora", "use_qalora", "use_rslora"),
        *VARIANT_CONFIGS,
    )
    unused: ClassVar[tuple[str, ...]] = (*LoraConfig.unused, "qalora_group_size", "r")
    pattern_fields: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {**LoraConfig.choices, "init_lora_weights": (True, False)}
    value_fields: ClassVar[tuple[str, ...]] = (
        *("lora_alpha", "lora_dropout", "init_lora_weights", "tinit", "tfinal", "deltaT", "beta1", "beta2"),
        *("orth_reg_weight", "total_step", "target_r"),
    )
    card_fields: ClassVar[tuple[str, ...]] = (
        *("init_r", "target_r", "lora_alpha", "lora_dropout", "total_step", "bias", "target_modules"),
        "modules_to_save",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("ADALORA")
        self._check_schedule()

    def _check_numbers(self) -> None:
        for name in ("init_r", "target_r", "deltaT", "total_step"):
            check_count(name, getattr(self, name))
        check_not_negative("lora_alpha", self.lora_alpha)
        for name in ("orth_reg_weight", "tinit", "tfinal"):
            check_not_negative(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            check_share(name, getattr(self, name))
            if getattr(self, name) in (0, 1):
                raise ConfigError(f"{name} must be above 0 and below 1, not {getattr(self, name)}", field=name)
        check_share("lora_dropout", self.lora_dropout)
        self.rank_pattern = dict(self.rank_pattern or {})
        for name, left in self.rank_pattern.items():
            if len(left) != self.init_r:
                raise ConfigError(
                    f"rank_pattern[{shown(name)}] must have one flag for each of init_r = {self.init_r} ranks, not "
                    f"{len(left)}",
                    field="rank_pattern",
                )

    def _check_choices(self) -> None:
        check_choice("bias", self.bias, self.choices["bias"])
        if not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                f"init_lora_weights must be True or False for AdaLoRA, not {shown(self.init_lora_weights)}",
                field="init_lora_weights",
            )

    def _check_schedule(self) -> None:
        assert self.total_step is not None
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"tinit = {self.tinit} and tfinal = {self.tfinal} leave no step of total_step = {self.total_step} for "
                "pruning ranks: lower them",
                field="tinit",
            )

    @property
    def last_allocation(self) -> int:
        """The step in which the last ranks are pruned."""
        return int(self.total_step or 0) - self.tfinal

    def budget_at(self, step: int, layers: int) -> int:
        """Total number of ranks left after a step.

        It decreases from ``init_r`` to ``target_r`` per layer, fastest at the beginning.

        Args:
            step: number of the step.
            layers: number of layers.
        """
        left = 1 - (step - self.tinit) / (self.last_allocation - self.tinit)
        return int((self.init_r - self.target_r) * layers * left**3 + self.target_r * layers)

    def ranks_left(self, path: str) -> list[bool] | None:
        """Which of the initial ranks of a layer are left; None if the config does not say."""
        pattern = self.rank_pattern or {}
        own = f"{path}.{_E}"
        # In older files the adapter's name is appended.
        return pattern.get(own) or next((left for key, left in pattern.items() if key.startswith(f"{own}.")), None)

    def rank_at(self, path: str) -> int:
        left = self.ranks_left(path)
        return self.init_r if left is None else sum(left)

    def alpha_at(self, path: str) -> float:
        """The alpha at a module path; as in PEFT, the rank if alpha is not positive."""
        return self.lora_alpha if self.lora_alpha > 0 else self.rank_at(path)

    def scaling_at(self, path: str) -> float:
        return self.alpha_at(path) / (self.init_r + 1e-5)

    @property
    def adapter_size(self) -> int | None:
        return None if self.rank_pattern else self.init_r

    def resized(self, size: int) -> Self:
        return self.copy(init_r=size, target_r=min(size, self.target_r))

    def set_size(self, size: int, paths: Sequence[str]) -> None:
        """Refuses, because training determines the ranks."""
        raise ConfigError("an AdaLoRA has no rank that could be set: training shares the ranks out")

    def to_dict(self) -> dict[str, Any]:
        """All fields; without rank_pattern while all ranks are left."""
        fields = super().to_dict()
        return fields | {"rank_pattern": fields["rank_pattern"] or None}

    def unused_patterns(self, paths: Sequence[str]) -> str:
        """Describes the layers of ``rank_pattern`` that are not adapted."""
        unused = [key for key in self.rank_pattern or {} if key.rpartition(f".{_E}")[0] not in set(paths)]
        return f"rank_pattern [{few(unused)}] did not match any targeted module" if unused else ""


class RankAllocator(Allocator):
    """Allocates the ranks of an adapter among its layers.

    Args:
        config: the adapter's config, whose ``rank_pattern`` is updated.

    Attributes:
        adapters: path -> the adapter on that layer.
    """

    effect_without_step: ClassVar[str] = "AdaLoRA takes no rank away"

    adapters: dict[str, AdaLora]
    config: AdaLoraConfig
    importance: dict[tuple[str, str], Any]

    def __init__(self, config: AdaLoraConfig) -> None:
        super().__init__(config)
        self.bind(importance={})

    def extra_loss(self) -> Tensor | None:
        """The mean distance of A and B from orthogonality, times ``orth_reg_weight``, a scalar."""
        self.warn_if_not_stepped()
        distances = [_distance(matrix) for adapter in self.adapters.values() for matrix in adapter.orthogonal_rows]
        if not distances or not self.config.orth_reg_weight:
            return None
        device = distances[0].device
        total = torch.stack([distance.to(device) for distance in distances]).mean()
        return total * self.config.orth_reg_weight

    def allocate(self, step: int) -> None:
        """Measures the importance of each rank, and prunes ranks in the steps of the schedule."""
        config, last = self.config, self.config.last_allocation
        if step < last:
            self.measure()
        if step == last or (config.tinit < step < last and step % config.deltaT == 0):
            self.prune(config.budget_at(step, len(self.adapters)))
        if step == last:
            self.importance.clear()
        if step > last:
            self._keep_allocated()

    def training_state(self) -> dict[str, Tensor]:
        """The moving averages, and which ranks of each layer are left."""
        state = {
            f"{path}.{name}.{which}": tensor
            for (path, name), pair in self.importance.items()
            for which, tensor in zip(_AVERAGES, pair, strict=True)
        }
        for path in self.adapters:
            left = self.config.ranks_left(path)
            if left is not None:
                state[f"{path}.{_LEFT}"] = torch.tensor(left)
        return state

    def set_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets both."""
        importance, pattern = self.importance, self.config.rank_pattern
        assert pattern is not None
        importance.clear()
        pattern.clear()
        for path, adapter in self.adapters.items():
            left = state.get(f"{path}.{_LEFT}")
            if left is not None or not adapter.is_whole:
                pattern[f"{path}.{_E}"] = adapter.flags_of_places if left is None else left.tolist()
            for name, parameter in adapter.named_parameters(recurse=False):
                pair = tuple(state.get(f"{path}.{name}.{which}") for which in _AVERAGES)
                if all(one is not None for one in pair):
                    importance[path, name] = tuple(one.to(parameter, copy=True) for one in pair if one is not None)

    def in_training(self, config: Any, weights: AdapterWeights) -> tuple[Any, AdapterWeights]:
        """Config and tensors including pruned ranks, which may be used again."""
        whole = {path: adapter.whole_tensors for path, adapter in self.adapters.items()}
        pattern = {
            f"{path}.{_E}": adapter.flags_of_places for path, adapter in self.adapters.items() if not adapter.is_whole
        }
        return config.copy(rank_pattern=pattern), replace(weights, adapters={**weights.adapters, **whole})

    def measure(self) -> None:
        """Updates the moving averages of importance and uncertainty, for parameters with a gradient."""
        importance, config = self.importance, self.config
        for path, adapter in self.adapters.items():
            for name, parameter in adapter.named_parameters(recurse=False):
                if parameter.grad is None:
                    continue
                now = (parameter * parameter.grad).abs()
                mean, spread = importance.get((path, name)) or (torch.zeros_like(now), torch.zeros_like(now))
                mean = mean.lerp(now, 1 - config.beta1)
                importance[path, name] = mean, spread.lerp((now - mean).abs(), 1 - config.beta2)

    def _scores(self, path: str) -> Tensor | None:
        """The importance of each rank of a layer, (r,); None if it has not been measured yet."""
        measured = [self.importance.get((path, name), ()) for name in (_A, _B, _E)]
        if not all(measured):
            return None
        of_A, of_B, of_E = (mean * spread for mean, spread in measured)
        return of_A.mean(1) + of_B.mean(0) + of_E.view(-1)

    def prune(self, budget: int) -> None:
        """Sets the least important entries of E to zero, so that at most ``budget`` are left in the model."""
        scores = {path: found for path in self.adapters if (found := self._scores(path)) is not None}
        if not scores:
            return
        device = next(iter(scores.values())).device
        together = torch.cat([score.to(device) for score in scores.values()])
        surplus = together.numel() - budget
        if surplus <= 0:
            return
        threshold = float(together.kthvalue(min(surplus, together.numel())).values)
        for path, score in scores.items():
            self.adapters[path].keep_ranks_(score > threshold)

    def _keep_allocated(self) -> None:
        """Sets entries of E that were pruned before to zero again."""
        for adapter in self.adapters.values():
            adapter.keep_ranks_(None)


def _places(config: AdaLoraConfig, path: str, rank: int) -> list[bool]:
    """Which of the initial ranks the factors of a layer contain, given the rank of the factors."""
    left = config.ranks_left(path) or []
    return list(left) if sum(left) == rank else [True] * rank


def _trained_name(configs: Mapping[str, Any]) -> str:
    """The name of the first AdaLoRA adapter that is trained."""
    found = (name for name, one in configs.items() if isinstance(one, AdaLoraConfig) and not one.inference_mode)
    name = next(found, None)
    if name is None:
        raise AttributeError("no AdaLoRA adapter is trained, so there are no trainable_adapter_name and rankallocator")
    return name


def _allocator_of(manager: Any) -> AllocatorByNames:
    """The allocator of that adapter, by PEFT's names; it has no others that could be set."""
    name = _trained_name(manager.configs)
    return AllocatorByNames(manager.model, manager.configs[name], name)


def _distance(matrix: Tensor) -> Tensor:
    """``‖M Mᵀ - I‖`` of a matrix (r, n), a scalar."""
    identity = torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)
    return torch.linalg.vector_norm(matrix @ matrix.T - identity)


@register(
    AdaLoraConfig,
    peft_type="ADALORA",
    label="AdaLoRA",
    listing=Listing(
        when="a fixed budget of ranks, which training distributes among the layers",
        paper="arXiv:2303.10512",
        summary=lambda config: {"r": f"{config.init_r} → {config.target_r}", "α": f"{config.lora_alpha:g}"},
        smaller=lambda config: config.resized(config.init_r // 2) if config.init_r > 1 else None,
        listed_with={"total_step": 1000},
    ),
    default_targets=lambda model_type: _ROBERTA if model_type == "roberta" else usual_wide_targets(model_type),
    sample_configs={
        "r4": {"init_r": 4, "target_r": 2, "total_step": 10},
        "pruned": {"init_r": 6, "target_r": 2, "total_step": 20, "tinit": 2, "tfinal": 5, "lora_alpha": 16},
    },
    files=FileFormat(prefix="lora_"),
    shares=SharedTensors(state=RankAllocator),
)
class AdaLora(Adapter, Rescales, IsLowRank, ShowsModules, HotSwaps):
    """The three factors of one layer.

    Attributes:
        path: path of the layer.
        dropout: dropout probability of the adapter's input.
        alpha: the config's alpha.
        flags_of_places: for each of the initial ranks, whether the factors contain it: a file lacks pruned ranks.
    """

    peft: ClassVar[PeftNames] = PeftNames(
        "lora_A lora_B lora_E lora_embedding_A lora_embedding_B",
        "r lora_alpha scaling lora_dropout ranknum",
        layer_prefix="SVD",
        constants=(_RANK,),
        model_functions={"update_and_allocate": update_and_allocate},
        model_attributes={
            "trainable_adapter_name": lambda tuner: _trained_name(tuner.manager.configs),
            "rankallocator": lambda tuner: _allocator_of(tuner.manager),
        },
        attributes={"r": "rank", "lora_alpha": "alpha"},
        mappings=(_A, _B, _E, "lora_embedding_A", "lora_embedding_B"),
        modules=("lora_dropout",),
    )
    frozen_parameters: ClassVar[tuple[str, ...]] = (_RANK,)
    from_config: ClassVar[Mapping[str, str]] = {"scaling": "scaling_at", "dropout": "dropout", "alpha": "alpha_at"}
    identity: ClassVar[Mapping[str, float]] = {_E: 0.0}

    flags_of_places: list[bool]
    path: str
    dropout: float
    alpha: float
    allocator: RankAllocator

    @classmethod
    def parameter_shapes(cls, config: AdaLoraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """A, (r, in * kernel), B, (out, r), and E, (r, 1)."""
        check_linear_or_conv2d("AdaLoRA", path, module, kind)
        rank, (rows, *others) = config.rank_at(path), kind.weight_shape(module)
        return {_A: (rank, math.prod(others)), _B: (rows, rank), _E: (rank, 1)}

    @classmethod
    def initial_tensors(cls, config: AdaLoraConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        """Random A and B, and E zero or random, in the order of PEFT's draws."""
        made = {name: site.new(site.shapes[name], normal_) for name in (_A, _E, _B)}
        skip(normal_, site.device, (1,))  # a number for the rank
        if config.init_lora_weights:
            made[_E].zero_()
            made |= {name: site.new(site.shapes[name], partial(normal_, std=_DEVIATION)) for name in (_A, _B)}
        return made

    def prepare(self, config: AdaLoraConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        """Sets the rank as a parameter, and the allocator, a module of the first layer."""
        assert isinstance(site.shared, RankAllocator)
        flags = _places(config, site.path, self.rank)
        self.bind({_RANK: tensors[_E].new_full((1,), float(config.init_r))}, path=site.path, flags_of_places=flags)
        self.bind(allocator=site.shared)
        site.shared.adapters[site.path] = self

    def peft_module(self, name: str, base: BaseLayer) -> nn.Module | None:
        return AdapterDropout(self) if name in self.peft.modules else None

    rank: int = axis_size(_E)
    delta_rank = rank

    @property
    def orthogonal_rows(self) -> tuple[Tensor, Tensor]:
        """A, (r, in), and B, (r, out), transposed so that the rows of both should be orthogonal."""
        return self.tensor(_A), self.tensor(_B).T

    def _factors(self, base: BaseLayer) -> tuple[Tensor, Tensor]:
        """diag(E) A and B in the shapes of two consecutive layers."""
        first, second = self.tensor(_A) * self.tensor(_E), self.tensor(_B)
        kernel = base.kind.weight_shape(base.module)[2:]
        if not kernel:
            return first, second
        return first.view(-1, base.in_features, *kernel), second.view(*second.shape, *[1] * len(kernel))

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``s B diag(E) A dropout(x)``."""
        factors, dropout = (*self._factors(base), self.scaling), Dropout(self.dropout, self.training)
        return low_rank_of(base.kind).forward(base.module, x, factors, dropout)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``s B diag(E) A``."""
        return low_rank_of(base.kind).product(base.module, *self._factors(base)) * self.scaling

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        return LowRankDelta(*self._factors(base), float(self.scaling))

    @torch.no_grad()
    def keep_ranks_(self, left: Tensor | None) -> None:
        """Sets entries of E to zero.

        Args:
            left: bool (r,), True for entries to keep; None to keep those in the config's ``rank_pattern``.
        """
        pattern = self.allocator.config.rank_pattern
        assert pattern is not None
        if left is None:
            known = self.allocator.config.ranks_left(self.path)
            if known is None:
                return
            left = torch.tensor(self._own(known), dtype=torch.bool)
        else:
            flags = iter(left.tolist())
            pattern[f"{self.path}.{_E}"] = [has and next(flags) for has in self.flags_of_places]
        self.tensor(_E).masked_fill_(~left.view(-1, 1).to(self.tensor(_E).device), 0.0)

    def _own(self, left: Sequence[bool]) -> list[bool]:
        """Selects the flags of the ranks in the factors from the flags of all initial ranks."""
        return [flag for flag, has in zip(left, self.flags_of_places, strict=True) if has]

    @property
    def is_whole(self) -> bool:
        """Whether the factors contain all initial ranks."""
        return all(self.flags_of_places)

    @property
    def whole_tensors(self) -> dict[str, Tensor]:
        """The factors with all their ranks, pruned ones included."""
        return {name: self.get_parameter(name) for name in (_A, _B, _E)}

    def saved_tensors(self, shapes: Callable[[], Mapping[str, Shape]]) -> dict[str, Tensor]:
        tensors = super().saved_tensors(shapes)
        left = self._own(self.allocator.config.ranks_left(self.path) or self.flags_of_places)
        if all(left):
            return tensors
        kept = torch.tensor(left, device=tensors[_E].device)
        return {_A: tensors[_A][kept], _B: tensors[_B][:, kept], _E: tensors[_E][kept]}

    def configure(self, config: AdaLoraConfig, path: str) -> None:
        self.bind(flags_of_places=_places(config, path, self.rank))
        self.allocator.bind(config=config)

    def keep_settings(self, change: Transaction) -> None:
        change.keep_attributes(self, "flags_of_places")
        change.keep_attributes(self.allocator, "config")

    @classmethod
    def size_of(cls, shapes: Mapping[str, Shape]) -> int | None:
        return shapes[_E][0]

    @classmethod
    def config_warnings(
        cls, config: AdaLoraConfig, modules: Sequence[tuple[str, nn.Module, LayerKind]]
    ) -> Iterable[str]:
        """Warns about ``r``, which has no effect."""
        if config.r != LoraConfig.r:
            yield f"r = {config.r} says nothing for AdaLoRA: init_r = {config.init_r} is the rank at the start"
