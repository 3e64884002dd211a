"""What the state machine compares the engine with: a tiny model and adapters computed by hand in float64."""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nbpeft.engine.contract.adapter import AdapterWeights
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import AdapterError, AdapterExistsError, ConfigError
from nbpeft.model import LoraConfig
from tests.closeness import assert_close

IDS = torch.tensor([[1, 4, 9, 2], [0, 10, 3, 5]])
PATHS = ("embed", "first", "turned")
SIZES = {"embed": (11, 6), "first": (6, 8), "turned": (8, 5)}
EQUAL_RANKS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
ON_DELTAS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


class Net(nn.Module):
    """An embedding, a Linear, a Conv1D and a head, in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 8)
        self.turned = Conv1D(5, 8)
        self.head = nn.Linear(5, 3)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.turned(torch.tanh(self.first(self.embed(ids))))))
        return output


BASE = {name: tensor.detach().clone() for name, tensor in Net().named_parameters()}


def canonical(path: str) -> Tensor:
    """The frozen weight as (out, in)."""
    weight = BASE[f"{path}.weight"]
    return weight if path == "first" else weight.T


@dataclass
class Part:
    """One adapter on one layer."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None = None

    def delta(self, path: str) -> Tensor:
        """What it adds to the weight, (out, in)."""
        low = self.scaling * (self.lora_B @ self.lora_A)
        if self.magnitude is None:
            return low
        summed = canonical(path) + low
        return self.magnitude.reshape(-1, 1) * summed / summed.norm(dim=1, keepdim=True) - canonical(path)


@dataclass
class Tracked:
    """An adapter as the test knows it."""

    parts: dict[str, Part]
    head: dict[str, Tensor] | None = None
    dora: bool = False
    scale: float = 1.0
    frozen: bool = False

    def clone(self, **changes: Any) -> Tracked:
        twin = copy.deepcopy(self)
        for name, value in changes.items():
            setattr(twin, name, value)
        return twin

    def weights(self) -> AdapterWeights:
        """Copies of its tensors for the engine."""
        adapters = {}
        for path, part in self.parts.items():
            name_A, name_B = factor_names(path)
            adapters[path] = {name_A: part.lora_A.clone(), name_B: part.lora_B.clone()}
            if part.magnitude is not None:
                adapters[path]["lora_magnitude_vector"] = part.magnitude.clone()
        copies = {} if self.head is None else {"head": {key: value.clone() for key, value in self.head.items()}}
        return AdapterWeights(adapters, copies)


def factor_names(path: str) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if path == "embed" else ("lora_A", "lora_B")


@dataclass(frozen=True)
class Recipe:
    """How to make an adapter: plain numbers, so that a failing run can be replayed."""

    targets: tuple[str, ...]
    rank: int
    alpha: int
    dora: bool
    rslora: bool
    head: bool
    seed: int

    def config(self) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            use_dora=self.dora,
            use_rslora=self.rslora,
            modules_to_save=["head"] if self.head else None,
        )

    def tracked(self) -> Tracked:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return 0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64)

        scaling = self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        parts = {}
        for path in self.targets:
            inner, outer = SIZES[path]
            magnitude = draw(outer).abs() + 0.5 if self.dora else None
            parts[path] = Part(draw(self.rank, inner), draw(outer, self.rank), scaling, magnitude)
        head = {"weight": draw(3, 5), "bias": draw(3)} if self.head else None
        return Tracked(parts, head, self.dora)


@dataclass
class Expectation:
    """The adapters on a model and which of them act, tracked apart from the engine."""

    adapters: dict[str, Tracked] = field(default_factory=dict)
    selected: tuple[str, ...] = ()
    enabled: bool = True
    merged: tuple[str, ...] = ()

    @property
    def acting(self) -> tuple[str, ...]:
        return self.merged or (self.selected if self.enabled else ())

    def several_heads(self, names: Sequence[str]) -> bool:
        """Whether they cannot act together."""
        return sum(self.adapters[name].head is not None for name in names) > 1

    @property
    def heads(self) -> list[str]:
        return [name for name in self.acting if self.adapters[name].head is not None]

    def output(self) -> Tensor:
        """base + sum of the active deltas."""
        weights = {path: canonical(path).clone() for path in PATHS}
        for name in self.acting:
            tracked = self.adapters[name]
            for path, part in tracked.parts.items():
                weights[path] += tracked.scale * part.delta(path)
        head = (self.adapters[self.heads[0]].head if self.heads else None) or {
            "weight": BASE["head.weight"],
            "bias": BASE["head.bias"],
        }
        hidden = torch.tanh(weights["embed"].T[IDS] @ weights["first"].T + BASE["first.bias"])
        return torch.tanh(hidden @ weights["turned"].T + BASE["turned.bias"]) @ head["weight"].T + head["bias"]


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base model's own parameters under the names they have without wrappers."""
    return {
        name.replace(".base_layer", "").replace(".original_module", ""): parameter
        for name, parameter in model.named_parameters()
        if not any(mark in name for mark in (".lora_", ".trainable_tokens_", ".modules_to_save."))
    }


def check_equal(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> None:
    """The same tensors, bit for bit."""
    assert found.keys() == wanted.keys()
    for path, named in wanted.items():
        assert found[path].keys() == named.keys()
        for key, tensor in named.items():
            assert torch.equal(found[path][key].detach(), tensor.view_as(found[path][key])), (path, key)


def read_combined(manager: AdapterManager, name: str, made: Any) -> Tracked:
    """A combined adapter as it is on the model: random rules cannot be worked out beforehand."""
    now, config = manager.weights(name).adapters, manager.configs[name]
    assert isinstance(config, LoraConfig)
    parts = {}
    for path, named in now.items():
        lora_A, lora_B = (named[key].detach().clone() for key in factor_names(path))
        parts[path] = Part(lora_A, lora_B, config.scaling_at(path))
    assert {layer.path for layer in made.layers} == set(parts)
    return Tracked(parts, frozen=True)


def check_combined(sources: list[tuple[Tracked, float]], kind: str, result: Tracked, made: Any) -> None:
    """The loss that is reported is the distance to the true sum; cat loses nothing, svd the least it can."""
    for layer in made.layers:
        wanted = torch.zeros_like(canonical(layer.path))
        for tracked, weight in sources:
            if layer.path in tracked.parts:
                wanted += weight * tracked.scale * tracked.parts[layer.path].delta(layer.path)
        got = result.parts[layer.path].delta(layer.path)
        if wanted.norm() < 1e-9 + 1e-6 * got.norm():  # what cancels out has no error to tell
            continue
        lost = float((got - wanted).norm() / wanted.norm())
        assert_close(layer.relative_error, lost, scale=max(1.0, lost), message=layer)
        if kind == "cat":
            assert lost < 1e-6
        elif kind in ("exact", "svd"):
            tail = torch.linalg.svdvals(wanted)[layer.rank :]
            assert_close(lost, float(tail.norm() / wanted.norm()), scale=1.0)


def after_swap(slot: Tracked, new: Tracked, now: AdapterWeights) -> Tracked:
    """What a slot holds after a swap: where the new adapter lacks layers or the head, nothing is added."""
    parts = dict(new.parts)
    for path in slot.parts:
        if path in parts:
            continue
        lora_A, lora_B = (now.adapters[path][key].detach().clone() for key in factor_names(path))
        assert not lora_A.any() and not lora_B.any()
        parts[path] = Part(lora_A, lora_B, 1.0)
        if slot.dora:
            parts[path].magnitude = now.adapters[path]["lora_magnitude_vector"].detach().clone()
            norm = canonical(path).norm(dim=1)
            assert_close(parts[path].magnitude, norm)
    base = {key: BASE[f"head.{key}"] for key in ("weight", "bias")}
    head = None if slot.head is None else new.head or base
    return Tracked({path: parts[path] for path in slot.parts}, head, slot.dora, slot.scale, slot.frozen)


def refuses_combining(expected: Expectation, names: list[str], kind: str, new: str) -> Any:
    """The errors that combining has to raise, if any."""
    sources = [expected.adapters[name] for name in names]
    if new in expected.adapters:
        return AdapterExistsError
    if sum(source.head is not None for source in sources) > 1:
        return AdapterError
    for path in PATHS:
        ranks = {source.parts[path].lora_A.shape[0] for source in sources if path in source.parts}
        if kind in EQUAL_RANKS and len(ranks) > 1:
            return ConfigError
    return None


def live_tensors() -> tuple[int, int]:
    """How many tensors there are and how many bytes they show."""
    gc.collect()
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    found = [tensor for tensor in found if holds_memory(tensor)]
    return len(found), sum(tensor.nbytes for tensor in found if tensor.layout is torch.strided)


def holds_memory(tensor: Tensor) -> bool:
    """Whether a tensor has bytes of its own; those that torch.compile traced with have symbols for sizes."""
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.device.type != "meta"
