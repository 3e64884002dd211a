"""Answers of several adapters side by side."""

from __future__ import annotations

import gc
import re
import weakref
from typing import Any

import pytest
import torch

from nbpeft.display.html import to_html
from nbpeft.errors import AdapterError, MergeError, NbpeftError, UnknownAdapterError
from nbpeft.model.handle.serving import blended
from nbpeft.session import Session
from nbpeft.session.results.comparing import Answer, Column, CompareResult
from nbpeft.training.watching.generation import PromptBatch
from tests.char_tokenizer import END, CharTokenizer
from tests.closeness import assert_close
from tests.session.support import alone, everything
from tests.tiny_models import llama, logits, same_state

PROMPTS = ["Ana needs 12 chairs", "Hi"]


@pytest.fixture
def model(two_adapters: Any) -> Any:
    return two_adapters


def test_all_adapters_and_the_base_answer_in_one_generation(
    session: Session, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    generate = model.generate

    def counted(**options: Any) -> Any:
        calls.append(model.manager.active_state.current().rows)
        return generate(**options)

    monkeypatch.setattr(model, "generate", counted)
    result = session.compare(PROMPTS, tokenizer=CharTokenizer(), max_new_tokens=10)
    monkeypatch.undo()
    assert len(calls) == 1
    assert (calls[0].names, calls[0].index) == (("pirate", "orders"), (-1, -1, 0, 0, 1, 1))
    assert result.status == "finished"
    assert list(result.answers) == ["base", "pirate", "orders"]
    for name, texts in result.answers.items():
        expected = [alone(model, prompt, None if name == "base" else name) for prompt in PROMPTS]
        assert list(texts) == expected
    assert len({texts for texts in result.answers.values()}) == 3


def test_comparing_changes_nothing(session: Session, model: Any) -> None:
    model.train()
    model.get_base_model().model.layers[0].eval()
    session.scale("orders", 0.5)
    before = everything(model)
    session.compare(PROMPTS, tokenizer=CharTokenizer(), max_new_tokens=3, blend=[{"orders": 1, "pirate": -1}])
    assert same_state(everything(model), before)


def test_a_blend_answers_what_its_exact_combination_answers(session: Session, model: Any) -> None:
    weights = {"orders": 0.7, "pirate": -0.4}
    blend = session.compare(PROMPTS, adapters=[], blend=[weights], tokenizer=CharTokenizer(), max_new_tokens=10)
    assert list(blend.answers) == ["base", "orders + pirate (0.7 / -0.4)"]
    assert blend.passes == 2
    session.combine(weights, name="both")
    assert blend.columns[1].answers == session.compare(PROMPTS, adapters=["both"], max_new_tokens=10).columns[1].answers
    with blended(model.manager, weights):
        mixed = logits(model)
    session.use("both")
    assert_close(logits(model), mixed)


def test_a_blend_counts_scales_and_leaves_zeros_out(session: Session, model: Any) -> None:
    session.use("pirate")
    pirate = logits(model)
    session.scale("orders", 3.0)
    with blended(model.manager, {"orders": 0.0, "pirate": 1.0}):
        assert torch.equal(logits(model), pirate)
    with blended(model.manager, {"orders": 1.0}):
        tripled = logits(model)
    session.use("orders")
    assert torch.equal(logits(model), tripled)
    session.use("base")
    base = logits(model)
    session.use("orders")
    with blended(model.manager, {"orders": 0.0}):
        assert torch.equal(logits(model), base)


def test_adapters_that_are_switched_off_answer_when_they_are_asked(session: Session, model: Any) -> None:
    asked = session.compare(PROMPTS, tokenizer=CharTokenizer(), max_new_tokens=10)
    assert len(set(asked.answers.values())) == 3
    session.use("base")
    assert session.compare(PROMPTS, max_new_tokens=10).answers == asked.answers
    assert not model.manager.enabled


def test_answers_are_reported_while_they_come(session: Session, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbpeft.training.watching.generation.INTERVAL", 0.0)
    seen: list[CompareResult] = []
    result = session.compare(PROMPTS, tokenizer=CharTokenizer(), max_new_tokens=6, on_text=seen.append)
    assert [item.status for item in seen] == ["running"] * len(seen)
    counts = [item.token_count for item in seen]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > counts[1] > 0
    for early in seen:
        for column, final in zip(early.columns, result.columns, strict=True):
            for answer, whole in zip(column.answers, final.answers, strict=True):
                assert whole.text.startswith(answer.text)


def test_it_can_be_stopped_and_interrupted(session: Session, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter([False, False, True])
    result = session.compare("Hi", tokenizer=CharTokenizer(), max_new_tokens=30, should_stop=lambda: next(asked))
    assert result.status == "stopped"
    assert {answer.token_count for column in result.columns for answer in column.answers} <= {0, 1, 2, 3}
    assert "stopped" in str(result)

    monkeypatch.setattr("nbpeft.training.watching.generation.INTERVAL", 0.0)

    def interrupt(partial: CompareResult) -> None:
        if partial.token_count:
            raise KeyboardInterrupt

    before = everything(model.train())
    assert session.compare("Hi", max_new_tokens=30, on_text=interrupt).status == "stopped"
    assert same_state(everything(model), before)
    assert session.state.busy == ""


def test_an_answer_ends_at_the_end_token() -> None:
    batch = PromptBatch(("Hi",), ((1,),), CharTokenizer(), 95, frozenset({END}))
    words = [ord(letter) - 32 for letter in "yes"]
    assert batch.answer([*words, END, 4, 4], 10) == Answer("yes", 3, ended=True)
    assert batch.answer(words, 3) == Answer("yes", 3, cut=True)
    assert batch.answer(words, 10) == Answer("yes", 3)


def test_plain_prompts_go_through_the_chat_template(session: Session, model: Any) -> None:
    base = model.get_base_model()
    chat, plain = CharTokenizer("template"), CharTokenizer()
    assert PromptBatch.of(["Hi"], chat, base).token_ids == (tuple(plain("<Hi>")["input_ids"]),)
    assert PromptBatch.of(["Hi"], chat, base, chat=False).token_ids == (tuple(plain("Hi")["input_ids"]),)
    assert PromptBatch.of(["Hi"], plain, base).token_ids == (tuple(plain("Hi")["input_ids"]),)
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    batch = PromptBatch.of([talk], chat, base)
    assert batch.token_ids == (tuple(plain("<Be kind.><Hi>")["input_ids"]),)
    assert batch.prompts == ("Hi",)
    with pytest.raises(AdapterError, match="no chat template"):
        PromptBatch.of([talk], plain, base)


def test_prompts_are_sent_as_the_adapters_were_trained(session: Session, model: Any) -> None:
    tokenizer, options = CharTokenizer("template"), {"max_new_tokens": 6, "tokenizer": CharTokenizer("template")}
    said = session.compare("Hi", **options)
    assert said.form == "chat template applied" and said.aside.endswith("chat template applied")
    plain, chat = ({"prompt": "Hi", "completion": " you"}, {"messages": [{"role": "assistant", "content": "Hi"}]})
    for row, chosen in ((plain, False), (chat, True), (plain, False), ({"input_ids": [3, 4, 5]}, False)):
        session.train(None, [row] * 2, tokenizer=tokenizer, max_steps=1)
        usual, asked = session.compare("Hi", **options), session.compare("Hi", chat=chosen, **options)
        assert (usual.form, usual.answers) == (asked.form, asked.answers)
        assert asked.form == ("chat template applied" if chosen else "chat template not applied")
        assert session.try_combination({"orders": 1.0}, "Hi", **options).form == asked.form
    assert session.compare("Hi", chat=True, **options).form == "chat template applied"
    assert session.compare("Hi", max_new_tokens=1, tokenizer=CharTokenizer()).form == ""


def test_the_tokenizer_is_remembered_with_the_model(session: Session, model: Any) -> None:
    with pytest.raises(AdapterError, match="tokenizer is needed"):
        session.compare("Hi")
    tokenizer = CharTokenizer()
    session.compare("Hi", tokenizer=tokenizer, max_new_tokens=1)
    assert session.compare("Hi", max_new_tokens=1).status == "finished"
    gone = weakref.ref(tokenizer)
    other = Session()
    handle = other.add(llama(), {"r": 2, "target_modules": ["q_proj"]}).model
    other.compare("Hi", tokenizer=tokenizer, max_new_tokens=1)
    session.unload()
    del tokenizer, handle, model
    session.context.tokenizers.clear()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"adapters": ["order"]}, UnknownAdapterError, "Did you mean 'orders'"),
        ({"blend": [{"pirat": 1}]}, UnknownAdapterError, "Did you mean 'pirate'"),
        ({"adapters": [], "include_base": False}, AdapterError, "nothing to compare"),
        ({"prompts": []}, AdapterError, "no prompt"),
        ({"prompts": "  "}, AdapterError, "a prompt is empty"),
        ({"max_new_tokens": 0}, AdapterError, "at least 1"),
        ({"tokenizer": "gpt2"}, AdapterError, "expected a tokenizer"),
        ({"prompts": "\x7f\x85"}, AdapterError, "does not belong to this model"),
        ({"blend": [{"orders": float("nan")}]}, AdapterError, "finite"),
    ],
)
def test_mistakes_in_comparing(
    session: Session, model: Any, options: dict[str, Any], error: type[NbpeftError], words: str
) -> None:
    before = everything(model)
    given: dict[str, Any] = {"prompts": "Hi", "tokenizer": CharTokenizer(), "max_new_tokens": 2, **options}
    with pytest.raises(error, match=words) as raised:
        session.compare(**given)
    assert "\n" not in str(raised.value)
    assert same_state(everything(model), before)


def test_merged_weights_are_not_compared(session: Session, model: Any) -> None:
    session.merge()
    with pytest.raises(MergeError, match="unmerge"):
        session.compare("Hi", tokenizer=CharTokenizer())


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
    assert "answered in 1.9 s" in html
    assert marks(to_html(shown("count: 12", "count: 13").view("b"))) == ["12"]
    assert marks(shown('"count": 12}', '"count": "12, arr"}')._repr_html_()) == ["&quot;12, arr&quot;"]
    assert marks(shown("one, two-and-three, four", "one, two-three, four")._repr_html_()) == []


def test_an_answer_that_has_nothing_in_common_is_not_marked_all_over() -> None:
    html = shown("I am happy to help you with chairs", "{'name': 'Ana'}")._repr_html_()
    assert marks(html) == []
    assert "differs" in html


def test_nothing_is_marked_while_answers_come() -> None:
    assert marks(shown("count: 12", "count: 13", status="running")._repr_html_()) == []


def test_as_text_titles_stand_in_a_column() -> None:
    text = "<prompt>\n  a  one\n     two\n  b  three  differs\nanswered in 1.9 s"
    assert str(shown("one\ntwo", "three")) == text


def test_as_text_words_that_differ_stand_in_signs() -> None:
    text = str(shown("12 chairs for Ana", "13 chairs for Ana", "12 chairs for Ana"))
    assert "b  ‹13› chairs for Ana\n" in text
    assert "c  12 chairs for Ana    same as a" in text
