"""Rows of tokens and tags train a classifier of tokens; the first token of a word has its tag."""

from __future__ import annotations

from typing import Any

import datasets
import numpy
import pandas
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import nbpeft
from nbpeft.errors import NbpeftError, TrainingError
from nbpeft.names import IGNORED_LABEL
from nbpeft.training import prepare_data, summarize, train
from nbpeft.training.data.tags import space_token, with_spaces
from nbpeft.training.loop.rows import first_rows, model_inputs, training_rows
from nbpeft.training.request import TrainRequest
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close, assert_same
from tests.tiny_models import llama
from tests.training.data.test_classes import named as text_classifier
from tests.training.support import trainable, weights

TAGS = {"B-PER": 0, "I-PER": 1, "O": 2}
PIECES = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh", *(f"##{letter}" for letter in "abcdefgh")]
START, END = 1, 2
ROWS = [
    {"tokens": ["ab", "c", "def"], "tags": ["B-PER", "I-PER", "O"]},
    {"tokens": ["gh", "a"], "tags": ["O", "B-PER"]},
    {"tokens": ["e", "fg", "h", "bcd"], "tags": ["O", "O", "B-PER", "I-PER"]},
    {"tokens": ["hh"], "tags": ["O"]},
]
IGNORED = IGNORED_LABEL


def tokenizer() -> Any:
    """A tokenizer whose words are letters, between ``[CLS]`` and ``[SEP]``."""
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = [("[CLS]", START), ("[SEP]", END)]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=pieces)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


TOKENIZER = tokenizer()


def tagger(seed: int = 0, **changes: Any) -> Any:
    """A small classifier of tokens with an adapter, whose head is trained."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    names = {"label2id": TAGS, "id2label": {number: name for name, number in TAGS.items()}}
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=len(PIECES), **sizes | dropout | names | changes)
    model = transformers.BertForTokenClassification(config)
    torch.manual_seed(seed + 1)
    settings = nbpeft.LoraConfig(r=2, task_type="TOKEN_CLS", target_modules=["query", "value"])
    return nbpeft.get_peft_model(model, settings)


def read(rows: Any, model: Any = None, **options: Any) -> Any:
    return training_rows(TrainRequest(model or tagger(), rows, tokenizer=TOKENIZER, **options))


def aligned(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the example of transformers reads it."""
    found = TOKENIZER(row["tokens"], truncation=True, is_split_into_words=True)
    labels, former = [], None
    for word in found.word_ids():
        labels.append(IGNORED if word is None or word == former else TAGS[row["tags"][word]])
        former = word
    return {**found, "labels": labels}


def test_the_first_token_of_a_word_has_its_tag() -> None:
    found = read(ROWS).train
    assert [(row["input_ids"], row["labels"]) for row in found] == [
        (row["input_ids"], row["labels"]) for row in map(aligned, ROWS)
    ]
    assert found[0]["labels"] == [IGNORED, 0, IGNORED, 1, 2, IGNORED, IGNORED, IGNORED]


BYTES = {piece: number for number, piece in enumerate(("[PAD]", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġb"))}


def byte_level(*, add_prefix_space: bool) -> Any:
    """A tokenizer whose tokens are bytes, and ``Ġb``."""
    made = Tokenizer(models.BPE(BYTES, [("Ġ", "b")]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")


def test_words_are_separated_for_byte_level_tokenizers_too() -> None:
    tokens = byte_level(add_prefix_space=False)
    rows = [{"tokens": ["a", "bc", "12", " b", ""], "tags": [0, 1, 2, 0, 1]}]
    [row] = prepare_data(rows, tokens, inputs=model_inputs(tagger()))
    assert tokens.decode(row["input_ids"]) == "a bc 12 b"
    learned = [(tokens.decode([token]), label) for token, label in zip(row["input_ids"], row["labels"], strict=True)]
    assert [item for item in learned if item[1] != IGNORED] == [("a", 0), (" b", 1), ("1", 2), (" b", 0)]
    parts = prepare_data(rows, tokens, inputs=model_inputs(tagger()), max_length=4, long="split")
    assert [tokens.decode(part["input_ids"]) for part in parts] == ["a bc", " 12 b"]
    assert space_token(byte_level(add_prefix_space=True)) is space_token(TOKENIZER) is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["我", "在", "北京", "，", "你", "?"], "我在北京，你 ?"),
        (["これ", "は", "ペン", "。"], "これはペン。"),
        (["ฉัน", "รัก", "Ana"], "ฉันรัก Ana"),
        (["나는", "서울에", "산다"], "나는 서울에 산다"),
        (["a ", "b", "", "c", " d"], "a b c d"),
    ],
)
def test_words_of_scripts_without_spaces_run_on(words: list[str], text: str) -> None:
    assert "".join(with_spaces(words)) == text


def test_losses_and_metrics_are_those_of_transformers() -> None:
    rows = ROWS * 3
    fields: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    fields["train_sampling_strategy"] = "sequential"
    ours, theirs = tagger(), tagger()
    result = train(ours, rows, ROWS, tokenizer=TOKENIZER, logging_steps=1, eval_steps=4, **fields)
    settings = transformers.TrainingArguments(
        output_dir="unused", report_to="none", save_strategy="no", logging_steps=1, use_cpu=True, **fields
    )
    trainer = transformers.Trainer(
        model=theirs,
        args=settings,
        train_dataset=[aligned(row) for row in rows],
        eval_dataset=[aligned(row) for row in ROWS],
        data_collator=transformers.DataCollatorForTokenClassification(TOKENIZER),
    )
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert_close([loss for _, loss in result.state.history], expected)
    assert_close(result.eval_loss, trainer.evaluate()["eval_loss"])
    assert result.objective == "classify" and result.state.metrics.keys() == {"accuracy", "f1", "entity_f1"}


def test_it_learns_the_tags() -> None:
    result = train(tagger(), ROWS * 4, ROWS, tokenizer=TOKENIZER, max_steps=30, learning_rate=5e-2)
    assert result.state.metrics == {"accuracy": 1.0, "f1": 1.0, "entity_f1": 1.0}


@pytest.mark.parametrize(
    "tags", [[2, 0], ["2", "0"], numpy.array([2, 0]), [2.0, 0.0], ["O", "B-PER"], torch.tensor([2, 0])]
)
def test_tags_are_numbers_or_names(tags: Any) -> None:
    [row] = read([{"tokens": ["gh", "a"], "tags": tags}]).train
    assert row["labels"] == aligned(ROWS[1])["labels"]


def test_tags_come_in_tables_and_datasets_under_any_name() -> None:
    expected = list(read(ROWS).train)
    given = [{"words": row["tokens"], "ner_tags": row["tags"]} for row in ROWS]
    columns = {"tokens": "words", "tags": "ner_tags"}
    for data in (given, pandas.DataFrame(given), datasets.Dataset.from_list(given)):
        assert list(read(data, columns=columns).train) == expected
    names = ["O", "B-PER", "I-PER"]  # in another order than the model's
    numbered = [{"tokens": row["tokens"], "tags": [names.index(tag) for tag in row["tags"]]} for row in ROWS]
    listed = getattr(datasets, "List", datasets.Sequence)  # datasets 3 has no List
    kinds = {"tokens": listed(datasets.Value("string")), "tags": listed(datasets.ClassLabel(names=names))}
    data = datasets.Dataset.from_list(numbered, features=datasets.Features(kinds))
    assert list(read(data).train) == expected


def test_a_word_whose_tag_is_ignored_is_not_learned() -> None:
    found = read([{"tokens": ["ab", "c"], "tags": [IGNORED, 1]}, {"tokens": ["a"], "tags": [IGNORED]}, ROWS[0]])
    assert found.train[0]["labels"] == [IGNORED, IGNORED, IGNORED, 1, IGNORED]
    assert found.notes == ("1 row left out: row 1: nothing to learn",)
    empty = read([{"tokens": [], "tags": []}, {"tokens": ["a", " ", "c"], "tags": [0, 1, 2]}])
    assert empty.train[0]["labels"] == [IGNORED, 0, 2, IGNORED]
    assert empty.notes == (
        "1 row left out: row 0: there are no words; without a token, so their tags are not learned: words of 'tokens' "
        "(1 of 2 rows)",
    )


LONG = {"tokens": ["ab", "cde", "f", "gh"], "tags": [0, 1, 2, 0]}


@pytest.mark.parametrize(
    ("long", "words", "note"),
    [
        ("cut", [("abcd", [0, IGNORED, 1, IGNORED])], "1 of 2 rows were truncated to the maximum length"),
        ("drop", [], "1 row left out: row 0: longer than 6 tokens (long='drop')"),
        (
            "split",
            [("ab", [0, IGNORED]), ("cdef", [1, IGNORED, IGNORED, 2]), ("gh", [0, IGNORED])],
            "1 row longer than the maximum length split into 3 parts",
        ),
    ],
)
def test_long_rows_are_cut_left_out_or_split_between_words(long: str, words: Any, note: str) -> None:
    found = read([LONG, ROWS[3]], long=long, max_length=6)
    parts = [
        ("".join(PIECES[token].removeprefix("##") for token in row["input_ids"][1:-1]), row["labels"][1:-1])
        for row in found.train
    ]
    assert parts == [*words, ("hh", [2, IGNORED])]
    assert all((row["input_ids"][0], row["input_ids"][-1]) == (START, END) for row in found.train)
    assert found.notes == (note,)


def test_a_word_longer_than_the_limit_is_cut_in_a_part_of_its_own() -> None:
    found = read([{"tokens": ["a", "abcdefgh", "b"], "tags": [0, 1, 2]}], long="split", max_length=5)
    assert [row["labels"][1:-1] for row in found.train] == [[0], [1, IGNORED, IGNORED], [2]]
    assert "1 of 3 rows were truncated" in found.notes[0] and "split into 3 parts" in found.notes[0]


def test_a_weight_counts_for_all_tags_of_a_row() -> None:
    rows = [{**ROWS[0], "weight": 0.5}, ROWS[1], {**ROWS[3], "weight": 0}]
    found = read(rows, max_length=5)
    assert [row.get("loss_weights") for row in found.train] == [[0.5] * 5, None]
    assert "its weight is 0" in found.notes[0]
    assert train(tagger(), rows[:2], tokenizer=TOKENIZER, max_steps=1).steps == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": [0]}, "Row 1: it has 2 words and 1 tag; each word needs one tag"),
        ({"tokens": ["a"], "tags": [3]}, "Row 1: tag 0 of 'tags' is 3; the model knows 0 to 2 (B-PER, I-PER, O)."),
        ({"tokens": ["a", "b"], "tags": [0, "B-PR"]}, "Row 1: tag 1 of 'tags' is 'B-PR'; .* Did you mean 'B-PER'"),
        ({"tokens": ["a"], "tags": [None]}, "Row 1: tag 0 of 'tags' is None; expected a class or -100"),
        ({"tokens": ["a"], "tags": "O"}, "Row 1: 'tags' is a str ('O'), not a list of tags"),
        ({"tokens": "a b", "tags": [0, 1]}, "Row 1: 'tokens' is a str ('a b'), not a list of words"),
        ({"tokens": ["a", 2], "tags": [0, 1]}, "Row 1: word 1 of 'tokens' is an int (2), not text"),
    ],
)
def test_another_row_is_refused_in_one_line(row: Any, message: str) -> None:
    model = tagger()
    before = weights(model)
    with pytest.raises(TrainingError) as failure:
        train(model, [ROWS[0], row], tokenizer=TOKENIZER, max_steps=1)
    for part in message.split(" .* "):
        assert part in str(failure.value) and "\n" not in str(failure.value)
    assert_same(weights(model), before)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"labels": [0, 1]}, "Row 0 has 2 labels for 3 tokens"),
        ({"labels": [0, 1, 7]}, "Row 0: the label is 7; the model knows 0 to 2"),
        ({"labels": 1}, "Row 0 has no list of labels: give the class of each token"),
        ({}, "Row 0 has no list of labels"),
        ({"completion_mask": [0, 1, 1]}, "Row 0: it has no labels: give the class of each token"),
    ],
)
def test_labels_of_tokenized_rows_are_checked(row: Any, message: str) -> None:
    ids = {"input_ids": [START, 5, END]}
    with pytest.raises(TrainingError, match=message):
        train(tagger(), [{**ids, **row}], max_steps=1)
    rows = [{**ids, "labels": [IGNORED, 1, IGNORED]}] * 2
    assert train(tagger(), rows, max_steps=1, learning_rate=1e-3).message == ""


def test_models_and_rows_that_do_not_fit_are_refused_with_the_model_that_does() -> None:
    texts = [{"text": "a", "label": 1}]
    for model, rows, words in (
        (tagger(), texts, "for a model loaded with AutoModelForSequenceClassification"),
        (trainable(llama()), ROWS, "for a model loaded with AutoModelForTokenClassification"),
        (text_classifier(), ROWS, "for a model loaded with AutoModelForTokenClassification"),
        (tagger(), [{"words": ["a"], "ner_tags": [1]}], "columns={'tokens': 'words', 'tags': 'ner_tags'}"),
        (tagger(), [{"tokens": ["a"], "pos_tags": [1], "ner_tags": [1]}], "'tags': 'ner_tags'"),
        (tagger(), [{"prompt": "a", "completion": "b"}], "Expected columns tokens and tags, or input_ids and labels"),
    ):
        with pytest.raises(TrainingError) as failure:
            train(model, rows, tokenizer=TOKENIZER, max_steps=1)
        assert words in str(failure.value) and "\n" not in str(failure.value)
    with pytest.raises(TrainingError, match="tokens and tags need a fast tokenizer"):
        train(tagger(), ROWS, tokenizer=CharTokenizer(), max_steps=1)
    with pytest.raises(NbpeftError, match="has a class for each token, and accuracy compares that of a row"):
        nbpeft.score(tagger(), ROWS, metric="accuracy", tokenizer=TOKENIZER)
    with pytest.raises(NbpeftError, match="the tokenizer does not take words"):
        train(tagger(), ROWS, tokenizer=_Refusing(), max_steps=1)


class _Refusing:
    is_fast = True
    pad_token_id = 0

    def __call__(self, words: Any, **options: Any) -> Any:
        raise ValueError("made without add_prefix_space")


def test_a_preview_shows_the_tags_of_learned_words() -> None:
    found = summarize(ROWS[:1], TOKENIZER, inputs=model_inputs(tagger()))
    [row] = found.rows
    assert (found.form, found.has_labels, found.learned_count, row.learned_count) == ("tokens and tags", False, 3, 3)
    assert [span.text for span in row.target] == ["a: 0 (B-PER), c: 1 (I-PER), d: 2 (O)"]
    assert row.target_title == "tags"
    assert next(span.text.strip() for span in row.spans if span.learned) == "a"
    assert "3 learned" in str(nbpeft.get_session().data(ROWS[:1], TOKENIZER, model=tagger()).view())


def test_without_a_loss_words_or_text_are_read() -> None:
    for rows in (ROWS, [{"text": "abc"}]):
        assert len(first_rows(tagger(), rows, rows=1, tokenizer=TOKENIZER, loss=False).rows) == 1


def test_names_beyond_the_classes_of_the_model_are_refused_and_no_entities_are_counted() -> None:
    """As of a model that is loaded with ``label2id`` alone, which has 2 classes whatever it says."""
    model = tagger(label2id=TAGS, id2label={0: "LABEL_0", 1: "LABEL_1"})
    with pytest.raises(TrainingError, match=r"'O'; the model knows 0 to 1 \(B-PER, I-PER, O\)\. .* num_labels="):
        read(ROWS, model)
    rows = [{"tokens": ["ab", "c"], "tags": ["B-PER", "I-PER"]}]
    metrics = train(model, rows, rows, tokenizer=TOKENIZER, max_steps=1).state.metrics
    assert metrics.keys() == {"accuracy", "f1"}
