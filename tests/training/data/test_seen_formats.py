"""The form of training rows: whether a template is applied, and the system prompt that all of them share."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import IterableDataset

from nbpeft.checkpoint import PromptFormat, common_format, prompt_format, set_prompt_format
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.training import prepare_data
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
