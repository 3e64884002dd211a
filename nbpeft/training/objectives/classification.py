"""Metrics of evaluations of classifiers: accuracy and F1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbpeft.names import IGNORED_LABEL
from nbpeft.training.data.classes import SINGLE_LABEL, Classes

MULTI_LABEL = "multi_label_classification"


def metrics_for(classes: Classes) -> Callable[[Any], dict[str, float]] | None:
    """The function ``compute_metrics`` of a Trainer for a classifier; None for a regression, whose loss is its metric.

    ``accuracy`` is the share of rows whose labels are all right, and ``f1`` the mean over the classes that occur; with
    several labels per row it is over all labels together. Labels of tokens count like those of rows; if they are tags
    ``B-NAME``, ``I-NAME`` and ``O``, ``entity_f1`` is over the entities, which are right if type and borders are.

    Args:
        classes: the classes.
    """
    if classes.per_token:
        return partial(_of_tokens, _tags_of_entities(classes.by_number))
    return {SINGLE_LABEL: _of_single_labels, MULTI_LABEL: _of_several_labels}.get(classes.problem)


def _of_single_labels(evaluated: Any) -> dict[str, float]:
    return _scores(_logits(evaluated).argmax(-1), np.asarray(evaluated.label_ids).reshape(-1))


def _of_tokens(tags: Sequence[str] | None, evaluated: Any) -> dict[str, float]:
    found, labels = _logits(evaluated).argmax(-1), np.asarray(evaluated.label_ids)
    learned = labels != IGNORED_LABEL
    scores = _scores(found[learned], labels[learned])
    if tags is None:
        return scores
    entities = [
        {
            (row, *entity)
            for row, chosen in enumerate(learned)
            for entity in _entities([tags[number] for number in numbers[row][chosen]])
        }
        for numbers in (found, labels)
    ]
    total = sum(map(len, entities))
    return scores | {"entity_f1": 2 * len(entities[0] & entities[1]) / total if total else 0.0}


def _tags_of_entities(tags: Sequence[str]) -> Sequence[str] | None:
    """The names of classes by number, if all of them are tags of entities; else None."""
    entities = [tag for tag in tags if tag.startswith(("B-", "I-"))]
    return tags if entities and {*tags} - {*entities} == {"O"} else None


def _entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """The entities in the tags of a row: type, first word and word after the last.

    As in the CoNLL evaluation, a tag ``I-`` without an entity of its type before it begins one.
    """
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        part, _, name = tag.partition("-")
        if kind and (part != "I" or name != kind):
            yield kind, start, place
            kind = ""
        if name and not kind:
            kind, start = name, place


def _scores(found: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
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
