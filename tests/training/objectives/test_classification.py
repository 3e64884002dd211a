"""Evaluations of classifiers have accuracy and F1."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nbpeft
from nbpeft.training.data.classes import Classes
from nbpeft.training.objectives.classification import MULTI_LABEL, metrics_for
from tests.tiny_models import classifier
from tests.training.data.test_classes import CHARACTERS, ROWS, named
from tests.training.support import trainable


def measured(classes: Classes, logits: Any, labels: Any) -> dict[str, float]:
    measure = metrics_for(classes)
    assert measure is not None
    return measure(SimpleNamespace(predictions=np.array(logits), label_ids=np.array(labels)))


def test_metrics_of_single_labels() -> None:
    logits = [[2.0, 0.0, 0.0], [0.0, 3.0, 1.0], [0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]
    found = measured(Classes(3), logits, [0, 1, 0, 2])
    # 0: precision 1/2, recall 1/2; 1: 1/2 and 1; 2: never found
    assert found == pytest.approx({"accuracy": 0.5, "f1": (1 / 2 + 2 / 3 + 0) / 3})
    assert measured(Classes(3), logits[:2], [0, 1]) == {"accuracy": 1.0, "f1": 1.0}  # a class that does not occur
    measure: Any = metrics_for(Classes(3))
    assert measure(SimpleNamespace(predictions=(np.array(logits[:1]), None), label_ids=np.array([0])))


def test_metrics_of_several_labels_and_of_a_regression() -> None:
    classes = Classes(2, problem=MULTI_LABEL)
    found = measured(classes, [[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]], [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert found == pytest.approx({"accuracy": 2 / 3, "f1": 4 / 5})
    assert measured(classes, [[-1.0, -1.0]], [[0.0, 0.0]]) == {"accuracy": 1.0, "f1": 0.0}
    assert metrics_for(Classes(1, problem="regression")) is None


def test_metrics_of_tags_are_over_learned_tokens_and_whole_entities() -> None:
    tags = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG"]
    names = {tag: number for number, tag in enumerate(tags)}

    def of(found: list[str], labels: list[str], names: dict[str, int] = names) -> dict[str, float]:
        numbers = [names.get(tag, -100) for tag in labels]
        logits = np.eye(len(names))[[names[tag] for tag in found]]
        return measured(Classes(len(names), names, per_token=True), [logits], [numbers])

    labels = ["B-PER", "I-PER", "", "O", "B-ORG", "B-ORG", "I-ORG"]
    found = ["B-PER", "I-PER", "O", "O", "B-ORG", "I-ORG", "I-ORG"]
    # Of the entities PER 0-2, ORG 3-4 and ORG 4-6 of the learned words, one of the two that are found is right.
    assert of(found, labels) == pytest.approx(
        {"accuracy": 5 / 6, "f1": (1 + 1 + 1 + 2 / 3 + 2 / 3) / 5, "entity_f1": 2 / 5}
    )
    assert of(["I-PER", "I-ORG"], ["B-PER", "B-ORG"])["entity_f1"] == 1.0  # as in the CoNLL evaluation
    assert of(["O", "O"], ["O", "O"])["entity_f1"] == 0.0
    assert of(["NOUN"], ["NOUN"], {"NOUN": 0, "O": 1}).keys() == {"accuracy", "f1"}


def test_a_training_reports_them_and_patience_may_go_by_them() -> None:
    fields: dict[str, Any] = {"tokenizer": CHARACTERS, "max_steps": 40, "learning_rate": 3e-2}
    result = nbpeft.train(named(), ROWS, ROWS[:3], metric_for_best_model="accuracy", patience=20, **fields)
    assert result.state.metrics.keys() == {"accuracy", "f1"} and result.state.metrics["accuracy"] == 1.0
    own = nbpeft.train(
        named(), ROWS, ROWS[:3], compute_metrics=lambda found: {"mine": 0.5}, **fields | {"max_steps": 1}
    )
    assert own.state.metrics == {"mine": 0.5}
    several = [{"text": row["text"], "label": [1, 0, place % 2]} for place, row in enumerate(ROWS)]
    model = trainable(classifier(problem_type=MULTI_LABEL), task_type="SEQ_CLS")
    labels = nbpeft.train(model, several, several[:3], **fields | {"max_steps": 1})
    assert labels.state.metrics.keys() == {"accuracy", "f1"}
    scored = [{"text": row["text"], "label": 0.5} for row in ROWS]
    regression = trainable(classifier(num_labels=1), task_type="SEQ_CLS")
    assert nbpeft.train(regression, scored, scored[:3], **fields | {"max_steps": 1}).state.metrics == {}
