"""Batches whose gradients are accumulated have the loss, the gradient and the curves of one batch of all their rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig

import nbpeft
from nbpeft.training import Collator, Trainer
from tests.closeness import assert_close
from tests.tiny_models import gpt2, llama
from tests.training.objectives.trl_run import filled

VOCABULARY = 50
ROWS = 8
SPLITS = [(8, 1), (4, 2), (3, 3), (1, 8)]


def tokens(number: int) -> list[int]:
    return [2 + (7 * number + 3 * place) % (VOCABULARY - 2) for place in range(3 + number % 5)]


def bert(kind: str, labels: int, problem: str | None = None) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        problem_type=problem,
    )
    return getattr(transformers, f"Bert{kind}")(config)


def decoder(kind: str, labels: int) -> Any:
    config = llama(seed=0).config
    config.num_labels, config.pad_token_id, config.classifier_dropout = labels, 0, 0.0
    torch.manual_seed(0)
    return getattr(transformers, f"Llama{kind}")(config)


def rows_of(label: Callable[[int, list[int]], Any]) -> list[dict[str, Any]]:
    return [{"input_ids": tokens(number), "labels": label(number, tokens(number))} for number in range(ROWS)]


CLASSES = rows_of(lambda number, ids: number % 3)
NUMBERS = rows_of(lambda number, ids: 0.3 * number - 1.0)
SEVERAL = rows_of(lambda number, ids: [float(number % 2), float(number % 3 == 0), 1.0])
TAGS = rows_of(lambda number, ids: [token % 3 if place % 3 else -100 for place, token in enumerate(ids)])
TEXTS = rows_of(lambda number, ids: [token if place > number % 3 else -100 for place, token in enumerate(ids)])
WHOLE = rows_of(lambda number, ids: ids)
WEIGHTED = [{**row, "loss_weights": [0.5 + number % 2] * len(row["labels"])} for number, row in enumerate(TEXTS)]
MODELS: dict[str, tuple[Callable[[], Any], list[dict[str, Any]]]] = {
    "sequences": (lambda: bert("ForSequenceClassification", 3), CLASSES),
    "sequences of a decoder": (lambda: decoder("ForSequenceClassification", 3), CLASSES),
    "regression": (lambda: bert("ForSequenceClassification", 1), NUMBERS),
    "regression of a decoder": (lambda: decoder("ForSequenceClassification", 1), NUMBERS),
    "several labels": (lambda: bert("ForSequenceClassification", 3, "multi_label_classification"), SEVERAL),
    "tokens": (lambda: bert("ForTokenClassification", 3), TAGS),
    "tokens of a decoder": (lambda: decoder("ForTokenClassification", 3), TAGS),
    "masked language model": (lambda: bert("ForMaskedLM", 2), TEXTS),
    "causal language model": (lambda: decoder("ForCausalLM", 2), TEXTS),
    "all tokens": (lambda: decoder("ForCausalLM", 2), WHOLE),
    "all tokens, without a named loss": (lambda: gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), WHOLE),
    "weighted": (lambda: decoder("ForCausalLM", 2), WEIGHTED),
}


def adapted(case: str) -> tuple[Any, list[dict[str, Any]]]:
    base, rows = MODELS[case][0](), MODELS[case][1]
    targets = {"bert": ["query", "value"], "gpt2": ["c_attn"]}.get(base.config.model_type, ["q_proj", "v_proj"])
    return filled(nbpeft.get_peft_model(base, nbpeft.LoraConfig(r=4, target_modules=targets))).train(), rows


def settings(size: int, count: int, **fields: Any) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": count,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.1,
        "logging_steps": 1,
        **fields,
    }


def curves(trainer: Any) -> list[list[float]]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [[entry["loss"], entry["grad_norm"]] for entry in logs]


def learned(model: Any) -> list[torch.Tensor]:
    return [part.detach() for name, part in model.named_parameters() if "lora_" in name]


def check(found: list[tuple[list[list[float]], list[torch.Tensor]]]) -> None:
    assert len(found[0][0]) == 2 and found[0][0][0][1] > 0
    for values, weights in found[1:]:
        assert_close(values, found[0][0])
        assert_close(weights, found[0][1])


def trained(case: str, size: int, count: int, folder: Path, **fields: Any) -> Any:
    model, rows = adapted(case)
    own = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = transformers.TrainingArguments(**own, **settings(size, count, **fields))
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=Collator())
    trainer.train()
    return curves(trainer), learned(model)


@pytest.mark.parametrize("fields", [{}, {"label_smoothing_factor": 0.1}], ids=["own loss", "smoothed"])
@pytest.mark.parametrize("case", MODELS)
def test_a_trainer_learns_the_same_from_a_batch_that_is_divided(
    case: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    if fields and case in ("regression", "regression of a decoder", "several labels"):
        pytest.skip("label smoothing is for classes")
    check([trained(case, *split, tmp_path, **fields) for split in SPLITS])


@pytest.mark.parametrize("case", MODELS)
def test_a_training_and_a_sweep_learn_the_same_from_a_batch_that_is_divided(case: str) -> None:
    found = []
    for split in SPLITS:
        model, rows = adapted(case)
        result = nbpeft.train(model, rows, **settings(*split))
        alone = [loss for _, loss in result.state.history]
        swept, _ = adapted(case)
        swept.add_adapter("b", swept.peft_config["default"])
        members = {"default": {"learning_rate": 0.1}, "b": {"learning_rate": 0.2}}
        several = nbpeft.train(swept, rows, members=members, **settings(*split))
        own = several.state.members[0].history
        assert_close([loss for _, loss in own], alone)
        found.append((alone, learned(model)))
    for values, weights in found[1:]:
        assert_close(values, found[0][0])
        assert_close(weights, found[0][1])


def test_a_batch_without_labels_is_no_part_of_a_step(tmp_path: Path) -> None:
    model, rows = adapted("causal language model")
    empty = {"input_ids": [3, 4, 5], "labels": [-100] * 3}
    found = []
    for part, split in ((rows[:3], (3, 1)), ([*rows[:3], empty], (1, 4))):
        model, _ = adapted("causal language model")
        own = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "save_strategy": "no"}
        arguments = transformers.TrainingArguments(**own, **settings(*split))
        trainer = Trainer(model=model, args=arguments, train_dataset=part, data_collator=Collator())
        trainer.train()
        found.append((curves(trainer), learned(model)))
    check(found)
