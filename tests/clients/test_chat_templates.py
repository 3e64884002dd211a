"""What is learned of chats in the templates of published models, beside the marks in TRL's versions of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nbpeft.errors import TrainingError
from nbpeft.names import IGNORED_LABEL
from nbpeft.training import prepare_data
from tests.clients.packages import installed

TEMPLATES = (
    *("cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "gptoss", "idefics3", "lfm2"),
    *("lfm2_v2", "llama3", "muse_glimmer", "nemotron_3_nano", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3_8"),
    *("qwen3_instruct_2507", "qwen3_vl", "smolvlm", "glm4moe_training", "qwen3_training", "qwen3_5_think_training"),
)
ASKED = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "It is four."}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CHATS = {
    "turns": [*ASKED, {"role": "user", "content": "And three?"}, {"role": "assistant", "content": "It is six."}],
    "system": [{"role": "system", "content": "Be brief."}, *ASKED],
    "reasoning": [ASKED[0], {**ASKED[1], "reasoning_content": "Twice two is four."}],
    "tools": [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ],
}
SPECIAL = re.compile(r"<[|｜][^<>\s'\"]{1,40}[|｜]>|<(?:start|end)_of_turn>")


def in_bytes(template: str, special: list[str]) -> Any:
    """A tokenizer whose tokens are bytes and the special tokens of a template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


def runs(learned: list[bool]) -> list[tuple[int, int]]:
    """(first, last + 1) of each run of learned tokens."""
    edges = zip([False, *learned], [*learned, False], strict=True)
    borders = [place for place, (before, now) in enumerate(edges) if before != now]
    return list(zip(borders[::2], borders[1::2], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learned_is_what_the_marks_of_trl_select(name: str) -> None:
    folder = installed("trl==1.16.0") / "trl" / "chat_templates"
    text, marked = ((folder / f"{stem}.jinja").read_text(encoding="utf-8") for stem in (name, _marked(name)))
    special = sorted({*SPECIAL.findall(text + marked)})
    ours, theirs = in_bytes(text, special), in_bytes(marked, special)
    compared = 0
    for messages in CHATS.values():
        try:
            expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            [row] = prepare_data([{"messages": messages}], ours, max_length=100_000)
        except TrainingError as error:  # a template that prints no tool calls, or refuses a role
            assert "a turn of the assistant is empty" in str(error) or "refuses it" in str(error)
            continue
        except Exception:  # a template that refuses a role
            continue
        ids = list(expected["input_ids"])
        assert row["input_ids"] == ids
        prompts = _generation_prompts(ours, messages)
        found = runs([label != IGNORED_LABEL for label in row["labels"]])
        wanted = runs([bool(chosen) for chosen in expected["assistant_masks"]])
        for (first, last), (other, end) in zip(found, wanted, strict=True):
            # TRL marks a part of the generation prompt of some templates, which no model writes itself, and the line
            # break after the end of a turn.
            assert other <= first and any(ours.decode(ids[other:first]) in prompt for prompt in prompts)
            assert ours.decode(ids[min(last, end) : max(last, end)]).strip() == ""
        compared += 1
    assert compared >= 2


def _marked(name: str) -> str:
    return name if name.endswith("_training") else f"{name}_training"


def _generation_prompts(tokenizer: Any, messages: Any) -> list[str]:
    """What the template adds to ask for each turn of the assistant."""
    found = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            texts = [
                tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=asks)
                for asks in (False, True)
            ]
            found.append(texts[1].removeprefix(texts[0]))
    return found
