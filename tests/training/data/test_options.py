"""What is learned of conversations, of their reasoning and of long rows, and what the chat template is given."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import datasets
import pytest

from nbpeft import LoraConfig, score
from nbpeft.checkpoint import PromptFormat, set_prompt_format
from nbpeft.errors import ConfigError, TrainingError
from nbpeft.sweeps import sweep
from nbpeft.training import prepare_data, summarize, train
from nbpeft.training.data import ModelInputs
from nbpeft.training.disk.kept_arguments import to_keep, to_take_over
from nbpeft.training.request import TrainRequest
from nbpeft.training.watching.scoring import scorer_of
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close, is_close
from tests.tiny_models import llama
from tests.training.data.test_chats import CALLS, THINKING
from tests.training.support import trainable
from tests.training.test_data import CHATML, FORGETFUL, learned
from tests.training.test_data import tokenizer as tokenizer

ASK, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "is it?"), ("assistant", "yes"), ("assistant", "no"))
)
TOOL = {"role": "tool", "content": "a mat"}
THOUGHT = {**YES, "reasoning_content": "the mat"}
INLINE = {**YES, "content": "<think>\nthe mat\n</think>\n\nyes"}
PICKY = "{% if loud %}<|system|>{% endif %}" + CHATML


def pairs() -> ModelInputs:
    return ModelInputs(kind=None)


@pytest.fixture
def use(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda template: monkeypatch.setattr(tokenizer, "chat_template", template)


def texts(tokenizer: Any, *messages: Any, **how: Any) -> str:
    [row] = prepare_data([{"messages": list(messages)}], tokenizer, max_length=200, **how)
    return str(learned(tokenizer, row))


@pytest.mark.parametrize(
    ("learn", "expected"),
    [("all", "no<|end|>\nyes<|end|>\nno<|end|>\n"), ("completion", "yes<|end|>\nno<|end|>\n"), ("last", "no<|end|>\n")],
)
def test_the_turns_to_learn_are_chosen(tokenizer: Any, learn: str, expected: str) -> None:
    assert texts(tokenizer, ASK, NO, ASK, YES, TOOL, NO, learn=learn) == expected
    pair = {"prompt": [ASK, NO, ASK], "completion": [YES, TOOL, NO]}
    [row] = prepare_data([pair], tokenizer, learn=learn)
    assert learned(tokenizer, row) == expected.removeprefix("no<|end|>\n" if learn == "all" else "")
    compared = {"prompt": [ASK], "chosen": [YES, TOOL, NO], "rejected": [NO]}
    [row] = prepare_data([compared], tokenizer, learn=learn, inputs=pairs())
    assert learned(tokenizer, row) == ("no<|end|>\n" if learn == "last" else "yes<|end|>\nno<|end|>\n")


def test_a_turn_that_is_not_learned_need_not_be_found(tokenizer: Any, use: Any) -> None:
    """Some templates do not print earlier turns as they are written."""
    use(CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else 'x' }}"))
    with pytest.raises(TrainingError, match="a turn of the assistant is empty"):
        texts(tokenizer, ASK, NO, ASK, YES)
    assert texts(tokenizer, ASK, NO, ASK, YES, learn="last") == "yes<|end|>\n"


def test_nothing_after_the_last_message_of_the_user_is_left_out(tokenizer: Any) -> None:
    rows = [{"messages": [ASK, YES, ASK]}, {"messages": [ASK, YES]}]
    found = prepare_data(rows, tokenizer, learn="completion")
    assert found.left_out == ((0, "no turn of the assistant (roles: none)"),)
    weighted = [{"messages": [ASK, {**NO, "weight": 2}, ASK, YES]}]
    notes = prepare_data(weighted, tokenizer, learn="last").notes
    assert notes == "not used: 'weight' of turns that are not learned (learn='last')"


@pytest.mark.parametrize("turn", [THOUGHT, INLINE])
def test_reasoning_is_kept_masked_or_dropped(tokenizer: Any, use: Any, turn: Any) -> None:
    use(THINKING)
    block = "<think>\nthe mat\n</think>\n\n"
    assert texts(tokenizer, ASK, turn) == f"{block}yes<|end|>\n"
    assert texts(tokenizer, ASK, turn, reasoning="drop") == "<think>\n\n</think>\n\nyes<|end|>\n"
    assert texts(tokenizer, ASK, turn, reasoning="mask") == "yes<|end|>\n"
    rows = [{"messages": [ASK, turn]}, {"messages": [ASK, YES]}]
    masked, dropped = (prepare_data(rows, tokenizer, reasoning=how) for how in ("mask", "drop"))
    assert block in tokenizer.decode(masked[0]["input_ids"])
    assert "the mat" not in tokenizer.decode(dropped[0]["input_ids"])
    assert masked.notes == "read, but not learned: reasoning (1 of 2 rows)"
    assert dropped.notes == "not used: reasoning (1 of 2 rows)"
    assert summarize(rows, tokenizer, reasoning="mask").unused == (masked.notes,)


def test_reasoning_before_a_tool_call_is_masked(tokenizer: Any, use: Any) -> None:
    use(THINKING)
    for content in ("", None):
        asks = {"role": "assistant", "content": content, "tool_calls": CALLS, "reasoning_content": "the mat"}
        call = '<tool_call>{"name": "look", "arguments": {"at": "mat"}}</tool_call><|end|>\n'
        assert texts(tokenizer, ASK, asks, reasoning="mask") == call
        assert texts(tokenizer, ASK, asks, TOOL, YES, reasoning="mask").startswith(call.removesuffix("\n"))


def test_an_answer_about_tags_is_no_reasoning(tokenizer: Any, use: Any) -> None:
    use(CHATML)
    about = {**YES, "content": "yes <think> and </think>"}
    for how in ("mask", "drop"):
        assert texts(tokenizer, ASK, about, reasoning=how) == "yes <think> and </think><|end|>\n"
        found = prepare_data([{"messages": [ASK, about]}], tokenizer, reasoning=how)
        assert found.notes == f"no row has reasoning to {how}"


@pytest.mark.parametrize(
    ("content", "printed"),
    [
        ("yes", "{{ m['content'] }}{{ m.reasoning_content or '' }}"),
        ("", "{{ m['content'] }}{{ m.reasoning_content or '' }}"),
        ("yes", "{{ m.reasoning_content or m['content'] }}"),
        ("yes", "{{ m.reasoning_content or '' }}{{ m['content'] | length }}{{ m['content'] }}"),
    ],
)
def test_reasoning_that_the_template_does_not_print_before_the_answer_cannot_be_masked(
    tokenizer: Any, use: Any, content: str, printed: str
) -> None:
    use(CHATML.replace("{{ m['content'] }}", printed))
    with pytest.raises(TrainingError, match="Row 0: The chat template does not print the reasoning of turn 1 before"):
        texts(tokenizer, ASK, {**THOUGHT, "content": content}, reasoning="mask")


def test_the_template_gets_its_variables_and_the_adapter_keeps_them(tokenizer: Any, use: Any) -> None:
    use(PICKY)
    row = {"messages": [ASK, YES]}
    plain, loud = prepare_data([row], tokenizer), prepare_data([row], tokenizer, chat_template_kwargs={"loud": True})
    assert loud[0]["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|system|>")
    assert loud[0]["input_ids"][1:] == plain[0]["input_ids"]
    assert loud.format == PromptFormat(True, "", '{"loud": true}') and loud.format.variables == {"loud": True}
    own = [{**row, "chat_template_kwargs": given} for given in ({"loud": True}, '{"loud": true}', {}, None)]
    assert prepare_data(datasets.Dataset.from_list(own[:1]), tokenizer)[0] == loud[0]
    read = prepare_data(own, tokenizer, chat_template_kwargs={"loud": False})
    assert [len(item["input_ids"]) - len(plain[0]["input_ids"]) for item in read] == [1, 1, 0, 0]
    assert read.notes == ""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"learn": "lst"}, r"learn must be all, last, completion, not 'lst'\. Did you mean 'last'\?"),
        ({"reasoning": "masks"}, "reasoning must be keep, mask, drop, not 'masks'"),
        ({"long": "chop"}, "long must be cut, drop, split, not 'chop'"),
        ({"chat_template_kwargs": "loud"}, "chat_template_kwargs must be a dictionary"),
        ({"chat_template_kwargs": {"lowd": 1}}, "the chat template has no variable 'lowd'. Did you mean 'loud'"),
        ({"chat_template_kwargs": {"tools": []}}, "'tools' is not a variable of a chat template"),
        (
            {"long": "split"},
            "is for rows with text or with tokens and tags, and these are rows with messages",
        ),
    ],
)
def test_a_wrong_value_is_one_line(tokenizer: Any, use: Any, how: Any, message: str) -> None:
    use(PICKY)
    with pytest.raises(ConfigError, match=message) as refused:
        prepare_data([{"messages": [ASK, YES]}], tokenizer, **how)
    assert refused.value.details["field"] in how


@pytest.mark.parametrize(
    ("row", "how"),
    [
        ({"text": "abc"}, {"learn": "last"}),
        ({"text": "abc"}, {"reasoning": "drop"}),
        ({"text": "abc"}, {"chat_template_kwargs": {"loud": True}}),
        ({"prompt": "a", "completion": "b"}, {"reasoning": "mask"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"chat_template_kwargs": {"loud": True}}),
        ({"input_ids": [1, 2]}, {"learn": "last"}),
        ({"input_ids": [1, 2]}, {"long": "drop"}),
    ],
)
def test_an_option_without_effect_is_refused(tokenizer: Any, row: Any, how: Any) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(how))} (is for conversations|has no effect)"):
        prepare_data([row], tokenizer, inputs=pairs(), **how)
    if "prompt" in row:
        assert len(prepare_data([row], tokenizer, inputs=pairs(), learn="last")) == 1


@pytest.mark.parametrize("how", [{"learn": "last"}, {"reasoning": "mask"}], ids=["learn", "reasoning"])
def test_prompts_alone_have_nothing_to_choose_for_learning(tokenizer: Any, how: Any) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(how))} has no effect: generated completions are learned whole"):
        prepare_data([{"prompt": [ASK, YES, ASK]}], tokenizer, inputs=pairs(), **how)


def test_a_row_with_an_unknown_variable_is_named(tokenizer: Any, use: Any) -> None:
    use(PICKY)
    rows = [{"messages": [ASK, YES], "chat_template_kwargs": given} for given in ({"loud": 1}, {"low": 1}, "{", [1])]
    with pytest.raises(TrainingError, match="Row 1: chat_template_kwargs: the chat template has no variable 'low'"):
        prepare_data(rows[:2], tokenizer)
    with pytest.raises(TrainingError, match="'chat_template_kwargs' is text that is not JSON"):
        prepare_data(rows[2:3], tokenizer)
    with pytest.raises(TrainingError, match="'chat_template_kwargs' is a list, not a dictionary"):
        prepare_data(rows[3:], tokenizer)


@pytest.mark.parametrize("length", [2, 3, 5, 9, 10, 11])
def test_each_token_of_a_text_that_is_split_is_learned_once(length: int) -> None:
    tokenizer = CharTokenizer()
    rows = ["abcdefghi", "xy"]
    found = prepare_data(rows, tokenizer, max_length=length, long="split")
    assert max(len(row["input_ids"]) for row in found) <= length
    predicted = [label for row in found for label in row["labels"][1:]]
    whole = prepare_data(rows, tokenizer, max_length=20)
    assert predicted == [label for row in whole for label in row["labels"][1:]]
    parts = [number for number in found.numbers if found.numbers.count(number) > 1]
    assert bool(found.notes) is (length < 10)
    if length < 10:
        rows_split = len({*parts})
        assert found.notes.startswith(f"{rows_split} row") and f"split into {len(parts)} parts" in found.notes


def test_long_rows_are_dropped_and_counted() -> None:
    tokenizer = CharTokenizer()
    rows = [{"prompt": "a ", "completion": "cdefgh"}, {"prompt": "a ", "completion": "c"}]
    found = prepare_data(rows, tokenizer, max_length=5, long="drop")
    assert found.notes == "1 row left out: row 0: longer than 5 tokens (long='drop')" and len(found) == 1
    shown = summarize(rows, tokenizer, max_length=5, long="drop")
    assert (shown.left_out_count, shown.cut_rows, shown.cut_tokens, shown.row_count) == (1, 0, 0, 1)
    pair = {"prompt": "ab", "chosen": "c", "rejected": "cdefgh"}
    options = {"max_length": 5, "long": "drop", "inputs": pairs()}
    assert prepare_data([pair, {**pair, "rejected": "d"}], tokenizer, **options).dropped == 1


def test_parts_are_shown_and_counted() -> None:
    shown = summarize(["abcdefghi", "xy"], CharTokenizer(), max_length=5, long="split", rows=4)
    assert (shown.split_rows, shown.split_parts, shown.row_count, shown.cut_rows) == (1, 3, 4, 0)
    assert [row.part for row in shown.rows] == ["part 1 of 3", "part 2 of 3", "part 3 of 3", ""]
    assert [span.learned for span in shown.rows[1].spans] == [False, True]


def test_a_row_in_parts_counts_as_one() -> None:
    rows = [{"text": "xy", "note": "x"}, {"text": "abcdefghi"}]
    assert prepare_data(rows, CharTokenizer(), max_length=5, long="split").notes == (
        "1 row longer than the maximum length split into 3 parts; columns not used: 'note' (1 of 2 rows)"
    )


def test_a_stream_is_split_and_its_long_rows_are_dropped() -> None:
    stream = datasets.Dataset.from_list([{"text": "abcdefghi"}, {"text": "xy"}]).to_iterable_dataset()
    assert len(list(prepare_data(stream, CharTokenizer(), max_length=5, long="split"))) == 4
    assert len(list(prepare_data(stream, CharTokenizer(), max_length=5, long="drop"))) == 1


def test_variables_in_a_file_are_checked() -> None:
    form = PromptFormat(True, "s", '{"loud": true}')
    assert PromptFormat.from_metadata(form.to_metadata()) == form
    quiet = replace(form, learns_reasoning=False)
    assert PromptFormat.from_metadata(quiet.to_metadata()) == quiet
    for text in ("{", "[1]", json.dumps({"tools": []}), json.dumps({"tokenize": True}), '{"a b": 1}'):
        read = PromptFormat.from_metadata({**form.to_metadata(), "nbpeft.prompt.template": text})
        assert read == PromptFormat(True, "s")


def test_forgetful_templates_are_learned_as_they_print(tokenizer: Any, use: Any) -> None:
    use(FORGETFUL)
    assert texts(tokenizer, ASK, YES, ASK, NO, learn="last") == "<think></think>no<|end|>\n"


def test_a_sweep_reads_rows_like_a_training_and_a_resumed_run_takes_the_options_over() -> None:
    tokenizer, rows = CharTokenizer("template"), [{"messages": [ASK, NO, ASK, YES]}] * 4
    how: dict[str, Any] = {"learn": "last", "reasoning": "mask", "long": "drop", "max_length": 40}
    fields: dict[str, Any] = {"tokenizer": tokenizer, "max_steps": 2, **how}
    result = train(trainable(), rows, learning_rate=sweep(1e-2, 3e-2), **fields)
    for member, rate in zip(result.members, (1e-2, 3e-2), strict=True):
        alone = train(trainable(), rows, learning_rate=rate, **fields)
        assert_close([loss for _, loss in member.history], [loss for _, loss in alone.state.history])
        assert "no row has reasoning to mask" in alone.message
    whole = train(trainable(), rows, learning_rate=1e-2, **fields | {"learn": "all"})
    assert not is_close(whole.state.history[0][1], result.members[0].history[0][1])
    request = TrainRequest(trainable(), rows, 0.5, eval_by="user", chat_template_kwargs={"loud": True}, **how)
    taken, rest = to_take_over(to_keep(request.kept())[0])
    assert taken == {**how, "eval_data": 0.5, "eval_by": "user", "chat_template_kwargs": {"loud": True}} and not rest


@pytest.mark.parametrize(("reasoning", "kept"), [("keep", True), ("mask", False), ("drop", False)])
def test_references_in_training_have_the_reasoning_that_is_learned(
    tokenizer: Any, use: Any, reasoning: str, kept: bool
) -> None:
    use(THINKING)
    rows = [{"messages": [ASK, INLINE]}]
    scored = {"score": rows, "metric": "exact", "reasoning": reasoning}
    scorer: Any = scorer_of(TrainRequest(trainable(llama(vocab_size=300)), rows, tokenizer=tokenizer, **scored), {})
    [reference] = [row.reference for row in scorer._read.rows]
    assert reference.endswith("yes") and ("the mat" in reference) is kept


def test_references_after_a_training_have_the_reasoning_that_was_learned(tokenizer: Any, use: Any) -> None:
    use(THINKING)
    rows, model = [{"messages": [ASK, INLINE]}, {"messages": [ASK, YES]}], trainable(llama(vocab_size=300))
    scoring: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 1, "progress": False}

    def references(*adapters: str) -> tuple[str, tuple[str, ...]]:
        result = score(model, rows, adapters=list(adapters), **scoring)
        return result.items[0].reference, tuple(note for note in result.notes if "reasoning" in note)

    assert "the mat" in references("default")[0]
    set_prompt_format(model.peft_config["default"], prepare_data(rows, tokenizer, reasoning="mask").format)
    text, notes = references("default")
    assert text.endswith("yes") and "the mat" not in text
    assert notes == ("the reasoning of 1 row is left out: it was not learned",)
    model.add_adapter("loud", LoraConfig(r=2, target_modules=["q_proj"]))
    set_prompt_format(model.peft_config["loud"], prepare_data(rows, tokenizer).format)
    text, notes = references("default", "loud")
    assert "the mat" in text and notes == (
        "some adapters were trained on reasoning and others were not: references are compared with their reasoning",
    )
