"""AdaMSS: low-rank adaptation in parts of a weight, clusters of its rows (Zheng et al. 2025, openreview 8ZdWmpYxT0).

    y_k = (W x + b)_k + B_k A_k V [x, 1]        k: a cluster of outputs;  [W, b] ≈ U diag(s) V, the rank-r part

The rows of U are clustered by k-means. V, (r, in + 1), is frozen and saved; without a bias of the layer it is (r, in).
With ``use_asa`` the importance of each is measured after every step, by weight times
gradient, and every ``mask_interval`` steps the least important subspaces of the whole model are pruned.

PEFT's files do not contain the clusters of the outputs: they are recomputed from the weight, and a file is refused if
the clusters have other sizes. Files written here contain them in one additional tensor, which PEFT ignores. PEFT draws
the start of its decomposition on the weight's device, so a file that was trained on a GPU is another adapter on a CPU,
and no other device finds its clusters; here the draws are those of a CPU everywhere. PEFT leaves one subspace fewer
than ``asa_target_subspaces`` and its schedule specify.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.config.config_checks import check_count, check_linear, check_positive, warn_of_unused
from nbpeft.engine.config.layers_config import LayersConfig
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import (
    Adapter,
    AdapterSite,
    ConvertsToLora,
    HasFixedTensors,
    HotSwaps,
    LowRankDelta,
    Shape,
)
from nbpeft.engine.contract.allocator import Allocator, update_and_allocate
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.initial_draws import normal_, skip
from nbpeft.engine.contract.method_records import Listing, SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register, resolve_backend
from nbpeft.engine.contract.weight_delta import keeping_inputs
from nbpeft.engine.kernels.numerics import compute_dtype
from nbpeft.engine.kernels.storage import loaded
from nbpeft.engine.methods.projections.decomposition import main_directions, row_clusters, row_directions
from nbpeft.errors import ConfigError, shown

A, B = "adamss_A", "adamss_B"
DIRECTIONS, CLUSTERS = "adamss_newB", "adamss_clusters"
_KEY = re.compile(rf"(?:base_model\.model\.)?(.+)\.({A}|{B})\.(\d{{1,6}})")
_AVERAGES, _GONE = ("importance", "uncertainty"), "gone"
"""Names in the training state."""
_MOST_CLUSTERS = 2**15 - 1
"""As many as the numbers of clusters in a file can tell apart."""
_DEVIATION = 0.01
"""Standard deviation of a random B."""

Sizes = tuple[tuple[int, int], ...]
"""Of each subspace its outputs and its rank."""


@dataclass
class AdamssConfig(LayersConfig):
    """Config of AdaMSS. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: number of singular directions of a weight that are used.
        num_subspaces: number of subspaces of a weight.
        subspace_rank: rank of the trained product in each subspace.
        init_weights: "orthogonal" starts at the base model; None, or False, with a random B.
        use_asa: prune subspaces in training.
        asa_target_subspaces: number of subspaces that are trained at the end, in the whole model.
        init_warmup: step before which all subspaces are trained.
        final_warmup: step after which no more subspaces are pruned.
        mask_interval: number of steps between two prunings.
        asa_importance_beta: decay of the moving average of the importance, from 0 to 1.
        asa_uncertainty_beta: decay of the moving average of its uncertainty, from 0 to 1.
        asa_schedule_exponent: larger values prune more subspaces at the beginning.
        use_dynamic_rank: a lower rank where the singular values of a subspace fall fast.
        svd_threshold: singular values above this share of the largest are counted, from 0 to 1.
        random_seed: seed of the decomposition.
    """

    r: int = field(default=100)
    num_subspaces: int = field(default=5)
    subspace_rank: int = field(default=1)
    init_weights: str | bool | None = field(default="orthogonal")
    use_asa: bool = field(default=False)
    asa_target_subspaces: int = field(default=50)
    init_warmup: int = field(default=50)
    final_warmup: int = field(default=1000)
    mask_interval: int = field(default=100)
    asa_importance_beta: float = field(default=0.85)
    asa_uncertainty_beta: float = field(default=0.85)
    asa_schedule_exponent: float = field(default=3.0)
    use_dynamic_rank: bool = field(default=False)
    svd_threshold: float = field(default=0.1)
    random_seed: int = field(default=0)

    found_at: ClassVar[Any] = None
    """Path -> the subspaces that were found in a weight, until an adapter is made of them."""
    method_type: ClassVar[str] = "ADAMSS"
    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    counts: ClassVar[tuple[str, ...]] = ("r", "num_subspaces", "subspace_rank")
    shares: ClassVar[tuple[str, ...]] = ("asa_importance_beta", "asa_uncertainty_beta", "svd_threshold")
    seeds: ClassVar[tuple[str, ...]] = ("random_seed",)
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"init_weights": ("orthogonal", None)}
    value_fields: ClassVar[tuple[str, ...]] = (
        *("init_weights", "use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval"),
        *("asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"),
    )
    sizes: ClassVar[Mapping[str, Sizes]] = {}
    """Path -> sizes of the subspaces in the file that it was read with."""

    def __post_init__(self) -> None:
        self.init_weights = None if self.init_weights is False else self.init_weights
        super().__post_init__()
        if self.num_subspaces > _MOST_CLUSTERS:
            raise ConfigError(
                f"num_subspaces must be at most {_MOST_CLUSTERS}, not {self.num_subspaces:.3g}", field="num_subspaces"
            )
        if self.use_asa:
            self._check_schedule()
        schedule = ("asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval", "asa_schedule_exponent")
        warn_of_unused(self, {"use_asa": True}, *schedule, "asa_importance_beta", "asa_uncertainty_beta")
        warn_of_unused(self, {"use_dynamic_rank": True}, "svd_threshold")

    def _check_schedule(self) -> None:
        check_count("asa_target_subspaces", self.asa_target_subspaces)
        check_count("mask_interval", self.mask_interval)
        if self.init_warmup >= self.final_warmup:
            raise ConfigError(
                f"init_warmup = {self.init_warmup} leaves no step until final_warmup = {self.final_warmup} in which "
                "subspaces go: lower it",
                field="init_warmup",
            )
        check_positive("asa_schedule_exponent", self.asa_schedule_exponent)

    def budget_at(self, step: int, subspaces: int) -> int:
        """Number of subspaces that are trained after a step of the schedule."""
        left = 1 - (step - self.init_warmup) / (self.final_warmup - self.init_warmup)
        more = (subspaces - self.asa_target_subspaces) * left**self.asa_schedule_exponent
        return int(self.asa_target_subspaces + more)

    def reconciled(self, tensors: Mapping[str, Tensor]) -> tuple[Self, Mapping[str, Tensor]]:
        """A copy of the config with the sizes of the subspaces in the file."""
        found: dict[str, dict[tuple[str, int], Tensor]] = {}
        for key, tensor in tensors.items():
            named = _KEY.fullmatch(key)
            if named is not None and tensor.ndim == 2:
                found.setdefault(named[1], {})[named[2], int(named[3])] = tensor
        sizes = {path: sizes for path, given in found.items() if (sizes := _sizes_of(self, given))}
        return self.copy(sizes=sizes), tensors

    def sizes_at(self, path: str, module: nn.Module, kind: LayerKind) -> Sizes:
        """Sizes of the subspaces on a layer: those in its file, else those in its weight."""
        sizes, outputs = self.sizes.get(path, ()), kind.features(module)[1]
        if sum(rows for rows, _ in sizes) == outputs:
            return sizes
        backend = resolve_backend(module)
        assert backend is not None
        found = _subspaces(self, BaseLayer(module, kind, backend))
        if self.found_at is None:
            self.set_derived(found_at=_FoundAt())
        self.found_at[path] = found
        return found.sizes


def _update_importance(
    layer: Any, adapter_name: str, importance_beta: float = 0.85, uncertainty_beta: float = 0.85
) -> None:
    """PEFT's function of a layer: measures the importance of the subspaces of one adapter on it."""
    layer.adapters[adapter_name].measure(importance_beta, uncertainty_beta)


def _reset_importance(layer: Any, adapter_name: str) -> None:
    """PEFT's function of a layer: resets the importance of the subspaces."""
    layer.adapters[adapter_name].importance.clear()


_PEFT_NAMES = PeftNames(
    "adamss_A adamss_B",
    "num_subspaces train_subspace_index seg_result scatter_index exp_avg_ipt_A exp_avg_ipt_B exp_avg_unc_A "
    "exp_avg_unc_B adamss_newB",
    lists=(A, B),
    attributes={
        **{DIRECTIONS: DIRECTIONS, "num_subspaces": "count"},
        **{f"exp_avg_{what}": f"averages.{what}" for what in ("ipt_A", "ipt_B", "unc_A", "unc_B")},
    },
    functions={"update_importance": _update_importance, "reset_importance": _reset_importance},
    model_functions={"update_and_allocate": update_and_allocate},
)


class SubspaceAllocator(Allocator):
    """Chooses the subspaces of an adapter that are trained; see ``AdamssConfig.use_asa``.

    Attributes:
        adapters: path -> the adapter of a layer.
    """

    effect_without_step: ClassVar[str] = "AdaMSS with use_asa=True takes no subspace away"

    adapters: dict[str, Adamss]
    config: AdamssConfig

    def extra_loss(self) -> Tensor | None:
        if self.config.use_asa:
            self.warn_if_not_stepped()
        return None

    @property
    def has_training_state(self) -> bool:
        """With ``use_asa``."""
        return self.config.use_asa

    def training_state(self) -> dict[str, Tensor]:
        """The moving averages, and the pruned subspaces."""
        state: dict[str, Tensor] = {}
        for path, adapter in self.adapters.items():
            for name, pair in adapter.importance.items():
                state |= {f"{path}.{name}.{which}": one for which, one in zip(_AVERAGES, pair, strict=True)}
            if adapter.gone:
                state[f"{path}.{_GONE}"] = torch.tensor(sorted(adapter.gone))
        return state

    def set_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets both."""
        for path, adapter in self.adapters.items():
            adapter.importance.clear()
            for name, parameter in adapter.named_parameters(recurse=False):
                pair = [state[key] for which in _AVERAGES if (key := f"{path}.{name}.{which}") in state]
                if len(pair) == len(_AVERAGES):
                    mean, spread = (one.to(parameter, copy=True) for one in pair)
                    adapter.importance[name] = mean, spread
            gone = state.get(f"{path}.{_GONE}")
            if adapter.gone or gone is not None:
                adapter.gone.clear()
                adapter.requires_grad_(True)
                adapter.gone.update([] if gone is None else gone.tolist())
                adapter.keep_gone_()

    def allocate(self, step: int) -> None:
        """Measures the importance of each subspace, and prunes subspaces by the schedule."""
        config, adapters = self.config, list(self.adapters.values())
        if not config.use_asa:
            return
        for adapter in adapters:
            adapter.keep_gone_()
        if not config.init_warmup <= step <= config.final_warmup:
            return
        for adapter in adapters:
            adapter.measure(config.asa_importance_beta, config.asa_uncertainty_beta)
        if step % config.mask_interval == 0:
            self._allocate(config.budget_at(step, sum(adapter.count for adapter in adapters)))
            for adapter in adapters:
                adapter.importance.clear()

    def _allocate(self, budget: int) -> None:
        """Prunes the least important subspaces with gradients, so that at most ``budget`` of them are left."""
        scores = [(adapter, k, score) for adapter in self.adapters.values() for k, score in adapter.scores().items()]
        for adapter, k, _ in sorted(scores, key=lambda one: one[2], reverse=True)[budget:]:
            adapter.gone.add(k)
        for adapter in self.adapters.values():
            adapter.keep_gone_()


@register(
    AdamssConfig,
    label="AdaMSS",
    listing=Listing(
        when="few parameters per cluster of a weight; can reduce their number in training",
        paper="https://openreview.net/forum?id=8ZdWmpYxT0",
        summary=lambda config: {"r": f"{config.r}, {config.subspace_rank} in each", "K": str(config.num_subspaces)},
    ),
    default_targets=usual_targets,
    sample_configs={
        "k3": {"r": 6, "num_subspaces": 3, "subspace_rank": 2},
        "dynamic": {"r": 8, "num_subspaces": 2, "subspace_rank": 3, "use_dynamic_rank": True, "svd_threshold": 0.5},
    },
    shares=SharedTensors(state=SubspaceAllocator),
)
class Adamss(Adapter, ConvertsToLora, HasFixedTensors, HotSwaps):
    """The subspaces of one layer.

    Attributes:
        importance: parameter -> moving averages of its importance and of the uncertainty of that, shaped like it.
        gone: indices of the pruned subspaces, which are no longer trained.
    """

    peft: ClassVar[PeftNames] = _PEFT_NAMES
    optional_tensors: ClassVar[tuple[str, ...]] = (CLUSTERS,)

    importance: dict[str, tuple[Tensor, Tensor]]
    gone: set[int]
    count: int
    allocator: SubspaceAllocator

    @classmethod
    def parameter_shapes(cls, config: AdamssConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """Of each subspace A, (rank, r), and B, (outputs, rank)."""
        check_linear("AdaMSS", path, kind)
        sizes, rank = config.sizes_at(path, module, kind), min(config.r, *_matrix_shape(module, kind))
        shapes = {f"{A}.{k}": (size, rank) for k, (_, size) in enumerate(sizes)}
        return {**shapes, **{f"{B}.{k}": size for k, size in enumerate(sizes)}}

    @classmethod
    def fixed_tensors(
        cls, config: AdamssConfig, shapes: Mapping[str, Shape], module: nn.Module, kind: LayerKind
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """V, and the number of each output's cluster, (out,)."""
        outputs, inputs = _matrix_shape(module, kind)
        directions = (min(config.r, outputs, inputs), inputs)
        return {DIRECTIONS: (directions, torch.float32), CLUSTERS: ((outputs,), torch.int16)}

    @classmethod
    def create(cls, config: AdamssConfig, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Binds loaded tensors, possibly without clusters, or creates new ones."""
        given = dict(tensors or {})
        if CLUSTERS in given:
            _check_clusters(given[CLUSTERS], site)
        if tensors is None or not given.keys() >= {DIRECTIONS, CLUSTERS}:
            found = (config.found_at or {}).pop(site.path, None) or _subspaces(config, site.base)
            if tensors is not None and CLUSTERS not in given:
                _check_sizes(found, site)
            given = {**_start(found, config, site), **given} if tensors is None else given
            given = {DIRECTIONS: found.directions, CLUSTERS: found.clusters.to(torch.int16), **given}
        assert isinstance(site.shared, SubspaceAllocator)
        made, device = cls(), given[f"{A}.0"].device  # the layer's device, unless only a file was read
        made.bind({name: given[name] for name in given if _KEY.fullmatch(f"x.{name}")})
        made.register_buffer(DIRECTIONS, given[DIRECTIONS].to(device, torch.float32))
        made.register_buffer(CLUSTERS, given[CLUSTERS].to(device))
        made.bind(importance={}, gone=set(), count=len(site.shapes) // 2, allocator=site.shared)
        site.shared.adapters[site.path] = made
        return made

    def _matrices(self, name: str) -> list[Tensor]:
        return [self.tensor(f"{name}.{k}") for k in range(self.count)]

    @property
    def delta_rank(self) -> int | None:
        ranks = sum(matrix.shape[0] for matrix in self._matrices(A))
        return min(ranks, int(self.tensor(DIRECTIONS).shape[0]))

    def _up(self, *given: Tensor) -> Tensor:
        """All B, each in its rows and columns, (out, ranks)."""
        blocks: Tensor = torch.block_diag(*given)
        return torch.zeros_like(blocks).index_copy(0, self.tensor(CLUSTERS).argsort(stable=True), blocks)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``B_k A_k V [x, 1]`` in the outputs of each cluster."""
        down, directions = torch.cat(self._matrices(A)), self.tensor(DIRECTIONS)
        dtype, inputs = compute_dtype(x, down), base.in_features
        constant = directions[:, inputs].to(dtype) if directions.shape[1] > inputs else None
        hidden = F.linear(x.to(dtype), directions[:, :inputs].to(dtype), constant)
        hidden = F.linear(hidden, down.to(dtype))
        return keeping_inputs(
            lambda hidden, *given: hidden @ self._up(*given).to(dtype).T.contiguous(), hidden, *self._matrices(B)
        )

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        up, inputs = self._up(*self._matrices(B)), base.in_features
        down = torch.cat(self._matrices(A)) @ self.tensor(DIRECTIONS).to(up.dtype)
        bias = None if down.shape[1] == inputs else up @ down[:, inputs]
        return LowRankDelta(down[:, :inputs].contiguous(), up, 1.0, bias)

    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        return self.low_rank_delta(base).bias

    def measure(self, importance_beta: float, uncertainty_beta: float) -> None:
        """Updates the moving averages of its parameters that have a gradient."""
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.grad is None:
                continue
            now = (parameter.detach() * parameter.grad).abs()
            mean, spread = self.importance.get(name) or (torch.zeros_like(now), torch.zeros_like(now))
            spread = spread.lerp((now - mean).abs(), 1 - uncertainty_beta)
            self.importance[name] = mean.lerp(now, 1 - importance_beta), spread

    def scores(self) -> dict[int, float]:
        """Index of each measured subspace -> its importance."""
        found: dict[int, float] = {}
        for k in range(self.count):
            measured = [self.importance.get(f"{name}.{k}") for name in (A, B)]
            if all(measured):
                found[k] = sum(float((mean * spread).mean()) for mean, spread in measured)  # type: ignore[misc]
        return found

    def keep_gone_(self) -> None:
        """Freezes the pruned subspaces."""
        for name in (f"{matrix}.{k}" for k in self.gone for matrix in (A, B)):
            parameter = self.tensor(name)
            parameter.requires_grad_(False)
            parameter.grad = None

    @property
    def averages(self) -> SimpleNamespace:
        """Importance (ipt) and its uncertainty (unc) of each A and B, by PEFT's names; None if not measured yet."""
        found = {}
        for place, what in enumerate(("ipt", "unc")):
            for of, name in (("A", A), ("B", B)):
                pairs = (self.importance.get(f"{name}.{k}") for k in range(self.count))
                found[f"{what}_{of}"] = [None if pair is None else pair[place] for pair in pairs]
        return SimpleNamespace(**found)

    def reset_(self, base: BaseLayer) -> None:
        for matrix in self._matrices(B):
            matrix.detach().zero_()

    def configure(self, config: AdamssConfig, path: str) -> None:
        self.allocator.bind(config=config)

    def keep_settings(self, change: Transaction) -> None:
        change.keep_attributes(self.allocator, "config")


@dataclass(frozen=True)
class Subspaces:
    """The subspaces of a weight.

    Attributes:
        directions: V, (r, in) or (r, in + 1), float32.
        rows: U, (out, r), float32.
        clusters: number of the cluster of each output, (out,).
        sizes: outputs and rank of each.
    """

    directions: Tensor
    rows: Tensor
    clusters: Tensor
    sizes: Sizes


class _FoundAt(dict[str, Subspaces]):
    """Path -> subspaces that a plan computed, for the adapter to reuse; not copied with the config."""

    def __deepcopy__(self, memo: Any) -> _FoundAt:
        return _FoundAt()


def _matrix_shape(module: nn.Module, kind: LayerKind) -> tuple[int, int]:
    """Shape of a weight with its bias as one more column."""
    inputs, outputs = kind.features(module)
    return outputs, inputs + (getattr(module, "bias", None) is not None)


@torch.no_grad()
def _subspaces(config: AdamssConfig, base: BaseLayer) -> Subspaces:
    """Divides the weight of a layer into subspaces; into equal parts if it has no values."""
    outputs, inputs = _matrix_shape(base.module, base.kind)
    rank, weight, bias = min(config.r, outputs, inputs), base.weight(), base.bias
    if not _has_values(weight):
        clusters = torch.arange(outputs, device=weight.device) % min(config.num_subspaces, outputs)
        sizes = tuple((len(part), min(len(part), config.subspace_rank)) for part in _parts(outputs, config))
        options: Any = {"device": weight.device, "dtype": torch.float32}
        return Subspaces(torch.empty(rank, inputs, **options), torch.empty(outputs, rank, **options), clusters, sizes)
    matrix = weight.float() if bias is None else torch.cat((weight.float(), bias.float()[:, None]), 1)
    return _parted(config, matrix, rank)


def _has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values; those of plans and forecasts only have a shape."""
    return not tensor.is_meta and not isinstance(tensor, loaded("torch._subclasses.fake_tensor", "FakeTensor"))


def _parts(outputs: int, config: AdamssConfig) -> list[range]:
    count = min(config.num_subspaces, outputs)
    return [range(k, outputs, count) for k in range(count)]


def _parted(config: AdamssConfig, matrix: Tensor, rank: int) -> Subspaces:
    rows, directions = main_directions(matrix, rank, config.random_seed)
    clusters = row_clusters(rows, min(config.num_subspaces, len(rows))).to(rows.device)
    counts = clusters.bincount().tolist()
    ranks = [min(count, config.subspace_rank) for count in counts]
    if config.use_dynamic_rank:
        for k in range(len(ranks)):
            values = torch.linalg.svdvals(rows[clusters == k]).square()
            ranks[k] = max(1, min(ranks[k], int((values > config.svd_threshold * values[0]).sum())))
    return Subspaces(directions, rows, clusters, tuple(zip(counts, ranks, strict=True)))


def _start(found: Subspaces, config: AdamssConfig, site: AdapterSite) -> dict[str, Tensor]:
    """New parameters: A, main directions of the rows in each cluster, and B, zero or random."""
    device, made = site.base.device, {}
    for k, (outputs, rank) in enumerate(found.sizes):
        if _has_values(found.rows):
            if config.use_dynamic_rank:  # PEFT draws these numbers to find the rank
                skip(normal_, device, (outputs, outputs))
            first = row_directions(found.rows[found.clusters == k], rank)
        else:
            first = found.rows.new_empty(rank, found.rows.shape[1])
        made[f"{A}.{k}"] = first.to(device, site.dtype).contiguous()
        second = torch.zeros(outputs, rank, device=device, dtype=site.dtype)
        made[f"{B}.{k}"] = second if config.init_weights else torch.randn_like(second) * _DEVIATION
    return dict(sorted(made.items(), key=lambda one: one[0].partition(".")[0]))


def _check_clusters(clusters: Tensor, site: AdapterSite) -> None:
    """Raises ConfigError if the numbers of clusters in a file differ from those of its matrices."""
    sizes = [shape[0] for name, shape in site.shapes.items() if name.startswith(B)]
    counts = clusters.long().clamp_min(-1).add(1).bincount(minlength=len(sizes) + 1).tolist()
    if counts != [0, *sizes]:
        raise ConfigError(
            f"{site.path}: {CLUSTERS} in the file puts {shown(counts[1:])} outputs into the subspaces, whose "
            f"matrices have {shown(sizes)}",
            path=site.path,
        )


def _check_sizes(found: Subspaces, site: AdapterSite) -> None:
    """Raises ConfigError if the clusters of a weight differ from those of a file without their numbers."""
    wanted = [shape[0] for name, shape in site.shapes.items() if name.startswith(B)]
    have = [outputs for outputs, _ in found.sizes]
    if _has_values(found.rows) and have == wanted:
        return
    weight = f"those of this weight {shown(have)}" if _has_values(found.rows) else "and this weight is not loaded"
    raise ConfigError(
        f"{site.path}: the subspaces of the file have {shown(wanted)} outputs, {weight}: the file does not hold them, "
        "and they are found again only in the weight it was trained on, with no adapter merged into it, and with PEFT "
        "on the kind of device it was trained on",
        path=site.path,
    )


def _sizes_of(config: AdamssConfig, given: Mapping[tuple[str, int], Tensor]) -> Sizes:
    """Sizes of the subspaces of a complete set of matrices that the config allows; otherwise ()."""
    count = len(given) // 2
    if count > config.num_subspaces or given.keys() != {(name, k) for name in (A, B) for k in range(count)}:
        return ()
    sizes = tuple((int(given[B, k].shape[0]), int(given[B, k].shape[1])) for k in range(count))
    return sizes if all(_may_have(config, *size) for size in sizes) else ()


def _may_have(config: AdamssConfig, outputs: int, rank: int) -> bool:
    largest = min(outputs, config.subspace_rank)
    return 0 < rank <= largest if config.use_dynamic_rank else 0 < rank == largest
