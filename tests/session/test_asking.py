"""One answer, and conversations."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from nbpeft.errors import AdapterError, ConfigError, MergeError, UnknownAdapterError
from nbpeft.session import Session
from nbpeft.session.results.asking import AskResult
from nbpeft.session.results.comparing import Answer
from tests.char_tokenizer import CharTokenizer
from tests.session.support import alone, everything
from tests.tiny_models import same_state

PROMPT = "Ana needs 12 chairs"


@pytest.fixture
def model(two_adapters: Any) -> Any:
    return two_adapters


def ask(session: Session, prompt: str = PROMPT, **options: Any) -> AskResult:
    return session.ask(prompt, **{"tokenizer": CharTokenizer(), "max_new_tokens": 10, **options})


def test_the_active_adapter_answers_or_the_one_that_is_named(session: Session, model: Any) -> None:
    for name in ("orders", "pirate"):
        assert ask(session, adapter=name).text == alone(model, PROMPT, name)
    assert ask(session, adapter="base").text == alone(model, PROMPT, None)
    active = ask(session)
    assert (active.adapter, active.text) == ("orders", alone(model, PROMPT, "orders"))
    both = ask(session, adapter=["orders", "pirate"])
    session.use(["orders", "pirate"])
    assert both == dataclasses.replace(ask(session), seconds=both.seconds)
    assert both.adapter == "orders + pirate"
    session.use("base")
    assert ask(session).adapter == "base"
    assert ask(session, adapter="orders").text == alone(model, PROMPT, "orders")
    assert not model.manager.enabled


def test_asking_changes_nothing(session: Session, model: Any) -> None:
    model.train()
    model.get_base_model().model.layers[0].eval()
    before, numbers = everything(model), torch.get_rng_state()
    ask(session, adapter="orders", temperature=0.9, seed=1)
    ask(session, adapter="base", temperature=0.9)
    assert same_state(everything(model), before)
    assert torch.equal(torch.get_rng_state(), numbers)


def test_a_seed_repeats_an_answer(session: Session, model: Any) -> None:
    texts = [ask(session, temperature=2.0, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    drawn = ask(session, temperature=2.0)
    assert ask(session, temperature=2.0, seed=int(drawn.settings["seed"])).text == drawn.text
    assert dict(ask(session).settings) == {}
    compared = [session.compare(PROMPT, max_new_tokens=10, temperature=2.0, seed=seed).answers for seed in (1, 1, 2)]
    assert compared[0] == compared[1] != compared[2]


def test_a_conversation_goes_on(session: Session, model: Any) -> None:
    chatting = CharTokenizer("yes")
    first = ask(session, "Hi", tokenizer=chatting)
    second = ask(session, "Why", tokenizer=chatting, follow_up=True)
    assert second.turns == (("Hi", first.text),)
    whole = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Why"},
    ]
    assert second.text == session.ask(whole, max_new_tokens=10).text
    assert ask(session, "Hi", tokenizer=chatting).text == first.text, "without follow_up it begins anew"
    assert ask(session, "And", tokenizer=chatting, follow_up=True).turns == (("Hi", first.text),)
    with pytest.raises(AdapterError, match="no conversation with base to continue yet"):
        ask(session, "Hi", tokenizer=chatting, adapter="base", follow_up=True)
    with pytest.raises(AdapterError, match="needs the chat template, which is not applied here: start a new one"):
        ask(session, "Hi", follow_up=True)


def test_each_column_of_a_comparison_goes_on_with_its_own_conversation(session: Session, model: Any) -> None:
    chatting = CharTokenizer("yes")
    blends = [{"orders": 0.5, "pirate": 0.5}]
    first = session.compare("Hi", tokenizer=chatting, max_new_tokens=10, blend=blends)
    assert first.chat and len(set(first.answers.values())) > 2
    second = session.compare("Why", max_new_tokens=10, blend=blends, after=first)
    for column, before in zip(second.columns, first.columns, strict=True):
        assert column.turns == (("Hi", before.answers[0].text),)
    for name in ("base", "orders", "pirate"):
        ask(session, "Hi", tokenizer=chatting, adapter=name)
        assert second.answers[name] == (ask(session, "Why", tokenizer=chatting, adapter=name, follow_up=True).text,)
    third = session.compare("So", adapters=["orders"], max_new_tokens=10, after=second)
    assert [len(column.turns) for column in third.columns] == [2, 2]
    assert third._repr_html_().count("Why") == 1
    with pytest.raises(AdapterError, match="one prompt at a time"):
        session.compare(["a", "b"], after=first)
    with pytest.raises(AdapterError, match="needs the chat template"):
        session.compare("a", chat=False, after=first)


def test_the_answer_is_reported_while_it_comes(session: Session, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbpeft.training.watching.generation.INTERVAL", 0.0)
    seen: list[AskResult] = []
    result = ask(session, max_new_tokens=6, on_text=seen.append)
    assert {item.status for item in seen} == {"running"}
    assert [item.token_count for item in seen] == sorted(item.token_count for item in seen)
    assert result.text.startswith(seen[-1].text) and result.status == "finished"
    stopped = ask(session, max_new_tokens=6, should_stop=lambda: True)
    assert (stopped.status, stopped.token_count) == ("stopped", 1)


def test_mistakes_are_one_line(session: Session, model: Any) -> None:
    with pytest.raises(UnknownAdapterError, match="Did you mean 'orders'"):
        ask(session, adapter="order")
    with pytest.raises(AdapterError, match="max_new_tokens must be at least 1"):
        ask(session, max_new_tokens=0)
    with pytest.raises(ConfigError, match="temperature"):
        ask(session, temperature=-1)
    with pytest.raises(AdapterError, match="prompt is empty"):
        ask(session, " ")
    session.merge(model=model)
    with pytest.raises(MergeError, match="unmerge before"):
        ask(session, adapter="orders")
    assert ask(session).adapter == "orders"


def test_how_an_answer_is_shown() -> None:
    answer = Answer("Ahoy <b>", 12, cut=True)
    result = AskResult("model", "pirate", "Hi <i>", answer, 2.0, {"temperature": 0.7, "seed": 5}, (("a", "b"),))
    assert result.tokens_per_second == 6.0
    assert str(result) == "> a\n  b\n> Hi <i>\n  Ahoy <b> …\npirate: 12 tokens, 6 tokens/s, temperature 0.7, seed 5"
    html = result._repr_html_()
    assert "Hi &lt;i&gt;" in html and "Ahoy &lt;b&gt;" in html and "pirate answers" in html
    assert "greedy" in dataclasses.replace(result, settings={}).aside
    assert "(nothing)" in dataclasses.replace(result, answer=Answer())._repr_html_()
    assert "waiting for the training step" in dataclasses.replace(result, status="waiting")._repr_html_()
