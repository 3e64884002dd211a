"""TinyLoRA: a vector for many layers, spread over the main directions of each weight (arXiv:2602.04118).

    y = W x + B (Σ_i v_i P_i) A x        B A: the r largest singular directions of W; P_i: (r, r), drawn; both frozen

Only the vectors v are trained, one for each group of consecutive layers; ``weight_tying`` determines the number of
groups.

If a layer already has another adapter, PEFT draws P by that adapter's numbering of the layers, so an adapter saved
without P computes something else when it is loaded alone. Here P depends only on the adapter's own config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.config.layers_config import HasFanInFanOut, TrainsBiases
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import AdapterSite, HasFixedTensors, Shape, SharedSite, SharedState
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.bindable import Bindable, stored
from nbpeft.engine.contract.initial_draws import uniform_
from nbpeft.engine.contract.method_records import Listing, SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import ComputedFactors
from nbpeft.engine.kernels.numerics import compute_dtype, widened
from nbpeft.errors import LayerKindError

VECTORS = "tinylora_v"
DOWN, UP, PROJECTION = "tinylora_A", "tinylora_B", "tinylora_P"


@dataclass
class TinyLoraConfig(HasFanInFanOut, TrainsBiases):
    """Config of TinyLoRA. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        r: number of singular directions of a weight that are used.
        u: length of a trained vector.
        weight_tying: 0: each layer has a vector; 1: all layers share one; between: in groups that follow each other.
        projection_seed: seed of the projections P; each layer adds its number.
        save_projection: save the projections too; otherwise they are drawn again from the seed.
        init_v_bound: random initial vectors are uniform between minus and plus this value.
        tinylora_dropout: dropout probability of the adapter's input, from 0 to 1.
        init_weights: True: start at the base model; "uniform" or False: drawn vectors (PEFT's False leaves them as the
            memory happens to be).
    """

    r: int = field(default=2)
    u: int = field(default=64)
    weight_tying: float = field(default=0.0)
    projection_seed: int = field(default=42)
    save_projection: bool = field(default=True)
    init_v_bound: float = field(default=0.02)
    tinylora_dropout: float = field(default=0.0)
    init_weights: bool | str = field(default=True)

    not_negative: ClassVar[tuple[str, ...]] = ("init_v_bound",)
    method_type: ClassVar[str] = "TINYLORA"
    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    counts: ClassVar[tuple[str, ...]] = ("r", "u")
    shares: ClassVar[tuple[str, ...]] = ("weight_tying", "tinylora_dropout")
    seeds: ClassVar[tuple[str, ...]] = ("projection_seed",)
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "init_weights": (True, False, "uniform"),
    }
    value_fields: ClassVar[tuple[str, ...]] = ("tinylora_dropout", "init_v_bound", "init_weights")

    def groups(self, layers: int) -> int:
        """The number of vectors for a number of layers."""
        return max(1, round(layers * (1.0 - self.weight_tying)))


class _Numbered(Bindable):
    """Parameters that have numbers for names."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.bind({str(number): tensor for number, tensor in enumerate(tensors)})

    def __getitem__(self, number: str) -> Tensor:
        return self.tensor(number)

    def __len__(self) -> int:
        return sum(1 for _ in self.parameters())

    def keys(self) -> Iterable[str]:
        """The numbers, as texts."""
        return self._parameters.keys()

    def values(self) -> Iterator[nn.Parameter]:
        """The parameters in the order of their numbers."""
        return self.parameters()


class TinyVectors(SharedState):
    """The trained vectors, (u,) each, and which layers there are."""

    in_layers: ClassVar[bool] = True

    numbers: Mapping[str, int]

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._modules[VECTORS] = _Numbered(tensors)

    @property
    def tinylora_v(self) -> Any:
        """The vectors by their number, a text as in PEFT."""
        return self._modules[VECTORS]

    @classmethod
    def tensor_shapes(cls, config: TinyLoraConfig, features: Mapping[str, tuple[int, int]]) -> Shapes:
        return {f"{VECTORS}.{number}": (config.u,) for number in range(config.groups(len(features)))}

    @classmethod
    def initial_tensors(cls, config: TinyLoraConfig, site: SharedSite) -> Mapping[str, Tensor]:
        bound = config.init_v_bound
        fill = None if config.init_weights is True else partial(uniform_, bound=bound)
        return {name: site.new(shape, fill) for name, shape in site.shapes.items()}

    @classmethod
    def create(cls, config: TinyLoraConfig, site: SharedSite, tensors: Mapping[str, Tensor] | None) -> Self:
        given = cls.initial_tensors(config, site) if tensors is None else tensors
        return cls([given[name].to(site.device, site.dtype) for name in site.shapes])

    def place(self, layers: Mapping[str, BaseLayer]) -> None:
        self.bind(numbers={path: number for number, path in enumerate(layers)})

    def group_of(self, path: str) -> str:
        """The number of the vector of a layer."""
        count = len(self.tinylora_v)
        size = max(1, len(self.numbers) // count)
        return str(min(self.numbers[path] // size, count - 1))


@register(
    TinyLoraConfig,
    label="TinyLoRA",
    listing=Listing(
        when="reinforcement learning: about a dozen parameters for a whole model",
        paper="arXiv:2602.04118",
        summary=lambda config: {"r": str(config.r), "u": str(config.u)},
        smaller=lambda config: config.copy(u=config.u // 2) if config.u > 1 else None,
    ),
    default_targets=usual_targets,
    sample_configs={
        "u8": {"r": 2, "u": 8, "weight_tying": 0.5},
        "drawn": {"r": 3, "u": 5, "save_projection": False},
    },
    shares=SharedTensors(state=TinyVectors),
)
class TinyLora(ComputedFactors, HasFixedTensors):
    """The frozen tensors of one layer: B, (out, r), A, (r, in), and P, (u, r, r); of an embedding's table B A."""

    peft: ClassVar[PeftNames] = PeftNames(
        "tinylora_v",
        "tinylora_A tinylora_B tinylora_P",
        attributes={
            "r": "rank",
            "u": "length",
            VECTORS: "vectors.tinylora_v",
            DOWN: "down",
            UP: "up",
            PROJECTION: "projection",
        },
    )
    from_config: ClassVar[Mapping[str, str]] = {"dropout": "tinylora_dropout", "saves_projection": "save_projection"}

    vectors: TinyVectors
    group: str
    saves_projection: bool
    takes_ids: bool

    @classmethod
    def parameter_shapes(cls, config: TinyLoraConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """Empty: the trained tensors are shared."""
        if not kind.is_linear and not kind.takes_ids:
            raise LayerKindError(
                f"{path}: TinyLoRA works on linear layers and embeddings, not on {kind.peft_name}; exclude it",
                path=path,
            )
        return {}

    @classmethod
    def fixed_tensors(
        cls, config: TinyLoraConfig, shapes: Mapping[str, Shape], module: nn.Module, kind: LayerKind
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """A and B, and P with ``save_projection``."""
        rows, columns = kind.weight_shape(module)
        if kind.takes_ids:
            rows, columns = columns, rows
        rank = min(config.r, rows, columns)
        fixed: Shapes = {DOWN: (rank, columns), UP: (rows, rank)}
        if config.save_projection:
            fixed[PROJECTION] = (config.u, rank, rank)
        return {name: (shape, torch.float32) for name, shape in fixed.items()}

    @classmethod
    def unsaved_elements(cls, config: TinyLoraConfig, module: nn.Module, kind: LayerKind) -> int:
        """The size of P, without ``save_projection``."""
        return 0 if config.save_projection else config.u * min(config.r, *kind.weight_shape(module)) ** 2

    def prepare(self, config: TinyLoraConfig, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        """Sets A, B and P, which are computed from the weight and the seed if not loaded."""
        assert isinstance(site.shared, TinyVectors)
        given = dict(tensors)
        if DOWN not in given or UP not in given:
            given[DOWN], given[UP] = _main_directions(config.r, site)
        if PROJECTION not in given:
            generator = torch.Generator().manual_seed(config.projection_seed + site.shared.numbers[site.path])
            rank = given[DOWN].shape[0]
            drawn = torch.normal(0.0, rank**-0.5, (config.u, rank, rank), generator=generator, dtype=torch.float32)
            given[PROJECTION] = drawn.to(given[DOWN].device)
        for name in (DOWN, UP, PROJECTION):
            self.register_buffer(name, given[name], persistent=name != PROJECTION or config.save_projection)
        group = site.shared.group_of(site.path)
        self.bind(vectors=site.shared, group=group, takes_ids=site.base.kind.takes_ids)

    down: Tensor = stored(DOWN)  # A
    up: Tensor = stored(UP)  # B
    projection: Tensor = stored(PROJECTION)  # P

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def length(self) -> int:
        """Length of the vector."""
        return int(self.projection.shape[0])

    @property
    def vector(self) -> Tensor:
        """v, (u,), on the device of the vectors."""
        return self.vectors.tinylora_v[self.group]

    def core(self) -> Tensor:
        """Σ_i v_i P_i, (r, r), on the device of the layer."""
        vector = self.vector.to(self.down.device)
        return torch.einsum("i,ijk->jk", vector, self.projection.to(vector.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Down, (r, in), and up, (out, r)."""
        core = self.core()
        middle = core @ self.down.to(core.dtype)
        return (self.up.T.to(core.dtype), middle.T) if self.takes_ids else (middle, self.up.to(core.dtype))

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``B R A dropout(x)``, or of an embedding the rows ``dropout(B[x]) R A``."""
        core = self.core()
        if self.takes_ids:
            kind: Any = base.kind
            dtype = core.dtype
            rows = kind.look_up(base.module, x.to(self.up.device), self.up.to(dtype))
            found = F.dropout(rows, self.dropout, self.training) @ core @ self.down.to(dtype)
            return found * kind.output_scale(base.module, dtype)
        dtype = compute_dtype(x, core)
        hidden = F.linear(F.dropout(x.to(dtype), self.dropout, self.training), self.down.to(dtype))
        return F.linear(F.linear(hidden, core.to(dtype)), self.up.to(dtype))

    def saved_tensors(self, shapes: Callable[[], Mapping[str, Shape]]) -> dict[str, Tensor]:
        """A and B, and P with ``save_projection``."""
        return {DOWN: self.down, UP: self.up} | ({PROJECTION: self.projection} if self.saves_projection else {})

    def reset_(self, base: BaseLayer) -> None:
        self.vector.detach().zero_()


def _main_directions(rank: int, site: AdapterSite) -> tuple[Tensor, Tensor]:
    """The largest singular directions of a weight, or an embedding's table, with a root of the values on each side."""
    weight = site.base.weight()
    weight = weight.T if site.base.kind.takes_ids else weight
    dtype = weight.dtype if weight.element_size() > 1 else site.dtype
    left, values, right = torch.linalg.svd(widened(weight), full_matrices=False)
    roots, left, right = values[:rank].to(dtype).sqrt(), left[:, :rank].to(dtype), right[:rank].to(dtype)
    return (roots[:, None] * right).contiguous(), (left * roots).contiguous()
