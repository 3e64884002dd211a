"""Which base model an adapter belongs to: a fingerprint, taken in milliseconds.

It holds the model's class, how many parameters of which shape it has, and a hash of sampled
weights. Adapters on the model change nothing; merged ones do change the weights, so take it
while nothing is merged. Samples are rounded to bfloat16 before hashing, so that the same weights
loaded as float32 or bfloat16 agree.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nbpeft.engine.injection.replication import before_replication
from nbpeft.engine.kernels.quantized_matrices import QuantizedMatrices
from nbpeft.engine.tree.model_tree import bare_modules
from nbpeft.errors import BaseMismatchError, few

_PREFIX = "nbpeft.base."
_SAMPLES = 8
_LONGEST_SIZE = 100
"""Letters of a size or a class; what is longer is not a fingerprint."""
_MOST_SIZES = 10_000
_COMPARABLE = frozenset({"float32", "bfloat16"})


@dataclass(frozen=True)
class Fingerprint:
    """What distinguishes base models.

    Attributes:
        architecture: the model's class.
        shapes: sizes of weights, ``"out x in"`` with the larger first, -> how many there are.
        dtype: dtype most weights are stored in, or ``"quantized"``.
        weights: hash of sampled weights; empty when they are quantized or not in memory.
    """

    architecture: str
    shapes: Mapping[str, int]
    dtype: str
    weights: str

    def to_metadata(self) -> dict[str, str]:
        """As text entries for the metadata of a file."""
        return {
            f"{_PREFIX}architecture": self.architecture,
            f"{_PREFIX}shapes": json.dumps(dict(self.shapes), sort_keys=True, separators=(",", ":")),
            f"{_PREFIX}dtype": self.dtype,
            f"{_PREFIX}weights": self.weights,
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Fingerprint | None:
        """The fingerprint in a file's metadata, or None if there is none that can be read."""
        try:
            shapes = json.loads(metadata[f"{_PREFIX}shapes"])
            if len(shapes) > _MOST_SIZES or not all(
                len(size) <= _LONGEST_SIZE and _numbers(size) >= 0 and type(count) is int
                for size, count in shapes.items()
            ):
                return None
            return cls(
                architecture=metadata[f"{_PREFIX}architecture"][:_LONGEST_SIZE],
                shapes=shapes,
                dtype=metadata[f"{_PREFIX}dtype"],
                weights=metadata[f"{_PREFIX}weights"],
            )
        except (KeyError, ValueError, AttributeError, TypeError, RecursionError):
            return None


@torch.no_grad()
def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of a base model, as if no adapter were on it.

    Args:
        model: the base model. None of its adapters may be merged.
    """
    shapes: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    samples: list[Tensor] = []
    in_memory = True
    for module in _modules(model):
        shapes.update(_weight_sizes(module))
        for weight in module._parameters.values():
            if weight is None or weight.dim() < 2:
                continue
            quantized = (
                weight.element_size() < 2 or not weight.is_floating_point() or isinstance(weight, QuantizedMatrices)
            )
            dtypes["quantized" if quantized else str(weight.dtype).removeprefix("torch.")] += weight.numel()
            if quantized or weight.is_meta or hasattr(weight, "full_tensor"):
                in_memory = False
            elif in_memory and weight.numel():
                samples.append(_sample(weight))
    quantized_model = "quantized" in dtypes
    return Fingerprint(
        architecture=type(model).__name__,
        shapes=dict(shapes),
        dtype="quantized" if quantized_model else (dtypes.most_common(1)[0][0] if dtypes else "none"),
        weights=_hash(samples) if in_memory and samples else "",
    )


def compare(saved: Mapping[str, str], model: nn.Module) -> str | None:
    """Whether an adapter belongs on a base model.

    Args:
        saved: the metadata of the adapter's file.
        model: the base model. None of its adapters may be merged.

    Returns:
        None if it does, else one line that says what differs or why that is not known.

    Raises:
        BaseMismatchError: the model has no weight of a shape that the adapter's base had.
    """
    then = Fingerprint.from_metadata(saved)
    if then is None:
        return "the adapter does not say which base model it was trained on, so that was not checked"
    now = fingerprint(model)
    if then.shapes and not then.shapes.keys() & now.shapes.keys():
        raise BaseMismatchError(
            f"the adapter was trained on another base model: {_described(then)}, not {_described(now)}",
            saved=then,
            present=now,
        )
    if then.shapes != now.shapes:
        changed = sorted(
            name for name in {**then.shapes, **now.shapes} if then.shapes.get(name) != now.shapes.get(name)
        )
        return (
            f"the adapter was trained on {_described(then)}, this is {_described(now)}: "
            f"they differ in the weights of {few(changed, 3, quoted=False)}"
        )
    if _has_other_weights(then, now):
        return (
            f"the adapter was trained on other weights of the same shapes ({then.architecture}): "
            "another revision, or a base that was trained or merged into"
        )
    if then.architecture != now.architecture:
        return f"the adapter was trained on a {then.architecture}, this is a {now.architecture} of the same shapes"
    return None


def is_same_base(saved: Mapping[str, str], model: nn.Module) -> bool:
    """Whether an adapter's file names just the weights of a base model; False where that is not known.

    Args:
        saved: the metadata of the file.
        model: the base model. None of its adapters may be merged.
    """
    then = Fingerprint.from_metadata(saved)
    if then is None or not then.weights:
        return False
    now = fingerprint(model)
    return (then.weights, then.shapes) == (now.weights, now.shapes)


def describe_difference(then: Fingerprint, now: Fingerprint) -> str:
    """What another base model is, in a few words; empty where nothing says that it is another one."""
    if then.shapes != now.shapes or then.architecture != now.architecture:
        return _described(then)
    return "other weights of the same shapes" if _has_other_weights(then, now) else ""


def _has_other_weights(then: Fingerprint, now: Fingerprint) -> bool:
    """Whether two models of the same shapes have other values, as far as that is known."""
    same_kind = then.dtype == now.dtype or {then.dtype, now.dtype} <= _COMPARABLE
    return bool(then.weights and now.weights and same_kind and then.weights != now.weights)


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    # Modules that hang in several places come once for each: what is tied must not change the result.
    return (module for _, module in bare_modules(before_replication(model), repeat=True))


def _weight_sizes(module: nn.Module) -> Iterator[str]:
    """Sizes of a module's weights; a linear layer's from its features, however it is stored."""
    features = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if isinstance(features[0], int) and isinstance(features[1], int):
        yield _size(features)  # type: ignore[arg-type]
        return
    for weight in module._parameters.values():
        if weight is not None and weight.dim() >= 2:
            yield _size(tuple(weight.shape))


def _size(shape: tuple[int, ...]) -> str:
    # Larger first: a quantized copy of a Conv1D is stored the other way round.
    return " x ".join(str(length) for length in sorted(shape, reverse=True))


def _sample(weight: Tensor) -> Tensor:
    """A few values spread over a weight, as bfloat16."""
    count = min(_SAMPLES, weight.numel())
    if weight.is_contiguous():
        flat = weight.detach().view(-1)
        step = max(1, weight.numel() // count)
        return flat[::step][:count].to(torch.bfloat16)
    places = [index * max(1, weight.numel() // count) for index in range(count)]
    values = []
    for place in places:
        index = []
        for length in reversed(weight.shape):
            index.append(place % length)
            place //= length
        values.append(weight.detach()[tuple(reversed(index))])
    return torch.stack(values).to(torch.bfloat16)


def _hash(samples: list[Tensor]) -> str:
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for position, sample in enumerate(samples):
        by_device.setdefault(sample.device, []).append((position, sample))
    # One transfer a device, not one a weight.
    gathered: dict[int, Tensor] = {}
    for entries in by_device.values():
        joined = torch.cat([sample for _, sample in entries]).cpu()
        for (position, _), part in zip(
            entries, torch.split(joined, [len(sample) for _, sample in entries]), strict=True
        ):
            gathered[position] = part
    values = torch.cat([gathered[position] for position in range(len(samples))])
    return hashlib.sha256(values.view(torch.int16).numpy().tobytes()).hexdigest()[:32]


def _described(print_: Fingerprint) -> str:
    largest = max(print_.shapes, key=lambda size: _numbers(size) * print_.shapes[size], default="no weights")
    stored = " (quantized)" if print_.dtype == "quantized" else ""
    return f"{print_.architecture} with {sum(print_.shapes.values())} weights, mostly {largest}{stored}"


def _numbers(size: str) -> int:
    """How many numbers a size such as ``"8 x 4"`` holds."""
    product = 1
    for length in size.split(" x "):
        product *= int(length)
    return product
