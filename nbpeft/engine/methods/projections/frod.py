"""FRoD: a full rank from few entries, in directions that all layers of a role share (AAAI 2026, aaai.v40i31.39813).

    y = W x + U (S + diag(λ - λ₀)) Vᵀ dropout(x)        W = U diag(λ₀) Vᵀ;  S: (in, in), sparse

V, (in, in), is shared by the layers of one role, such as all ``q_proj`` of the attention, and computed from their
weights. U, (out, in), has columns of length one and is computed from V and the weight of the layer; it is not saved. λ
and the entries of S are trained. PEFT computes the layer with ``U (S + diag(λ)) Vᵀ`` instead of W, so in half precision
an adapter does not start at the base model; and it loads V from a file without recomputing U, so an adapter from
another machine, where a direction has the opposite sign, computes something else.

If all weights of a role together have fewer rows than columns, some columns of U are normalized rounding errors of V.
They may differ when V is recomputed, and when the base is loaded in another dtype: an adapter trained in float32 then
computes something else on a base in half precision, in PEFT as well as here. With enough rows this does not happen.

PEFT uses V, the positions and their number of a model's first adapter for a second one, whatever its layers and
``sparse_rate`` are, so the second one computes something else when it is loaded alone. Here each adapter has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft._util.interrupts import check_interrupt
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.config.config_checks import check_linear
from nbpeft.engine.config.layers_config import HasFanInFanOut, TrainsBiases
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, ReplacesCall, SharedSite, SharedState
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shape, Shapes
from nbpeft.engine.contract.bindable import stored
from nbpeft.engine.contract.method_records import Listing, SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import apply_delta, with_entries
from nbpeft.engine.kernels.numerics import compute_dtype, widened
from nbpeft.errors import ConfigError

SCALES, ENTRIES = "frod_lambda_l", "frod_lambda_s_values"
DIRECTIONS, PLACES, SIZES = "frod_V", "frod_s_indices", "frod_s_size"
OUTPUTS, START = "frod_U", "frod_start"
_NOTHING = 1e-12
"""Columns of U diag(λ₀) up to this length count as zero."""
_DEVIATION = 0.1
"""Standard deviation of random numbers (``init_weights=False``)."""


@dataclass
class FrodConfig(HasFanInFanOut, TrainsBiases):
    """Config of FRoD. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        projection_prng_key: seed of the positions of S's entries.
        save_projection: save V and the places too; otherwise they are found again from the weights and the seed.
        frod_dropout: dropout probability of the adapter's input, from 0 to 1.
        init_weights: start at the base model; False for random numbers.
        sparse_rate: share of the entries of S, off its diagonal, that are trained, from 0 to 1.
        regularization_alpha: added to the matrix that is inverted to find V, for layers with similar weights.
        progressbar: ignored, accepted as in PEFT: no progress bar is shown.
        runtime_offload_base_weight: ignored, accepted as in PEFT: the base's weight is needed in each call.
    """

    projection_prng_key: int = field(default=0)
    save_projection: bool = field(default=True)
    frod_dropout: float = field(default=0.0)
    init_weights: bool = field(default=True)
    sparse_rate: float = field(default=0.01)
    regularization_alpha: float = field(default=1e-3)
    progressbar: bool = field(default=True)
    runtime_offload_base_weight: bool = field(default=False)

    not_negative: ClassVar[tuple[str, ...]] = ("regularization_alpha",)
    method_type: ClassVar[str] = "FROD"
    not_in_peft: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    shares: ClassVar[tuple[str, ...]] = ("frod_dropout", "sparse_rate")
    seeds: ClassVar[tuple[str, ...]] = ("projection_prng_key",)
    value_fields: ClassVar[tuple[str, ...]] = (
        *("frod_dropout", "init_weights", "regularization_alpha", "progressbar", "runtime_offload_base_weight"),
    )

    @property
    def initialised_from_weight(self) -> bool:
        """Always: U is computed from the layer's weight, and V from the weights of all layers."""
        return True

    def entry_count(self, size: int) -> int:
        """How many entries a S of (size, size) has."""
        others = size * (size - 1)
        count = min(int(size * size * self.sparse_rate), others)
        return max(count, 1) if self.sparse_rate > 0 and others else count


def role_of(path: str) -> str:
    """Name of the layers that share a V, as in PEFT: ``self_attn_q_proj`` of ``layers.3.self_attn.q_proj``."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    return "attention_output" if parts[-3:] == ["attention", "output", "dense"] else "_".join(parts[-2:])


def block_of(path: str, otherwise: int) -> int:
    """The number of the block that a layer is in: the one behind ``layers``, or else the first in the path."""
    parts = path.split(".")
    behind = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*behind, *parts) if part.isdecimal()), otherwise)


class _ByRole(nn.Module):
    """Tensors by the role of their layers."""

    def __init__(self, tensors: Mapping[str, Tensor], *, saved: bool) -> None:
        super().__init__()
        self.saved = saved
        for role, tensor in tensors.items():
            self.hold(role, tensor)

    saved: bool

    def hold(self, role: str, tensor: Tensor) -> None:
        """Keeps a tensor, whatever its role is called."""
        self._buffers[role] = tensor
        if not self.saved:
            self._non_persistent_buffers_set.add(role)

    def __getitem__(self, role: str) -> Tensor:
        tensor: Any = self._buffers[role]
        return tensor


class FrodDirections(SharedState):
    """Of each role of layers V, (in, in), and the places of S, (2, n): rows and columns."""

    made_from: ClassVar[tuple[str, ...]] = (
        *("projection_prng_key", "save_projection", "sparse_rate", "regularization_alpha"),
    )

    is_trained: ClassVar[bool] = False

    regularization: float

    def __init__(self, tensors: Mapping[str, Tensor], config: FrodConfig) -> None:
        super().__init__()
        for name in (DIRECTIONS, PLACES, SIZES):
            own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
            self._modules[name] = _ByRole(own, saved=config.save_projection)
        self.bind(regularization=float(config.regularization_alpha))

    def of_role(self, name: str, role: str) -> Tensor:
        """One of its tensors."""
        holder: Any = self._modules[name]
        return holder[role]

    @classmethod
    def tensor_shapes(cls, config: FrodConfig, features: Mapping[str, tuple[int, int]]) -> Shapes:
        """V, places and size of each role."""
        sizes: dict[str, tuple[str, int]] = {}
        for path, (size, _) in features.items():
            first, expected = sizes.setdefault(role_of(path), (path, size))
            if size != expected:
                raise ConfigError(
                    f"{path} has {size} inputs and {first} {expected}: FRoD's layers of one role, {role_of(path)}, "
                    "share their directions; exclude one",
                    path=path,
                )
        found = {role: size for role, (_, size) in sorted(sizes.items())}
        return {
            **{f"{DIRECTIONS}.{role}": (size, size) for role, size in found.items()},
            **{f"{PLACES}.{role}": (2, config.entry_count(size)) for role, size in found.items()},
            **{f"{SIZES}.{role}": (2,) for role in found},
        }

    @classmethod
    def other_dtypes(cls, shapes: Mapping[str, Shape]) -> dict[str, torch.dtype]:
        return {name: torch.int64 for name in shapes if not name.startswith(f"{DIRECTIONS}.")}

    @classmethod
    def is_saved(cls, config: FrodConfig) -> bool:
        """Whether V and the places are saved (``save_projection``)."""
        return bool(config.save_projection)

    @classmethod
    def create(cls, config: FrodConfig, site: SharedSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Binds loaded tensors, or draws the places; V is found once the layers are known."""
        if tensors is None:
            tensors = _drawn(config, site.shapes)
            return cls({name: one.to(site.device) for name, one in tensors.items()}, config)
        _check(tensors, site.shapes)
        return cls({name: tensors[name].to(site.device) for name in site.shapes}, config)

    def place(self, layers: Mapping[str, BaseLayer]) -> None:
        """Computes V from the weights, unless it was loaded."""
        held: Any = self._modules[DIRECTIONS]
        blocks: dict[str, dict[int, BaseLayer]] = {}
        for number, (path, base) in enumerate(layers.items()):
            blocks.setdefault(role_of(path), {})[block_of(path, number)] = base
        for role in sorted(blocks):
            check_interrupt()  # the decomposition of large weights takes minutes
            made = held._buffers.get(role)
            if made is None:
                weights = [base.weight() for _, base in sorted(blocks[role].items())]
                made = _directions(role, weights, self.regularization)
            held.hold(role, made.to(self.of_role(PLACES, role).device, _dtype_on(next(iter(blocks[role].values())))))

    def recompute_derived(self, layers: Mapping[str, tuple[nn.Module, BaseLayer]], change: Transaction) -> None:
        """Finds U and λ₀ again."""
        for adapter, base in layers.values():
            assert isinstance(adapter, Frod)
            own = adapter.tensor(OUTPUTS), adapter.tensor(START)
            change.keep_values([*own])
            for tensor, found in zip(own, _outputs(self.of_role(DIRECTIONS, adapter.role), base), strict=True):
                tensor.copy_(found)


def _sizes(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Role -> number of inputs."""
    return {name.partition(".")[2]: shape[0] for name, shape in shapes.items() if name.startswith(f"{DIRECTIONS}.")}


def _drawn(config: FrodConfig, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The places, off the diagonal, on the CPU and as PEFT draws them; V is left out."""
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    found = {}
    for role, size in _sizes(shapes).items():
        count = config.entry_count(size)
        numbers = torch.randperm(size * (size - 1), generator=generator)[:count] if count else torch.empty(0).long()
        rows, columns = numbers // max(size - 1, 1), numbers % max(size - 1, 1)
        found[f"{PLACES}.{role}"] = torch.stack([rows, columns + (columns >= rows).long()])
        found[f"{SIZES}.{role}"] = torch.tensor([size, size])
    return found


def _check(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> None:
    """Raises ConfigError if loaded places are outside of S, or the size of S differs."""
    for role, size in _sizes(shapes).items():
        places, sizes = tensors[f"{PLACES}.{role}"], tensors[f"{SIZES}.{role}"]
        if places.numel() and not bool(((places >= 0) & (places < size)).all()):
            raise ConfigError(f"{PLACES}.{role} has places outside of {size} x {size}")
        if sizes.tolist() != [size, size]:
            raise ConfigError(f"{SIZES}.{role} must be [{size}, {size}], not {sizes.tolist()}")


def _dtype_on(base: BaseLayer) -> torch.dtype:
    """The dtype of the weight, or float32 for an 8-bit weight."""
    return base.dtype if base.dtype.itemsize > 1 else torch.float32


def _on_host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor on the CPU, where decompositions give PEFT's directions; meta tensors stay meta tensors."""
    return tensor.detach().to("meta" if tensor.is_meta else "cpu", dtype)


def _directions(role: str, weights: Sequence[Tensor], regularization: float) -> Tensor:
    """V, (in, in), in float32.

    Raises:
        ConfigError: the weights cannot be decomposed.
    """
    parts = [_on_host(weight, torch.float32) for weight in weights]
    stacked = torch.cat(parts)
    try:
        if stacked.shape[0] < stacked.shape[1]:
            right: Tensor = torch.linalg.svd(stacked, full_matrices=True).Vh
            return right.T
        rows, triangle = torch.linalg.qr(stacked)
        size = triangle.shape[1]
        ridge = regularization * torch.eye(size, device=rows.device)
        own = torch.split(rows, [len(part) for part in parts])
        total = torch.zeros(size, size, device=rows.device)
        for part in own:
            total += torch.linalg.inv(part.T @ part + ridge)
        return triangle.T @ torch.linalg.eigh(total / len(own)).eigenvectors
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ConfigError(
            f"FRoD finds no directions in the weights of {role}; raise regularization_alpha = {regularization:g}: "
            f"{str(error).splitlines()[0]}"
        ) from None


def _outputs(directions: Tensor, base: BaseLayer) -> tuple[Tensor, Tensor]:
    """U, (out, in), and λ₀, (in,), with U diag(λ₀) Vᵀ equal to the weight, in its dtype and on its device."""
    weight, wide = _on_host(base.weight(), torch.float64), _on_host(directions, torch.float64)
    try:
        product = torch.linalg.solve(wide, weight.T).T
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        product = weight @ torch.linalg.pinv(wide, rtol=1e-6).T
    lengths = torch.linalg.vector_norm(product, dim=0)
    columns = torch.where(lengths > _NOTHING, product / lengths, 0.0)
    placed = (one.to(torch.float32).to(base.device, _dtype_on(base)) for one in (columns, lengths))
    outputs, start = placed
    return outputs, start


@register(
    FrodConfig,
    label="FRoD",
    listing=Listing(
        when="full rank from few parameters: fast convergence, slow to add",
        paper="https://doi.org/10.1609/aaai.v40i31.39813",
        summary=lambda config: {"sparse": f"{config.sparse_rate:g}"},
        smaller=lambda config: config.copy(sparse_rate=config.sparse_rate / 2) if config.sparse_rate > 1e-4 else None,
    ),
    default_targets=lambda model_type: ["q_proj", "v_proj"] if model_type == "phi" else usual_targets(model_type),
    sample_configs={
        "entries": {"sparse_rate": 0.05},
        "found": {"sparse_rate": 0.02, "projection_prng_key": 3, "save_projection": False},
    },
    shares=SharedTensors(state=FrodDirections),
)
class Frod(Adapter, ReplacesCall):
    """λ, (in,), and the entries of S, (n,), of one layer."""

    peft: ClassVar[PeftNames] = PeftNames(
        "frod_lambda_l frod_lambda_s_values",
        "r frod_V frod_U frod_s_indices frod_s_size runtime_offload_base_weight frod_dropout",
        attributes={
            "r": "rank",
            DIRECTIONS: "directions",
            PLACES: "places",
            SIZES: "sizes",
            OUTPUTS: "outputs",
        },
        on_model=(DIRECTIONS, PLACES, SIZES),
    )
    from_config: ClassVar[Mapping[str, str]] = {"dropout": "frod_dropout"}

    projections: FrodDirections
    role: str
    dropout: float

    @classmethod
    def parameter_shapes(cls, config: FrodConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """λ, (in,), and the entries, (n,)."""
        check_linear("FRoD", path, kind)
        size = kind.features(module)[0]
        return {SCALES: (size,), ENTRIES: (config.entry_count(size),)}

    @classmethod
    def create(cls, config: FrodConfig, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Binds loaded tensors or makes new ones, and finds U."""
        assert isinstance(site.shared, FrodDirections)
        role = role_of(site.path)
        outputs, start = _outputs(site.shared.of_role(DIRECTIONS, role), site.base)
        if tensors is None:
            scales = start.to(site.dtype, copy=True)
            entries = torch.zeros(site.shapes[ENTRIES], device=scales.device, dtype=site.dtype)
            if not config.init_weights:
                entries.normal_(std=_DEVIATION)
                scales += torch.randn_like(scales) * _DEVIATION
            tensors = {SCALES: scales, ENTRIES: entries}
        made = super().create(config, site, tensors)
        for name, found in ((OUTPUTS, outputs), (START, start)):
            made.register_buffer(name, found, persistent=False)
        made.bind(projections=site.shared, role=role)
        return made

    outputs: Tensor = stored(OUTPUTS)  # U

    @property
    def directions(self) -> Tensor:
        """V, on the device where it is stored."""
        return self.projections.of_role(DIRECTIONS, self.role)

    @property
    def places(self) -> Tensor:
        """Rows and columns of the entries, on the device where they are stored."""
        return self.projections.of_role(PLACES, self.role)

    @property
    def sizes(self) -> Tensor:
        """(in, in), as a tensor."""
        return self.projections.of_role(SIZES, self.role)

    @property
    def rank(self) -> int:
        """What PEFT calls its rank: the number of outputs."""
        return int(self.outputs.shape[0])

    def change(self, scales: Tensor, entries: Tensor) -> Tensor:
        """``S + diag(λ - λ₀)``, (in, in), in the dtype of the trained parameters."""
        return self.whole(scales - self.tensor(START).to(scales.dtype), entries)

    def whole(self, scales: Tensor, entries: Tensor) -> Tensor:
        """``S + diag(λ)``, (in, in)."""
        return with_entries(torch.diag(scales), self.places, entries)

    def _between(self, x: Tensor, base: BaseLayer, compute: Callable[..., Tensor], bias: Tensor | None) -> Tensor:
        """``U M Vᵀ x`` and a bias, in the dtype of U or autocast's."""
        outputs, trained = self.outputs, (self.tensor(SCALES), self.tensor(ENTRIES))
        dtype = compute_dtype(x, outputs)
        inner = F.linear(x.to(dtype), self.directions.to(outputs.device, dtype).T)
        bias = None if bias is None else bias.to(dtype)
        return F.linear(apply_delta(inner, base, compute, trained, dtype=dtype), outputs.to(dtype), bias)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``U (S + diag(λ - λ₀)) Vᵀ dropout(x)``."""
        return self._between(F.dropout(x, self.dropout, self.training), base, self.change, None)

    def output(self, x: Tensor, base: BaseLayer) -> Tensor | None:
        """``U (S + diag(λ)) Vᵀ x`` and the bias, where that is as exact as the weight."""
        dtypes = {base.dtype, x.dtype, compute_dtype(x, self.outputs)}
        if base.backend.name != "dense" or dtypes != {torch.float32} or (self.training and self.dropout):
            return None
        return self._between(x, base, self.whole, base.bias)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """``U (S + diag(λ - λ₀)) Vᵀ``."""
        outputs = widened(self.outputs)
        change = self.change(self.tensor(SCALES), self.tensor(ENTRIES)).to(outputs.dtype)
        return outputs @ (change @ self.directions.to(outputs).T)

    @torch.no_grad()
    def reset_(self, base: BaseLayer) -> None:
        """Sets λ to λ₀ and the entries to zero."""
        self.get_parameter(SCALES).copy_(self.tensor(START))
        self.get_parameter(ENTRIES).zero_()

    @classmethod
    def config_warnings(cls, config: FrodConfig, modules: Sequence[tuple[str, nn.Module, LayerKind]]) -> Iterable[str]:
        """Warns that ``runtime_offload_base_weight`` has no effect."""
        if config.runtime_offload_base_weight:
            yield "runtime_offload_base_weight does nothing: the base's weights are needed in each call, and stay"
