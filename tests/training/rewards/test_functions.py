"""Reward functions: what they are called with, and what they may return."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

from nbpeft.errors import ConfigError, TrainingError
from nbpeft.training.rewards.functions import Rewards
from nbpeft.training.rewards.rollouts import Completion


def completion(number: int, text: str, prompt: Any = "ask", **columns: Any) -> Completion:
    row = {"input_ids": [5], "prompt": prompt, "columns": columns, "number": number}
    return Completion(row, (number, 1), text, ended=True)


COMPLETIONS = [completion(3, "one", answer="1"), completion(4, "two two", answer="2")]


def scored(*functions: Any, completions: Any = COMPLETIONS, columns: tuple[str, ...] = ("answer",)) -> torch.Tensor:
    return Rewards.of(list(functions), None, columns).of_completions(completions, "state")


def of_words(completions: Any) -> list[float]:
    return [float(len(text.split())) for text in completions]


def test_a_function_gets_what_it_takes_by_the_names_of_trl() -> None:
    seen: list[dict[str, Any]] = []

    def all_of_it(completions: Any, **others: Any) -> list[float]:
        seen.append(others)
        return [0.5, 1]

    def some(prompts: Any, answer: Any, more: Any = 7) -> list[float]:
        seen.append({"prompts": prompts, "answer": answer, "more": more})
        return [True, False]

    found = scored(all_of_it, some, of_words)
    assert found.tolist() == [[0.5, 1, 1], [1, 0, 2]] and found.dtype == torch.float32
    everything = {"prompts": ["ask"] * 2, "answer": ["1", "2"], "completion_ids": [[3, 1], [4, 1]]}
    assert seen == [{**everything, "trainer_state": "state"}, {"prompts": ["ask"] * 2, "answer": ["1", "2"], "more": 7}]


def test_the_completion_of_a_conversation_is_a_message() -> None:
    seen: list[Any] = []
    answered = [completion(0, "hello", [{"role": "user", "content": "hi"}])]
    scored(lambda completions, prompts: seen.extend([completions, prompts]) or [0], completions=answered, columns=())
    assert seen == [[[{"role": "assistant", "content": "hello"}]], [[{"role": "user", "content": "hi"}]]]


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_arrays_tensors_and_tuples_are_lists_of_numbers(kind: Any) -> None:
    assert scored(lambda completions: kind([0.25, 2])).tolist() == [[0.25], [2]]


def test_none_is_no_reward() -> None:
    assert [math.isnan(value) for (value,) in scored(lambda completions: [None, 1.0]).tolist()] == [True, False]


def test_functions_have_different_names() -> None:
    given = [of_words, functools.partial(of_words), lambda completions: [], lambda completions: []]
    rewards = Rewards.of(given, None, ())
    assert rewards.names == ("of_words", "of_words-2", "<lambda>", "<lambda>-2")
    assert Rewards.of(of_words, None, ()).names == ("of_words",)


def test_columns_that_no_function_takes_are_named() -> None:
    def of_answers(completions: Any, answer: Any) -> list[float]:
        return []

    assert Rewards.of([of_answers, of_words], None, ("answer", "topic")).note == (
        "rewards: of_answers, of_words; columns not used: 'topic'"
    )
    assert Rewards.of([lambda completions, **rest: []], None, ("topic",)).unused == ()


class Judge(torch.nn.Module):
    """A model that is not a function of completions."""


async def later(completions: Any) -> list[float]:
    return []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "grpo needs reward=…: functions f(completions, prompts, **columns)"),
        ([], "grpo needs reward"),
        (["length"], "a reward must be a function f(completions, prompts, **columns), not 'length'"),
        ([Completion], "a reward must be a function"),
        ([Judge()], "a reward is a function, not a Judge: call the model in a function"),
        ([later], "reward 'later' is asynchronous"),
        ([lambda completions, wanted: []], "reward '<lambda>' needs 'wanted', and is called with the keywords"),
        ([lambda completions, /: []], "reward '<lambda>' needs 'completions'"),
    ],
    ids=range(8),  # not the functions' addresses, which differ between the processes of a run
)  # fmt: skip
def test_what_cannot_be_called_is_refused(given: Any, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Rewards.of(given, None, ("answer",))
    assert told in str(refused.value) and refused.value.details["field"] == "reward"


def test_weights_and_names_of_columns_are_checked() -> None:
    with pytest.raises(ConfigError, match="reward_weights has 2 numbers for 1 rewards"):
        Rewards.of([of_words], [1.0, 2.0], ())
    with pytest.raises(ConfigError, match="the column 'completions' has the name of what reward functions are given"):
        Rewards.of([of_words], None, ("completions",))


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ([1.0], "reward '<lambda>' returned 1 numbers for 2 completions"),
        (1.0, "reward '<lambda>' returned a float, not a list"),
        (None, "reward '<lambda>' returned None, not a list"),
        ([1.0, math.nan], "Row 4: reward '<lambda>' returned nan for the completion 'two two', not a finite number"),
        ([math.inf, 1.0], "Row 3: reward '<lambda>' returned inf for the completion 'one'"),
        ([1e39, 1.0], "Row 3: reward '<lambda>' returned 1e+39 for the completion 'one', not a finite number"),
        ([10**400, 1.0], "Row 3: reward '<lambda>' returned 1000"),
        (["good", 1.0], "Row 3: reward '<lambda>' returned 'good' for the completion 'one'"),
    ],
    ids=range(8),
)  # fmt: skip
def test_what_is_no_number_for_each_completion_is_one_line(returned: Any, told: str) -> None:
    with pytest.raises(TrainingError) as refused:
        scored(lambda completions: returned)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_an_error_of_a_function_names_it_and_the_row() -> None:
    def first_digit(completions: Any) -> list[float]:
        return [float({"one": 1}[text]) for text in completions]

    with pytest.raises(TrainingError) as refused:
        scored(of_words, first_digit)
    assert str(refused.value) == "Row 4: reward 'first_digit' failed on the completion 'two two' (KeyError: 'two two')"
    assert refused.value.details["index"] == 4 and isinstance(refused.value.__cause__, KeyError)

    def together(completions: Any) -> list[float]:
        raise ValueError("two\nlines") if len(completions) > 1 else KeyError

    with pytest.raises(TrainingError, match=r"reward 'together' failed: ValueError: two lines"):
        scored(together)
