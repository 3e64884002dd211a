"""Fingerprints of base models, to check that an adapter belongs to a model; computed in milliseconds.

A fingerprint contains the model's class, the number of weights of each shape, and a hash of sampled
weights. It does not depend on adapters, but merged adapters change the weights, so it must be
computed while nothing is merged. Samples are rounded to bfloat16 before they are hashed, so that the
same weights loaded as float32 and as bfloat16 have the same fingerprint.
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
from nbpeft.engine.kernels.storage import is_packed
from nbpeft.engine.tree.model_tree import bare_modules
from nbpeft.errors import BaseMismatchError, few

_PREFIX = "nbpeft.base."
_SAMPLES = 8
_LONGEST_SIZE = 100
"""Most characters of a size or a class name; longer text does not come from a fingerprint."""
_MOST_SIZES = 10_000
_COMPARABLE = frozenset({"float32", "bfloat16"})


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a base model.

    Attributes:
        architecture: name of the model's class.
        shapes: size of a weight, e.g. ``"4096 x 1024"`` with the larger dimension first -> number of such weights.
        dtype: the most common dtype of the weights, or ``"quantized"``.
        weights: hash of sampled weights; empty if they are quantized or not in memory.
    """

    architecture: str
    shapes: Mapping[str, int]
    dtype: str
    weights: str

    def to_metadata(self) -> dict[str, str]:
        """Returns the fingerprint as text entries for a file's metadata."""
        return {
            f"{_PREFIX}architecture": self.architecture,
            f"{_PREFIX}shapes": json.dumps(dict(self.shapes), sort_keys=True, separators=(",", ":")),
            f"{_PREFIX}dtype": self.dtype,
            f"{_PREFIX}weights": self.weights,
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Fingerprint | None:
        """Returns the fingerprint in a file's metadata, or None if it is missing or invalid."""
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
    """Computes the fingerprint of a base model; adapters on it are ignored.

    Args:
        model: the base model. No adapter may be merged into it.
    """
    shapes: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    weights: list[Tensor] = []
    in_memory = True
    for module in _modules(model):
        shapes.update(_weight_sizes(module))
        for weight in module._parameters.values():
            if weight is None or weight.dim() < 2:
                continue
            quantized = _is_quantized(weight)
            dtypes["quantized" if quantized else str(weight.dtype).removeprefix("torch.")] += weight.numel()
            if quantized or weight.is_meta or hasattr(weight, "full_tensor"):
                in_memory = False
            elif in_memory and weight.numel():
                weights.append(weight)
    quantized_model = "quantized" in dtypes
    return Fingerprint(
        architecture=type(model).__name__,
        shapes=dict(shapes),
        dtype="quantized" if quantized_model else (dtypes.most_common(1)[0][0] if dtypes else "none"),
        weights=_hash(weights) if in_memory and weights else "",
    )


def compare(saved: Mapping[str, str], model: nn.Module) -> str | None:
    """Compares a model with the base model that an adapter was trained on.

    Args:
        saved: the metadata of the adapter's file.
        model: the base model. No adapter may be merged into it.

    Returns:
        None if they agree, else one line that says what differs or why it is unknown.

    Raises:
        BaseMismatchError: the model has no weight of any shape that the adapter's base model had.
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
    """Returns whether an adapter was trained on exactly the weights of a model; False if that is unknown.

    Args:
        saved: the metadata of the adapter's file.
        model: the base model. No adapter may be merged into it.
    """
    then = Fingerprint.from_metadata(saved)
    if then is None or not then.weights:
        return False
    now = fingerprint(model)
    return (then.weights, then.shapes) == (now.weights, now.shapes)


def describe_difference(then: Fingerprint, now: Fingerprint) -> str:
    """Describes how a base model differs from another one.

    Args:
        then: fingerprint of the base model that an adapter was trained on.
        now: fingerprint of the base model to compare with.

    Returns:
        A few words, or the empty string if no difference is known.
    """
    if then.shapes != now.shapes or then.architecture != now.architecture:
        return _described(then)
    return "other weights of the same shapes" if _has_other_weights(then, now) else ""


def _has_other_weights(then: Fingerprint, now: Fingerprint) -> bool:
    """Returns whether two models of the same shapes are known to have different values."""
    same_kind = then.dtype == now.dtype or {then.dtype, now.dtype} <= _COMPARABLE
    return bool(then.weights and now.weights and same_kind and then.weights != now.weights)


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    # A module reachable by several paths is repeated for each: the fingerprint must not depend on weight tying.
    return (module for _, module in bare_modules(before_replication(model), repeat=True))


def _weight_sizes(module: nn.Module) -> Iterator[str]:
    """Yields the sizes of a module's weights; a linear layer's from its features, whatever its storage format."""
    features = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if isinstance(features[0], int) and isinstance(features[1], int):
        yield _size(features)  # type: ignore[arg-type]
        return
    for weight in module._parameters.values():
        if weight is not None and weight.dim() >= 2:
            yield _size(tuple(weight.shape))


def _is_quantized(weight: Tensor) -> bool:
    """Whether a weight's values are not its own elements: another class decides what can be read of it, and how."""
    return (
        weight.element_size() < 2
        or not weight.is_floating_point()
        or isinstance(weight, QuantizedMatrices)
        or is_packed(weight)
        or (hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "full_tensor"))
    )


def _size(shape: tuple[int, ...]) -> str:
    # The larger dimension first: transformers' Conv1D stores (in, out), but its quantized version (out, in).
    return " x ".join(str(length) for length in sorted(shape, reverse=True))


def _sample(weight: Tensor) -> Tensor:
    """Returns a few values at regular distances in a weight, as bfloat16."""
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


def _hash(weights: list[Tensor]) -> str:
    """Returns a hash of samples of the weights; empty if one is of a class of tensors that cannot be sampled."""
    try:
        samples = [_sample(weight) for weight in weights]
        return hashlib.sha256(_gathered(samples).view(torch.int16).numpy().tobytes()).hexdigest()[:32]
    except Exception:  # whatever such a class raises, it must not prevent a model from being saved
        return ""


def _gathered(samples: list[Tensor]) -> Tensor:
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for position, sample in enumerate(samples):
        by_device.setdefault(sample.device, []).append((position, sample))
    # One copy to the CPU per device: each copy waits for the device, and a model has hundreds of weights.
    gathered: dict[int, Tensor] = {}
    for entries in by_device.values():
        joined = torch.cat([sample for _, sample in entries]).cpu()
        for (position, _), part in zip(
            entries, torch.split(joined, [len(sample) for _, sample in entries]), strict=True
        ):
            gathered[position] = part
    return torch.cat([gathered[position] for position in range(len(samples))])


def _described(print_: Fingerprint) -> str:
    largest = max(print_.shapes, key=lambda size: _numbers(size) * print_.shapes[size], default="no weights")
    stored = " (quantized)" if print_.dtype == "quantized" else ""
    return f"{print_.architecture} with {sum(print_.shapes.values())} weights, mostly {largest}{stored}"


def _numbers(size: str) -> int:
    """Returns the number of elements of a size such as ``"8 x 4"``."""
    product = 1
    for length in size.split(" x "):
        product *= int(length)
    return product
