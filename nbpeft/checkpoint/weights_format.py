"""Converts between the engine's tensors and the keys of PEFT's files.

    AdapterWeights.adapters[path][param]   base_model.model.<path>.<name of param in files>
    AdapterWeights.copies[path][param]     base_model.model.<path>.<param>
    AdapterWeights.base[name]              base_model.model.<name>, with ``base_layer`` after the
                                           path of an adapted layer, ``original_module`` after a copied one

Only whole keys are compared; no name is matched inside another one.
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
from nbpeft.errors import BaseMismatchError, CheckpointError, ConfigTypeError, shortened, shown

PREFIX = "base_model.model."
"""Prefix of every key of a file, except those of tensors that all layers of an adapter share."""
SHARED_PREFIX = "base_model."
"""Prefix of the key of a shared tensor."""
BASE_LAYER = "base_layer"
"""Name of the frozen layer inside an adapted one."""
ORIGINAL_MODULE = "original_module"
"""Name of the frozen module next to its trained copy (``modules_to_save``)."""

Shape = tuple[int, ...]
Shapes = Mapping[str, Mapping[str, Shape]]
Rename = Callable[[str], str]
Slot = tuple[str, str, str]
"""(kind, path, parameter): where a tensor goes in AdapterWeights."""


class Conversion(Protocol):
    """Converts files that were written for an earlier version of a model's class; see ``key_conversion_of``."""

    @property
    def rename(self) -> Rename | None:
        """Maps a key (without prefix) that fits nothing to another name to try; None if nothing was renamed."""
        ...

    def joined(self, tensors: Mapping[str, Tensor], peft_type: str) -> Mapping[str, Tensor]:
        """Returns the tensors of a file by key, with the tensors joined whose layers were fused.

        Args:
            tensors: key in the file -> tensor.
            peft_type: the ``peft_type`` of the config.
        """
        ...


_SHOWN = 3
_LONGEST_KEY = 1_000
_MOST_UNEXPECTED = 1_000
"""After this many unexpected keys, no alternative readings of further keys are tried."""
_FLOATS = frozenset(
    getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
    if hasattr(torch, name)
)
_WRAPPER_SEGMENTS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Expected:
    """The tensors that a model can load from a file.

    Attributes:
        adapters: path of an adapted module -> parameter -> shape.
        copies: path of a module trained as a whole (``modules_to_save``) -> parameter or buffer -> shape.
        base: name of a trained base parameter -> shape.
        shared: name of a tensor that the layers share -> shape.
        optional: name of a base parameter that a file may but need not contain (embeddings of a resized
            vocabulary) -> shape.
        others: key without prefix of a tensor that is not floating-point, such as a counter -> dtype.
        parameters: the paths in ``adapters`` that are parameters; see ``AdapterWeights``.
        recomputable: full names of tensors in ``adapters`` that a file need not contain, as they can be recomputed.
    """

    adapters: Shapes = field(default_factory=dict)
    copies: Shapes = field(default_factory=dict)
    base: Mapping[str, Shape] = field(default_factory=dict)
    shared: Mapping[str, Shape] = field(default_factory=dict)
    optional: Mapping[str, Shape] = field(default_factory=dict)
    others: Mapping[str, torch.dtype] = field(default_factory=dict)
    parameters: Collection[str] = ()
    recomputable: Collection[str] = ()


@dataclass(frozen=True)
class Loaded:
    """The tensors of a file, assigned to a model.

    Attributes:
        weights: the tensors that fit; the same objects, not copies.
        missing: expected keys that the file does not have.
        unexpected: keys of the file that fit nothing in the model.
        mismatched: keys ignored because of their shape (only with ``ignore_mismatched``).
    """

    weights: AdapterWeights
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str] = field(default_factory=list)


def to_file(weights: AdapterWeights, *, peft_type: str) -> dict[str, Tensor]:
    """Returns an adapter's tensors under the keys of a file; the same objects, not copies.

    Args:
        weights: the tensors of one adapter.
        peft_type: the ``peft_type`` of its config; determines the names of parameters.
    """
    names_in_file, places = file_keys(peft_type), Places(weights.adapters, weights.copies, weights.parameters)
    tensors: dict[str, Tensor] = {}
    of_calls = transforms_calls(peft_type)
    prefix = SHARED_PREFIX if of_calls else PREFIX
    for path, parameters in weights.adapters.items():
        place = "" if of_calls else f"{PREFIX}{places.of_adapter(path)}."
        for name, tensor in parameters.items():
            tensors[f"{place}{names_in_file.get(name, name)}"] = tensor
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
    """Assigns the tensors of a file to the places of a model.

    Keys may lack the prefix ``base_model.model.`` or contain the name segments of a compiled or sharded model. An
    unread file is read only after its header has passed every check, and only the tensors that the model uses.
    Warns about tensors that are not finite.

    Args:
        tensors: key in the file -> tensor, or the unread file.
        expected: the tensors that the model can load.
        peft_type: the ``peft_type`` of the config; determines the names of parameters.
        key_mapping: regular expression -> replacement. For each key without its prefix, the first expression that
            matches is applied.
        conversion: converts a file that was written for an earlier version of the model's class.
        ignore_mismatched: ignore tensors of another shape instead of refusing the file.

    Returns:
        The assigned tensors, and the keys that are missing, unexpected or mismatched.

    Raises:
        CheckpointError: nothing in the file fits, or a tensor is not a dense floating-point tensor.
        BaseMismatchError: keys fit, but shapes do not.
    """
    slots = _slots(expected, peft_type)
    names: Any = {"key_mapping": key_mapping, "rename": None if conversion is None else conversion.rename}
    if conversion is not None:
        join = partial(conversion.joined, peft_type=peft_type)
        tensors = tensors.changed(join) if isinstance(tensors, UnreadTensors) else join(tensors)
    unread = isinstance(tensors, UnreadTensors)
    header = tensors.header if isinstance(tensors, UnreadTensors) else tensors
    keys, unexpected = _fitting(header, expected, slots, **names)
    found = {name: header[key] for name, key in keys.items()}
    mismatched = _checked(found, expected, slots, ignore_mismatched=ignore_mismatched, unread=unread)
    left_out = {name for name, _, _ in mismatched}
    keys = {name: key for name, key in keys.items() if name not in left_out}
    if isinstance(tensors, UnreadTensors):
        tensors = tensors.read(header.keys() - keys.values())
    fitting = {name: tensors[key] for name, key in keys.items()}
    # A header shows all that is checked, except that a tensor of a pickled file has no data.
    if any(tensor.is_meta for tensor in fitting.values()):
        _checked(fitting, expected, slots, ignore_mismatched=False)
    _warn_of_not_finite(fitting)
    places = Places(expected.adapters, expected.copies, expected.parameters)
    optional = {*(places.of(name) for name in expected.optional), *expected.recomputable}
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
    """Returns slot -> key in the file, and the unexpected keys; raises CheckpointError if no key fits."""
    keys: dict[str, str] = {}
    unexpected: list[str] = []
    mapped = by_patterns(key_mapping)
    for key in tensors:
        bare = key.removeprefix(PREFIX)
        fitting = bare if bare in slots else None
        is_limited = len(key) > _LONGEST_KEY or len(unexpected) >= _MOST_UNEXPECTED
        if not is_limited and (key_mapping or fitting is None):
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
    """Returns (slot, shape in the file, expected shape) of mismatched tensors; refuses sparse and integer ones."""
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
        what = "the tensors of an adapter must be dense and floating-point"
        what = what if others.get(wrong) is None else f"it must be {others[wrong]}"
        raise CheckpointError(
            f"{shown(_full_key(wrong), 150)} is {_kind_of(found[wrong], unread=unread)}; {what}", key=_full_key(wrong)
        )
    if mismatched and not ignore_mismatched:
        raise _mismatch(mismatched)
    return mismatched


def _is_plain(tensor: Tensor, other: torch.dtype | None, *, unread: bool) -> bool:
    """Returns whether a tensor is dense, has data (or is unread), and is floating-point or of the dtype ``other``."""
    if tensor.layout is not torch.strided or tensor.is_quantized or (tensor.is_meta and not unread):
        return False
    return tensor.dtype in _FLOATS if other is None else tensor.dtype == other


def _warn_of_not_finite(tensors: Mapping[str, Tensor]) -> None:
    """Warns once about the tensors that contain NaN or infinite values."""
    floating = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    if _surely_finite(list(floating.values())):
        return
    broken = [key for key, tensor in floating.items() if not is_finite(tensor)]
    if broken:
        tensors_are = "tensor of the adapter is" if len(broken) == 1 else "tensors of the adapter are"
        warnings.warn(
            f"{len(broken)} {tensors_are} not finite (NaN or infinite): {_few(broken)}; its outputs will not be "
            "finite either",
            stacklevel=4,
        )


@torch.no_grad()
def _surely_finite(tensors: list[Tensor]) -> bool:
    """Returns whether the norms of all tensors are finite, computed in one fast call.

    False does not prove that a value is not finite: the norm of large finite values can overflow.
    """
    if not tensors or any(tensor.element_size() == 1 for tensor in tensors):
        return not tensors
    norms = torch._foreach_norm(tensors)
    if len({norm.dtype for norm in norms}) > 1 or len({norm.device for norm in norms}) > 1:
        norms = tuple(norm.float().cpu() for norm in norms)
    return bool(torch.stack(norms).isfinite().all())


def _kind_of(tensor: Tensor, *, unread: bool) -> str:
    """Describes a tensor that cannot belong to an adapter."""
    if tensor.is_meta and not unread:
        return "without data (meta device)"
    if tensor.layout is not torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    return f"of {str(tensor.dtype).removeprefix('torch.')}"


def _slots(expected: Expected, peft_type: str) -> dict[str, tuple[Slot, Shape]]:
    """Returns key without prefix -> the slot of its tensor and the expected shape."""
    names_in_file, places = file_keys(peft_type), Places(expected.adapters, expected.copies, expected.parameters)
    slots: dict[str, tuple[Slot, Shape]] = {}
    of_calls = transforms_calls(peft_type)
    for path, parameters in expected.adapters.items():
        place = "" if of_calls else f"{places.of_adapter(path)}."
        for name, shape in parameters.items():
            slots[f"{place}{names_in_file.get(name, name)}"] = ("adapters", path, name), shape
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
    """Returns the tensors as ``AdapterWeights``."""
    weights = AdapterWeights()
    for key, tensor in found.items():
        kind, path, name = slots[key][0]
        if kind in ("base", "shared"):
            (weights.base if kind == "base" else weights.shared)[name] = tensor
        else:
            places = weights.adapters if kind == "adapters" else weights.copies
            places.setdefault(path, {})[name] = tensor
    return weights


class Places:
    """Converts names of the bare model to names in the adapted model, which has wrapper modules in between.

    Args:
        adapters: paths of adapted modules and parameters; a container with a fast ``in``.
        copies: paths of modules trained as a whole; likewise.
        parameters: the paths of ``adapters`` that are parameters.
    """

    def __init__(self, adapters: Container[str], copies: Container[str], parameters: Collection[str]) -> None:
        self._adapters, self._copies = adapters, copies
        self._wrappers = wrapper_places(parameters)
        self._wrapped = Counter(path.rpartition(".")[0] for path in parameters)

    def of_adapter(self, path: str) -> str:
        """Returns the path of the module that contains the adapter of an adapted path."""
        if path not in self._wrappers:
            return self.of(path)
        module = path.rpartition(".")[0]
        return self.of(module) + self._wrappers[path].removeprefix(module)

    def of(self, name: str) -> str:
        """Returns the name in the adapted model of a name in the bare one."""
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


def _unwrapped(key: str) -> str:
    """Returns a key without the names of modules that only wrap others."""
    for segment in _WRAPPER_SEGMENTS:
        key = key.replace(f".{segment}", ".").removeprefix(segment)
    return key


def _readings(key: str, mapped: Rename, rename: Rename | None) -> Iterator[str]:
    """Yields the slots that a key of a file may refer to, the most likely first."""
    bare = mapped(key.removeprefix(PREFIX))
    yield bare
    if key.startswith(PREFIX):
        yield mapped(key)
    bare = _unwrapped(bare).removeprefix(PREFIX)
    yield bare
    yield bare.removeprefix(SHARED_PREFIX)
    if rename is not None:
        yield rename(bare)


def _is_repeated(key: str, found: Container[str]) -> bool:
    """Returns whether a key is a duplicate that PEFT writes of a tensor under another key.

    With ``bias="all"`` PEFT writes the bias of a copied module three times: under the normal key and under these. It
    may also write a shared tensor once for each layer.
    """
    if SHARED_PREFIX + key.rpartition(".")[2] in found:
        return True
    for mark in ("modules_to_save", ORIGINAL_MODULE):
        path, marked, name = key.rpartition(f".{mark}.")
        if marked and f"{path.removeprefix(PREFIX)}.{name}" in found:
            return True
    return False


def by_patterns(patterns: Mapping[str, str] | None) -> Rename:
    """Returns a function that applies the first matching regular expression to a key, as PEFT's ``key_mapping``.

    Raises:
        CheckpointError: an expression is invalid.
        ConfigTypeError: it is not a dictionary of texts.
    """
    given: Any = {} if patterns is None else patterns
    if not isinstance(given, Mapping) or not all(
        isinstance(pattern, str | re.Pattern) and (isinstance(replacement, str) or callable(replacement))
        for pattern, replacement in given.items()
    ):
        raise ConfigTypeError(
            f"key_mapping must be a dictionary of regular expressions and replacements, not {shown(patterns)}",
            field="key_mapping",
        )
    try:
        compiled = [(re.compile(pattern), replacement) for pattern, replacement in given.items()]
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
    """Applies ``key_mapping`` to the keys of a file's tensors; prefixes are not part of the match and stay.

    Args:
        tensors: key -> tensor.
        key_mapping: regular expression -> replacement, or None.
    """
    rename = by_patterns(key_mapping)
    return {
        PREFIX + rename(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else rename(key): tensor
        for key, tensor in tensors.items()
    }


def _full_key(key: str) -> str:
    """Returns the key in a file for a slot, which has no prefix."""
    return key if key.startswith(SHARED_PREFIX) else PREFIX + key


def without_prefix(key: str) -> str:
    """Returns a key without the prefix of PEFT's files."""
    return key.removeprefix(PREFIX)


def adapted_paths(keys: Iterable[str], peft_type: str) -> tuple[str, ...]:
    """Returns the paths of the modules that a file adapts, in order and without duplicates.

    Args:
        keys: keys of a file or of a state dict, with or without prefix.
        peft_type: the ``peft_type`` of the config.
    """
    marks = [f".{method.prefix}" for method in methods_of_type(peft_type)]
    paths: dict[str, None] = {}
    for key in keys:
        bare = _unwrapped(key).removeprefix(PREFIX)
        for mark in marks:
            path, marked, _ = bare.rpartition(mark)
            if marked and f"{path}." != SHARED_PREFIX:
                paths[path] = None
    return tuple(paths)


def _nothing_fits(
    tensors: Mapping[str, Tensor], slots: Mapping[str, object], key_mapping: Mapping[str, str] | None
) -> CheckpointError:
    if not tensors:
        return CheckpointError("the checkpoint contains no tensors", found=[], expected=list(slots))
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
    """Returns a ``key_mapping`` that would make the first key fit by adding or dropping leading segments, or None."""
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


def _few(items: list[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(shortened(item, 120) for item in items[:_SHOWN]) + (f" (+ {more} more)" if more > 0 else "")
