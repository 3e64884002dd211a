"""What of a chat its template prints, row by row, and where the assistant speaks in it."""

from __future__ import annotations

import json
from typing import Any

import datasets
import numpy
import pytest

from nbpeft.errors import TrainingError
from nbpeft.training import prepare_data
from nbpeft.training.data import chats
from nbpeft.training.data.forms import Chat
from tests.training.data.test_conservation import PRINTING
from tests.training.test_data import FORGETFUL, learned
from tests.training.test_data import tokenizer as tokenizer

USER, REPLY = {"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}
REASONED = {**REPLY, "reasoning_content": "the cat sat on the mat"}
ONLY_LAST = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last and m.reasoning_content %}{{ m.reasoning_content }}"
    "{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITHOUT_SYSTEM = (
    "{% for m in messages if m['role'] in ('user', 'assistant') %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
IN_PARTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = (
    "{% set last = namespace(user=-1) %}"
    "{% for m in messages if m['role'] == 'user' %}{% set last.user = loop.index %}{% endfor %}"
    "{% set seen = namespace(users=0) %}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['role'] == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}"
    "{% set content = m['content'] or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if m['role'] == 'assistant' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}"
    "{% if seen.users == last.user and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{% endif %}{{ content }}{% for call in m.tool_calls or [] %}{{ '\n' if content }}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""A template that writes the thoughts of the assistant since the last user message, and a block of them at the end."""
CALLS = [{"type": "function", "function": {"name": "look", "arguments": {"at": "mat"}}}]
UNPRINTED = "not printed by the chat template, so not trained on: "


@pytest.fixture
def use(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda template: monkeypatch.setattr(tokenizer, "chat_template", template)


def notes(tokenizer: Any, *rows: Any) -> str:
    found = [{"messages": list(row)} if not isinstance(row, dict) else row for row in rows]
    return str(prepare_data(found, tokenizer).notes)


def test_what_is_not_printed_is_counted_by_rows(tokenizer: Any, use: Any) -> None:
    plain, reasoned = [USER, REPLY], [USER, REASONED]
    assert notes(tokenizer, plain, reasoned, reasoned) == f"{UNPRINTED}'reasoning_content' (2 of 3 rows)"
    use(PRINTING)
    assert notes(tokenizer, plain, reasoned, reasoned) == ""
    use(ONLY_LAST)
    assert notes(tokenizer, reasoned, [*reasoned, *plain], [*reasoned, *reasoned]) == (
        f"{UNPRINTED}'reasoning_content' (2 of 3 rows)"
    )


def test_a_role_that_is_not_printed_is_named(tokenizer: Any, use: Any) -> None:
    rows = [[{"role": "system", "content": "be brief"}, USER, REPLY], [USER, REPLY]]
    no_default = "only 1 of 2 rows have a system prompt: the adapter has no default system prompt"
    assert notes(tokenizer, *rows) == no_default
    use(WITHOUT_SYSTEM)
    assert notes(tokenizer, *rows) == f"{UNPRINTED}'content' of system messages (1 of 2 rows); {no_default}"
    assert notes(tokenizer, {"messages": rows[1], "system": "is"}) == f"{UNPRINTED}'content' of system messages"


def test_rows_of_one_kind_are_not_taken_for_one_another(tokenizer: Any, use: Any) -> None:
    """A template may look at what a message says, not at its keys alone."""
    use(PRINTING.replace("{% if m.reasoning_content %}", "{% if 'mat' in (m.reasoning_content or '') %}"))
    other = {**REPLY, "reasoning_content": "the cat did not sit there"}
    for rows in ([[USER, REASONED], [USER, other]], [[USER, other], [USER, REASONED]]):
        assert notes(tokenizer, *rows) == f"{UNPRINTED}'reasoning_content' (1 of 2 rows)"


def test_a_template_is_tried_once_for_each_kind_of_chat(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    tried = chats.ChatRenderer._is_hidden
    monkeypatch.setattr(chats.ChatRenderer, "_is_hidden", lambda *args: calls.append(1) or tried(*args))
    notes(tokenizer, *[[USER, {**REPLY, "name": "Ann"}]] * 20)
    assert len(calls) == 3  # the content of two messages, and a name
    monkeypatch.setattr(chats, "_MOST_SHAPES", 1)
    assert "'name' (20 of 21 rows)" in notes(tokenizer, [USER, REPLY], *[[USER, {**REPLY, "name": "Ann"}]] * 20)
    calls.clear()
    several = ({"name": "look", "arguments": {f"at{number}": "mat"}} for number in range(20))
    notes(tokenizer, *[[USER, {**REPLY, "tool_calls": [{"function": one}]}] for one in several])
    assert len(calls) == 3  # arguments do not make another kind


def test_names_within_a_part_make_another_kind_of_chat(tokenizer: Any, use: Any) -> None:
    use(PRINTING.replace("call.function | tojson", "call.function.name"))
    rows = [[USER, {**REPLY, "tool_calls": [{"function": {name: "look"}}]}] for name in ("name", "title")]
    assert notes(tokenizer, *rows) == f"{UNPRINTED}'tool_calls' (1 of 2 rows)"


def test_tools_are_printed_or_named_and_may_be_text(tokenizer: Any, use: Any) -> None:
    tools = [{"type": "function", "function": {"name": "look", "description": "looks"}}]
    row = {"messages": [USER, REPLY]}
    assert notes(tokenizer, {**row, "tools": tools}) == f"{UNPRINTED}'tools'"
    use(PRINTING)
    one, other, none = (
        prepare_data([{**row, "tools": given}], tokenizer, max_length=200)[0]
        for given in (tools, json.dumps(tools), [])
    )
    assert one == other != none == prepare_data([row], tokenizer)[0]


def test_a_turn_of_which_nothing_is_printed_is_empty(tokenizer: Any, use: Any) -> None:
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "mat"}}}]
    rows = [[USER, {"role": "assistant", "content": None, "tool_calls": calls}], [USER, REPLY]]
    assert notes(tokenizer, *rows) == (
        "1 row left out: row 0: a turn of the assistant is empty; " + f"{UNPRINTED}'tool_calls' (1 of 2 rows)"
    )
    use(PRINTING.replace("{{ m['content'] }}", "{{ m['content'] or '' }}"))
    assert notes(tokenizer, *rows) == ""
    without = {"role": "assistant", "tool_calls": calls}
    for turns in (rows[0], [USER, without]):
        assert learned(tokenizer, prepare_data([{"messages": turns}], tokenizer)[0]).startswith('{"name": "look"')
    as_array = {**rows[0][1], "tool_calls": numpy.array(calls * 2, dtype=object)}  # as Parquet gives it
    assert (
        learned(tokenizer, prepare_data([{"messages": [USER, as_array]}], tokenizer, max_length=200)[0]).count("look")
        == 2
    )


def test_parts_of_text_are_one_text_unless_the_template_takes_parts(tokenizer: Any, use: Any) -> None:
    parts = {**REPLY, "content": [{"type": "text", "text": "yes"}, "and no"]}
    [row] = prepare_data([{"messages": [USER, parts]}], tokenizer)
    assert learned(tokenizer, row) == "yes\nand no<|end|>\n"
    use(IN_PARTS)
    [row] = prepare_data([{"messages": [USER, parts]}], tokenizer)
    assert learned(tokenizer, row) == "yesand no<|end|>\n"


def test_an_answer_that_the_prompt_holds_too_is_learned_behind_it(tokenizer: Any, use: Any) -> None:
    use(FORGETFUL)
    pair = {
        "prompt": [USER, REPLY, {**USER, "content": "yes yes"}],
        "completion": [REPLY, USER, {**REPLY, "content": "no"}],
    }
    [row] = prepare_data([pair], tokenizer)
    assert learned(tokenizer, row) == "yes<|end|><think></think>no<|end|>\n"
    labels = [place for place, label in enumerate(row["labels"]) if label != -100]
    before = tokenizer.decode(row["input_ids"][: labels[0]])
    assert before.count("<|assistant|>") == 2 and before.endswith("<|assistant|>")


def test_what_a_table_fills_in_is_not_there(tokenizer: Any, use: Any) -> None:
    use(PRINTING.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content is defined %}"))
    rows = [{"messages": [USER, REPLY]}, {"messages": [USER, REASONED]}]
    assert list(prepare_data(datasets.Dataset.from_list(rows), tokenizer)) == list(prepare_data(rows, tokenizer))


def spoken(tokenizer: Any, *messages: Any, first: int = 0) -> list[str]:
    """What is learned of each turn of a chat."""
    weights = [1.0] * len(messages)
    found = chats.ChatRenderer(tokenizer).render(Chat(tuple(messages), tuple(weights), first))
    return [found.text[span.first : span.last] for span in found.spans]


@pytest.mark.parametrize("answer", ["a", "i", "end", "assistant", "<", "</think>a\n"])
def test_an_answer_is_learned_where_it_is_the_answer(tokenizer: Any, use: Any, answer: str) -> None:
    """The headers that a template writes may hold the same letters."""
    use(THINKING)
    turns = [{**USER, "content": "q1"}, {**REPLY, "content": answer}, USER, {**REPLY, "content": answer}]
    written = answer.removeprefix("</think>")
    assert spoken(tokenizer, *turns) == [f"{written}<|end|>", f"<think>\n\n</think>\n\n{written}<|end|>\n"]
    assert spoken(tokenizer, *turns, first=2) == [f"<think>\n\n</think>\n\n{written}<|end|>\n"]


@pytest.mark.parametrize("content", ["ok", "", None])
def test_a_turn_is_learned_with_its_tool_call_and_its_end(tokenizer: Any, use: Any, content: str | None) -> None:
    use(THINKING)
    asks = {"role": "assistant", "content": content, "tool_calls": CALLS, "reasoning_content": "the mat"}
    asks = {key: value for key, value in asks.items() if value is not None}
    result = {"role": "tool", "content": "a mat"}
    call = '<tool_call>{"name": "look", "arguments": {"at": "mat"}}</tool_call><|end|>'
    written = f"{content}\n{call}" if content else call
    assert spoken(tokenizer, USER, asks, result, REPLY, USER, REPLY) == [
        written,
        "yes<|end|>",
        "<think>\n\n</think>\n\nyes<|end|>\n",
    ]
    assert spoken(tokenizer, USER, asks)[0] == f"<think>\nthe mat\n</think>\n\n{written}\n"


def test_reasoning_is_learned_as_it_is_written(tokenizer: Any, use: Any) -> None:
    use(THINKING)
    inline = {**REPLY, "content": "<think>\nthe mat\n</think>\n\nyes"}
    assert spoken(tokenizer, USER, inline, USER, inline) == [
        "yes<|end|>",
        "<think>\nthe mat\n</think>\n\nyes<|end|>\n",
    ]


def test_a_generation_prompt_may_hold_what_earlier_turns_do_not(tokenizer: Any, use: Any) -> None:
    use(THINKING.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n{% endif %}"))
    turns = [USER, {**REPLY, "content": "<b>"}]
    assert spoken(tokenizer, *turns, *turns) == ["<b><|end|>", "\n</think>\n\n<b><|end|>\n"]
    use(FORGETFUL.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}"))
    assert spoken(tokenizer, *turns) == ["</think><b><|end|>"]


def test_the_last_turn_may_have_an_end_of_its_own(tokenizer: Any, use: Any) -> None:
    last = "{% if loop.last and not add_generation_prompt %}<|system|>{% else %}<|end|>{% endif %}"
    use(PRINTING.replace("<|end|>\n{% endfor %}{% if add", f"{last}{{% endfor %}}{{% if add"))
    assert spoken(tokenizer, USER, REPLY, USER, REPLY) == ["yes<|end|>", "yes<|system|>"]
    use(tokenizer.chat_template.replace("<|system|>{% else %}", "<|other|>{% else %}"))
    with pytest.raises(TrainingError, match="does not show turn 1 of the assistant as it is written"):
        spoken(tokenizer, USER, REPLY, USER, REPLY)


def test_the_end_of_the_chat_is_not_that_of_an_earlier_turn(tokenizer: Any, use: Any) -> None:
    use(PRINTING + "{% if not add_generation_prompt %}<pad>{% endif %}")
    assert spoken(tokenizer, USER, REPLY, USER, REPLY) == ["yes<|end|>\n", "yes<|end|>\n<pad>"]


def test_a_turn_that_is_written_otherwise_is_found_or_refused(tokenizer: Any, use: Any) -> None:
    def written_as(said: str) -> None:
        use(FORGETFUL.replace("{{ m['content'] }}", "{{ '' if m['role'] == 'user' else " + said + " }}"))

    written_as("m['content'] | upper")
    assert spoken(tokenizer, USER, REPLY, USER, REPLY) == ["YES<|end|>", "<think></think>YES<|end|>\n"]
    for said in ("m['content'] * 2", "{'yes': 'no'}[m['content']]"):  # twice, or only if it says a certain thing
        written_as(said)
        with pytest.raises(TrainingError, match="does not show turn 1 of the assistant as it is written"):
            spoken(tokenizer, USER, REPLY, USER, REPLY)


def test_chats_are_rendered_with_marks_until_the_end_mark_is_known(
    tokenizer: Any, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    marks = chats.ChatRenderer._following
    monkeypatch.setattr(chats.ChatRenderer, "_following", lambda *args: calls.append(1) or marks(*args))
    use(THINKING)
    prepare_data([{"messages": [USER, REPLY, USER, REPLY, USER, REPLY]}] * 20, tokenizer)
    assert len(calls) == 1
    prepare_data([{"messages": [USER, REPLY]}] * 20, tokenizer)
    assert len(calls) == 1


def test_a_turn_is_found_whatever_stands_before_it(tokenizer: Any, use: Any) -> None:
    """Some templates write the tools in front of the last user message, which is another one in the whole chat."""
    last = "m['role'] == 'user' and loop.index0 >= messages | length - 2"
    start = "{% if tools and " + last + " %}{{ tools | tojson }}{% endif %}"
    use(tokenizer.chat_template.replace("<|{{ m['role'] }}|>", start + "<|{{ m['role'] }}|>", 1))
    turns = (USER, {**REPLY, "content": "a"}, USER, {**REPLY, "content": "b"})
    found = chats.ChatRenderer(tokenizer).render(Chat(turns, (1.0,) * 4, tools=[{"name": "assistant"}]))
    assert [found.text[span.first : span.last] for span in found.spans] == ["a<|end|>", "b<|end|>\n"]


def test_an_empty_turn_that_is_not_learned_is_no_obstacle(tokenizer: Any, use: Any) -> None:
    use(THINKING)
    empty = {**REPLY, "content": "", "weight": 0}
    [row] = prepare_data([{"messages": [USER, empty, USER, REPLY, USER, empty]}], tokenizer, max_length=200)
    assert learned(tokenizer, row) == "yes<|end|>"
