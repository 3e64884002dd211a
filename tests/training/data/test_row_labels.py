"""A completion that a row calls bad is not learned as a good one, and labels of classes stop nothing."""

from __future__ import annotations

import datasets
import numpy as np
import pandas
import pytest

from nbpeft.errors import TrainingError
from nbpeft.training import summarize
from nbpeft.training.data.reading import ModelInputs
from nbpeft.training.loop.objective import with_objective
from nbpeft.training.loop.rows import training_rows
from nbpeft.training.request import TrainRequest
from tests.training.data.test_conservation import model
from tests.training.test_data import tokenizer as tokenizer


def labelled(*labels):
    return [{"prompt": "is it? ", "completion": "yes", "label": label} for label in labels]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ((True, False), "Row 1: 'label' is False: True and False, 1 and 0, 1 and -1 or 'good' and 'bad' mark good"),
        ((1, None, 0), "Row 2: 'label' is 0: "),
        ((1.0, 0.0), "Row 1: 'label' is 0.0: "),
        ((1, -1), "Row 1: 'label' is -1: "),
        (("good", " Bad"), "Row 1: 'label' is ' Bad': "),
        (("true", "false"), "Row 1: 'label' is 'false': "),
        (("1", "0"), "Row 1: 'label' is '0': "),
        (("desirable", "undesirable"), "Row 1: 'label' is 'undesirable': "),
        ((np.bool_(True), np.int64(0)), "Row 1: 'label' is "),
        ((0, 0), "Row 0: 'label' is 0: "),
    ],
)
def test_a_completion_that_is_labelled_as_bad_is_refused(tokenizer, labels, told):
    for rows in (labelled(*labels), pandas.DataFrame(labelled(*labels))):
        for read in (
            lambda rows: training_rows(TrainRequest(model(False), rows, tokenizer=tokenizer)),
            summaries(tokenizer),
        ):
            with pytest.raises(TrainingError) as caught:
                read(rows)
            line = str(caught.value)
            assert "\n" not in line and "or the column if it means something else." in line
            alone = line.startswith(told) or " rows can" in line  # several rows are counted
            assert alone if rows.__class__ is list else "'label' is " in line


def summaries(tokenizer):
    return lambda rows: summarize(rows, tokenizer)


@pytest.mark.parametrize(
    "labels",
    [
        (0, 1, 2),
        (0, 4),
        (0.0, 0.5, 1.0),
        ("neg", "pos"),
        ("good", "bad", "neutral"),
        (1, 1),
        (True,),
        (-100, 0),
        (None,),
    ],
)
def test_labels_of_classes_and_scores_are_named_alone(tokenizer, labels):
    found = training_rows(TrainRequest(model(False), labelled(*labels), tokenizer=tokenizer))
    assert len(found.train) == len(labels)
    assert ("'label'" in "".join(found.notes)) == (labels != (None,))


@pytest.mark.parametrize(("names", "refused"), [(["bad", "good"], True), (["0", "1"], True), (["neg", "pos"], False)])
def test_what_a_dataset_calls_its_numbers_counts(tokenizer, names, refused):
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("prompt", "completion")}
        | {"label": datasets.ClassLabel(names=names)}
    )
    data = datasets.Dataset.from_list(labelled(1, 0), features=features)
    if not refused:
        assert len(training_rows(TrainRequest(model(False), data, tokenizer=tokenizer)).train) == 2
        return
    with pytest.raises(TrainingError, match=rf"Row 1: 'label' is 0 \({names[0]}\): "):
        training_rows(TrainRequest(model(False), data, tokenizer=tokenizer))


@pytest.mark.parametrize("names", [("prompt", "completion"), ("instruction", "output")])
def test_a_label_that_is_learned_is_no_verdict(tokenizer, names):
    rows = [{"sentence": f"film {number} ", "label": str(number % 2)} for number in range(4)]
    columns = dict(zip(names, ("sentence", "label"), strict=True))
    assert len(training_rows(TrainRequest(model(False), rows, tokenizer=tokenizer, columns=columns)).train) == 4
    request = TrainRequest(model(False), rows, tokenizer=tokenizer, columns=columns)
    assert with_objective(request.opened()).objective.name == "sft"
    assert summarize(rows, tokenizer, columns=columns, inputs=ModelInputs(kind=None)).form == " and ".join(names)


def test_a_stream_is_taken_at_its_word_and_another_column_by_its_name(tokenizer):
    stream = datasets.Dataset.from_list(labelled(1, 0, 2)).to_iterable_dataset()
    with pytest.raises(TrainingError, match="Row 1: 'label' is 0"):
        list(training_rows(TrainRequest(model(False), stream, tokenizer=tokenizer)).train)
    rows = [{"q": "a", "a": "b", "verdict": False}]
    columns = {"prompt": "q", "completion": "a", "label": "verdict"}
    with pytest.raises(TrainingError, match="Row 0: 'verdict' is False"):
        training_rows(TrainRequest(model(False), rows, tokenizer=tokenizer, columns=columns))
