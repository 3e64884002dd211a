"""Answers while training goes on: right, bounded, and without a trace in what is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nbpeft.errors import ConfigError, TrainingInterrupted
from nbpeft.training import RunControl, train
from nbpeft.training.watching.generation import PromptBatch
from nbpeft.training.watching.sampling import MAX_NEW_TOKENS
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close
from tests.training.support import token_rows, trainable, weights

SETTINGS: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.05}
PROMPT = "Oslo needs 3"


def losses(**more: Any) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    model = trainable(lora_dropout=0.3)
    torch.manual_seed(0)
    result = train(model, token_rows(), token_rows(4), tokenizer=CharTokenizer(), **SETTINGS, **more)
    return [loss for _, loss in result.state.history], weights(model), result


def test_losses_are_the_same_with_and_without_samples():
    plain, plain_weights, _ = losses()
    sampled, sampled_weights, result = losses(sample=PROMPT, every=2, activation_checkpointing=True)
    # Up to rounding: where a tensor lies in memory decides how a kernel adds, and answers take memory in between.
    assert_close(sampled, plain)
    for name, value in plain_weights.items():
        assert_close(sampled_weights[name], value)
    assert [sample.step for sample in result.state.samples] == [2, 4, 6]


def answer(model: Any, *, base: bool) -> str:
    ids = torch.tensor([CharTokenizer()(PROMPT)["input_ids"]])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": MAX_NEW_TOKENS}
    if base:
        with model.disable_adapter():
            made = model.generate(input_ids=ids, do_sample=False, **options)
    else:
        made = model.generate(input_ids=ids, do_sample=False, **options)
    batch = PromptBatch.of([PROMPT], CharTokenizer(), model.get_base_model())
    return batch.answer(made[0, ids.shape[1] :].tolist(), MAX_NEW_TOKENS).text


def test_a_sample_is_what_the_model_answers_then_beside_the_base():
    model = trainable().eval()
    result = train(model, token_rows(), tokenizer=CharTokenizer(), sample=[PROMPT], **SETTINGS)
    last = result.state.samples[-1]
    assert (last.step, last.prompt) == (6, PROMPT)
    assert (last.answer, last.base) == (answer(model, base=False), answer(model, base=True))
    assert last.answer != last.base
    assert last.cut and last.base_cut  # this model never ends an answer
    assert len(result.state.samples) == 3  # about five times a run of six steps is every second
    assert not model.training


def test_a_chat_template_goes_around_prompts_where_it_goes_around_rows():
    seen: list[list[int]] = []

    class Spy(CharTokenizer):
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            tokens = super().__call__(text)
            seen.append(tokens["input_ids"])
            return tokens

    tokenizer = Spy(chat_template="yes")
    train(trainable(), token_rows(), tokenizer=tokenizer, sample=PROMPT, **SETTINGS)
    assert super(Spy, tokenizer).__call__(f"<{PROMPT}>")["input_ids"] in seen
    seen.clear()
    train(trainable(), [{"text": "plain"}] * 4, tokenizer=tokenizer, sample=PROMPT, **SETTINGS)
    assert super(Spy, tokenizer).__call__(PROMPT)["input_ids"] in seen


def test_a_model_that_cannot_answer_ends_the_samples_and_not_the_run(monkeypatch: pytest.MonkeyPatch):
    def fails(*args: Any) -> None:
        raise ValueError("no room")

    monkeypatch.setattr("nbpeft.training.watching.sampling.generate_batch", fails)
    result = train(trainable(), token_rows(), tokenizer=CharTokenizer(), sample=PROMPT, **SETTINGS)
    assert result.steps == 6 and result.state.samples == ()
    assert result.message == "no samples: ValueError: no room"


def test_an_interruption_while_it_answers_ends_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nbpeft.training.watching.sampling.generate_batch", lambda *_: ([], False))
    with pytest.raises(TrainingInterrupted):
        train(trainable(), token_rows(), tokenizer=CharTokenizer(), sample=PROMPT, every=2, **SETTINGS)


def test_stop_ends_an_answer_too():
    requests = RunControl()

    class Click(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                requests.request_stop()

    result = train(
        trainable(),
        token_rows(),
        tokenizer=CharTokenizer(),
        sample=PROMPT,
        every=1,
        control=requests,
        callbacks=[Click()],
        **SETTINGS,
    )
    assert result.status == "stopped" and [sample.step for sample in result.state.samples] == [1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sample": 3}, "has both"),
        ({"sample": [3]}, "sample must be a prompt"),
        ({"sample": []}, "sample must be a prompt"),
        ({"sample": ["a"] * 9}, "1 to 8 prompts, not 9"),
        ({"sample": "a", "every": 0}, "every must be a number of steps"),
        ({"every": 3}, "without sample"),
        ({"sample": "a", "tokenizer": None}, "needs a tokenizer"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(given: dict[str, Any], words: str):
    model = trainable()
    before = weights(model)
    with pytest.raises(ConfigError, match=words):
        train(model, token_rows(), **{"tokenizer": CharTokenizer(), **SETTINGS, **given})
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
