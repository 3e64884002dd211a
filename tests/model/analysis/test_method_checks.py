"""``check_method``: methods of nbpeft pass it, and a method with one mistake fails the check that is about it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn

import nbpeft
from nbpeft.engine.contract import registry
from nbpeft.methods import Adapter, MethodConfig, Rescales, ServesRows, register
from nbpeft.model.analysis.method_checks import _CHECKS
from nbpeft.model.analysis.method_facts import listed_config
from tests.tiny_models import llama, tokens

INPUTS = torch.linspace(-1, 1, 36).view(3, 2, 6)
NAMES = [check.name for check in _CHECKS]


@dataclass
class PairConfig(MethodConfig):
    r: int = 2
    alpha: float = 2.0
    dropout: float = 0.0

    shares: ClassVar[tuple[str, ...]] = ("dropout",)

    def scaling_at(self, path: str) -> float:
        return self.alpha / self.r


class Pair(Adapter, ServesRows, Rescales):
    """The product of two matrices: right in everything; each class below gets one thing wrong."""

    from_config: ClassVar[Mapping[str, str]] = {"scaling": "scaling_at", "dropout": "dropout"}
    pair_a: Tensor
    pair_b: Tensor
    dropout: float

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: nn.Module, kind: Any) -> dict[str, tuple[int, ...]]:
        (columns, rows) = kind.features(module)
        if not kind.is_linear:
            raise nbpeft.ConfigError(f"{path} is not a linear layer")
        return {"pair_a": (config.r, columns), "pair_b": (rows, config.r)}

    @classmethod
    def initial_tensors(cls, config: Any, site: Any) -> Mapping[str, Tensor]:
        return {"pair_a": site.new(site.shapes["pair_a"]).normal_(), "pair_b": site.new(site.shapes["pair_b"])}

    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        dropped = nn.functional.dropout(x.to(self.pair_a.dtype), self.dropout, self.training)
        return dropped @ self.pair_a.T @ self.pair_b.T * self.scaling

    def delta_weight(self, weight: Tensor, base: Any) -> Tensor:
        return self.pair_b @ self.pair_a * self.scaling

    @classmethod
    def mixed(cls, adapters: Any, scales: Any, base: Any, kept: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
        return None


class ForgetsItsScaling(Pair):
    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        return super().forward(x, base_output, base) / self.scaling

    def delta_weight(self, weight: Tensor, base: Any) -> Tensor:
        return self.pair_b @ self.pair_a


class MergesWithoutItsScaling(Pair):
    def delta_weight(self, weight: Tensor, base: Any) -> Tensor:
        return self.pair_b @ self.pair_a


class ForgetsItsDropout(Pair):
    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        return x.to(self.pair_a.dtype) @ self.pair_a.T @ self.pair_b.T * self.scaling


class AlwaysDrops(Pair):
    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        dropped = nn.functional.dropout(x.to(self.pair_a.dtype), self.dropout)
        return dropped @ self.pair_a.T @ self.pair_b.T * self.scaling


class KeepsAProduct(Pair):
    """Computes its product once, so that it stays with the parameters of before a swap."""

    products: ClassVar[WeakKeyDictionary[nn.Module, Tensor]] = WeakKeyDictionary()

    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        kept = self.products.setdefault(self, self.delta_weight(x, base).detach())
        return x.to(kept.dtype) @ kept.T


class ReadsTheStoredWeight(Pair):
    """Takes the tensor of the layer for its weight, which on a base in 4 bits holds codes."""

    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        return (
            super().forward(x, base_output, base) + 1e-3 * x.sum(-1, keepdim=True) * base.module.weight.float().mean()
        )


class RefusesAllLayers(Pair):
    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: nn.Module, kind: Any) -> dict[str, tuple[int, ...]]:
        raise nbpeft.ConfigError(f"{path}: not today")


class RaisesInParameterShapes(Pair):
    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: nn.Module, kind: Any) -> dict[str, tuple[int, ...]]:
        raise IndexError("tuple index\nout of range")


class RaisesInTheFirstCall(Pair):
    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        raise nbpeft.ConfigError("only now is it too late")


class ReturnsAnotherShape(Pair):
    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        return super().forward(x, base_output, base).unsqueeze(0)


class ChangesTheBaseBeforeRefusing(Pair):
    @classmethod
    @torch.no_grad()
    def parameter_shapes(cls, config: Any, path: str, module: Any, kind: Any) -> dict[str, tuple[int, ...]]:
        if not kind.is_linear:
            module.weight.mul_(2)
        return super().parameter_shapes(config, path, module, kind)


class ChangesTheBase(Pair):
    @torch.no_grad()
    def prepare(self, config: Any, site: Any, tensors: Any) -> None:
        site.base.module.weight.mul_(1 + 1e-7)


class StartsElsewhere(Pair):
    @classmethod
    def initial_tensors(cls, config: Any, site: Any) -> Mapping[str, Tensor]:
        return {name: site.new(shape).normal_() for name, shape in site.shapes.items()}


class Detaches(Pair):
    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        return x.to(self.pair_a.dtype) @ self.pair_a.detach().T @ self.pair_b.T


class TrainsTheBase(Pair):
    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        base.module.weight.requires_grad_(True)
        return super().forward(x, base_output, base)


class MergesTwice(Pair):
    def delta_weight(self, weight: Tensor, base: Any) -> Tensor:
        return 2 * self.pair_b @ self.pair_a


class RaisesInMerging(Pair):
    def delta_weight(self, weight: Tensor, base: Any) -> Tensor:
        raise nbpeft.ConfigError("delta_weight is not written yet")


class ChangesWithMerging(Pair):
    """Merges right, but stores what it has made in its parameters."""

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: Any) -> Tensor:
        delta = self.pair_b @ self.pair_a
        self.pair_b.mul_(1.5)
        self.pair_a.div_(1.5)
        return delta


class ForgetsATensor(Pair):
    def saved_tensors(self, shapes: Any) -> dict[str, Tensor]:
        return {"pair_a": self.pair_a}


class KeepsWhatIsNotSaved(Pair):
    factor: Tensor

    def prepare(self, config: Any, site: Any, tensors: Any) -> None:
        self.bind(factor=torch.rand(1))

    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        return super().forward(x, base_output, base) * self.factor

    def delta_weight(self, weight: Tensor, base: Any) -> Tensor:
        return super().delta_weight(weight, base) * self.factor


class SharesByAccident(Pair):
    """All adapters of one shape have the same tensors."""

    tensors: ClassVar[dict[Any, Mapping[str, Tensor]]] = {}

    @classmethod
    def initial_tensors(cls, config: Any, site: Any) -> Mapping[str, Tensor]:
        return cls.tensors.setdefault((site.path, *site.shapes.values()), super().initial_tensors(config, site))


class ReadsTheWeightInSilence(Pair):
    """Leaves out ``reads_weight``, so that the second of two merged adapters gets the weight with the first one."""

    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        return nn.functional.linear(x, self.delta_weight(base.weight(), base))

    def delta_weight(self, weight: Tensor, base: Any) -> Tensor:
        return weight * super().delta_weight(weight, base)


class ServesTheFirst(Pair):
    """Serves all rows of a mixed batch with one adapter."""

    @classmethod
    def mixed(cls, adapters: Any, scales: Any, base: Any, kept: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
        return lambda x, index: adapters[0](x, x, base)


class NeedsFloat32(Pair):
    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        return x @ self.pair_a.T @ self.pair_b.T


class HoldsALambda(Pair):
    product: Callable[[Tensor], Tensor]

    def prepare(self, config: Any, site: Any, tensors: Any) -> None:
        self.bind(product=lambda x: x.to(self.pair_a.dtype) @ self.pair_a.T @ self.pair_b.T)

    def forward(self, x: Tensor, base_output: Tensor, base: Any) -> Tensor:
        return self.product(x)


MISTAKES: list[tuple[type[Pair], str, str]] = [
    (RefusesAllLayers, "injection", "not today"),
    (RaisesInParameterShapes, "injection", "IndexError: tuple index out of range"),
    (RaisesInTheFirstCall, "injection", "the call raises ConfigError: only now"),
    (ReturnsAnotherShape, "injection", "that of the base model"),
    (ChangesTheBaseBeforeRefusing, "injection", "refused, but the model changed: 'target.weight' differ"),
    (ChangesTheBase, "rollback", "adding an adapter was undone, but weights of the model changed"),
    (StartsElsewhere, "identity", "a new adapter changes what the model computes"),
    (Detaches, "gradients", "no gradient reaches"),
    (TrainsTheBase, "gradients", "a parameter of the base model, is trained"),
    (ForgetsItsScaling, "scale", "forward does not use self.scaling"),
    (MergesWithoutItsScaling, "scale", "merged, with the scaling times 0.5: outputs differ"),
    (ForgetsItsDropout, "dropout", "dropout = 0.5 does not change the output in training"),
    (AlwaysDrops, "dropout", "dropout = 0.5 changes the output outside of training"),
    (KeepsAProduct, "swap", "the adapter after a swap: outputs differ"),
    (ReadsTheStoredWeight, "quantized", "on a base in 4 bits"),
    (MergesTwice, "merge", "after merge_adapter()"),
    (RaisesInMerging, "merge", "ConfigError: delta_weight is not written yet"),
    (ChangesWithMerging, "unmerge", "after unmerge_adapter()"),
    (ForgetsATensor, "save", "pair_b"),
    (KeepsWhatIsNotSaved, "save", "the loaded adapter: outputs differ"),
    (ChangesTheBase, "unload", "after unload()"),
    (SharesByAccident, "adapters", "two adapters with different parameters compute the same"),
    (ReadsTheWeightInSilence, "adapters", "two merged adapters: outputs differ"),
    (ServesTheFirst, "rows", "row 1 of a mixed batch"),
    (NeedsFloat32, "bfloat16", "RuntimeError"),
    (HoldsALambda, "deepcopy", "after copy.deepcopy()"),
    (KeepsWhatIsNotSaved, "copy", "the copied adapter's output is not bit-equal"),
    (HoldsALambda, "pickle", "lambda"),
]


class OneProjection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.q_proj(x))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_methods", [*registry.methods()])


def checked(cls: type[Adapter], config_class: type[MethodConfig] = PairConfig, **options: Any) -> nbpeft.MethodReport:
    registry._methods[:] = [method for method in registry._methods if method.label != "Pair"]
    register(config_class, peft_type="PAIR", label="Pair")(cls)
    return nbpeft.check_method(config_class(target_modules=["q_proj"]), **options)


def statuses(report: nbpeft.MethodReport) -> set[tuple[str, str]]:
    return {(check.check, check.status) for check in report.checks}


def test_a_method_without_a_mistake_passes_every_check() -> None:
    report = checked(Pair)
    assert report.ok and report.raise_for_failures() is None
    assert {name for name, status in statuses(report) if status == "ok"} == set(NAMES)
    refused = [check for check in report.checks if check.status != "ok"]
    assert {check.status for check in refused} == {"refused"} and {check.check for check in refused} == {"injection"}
    assert "target is not a linear layer" in {check.reason for check in refused}


@pytest.mark.parametrize(
    ("cls", "check", "reason"), MISTAKES, ids=[f"{cls.__name__}-{check}" for cls, check, _ in MISTAKES]
)
def test_a_mistake_is_found_by_its_check(cls: type[Adapter], check: str, reason: str) -> None:
    SharesByAccident.tensors.clear()
    refuses = cls is ChangesTheBaseBeforeRefusing  # layers of other kinds, which are among the default models
    report = checked(cls) if refuses else checked(cls, model=OneProjection(), inputs=INPUTS)
    found = [failure.reason for failure in report.failures if failure.check == check]
    assert any(reason in each for each in found), str(report)
    assert all("\n" not in each for each in found)


@dataclass
class DoublingConfig(PairConfig):
    """Its fields change each time that it is made."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.r *= 2


def test_a_config_that_changes_when_it_is_loaded_is_found() -> None:
    report = checked(Pair, DoublingConfig, model=OneProjection(), inputs=INPUTS)
    found = {check.check: check.reason for check in report.failures}
    assert found["config"] == "'r' differ after save_pretrained and from_pretrained"


def test_every_check_finds_a_mistake() -> None:
    assert {check for _, check, _ in MISTAKES} | {"config"} == set(NAMES)


SAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "LN tuning": ("", {"target_modules": ["norm"]}),
    "OFT": ("blocks", {}),
    "P-tuning": ("lstm", {}),
    "Super-Tuning": ("", {"r": 2}),
    "CPT": ("", {"task_type": "CAUSAL_LM"}),
    "multitask prompt tuning": ("", {"task_type": "CAUSAL_LM"}),
}
"""Methods whose first sample does not show all they have -> another sample, or further fields."""
SKIPPED = {
    "KaSA": {"identity": "it leaves out the smallest singular values"},
}
NEEDS_OTHERS = {
    "Arrow": "routes to LoRA adapters that are on the model",
    "X-LoRA": "mixes saved LoRA adapters",
    "ShadowPEFT": "a network of one layer leaves its update transform unused",
}
"""Methods that need more than a config, which tests of their own check."""
GIVEN_INPUTS: dict[str, dict[str, Any]] = {
    "aLoRA": {"input_ids": torch.tensor([[5, 0, 3, 4], [1, 0, 2, 6], [7, 8, 0, 9]])},
    "trainable tokens": {"input_ids": torch.tensor([[0, 1, 2], [2, 3, 0], [1, 0, 3]])},
    "multitask prompt tuning": {"input_ids": tokens(3), "task_ids": torch.tensor([0, 1, 0])},
}
"""Methods that do nothing without certain tokens or arguments -> inputs that have them."""
BUILT_IN = [method for method in registry.methods() if method.adapter_class.__module__.startswith("nbpeft.")]


@pytest.mark.drawn(12)
@pytest.mark.parametrize("method", BUILT_IN, ids=lambda method: method.label)
def test_every_method_of_nbpeft_passes(method: registry.Method) -> None:
    if method.label in NEEDS_OTHERS:
        with pytest.raises(nbpeft.MethodCheckError, match=r"injection|gradients"):
            nbpeft.check_method(listed_config(method, {})).raise_for_failures()
        return
    sample, fields = SAMPLES.get(method.label, ("", {}))
    first = next(iter(method.sample_configs.values()), method.listing.listed_with)
    config = method.config_class(**{**(method.sample_configs[sample] if sample else first), **fields})
    inputs = GIVEN_INPUTS.get(method.label)
    given = {"model": llama(), "inputs": inputs} if inputs else {}
    report = nbpeft.check_method(config, skip=SKIPPED.get(method.label, {}), **given)
    assert report.ok, str(report)
    assert report.method == method.title(config) and "LlamaForCausalLM" in {check.model for check in report.checks}


def test_what_a_method_does_not_promise_is_skipped_or_refused_with_its_reason() -> None:
    report = nbpeft.check_method(nbpeft.PromptTuningConfig(num_virtual_tokens=2))
    found = {check.check: check for check in report.checks}
    assert report.ok and len(report.checks) == len(NAMES)
    assert found["identity"].status == "skipped" and "a learned prompt" in found["identity"].reason
    assert found["merge"].status == "refused" and "cannot be merged" in found["merge"].reason


def test_skipped_checks_have_their_reason() -> None:
    skip = {"identity": "it starts as something else", "pickle": "no"}
    report = checked(StartsElsewhere, model=OneProjection(), inputs=INPUTS, skip=skip)
    assert report.ok and {check.check: check.reason for check in report.checks if check.status == "skipped"} == skip
    assert checked(StartsElsewhere, model=OneProjection(), inputs=INPUTS, skip=["identity"]).ok


def test_a_given_model_is_not_changed_and_gets_token_ids() -> None:
    base = llama(dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    random, config = torch.get_rng_state(), nbpeft.LoraConfig(r=2)
    report = nbpeft.check_method(config, base)
    assert report.ok and {check.model for check in report.checks} == {"LlamaForCausalLM"}
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(random, torch.get_rng_state()) and config.target_modules is None


class Strict(nn.Module):
    """Accepts no other argument than token ids, and has an input embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()
        self.config = self.model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, attention_mask: Any = None) -> Any:
        return self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask)


def test_arguments_that_only_adapters_read_are_not_passed_to_the_base_model() -> None:
    config = nbpeft.MultitaskPromptTuningConfig(num_virtual_tokens=2, num_tasks=2, num_ranks=1, task_type="CAUSAL_LM")
    inputs = {"input_ids": tokens(3), "task_ids": torch.tensor([0, 1, 0])}
    report = nbpeft.check_method(config, Strict(), inputs=inputs)
    assert {check.check for check in report.checks if check.status == "ok"} >= {"injection", "save", "unload"}, report


def test_the_report_is_a_table_json_and_one_error() -> None:
    report = checked(MergesTwice, model=OneProjection(), inputs=INPUTS)
    lines = str(report).splitlines()
    assert lines[0] == "Pair: 16 ok, 3 failed" and len(lines) == len(NAMES) + 1
    assert lines[1 + NAMES.index("merge")].split()[:3] == ["merge", "failed", "OneProjection:"]
    assert repr(report) == str(report) and "merge_adapter" in report._repr_html_()
    data = json.loads(json.dumps(report.to_dict()))
    assert data["type"] == "MethodReport" and data["method"] == "Pair" and len(data["checks"]) == len(NAMES)
    assert data["checks"][0] == {"check": "injection", "model": "OneProjection", "status": "ok", "reason": ""}
    with pytest.raises(
        nbpeft.MethodCheckError, match="Pair fails 3 checks: scale on OneProjection: merged, with"
    ) as caught:
        report.raise_for_failures()
    assert isinstance(caught.value, AssertionError) and caught.value.details["failures"] == report.failures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "LORA"}, "check_method needs a config such as LoraConfig, not a str"),
        ({"model": "llama"}, "model must be a torch model, not a str"),
        ({"inputs": INPUTS}, "inputs need a model"),
        ({"model": OneProjection()}, "OneProjection has no input embedding: pass inputs"),
        ({"model": OneProjection(), "inputs": 3}, "inputs must be a tensor or a dict of keyword arguments, not an int"),
        (
            {"model": OneProjection(), "inputs": {"y": INPUTS}},
            "OneProjection without adapters cannot be called: TypeError",
        ),
        ({"skip": "merge"}, "skip must be a list of checks"),
        ({"skip": ["merging"]}, "'merging' is not a check that can be skipped. Did you mean 'merge'"),
        ({"skip": ["injection"]}, "'injection' is not a check that can be skipped"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(nbpeft.ConfigError, match=re.escape(message)):
        nbpeft.check_method(**{"config": nbpeft.LoraConfig(target_modules=["q_proj"]), **arguments})


def test_a_model_with_adapters_is_refused() -> None:
    model = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(r=2))
    with pytest.raises(nbpeft.AdapterError, match="check_method needs a model without adapters"):
        nbpeft.check_method(nbpeft.LoraConfig(r=2), model)
