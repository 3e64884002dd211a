"""Adapters on their way to a pool: read from files, made ready for a model, kept in host memory."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nbpeft import checkpoint
from nbpeft.engine.adapter import AdapterConfig, AdapterWeights
from nbpeft.engine.build import adapter_dtype
from nbpeft.engine.manager import AdapterManager
from nbpeft.engine.model_tree import walk
from nbpeft.engine.plan import InjectionPlan, resolve_parts
from nbpeft.engine.registry import method_of
from nbpeft.errors import AdapterError, CheckpointError
from nbpeft.interrupts import HeldInterrupts
from nbpeft.model.files import embedding_weights, expected

Shapes = tuple[tuple[str, tuple[tuple[str, tuple[int, ...]], ...]], ...]

_NOT_STRUCTURE = (
    *("lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
)
"""Config fields that do not change which tensors an adapter has."""
_STRUCTURES = 64
"""How many structures are remembered: each holds the shapes of all layers."""


@dataclass(frozen=True)
class Structure:
    """Which tensors an adapter has on a model; adapters of equal structure can take each other's place.

    Attributes:
        method: label of the method.
        adapters: path, then parameter and shape.
        copies: path of a module trained as a whole, then parameter or buffer and shape.
    """

    method: str
    adapters: Shapes
    copies: Shapes


@dataclass(frozen=True)
class _Layout:
    """What is worked out once for all adapters of a structure."""

    structure: Structure
    expected: checkpoint.Expected
    dtypes: Mapping[str, torch.dtype]
    copy_dtypes: Mapping[str, Mapping[str, torch.dtype]]


@dataclass(frozen=True)
class Ready:
    """An adapter in host memory, just as it will lie on the model's device.

    Attributes:
        config: its config.
        weights: its tensors, in the dtypes they will have on the model.
        structure: which they are.
        byte_count: bytes of the tensors.
        note: what to tell about its base model, or None.
    """

    config: AdapterConfig
    weights: AdapterWeights
    structure: Structure
    byte_count: int
    note: str | None = None


def tensor_bytes(weights: AdapterWeights) -> int:
    """Bytes of all tensors of an adapter."""
    groups = (*weights.adapters.values(), *weights.copies.values(), weights.base)
    return sum(tensor.nbytes for named in groups for tensor in named.values())


@dataclass(frozen=True)
class Place:
    """Where an adapter comes from.

    Attributes:
        source: a folder or a hub id.
        options: hub options and ``subfolder``.
    """

    source: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # a token may be among them


class Reader:
    """Reads adapters for one model. Safe in several threads; changes nothing on the model."""

    def __init__(self, manager: AdapterManager, *, half: bool) -> None:
        self._manager = manager
        self._half = half
        self._rename = checkpoint.renames_of(manager.model)
        self._lock = threading.Lock()
        self._layouts: OrderedDict[str, _Layout] = OrderedDict()
        self._notes: dict[str, str | None] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def read(self, name: str, place: Place) -> Ready:
        """Reads an adapter whole.

        Raises:
            CheckpointError: the file cannot be read, does not fit or lacks tensors.
            AdapterError: an adapter of this kind cannot be in a pool.
        """
        saved = checkpoint.read_checkpoint(place.source, device="cpu", **place.options)
        config = saved.config.copy(inference_mode=True)
        layout = self._layout(name, config)
        loaded = checkpoint.from_file(
            saved.tensors,
            layout.expected,
            peft_type=str(config.peft_type),
            rename=self._rename,
        )
        for what, keys in (("lacks", loaded.missing), ("has what the model has no place for:", loaded.unexpected)):
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise CheckpointError(f"adapter {name!r} in {place.source} {what} {keys[0]}{more}", keys=keys)
        self._check_embeddings(name, loaded.weights)
        weights = _ordered(loaded.weights, layout)
        return Ready(config, weights, layout.structure, tensor_bytes(weights), self._note(saved.metadata))

    def _layout(self, name: str, config: AdapterConfig) -> _Layout:
        fields = {key: value for key, value in vars(config).items() if key not in _NOT_STRUCTURE}
        key = json.dumps(fields, sort_keys=True, default=_plain)
        with HeldInterrupts(), self._lock:
            found = self._layouts.get(key)
            if found is None:
                found = self._layouts[key] = self._work_out(name, config)
                if len(self._layouts) > _STRUCTURES:
                    self._layouts.popitem(last=False)
            else:
                self._layouts.move_to_end(key)
            return found

    def _work_out(self, name: str, config: AdapterConfig) -> _Layout:
        model = self._manager.model
        plan = self._manager.plan(config)
        if plan.biases:
            raise AdapterError(
                f"adapter {name!r} trained base biases (bias={getattr(config, 'bias', None)!r}), which no two adapters "
                "can share: load it by itself"
            )
        if config.initialised_from_weight:
            raise AdapterError(f"adapter {name!r} starts in a part of the base weights: load it by itself")
        if any(target.adapter_class.is_tied for target in plan.targets):
            raise AdapterError(
                f"adapter {name!r} trained rows of embeddings (trainable_token_indices): load it by itself"
            )
        if plan.shared:
            raise AdapterError(f"adapter {name!r} has tensors that its layers share: load it by itself")
        wanted = expected(model, plan)
        sites = {site.path: site for site in walk(model) if site.path in wanted.adapters or site.path in wanted.copies}
        dtypes = {}
        for path in wanted.adapters:
            _, backend = resolve_parts(sites[path])
            dtypes[path] = adapter_dtype(backend.dtype(sites[path].module), half=self._half)
        copy_dtypes = {
            path: {key: tensor.dtype for key, tensor in sites[path].module.state_dict().items()}
            for path in wanted.copies
        }
        return _Layout(structure_of(plan, wanted), wanted, dtypes, copy_dtypes)

    def _check_embeddings(self, name: str, weights: AdapterWeights) -> None:
        """Embeddings in the file that are the base's own are left out; others cannot be in a pool."""
        present = embedding_weights(self._manager.model) if weights.base else {}
        for key, tensor in list(weights.base.items()):
            if not torch.equal(tensor.to(present[key]), present[key]):
                raise AdapterError(
                    f"adapter {name!r} brings its own {key}, which all adapters share: load it by itself"
                )
            del weights.base[key]

    def _note(self, metadata: Mapping[str, str]) -> str | None:
        """What ``checkpoint.compare`` says; asked once for all adapters trained on the same base."""
        if self._manager.merged:
            return None
        key = json.dumps({name: value for name, value in metadata.items() if name.startswith("nbpeft.base.")})
        if key not in self._notes:
            note = checkpoint.compare(metadata, self._manager.model)
            self._notes[key] = None if note is None or note.startswith("the adapter does not say") else note
        return self._notes[key]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def structure_of(plan: InjectionPlan, wanted: checkpoint.Expected) -> Structure:
    """The structure of a plan."""
    return Structure(method_of(plan.config).label, _frozen(wanted.adapters), _frozen(wanted.copies))


def _frozen(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Shapes:
    return tuple((path, tuple((key, tuple(shape)) for key, shape in named.items())) for path, named in shapes.items())


def _ordered(weights: AdapterWeights, layout: _Layout) -> AdapterWeights:
    """The tensors in the model's order and dtypes."""
    adapters = {
        path: {key: weights.adapters[path][key].to(layout.dtypes[path]) for key in shapes}
        for path, shapes in layout.expected.adapters.items()
    }
    copies = {
        path: {key: weights.copies[path][key].to(dtype) for key, dtype in named.items()}
        for path, named in layout.copy_dtypes.items()
    }
    return AdapterWeights(adapters, copies)


@torch.inference_mode(False)
@torch.no_grad()
def copied_out(weights: AdapterWeights) -> AdapterWeights:
    """A copy in host memory of tensors on the model."""

    def out(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        return {
            path: {key: tensor.detach().to("cpu", copy=True) for key, tensor in named.items()}
            for path, named in groups.items()
        }

    return AdapterWeights(out(weights.adapters), out(weights.copies))


class _BrokenOff(Exception):
    """Another thread was interrupted while it read an adapter."""


class HostCache:
    """Adapters in host memory within a bound, the least recently used dropped first.

    A name that two threads ask for is read once.

    Args:
        limit: bytes.
        read: reads an adapter by name.
    """

    def __init__(self, limit: int, read: Callable[[str], Ready]) -> None:
        self.limit = limit
        self.byte_count = 0
        self.reads = 0
        self.read_bytes = 0
        self.hits = 0
        self._read = read
        self._kept: OrderedDict[str, Ready] = OrderedDict()
        self._reading: dict[str, Future[Ready]] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """What is kept, least recently used first."""
        with HeldInterrupts(), self._lock:
            return tuple(self._kept)

    def get(self, name: str, *, ahead: bool = False) -> Ready:
        """An adapter, from memory or else from its files; errors are those of reading.

        Args:
            name: its name.
            ahead: it is not needed yet, so this is no hit.
        """
        own: Future[Ready] = Future()
        try:
            with HeldInterrupts(), self._lock:
                if name in self._kept:
                    self._kept.move_to_end(name)
                    self.hits += not ahead
                    return self._kept[name]
                future = self._reading.setdefault(name, own)
                self.hits += future is not own and not ahead
            if future is own:
                self._fill(name, own)
            return future.result()
        except _BrokenOff:  # whoever read it was interrupted
            return self.get(name, ahead=ahead)
        except BaseException as error:
            with HeldInterrupts():
                if self._end_reading(name, own) and not own.done():
                    own.set_exception(error if isinstance(error, Exception) else _BrokenOff())
            raise

    def _fill(self, name: str, future: Future[Ready]) -> None:
        ready = self._read(name)
        self.reads += 1
        self.read_bytes += ready.byte_count
        if self._end_reading(name, future):
            self.put(name, ready)
        future.set_result(ready)

    def _end_reading(self, name: str, future: Future[Ready]) -> bool:
        """Whether the name still stands for what was read: it may have been dropped meanwhile."""
        with HeldInterrupts(), self._lock:
            current = self._reading.get(name) is future
            if current:
                del self._reading[name]
            return current

    def put(self, name: str, ready: Ready) -> None:
        """Keeps an adapter, if the bound allows it at all."""
        with HeldInterrupts(), self._lock:
            self._drop(name)
            if ready.byte_count > self.limit:
                return
            self._kept[name] = ready
            self.byte_count += ready.byte_count
            while self.byte_count > self.limit:
                self._drop(next(iter(self._kept)))

    def drop(self, name: str) -> None:
        """Forgets an adapter, also one that is being read."""
        with HeldInterrupts(), self._lock:
            self._drop(name)
            self._reading.pop(name, None)

    def _drop(self, name: str) -> None:
        gone = self._kept.pop(name, None)
        if gone is not None:
            self.byte_count -= gone.byte_count
