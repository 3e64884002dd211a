"""Combining adapters and hot-swapping them through a session."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nbpeft.engine.contract.combination import Combination
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.methods.lora.combining import combine_low_rank
from nbpeft.errors import (
    AdapterError,
    AdapterExistsError,
    CheckpointNotFoundError,
    ConfigError,
    HotSwapError,
    MergeError,
    NbpeftError,
    UnknownAdapterError,
)
from nbpeft.model.handle.serving import blended
from nbpeft.session import Session
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close
from tests.session.support import alone, everything
from tests.tiny_models import llama, logits, randomize, same_state


@pytest.fixture
def model(two_adapters: Any) -> Any:
    return two_adapters


# Combine


def test_exact_is_the_weighted_sum_and_loses_nothing(session: Session, model: Any) -> None:
    result = session.combine({"orders": 0.7, "pirate": 0.3}, name="both")
    assert (result.kind, result.rank, result.remade) == ("exact", 6, False)
    assert result.relative_error < 1e-4 and result.energy_kept > 0.9999
    assert "nothing lost" in str(result) and "0.7 × orders + 0.3 × pirate" in str(result)
    assert session.state.models[0].active == ("orders",)
    assert not result.adapter.trainable
    with blended(model.manager, {"orders": 0.7, "pirate": 0.3}):
        mixed = logits(model)
    session.use("both")
    assert_close(logits(model), mixed)


def test_what_is_lost_is_told_by_layer_and_in_total(session: Session, model: Any) -> None:
    result = session.combine({"orders": 1.0, "pirate": -0.5}, name="cut", r=2)
    assert {layer.rank for layer in result.layers} == {2}
    assert 0 < result.relative_error < 1 and 0 < result.energy_kept < 1
    assert result.worst.relative_error == max(layer.relative_error for layer in result.layers)
    assert {layer.path.rpartition(".")[2] for layer in result.layers} == {"q_proj", "v_proj", "up_proj"}
    manager = model.manager

    def delta(name: str, path: str) -> torch.Tensor:
        layer = manager.layers[path]
        if name not in layer.adapters:
            return torch.zeros_like(layer.base_layer.weight)
        adapter = layer.adapter(name)
        return (adapter.scaling * adapter.lora_B @ adapter.lora_A).detach()

    for layer in result.layers:
        true = (delta("orders", layer.path) - 0.5 * delta("pirate", layer.path)).double()
        error = (true - delta("cut", layer.path).double()).norm() / true.norm()
        assert_close(layer.relative_error, float(error), scale=1.0)
    html = result._repr_html_()
    assert "layer by layer" in html and result.worst.path in html
    assert f"worst: {result.worst.path}" in str(result)


def test_ties_and_dare_go_by_their_names(session: Session, model: Any) -> None:
    ties = session.combine({"orders": 1, "pirate": 1}, name="t", type="ties_svd", density=0.5, r=3)
    assert ties.kind == "ties_svd" and ties.relative_error > 0.01
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = session.combine({"orders": 1, "pirate": 1}, name="d", type="dare_linear_svd", density=0.5, seed=7)
    assert torch.equal(torch.rand(3), expected)
    second = session.combine({"orders": 1, "pirate": 1}, name="e", type="dare_linear_svd", density=0.5, seed=7)
    assert [layer.relative_error for layer in first.layers] == [layer.relative_error for layer in second.layers]


def test_linear_says_that_it_is_not_the_sum(session: Session, model: Any) -> None:
    session.copy("orders", "twin")
    randomize(model, "twin", 9)
    result = session.combine({"orders": 0.5, "twin": 0.5}, name="mean", type="linear")
    assert any("exact" in note for note in result.notes)


def test_again_remakes_the_combination_but_nothing_else(session: Session, model: Any) -> None:
    session.combine({"orders": 0.7, "pirate": 0.3}, name="both")
    session.use(["both", "orders"])
    again = session.combine({"orders": 0.2, "pirate": 0.3}, name="both")
    assert again.remade and "remade" in str(again)
    assert model.manager.names == ("pirate", "orders", "both")
    assert model.manager.active == ("both", "orders")
    session.freeze("both", off=True)
    with pytest.raises(AdapterExistsError, match=r"\(replace=…\)"):
        session.combine({"orders": 0.7}, name="both")
    assert session.combine({"orders": 0.7}, name="both", replace=True).remade
    with pytest.raises(AdapterExistsError, match="one of the combined adapters"):
        session.combine({"orders": 0.7}, name="orders", replace=True)
    with pytest.raises(AdapterExistsError, match="already"):
        session.combine({"orders": 0.7}, name="pirate")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"type": "exakt"}, ConfigError, "Did you mean 'exact'"),
        ({"type": "ties"}, ConfigError, "needs density"),
        ({"type": "linear"}, ConfigError, "needs equal ranks"),
        ({"type": "ties", "density": 0.5, "r": 4}, ConfigError, "ties_svd uses it"),
        ({"density": 0.5}, ConfigError, "density has no effect for type 'exact'"),
        ({"r": 0}, ConfigError, "positive"),
        ({"weights": {}}, AdapterError, "name at least one"),
        ({"weights": {"order": 1}}, UnknownAdapterError, "Did you mean 'orders'"),
        ({"weights": {"orders": float("inf")}}, AdapterError, "finite"),
        ({"name": "a.b"}, NbpeftError, "a.b"),
    ],
)
def test_a_combination_that_fails_leaves_all_as_it_was(
    session: Session, model: Any, options: dict[str, Any], error: type[NbpeftError], words: str
) -> None:
    before = everything(model)
    given: dict[str, Any] = {"weights": {"orders": 1, "pirate": 1}, "name": "new", **options}
    with pytest.raises(error, match=re.escape(words)) as raised:
        session.combine(given.pop("weights"), **given)
    assert "\n" not in str(raised.value)
    assert same_state(everything(model), before)


class Mean:
    """Another method's way to combine: LoRA's sum under a name of its own, of which only one takes a rank."""

    types = ("mean", "mean_cut")
    usual_type = "mean"

    def takes(self, combination_type: str) -> tuple[str, ...]:
        return ("svd_rank",) if combination_type == "mean_cut" else ()

    def __call__(self, layers: Any, configs: Any, adapters: Any, weights: Any, settings: Any) -> Combination:
        return combine_low_rank(layers, configs, adapters, weights, {**settings, "combination_type": "exact"})


def test_the_types_and_their_options_are_the_methods_own(
    session: Session, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = dataclasses.replace(method_of(model.manager.configs["orders"]), combine=Mean())
    monkeypatch.setattr("nbpeft.model.combine.combining.method_of", lambda config: changed)
    weights = {"orders": 1, "pirate": 1}
    assert session.combine(weights, name="sum", type="mean").rank == 6
    assert session.combine(weights, name="cut", type="mean_cut", r=2).rank == 2
    with pytest.raises(ConfigError, match="r has no effect for type 'mean'; mean_cut uses it"):
        session.combine(weights, name="new", type="mean", r=2)
    with pytest.raises(ConfigError, match=r"density has no effect for type 'mean'$"):
        session.combine(weights, name="new", type="mean", density=0.5)
    with pytest.raises(ConfigError, match="choose from mean, mean_cut"):
        session.combine(weights, name="new", type="ties", density=0.5)


def test_without_a_rank_none_is_shown(session: Session, model: Any) -> None:
    for name in ("one", "two"):
        session.add(model, {"peft_type": "ia3"}, name=name)
        randomize(model, name, len(name))
    made = session.combine({"one": 1, "two": 0.5}, name="both", type="linear")
    assert made.rank is None and made.relative_error > 0.01
    assert "rank" not in str(made).lower() and "rank" not in made._repr_html_().lower()
    assert "rank" not in str(model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "again"))
    assert ">Rank<" in session.combine({"orders": 1, "pirate": 1}, name="cut", r=2)._repr_html_()


def test_a_combination_can_be_tried_without_a_trace(session: Session, model: Any) -> None:
    weights = {"orders": 1.0, "pirate": 0.5}
    before = everything(model)
    names: list[tuple[str, ...]] = []
    session.subscribe(lambda state: names.append(tuple(item.name for item in state.models[0].adapters)))
    options: dict[str, Any] = {"type": "dare_ties_svd", "density": 0.5, "seed": 3}
    tried = session.try_combination(weights, "Hi", tokenizer=CharTokenizer(), max_new_tokens=8, **options)
    assert same_state(everything(model), before)
    assert set(names) == {("pirate", "orders")}
    assert list(tried.answers) == ["base", "dare_ties_svd: orders + pirate (1 / 0.5)"]
    session.combine(weights, name="kept", **options)
    kept = session.compare("Hi", adapters=["kept"], max_new_tokens=8)
    assert kept.columns[1].answers == tried.columns[1].answers


def test_results_are_plain_data(session: Session, model: Any) -> None:
    combined = session.combine({"orders": 1}, name="c")
    compared = session.compare("Hi", tokenizer=CharTokenizer(), max_new_tokens=1)
    assert (
        json.loads(json.dumps(dataclasses.asdict(combined)))["combined"]["combination_type"] == combined.kind == "exact"
    )
    assert json.loads(json.dumps(dataclasses.asdict(compared)))["prompts"] == ["Hi"]


# Swap


@pytest.fixture
def saved(session: Session, model: Any, tmp_path: Path) -> Path:
    """Another ``orders``, of larger rank, in a folder."""
    other = Session()
    handle = other.add(llama(), {"r": 6, "target_modules": ["q_proj", "up_proj"], "lora_alpha": 3}).model
    randomize(handle, "default", 5)
    other.save(tmp_path / "new")
    return tmp_path / "new"


def test_a_swap_gives_what_loading_gives(session: Session, model: Any, saved: Path) -> None:
    session.load(saved, name="fresh")
    session.use("fresh")
    fresh = logits(model)
    session.use("pirate")
    pirate = logits(model)
    result = session.swap(saved, into="orders", check_prompt="Hi", tokenizer=CharTokenizer(), max_new_tokens=6)
    assert torch.equal(logits(model), pirate)
    assert session.state.models[0].active == ("pirate",)
    assert (result.adapter.summary["r"], result.layers) == ("6", 4)
    assert result.before != result.after
    assert result.after == alone(model, "Hi", "orders", 6)
    assert "before" in str(result) and "Hi" in result._repr_html_()
    session.use("orders")
    assert_close(logits(model), fresh)


def test_the_active_adapter_is_swapped_where_none_is_named(session: Session, model: Any, saved: Path) -> None:
    assert session.swap(saved).adapter.name == "orders"
    session.use(["orders", "pirate"])
    with pytest.raises(AdapterError, match=r"\(into=…\)"):
        session.swap(saved)


def test_a_refused_swap_is_undone(session: Session, model: Any, saved: Path) -> None:
    before = everything(model.train())
    seen: list[torch.Tensor] = []

    def refuse(swapped: Any) -> bool:
        seen.append(logits(swapped))
        return False

    with pytest.raises(HotSwapError, match="did not pass"):
        session.swap(saved, into="orders", validate=refuse)
    assert len(seen) == 1
    assert same_state(everything(model), before)


def test_an_adapter_whose_output_is_not_finite_is_refused(
    session: Session, model: Any, saved: Path, tmp_path: Path
) -> None:
    other = Session()
    handle = other.load(saved, model=llama()).model
    with torch.no_grad():
        handle.manager.parameters("new")[1].fill_(float("nan"))
    other.save(tmp_path / "broken")
    before = everything(model)
    with pytest.raises(HotSwapError, match="not finite"):
        session.swap(tmp_path / "broken", into="orders", check_prompt="Hi", tokenizer=CharTokenizer())
    assert same_state(everything(model), before)


def test_mistakes_in_swapping(session: Session, model: Any, saved: Path) -> None:
    before = everything(model)
    with pytest.raises(CheckpointNotFoundError, match="did you mean"):
        session.swap(saved.parent, into="orders")
    with pytest.raises(HotSwapError, match="unexpected keys found"):
        session.swap(saved, into="pirate")
    with pytest.raises(UnknownAdapterError, match="Did you mean 'orders'"):
        session.swap(saved, into="order")
    with pytest.raises(AdapterError, match="tokenizer"):
        session.swap(saved, into="orders", check_prompt="Hi")
    assert same_state(everything(model), before)
    session.merge()
    with pytest.raises((HotSwapError, MergeError), match="unmerge"):
        session.swap(saved, into="orders")


def test_a_cell_run_again_after_a_swap_reconfigures(session: Session, model: Any, saved: Path) -> None:
    fields = {"r": 2, "target_modules": ["q_proj", "up_proj"], "lora_alpha": 16}
    assert session.add(model, fields, name="orders").unchanged
    session.swap(saved, into="orders")
    assert session.add(model, fields, name="orders").reconfigured


@pytest.mark.parametrize("tokens", [0, -1, "8", None])
def test_an_impossible_length_is_told_before_anything_happens(
    session: Session, model: Any, tmp_path: Path, tokens: Any
) -> None:
    session.save(tmp_path, adapter="orders")
    before = everything(model)
    settings: dict[str, Any] = {"tokenizer": CharTokenizer(), "max_new_tokens": tokens}
    for ask in (
        lambda: session.swap(tmp_path, into="orders", check_prompt="Hi", **settings),
        lambda: session.compare("Hi", **settings),
        lambda: session.try_combination({"orders": 1.0}, "Hi", **settings),
    ):
        with pytest.raises(AdapterError, match=f"max_new_tokens must be at least 1, not {tokens!r}"):
            ask()
    assert same_state(everything(model), before)
