"""PSOFT against peft's: every start and way of its core, on layers whose directions are found anew."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close, is_close
from tests.tiny_models import gpt2, llama, logits, randomize

FIELDS: dict[str, Any] = {"r": 4, "psoft_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
WAYS: list[dict[str, Any]] = [
    {},
    {"ab_svd_init": "pissa_init", "psoft_mag_a": False},
    {"psoft_svd": "lowrank", "random_seed": 5, "psoft_svd_lowrank_niter": 2, "psoft_mag_b": False},
    {"psoft_orth": False},
    *({"use_cayley_neumann": True, "num_cayley_neumann_terms": terms} for terms in (1, 2, 3, 4, 6)),
    {"use_cayley_neumann": True, "cayley_neumann_eps": 0.1},
    {"use_cayley_neumann": True, "cayley_neumann_eps": 0.99},
]


@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_steps_are_those_of_peft(way: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(llama(), nbpeft.PsoftConfig(**FIELDS, **way))
    randomize(model, scale=0.2)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert_close(logits(model), logits(theirs))
    for one in (model, theirs):
        logits_of_one = one(torch.arange(10)[None]).logits
        logits_of_one.square().sum().backward()
    expected = {name: tensor.grad for name, tensor in theirs.named_parameters() if tensor.requires_grad}
    found = [tensor.grad for tensor in model.parameters() if tensor.requires_grad]
    assert len(found) == len(expected)
    for own in found:
        if own is None:  # a series of one term is the identity
            assert way["num_cayley_neumann_terms"] == 1 and None in expected.values()
            continue
        near = [other for other in expected.values() if other is not None and other.shape == own.shape]
        assert any(is_close(own, other) for other in near)


def test_a_random_start_is_that_of_peft() -> None:
    fields = {**FIELDS, "init_weights": False}
    models: list[Any] = []
    for library, make in ((nbpeft, get_peft_model), (peft, peft.get_peft_model)):
        torch.manual_seed(3)
        config: Any = library.PsoftConfig(**fields)
        models.append(make(llama(), config))
    assert_close(logits(models[0].eval()), logits(models[1].eval()))


def test_the_names_of_the_core_are_there() -> None:
    model: Any = get_peft_model(gpt2(), nbpeft.PsoftConfig(r=3)).eval()
    assert_close(logits(model), logits(gpt2()))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert (
        layer.r["default"] == 3 and layer.scaling["default"] == 32 / 3 and layer.psoft_R["default"].weight.shape == (3,)
    )
    names = {name.rpartition("c_attn.")[2] for name in nbpeft.get_peft_model_state_dict(model)}
    assert names == {"psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"}


def test_whole_state_dicts_of_both_are_read() -> None:
    models: list[Any] = [get_peft_model(llama(), nbpeft.PsoftConfig(**FIELDS))]
    models.append(peft.get_peft_model(llama(), peft.PsoftConfig(**FIELDS)))
    for source in models:
        with torch.no_grad():
            for parameter in (one for one in source.parameters() if one.requires_grad):
                parameter += torch.randn_like(parameter) * 0.3
        given = {key: tensor.clone() for key, tensor in source.state_dict().items()}
        again = get_peft_model(llama(), nbpeft.PsoftConfig(**FIELDS))
        assert not nbpeft.set_peft_model_state_dict(again, given).missing_keys
        assert_close(logits(again.eval()), logits(source.eval()))


def test_a_step_through_a_second_adapter_and_back(tmp_path: Path) -> None:
    model: Any = get_peft_model(llama(), nbpeft.PsoftConfig(**FIELDS))
    model.add_adapter("other", nbpeft.PsoftConfig(**{**FIELDS, "r": 2}))
    randomize(model, scale=0.3)
    model.set_adapter("other")
    expected = logits(model.eval())
    model.merge_adapter()
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    again = PeftModel.from_pretrained(llama(), tmp_path / "other")
    assert_close(logits(again), expected)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ab_svd_init": "svd"}, "psoft_init"),
        ({"num_cayley_neumann_terms": 0}, "from 1 to 64"),
        ({"psoft_svd_lowrank_niter": 129}, "psoft_svd_lowrank_niter must be from 1 to 128, not 129"),
        ({"cayley_neumann_eps": 1.0}, "between 0 and 1"),
        ({"psoft_alpha": 0}, "above 0"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        nbpeft.PsoftConfig(**fields)
    with pytest.raises(ConfigError, match="r = 99 is more than the"):
        get_peft_model(llama(), nbpeft.PsoftConfig(r=99))


@pytest.mark.parametrize(
    ("config", "fields", "switch"),
    [
        ("PsoftConfig", {"cayley_neumann_eps": 0.5}, "use_cayley_neumann=True"),
        ("PsoftConfig", {"num_cayley_neumann_terms": 9}, "use_cayley_neumann=True"),
        ("PsoftConfig", {"psoft_svd_lowrank_niter": 9}, "psoft_svd='lowrank'"),
        ("OFTConfig", {"num_cayley_neumann_terms": 9, "use_cayley_neumann": False}, "use_cayley_neumann=True"),
        ("OFTConfig", {"eps": 1e-3}, "coft=True"),
        ("MissConfig", {"mini_r": 4}, "init_weights='mini'"),
        ("AdamssConfig", {"mask_interval": 7}, "use_asa=True"),
        ("AdamssConfig", {"svd_threshold": 0.3}, "use_dynamic_rank=True"),
    ],
)
def test_fields_that_nothing_reads_are_named(config: str, fields: dict[str, Any], switch: str) -> None:
    with pytest.warns(UserWarning, match=f"`{next(iter(fields))}` is only used when `{switch}`"):
        getattr(nbpeft, config)(**fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nbpeft.PsoftConfig(cayley_neumann_eps=0.5, use_cayley_neumann=True)
