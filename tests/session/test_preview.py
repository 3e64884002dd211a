"""A dry run says what there is afterwards: counts and bytes, for every method, kind of layer and form of weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from nbpeft.engine.contract.registry import methods
from nbpeft.engine.tree.model_tree import parameter_counts
from nbpeft.session import Session
from nbpeft.session.commands import adapters, quantizing
from nbpeft.session.results import Preview
from nbpeft.state import AdapterState
from tests.test_matrix import CASES, PAIRS, config_of, make
from tests.tiny_models import classifier, experts_of, gpt2, llama, mixture

pytestmark = pytest.mark.filterwarnings("ignore")
COUNTED = ("method", "parameter_count", "byte_count", "module_count")
HEAD = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
TIED = {"target_modules": ["q_proj"], "ensure_weight_tying": True}


@pytest.fixture(autouse=True)
def no_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is forecast in a pass over the model, which counts do not need."""
    for commands in (adapters, quantizing):
        monkeypatch.setattr(commands, "plan_or_reason", lambda *_: "")


def differing(found: Preview, then: AdapterState) -> dict[str, tuple[Any, Any]]:
    return {
        name: (getattr(found, name), getattr(then, name))
        for name in COUNTED
        if getattr(found, name) != getattr(then, name)
    }


def check(base: Any, config: Any, *, onto: Mapping[str, Any] | None = None) -> None:
    session = Session()
    if onto is not None:
        base = session.add(base, onto, name="present", variable="model").model
    found = session.preview(base, config, variable="model", name="new")
    _, total = parameter_counts(base)
    added = session.add(base, config, variable="model", name="new")
    assert not differing(found, added.adapter)
    assert found.base_count == total
    assert found.training_bytes == 3 * found.byte_count


@pytest.mark.drawn(4)
@pytest.mark.parametrize("kind", CASES)
def test_counts_of_every_sample_are_those_after_adding(kind: str) -> None:
    for sample in [sample for where, sample in PAIRS if where == kind]:
        check(make(CASES[kind]), config_of(sample))


@pytest.mark.slow
def test_counts_of_methods_on_a_whole_model_in_half_precision() -> None:
    for method in methods():
        if not method.sample_configs:  # Arrow routes over adapters that are there
            continue
        fields = {**method.listing.listed_with, **next(iter(method.sample_configs.values()))}
        fields["target_modules"] = ["q_proj", "down_proj"]
        known = method.config_class.__dataclass_fields__
        if method.transforms_calls:
            del fields["target_modules"]
        config = method.config_class(**{name: value for name, value in fields.items() if name in known})
        present = None if method.transforms_calls else {"target_modules": ["q_proj"]}
        check(llama(dtype=torch.bfloat16), config, onto=present)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("base", "fields"),
    [
        (gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
        (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"}),
        (llama, HEAD),
        (classifier, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
        (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
        (lambda: llama(tie_word_embeddings=True), {**TIED, "trainable_token_indices": [1, 2]}),
        (lambda: llama(tie_word_embeddings=True), {**TIED, "modules_to_save": ["lm_head"]}),
        (lambda: mixture("qwen3_moe"), {"target_modules": ["q_proj"], "target_parameters": experts_of("qwen3_moe")}),
        (llama, {"target_modules": ["q_proj", "v_proj"], "layer_replication": [[0, 2], [1, 2]]}),
    ],
    ids=["biases", "own-biases", "head", "classifier", "tokens", "tied-tokens", "tied-head", "experts", "replicated"],
)
def test_counts_of_what_else_an_adapter_trains(
    base: Callable[[], Any], fields: dict[str, Any], dtype: torch.dtype
) -> None:
    check(base().to(dtype), fields)


@pytest.mark.parametrize("quantization", [{"quant_type": "nf4"}, {"quant_type": "fp4"}, {"bits": 8}])
def test_counts_of_quantizing_are_those_afterwards(session: Session, quantization: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    base = llama()
    _, total = parameter_counts(base)
    found = session.preview_qlora(base, HEAD, **quantization).adapter
    result = session.qlora(base, HEAD, variable="model", **quantization)
    assert not differing(found, result.added.adapter)
    assert found.base_count == total
    again = session.preview(result.model, HEAD, name="second")
    assert again.base_count == parameter_counts(result.model)[1]


def test_the_head_of_a_classifier_is_trained_with_every_adapter(session: Session) -> None:
    fields = {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    first = session.add(classifier(), fields, name="a", variable="model")
    second = session.add(first.model, fields, name="b")
    assert first.adapter.targets == second.adapter.targets == ("q_proj", "score")
    assert first.adapter.parameter_count == second.adapter.parameter_count


def test_frozen_tensors_that_layers_share_are_shown_apart(session: Session) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = session.preview(llama(), {"peft_type": "vera", "target_modules": ["q_proj"]})
    assert found.frozen_bytes > found.byte_count
    assert "of frozen tensors that its layers share" in found._repr_html_()
