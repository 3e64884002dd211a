"""Building adapters: what is shared, what is left behind, and the pause of the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from nbpeft import LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from nbpeft.engine.changes.called_modules import outside
from nbpeft.engine.injection.build import _MANY_OBJECTS, CollectionPaused
from tests.tiny_models import llama


@pytest.fixture
def collector() -> Iterator[None]:
    """The collector is on, nothing is frozen, and few objects are young."""
    gc.enable()
    gc.unfreeze()
    gc.collect()
    yield
    gc.enable()
    gc.unfreeze()


def is_old(one: object) -> bool:
    return any(other is one for other in gc.get_objects(generation=2))


@pytest.mark.usefixtures("collector")
def test_many_new_objects_are_not_visited_by_the_next_collections() -> None:
    with CollectionPaused():
        assert not gc.isenabled()
        created = [[] for _ in range(_MANY_OBJECTS)]  # type: ignore[var-annotated]
    assert gc.isenabled() and gc.get_freeze_count() < _MANY_OBJECTS // 10  # Python 3.12 freezes what is never freed
    assert gc.get_count()[0] < _MANY_OBJECTS // 10 and is_old(created[-1])


@pytest.mark.usefixtures("collector")
def test_few_new_objects_stay_young() -> None:
    with CollectionPaused():
        created = [[] for _ in range(_MANY_OBJECTS // 100)]  # type: ignore[var-annotated]
    assert gc.isenabled() and not is_old(created[-1])


@pytest.mark.usefixtures("collector")
def test_what_the_program_has_frozen_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with CollectionPaused():
        created = [[] for _ in range(_MANY_OBJECTS)]  # type: ignore[var-annotated]
    assert gc.get_freeze_count() >= frozen - len(created) > 0


@pytest.mark.usefixtures("collector")
def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    with CollectionPaused():
        pass
    assert not gc.isenabled()


def test_copies_of_tied_modules_are_apart_unless_the_config_ties_them() -> None:
    copied = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    for config, tied in ((LoHaConfig(**copied), False), (LoraConfig(**copied, ensure_weight_tying=True), True)):
        copies = get_peft_model(llama(tie_word_embeddings=True), config).manager.copies
        embedding, head = (copies[path].modules_to_save["default"] for path in ("model.embed_tokens", "lm_head"))
        assert (embedding.weight is head.weight) is tied


def test_a_file_with_one_of_two_tied_adapters_is_loaded_as_it_is() -> None:
    settings = LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights="gaussian")
    manager = get_peft_model(llama(tie_word_embeddings=True), settings).manager
    weights = manager.weights("default")
    del weights.adapters["lm_head"]
    wanted = {key: tensor.clone() for key, tensor in weights.adapters["model.embed_tokens"].items()}
    manager.add("again", manager.configs["default"], weights)
    found = manager.weights("again").adapters["model.embed_tokens"]
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_an_unloaded_model_has_no_wrappers_beside_its_modules() -> None:
    base = llama()
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert outside(base)
    model.unload()
    assert not outside(base)
