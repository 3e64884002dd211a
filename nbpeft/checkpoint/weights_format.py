"""Between the engine's tensors and the keys of PEFT's files.

    AdapterWeights.adapters[path][param]   base_model.model.<path>.<spelling of param>
    AdapterWeights.copies[path][param]     base_model.model.<path>.<param>
    AdapterWeights.base[name]              base_model.model.<name>, with ``base_layer`` behind the
                                           path of an adapted layer, ``original_module`` behind a copied one

Keys are looked up whole: no name is searched for inside another.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from nbpeft.checkpoint.tensor_file import UnreadTensors
from nbpeft.engine.config.module_paths import wrapper_places
from nbpeft.engine.contract.adapter import AdapterWeights
from nbpeft.engine.contract.registry import file_keys, methods_of_type, transforms_calls
from nbpeft.engine.kernels.numerics import is_finite
from nbpeft.errors import BaseMismatchError, CheckpointError, shortened, shown

PREFIX = "base_model.model."
"""Starts every key of a file, but those of tensors that all layers of an adapter share."""
SHARED_PREFIX = "base_model."
"""Starts the key of such a tensor."""
BASE_LAYER = "base_layer"
"""The frozen layer inside an adapted one."""
ORIGINAL_MODULE = "original_module"
"""The frozen module beside a copy that is trained as a whole."""

Shape = tuple[int, ...]
Shapes = Mapping[str, Mapping[str, Shape]]
Rename = Callable[[str], str]
Slot = tuple[str, str, str]
"""(kind, path, parameter): where a tensor goes in AdapterWeights."""


class Conversion(Protocol):
    """Reads files that were written for an earlier version of a model's class; see ``key_conversion_of``."""

    @property
    def rename(self) -> Rename | None:
        """Another name to try for a key (without prefix) that nothing takes."""
        ...

    def joined(self, tensors: Mapping[str, Tensor], peft_type: str) -> Mapping[str, Tensor]:
        """The tensors of a file by key, with those joined that are one today."""
        ...


_LONGEST_KEY = 1_000
_MOST_UNEXPECTED = 1_000
"""After so many keys that nothing takes, further ones are only looked up as they are."""
_FLOATS = frozenset(
    getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
    if hasattr(torch, name)
)
_WRAPPER_SEGMENTS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Expected:
    """What a model can take from a file.

    Attributes:
        adapters: path of an adapted module -> parameter -> shape.
        copies: path of a module trained as a whole -> parameter or buffer -> shape.
        base: name of a trained base parameter -> shape.
        shared: name of a tensor that the layers share -> shape.
        optional: name of a base parameter that a file may bring but need not (embeddings of a
            resized vocabulary) -> shape.
        others: key without prefix of what holds no floating numbers, such as a counter -> dtype.
        parameters: those of the paths in ``adapters`` that are parameters; see ``AdapterWeights``.
        found_anew: name (path and all) of what in ``adapters`` a file need not have.
    """

    adapters: Shapes = field(default_factory=dict)
    copies: Shapes = field(default_factory=dict)
    base: Mapping[str, Shape] = field(default_factory=dict)
    shared: Mapping[str, Shape] = field(default_factory=dict)
    optional: Mapping[str, Shape] = field(default_factory=dict)
    others: Mapping[str, torch.dtype] = field(default_factory=dict)
    parameters: Collection[str] = ()
    found_anew: Collection[str] = ()


@dataclass(frozen=True)
class Loaded:
    """What was found in a file.

    Attributes:
        weights: the tensors that fit, the file's own objects.
        missing: keys that were expected and are not there.
        unexpected: keys of the file that nothing takes.
        mismatched: keys left out because of their shape (only when that was allowed).
    """

    weights: AdapterWeights
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str] = field(default_factory=list)


def to_file(weights: AdapterWeights, *, peft_type: str) -> dict[str, Tensor]:
    """The tensors under the keys of a file. References, not copies.

    Args:
        weights: the tensors of one adapter.
        peft_type: the ``peft_type`` of its config; decides how parameters are spelled.
    """
    spelling, places = file_keys(peft_type), _Places(weights.adapters, weights.copies, weights.parameters)
    tensors: dict[str, Tensor] = {}
    nowhere = transforms_calls(peft_type)
    prefix = SHARED_PREFIX if nowhere else PREFIX
    for path, parameters in weights.adapters.items():
        place = "" if nowhere else f"{PREFIX}{places.of_adapter(path)}."
        for name, tensor in parameters.items():
            tensors[f"{place}{spelling.get(name, name)}"] = tensor
    for path, parameters in weights.copies.items():
        for name, tensor in parameters.items():
            tensors[f"{prefix}{path}.{name}"] = tensor
    for name, tensor in weights.base.items():
        tensors[PREFIX + places.of(name)] = tensor
    for name, tensor in weights.shared.items():
        tensors[SHARED_PREFIX + name] = tensor
    return tensors


def from_file(
    tensors: Mapping[str, Tensor] | UnreadTensors,
    expected: Expected,
    *,
    peft_type: str,
    key_mapping: Mapping[str, str] | None = None,
    conversion: Conversion | None = None,
    ignore_mismatched: bool = False,
) -> Loaded:
    """Sorts the tensors of a file into the places a model has for them.

    Keys may lack the ``base_model.model.`` in front or carry the marks of a compiled or
    sharded model. Of a file that is not read yet nothing is read before the header has passed every check, and then
    only what the model takes.

    Args:
        tensors: key in the file -> tensor.
        expected: what the model can take.
        peft_type: the ``peft_type`` of the config; decides how parameters are spelled.
        key_mapping: regular expression -> replacement, tried in order on each key without its
            prefix; the first that matches is applied.
        conversion: reads what was written for an earlier version of the model's class.
        ignore_mismatched: leave tensors of another shape out instead of refusing the file.

    Warns of tensors that are not finite.

    Raises:
        CheckpointError: nothing in the file fits, or a tensor is no dense one of floating numbers.
        BaseMismatchError: keys fit, but shapes do not.
    """
    slots = _slots(expected, peft_type)
    names: Any = {"key_mapping": key_mapping, "rename": None if conversion is None else conversion.rename}
    if isinstance(tensors, UnreadTensors):
        unread = tensors if conversion is None else tensors.changed(partial(conversion.joined, peft_type=peft_type))
        keys, unexpected = _fitting(unread.header, expected, slots, **names)
        found = {name: unread.header[key] for name, key in keys.items()}
        mismatched = _checked(found, expected, slots, ignore_mismatched=ignore_mismatched, unread=True)
        left_out = {name for name, _, _ in mismatched}
        taken = {key for name, key in keys.items() if name not in left_out}
        tensors = unread.read(key for key in unread if key not in taken)
    else:
        tensors = tensors if conversion is None else conversion.joined(tensors, peft_type)
        keys, unexpected = _fitting(tensors, expected, slots, **names)
    found = {name: tensors[key] for name, key in keys.items()}
    mismatched = _checked(found, expected, slots, ignore_mismatched=ignore_mismatched)
    left_out = {name for name, _, _ in mismatched}
    fitting = {name: tensor for name, tensor in found.items() if name not in left_out}
    _warn_of_not_finite(fitting)
    places = _Places(expected.adapters, expected.copies, expected.parameters)
    optional = {*(places.of(name) for name in expected.optional), *expected.found_anew}
    missing = [_full_key(name) for name in slots if name not in found and name not in optional]
    return Loaded(_sorted_in(fitting, slots), missing, unexpected, [_full_key(name) for name, _, _ in mismatched])


def _fitting(
    tensors: Mapping[str, Tensor],
    expected: Expected,
    slots: Mapping[str, object],
    *,
    key_mapping: Mapping[str, str] | None,
    rename: Rename | None,
) -> tuple[dict[str, str], list[str]]:
    """Name of a place -> the key that is for it, and the keys that nothing takes; raises where nothing fits."""
    keys: dict[str, str] = {}
    unexpected: list[str] = []
    mapped = by_patterns(key_mapping)
    for key in tensors:
        if len(key) > _LONGEST_KEY or len(unexpected) >= _MOST_UNEXPECTED:
            fitting = key.removeprefix(PREFIX) if key.removeprefix(PREFIX) in slots else None
        else:
            fitting = next((name for name in _readings(key, mapped, rename) if name in slots), None)
        if fitting is None or fitting in keys:
            unexpected.append(key)
        else:
            keys[fitting] = key
    if not keys and (
        expected.base or expected.shared or any(map(any, (expected.adapters.values(), expected.copies.values())))
    ):
        raise _nothing_fits(tensors, slots, key_mapping)
    return keys, [key for key in unexpected if not _is_repeated(key, keys)]


def _checked(
    found: Mapping[str, Tensor],
    expected: Expected,
    slots: Mapping[str, tuple[Slot, Shape]],
    *,
    ignore_mismatched: bool,
    unread: bool = False,
) -> list[tuple[str, Shape, Shape]]:
    """(place, shape in the file, shape expected) of what has another shape; raises for what no adapter has."""
    mismatched = [
        (name, tuple(tensor.shape), tuple(slots[name][1]))
        for name, tensor in found.items()
        if tuple(tensor.shape) != tuple(slots[name][1])
    ]
    left_out = {name for name, _, _ in mismatched} if ignore_mismatched else ()
    others = expected.others
    wrong = next(
        (
            name
            for name, tensor in found.items()
            if name not in left_out and not _is_plain(tensor, others.get(name), unread=unread)
        ),
        None,
    )
    if wrong is not None:
        what = "the tensors of an adapter are dense ones of floating numbers"
        what = what if others.get(wrong) is None else f"it must be {others[wrong]}"
        raise CheckpointError(
            f"{shown(_full_key(wrong), 150)} is {_kind_of(found[wrong], unread=unread)}; {what}", key=_full_key(wrong)
        )
    if mismatched and not ignore_mismatched:
        raise _mismatch(mismatched)
    return mismatched


def _is_plain(tensor: Tensor, other: torch.dtype | None, *, unread: bool) -> bool:
    """Whether a tensor is a dense one with data (or not read yet), of floating numbers or of that other dtype."""
    if tensor.layout is not torch.strided or tensor.is_quantized or (tensor.is_meta and not unread):
        return False
    return tensor.dtype in _FLOATS if other is None else tensor.dtype == other


def _warn_of_not_finite(tensors: Mapping[str, Tensor]) -> None:
    """Warns once of the tensors that hold NaN or infinite numbers."""
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    if _surely_finite(list(floating.values())):
        return
    broken = [key for key, tensor in floating.items() if not is_finite(tensor)]
    if broken:
        tensors_are = "tensor of the adapter is" if len(broken) == 1 else "tensors of the adapter are"
        warnings.warn(
            f"{len(broken)} {tensors_are} not finite (NaN or infinite): {_few(broken)}; what it computes will not "
            "be either",
            stacklevel=4,
        )


@torch.no_grad()
def _surely_finite(tensors: list[Tensor]) -> bool:
    """Whether all norms are finite, which large numbers can keep them from being: asked of all at once, it is fast."""
    if not tensors or any(tensor.element_size() == 1 for tensor in tensors):
        return not tensors
    return bool(torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]).isfinite().all())


def _kind_of(tensor: Tensor, *, unread: bool) -> str:
    """What a tensor is, where it is none of an adapter's."""
    if tensor.is_meta and not unread:
        return "without data (meta device)"
    if tensor.layout is not torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    return f"of {str(tensor.dtype).removeprefix('torch.')}"


def _slots(expected: Expected, peft_type: str) -> dict[str, tuple[Slot, Shape]]:
    """Key without prefix -> where its tensor goes and the shape it must have."""
    spelling, places = file_keys(peft_type), _Places(expected.adapters, expected.copies, expected.parameters)
    slots: dict[str, tuple[Slot, Shape]] = {}
    nowhere = transforms_calls(peft_type)
    for path, parameters in expected.adapters.items():
        place = "" if nowhere else f"{places.of_adapter(path)}."
        for name, shape in parameters.items():
            slots[f"{place}{spelling.get(name, name)}"] = ("adapters", path, name), shape
    for path, parameters in expected.copies.items():
        for name, shape in parameters.items():
            slots[f"{path}.{name}"] = ("copies", path, name), shape
    for names in (expected.optional, expected.base):
        for name, shape in names.items():
            slots[places.of(name)] = ("base", "", name), shape
    for name, shape in expected.shared.items():
        slots[SHARED_PREFIX + name] = ("shared", "", name), shape
    return slots


def _sorted_in(found: Mapping[str, Tensor], slots: Mapping[str, tuple[Slot, Shape]]) -> AdapterWeights:
    """The tensors in their places."""
    weights = AdapterWeights()
    for key, tensor in found.items():
        kind, path, name = slots[key][0]
        if kind in ("base", "shared"):
            (weights.base if kind == "base" else weights.shared)[name] = tensor
        else:
            places = weights.adapters if kind == "adapters" else weights.copies
            places.setdefault(path, {})[name] = tensor
    return weights


class _Places:
    """Names in the bare model as they read inside adapted and copied modules.

    Args:
        adapters: paths of what is adapted; needs fast ``in``, as the next one does.
        copies: paths of modules trained as a whole.
        parameters: those of ``adapters`` that are parameters.
    """

    def __init__(self, adapters: Container[str], copies: Container[str], parameters: Collection[str]) -> None:
        self._adapters, self._copies = adapters, copies
        self._wrappers = wrapper_places(parameters)
        self._wrapped = Counter(path.rpartition(".")[0] for path in parameters)

    def of_adapter(self, path: str) -> str:
        """Where the adapter of a path is."""
        if path not in self._wrappers:
            return self.of(path)
        module = path.rpartition(".")[0]
        return self.of(module) + self._wrappers[path].removeprefix(module)

    def of(self, name: str) -> str:
        """A name as it reads there."""
        start = name.find(".")
        result = ""
        taken = 0
        while start != -1:
            parent = name[:start]
            if parent in self._adapters:
                result, taken = f"{result}{name[taken:start]}.{BASE_LAYER}", start
            elif parent in self._copies:
                result, taken = f"{result}{name[taken:start]}.{ORIGINAL_MODULE}", start
            elif parent in self._wrapped:
                result, taken = f"{result}{name[taken:start]}{f'.{BASE_LAYER}' * self._wrapped[parent]}", start
            start = name.find(".", start + 1)
        return result + name[taken:] if taken else name


def _readings(key: str, mapped: Rename, rename: Rename | None) -> Iterator[str]:
    """The names a key of a file may stand for, likeliest first."""
    bare = mapped(key.removeprefix(PREFIX))
    yield bare
    if key.startswith(PREFIX):
        yield mapped(key)
    for segment in _WRAPPER_SEGMENTS:
        bare = bare.replace(f".{segment}", ".").removeprefix(segment)
    bare = bare.removeprefix(PREFIX)
    yield bare
    yield bare.removeprefix(SHARED_PREFIX)
    if rename is not None:
        yield rename(bare)


def _is_repeated(key: str, found: Container[str]) -> bool:
    """Whether PEFT wrote a tensor more than once.

    With ``bias="all"`` it writes the bias of a copied module thrice: as usual, and under these keys. What layers share
    it may write once more for each of them.
    """
    if SHARED_PREFIX + key.rpartition(".")[2] in found:
        return True
    for mark in ("modules_to_save", ORIGINAL_MODULE):
        path, marked, name = key.rpartition(f".{mark}.")
        if marked and f"{path.removeprefix(PREFIX)}.{name}" in found:
            return True
    return False


def by_patterns(patterns: Mapping[str, str] | None) -> Rename:
    """Applies the first regular expression that matches a key, as PEFT's ``key_mapping`` does.

    Raises:
        CheckpointError: an expression cannot be read.
    """
    try:
        compiled = [(re.compile(pattern), replacement) for pattern, replacement in (patterns or {}).items()]
    except re.error as error:
        raise CheckpointError(f"key_mapping has a bad regular expression {error.pattern!r}: {error.msg}") from None

    def rename(key: str) -> str:
        for pattern, replacement in compiled:
            renamed, count = pattern.subn(replacement, key)
            if count:
                return renamed
        return key

    return rename


def remapped(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """The tensors of a file with ``key_mapping`` applied to their keys, prefix left out."""
    rename = by_patterns(key_mapping)
    return {
        PREFIX + rename(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else rename(key): tensor
        for key, tensor in tensors.items()
    }


def _full_key(key: str) -> str:
    """The key in a file of a key in ``_slots``."""
    return key if key.startswith(SHARED_PREFIX) else PREFIX + key


def without_prefix(key: str) -> str:
    """A key as it is for a model that has no handle."""
    return key.removeprefix(PREFIX)


def adapted_paths(keys: Iterable[str], peft_type: str) -> tuple[str, ...]:
    """Paths of the modules that the keys of a file adapt, in their order, once each.

    Args:
        keys: those of a file, or of a model with or without a handle.
        peft_type: of the config beside the file.
    """
    marks = [f".{method.prefix}" for method in methods_of_type(peft_type)]
    paths: dict[str, None] = {}
    for key in keys:
        bare = key
        for segment in _WRAPPER_SEGMENTS:
            bare = bare.replace(f".{segment}", ".").removeprefix(segment)
        for mark in marks:
            path, marked, _ = bare.removeprefix(PREFIX).rpartition(mark)
            if marked and f"{path}." != SHARED_PREFIX:
                paths[path] = None
    return tuple(paths)


def _nothing_fits(
    tensors: Mapping[str, Tensor], slots: Mapping[str, object], key_mapping: Mapping[str, str] | None
) -> CheckpointError:
    if not tensors:
        return CheckpointError("the checkpoint holds no tensors at all", found=[], expected=list(slots))
    found, wanted = list(tensors), [_full_key(key) for key in slots]
    hint = None if key_mapping else _nesting_hint(tensors, slots)
    return CheckpointError(
        f"nothing in the checkpoint fits this model: it has {_few(found)}; expected {_few(wanted)}."
        + (f" It would fit with key_mapping={hint!r}." if hint else ""),
        found=found,
        expected=wanted,
        key_mapping=hint,
    )


def _nesting_hint(tensors: Mapping[str, object], slots: Mapping[str, object]) -> dict[str, str] | None:
    """A ``key_mapping`` that adds or drops leading segments so that keys fit, if one does."""
    key = next(iter(tensors)).removeprefix(PREFIX)
    if len(key) > _LONGEST_KEY:
        return None
    parts = key.split(".")
    for dropped in range(1, len(parts) - 1):
        if ".".join(parts[dropped:]) in slots:
            return {f"^{re.escape('.'.join(parts[:dropped]))}\\.": ""}
    for dropped in range(len(parts) - 1):
        tail = "." + ".".join(parts[dropped:])
        wanted = next((name for name in slots if name.endswith(tail)), None)
        if wanted is not None:
            pattern = f"^{re.escape('.'.join(parts[:dropped]))}\\." if dropped else "^"
            return {pattern: wanted[: len(wanted) - len(tail) + 1]}
    return None


def _mismatch(mismatched: list[tuple[str, Shape, Shape]]) -> BaseMismatchError:
    lines = [f"{key} is {found}, expected {wanted}" for key, found, wanted in mismatched]
    return BaseMismatchError(
        f"{len(lines)} tensors of the checkpoint do not fit the base model and the config (size mismatch): "
        f"{_few(lines)}",
        mismatched=mismatched,
    )


def _few(items: list[str], count: int = 3) -> str:
    more = len(items) - count
    return ", ".join(shortened(item, 120) for item in items[:count]) + (f" (+ {more} more)" if more > 0 else "")
