"""Metrics of evaluations of classifiers: accuracy and F1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbpeft.training.data.classes import SINGLE_LABEL, Classes

MULTI_LABEL = "multi_label_classification"


def metrics_for(classes: Classes) -> Callable[[Any], dict[str, float]] | None:
    """The function ``compute_metrics`` of a Trainer for a classifier; None for a regression, whose loss is its metric.

    ``accuracy`` is the share of rows whose labels are all right, and ``f1`` the mean over the classes that occur; with
    several labels per row it is over all labels together.

    Args:
        classes: the classes.
    """
    return {SINGLE_LABEL: _of_single_labels, MULTI_LABEL: _of_several_labels}.get(classes.problem)


def _of_single_labels(evaluated: Any) -> dict[str, float]:
    found, labels = _logits(evaluated).argmax(-1), np.asarray(evaluated.label_ids).reshape(-1)
    occur = np.union1d(found, labels)
    scores = [_f1(found == number, labels == number) for number in occur]
    return {"accuracy": float((found == labels).mean()), "f1": float(np.mean(scores))}


def _of_several_labels(evaluated: Any) -> dict[str, float]:
    found, labels = _logits(evaluated) > 0, np.asarray(evaluated.label_ids) > 0.5
    return {"accuracy": float((found == labels).all(-1).mean()), "f1": _f1(found, labels)}


def _logits(evaluated: Any) -> NDArray[Any]:
    predictions = evaluated.predictions
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)


def _f1(found: NDArray[Any], labels: NDArray[Any]) -> float:
    """The harmonic mean of precision and recall; 0 if neither has any."""
    total = int(found.sum()) + int(labels.sum())
    return 2 * int((found & labels).sum()) / total if total else 0.0
