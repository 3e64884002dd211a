"""Combining, comparing and swapping through a session."""

from __future__ import annotations

import gc
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

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
from nbpeft.model.blending import blended
from nbpeft.session import Session
from nbpeft.session.answering import Batch
from nbpeft.session.compared import Answer, Column, CompareResult
from tests.session.letters import END, Letters
from tests.training.support import tiny_base

INPUT = {"input_ids": torch.arange(12).reshape(2, 6)}
PROMPTS = ["Ana needs 12 chairs", "Hi"]


def randomize(model: Any, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.manager.parameters(name):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**INPUT).logits
    return found


def everything(model: Any) -> dict[str, Any]:
    """Weights, what acts and how, and what trains, to compare bit by bit."""
    manager = model.manager
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "trains": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "modes": [module.training for module in model.modules()],
        "acts": (manager.names, manager.active, manager.enabled, [manager.scale(name) for name in manager.names]),
        "configs": {name: config.to_dict() for name, config in manager.configs.items()},
    }


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    weights, others = first.pop("weights"), second.pop("weights")
    return (
        first == second
        and weights.keys() == others.keys()
        and all(torch.equal(weight, others[name]) for name, weight in weights.items())
    )


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def model(session: Session) -> Any:
    """Adapters ``orders`` (rank 4, active) and ``pirate`` (rank 2, other targets)."""
    made = session.add(tiny_base(), {"r": 4, "target_modules": ["q_proj", "v_proj"]}, name="pirate", variable="model")
    handle = made.model
    session.add(handle, {"r": 2, "target_modules": ["q_proj", "up_proj"], "lora_alpha": 16}, name="orders")
    randomize(handle, "pirate", 1)
    randomize(handle, "orders", 2)
    return handle.eval()


def alone(model: Any, prompt: str, name: str | None, tokens: int = 10) -> str:
    """What one adapter answers without any batch."""
    ids = torch.tensor([Letters()(prompt)["input_ids"]])
    with model.disable_adapter() if name is None else model.use(name):
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
    return str(
        Batch.of([prompt], Letters(), model.get_base_model()).answer(made[0, ids.shape[1] :].tolist(), tokens).text
    )


# Compare


def test_all_adapters_and_the_base_answer_in_one_generation(
    session: Session, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    generate = model.generate

    def counted(**options: Any) -> Any:
        calls.append(options)
        return generate(**options)

    monkeypatch.setattr(model, "generate", counted)
    result = session.compare(PROMPTS, tokenizer=Letters(), max_new_tokens=10)
    monkeypatch.undo()
    assert len(calls) == 1
    assert calls[0]["adapter_names"] == ["__base__", "__base__", "pirate", "pirate", "orders", "orders"]
    assert result.status == "finished"
    assert list(result.answers) == ["base", "pirate", "orders"]
    for name, texts in result.answers.items():
        expected = [alone(model, prompt, None if name == "base" else name) for prompt in PROMPTS]
        assert list(texts) == expected
    assert len({texts for texts in result.answers.values()}) == 3


def test_comparing_changes_nothing(session: Session, model: Any) -> None:
    model.train()
    model.get_base_model().model.layers[0].eval()
    session.set_scale("orders", 0.5)
    before = everything(model)
    session.compare(PROMPTS, tokenizer=Letters(), max_new_tokens=3, blends=[{"orders": 1, "pirate": -1}])
    assert same(everything(model), before)


def test_a_blend_answers_what_its_exact_combination_answers(session: Session, model: Any) -> None:
    weights = {"orders": 0.7, "pirate": -0.4}
    blend = session.compare(PROMPTS, adapters=[], blends=[weights], tokenizer=Letters(), max_new_tokens=10)
    assert list(blend.answers) == ["base", "orders + pirate (0.7 / -0.4)"]
    assert blend.passes == 2
    session.combine(weights, as_name="both")
    assert blend.columns[1].answers == session.compare(PROMPTS, adapters=["both"], max_new_tokens=10).columns[1].answers
    with blended(model.manager, weights):
        mixed = logits(model)
    session.use("both")
    assert torch.allclose(logits(model), mixed, atol=1e-5)


def test_a_blend_counts_scales_and_leaves_zeros_out(session: Session, model: Any) -> None:
    session.use("pirate")
    pirate = logits(model)
    session.set_scale("orders", 3.0)
    with blended(model.manager, {"orders": 0.0, "pirate": 1.0}):
        assert torch.equal(logits(model), pirate)
    with blended(model.manager, {"orders": 1.0}):
        tripled = logits(model)
    session.use("orders")
    assert torch.equal(logits(model), tripled)
    session.off()
    base = logits(model)
    session.on()
    with blended(model.manager, {"orders": 0.0}):
        assert torch.equal(logits(model), base)


def test_answers_are_reported_while_they_come(session: Session, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbpeft.session.answering.INTERVAL", 0.0)
    seen: list[CompareResult] = []
    result = session.compare(PROMPTS, tokenizer=Letters(), max_new_tokens=6, on_text=seen.append)
    assert [item.status for item in seen] == ["running"] * len(seen)
    counts = [item.token_count for item in seen]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > counts[1] > 0
    for early in seen:
        for column, final in zip(early.columns, result.columns, strict=True):
            for answer, whole in zip(column.answers, final.answers, strict=True):
                assert whole.text.startswith(answer.text)


def test_it_can_be_stopped_and_interrupted(session: Session, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter([False, False, True])
    result = session.compare("Hi", tokenizer=Letters(), max_new_tokens=30, should_stop=lambda: next(asked))
    assert result.status == "stopped"
    assert {answer.token_count for column in result.columns for answer in column.answers} <= {0, 1, 2, 3}
    assert "stopped" in str(result)

    monkeypatch.setattr("nbpeft.session.answering.INTERVAL", 0.0)

    def interrupt(partial: CompareResult) -> None:
        if partial.token_count:
            raise KeyboardInterrupt

    before = everything(model.train())
    assert session.compare("Hi", max_new_tokens=30, on_text=interrupt).status == "stopped"
    assert same(everything(model), before)
    assert session.state.busy == ""


def test_an_answer_ends_at_the_end_token() -> None:
    batch = Batch(("Hi",), ((1,),), Letters(), 95, frozenset({END}))
    words = [ord(letter) - 32 for letter in "yes"]
    assert batch.answer([*words, END, 4, 4], 10) == Answer("yes", 3, ended=True)
    assert batch.answer(words, 3) == Answer("yes", 3, cut=True)
    assert batch.answer(words, 10) == Answer("yes", 3)


def test_plain_prompts_go_through_the_chat_template(session: Session, model: Any) -> None:
    base = model.get_base_model()
    chat, plain = Letters("template"), Letters()
    assert Batch.of(["Hi"], chat, base).token_ids == (tuple(plain("<Hi>")["input_ids"]),)
    assert Batch.of(["Hi"], chat, base, chat=False).token_ids == (tuple(plain("Hi")["input_ids"]),)
    assert Batch.of(["Hi"], plain, base).token_ids == (tuple(plain("Hi")["input_ids"]),)
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    batch = Batch.of([talk], chat, base)
    assert batch.token_ids == (tuple(plain("<Be kind.><Hi>")["input_ids"]),)
    assert batch.prompts == ("Hi",)
    with pytest.raises(AdapterError, match="no chat template"):
        Batch.of([talk], plain, base)


def test_the_tokenizer_is_remembered_with_the_model(session: Session, model: Any) -> None:
    with pytest.raises(AdapterError, match="tokenizer is needed"):
        session.compare("Hi")
    tokenizer = Letters()
    session.compare("Hi", tokenizer=tokenizer, max_new_tokens=1)
    assert session.compare("Hi", max_new_tokens=1).status == "finished"
    gone = weakref.ref(tokenizer)
    other = Session()
    handle = other.add(tiny_base(), {"r": 2, "target_modules": ["q_proj"]}).model
    other.compare("Hi", tokenizer=tokenizer, max_new_tokens=1)
    session.unload()
    del tokenizer, handle, model
    session._tokenizers._of.clear()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"adapters": ["order"]}, UnknownAdapterError, "Did you mean 'orders'"),
        ({"blends": [{"pirat": 1}]}, UnknownAdapterError, "Did you mean 'pirate'"),
        ({"adapters": [], "include_base": False}, AdapterError, "nothing to compare"),
        ({"prompts": []}, AdapterError, "no prompt"),
        ({"prompts": "  "}, AdapterError, "a prompt is empty"),
        ({"max_new_tokens": 0}, AdapterError, "at least 1"),
        ({"tokenizer": "gpt2"}, AdapterError, "expected a tokenizer"),
        ({"prompts": "\x7f\x85"}, AdapterError, "does not belong to this model"),
        ({"blends": [{"orders": float("nan")}]}, AdapterError, "finite"),
    ],
)
def test_mistakes_in_comparing(
    session: Session, model: Any, options: dict[str, Any], error: type[NbpeftError], words: str
) -> None:
    before = everything(model)
    given: dict[str, Any] = {"prompts": "Hi", "tokenizer": Letters(), "max_new_tokens": 2, **options}
    with pytest.raises(error, match=words) as raised:
        session.compare(**given)
    assert "\n" not in str(raised.value)
    assert same(everything(model), before)


def test_merged_weights_are_not_compared(session: Session, model: Any) -> None:
    session.merge()
    with pytest.raises(AdapterError, match="unmerge"):
        session.compare("Hi", tokenizer=Letters())


# What comparing shows


def shown(*texts: str, **options: Any) -> CompareResult:
    columns = tuple(Column(title, (), (Answer(text),)) for title, text in zip("abcdef", texts, strict=False))
    return CompareResult("model", ("<prompt>",), columns, 1.94, **options)


def marks(html: str) -> list[str]:
    return re.findall(r'<span style="background:[^"]*">(.*?)</span>', html)


def test_words_that_differ_are_marked() -> None:
    html = shown("count: 12 <chairs>", "count: 13 <chairs>", "count: 12 <chairs>")._repr_html_()
    assert marks(html) == ["13"]
    assert "same as a" in html
    assert "&lt;prompt&gt;" in html and "&lt;chairs&gt;" in html and "<chairs>" not in html
    assert "one batched pass · 1.9 s" in html
    assert marks(shown("count: 12", "count: 13").html(against="b")) == ["12"]


def test_an_answer_that_has_nothing_in_common_is_not_marked_all_over() -> None:
    html = shown("I am happy to help you with chairs", "{'name': 'Ana'}")._repr_html_()
    assert marks(html) == []
    assert "differs throughout" in html


def test_nothing_is_marked_while_answers_come() -> None:
    assert marks(shown("count: 12", "count: 13", status="running")._repr_html_()) == []


def test_as_text_titles_stand_in_a_column() -> None:
    assert str(shown("one\ntwo", "three")) == "<prompt>\n  a  one\n     two\n  b  three\none batched pass · 1.9 s"


# Combine


def test_exact_is_the_weighted_sum_and_loses_nothing(session: Session, model: Any) -> None:
    result = session.combine({"orders": 0.7, "pirate": 0.3}, as_name="both")
    assert (result.kind, result.rank, result.remade) == ("exact", 6, False)
    assert result.relative_error < 1e-4 and result.energy_kept > 0.9999
    assert "nothing lost" in str(result) and "0.7 · orders + 0.3 · pirate" in str(result)
    assert session.state.models[0].active == ("orders",)
    assert not result.adapter.trainable
    with blended(model.manager, {"orders": 0.7, "pirate": 0.3}):
        mixed = logits(model)
    session.use("both")
    assert torch.allclose(logits(model), mixed, atol=1e-5)


def test_what_is_lost_is_told_by_layer_and_in_total(session: Session, model: Any) -> None:
    result = session.combine({"orders": 1.0, "pirate": -0.5}, as_name="cut", rank=2)
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
        assert layer.relative_error == pytest.approx(float(error), abs=1e-4)
    html = result._repr_html_()
    assert "layer by layer" in html and result.worst.path in html
    assert f"worst: {result.worst.path}" in str(result)


def test_ties_and_dare_go_by_their_names(session: Session, model: Any) -> None:
    ties = session.combine({"orders": 1, "pirate": 1}, as_name="t", type="ties_svd", density=0.5, rank=3)
    assert ties.kind == "ties_svd" and ties.relative_error > 0.01
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = session.combine({"orders": 1, "pirate": 1}, as_name="d", type="dare_linear_svd", density=0.5, seed=7)
    assert torch.equal(torch.rand(3), expected)
    second = session.combine({"orders": 1, "pirate": 1}, as_name="e", type="dare_linear_svd", density=0.5, seed=7)
    assert [layer.relative_error for layer in first.layers] == [layer.relative_error for layer in second.layers]


def test_linear_says_that_it_is_not_the_sum(session: Session, model: Any) -> None:
    session.copy("orders", "twin")
    randomize(model, "twin", 9)
    result = session.combine({"orders": 0.5, "twin": 0.5}, as_name="mean", type="linear")
    assert any("exact" in note for note in result.notes)


def test_again_remakes_the_combination_but_nothing_else(session: Session, model: Any) -> None:
    session.combine({"orders": 0.7, "pirate": 0.3}, as_name="both")
    session.use(["both", "orders"])
    again = session.combine({"orders": 0.2, "pirate": 0.3}, as_name="both")
    assert again.remade and "remade" in str(again)
    assert model.manager.names == ("pirate", "orders", "both")
    assert model.manager.active == ("both", "orders")
    session.unfreeze("both")
    with pytest.raises(AdapterExistsError, match="--replace"):
        session.combine({"orders": 0.7}, as_name="both")
    assert session.combine({"orders": 0.7}, as_name="both", replace=True).remade
    with pytest.raises(AdapterExistsError, match="one of the adapters"):
        session.combine({"orders": 0.7}, as_name="orders", replace=True)
    with pytest.raises(AdapterExistsError, match="already"):
        session.combine({"orders": 0.7}, as_name="pirate")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"type": "exakt"}, ConfigError, "Did you mean 'exact'"),
        ({"type": "ties"}, ConfigError, "needs density"),
        ({"type": "linear"}, ConfigError, "needs equal ranks"),
        ({"type": "ties", "density": 0.5, "rank": 4}, ConfigError, "ties_svd takes one"),
        ({"density": 0.5}, ConfigError, "density means nothing for type 'exact'"),
        ({"rank": 0}, ConfigError, "positive"),
        ({"weights": {}}, AdapterError, "name at least one"),
        ({"weights": {"order": 1}}, UnknownAdapterError, "Did you mean 'orders'"),
        ({"weights": {"orders": float("inf")}}, AdapterError, "finite"),
        ({"as_name": "a.b"}, NbpeftError, "a.b"),
    ],
)
def test_a_combination_that_fails_leaves_all_as_it_was(
    session: Session, model: Any, options: dict[str, Any], error: type[NbpeftError], words: str
) -> None:
    before = everything(model)
    given: dict[str, Any] = {"weights": {"orders": 1, "pirate": 1}, "as_name": "new", **options}
    with pytest.raises(error, match=re.escape(words)) as raised:
        session.combine(given.pop("weights"), **given)
    assert "\n" not in str(raised.value)
    assert same(everything(model), before)


def test_a_combination_can_be_tried_without_a_trace(session: Session, model: Any) -> None:
    weights = {"orders": 1.0, "pirate": 0.5}
    before = everything(model)
    names: list[tuple[str, ...]] = []
    session.subscribe(lambda state: names.append(tuple(item.name for item in state.models[0].adapters)))
    options: dict[str, Any] = {"type": "dare_ties_svd", "density": 0.5, "seed": 3}
    tried = session.try_combination(weights, "Hi", tokenizer=Letters(), max_new_tokens=8, **options)
    assert same(everything(model), before)
    assert set(names) == {("pirate", "orders")}
    assert list(tried.answers) == ["base", "dare_ties_svd: orders + pirate (1 / 0.5)"]
    session.combine(weights, as_name="kept", **options)
    kept = session.compare("Hi", adapters=["kept"], max_new_tokens=8)
    assert kept.columns[1].answers == tried.columns[1].answers


def test_results_are_plain_data(session: Session, model: Any) -> None:
    import dataclasses

    combined = session.combine({"orders": 1}, as_name="c")
    compared = session.compare("Hi", tokenizer=Letters(), max_new_tokens=1)
    assert json.loads(json.dumps(dataclasses.asdict(combined)))["kind"] == "exact"
    assert json.loads(json.dumps(dataclasses.asdict(compared)))["prompts"] == ["Hi"]


# Swap


@pytest.fixture
def saved(session: Session, model: Any, tmp_path: Path) -> Path:
    """Another ``orders``, of larger rank, in a folder."""
    other = Session()
    handle = other.add(tiny_base(), {"r": 6, "target_modules": ["q_proj", "up_proj"], "lora_alpha": 3}).model
    randomize(handle, "default", 5)
    other.save(tmp_path / "new")
    return tmp_path / "new"


def test_a_swap_gives_what_loading_gives(session: Session, model: Any, saved: Path) -> None:
    session.load(saved, name="fresh")
    session.use("fresh")
    fresh = logits(model)
    session.use("pirate")
    pirate = logits(model)
    result = session.swap(saved, into="orders", check_prompt="Hi", tokenizer=Letters(), max_new_tokens=6)
    assert torch.equal(logits(model), pirate)
    assert session.state.models[0].active == ("pirate",)
    assert (result.adapter.rank, result.layers) == (6, 4)
    assert result.before != result.after
    assert result.after == alone(model, "Hi", "orders", 6)
    assert "before" in str(result) and "Hi" in result._repr_html_()
    session.use("orders")
    assert torch.allclose(logits(model), fresh, atol=1e-6)


def test_the_active_adapter_is_swapped_where_none_is_named(session: Session, model: Any, saved: Path) -> None:
    assert session.swap(saved).adapter.name == "orders"
    session.use(["orders", "pirate"])
    with pytest.raises(AdapterError, match="--into"):
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
    assert same(everything(model), before)


def test_an_adapter_whose_output_is_not_finite_is_refused(
    session: Session, model: Any, saved: Path, tmp_path: Path
) -> None:
    other = Session()
    handle = other.load(saved, model=tiny_base()).model
    with torch.no_grad():
        handle.manager.parameters("new")[1].fill_(float("nan"))
    other.save(tmp_path / "broken")
    before = everything(model)
    with pytest.raises(HotSwapError, match="not finite"):
        session.swap(tmp_path / "broken", into="orders", check_prompt="Hi", tokenizer=Letters())
    assert same(everything(model), before)


def test_mistakes_in_swapping(session: Session, model: Any, saved: Path) -> None:
    before = everything(model)
    with pytest.raises(CheckpointNotFoundError, match="did you mean"):
        session.swap(saved.parent, into="orders")
    with pytest.raises(HotSwapError, match="no place"):
        session.swap(saved, into="pirate")
    with pytest.raises(UnknownAdapterError, match="Did you mean 'orders'"):
        session.swap(saved, into="order")
    with pytest.raises(AdapterError, match="tokenizer"):
        session.swap(saved, into="orders", check_prompt="Hi")
    assert same(everything(model), before)
    session.merge()
    with pytest.raises((HotSwapError, MergeError), match="unmerge"):
        session.swap(saved, into="orders")


def test_a_cell_run_again_after_a_swap_reconfigures(session: Session, model: Any, saved: Path) -> None:
    fields = {"r": 2, "target_modules": ["q_proj", "up_proj"], "lora_alpha": 16}
    assert session.add(model, fields, name="orders").unchanged
    session.swap(saved, into="orders")
    assert session.add(model, fields, name="orders").reconfigured
