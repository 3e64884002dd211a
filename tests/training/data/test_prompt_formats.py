"""The form of training rows: whether a template is applied, and the system prompt that all of them share."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import IterableDataset

from nbpeft.checkpoint import PromptFormat, common_format, prompt_format, set_prompt_format
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.names import PAIRS
from nbpeft.training import prepare_data
from nbpeft.training.data.forms import Pair
from nbpeft.training.data.prompt_formats import joint_of
from nbpeft.training.data.reading import ModelInputs
from nbpeft.training.data.summary import summarize
from tests.char_tokenizer import CharTokenizer

CHAT = CharTokenizer("template")
PLAIN = {"prompt": "a", "completion": "b"}


def chat(system: Any = "s") -> dict[str, Any]:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    return {"messages": messages if system is None else [{"role": "system", "content": system}, *messages]}


@pytest.mark.parametrize(
    ("rows", "form"),
    [
        ([chat()] * 2, PromptFormat(True, "s")),
        ([chat(None)] * 2, PromptFormat(True, "")),
        ([chat("s"), chat("t")], PromptFormat(True, None)),
        ([chat("s"), chat(None)], PromptFormat(True, None)),
        ([{"instruction": "q", "output": "a", "system": "s"}], PromptFormat(True, "s")),
        ([{"messages": chat(None)["messages"], "system": "s"}], PromptFormat(True, "s")),
        ([{"conversations": [{"from": "system", "value": "s"}, *chat(None)["messages"]]}], PromptFormat(True, "s")),
        ([PLAIN], PromptFormat(False)),
        (["text"], PromptFormat(False)),
        ([{"input_ids": [1, 2]}], None),
        ([chat("t"), {"messages": []}], PromptFormat(True, "t")),
    ],
)
def test_the_form_is_that_of_the_rows_that_are_trained_on(rows: Any, form: PromptFormat | None) -> None:
    read = prepare_data(rows, CHAT)
    assert read.format == form
    assert read.select([0]).format == form and read.noting("a note").format == form


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([chat("s"), chat("t")])


def test_a_stream_has_the_form_of_the_rows_read_so_far() -> None:
    stream = prepare_data(Stream(), CHAT)
    assert stream.format == PromptFormat(True, "s")
    assert len(list(stream)) == 2 and stream.format == PromptFormat(True, None)


def test_a_form_is_metadata_and_a_part_of_copies() -> None:
    form, config = PromptFormat(True, "s\n\"|'"), LoraConfig()
    assert PromptFormat.from_metadata(form.to_metadata()) == form
    assert PromptFormat.from_metadata(PromptFormat(True, None).to_metadata()) == PromptFormat(True, None)
    for wrong in ({}, {"nbpeft.prompt.chat": "maybe"}, {**form.to_metadata(), "nbpeft.prompt.system": "x" * 100_001}):
        assert PromptFormat.from_metadata(wrong) is None
    set_prompt_format(config, form)
    assert prompt_format(config.copy(r=3)) == form and config == LoraConfig() and "s\n" not in str(config.to_dict())


def test_several_adapters_have_what_they_share() -> None:
    configs = [LoraConfig() for _ in range(3)]
    assert common_format(configs) is None
    set_prompt_format(configs[0], PromptFormat(True, "s"))
    assert common_format(configs) == PromptFormat(True, "s")
    set_prompt_format(configs[1], PromptFormat(True, "t"))
    assert common_format(configs) == PromptFormat(True, None)
    set_prompt_format(configs[2], PromptFormat(False))
    assert common_format(configs) is None


@pytest.mark.parametrize(
    ("prompt", "completion", "joint"),
    [
        ("What is the code of X?", "K7", "…e code of X?K7"),
        ("Code of X", "K7", "Code of XK7"),
        ("Who?", "\u201cWe\u201d said nobody at all", "Who?\u201cWe\u201d said no…"),
        ("Who? ", "We", ""),
        ("Who?", " We", ""),
        ("Who?\n", "We", ""),
        ("2 + 2 =", "4", ""),
        ("[INST] Who? [/INST]", "We", ""),
        ("The end", ".", ""),
        ("\u8c01\uff1f", "\u6211", ""),
        ("\u0e14\u0e35", "\u0e04\u0e23\u0e31\u0e1a", ""),
        ("\u0e44\u0e17\u0e22", "\u0e44\u0e17\u0e22", ""),
        ("\uff71", "\uff72", ""),
        ("", "We", ""),
    ],
)
def test_a_joint_without_white_space(prompt: str, completion: str, joint: str) -> None:
    assert joint_of(Pair(prompt, completion)) == joint


def test_rows_whose_completions_run_into_their_prompts_are_named_with_what_to_write() -> None:
    joined, apart = {"prompt": "Who?", "completion": "We"}, {"prompt": "Who?", "completion": " We"}
    line = (
        "nothing separates prompt and completion ('Who?We'): begin each completion with a space, or end each prompt "
        "with a line break"
    )
    assert prepare_data([joined] * 2, CharTokenizer()).notes == line
    for_pairs = line
    line = line.partition("begin")[0] + (
        "columns={'instruction': 'prompt', 'output': 'completion'} applies the chat template, which separates them"
    )
    assert summarize([joined] * 2, CHAT).unused == (line,) and prepare_data([joined] * 2, CHAT).notes == line
    some = line.replace(" (", " in 1 of 3 rows (")
    assert prepare_data([apart, joined, apart], CHAT).notes == some
    assert prepare_data([apart] * 2, CHAT).notes == ""
    as_chat = prepare_data([joined] * 2, CHAT, columns={"instruction": "prompt", "output": "completion"})
    assert as_chat.notes == ""
    compared = {"prompt": "Who?", "chosen": "We", "rejected": "You"}
    assert for_pairs in prepare_data([compared], CHAT, inputs=ModelInputs(kind=PAIRS)).notes


def test_pairs_without_a_choice_are_named() -> None:
    alike, other = ({"prompt": "Who? ", "chosen": "We", "rejected": rejected} for rejected in ("We", "You"))
    for rows, where in (([other, alike], "row 1"), ([alike, other, alike], "2 of 3 rows, the first is row 0")):
        notes = prepare_data(rows, CHAT, inputs=ModelInputs(kind=PAIRS)).notes
        assert f"chosen and rejected are the same in {where}: nothing is preferred there" in notes
    assert "the same" not in prepare_data([other], CHAT, inputs=ModelInputs(kind=PAIRS)).notes


class Pairs(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([("Who?", "We"), ("Who?", "You")])


def test_a_stream_says_it_of_its_first_row() -> None:
    assert "('Who?We'): columns={'instruction'" in prepare_data(Pairs(), CHAT).notes
