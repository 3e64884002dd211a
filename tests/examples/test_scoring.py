"""Scores: answers as the model gives them alone, counted to the letter."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nbpeft import examples
from nbpeft.display.text import to_text
from nbpeft.errors import ConfigError
from nbpeft.examples import scoring
from tests.magics.notebook import Notebook
from tests.tiny_models import adapted, llama, randomize


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Characters as tokens; a line break is one of them."""
    vocabulary = {chr(code): code - 32 for code in range(32, 125)} | {"\n": 93, "<end>": 94, "<pad>": 95}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")
    made.clean_up_tokenization_spaces = False
    return made


@pytest.fixture
def model() -> Any:
    return llama(max_position_embeddings=256)


PROMPTS = ["Order: 5 lamps\nCode:", "Order: 27 chairs for Rome\nCode:", "Ord", "x"]


def said_alone(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """One prompt, one token after the other, without a cache."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start, ends = ids.shape[1], scoring._ends(tokenizer)
    with torch.no_grad():
        for _ in range(tokens):
            token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
            if token in ends:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    return str(text).strip().split("\n")[0].strip()


def test_answers_in_a_batch_are_those_alone(model: Any, tokenizer: Any) -> None:
    alone = [said_alone(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert any(alone)
    model.train()
    assert examples.answers(model, tokenizer, PROMPTS, max_new_tokens=12) == alone
    assert model.training, "the mode is as it was"


def test_a_shared_beginning_changes_no_answer(model: Any, tokenizer: Any) -> None:
    prompts = ["An example: 1\n" * 4 + prompt for prompt in PROMPTS]
    shared = scoring.shared_beginning(model, tokenizer, prompts)
    assert shared is not None and len(shared.tokens) >= 4 * 14
    alone = [said_alone(model, tokenizer, prompt, 12) for prompt in prompts]
    for _ in range(2):  # the cache is not used up
        assert examples.answers(model, tokenizer, prompts, max_new_tokens=12, shared=shared) == alone
    assert scoring.shared_beginning(model, tokenizer, PROMPTS) is None
    assert scoring.shared_beginning(model, tokenizer, prompts[:1]) is None


def test_score(model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [said_alone(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    rows = [{"prompt": p, "completion": f" {text}"} for p, text in zip(PROMPTS, wanted, strict=True)]
    rows[0] = {**rows[0], "completion": " " + "z" * 19}
    found = examples.score(model, tokenizer, rows, batch_size=3, max_new_tokens=12, label="base model")
    assert found.correct == (False, True, True, True)
    assert float(found) == found.share == 0.75
    assert found.prompt_tokens == sum(map(len, PROMPTS)) / 4
    assert str(found).startswith("base model: 3 of 4 correct (75.0 %)")
    assert "z" * 19 in to_text(found.view()) and capsys.readouterr().err == "", "no progress where no one looks"


def test_adapters_by_row(tokenizer: Any) -> None:
    model = adapted(llama(max_position_embeddings=256), "a")
    model.add_adapter("b", model.peft_config["a"].copy())
    randomize(model, "a", 1, 2.0)
    randomize(model, "b", 2, 2.0)
    rows = [{"prompt": prompt, "completion": " 12345678"} for prompt in PROMPTS]
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = examples.score(model, tokenizer, rows).answers
    assert alone["a"] != alone["b"]
    names = ["a", "b", "b", "a"]
    mixed = examples.score(model, tokenizer, rows, adapter_names=names, batch_size=3)
    assert mixed.answers == tuple(alone[name][place] for place, name in enumerate(names))
    with pytest.raises(ConfigError, match="adapter_names has 1 names for 4 rows"):
        examples.score(model, tokenizer, rows, adapter_names=["a"])
    with pytest.raises(ConfigError, match="no rows to score"):
        examples.score(model, tokenizer, [])


def test_progress_in_a_notebook_is_one_line(bare: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[dict[str, Any], dict[str, Any]]] = []
    monkeypatch.setattr("nbpeft.examples.progress._in_notebook", lambda: True)
    monkeypatch.setattr(
        bare.shell.display_pub, "publish", lambda data, metadata=None, **more: lines.append((data, more))
    )
    result = bare.shell.run_cell(
        "from nbpeft.examples.progress import Progress\n"
        "with Progress('base model', 3) as line:\n"
        "    line.advance(2)\n"
        "    line.advance(1)\n"
        "    line.done('base model: done')\n"
    )
    assert result.success
    assert [data for data, _ in lines] == [
        {"text/plain": text}
        for text in ("base model: 0 of 3", "base model: 2 of 3", "base model: 3 of 3", "base model: done")
    ]
    assert [more.get("update", False) for _, more in lines] == [False, True, True, True]
    assert len({more["transient"]["display_id"] for _, more in lines}) == 1


def test_nothing_is_deprecated(model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    prompts = ["An example: 1\n" * 4 + prompt for prompt in PROMPTS]
    rows = [{"prompt": prompt, "completion": " a"} for prompt in prompts]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        examples.score(adapted(model), tokenizer, rows)
    assert "deprecated" not in caplog.text
