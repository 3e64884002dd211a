"""Names of labels in rows become those of classes that have none; they are saved with the adapter and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

import nbpeft
from nbpeft.checkpoint import PromptFormat, common_format, prompt_format, set_prompt_format
from nbpeft.checkpoint.prompt_format import name_classes
from nbpeft.errors import TrainingError
from nbpeft.training import summarize, train
from nbpeft.training.loop.rows import model_inputs, training_rows
from nbpeft.training.request import TrainRequest
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close
from tests.tiny_models import classifier
from tests.training.data.test_classes import ROWS as TEXTS
from tests.training.data.test_tags import ROWS as WORDS
from tests.training.data.test_tags import TOKENIZER, tagger
from tests.training.support import trainable

CHARACTERS = CharTokenizer()
NAMES = ("neg", "odd", "pos")
UNNAMED = {f"LABEL_{number}": number for number in range(3)}


class _Saved(CharTokenizer):
    def save_pretrained(self, folder: str) -> None:
        pass


def unnamed(**changes: Any) -> Any:
    return trainable(classifier(**changes), task_type="SEQ_CLS")


def names_of(model: Any) -> dict[str, int]:
    return model.get_base_model().config.label2id


def test_the_config_gets_the_names_and_a_loaded_adapter_brings_them(tmp_path: Path) -> None:
    model = unnamed()
    result = train(model, TEXTS, TEXTS[:2], tokenizer=_Saved(), max_steps=1, output_dir=str(tmp_path))
    assert names_of(model) == {"neg": 0, "odd": 1, "pos": 2}
    assert model.get_base_model().config.id2label == {0: "neg", 1: "odd", 2: "pos"}
    assert "the classes get the names of the labels: 0 = neg, 1 = odd, 2 = pos" in result.message
    assert prompt_format(model.peft_config["default"]) == PromptFormat(False, classes=NAMES)
    assert 'Classes: 0 = `"neg"`, 1 = `"odd"`, 2 = `"pos"`.' in (tmp_path / "README.md").read_text()
    again = nbpeft.PeftModel.from_pretrained(classifier(), tmp_path, is_trainable=True)
    assert names_of(again) == names_of(model)
    named = classifier(label2id={"a": 0, "b": 1, "c": 2}, id2label={0: "a", 1: "b", 2: "c"})
    with pytest.warns(UserWarning, match="classes are 'neg', 'odd', 'pos', but the model's config keeps the names 'a'"):
        assert names_of(nbpeft.PeftModel.from_pretrained(named, tmp_path)) == {"a": 0, "b": 1, "c": 2}
    told = train(again, TEXTS[2:3], tokenizer=CHARACTERS, max_steps=1).message  # a row has fewer labels
    assert "names of the labels" not in told


def test_tags_and_numbers_with_names_of_a_dataset_name_classes_too() -> None:
    model = tagger(label2id=UNNAMED, id2label={number: name for name, number in UNNAMED.items()})
    result = train(model, WORDS, WORDS, tokenizer=TOKENIZER, max_steps=1)
    assert names_of(model) == {"B-PER": 0, "I-PER": 1, "O": 2} and "entity_f1" in result.state.metrics
    ignored = [{"tokens": ["a", "b", "c", "d"], "tags": ["O", -100, "B-PER", "I-PER"]}]
    model = tagger(label2id=UNNAMED, id2label={number: name for name, number in UNNAMED.items()})
    [row] = training_rows(TrainRequest(model, ignored, tokenizer=TOKENIZER)).train
    assert row["labels"] == [-100, 2, -100, 0, 1, -100]
    label = datasets.ClassLabel(names=["pos", "odd", "neg"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    data = datasets.Dataset.from_list([{"text": "a", "label": number} for number in range(3)], features=features)
    model = unnamed()
    train(model, data, tokenizer=CHARACTERS, max_steps=1)
    assert names_of(model) == {"pos": 0, "odd": 1, "neg": 2}


@pytest.mark.parametrize("numbers", [UNNAMED, None])
def test_names_in_id2label_alone_are_those_of_the_model(numbers: Any, tmp_path: Path) -> None:
    """Like ``from_pretrained(…, id2label=…)``, which leaves ``label2id`` as it was."""
    names = {0: "pos", 1: "odd", 2: "neg"}
    model = unnamed(id2label=names, label2id=numbers)
    told = train(model, TEXTS, tokenizer=_Saved(), max_steps=1, output_dir=str(tmp_path)).message
    assert "names of the labels" not in told and model.get_base_model().config.id2label == names
    assert prompt_format(model.peft_config["default"]) == PromptFormat(False, classes=("pos", "odd", "neg"))
    swapped = classifier(id2label={0: "neg", 1: "odd", 2: "pos"}, label2id=numbers)
    with pytest.warns(UserWarning, match="the adapter's classes are 'pos', 'odd', 'neg'"):
        nbpeft.PeftModel.from_pretrained(swapped, tmp_path)
    assert swapped.config.id2label == {0: "neg", 1: "odd", 2: "pos"}


def test_a_hot_swapped_adapter_brings_its_names_or_a_warning(tmp_path: Path) -> None:
    others = [{**row, "label": f"{row['label']}-x"} for row in TEXTS]
    for name, rows in (("a", TEXTS), ("b", others)):
        train(unnamed(), rows, tokenizer=_Saved(), max_steps=1, output_dir=str(tmp_path / name))
    model = unnamed()
    nbpeft.hotswap_adapter(model, str(tmp_path / "a"), "default")
    assert names_of(model) == {"neg": 0, "odd": 1, "pos": 2}
    with pytest.warns(UserWarning, match="classes are 'neg-x', 'odd-x', 'pos-x', but the model's config keeps"):
        nbpeft.hotswap_adapter(model, str(tmp_path / "b"), "default")
    assert names_of(model) == {"neg": 0, "odd": 1, "pos": 2}


def test_rows_to_score_have_the_numbers_of_the_training_rows() -> None:
    label = datasets.ClassLabel(names=["pos", "odd", "neg"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    texts = [{"text": "aa", "label": 0}, {"text": "bb", "label": 1}, {"text": "cc", "label": 2}]
    data = datasets.Dataset.from_list(texts, features=features)
    score = [{"text": "aa", "label": "pos"}, {"text": "cc", "label": "neg"}]  # other order, and not all classes
    model = unnamed()
    options: dict[str, Any] = {"tokenizer": CHARACTERS, "max_steps": 30, "learning_rate": 3e-2}
    result = train(model, data, score=score, metric="accuracy", **options)
    assert result.state.metrics == {"accuracy": 1.0}
    bare = classifier()
    with pytest.raises(TrainingError, match="'label' is 'neg'; the model knows 0 to 2"):  # no guess for a trained head
        nbpeft.score(bare, TEXTS, metric="accuracy", tokenizer=CHARACTERS)


def test_a_training_that_learns_nothing_leaves_the_names() -> None:
    model = unnamed()

    class Failing(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        train(model, TEXTS, tokenizer=CHARACTERS, max_steps=1, callbacks=[Failing()])
    assert names_of(model) == UNNAMED and prompt_format(model.peft_config["default"]) is None
    shown = summarize(TEXTS, CHARACTERS, inputs=model_inputs(model))
    assert [row.label for row in shown.rows] == ["0 (neg)", "2 (pos)", "1 (odd)"] and names_of(model) == UNNAMED
    assert shown.unused == ("the classes get the names of the labels: 0 = neg, 1 = odd, 2 = pos",)


def test_other_numbers_of_names_and_trained_heads_are_refused_in_one_line() -> None:
    with pytest.raises(TrainingError, match=r"have 2 labels \(neg, pos\), and the model 3 .* num_labels=2 or with the"):
        train(unnamed(), TEXTS[:2], tokenizer=CHARACTERS, max_steps=1)
    with pytest.raises(TrainingError, match=r"'label' is 'neg'; the model knows 0 to 2"):  # names and numbers
        train(unnamed(), [*TEXTS[:3], {"text": "a", "label": 1}], tokenizer=CHARACTERS, max_steps=1)
    model, numbers = unnamed(), [{"text": "a", "label": number} for number in range(3)]
    train(model, numbers, tokenizer=CHARACTERS, max_steps=1, learning_rate=0.1)
    assert names_of(model) == UNNAMED
    with pytest.raises(TrainingError, match="the head of 'default' has learned classes without names"):
        train(model, TEXTS, tokenizer=CHARACTERS, max_steps=1)
    with pytest.raises(TrainingError, match="Row 1: 'label' is 'new'; the model knows 0 to 2"):
        train(unnamed(), TEXTS, [TEXTS[0], {"text": "a", "label": "new"}], tokenizer=CHARACTERS, max_steps=1)


def test_names_are_read_from_files_only_if_they_are_names() -> None:
    form = PromptFormat(False, classes=("a", "b"))
    assert PromptFormat.from_metadata(form.to_metadata()) == form
    for text in ("[1, 2]", '["a", "a"]', '{"a": 1}', "[", ""):
        read = PromptFormat.from_metadata({**form.to_metadata(), "nbpeft.classes": text})
        assert read == PromptFormat(False)
    configs = [nbpeft.LoraConfig() for _ in range(2)]
    set_prompt_format(configs[0], form)
    assert common_format(configs) == form
    set_prompt_format(configs[1], PromptFormat(False, classes=("b", "a")))
    assert common_format(configs) == PromptFormat(False)
    name_classes(None, form)()  # a model without a config


# Labels of other problems


@pytest.mark.parametrize(
    ("changes", "rows", "metrics"),
    [
        (
            {"problem_type": "multi_label_classification"},
            [{"text": "ab", "label": [1, 0, 0]}, {"text": "cd", "label": [0, 1, 1]}],
            {"accuracy": 1.0, "f1": 1.0},
        ),
        ({"num_labels": 1}, [{"text": "ab", "label": -1.0}, {"text": "cd", "label": 2}], {}),
    ],
)
def test_several_labels_and_regressions_are_learned_saved_and_loaded(
    changes: Any, rows: Any, metrics: Any, tmp_path: Path
) -> None:
    model = unnamed(**changes)
    result = train(model, rows * 4, rows, tokenizer=CHARACTERS, max_steps=40, learning_rate=3e-2)
    model.save_pretrained(tmp_path)
    assert result.eval_loss < 0.1 and result.state.metrics == metrics
    again = nbpeft.PeftModel.from_pretrained(classifier(**changes), tmp_path)
    ids = torch.tensor([CHARACTERS(row["text"])["input_ids"] for row in rows])
    assert_close(again.eval()(ids).logits, model.eval()(ids).logits)
