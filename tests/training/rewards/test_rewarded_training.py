"""Training on rewards: completions are generated, scored and learned, like any other training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaForSequenceClassification

import nbpeft
from nbpeft.errors import CheckpointError, ConfigError, NbpeftError, TrainingError
from nbpeft.sweeps import sweep
from nbpeft.training.loop.objective import with_objective
from nbpeft.training.loop.packing import longest_sequence
from nbpeft.training.objectives.grpo import Grpo
from nbpeft.training.objectives.log_probs import token_log_probs
from nbpeft.training.request import TrainRequest
from nbpeft.training.rewards import trainer as rollouts
from tests.closeness import assert_approximates, assert_close, is_close
from tests.tiny_models import same_state
from tests.training.objectives.trl_run import ROWS, filled
from tests.training.support import trainable, weights
from tests.training.trl_run import tiny_base, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in ROWS]
FIELDS: dict[str, Any] = {
    "tokenizer": TOKENIZER,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "seed": 5,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "max_completion_length": 5,
}


def even(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(word[-1] in "02468" for word in text.split())) for text in completions]


def short(completions: list[str]) -> list[float]:
    return [-float(len(text.split())) for text in completions]


def new(**config: Any) -> Any:
    return filled(trainable(tiny_base(), **config))


def losses(result: Any) -> list[float]:
    return [value for _, value in result.state.history]


def curve(result: Any, name: str) -> list[float]:
    return [value for _, value in result.state.series[name]]


def test_what_is_rewarded_becomes_more_likely() -> None:
    fields = FIELDS | {"max_steps": 25, "learning_rate": 5e-2, "per_device_train_batch_size": 16, "num_generations": 8}
    model = trainable(tiny_base(), r=8, target_modules=["down_proj", "lm_head"])
    result = nbpeft.train(model, PROMPTS, reward=even, loss_type="dr_grpo", lr_scheduler_type="constant", **fields)
    rewards = curve(result, "reward")
    assert sum(rewards[:5]) / 5 < 3 and sum(rewards[-5:]) / 5 > 4
    assert curve(result, "rewards/even/mean") == rewards


def test_the_result_and_the_curves_say_what_was_learned() -> None:
    result = nbpeft.train(new(), PROMPTS, reward=[even, short], reward_weights=[1.0, 0.5], **FIELDS)
    assert (result.objective, result.reference) == ("grpo", None)
    assert "because rewards are given" in result.message
    assert "rewards: even, short; columns not used" not in result.message and "rewards: even, short" in result.message
    assert set(result.state.series) >= {
        *("reward", "reward_std", "frac_reward_zero_std", "rewards/even/mean", "rewards/short/std"),
        *("completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean"),
    }
    parts = [curve(result, f"rewards/{name}/mean") for name in ("even", "short")]
    both = [first + 0.5 * second for first, second in zip(*parts, strict=True)]
    assert curve(result, "reward") == pytest.approx(both)


@pytest.mark.parametrize("without_dropout", [False, True])
def test_ratios_are_exactly_1_in_the_step_after_generation(
    without_dropout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    loss_of = Grpo.loss_of
    monkeypatch.setattr(Grpo, "loss_of", lambda self, batch: seen.append(batch) or loss_of(self, batch))
    fields = FIELDS | {"max_steps": 4, "num_iterations": 2, "disable_dropout": without_dropout}
    nbpeft.train(new(lora_dropout=0.2), PROMPTS, reward=even, **fields)
    same = [torch.equal(batch.log_probs, batch.earlier) for batch in seen]
    assert same == [True, False, True, False]


def test_completions_are_drawn_by_the_adapter_and_have_their_probabilities() -> None:
    """Without rewards that differ, nothing is learned; so all completions are of one policy."""
    model, drawn = new(), []

    def keep(completions: Any, prompts: Any, completion_ids: Any) -> list[float]:
        drawn.extend(completion_ids)
        return [0.0] * len(completions)

    fields = FIELDS | {"max_steps": 10, "max_completion_length": 1, "per_device_train_batch_size": 16}
    before = weights(model)
    with pytest.warns(UserWarning, match="had all completions of a prompt the same reward"):
        nbpeft.train(model, PROMPTS[:1], reward=keep, temperature=0.1, **fields)
    assert same_state(before, weights(model))
    ids = TOKENIZER(PROMPTS[0]["prompt"])["input_ids"]
    with torch.no_grad():
        expected = (model.eval()(input_ids=torch.tensor([ids])).logits[0, -1] / 0.1).softmax(-1)
    likely = expected.topk(10).indices.tolist()
    share = sum(tokens[0] in likely for tokens in drawn) / len(drawn)
    assert len(drawn) == 160
    # Four standard deviations of a share in 160 draws.
    assert_approximates(share, float(expected[likely].sum()), 0.16, scale=1.0)
    assert float(expected[likely].sum()) > 0.4


def test_prompts_of_different_lengths_are_completed_as_if_alone() -> None:
    """Greedy: the most likely token is drawn with top_k=1."""
    model = new()
    found: dict[str, str] = {}

    def keep(completions: Any, prompts: Any) -> list[float]:
        found.update(zip(prompts, completions, strict=True))
        return list(range(len(completions)))

    rows = [{"prompt": "w3 w4"}, {"prompt": " ".join(f"w{number}" for number in range(20, 34))}]
    nbpeft.train(model, rows, reward=keep, top_k=1, **FIELDS | {"max_steps": 1, "per_device_train_batch_size": 8})
    for row in rows:
        ids = torch.tensor([TOKENIZER(row["prompt"])["input_ids"]])
        answer = model.eval().generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert found[row["prompt"]] == TOKENIZER.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_columns_of_a_row_go_to_the_functions_with_its_completions() -> None:
    seen: list[Any] = []

    def exact(completions: Any, prompts: Any, answer: Any) -> list[float]:
        seen.extend(zip(prompts, answer, strict=True))
        return [float(abs(len(text) - len(wanted))) for text, wanted in zip(completions, answer, strict=True)]

    data = Dataset.from_list([{"question": row["prompt"], "answer": row["answer"]} for row in PROMPTS])
    nbpeft.train(new(), data, reward=exact, columns={"prompt": "question"}, **FIELDS)
    assert len(seen) == 12 and set(seen) <= {(row["prompt"], row["answer"]) for row in PROMPTS}


def test_columns_that_only_some_rows_have_are_none_in_others() -> None:
    seen: dict[str, Any] = {}

    def keep(prompts: Any, topic: Any, prompt: Any, completions: Any) -> list[float]:
        seen.update({asked: (one, other) for asked, one, other in zip(prompts, topic, prompt, strict=True)})
        return list(map(float, range(len(completions))))

    rows = [{"ask": "w1"}, {"ask": "w2", "topic": 5}, {"ask": "w3", "prompt": "w4"}]
    nbpeft.train(new(), rows, reward=keep, columns={"prompt": "ask"}, **FIELDS)
    assert seen == {"w1": (None, None), "w2": (5, None), "w3": (None, "w4")}


def test_conversations_are_asked_in_the_chat_template() -> None:
    seen: list[Any] = []

    def keep(completions: Any, prompts: Any) -> list[float]:
        seen.extend([completions[0], prompts[0]])
        return list(range(len(completions)))

    rows = [{"prompt": [{"role": "user", "content": "w1 w2"}]}]
    model = new()
    lengths: list[int] = []

    def measure(module: nn.Module, args: Any, keywords: Any) -> None:
        lengths.append(keywords["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(measure, with_kwargs=True)
    nbpeft.train(model, rows, reward=keep, **FIELDS | {"max_steps": 1, "max_completion_length": 1})
    handle.remove()
    assert seen[0][0]["role"] == "assistant" and seen[1] == rows[0]["prompt"]
    assert lengths[-1] == 5  # user mark, two words, assistant mark, and the completion


def test_a_step_computes_logits_of_completions_only_once_and_in_chunks() -> None:
    sizes: list[tuple[bool, int]] = []
    learned: list[int] = []

    def counting(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        learned.append(sum(map(len, completion_ids)))
        return even(completions)

    def trained(chunk_size: int) -> list[float]:
        sizes.clear()
        learned.clear()
        model = new()
        head = model.get_output_embeddings()
        inside = head.forward

        def counted(hidden: torch.Tensor) -> torch.Tensor:
            sizes.append((head.training, hidden[..., 0].numel()))
            return inside(hidden)

        head.forward = counted
        return losses(nbpeft.train(model, PROMPTS, reward=counting, loss_chunk_size=chunk_size, **FIELDS))

    whole = trained(0)
    assert max(size for _, size in sizes) > 8
    assert_close(trained(2), whole)
    assert max(size for _, size in sizes) <= 4  # of each prompt one token is generated at a time
    in_steps = sum(size for in_step, size in sizes if in_step)
    assert in_steps == sum(learned) + 3  # and one row a step, to find out whether the head is trained


def test_a_trained_head_has_the_gradients_of_whole_logits() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, 6, 7, 8], [-100, -100, 11, -100]]),
    }
    found = []
    for chunk_size in (2, 0):
        model = new(target_modules=["q_proj", "lm_head"])
        values = token_log_probs(model, batch, temperature=0.7, chunk_size=chunk_size)
        (values * torch.linspace(-1, 2, 6).view(2, 3)).square().sum().backward()
        found.append((values, {name: part.grad for name, part in model.named_parameters() if part.requires_grad}))
    assert_close(found[0][0], found[1][0])
    assert all(is_close(part, found[1][1][name]) for name, part in found[0][1].items())


@pytest.mark.parametrize("fields", [{}, {"num_iterations": 2, "beta": 0.1}, {"num_iterations": 3}], ids=str)
def test_a_stopped_training_is_resumed_to_the_bit(fields: dict[str, Any], tmp_path: Path) -> None:
    every = FIELDS | {"max_steps": 7, "output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 5}
    through, first = new(lora_dropout=0.1), new(lora_dropout=0.1)
    whole = nbpeft.train(through, PROMPTS, reward=even, **every, **fields)
    torch.manual_seed(99)  # of a new process
    rest = nbpeft.train(
        first, PROMPTS, reward=even, **every, **fields, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5")
    )
    assert losses(rest)[-2:] == losses(whole)[-2:] and len(losses(whole)) == 7
    assert same_state(weights(first), weights(through))


def test_a_checkpoint_without_the_completions_to_learn_again_is_refused(tmp_path: Path) -> None:
    fields = FIELDS | {"max_steps": 4, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 3}
    nbpeft.train(new(), PROMPTS, reward=even, **fields)
    with pytest.raises(CheckpointError, match="written with another num_iterations than 2"):
        again = str(tmp_path / "checkpoint-3")
        nbpeft.train(new(), PROMPTS, reward=even, num_iterations=2, resume_from_checkpoint=again, **fields)


def test_a_run_on_disk_keeps_completions_and_is_resumed_with_the_functions(tmp_path: Path) -> None:
    result = nbpeft.train(new(), PROMPTS, reward=[even], run_dir=tmp_path, **FIELDS)
    from nbpeft.runs.store import RunStore

    store = RunStore(tmp_path)
    (record,) = store.records()
    folder = store.find(record.name)
    assert folder.facts()["objects"] == ["reward"] and folder.facts()["arguments"]["num_generations"] == 4
    kept = folder.samples(3)
    assert kept == result.state.samples and all(sample.reward is not None for sample in kept)


def test_the_best_and_the_worst_completion_of_a_prompt_are_shown() -> None:
    result = nbpeft.train(new(), PROMPTS, reward=even, **FIELDS)
    pairs = [result.state.samples[place : place + 2] for place in range(0, 6, 2)]
    assert [best.step for best, _ in pairs] == [1, 2, 3]
    for best, worst in pairs:
        assert best.prompt == worst.prompt and best.reward >= worst.reward
        assert even([best.answer, worst.answer]) == [best.reward, worst.reward]


def test_an_error_of_a_function_keeps_the_weights_before_its_step() -> None:
    model, calls = new(), [0]
    one = new()
    nbpeft.train(one, PROMPTS, reward=even, **FIELDS | {"max_steps": 1, "lr_scheduler_type": "constant"})

    def fails(completions: Any) -> list[float]:
        calls[0] += 1
        return even(completions) if calls[0] == 1 else [1 / 0]

    with pytest.raises(TrainingError, match=r"Row \d+: reward 'fails' failed on the completion .* \(ZeroDivisionError"):
        nbpeft.train(model, PROMPTS, reward=fails, **FIELDS | {"lr_scheduler_type": "constant"})
    assert same_state(weights(model), weights(one))
    before = weights(model := new())
    with pytest.raises(TrainingError, match="returned 0 numbers for 4 completions"):
        nbpeft.train(model, PROMPTS, reward=lambda completions: [], **FIELDS)
    assert same_state(weights(model), before) and model.training


def test_a_model_that_cannot_generate_is_one_line() -> None:
    model = new()
    before = weights(model)

    def fails(module: nn.Module, *rest: Any) -> None:
        raise RuntimeError("no\ncache")

    handle = model.get_output_embeddings().register_forward_pre_hook(fails)
    with pytest.raises(TrainingError, match="LlamaForCausalLM cannot generate completions: RuntimeError: no cache"):
        nbpeft.train(model, PROMPTS, reward=even, **FIELDS)
    handle.remove()
    assert same_state(weights(model), before)


def test_a_model_whose_cache_computes_something_else_is_refused() -> None:
    model = new()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)

    def forgets(module: nn.Module, args: Any, keywords: dict[str, Any]) -> Any:
        ids = keywords.get("input_ids")
        if ids is not None and ids.shape[1] == 1:  # a token after a cached prompt
            return args, {**keywords, "input_ids": (ids + 40) % 80}
        return None

    nbpeft.train(model, PROMPTS, reward=even, **FIELDS | {"max_steps": 1})
    before = weights(model)
    handle = model.get_base_model().register_forward_pre_hook(forgets, with_kwargs=True)
    with pytest.raises(TrainingError, match="LlamaForCausalLM generates other tokens with its cache than without it"):
        nbpeft.train(model, PROMPTS, reward=even, **FIELDS)
    handle.remove()
    assert same_state(weights(model), before)


def test_the_length_of_a_step_is_not_that_of_the_prompts() -> None:
    with pytest.raises(TrainingError, match="these rows have prompts alone, of up to 3 tokens: give a sequence length"):
        longest_sequence(tiny_base(), [{"prompt": "w1 w2 w3"}], tokenizer=TOKENIZER)


def test_stop_and_an_interrupt_end_a_generation() -> None:
    control = nbpeft.training.RunControl()
    model, generated, later = new(), [0], []

    def stops(module: nn.Module, *rest: Any) -> None:
        if control.stop_requested:
            later.append(module.training)
        generated[0] += not module.training
        if generated[0] == 16:
            control.request_stop()

    handle = model.get_output_embeddings().register_forward_pre_hook(stops)
    result = nbpeft.train(model, PROMPTS, reward=even, control=control, **FIELDS | {"max_steps": 9})
    assert result.status == "stopped" and 1 <= result.steps <= 8 and later == []
    handle.remove()

    def interrupts(module: nn.Module, *rest: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_output_embeddings().register_forward_pre_hook(interrupts)
    before = weights(model)
    with pytest.raises(nbpeft.errors.TrainingInterrupted):
        nbpeft.train(model, PROMPTS, reward=even, **FIELDS)
    handle.remove()
    assert same_state(weights(model), before)


def test_evaluation_has_the_rewards_by_which_the_best_state_is_found() -> None:
    result = nbpeft.train(new(), PROMPTS[:8], PROMPTS[8:], reward=even, eval_steps=1, patience=3, **FIELDS)
    assert set(result.state.metrics) == {"eval_reward"}
    values = dict(result.state.metric_history["eval_reward"])
    assert result.state.best_step == max(values, key=lambda step: (values[step], -step))
    assert len(curve(result, "reward")) == 3


def test_each_evaluation_row_counts_the_same() -> None:
    rows = [{"prompt": f"w{number}", "points": points} for number, points in enumerate((0.0, 0.0, 9.0))]
    fields = FIELDS | {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}

    def given(completions: list[str], points: list[float | None]) -> list[float]:
        drawn = even(completions)  # of training rows, which differ
        return [value if point is None else point for value, point in zip(drawn, points, strict=True)]

    for size in (8, 2):  # two prompts at a time, and two batches
        learned = [{**row, "points": None} for row in PROMPTS]
        result = nbpeft.train(new(), learned, rows, reward=given, per_device_eval_batch_size=size, **fields)
        assert result.state.metrics["eval_reward"] == pytest.approx(3)


def test_another_metric_than_the_reward_keeps_its_direction() -> None:
    for given, chosen in (({}, "reward"), ({"metric_for_best_model": "loss"}, "loss")):
        request = with_objective(TrainRequest.of(new(), PROMPTS, 2, reward=even, **given, **FIELDS))
        assert request.arguments["metric_for_best_model"] == chosen and "greater_is_better" not in request.arguments


def test_a_divergence_from_the_reference_is_a_curve() -> None:
    result = nbpeft.train(new(), PROMPTS, reward=even, beta=0.1, **FIELDS)
    assert result.reference == "start" and curve(result, "kl")[0] == 0 < curve(result, "kl")[-1]
    fresh = nbpeft.train(trainable(tiny_base()), PROMPTS, reward=even, beta=0.1, **FIELDS)
    assert fresh.reference == "base" and curve(fresh, "kl")[0] == 0


def test_cut_completions_are_left_out_where_the_cell_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    loss_of = Grpo.loss_of
    monkeypatch.setattr(Grpo, "loss_of", lambda self, batch: seen.append(batch) or loss_of(self, batch))
    ends: list[bool] = []
    made = rollouts.generated

    def kept(*args: Any) -> Any:
        found = made(*args)
        ends.extend(row.ended for row in found)
        return found

    monkeypatch.setattr(rollouts, "generated", kept)
    fields = FIELDS | {"max_completion_length": 40, "max_steps": 2}
    nbpeft.train(new(), PROMPTS, reward=even, mask_truncated_completions=True, **fields)
    learned = [bool(row.any()) for batch in seen for row in batch.mask]
    assert learned == ends and set(ends) == {True, False}


@pytest.mark.filterwarnings("ignore:No weight of adapter")
def test_a_step_whose_completions_are_all_cut_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = rollouts.generated
    cut = lambda *args: [replace(row, ended=False) for row in made(*args)]  # noqa: E731
    monkeypatch.setattr(rollouts, "generated", cut)
    options = FIELDS | {"max_steps": 1}
    result = nbpeft.train(new(), PROMPTS, reward=even, mask_truncated_completions=True, **options)
    assert "nothing is learned from steps whose completions are all cut" in result.message
    assert "are all cut" not in nbpeft.train(new(), PROMPTS, reward=even, **options).message


def test_prompts_that_are_too_long_or_empty_are_left_out_and_named() -> None:
    rows = [*PROMPTS, {"prompt": " "}, {"prompt": "w1 w2 w3 w4 w5"}]
    result = nbpeft.train(new(), rows, reward=even, max_length=4, **FIELDS)
    assert "2 rows left out" in result.message and "the prompt is empty" in result.message
    assert "its prompt has 5 tokens, and at most 4 are read" in result.message


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig", "IA3Config", "AdaptionPromptConfig"])
def test_adapters_of_other_methods_learn_from_rewards(method: str) -> None:
    more: Any = {
        "PromptTuningConfig": {"num_virtual_tokens": 3},
        "PrefixTuningConfig": {"num_virtual_tokens": 3},
        "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "AdaptionPromptConfig": {"adapter_len": 3, "adapter_layers": 1, "target_modules": ["self_attn"]},
    }[method]
    torch.manual_seed(1)
    model = nbpeft.get_peft_model(tiny_base(), getattr(nbpeft, method)(task_type="CAUSAL_LM", **more)).train()
    before = weights(model)
    result = nbpeft.train(model, PROMPTS, reward=even, **FIELDS)
    assert result.steps == 3 and all(map(math.isfinite, losses(result))) and not same_state(weights(model), before)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"reward": None}, "grpo needs reward"),
    ({"objective": "sft"}, "reward requires objective='grpo', but the objective is sft"),
    ({"num_generations": 3}, "num_generations=3 does not divide the 4 completions of a step"),
    ({"num_generations": 8}, "per_device_train_batch_size=8, or num_generations=4"),
    ({"gradient_accumulation_steps": 2, "num_generations": 5}, "the 8 completions of a step"),
    ({"num_generations": 1}, "num_generations must be a whole number of at least 2, not 1"),
    ({"num_generations": 2.0}, "num_generations must be a whole number of at least 2, not 2.0"),
    ({"top_k": -1}, "top_k must be a whole number of at least 0, not -1"),
    ({"temperature": 0}, "temperature must be greater than 0, not 0"),
    ({"top_p": 1.5}, "top_p must be greater than 0 and at most 1, not 1.5"),
    ({"min_p": -0.5}, "min_p must be from 0 to 1, not -0.5"),
    ({"epsilon": 1}, "epsilon must be at least 0 and less than 1, not 1"),
    ({"loss_type": "dapp"}, "loss_type must be one of dapo, grpo, dr_grpo, bnpo, not 'dapp'. Did you mean 'dapo'?"),
    (
        {"scale_rewards": "groups"},
        "scale_rewards must be one of group, batch, none, True, False, not 'groups'. Did you mean 'group'?",
    ),
    ({"scale_rewards": 1}, "scale_rewards must be one of group, batch, none, True, False, not 1."),
    ({"reward_weights": 2.0}, "reward_weights must be a list of numbers, not 2.0"),
    ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for 1 rewards"),
    ({"use_bias_correction_kl": False}, "use_bias_correction_kl is for the divergence from a reference"),
    ({"packing": True}, "packing cannot be combined with grpo: its batches are completions"),
    ({"processes": 2}, "processes cannot be combined with grpo: it trains in one process"),
    ({"reference": "base"}, "objective='grpo' with beta=0.0 uses no reference"),
    ({"learning_rate": sweep(1e-3, 1e-2)}, "grpo trains one adapter"),
    (
        {"train_sampling_strategy": "group_by_length"},
        "'group_by_length' cannot be combined with grpo",
    ),
    ({"tokenizer": None}, "grpo needs a tokenizer"),
    ({"label_smoothing": 0.1}, "'label_smoothing' is a field of"),
]


@pytest.mark.parametrize(("given", "told"), REFUSED, ids=[told[:40] for _, told in REFUSED])
def test_what_does_not_go_together_is_refused_before_the_first_step(given: dict[str, Any], told: str) -> None:
    model = new()
    before, training = weights(model), model.training
    with pytest.raises(NbpeftError) as refused:
        nbpeft.train(model, PROMPTS, **FIELDS | {"reward": even, "objective": "grpo"} | given)
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert same_state(weights(model), before) and model.training is training


def test_rows_and_models_of_another_kind_are_refused() -> None:
    grpo = {"objective": "grpo", "reward": even}
    for rows, told in (
        ([{"input_ids": [5, 6]}], "not tokenized rows"),
        ([{"question": "w1"}], "Expected a column prompt; found 'question'. Say which is which: columns={'prompt'"),
        ([{"prompt": [{"role": "assistant", "content": "w1"}]}], "the prompt ends with the assistant's answer"),
        ([{"prompt": "w1", "image": "x.png"}], "'image' cannot be trained on"),
        (Dataset.from_list(PROMPTS).to_iterable_dataset(), "a stream yields each once"),
    ):
        with pytest.raises(NbpeftError) as refused:
            nbpeft.train(new(), rows, **FIELDS, **grpo)
        assert told in str(refused.value)
    classifier = trainable(tiny_base(LlamaForSequenceClassification), task_type="SEQ_CLS")
    with pytest.raises(TrainingError, match="needs a causal language model"):
        nbpeft.train(classifier, PROMPTS, **FIELDS, **grpo)
    poly = nbpeft.PolyConfig(r=2, n_tasks=2, n_skills=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(TrainingError, match="grpo generates completions without task_ids"):
        nbpeft.train(nbpeft.get_peft_model(tiny_base(), poly), PROMPTS, **FIELDS, **grpo)
    with pytest.raises(ConfigError, match="the rows have only prompts: pass reward="):
        nbpeft.train(new(), [{"prompt": "w1"}], tokenizer=TOKENIZER)
