"""Adapters are asked as they were trained: with the system prompt of their rows, also after they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbpeft.checkpoint import PromptFormat, prompt_format, set_prompt_format
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.model.swapping.pool import AdapterPool
from nbpeft.session import Session
from nbpeft.session.results.comparing import CompareResult
from nbpeft.training.watching import generation
from tests.char_tokenizer import CharTokenizer
from tests.tiny_models import llama

CHAT = CharTokenizer("template")
FEW: dict[str, Any] = {"max_new_tokens": 3, "tokenizer": CHAT}


def chat(system: str = "Be brief", question: str = "Hi") -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


def train(session: Session, rows: list[Any], **options: Any) -> Any:
    return session.train(None, rows, tokenizer=CHAT, max_steps=1, keep=False, **options)


@pytest.fixture
def model(session: Session, two_adapters: Any) -> Any:
    session.use("orders")
    return two_adapters


def systems(result: CompareResult) -> dict[str, str]:
    return {column.title: column.system for column in result.columns}


def test_the_system_prompt_of_the_rows_is_the_default_and_shown(session: Session, model: Any) -> None:
    train(session, [chat()] * 2)
    answer = session.ask("Hi", **FEW)
    assert answer.system == "Be brief" and answer.form == "chat template applied"
    assert "system prompt: Be brief" in str(answer) and "system prompt: Be brief" in answer._repr_html_()
    assert answer.text == session.ask("Hi", system="Be brief", **FEW).text
    without = session.ask("Hi", system="", **FEW)
    assert without.system == "" and "system prompt" not in str(without)
    assert session.ask("Hi", system="Sing", **FEW).system == "Sing"
    both = session.compare("Hi", blend=[{"orders": 0.5}], **FEW)
    assert set(systems(both).values()) == {"Be brief"} and str(both).count("system prompt: Be brief") == 1
    assert session.try_combination({"orders": 1.0}, "Hi", **FEW).columns[-1].system == "Be brief"


def test_rows_without_the_template_after_rows_with_it_are_told_of(session: Session, model: Any) -> None:
    plain = [{"prompt": "Hi", "completion": " yes"}] * 2
    first, same, other, back = (
        train(session, rows).state.warnings for rows in ([chat()] * 2, [chat()] * 2, plain, [chat()] * 2)
    )
    told = [[words for words in warnings if "learned with" in words] for warnings in (first, same, other, back)]
    assert told == [
        [],
        [],
        ["'orders' learned with the chat template, which is not applied here"],
        ["'orders' learned without the chat template, which is applied here"],
    ]


def test_each_adapter_is_compared_with_its_own_system_prompt(session: Session, model: Any) -> None:
    train(session, [chat()] * 2)
    train(session, [chat("Ahoy")] * 2, adapter="pirate")
    result = session.compare("Hi", **FEW)
    assert systems(result) == {"base": "", "pirate": "Ahoy", "orders": "Be brief"}
    assert "system prompt of pirate: Ahoy" in str(result) and "no system prompt of base" in str(result)
    for name in ("pirate", "orders"):
        assert result.answers[name] == (session.ask("Hi", adapter=name, **FEW).text,)
    assert set(systems(session.compare("Hi", system="Sing", **FEW)).values()) == {"Sing"}


def test_the_form_of_the_rows_is_saved_loaded_and_carried_along(session: Session, model: Any, tmp_path: Path) -> None:
    train(session, [chat("Be  brief |x|")] * 2)
    session.save(tmp_path / "a", adapter="orders")
    assert "Trained with the chat template and the system prompt" in (tmp_path / "a" / "README.md").read_text()
    other = Session()
    loaded = other.load(tmp_path / "a", name="again", model=llama(), variable="model").model
    assert other.ask("Hi", **FEW).system == "Be  brief |x|"
    assert other.state.models[0].adapters[0].system == "Be  brief |x|"
    other.rename("again", "renamed")
    other.copy("renamed", "twin")
    other.combine({"renamed": 1.0, "twin": 1.0}, name="sum")
    other.delete("renamed")
    other.undo()
    for name in ("renamed", "twin", "sum"):
        assert other.ask("Hi", adapter=name, **FEW).system == "Be  brief |x|"
    other.swap(tmp_path / "a", into="sum")
    assert prompt_format(loaded.manager.configs["sum"]) == PromptFormat(True, "Be  brief |x|")


def test_the_record_of_a_run_has_the_system_prompt(session: Session, model: Any, tmp_path: Path) -> None:
    session.context.chosen_runs_folder = str(tmp_path)
    session.train(None, [chat()] * 2, tokenizer=CHAT, max_steps=1)
    (run,) = session.runs().records
    assert run.settings["system prompt"] == "Be brief"
    other = Session()
    kept = other.load(f"{run.path}/checkpoint-1/orders", name="again", model=llama(), variable="model").model
    assert other.ask("Hi", model=kept, **FEW).system == "Be brief"


def test_plain_rows_are_asked_plainly_after_loading_too(session: Session, model: Any, tmp_path: Path) -> None:
    train(session, [{"prompt": "Hi", "completion": " you"}] * 2)
    session.save(tmp_path, adapter="orders")
    other = Session()
    kept = other.load(tmp_path, name="again", model=llama(), variable="model").model
    assert prompt_format(kept.manager.configs["again"]) == PromptFormat(chat=False)
    assert other.ask("Hi", **FEW).form == "chat template not applied"
    assert "without a chat template" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("rows", [[chat("a"), chat("b")], [chat("a"), chat("")]])
def test_rows_with_different_system_prompts_give_no_default(session: Session, model: Any, rows: list[Any]) -> None:
    result = train(session, rows)
    assert "the adapter has no default system prompt" in result.message
    assert session.ask("Hi", **FEW).system == ""
    assert any("no default system prompt" in note for note in session.data(rows, CHAT).notes)


def test_a_training_without_a_step_changes_nothing(session: Session, model: Any) -> None:
    train(session, [chat()] * 2)
    with pytest.raises(Exception, match="learning_rate"):
        train(session, [chat("b")] * 2, learning_rate="x")
    assert session.ask("Hi", **FEW).system == "Be brief"


def test_conversations_are_asked_and_continued(session: Session, model: Any) -> None:
    train(session, [chat()] * 2)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    first = session.ask(talk, **FEW)
    assert first.prompt == "c" and first.system == "Be brief"
    assert session.compare(talk, adapters=["orders"], **FEW).answers["orders"] == (first.text,)
    assert session.compare([talk, talk], adapters=["orders"], **FEW).answers["orders"] == (first.text,) * 2
    second = session.ask("d", follow_up=True, **FEW)
    whole = [*talk, {"role": "assistant", "content": first.text}, {"role": "user", "content": "d"}]
    assert second.text == session.ask(whole, **FEW).text
    own = [{"role": "system", "content": "Sing"}, *talk]
    assert session.ask(own, **FEW).system == "Sing"
    assert session.ask("d", follow_up=True, **FEW).system == "Sing"
    compared = session.compare(own, adapters=["orders"], **FEW)
    assert systems(session.compare("d", adapters=["orders"], after=compared, **FEW)) == {
        "base": "Sing",
        "orders": "Sing",
    }


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("Hi", {"system": "x", "chat": False}, "the chat template is not applied here"),
        ("Hi", {"system": 3}, "system must be a text, not 3"),
        (chat()["messages"], {}, r"messages\[:-1\]"),
        (chat()["messages"][:-1], {"system": "x"}, "already has another system prompt: Be brief"),
        (chat()["messages"][:-1], {"system": ""}, "already has another system prompt: Be brief"),
        (chat(), {}, "a prompt is a text, or a conversation"),
        ([{"content": "no role"}], {}, "a prompt is a text, or a conversation"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    session: Session, model: Any, prompt: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(AdapterError, match=words) as raised:
        session.ask(prompt, **FEW, **options)
    assert "\n" not in str(raised.value)


def test_a_template_that_refuses_a_system_prompt_is_one_line(session: Session, model: Any) -> None:
    class NoSystem(CharTokenizer):
        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            if messages[0]["role"] == "system":
                raise ValueError("System role not supported")
            return super().apply_chat_template(messages, **options)

    with pytest.raises(AdapterError, match="the chat template refuses the prompt: System role not supported"):
        session.ask("Hi", system="x", tokenizer=NoSystem("yes"))


def test_an_adapter_that_a_pool_has_not_loaded_is_asked_as_it_was_trained(
    session: Session, model: Any, tmp_path: Path
) -> None:
    train(session, [chat()] * 2)
    session.save(tmp_path / "a", adapter="orders")
    train(session, [chat("Ahoy")] * 2, adapter="pirate")
    session.save(tmp_path / "b", adapter="pirate")
    other = Session()
    pool = AdapterPool(llama(), 100, adapters={"brief": tmp_path / "a", "pirate": tmp_path / "b"})
    other.register(pool.model, name="model")
    assert pool.resident == ()
    assert other.ask("Hi", adapter="brief", **FEW).system == "Be brief"
    pool.unregister("brief")
    assert systems(other.compare("Hi", adapters=["pirate"], **FEW))["pirate"] == "Ahoy"
    pool.close()


def test_new_weights_have_no_system_prompt_and_the_old_ones_have_theirs_back(session: Session, model: Any) -> None:
    train(session, [chat()] * 2)
    session.reset("orders")
    assert session.ask("Hi", **FEW).system == ""
    session.undo()
    assert session.ask("Hi", **FEW).system == "Be brief"


class Loud(CharTokenizer):
    """A tokenizer whose template has a variable."""

    def apply_chat_template(self, messages: Any, *, loud: bool = False, **options: Any) -> str:
        return ("!" if loud else "") + super().apply_chat_template(messages, **options)


class Recording(Loud):
    """The same; appends the variable of each call to a list, None if it has none."""

    def __init__(self, recorded: list[Any]) -> None:
        super().__init__("{{ loud }}")
        self.recorded = recorded

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        self.recorded.append(options.get("loud"))
        return super().apply_chat_template(messages, **options)


LOUD = Loud("{{ loud }}")


def test_the_variables_of_the_template_are_kept_with_the_adapter(
    session: Session, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat()] * 2
    asked: list[Any] = []
    more: dict[str, Any] = {"chat_template_kwargs": {"loud": True}, "sample": 1, "score": rows, "every": 1}
    made: list[Any] = []
    monkeypatch.setattr(generation, "_rendered", lambda *args: made.append(args[2]) or [1, 2])
    session.train(None, rows, tokenizer=LOUD, max_steps=1, keep=False, **more)
    session.train(None, rows, tokenizer=LOUD, max_steps=1, keep=False, **more | {"sample": "Hi"})
    assert made == [{"loud": True}] * 2
    monkeypatch.undo()
    watched = Recording(asked)
    session.ask("Hi", max_new_tokens=2, tokenizer=watched)
    session.score(rows, tokenizer=watched, max_new_tokens=2)
    assert asked and set(asked) == {True}
    session.score(rows, tokenizer=watched, max_new_tokens=2, chat_template_kwargs={"loud": False})
    assert asked[-1] is False
    session.save(tmp_path / "a", adapter="orders")
    assert 'Trained with the chat template with `{"loud": true}`' in (tmp_path / "a" / "README.md").read_text()
    other = Session()
    loaded = other.load(tmp_path / "a", name="again", model=llama(), variable="model").model
    assert prompt_format(loaded.manager.configs["again"]) == PromptFormat(True, "Be brief", '{"loud": true}')
    asked.clear()
    other.ask("Hi", max_new_tokens=2, tokenizer=watched)
    assert asked == [True]
    with pytest.raises(ConfigError, match=r"the chat template has no variable 'lowd'\. Did you mean 'loud'"):
        session.score(rows, tokenizer=LOUD, chat_template_kwargs={"lowd": True})
    with pytest.raises(ConfigError, match="chat_template_kwargs is for conversations"):
        session.score([{"prompt": "a", "completion": "b"}], tokenizer=LOUD, chat_template_kwargs={"loud": True})


def test_scores_use_the_variables_of_the_adapters_that_are_scored(session: Session, model: Any) -> None:
    rows = [chat()] * 2
    used: list[Any] = []
    session.train(None, rows, tokenizer=LOUD, max_steps=1, keep=False, chat_template_kwargs={"loud": True})
    other = session.add(None, {"r": 2, "target_modules": ["q_proj"]}, name="quiet").model
    set_prompt_format(other.manager.configs["quiet"], PromptFormat(True))
    watched = Recording(used)
    few: dict[str, Any] = {"tokenizer": watched, "max_new_tokens": 2}
    one = session.score(rows, adapters=["orders"], **few)
    assert set(used) == {True} and not any("variables" in note for note in one.notes)
    used.clear()
    both = session.score(rows, **few)
    assert set(used) == {None} and any(
        "trained with different variables of the chat template" in note for note in both.notes
    )
    used.clear()
    chosen = session.score(rows, **few, chat_template_kwargs={"loud": True})
    assert set(used) == {True} and not any("variables" in note for note in chosen.notes)
