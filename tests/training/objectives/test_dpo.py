"""Training on preferences: its losses, its reference, and everything else of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback, TrainingArguments

import nbpeft
from nbpeft import LoraConfig
from nbpeft.checkpoint import fingerprint
from nbpeft.checkpoint.tensor_file import write_tensors
from nbpeft.display.numbers import metric
from nbpeft.display.training import member_rows, training_text
from nbpeft.errors import CheckpointError, ConfigError, NbpeftError, TrainingError
from nbpeft.sweeps import combinations, sweep
from nbpeft.training import RunControl
from nbpeft.training.objectives import objective as registry
from nbpeft.training.objectives.log_probs import log_probs
from nbpeft.training.objectives.objective import Objective, objective_named, register
from nbpeft.training.objectives.reference import OfAnAdapter, OfTheStart
from nbpeft.training.objectives.reference_cache import KnownLogProbs, digests_of
from nbpeft.training.transformers import objective_trainer
from tests.closeness import assert_close, is_close
from tests.tiny_models import same_state
from tests.training.objectives.trl_run import ROWS, filled
from tests.training.support import trainable, weights
from tests.training.trl_run import tiny_base, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
FIELDS: dict[str, Any] = {"tokenizer": TOKENIZER, "max_steps": 3, "learning_rate": 1e-2, "seed": 5}
LN2 = math.log(2)


def new(**config: Any) -> Any:
    return trainable(tiny_base(), **config)


def losses(result: Any) -> list[float]:
    return [value for _, value in result.state.history]


def plain_log_prob(model: Any, row: dict[str, str], name: str) -> torch.Tensor:
    """The log-probability of a completion, from a plain forward."""
    prompt, completion = (TOKENIZER(row[key])["input_ids"] for key in ("prompt", name))
    ids = torch.tensor([[*prompt, *completion, TOKENIZER.eos_token_id]])
    found = F.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
    return found.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


EXPECTED = {
    "sigmoid": lambda margin, counts: F.softplus(-margin),
    "hinge": lambda margin, counts: (1 - margin).clamp(min=0),
    "robust": lambda margin, counts: (0.8 * F.softplus(-margin) - 0.2 * F.softplus(margin)) / 0.6,
}


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "robust", "ipo", "smoothed"])
def test_the_first_loss_is_that_of_log_probabilities_of_plain_forwards(loss_type: str) -> None:
    model, row, beta = filled(new()), ROWS[4], 0.4
    with torch.no_grad():
        policy = [plain_log_prob(model, row, name) for name in ("chosen", "rejected")]
        with model.disable_adapter():
            base = [plain_log_prob(model, row, name) for name in ("chosen", "rejected")]
    ratios = [ours - theirs for ours, theirs in zip(policy, base, strict=True)]
    margin = beta * (ratios[0] - ratios[1])
    if loss_type == "ipo":
        counts = [len(row[name].split()) + 1 for name in ("chosen", "rejected")]
        expected = (ratios[0] / counts[0] - ratios[1] / counts[1] - 1 / (2 * beta)) ** 2
    elif loss_type == "smoothed":
        expected = 0.8 * F.softplus(-margin) + 0.2 * F.softplus(margin)
    else:
        expected = EXPECTED[loss_type](margin, None)
    fields = {"loss_type": "sigmoid" if loss_type == "smoothed" else loss_type, "beta": beta}
    fields |= {"label_smoothing": 0.2} if loss_type in ("smoothed", "robust") else {}
    result = nbpeft.train(model, [row], objective="dpo", reference="base", **FIELDS | {"max_steps": 1}, **fields)
    assert_close(losses(result), [float(expected)])
    chosen = result.state.series["rewards/chosen"][0][1]
    assert_close(chosen, beta * float(ratios[0]))


def test_a_fresh_adapter_starts_at_ln_2_against_the_base_which_the_result_says() -> None:
    result = nbpeft.train(new(lora_dropout=0.5), ROWS, **FIELDS)
    assert_close(losses(result)[0], LN2)
    assert losses(result)[-1] < LN2
    assert (result.objective, result.reference) == ("dpo", "base")
    told = "objective: dpo, because the rows have chosen and rejected; reference: base (the model without adapters)"
    assert told in result.message
    assert set(result.state.series) >= {
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected"),
    }


@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.5}, {"use_dora": True}], ids=str)
def test_a_trained_adapter_starts_at_ln_2_against_itself(config: dict[str, Any]) -> None:
    result = nbpeft.train(filled(new(**config)), ROWS, **FIELDS)
    assert_close(losses(result)[0], LN2)
    assert result.reference == "start" and "reference: start (the adapter's weights at the beginning)" in result.message


def test_another_adapter_is_the_reference_and_stays_as_it_is() -> None:
    model = filled(new())
    model.add_adapter("other", nbpeft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before, named = weights(model, "other"), {}
    model.set_adapter("default")
    with torch.no_grad():
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            named[adapter] = [plain_log_prob(model, ROWS[0], name) for name in ("chosen", "rejected")]
    model.set_adapter("default")
    result = nbpeft.train(model, ROWS[:1], reference="other", **FIELDS | {"max_steps": 1})
    ours, theirs = named["default"], named["other"]
    margin = 0.1 * (ours[0] - ours[1] - theirs[0] + theirs[1])
    assert_close(losses(result), [float(F.softplus(-margin))])
    assert same_state(weights(model, "other"), before) and result.reference == "other"


def test_the_copy_of_the_start_stays_as_it_was_while_the_adapter_learns() -> None:
    model = filled(new())
    before = weights(model)
    reference = OfTheStart(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    learned = weights(model)
    with reference.active():
        assert same_state(weights(model), before)
    assert same_state(weights(model), learned)
    with pytest.raises(KeyboardInterrupt), reference.active():
        raise KeyboardInterrupt
    assert same_state(weights(model), learned)


def test_accumulated_batches_have_the_losses_and_weights_of_whole_ones() -> None:
    whole, parts = filled(new()), filled(new())
    usual = FIELDS | {"train_sampling_strategy": "sequential"}
    one = nbpeft.train(whole, ROWS, per_device_train_batch_size=4, **usual)
    two = nbpeft.train(parts, ROWS, per_device_train_batch_size=2, gradient_accumulation_steps=2, **usual)
    assert_close(losses(two), losses(one))


def test_dropout_is_off_in_layers_that_are_computed_again() -> None:
    found = []
    for config in ({}, {"gradient_checkpointing": True}, {"recompute": False}):
        model = filled(new(lora_dropout=0.5))
        nbpeft.train(model, ROWS, **FIELDS, **config)
        found.append(weights(model))
    assert all(is_close(part, found[0][name]) for other in found for name, part in other.items())


def test_dropout_is_on_where_the_cell_says_so() -> None:
    first = [
        losses(nbpeft.train(filled(new(lora_dropout=0.5)), ROWS, disable_dropout=off, **FIELDS))[0]
        for off in (False, True)
    ]
    assert abs(first[0] - LN2) > 1e-3
    assert_close(first[1], LN2)


def test_tokenised_rows_with_both_completions_are_taken_as_they_are() -> None:
    ids = [TOKENIZER(ROWS[4]["prompt"] + ROWS[4][name])["input_ids"] + [1] for name in ("chosen", "rejected")]
    labels = [[-100] * 3 + part[3:] for part in ids]
    row = {"input_ids": ids[0], "labels": labels[0], "rejected_input_ids": ids[1], "rejected_labels": labels[1]}
    found = [losses(nbpeft.train(filled(new()), [rows], reference="base", **FIELDS)) for rows in (row, ROWS[4])]
    assert found[0] == found[1]


def test_the_task_of_a_row_is_that_of_both_completions() -> None:
    config = nbpeft.PolyConfig(r=2, n_tasks=2, n_skills=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    rows = [{**row, "task_ids": number % 2} for number, row in enumerate(ROWS)]
    torch.manual_seed(1)
    model = nbpeft.get_peft_model(tiny_base(), config).train()
    batches: list[Any] = []
    handle = model.register_forward_pre_hook(lambda *call: batches.append(call[2].get("task_ids")), with_kwargs=True)
    nbpeft.train(model, rows, per_device_train_batch_size=2, **FIELDS)
    handle.remove()
    assert batches and all(
        part is not None and part.chunk(2)[0].tolist() == part.chunk(2)[1].tolist() for part in batches
    )


def test_a_stream_of_preferences_is_trained_on() -> None:
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    result = nbpeft.train(new(), stream, **FIELDS)
    assert (result.objective, result.reference, result.steps) == ("dpo", "base", 3)
    assert_close(losses(result)[0], LN2)


@pytest.mark.parametrize("method", ["PromptTuningConfig", "IA3Config", "AdaLoraConfig", "VeraConfig"])
def test_adapters_of_other_methods_start_at_ln_2_too(method: str) -> None:
    more = {
        "PromptTuningConfig": {"num_virtual_tokens": 3},
        "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "AdaLoraConfig": {"target_modules": ["q_proj"], "total_step": 3, "orth_reg_weight": 0.0},
        "VeraConfig": {"target_modules": ["q_proj"], "r": 4},
    }[method]
    torch.manual_seed(1)
    model = nbpeft.get_peft_model(tiny_base(), getattr(nbpeft, method)(task_type="CAUSAL_LM", **more)).train()
    result = nbpeft.train(model, ROWS, **FIELDS)
    assert_close(losses(result)[0], LN2)
    assert result.reference == ("start" if method == "PromptTuningConfig" else "base")


def test_gradients_are_those_of_logits_as_a_whole() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, 6, 7, 8], [-100, -100, 11, -100]]),
    }
    found = []
    for chunk_size in (2, 0):
        model = filled(new())
        values = log_probs(model, batch, chunk_size=chunk_size)
        (values * torch.tensor([0.3, -2.0])).sum().backward()
        found.append((values, {name: part.grad for name, part in model.named_parameters() if part.requires_grad}))
    assert_close(found[0][0], found[1][0])
    assert all(is_close(part, found[1][1][name]) for name, part in found[0][1].items())


def test_evaluation_has_the_rewards_and_patience_ends_the_training() -> None:
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    result = nbpeft.train(filled(new()), ROWS, swapped, patience=1, eval_steps=1, **FIELDS | {"max_steps": 6})
    assert result.steps < 6 and result.eval_loss > LN2
    assert set(result.state.metrics) == {"eval_rewards/accuracies", "eval_rewards/margins"}


def test_samples_are_answered_meanwhile() -> None:
    result = nbpeft.train(new(), ROWS, sample="w1 w2", every=2, **FIELDS)
    assert {sample.step for sample in result.state.samples} == {2, 3}


@pytest.mark.parametrize("config", [{"reference": "start"}, {"reference": "base"}, {"reference": "other"}], ids=str)
def test_a_stopped_training_is_resumed_to_the_bit(
    config: dict[str, str], tmp_path: Path, computed: list[torch.Tensor]
) -> None:
    fields = FIELDS | {"max_steps": 8, "output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 3}
    fields["per_device_train_batch_size"] = 3  # so that batches of later epochs have other rows

    def model() -> Any:
        found = filled(new(lora_dropout=0.1))
        found.add_adapter("other", nbpeft.LoraConfig(r=2, target_modules=["q_proj"]))
        filled(found)
        found.set_adapter("default")
        return found

    through, first = model(), model()
    whole = nbpeft.train(through, ROWS, **fields, **config)
    again = str(tmp_path / "out" / "checkpoint-3")
    with torch.no_grad():  # what the adapter is now does not matter
        for name, parameter in first.named_parameters():
            parameter.mul_(2.0 if ".default." in name else 1.0)
    rest = nbpeft.train(first, ROWS, resume_from_checkpoint=again, **fields, **config)
    assert losses(rest)[-5:] == losses(whole)[-5:]
    assert len(computed) == 2 * -(-len(ROWS) // 3) - 3
    assert same_state(weights(first), weights(through))


def test_a_resumed_training_refuses_another_reference(tmp_path: Path) -> None:
    fields = FIELDS | {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    nbpeft.train(filled(new()), ROWS, reference="base", **fields)
    model = filled(new())
    with pytest.raises(CheckpointError, match="its training had another reference than 'start'"):
        nbpeft.train(model, ROWS, reference="start", resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **fields)
    fields["output_dir"] = str(tmp_path / "other")
    nbpeft.train(filled(new()), ROWS, reference="start", **fields)
    again = str(tmp_path / "other" / "checkpoint-2")
    with pytest.raises(CheckpointError, match="had another reference than 'base'"):
        nbpeft.train(model, ROWS, reference="base", resume_from_checkpoint=again, **fields)


def test_the_adapters_of_a_sweep_have_the_curves_that_each_has_alone() -> None:
    result = nbpeft.train(filled(new()), ROWS, reference="base", **FIELDS | {"beta": sweep(0.1, 0.5)})
    alone = {
        member.name: nbpeft.train(
            filled(new()), ROWS, reference="base", **FIELDS | {"beta": float(member.settings["beta"])}
        )
        for member in result.members
    }
    for name in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert name not in result.state.series
        for adapter, own in alone.items():
            assert_close(dict(result.state.series[f"{name}/{adapter}"]), dict(own.state.series[name]))


def test_a_sweep_is_judged_by_the_figures_of_its_best_adapter() -> None:
    result = nbpeft.train(filled(new()), ROWS, reference="base", **FIELDS | {"learning_rate": sweep(1e-2, 3e-2)})
    state = result.state
    margin = state.series[f"rewards/margins/{result.best}"][-1][1]
    assert state.figures["rewards/margins"] == margin and state.figures["loss"] == state.best_member.smoothed_loss
    assert f"best {result.best} (rewards/margins {metric(margin)}, " in str(result)
    assert f"best {result.best} · rewards/margins {metric(margin)} · " in training_text(state)
    head, rows, _ = member_rows(state)
    assert dict(zip(head, dict(rows)[result.best], strict=True))["rewards/margins"] == metric(margin)


def test_the_adapters_of_a_sweep_have_the_losses_that_each_has_alone() -> None:
    model = new()
    result = nbpeft.train(model, ROWS, **FIELDS | {"learning_rate": sweep(1e-2, 3e-2)})
    assert (result.objective, result.reference) == ("dpo", "base")
    for member, rate in zip(result.members, (1e-2, 3e-2), strict=True):
        alone = nbpeft.train(new(), ROWS, **FIELDS | {"learning_rate": rate})
        assert_close([value for _, value in member.history], losses(alone))


@pytest.mark.parametrize(
    "fields", [{"beta": sweep(0.1, 0.5)}, {"learning_rate": sweep(1e-2, 3e-2), "loss_type": sweep("sigmoid", "hinge")}]
)
def test_adapters_with_other_fields_of_the_objective_learn_what_they_would_alone(
    fields: dict[str, Any], computed: list[torch.Tensor]
) -> None:
    model = new()
    result = nbpeft.train(model, ROWS[3:], ROWS[:3], **FIELDS | fields)
    assert len(computed) == 2 + 1  # each batch of an epoch once for all adapters, and that of evaluations
    values = list(combinations(fields))
    for member, own in zip(result.members, values, strict=True):
        alone = new()
        expected = nbpeft.train(alone, ROWS[3:], ROWS[:3], **FIELDS | own)
        assert [value for _, value in member.history] == losses(expected)
        assert member.eval_loss == expected.eval_loss
        pairs = zip(model.manager.parameters(member.name), alone.manager.parameters("default"), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    assert dict(result.best_fields) in values and "beta=" not in result.message


@pytest.mark.parametrize("reference", ["base", "start"])
def test_the_reference_of_a_row_is_computed_in_one_epoch(
    reference: str, computed: list[torch.Tensor], monkeypatch: Any
) -> None:
    fields = FIELDS | {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 3}
    once, again = filled(new()), filled(new())
    result = nbpeft.train(once, ROWS, reference=reference, **fields)
    steps = -(-len(ROWS) // 3)
    assert len(computed) == steps and len(losses(result)) == 3 * steps
    monkeypatch.setattr(KnownLogProbs, "of", lambda *args: None)
    expected = nbpeft.train(again, ROWS, reference=reference, **fields)
    assert len(computed) == steps + 3 * steps
    assert_close(losses(result), losses(expected))
    assert losses(result)[:steps] == losses(expected)[:steps]


def test_rows_of_a_stream_are_not_kept(computed: list[torch.Tensor]) -> None:
    stream = Dataset.from_list(ROWS[:4]).to_iterable_dataset()
    nbpeft.train(new(), stream, per_device_train_batch_size=4, **FIELDS)
    assert len(computed) == 3


def test_a_batch_with_a_new_row_is_computed(computed: list[torch.Tensor]) -> None:
    fields = FIELDS | {"max_steps": 4, "per_device_train_batch_size": 2, "dataloader_drop_last": True}
    nbpeft.train(new(), ROWS[:3], train_sampling_strategy="random", **fields)
    seen = {tuple(row.tolist()) for batch in computed for row in batch}
    assert 2 <= len(computed) <= 3 and len(seen) >= 4


def test_with_shards_all_compute_unless_each_process_knows_its_batch(
    computed: list[torch.Tensor], monkeypatch: Any
) -> None:
    monkeypatch.setattr(objective_trainer, "is_sharded", lambda model: True)
    fields = FIELDS | {"max_steps": 2, "per_device_eval_batch_size": 1, "eval_steps": 2}
    nbpeft.train(new(), ROWS[:4], [ROWS[5], ROWS[5]], **fields)
    assert len(computed) == 1 + 1
    reduce: Any = Accelerator.reduce
    monkeypatch.setattr(Accelerator, "reduce", lambda *args: 0 * reduce(*args))  # another process does not know its own
    nbpeft.train(new(), ROWS[:4], [ROWS[5], ROWS[5]], **fields)
    assert len(computed) == 2 + 2 + 2


def test_known_log_probabilities_are_those_of_the_same_inputs_and_of_a_checkpoint(tmp_path: Path) -> None:
    batch = {name: torch.tensor([[1, 2, 0]]) for name in ("input_ids", "labels")}
    batch |= {"attention_mask": torch.tensor([[1, 1, 0]]), "task_ids": torch.tensor([0])}
    shorter = {name: values[..., :2] if values.ndim > 1 else values for name, values in batch.items()}
    (digest,) = digests_of(batch)
    assert digests_of(shorter) == [digest]
    others = [digests_of(batch | {"task_ids": torch.tensor([1])}), digests_of(batch, "a")]
    others += [digests_of(batch | {"pixels": torch.full((1, 2), value, dtype=torch.bfloat16)}) for value in (1, 2)]
    assert len({one for (one,) in others}) == 4
    assert all(other != [digest] for other in others)
    known, model = KnownLogProbs(), new()
    known.write(tmp_path, model)
    assert not [*tmp_path.iterdir()]
    known.add([(digest, 0.1), (others[0][0], 2.0)], torch.float64)
    known.write(tmp_path, model)
    restored = KnownLogProbs()
    restored.read(tmp_path, model)
    found = restored.of([others[0][0], digest])
    assert found is not None and found.tolist() == [2.0, 0.1] and found.dtype == torch.float64
    assert restored.of([digest, others[1][0]]) is None
    changed: Any = new()
    changed.get_base_model().lm_head.weight.data.mul_(2)
    restored.read(tmp_path, changed)
    assert restored.of([digest]) is None
    (file,) = tmp_path.iterdir()
    base, part = fingerprint(model.manager.model).to_metadata(), torch.zeros(2, 16, dtype=torch.uint8)
    write_tensors(file, {"digests": part, "log_probs": torch.zeros(3)}, base)
    with pytest.raises(CheckpointError, match="does not have a log-probability for each digest"):
        restored.read(tmp_path, model)


@pytest.mark.parametrize(("scale", "factor", "what"), [(5.0, 1.0, "scaling"), (1.0, 5.0, "weights")])
def test_an_adapter_that_changed_is_not_the_reference_of_a_resumed_training(
    scale: float, factor: float, what: str, tmp_path: Path
) -> None:
    model: Any = filled(new())
    reference = OfAnAdapter(model.manager, "default")
    reference.write(tmp_path)
    reference.read(tmp_path)
    for parameter in model.manager.parameters("default"):
        parameter.data.mul_(factor)
    for layer in model.manager.layers.values():
        layer.set_scale("default", scale)
    with pytest.raises(CheckpointError, match=f"the reference 'default' has (an)?other {what} than when"):
        reference.read(tmp_path)


def test_given_adapters_have_their_own_fields_of_the_objective() -> None:
    model, members = new(), {"a": {"beta": 0.2}, "b": {"beta": 0.4, "learning_rate": 3e-2}}
    for name in members:
        model.add_adapter(name, LoraConfig(r=4, target_modules=["q_proj"]))
    result = nbpeft.train(model, ROWS, members=members, **FIELDS)
    assert [member.settings["beta"] for member in result.members] == ["0.2", "0.4"]
    with pytest.raises(ConfigError, match="disable_dropout cannot be a sweep"):
        nbpeft.train(model, ROWS, members={"a": {"disable_dropout": False}, "b": {}}, **FIELDS)


def test_a_clone_has_a_beta_of_its_own() -> None:
    class Clone(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                asked.request_clone_of("default-lr1e-2", "b", beta=0.5)
                asked.request_clone_of("default-lr1e-2", "c", beta=-1.0)
                asked.request_clone_of("default-lr1e-2", "d", disable_dropout=False)

    asked = RunControl()
    given = FIELDS | {"learning_rate": sweep(1e-2, 3e-2), "callbacks": [Clone()], "control": asked}
    result = nbpeft.train(new(), ROWS, **given)
    assert [member.settings["beta"] for member in result.members] == ["0.1", "0.1", "0.5"]
    assert "beta must be greater than 0, not -1.0" in result.message
    assert "disable_dropout cannot be a sweep" in result.message
    first, _, clone = result.members
    assert dict(clone.history)[3] != dict(first.history)[3]


def test_the_adapters_of_a_sweep_start_at_ln_2_against_the_one_they_start_from() -> None:
    model = filled(new())
    with pytest.raises(ConfigError, match="no common start: reference='base', or the name of the adapter"):
        nbpeft.train(model, ROWS, **FIELDS | {"learning_rate": sweep(1e-2, 3e-2)})
    assert tuple(model.peft_config) == ("default",)
    result = nbpeft.train(model, ROWS, reference="default", **FIELDS | {"learning_rate": sweep(1e-2, 3e-2)})
    assert_close([member.history[0][1] for member in result.members], [LN2, LN2])


@pytest.mark.parametrize(
    ("rows", "options"), [(ROWS, {"members": {"a": {}, "b": {"beta": 0.2}}}), ({"a": ROWS[:4], "b": ROWS[2:6]}, {})]
)
def test_one_of_the_adapters_in_training_is_no_reference(rows: Any, options: dict[str, Any]) -> None:
    model = new()
    for name in ("a", "b"):
        model.add_adapter(name, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="'b' is trained here: take 'base', or another adapter"):
        nbpeft.train(model, rows, reference="b", **FIELDS, **options)
    nbpeft.train(model, rows, reference="default", **FIELDS, **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"reference": "start"}, {"reference": "base", "fsdp": True}], ids=str)
def test_two_processes_have_the_losses_of_one(options: dict[str, Any]) -> None:
    one, two = filled(new()), filled(new())
    usual = FIELDS | {"max_steps": 6, "train_sampling_strategy": "random"}  # rows change between the processes
    alone = nbpeft.train(one, ROWS, per_device_train_batch_size=4, reference=options["reference"], **usual)
    both = nbpeft.train(two, ROWS, per_device_train_batch_size=2, processes=2, **usual, **options)
    assert_close(losses(both), losses(alone))
    assert (both.objective, both.reference) == ("dpo", options["reference"])


def test_adapters_with_rows_of_their_own_learn_what_they_would_alone() -> None:
    rows, names = {"a": ROWS[:4], "b": ROWS[2:9]}, ("a", "b")
    model = new()
    for name in names:
        model.add_adapter(name, LoraConfig(r=4, target_modules=["q_proj"]))
    start = {name: weights(model, name) for name in names}
    fields = FIELDS | {"max_steps": 5, "per_device_train_batch_size": 3}
    together = nbpeft.train(model, rows, reference="base", **fields)
    learned = {name: weights(model, name) for name in names}
    for name, member in zip(names, together.members, strict=True):
        model.load_state_dict(start[name], strict=False)
        alone = nbpeft.train(model, rows[name], adapter=name, reference="base", **fields)
        assert [value for _, value in member.history] == losses(alone)
        assert same_state(weights(model, name), learned[name])


WRONG: dict[str, tuple[dict[str, Any], type[NbpeftError], str]] = {
    "packing": ({"packing": True}, ConfigError, "packing cannot be combined with dpo: each row has two completions"),
    "collator": ({"data_collator": list}, ConfigError, "data_collator cannot be combined with dpo"),
    "metrics": ({"compute_metrics": list}, ConfigError, "compute_metrics cannot be combined with dpo"),
    "noise": ({"neftune_noise_alpha": 5.0}, ConfigError, "which disables the noise too: set disable_dropout=False"),
    "smoothing": ({"label_smoothing_factor": 0.1}, ConfigError, "use its field label_smoothing"),
    "trainer": ({"trainer_class": type("Mine", (nbpeft.Trainer,), {})}, ConfigError, "remove trainer_class"),
    "rows": (
        {"data": [{"prompt": "w1", "completion": "w2"}], "objective": "dpo"},
        TrainingError,
        "Expected columns chosen and rejected (and prompt); found 'prompt', 'completion'",
    ),
    "capitals": (
        {"data": [{"Chosen": "w1", "Rejected": "w2"}]},
        TrainingError,
        "Say which is which: columns={'chosen': 'Chosen', 'rejected': 'Rejected'}.",
    ),
    "other names": (
        {"data": [{"question": "w3", "chosen_answer": "w1", "rejected_answer": "w2"}]},
        TrainingError,
        "Say which is which: columns={'prompt': 'question', 'chosen': 'chosen_answer', 'rejected': 'rejected_answer'}.",
    ),
    "tokens": (
        {"data": [{"input_ids": [1, 2]}], "objective": "dpo"},
        TrainingError,
        "or tokenized rows with input_ids",
    ),
    "sft": ({"objective": "sft"}, TrainingError, "columns={'completion': 'chosen'} takes the chosen ones"),
    "sft fields": (
        {"data": ["w1 w2"], "beta": 0.2},
        ConfigError,
        "'beta' is a field of dpo, orpo, simpo, cpo",
    ),
    "no objective": ({"objective": "dop"}, ConfigError, "there is no objective 'dop'. Did you mean 'dpo'"),
    "classify": (
        {"objective": "classify"},
        TrainingError,
        "objective='classify' needs a model for sequence or token classification",
    ),
    "reference": ({"reference": "bas"}, ConfigError, "Did you mean 'base'?"),
    "itself": ({"reference": "default"}, ConfigError, "reference='start' is its weights at the beginning"),
    "sft reference": ({"data": ["w1 w2"], "reference": "base"}, ConfigError, "objective='sft' uses no reference"),
    "field": ({"bta": 0.1}, ConfigError, "'bta' is not a field"),
    "beta": ({"beta": 0}, ConfigError, "beta must be greater than 0, not 0"),
    "beta text": ({"beta": "high"}, ConfigError, "beta must be a finite number, not 'high'"),
    "loss type": ({"loss_type": "sigmoi"}, ConfigError, "Did you mean 'sigmoid'?"),
    "no smoothing": ({"loss_type": "hinge", "label_smoothing": 0.1}, ConfigError, "has no label_smoothing"),
    "much smoothing": ({"label_smoothing": 0.5}, ConfigError, "less than 0.5"),
    "dropout": ({"disable_dropout": 1}, ConfigError, "disable_dropout must be True or False"),
    "swept": ({"disable_dropout": sweep(True, False)}, ConfigError, "disable_dropout cannot be a sweep"),
    "swept values": ({"beta": sweep(0.1, -0.2)}, ConfigError, "beta must be greater than 0, not -0.2"),
    "weights": ({"data": [{**ROWS[0], "weight": 0.5}]}, TrainingError, "the loss of dpo does not support weights"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_is_one_line_before_the_first_step(case: str) -> None:
    given, error, told = WRONG[case]
    model = new()
    before = weights(model)
    with pytest.raises(error) as caught:
        nbpeft.train(model, given.get("data", ROWS), **FIELDS | {key: given[key] for key in given if key != "data"})
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert same_state(weights(model), before) and tuple(model.peft_config) == ("default",)


def test_a_base_whose_biases_are_trained_is_no_reference() -> None:
    config = tiny_base().config
    config.attention_bias = True
    model = trainable(LlamaForCausalLM(config), bias="all")
    with pytest.raises(ConfigError, match=r"weights of the base are trained too, .* reference='start'"):
        nbpeft.train(model, ROWS, reference="base", **FIELDS)
    assert nbpeft.train(model, ROWS, **FIELDS).reference == "start"


def test_only_causal_language_models_are_trained_on_preferences() -> None:
    model = trainable(tiny_base(LlamaForSequenceClassification))
    with pytest.raises(
        TrainingError, match="objective='dpo' needs a causal language model; LlamaForSequenceClassification is"
    ):
        nbpeft.train(model, ROWS, objective="dpo", **FIELDS)


def test_a_training_without_preferences_is_as_it_was() -> None:
    result = nbpeft.train(new(), [{"prompt": "w1 w2 ", "completion": "w3"}], **FIELDS)
    assert (result.objective, result.reference) == ("sft", None) and "objective" not in result.message


@dataclass
class OtherArguments(TrainingArguments):
    loss_type: str = "nll"


def test_a_field_of_the_arguments_class_may_have_the_name_of_an_objective_s_field() -> None:
    rows = [{"prompt": "w1 w2 ", "completion": "w3"}]
    seen: list[Any] = []

    class Spy(nbpeft.Trainer):
        def train(self, *args: Any, **options: Any) -> Any:
            seen.append(self.args.loss_type)
            return super().train(*args, **options)

    nbpeft.train(new(), rows, trainer_class=Spy, arguments_class=OtherArguments, loss_type="dft", **FIELDS)
    assert seen == ["dft"]
    preferences = nbpeft.train(new(), ROWS, arguments_class=OtherArguments, loss_type="hinge", **FIELDS)
    assert "dpo (loss_type=hinge)" in preferences.message
    with pytest.raises(ConfigError, match="'loss_type' is a field of dpo"):
        nbpeft.train(new(), rows, loss_type="dft", **FIELDS)


@dataclass(frozen=True)
class Likelihood(Objective):
    name: ClassVar[str] = "likelihood"
    rows: ClassVar[str] = "pairs"
    tilt: float = 1.0

    def loss(self, chosen: Any, rejected: Any) -> Any:
        return -self.tilt * chosen.log_probs, {"rewards/tilt": chosen.log_probs.detach()}


def test_an_objective_of_another_package_has_its_own_fields_and_loss() -> None:
    register(Likelihood)
    try:
        result = nbpeft.train(new(), ROWS[:1], objective="likelihood", tilt=2.0, **FIELDS | {"max_steps": 1})
        assert losses(result)[0] == pytest.approx(-2 * result.state.series["rewards/tilt"][0][1])
        assert result.reference is None and objective_named("likelihood") is Likelihood
        with pytest.raises(ConfigError, match="'dpo' is registered already"):
            register(type("Mine", (Likelihood,), {"name": "dpo"}))
    finally:
        registry._registered.pop("likelihood")


def test_each_evaluation_row_counts_the_same() -> None:
    fields = FIELDS | {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "reference": "base"}
    metrics = [
        nbpeft.train(filled(new()), ROWS[:6], ROWS[6:9], per_device_eval_batch_size=size, **fields).state.metrics
        for size in (2, 3)
    ]
    assert len(metrics[0]) == 2
    assert_close(metrics[0], metrics[1])


def test_the_adapters_of_a_sweep_are_compared_by_a_metric_of_the_objective() -> None:
    fields = {"metric_for_best_model": "rewards/margins", "eval_strategy": "steps", "eval_steps": 1, "patience": 3}
    result = nbpeft.train(new(), ROWS, ROWS[:3], **fields, **FIELDS | {"learning_rate": sweep(1e-2, 5e-2)})
    for member in result.members:
        assert member.score == -member.metrics["eval_rewards/margins"]
        assert member.best_step is not None and len(member.metric_history["eval_rewards/margins"]) == 3
    best = max(result.members, key=lambda member: member.metrics["eval_rewards/margins"])
    assert result.best == best.name and f"best {best.name} (rewards/margins " in str(result)


def test_a_metric_that_is_not_measured_is_one_line_with_the_nearest_one() -> None:
    fields = {"metric_for_best_model": "rewards/margin", "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ConfigError) as refused:
        nbpeft.train(new(), ROWS, ROWS[:3], **fields, **FIELDS)
    assert str(refused.value).startswith(
        "metric_for_best_model='rewards/margin' is not measured: the evaluations have loss, rewards/margins, "
        "rewards/accuracies. Did you mean 'rewards/margins'"
    )


@pytest.mark.parametrize("kind", ["OPT", "Falcon"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_of_blocks_is_off_with_gradient_checkpointing_too(kind: str, checkpointing: bool) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields = {
        "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.3},
        "Falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **fields[kind], pad_token_id=0)
    base = getattr(transformers, f"{kind}ForCausalLM")(config)
    model = nbpeft.get_peft_model(base, nbpeft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3))
    options = FIELDS | {"learning_rate": 0.0, "gradient_checkpointing": checkpointing}
    with pytest.warns(UserWarning, match="No weight of"):
        result = nbpeft.train(model, ROWS, objective="dpo", reference="base", **options)
    assert_close(losses(result), [math.log(2)] * 3)
    assert not any(module._forward_pre_hooks for module in base.modules() if "DecoderLayer" in type(module).__name__)
