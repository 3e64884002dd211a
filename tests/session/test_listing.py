"""``session.methods``: what is listed is what the methods do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nbpeft
from nbpeft.engine.contract.registry import Method, methods
from nbpeft.errors import ConfigError, HotSwapError, NbpeftError
from nbpeft.model import PeftModel, get_peft_model, hotswap_adapter
from nbpeft.model.analysis.method_facts import GROUPS, facts_of_method, listed_config
from nbpeft.session import Session
from tests.session.support import everything
from tests.tiny_models import llama, same_state

BUILT_IN = [method for method in methods() if method.adapter_class.__module__.startswith("nbpeft.")]
every_method = pytest.mark.parametrize("method", BUILT_IN, ids=lambda method: method.label)


@every_method
def test_each_has_few_words_and_a_config_of_its_own(method: Method) -> None:
    assert len(method.listing.when) < 80
    config = listed_config(method, {})
    assert method.applies(config)


@pytest.mark.drawn(10)
@every_method
def test_what_it_costs_is_what_it_trains(method: Method) -> None:
    fields: dict[str, Any] = {"block_size": 8, "n_frequency": 20, "feedforward_modules": [], "vector_length": 8}
    fields["group_size"] = 8
    if method.label != "LN tuning":
        fields["target_modules"] = ["q_proj", "v_proj"]
    if method.label == "SHiRA":
        fields["r"] = 4
    row = next(row for row in Session().methods(llama(hidden_size=64), fields).rows if row.label == method.label)
    if facts_of_method(method) is None:
        pytest.skip("not on layers")
    assert row.cost is not None and not row.cost.refusal
    model = get_peft_model(llama(hidden_size=64), listed_config(method, fields))
    assert row.cost.parameter_count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    shared = model.manager.shared("default")
    held = [*model.manager.parameters("default"), *(() if shared is None else shared.buffers())]
    assert row.cost.byte_count == sum({id(tensor): tensor.nbytes for tensor in held}.values())
    assert row.cost.training_bytes == 12 * row.cost.parameter_count


def on_a_layer(method: Method, layer: nn.Module) -> PeftModel:
    fields = dict(next(iter(method.sample_configs.values()), method.listing.listed_with))
    config = method.config_class(**{**fields, "target_modules": ["target"]})
    return get_peft_model(nn.ModuleDict({"target": layer}), config)


def layer_of(method: Method) -> nn.Module:
    return nn.LayerNorm(64) if method.label == "LN tuning" else nn.Linear(64, 64)


@pytest.mark.drawn(20)
@every_method
def test_what_it_can_do_is_what_is_listed(method: Method, tmp_path: Any) -> None:
    facts = facts_of_method(method)
    if facts is None:
        pytest.skip("not on layers")
    model = on_a_layer(method, layer_of(method))
    if facts.merges:
        on_a_layer(method, layer_of(method)).merge_and_unload()
    else:
        with pytest.raises(NbpeftError, match=r"cannot be merged|does not support merging"):
            on_a_layer(method, layer_of(method)).merge_and_unload()
    model.save_pretrained(tmp_path)
    if facts.swaps:
        hotswap_adapter(model, tmp_path, "default")
    else:
        with pytest.raises(HotSwapError):
            hotswap_adapter(model, tmp_path, "default")


@every_method
def test_quantized_layers_are_taken_where_that_is_listed(method: Method) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    facts = facts_of_method(method)
    if facts is None or method.label == "LN tuning":
        pytest.skip("not on layers that are quantized")
    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    if facts.quantized:
        assert on_a_layer(method, layer.to("cpu")).manager.names == ("default",)
    else:
        with pytest.raises(NbpeftError, match="quantized"):
            on_a_layer(method, layer.to("cpu"))


def test_the_list_of_an_adapted_model_changes_nothing(session: Session, two_adapters: Any) -> None:
    before = everything(two_adapters)
    result = session.methods()
    assert same_state(everything(two_adapters), before)
    assert str(result).startswith(f"{len(result.rows)} methods on model, with their defaults\n")
    assert [row.label for row in result.rows[:3]] == ["LoRA", "DoRA", "AdaLoRA"]
    groups = [row.group for row in result.rows]
    assert groups == sorted(groups, key=GROUPS.index) and len({*groups}) > 5
    by_size = session.methods(sort="parameters").rows
    counts = [row.cost.parameter_count for row in by_size if row.cost is not None and not row.cost.refusal]
    assert counts == sorted(counts) and len(counts) > 8
    mixed = next(row for row in result.rows if row.label == "X-LoRA")
    assert mixed.cost is not None and "adapters must map the name of each LoRA" in mixed.cost.refusal
    html = result._repr_html_()
    assert "https://arxiv.org/abs/2106.09685" in html and "not with these defaults" in html and "Peak" not in html


def test_defaults_that_divide_nothing_are_replaced_and_named(session: Session) -> None:
    model = llama(hidden_size=48)
    rows = {row.label: row for row in session.methods(model, variable="model").rows}
    for label, settings in {"C3A": "block_size=24", "VB-LoRA": "vector_length=24"}.items():
        cost = rows[label].cost
        assert cost is not None and not cost.refusal and cost.parameter_count and cost.settings == settings
    assert "here with block_size=24" in str(session.methods(model, variable="model"))
    given = {row.label: row.cost for row in session.methods(model, {"block_size": 7}, variable="model").rows}["C3A"]
    assert given is not None and "block_size = 7 must divide" in given.refusal


def test_methods_for_other_layers_keep_their_targets_and_warn(session: Session) -> None:
    plain, everywhere = (
        {row.label: row.cost for row in session.methods(llama(), fields, variable="model").rows}
        for fields in ({}, {"target_modules": "all-linear"})
    )
    for label in ("LN tuning", "trainable tokens"):
        assert everywhere[label] == plain[label] and plain[label] is not None
    assert everywhere["LoRA"] != plain["LoRA"]
    with pytest.warns(UserWarning, match="makes LN tuning train linear layers, which it is not meant for"):
        get_peft_model(llama(), nbpeft.LNTuningConfig(target_modules="all-linear"))


def test_without_a_model_there_are_no_costs(session: Session) -> None:
    result = session.methods()
    assert all(row.cost is None for row in result.rows)
    assert "Parameters" not in str(result) and "name a model to see the cost of each method on it" in str(result)


@pytest.mark.parametrize(
    ("sort", "words"),
    [
        ("size", "cannot be sorted by 'size'"),
        ("memory", "sorting the methods by memory needs a model"),
        ("peak", "sorting the methods by peak needs a model"),
    ],
)
def test_an_order_that_is_not_possible_is_refused(session: Session, sort: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        session.methods(sort=sort)


def test_headings_belong_to_groups_and_references_are_cited(session: Session) -> None:
    page, by_name = session.methods()._repr_html_(), session.methods(sort="name")
    assert page.index("Most used") < page.index("LoRA and its variants") < page.index("Learned prompts")
    assert ">doi.org<" not in page and "doi:10.1609/" in page and "paper on openreview.net" in page
    assert "Most used" not in by_name._repr_html_() and "MOST USED" not in str(by_name)
    names = [row.label.lower() for row in by_name.rows]
    assert names == sorted(names)


@pytest.mark.slow
def test_the_peak_of_a_step_is_forecast_where_sizes_are_given(session: Session, monkeypatch: Any) -> None:
    only = [method for method in methods() if method.label == "LoRA"]
    monkeypatch.setattr("nbpeft.model.analysis.method_facts.methods", lambda: only)
    (row,) = session.methods(llama(), {"r": 4}, batch_size=2, max_length=16).rows
    plan = session.plan(llama(), nbpeft.LoraConfig(r=4), batch_size=2, max_length=16)
    assert row.cost is not None and row.cost.peak_bytes == plan.peak_bytes


def test_fields_that_no_method_has_are_refused(session: Session) -> None:
    with pytest.raises(ConfigError, match=r"no method has a field 'rnk'"):
        session.methods(llama(), {"rnk": 4})


def test_it_is_also_a_frame(session: Session) -> None:
    pytest.importorskip("pandas")
    frame = session.methods(llama()).to_dataframe()
    assert {"method", "parameter_count", "merges", "when", "paper"} <= set(frame.columns)


def test_random_numbers_go_on_as_before(session: Session) -> None:
    model = llama()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    session.methods(model)
    assert torch.equal(torch.rand(3), expected)
