"""Rows of text and label train a classifier; a label that is none of its classes is refused by name."""

from __future__ import annotations

from typing import Any

import datasets
import numpy
import pandas
import pytest
import torch
import transformers

import nbpeft
from nbpeft.errors import TrainingError
from nbpeft.training import summarize, train
from nbpeft.training.data import ModelInputs
from nbpeft.training.data.classes import Classes
from nbpeft.training.loop.packing import longest_sequence
from nbpeft.training.loop.rows import first_rows, model_inputs, training_rows
from nbpeft.training.request import TrainRequest
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_same
from tests.tiny_models import LLAMA, VOCABULARY, classifier
from tests.training.support import trainable, weights

CHARACTERS = CharTokenizer()
NAMES = {"neg": 0, "pos": 1, "odd": 2}
ROWS = [{"text": "bad", "label": "neg"}, {"text": "good", "label": "pos"}, {"text": "what", "label": "odd"}] * 4


def named(**changes: Any) -> Any:
    base = classifier(label2id=NAMES, id2label={number: name for name, number in NAMES.items()}, **changes)
    return trainable(base, task_type="SEQ_CLS")


def bert() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_labels=3, **sizes)
    model = transformers.BertForSequenceClassification(config)
    return nbpeft.get_peft_model(model, nbpeft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]))


class Pairs(CharTokenizer):
    """Marks the second text, and cuts where it is told to, as tokenizers for BERT do."""

    def __call__(self, text: str, pair: Any = None, **options: Any) -> dict[str, list[int]]:  # type: ignore[override]
        texts = [text] if pair is None else [text, pair]
        limit = options.get("max_length", 1000) // len(texts) - 1
        parts = [[*super(Pairs, self).__call__(one)["input_ids"][:limit], self.eos_token_id] for one in texts]
        return {
            "input_ids": [token for part in parts for token in part],
            "token_type_ids": [place for place, part in enumerate(parts) for _ in part],
        }


def test_a_classifier_learns_the_labels_of_texts() -> None:
    model = named()
    result = train(model, ROWS, ROWS[:3], tokenizer=CHARACTERS, max_steps=60, learning_rate=3e-2)
    assert result.message == "3 of the 3 evaluation rows are also trained on (12 of 15 rows are repeats)"
    assert result.eval_loss < 0.1
    ids = {"input_ids": torch.tensor([CHARACTERS("good")["input_ids"]])}
    assert model.eval()(**ids).logits.argmax() == NAMES["pos"]


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 2],
        ["0", "1", "2"],
        [0.0, 1.0, 2.0],
        list(numpy.arange(3)),
        list(torch.arange(3)),
        [False, True, 2],
    ],
)
def test_labels_are_numbers_or_names_of_classes(labels: Any) -> None:
    rows = [{"text": row["text"], "label": label} for row, label in zip(ROWS, labels, strict=False)]
    found = training_rows(TrainRequest(named(), rows, tokenizer=CHARACTERS)).train
    assert list(found) == list(training_rows(TrainRequest(named(), ROWS[:3], tokenizer=CHARACTERS)).train)
    assert [row["labels"] for row in found] == [0, 1, 2]


def test_labels_come_in_tables_and_datasets_under_any_name() -> None:
    expected = list(training_rows(TrainRequest(named(), ROWS[:3], tokenizer=CHARACTERS)).train)
    given = [{"review": row["text"], "stars": row["label"]} for row in ROWS[:3]]
    for data in (given, pandas.DataFrame(given), datasets.Dataset.from_list(given)):
        columns = {"text": "review", "label": "stars"}
        assert list(training_rows(TrainRequest(named(), data, tokenizer=CHARACTERS, columns=columns)).train) == expected


def test_weights_of_a_tokenised_row_are_multiplied() -> None:
    row = {"input_ids": [1, 2], "label": 1}
    given: list[dict[str, Any]] = [{}, {"weight": 3}, {"loss_weights": 0.5}, {"weight": 3, "loss_weights": 0.5}]
    rows = [{**row, "weight": 1, "loss_weights": 1.0, **weights} for weights in given]
    found = training_rows(TrainRequest(named(), rows, tokenizer=CHARACTERS)).train
    assert [one.get("loss_weights", 1.0) for one in found] == [1.0, 3.0, 0.5, 1.5]


def test_numbers_of_named_classes_are_those_of_the_names() -> None:
    names = ["odd", "neg", "pos"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    data = datasets.Dataset.from_list([{"text": "a", "label": number} for number in range(3)], features=features)
    found = training_rows(TrainRequest(named(), data, tokenizer=CHARACTERS)).train
    assert [row["labels"] for row in found] == [NAMES[name] for name in names]
    unnamed = trainable(classifier(), task_type="SEQ_CLS")
    assert [row["labels"] for row in training_rows(TrainRequest(unnamed, data, tokenizer=CHARACTERS)).train] == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": 3}, "Row 1: 'label' is 3; the model knows 0 to 2 (neg, pos, odd)."),
        ({"text": "a", "label": -1}, "Row 1: 'label' is -1; the model knows 0 to 2"),
        ({"text": "a", "label": 0.5}, "Row 1: 'label' is 0.5; the model knows 0 to 2"),
        ({"text": "a", "label": "poss"}, "Did you mean 'pos'? Load it with the labels of these rows: num_labels=…"),
        ({"text": "a"}, "Row 1: 'label' is missing; it has 'text'"),
        ({"input_ids": [1], "labels": 7}, "Row 1: the label is 7; the model knows 0 to 2"),
        (
            {"input_ids": [1], "labels": "pos"},
            "Row 1: the label is 'pos'; tokenized rows give it as the model takes it: 1",
        ),
        ({"input_ids": [1], "labels": 1.0}, "Row 1: the label is 1.0; tokenized rows give it as the model takes it: 1"),
        ({"input_ids": [1]}, "Row 1 has no labels: give the class of each row"),
    ],
)
def test_another_label_is_refused_in_one_line(row: Any, message: str) -> None:
    model, first = named(), ROWS[0] if "text" in row else {"input_ids": [1, 2], "labels": 0}
    before = weights(model)
    for given in ((ROWS if "text" in row else [first, first], [first, row]), ([first, row], None)):
        with pytest.raises(TrainingError) as failure:
            train(model, *given, tokenizer=CHARACTERS, max_steps=1)
        assert message in str(failure.value) and "\n" not in str(failure.value)
    assert_same(weights(model), before)


@pytest.mark.parametrize("columns", ["text", "prompt completion", "messages"])
def test_rows_without_labels_are_refused_by_a_classifier(columns: str) -> None:
    row = dict.fromkeys(columns.split(), "a")
    with pytest.raises(TrainingError, match=r"Expected columns text and label .* to train a classifier; found"):
        train(named(), [row], tokenizer=CHARACTERS, max_steps=1)


def test_what_is_empty_is_left_out() -> None:
    rows = [*ROWS[:2], {"text": "", "label": 1}, {"text": "a", "label": None}, {"text": "a", "label": float("nan")}]
    found = training_rows(TrainRequest(named(), rows, tokenizer=CHARACTERS))
    assert len(found.train) == 2
    assert found.notes == ("3 rows left out: row 2: the text is empty; rows 3, 4: the label is empty",)


def test_a_second_text_is_marked_and_both_are_cut_by_the_tokenizer() -> None:
    rows = [{"text": "abcdef", "text_pair": "ghijkl", "label": 1}, {"text": "ab", "text_pair": "cd", "label": 0}]
    found = training_rows(TrainRequest(bert(), rows, tokenizer=Pairs(), max_length=8))
    end = CHARACTERS.eos_token_id
    cut = [*CHARACTERS("abc")["input_ids"], end, *CHARACTERS("ghi")["input_ids"], end]
    assert found.train[0] == {"input_ids": cut, "token_type_ids": [0] * 4 + [1] * 4, "labels": 1}
    assert found.notes == ("1 of 2 rows were truncated to the maximum length",)
    assert "token_type_ids" not in training_rows(TrainRequest(named(), rows, tokenizer=Pairs())).train[0]
    assert train(bert(), rows, tokenizer=Pairs(), max_steps=1).steps == 1
    assert longest_sequence(bert(), rows, tokenizer=Pairs())[:2] == (14, 1)


@pytest.mark.parametrize(
    ("changes", "label", "expected"),
    [
        ({"num_labels": 1}, "2.5", 2.5),
        ({"num_labels": 1}, 2, 2.0),
        ({"problem_type": "multi_label_classification"}, [1, 0, 1], [1.0, 0.0, 1.0]),
        ({"problem_type": "regression"}, numpy.array([1, 0.5, 1]), [1.0, 0.5, 1.0]),
    ],
)
def test_other_problems_have_labels_of_their_own(changes: Any, label: Any, expected: Any) -> None:
    model = trainable(classifier(**changes), task_type="SEQ_CLS")
    [row] = training_rows(TrainRequest(model, [{"text": "ab", "label": label}], tokenizer=CHARACTERS)).train
    assert row["labels"] == expected and type(row["labels"]) is type(expected)
    assert train(model, [{"text": "ab", "label": label}] * 2, tokenizer=CHARACTERS, max_steps=1).steps == 1
    for wrong in ("a", [1], None if "problem_type" in changes else [1, 2]):
        if wrong is not None:
            with pytest.raises(TrainingError, match=r"Row 0: 'label' is .*; expected"):
                train(model, [{"text": "ab", "label": wrong}], tokenizer=CHARACTERS, max_steps=1)


def test_a_classifier_without_a_padding_token_is_refused_in_one_line() -> None:
    class Bare(CharTokenizer):
        pad_token_id = None  # type: ignore[assignment]

    model = trainable(classifier(pad_token_id=None), task_type="SEQ_CLS")
    with pytest.raises(
        TrainingError, match=r"^LlamaForSequenceClassification needs a padding token.*: set tokenizer\.pad_token"
    ):
        train(model, [{"text": "ab", "label": 1}], tokenizer=Bare(), max_steps=1)


def test_a_preview_shows_the_label_of_each_row() -> None:
    model = named()
    found = summarize([*ROWS[:3], {"text": "a", "label": None}], CHARACTERS, inputs=model_inputs(model))
    assert (found.form, found.row_count, found.has_labels) == ("text and label", 3, True)
    assert [row.label for row in found.rows] == ["0 (neg)", "1 (pos)", "2 (odd)", ""]
    shown = nbpeft.get_session().data(ROWS[:3], CHARACTERS, model=model)
    assert "learned" not in str(shown) and "label 1 (pos)" in str(shown.view())
    plain = summarize([{"text": "a", "label": 1}], CHARACTERS, inputs=ModelInputs(classes=Classes(3)))
    assert plain.rows[0].label == "1"


def test_a_language_model_names_a_label_that_it_does_not_use() -> None:
    rows = [{"text": "ab", "label": 1}] * 2
    result = train(trainable(), rows, tokenizer=CHARACTERS, max_steps=1, learning_rate=1e-3)
    assert result.message == "columns not used: 'label'"
    shown = nbpeft.get_session().data(rows, CHARACTERS)
    assert shown.notes[0] == "columns not used: 'label'"
    assert "columns={'prompt': 'text', 'completion': 'label'} trains it to answer with the label" in shown.notes[1]


# Other names and other heads


class OwnName(transformers.LlamaForSequenceClassification):
    pass


def of_class(kind: Any, *, loss_type: str | None = None) -> Any:
    torch.manual_seed(0)
    base = kind(transformers.LlamaConfig(**LLAMA, pad_token_id=0, num_labels=3))
    base.loss_type = loss_type or base.loss_type
    return trainable(base)


def test_a_subclass_of_a_classifier_is_one_whatever_its_name() -> None:
    rows = [{"text": "bad", "label": 1}, {"text": "good", "label": 2}]
    model = of_class(OwnName, loss_type="ForSequenceClassification")
    assert [row["labels"] for row in training_rows(TrainRequest(model, rows, tokenizer=CHARACTERS)).train] == [1, 2]
    assert train(model, rows, tokenizer=CHARACTERS, max_steps=1, learning_rate=1e-3).message == ""


def test_a_class_that_transformers_has_no_loss_for_is_refused() -> None:
    with pytest.raises(TrainingError, match="none for OwnName: set loss_type = 'ForSequenceClassification'"):
        training_rows(TrainRequest(of_class(OwnName), [{"text": "bad", "label": 1}], tokenizer=CHARACTERS))


def test_other_heads_take_tokenised_rows_alone() -> None:
    model, ids = of_class(transformers.LlamaForQuestionAnswering), {"input_ids": [5, 6, 7]}
    labels = {"start_positions": 1, "end_positions": 2}
    needed = ", ".join(map(repr, ("input_ids", *labels)))
    for rows in ({"text": "bad", "label": 1}, {"text": "bad"}, ids, {**ids, "completion_mask": [0, 1, 1]}):
        with pytest.raises(TrainingError, match=f"needs tokenized rows with {needed}; found"):
            training_rows(TrainRequest(model, [rows], tokenizer=CHARACTERS))
    assert len(first_rows(model, [{"text": "bad"}], rows=1, tokenizer=CHARACTERS, loss=False).rows) == 1
    assert train(model, [{**ids, **labels}] * 2, max_steps=1, learning_rate=1e-3).message == ""
