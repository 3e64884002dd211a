"""Preparing the training and evaluation rows for a model, and checking them."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nbpeft.checkpoint import PromptFormat
from nbpeft.display.numbers import count, plural
from nbpeft.engine.calls.model_properties import class_names, is_text_classifier, is_token_classifier
from nbpeft.engine.tree.model_tree import embedding_of, manager_of
from nbpeft.errors import ConfigError, TrainingError, with_article
from nbpeft.losses import with_loss_weights
from nbpeft.names import LOSS_WEIGHTS, REJECTED
from nbpeft.training.adapters.adapted_model import base_of, call_columns, trained_names
from nbpeft.training.data import (
    Collator,
    HeldOut,
    ModelInputs,
    PreparedRows,
    StreamedRows,
    check_rows,
    columns_of,
    grouping,
    groups_of,
    hold_out,
    is_amount,
    leaked,
    prepared,
)
from nbpeft.training.data.checks import check_row
from nbpeft.training.data.classes import SINGLE_LABEL, Classes
from nbpeft.training.data.row import listed
from nbpeft.training.objectives.objective import Objective

if TYPE_CHECKING:
    from nbpeft.training.request import TrainRequest

_HEAD = re.compile(r"For([A-Z]\w*)$")
"""The suffix of class names of transformers' models with a head."""
_LANGUAGE_HEADS = ("LM", "Generation", "PreTraining")
_OWN_LABELS = ("labels", "start_positions", "end_positions")
BATCH_SIZE = 8
"""Rows per batch outside of training, the default of ``TrainingArguments``."""


@dataclass(frozen=True)
class TrainingRows:
    """The rows for a Trainer.

    Attributes:
        train: training rows; adapter -> its own, if each has some.
        evaluation: evaluation rows, or None; adapter -> its own, if each has some.
        notes: messages about rows that were cut, left out or not used.
        held_out: message about rows that were held out for evaluation; empty if there are none.
        classes: the classes of a classifier, with the names that its model or the rows give them.
        unlearned: adapter -> which rows of its data are held out, where their numbers are known; "" for all adapters.
    """

    train: Any
    evaluation: Any = None
    notes: tuple[str, ...] = ()
    held_out: str = ""
    classes: Classes | None = None
    unlearned: Mapping[str, HeldOut] = field(default_factory=dict)

    @property
    def train_parts(self) -> list[Any]:
        """The training rows, or those of each adapter."""
        return list(self.train.values()) if isinstance(self.train, Mapping) else [self.train]

    @property
    def evaluation_parts(self) -> list[Any]:
        """The evaluation rows, or those of each adapter; empty if there are none."""
        parts = self.evaluation.values() if isinstance(self.evaluation, Mapping) else [self.evaluation]
        return [part for part in parts if part is not None]

    @property
    def format(self) -> PromptFormat | None:
        """The form in which the training rows are written; None if they were given as tokens."""
        return self.format_for("")

    def format_for(self, adapter: str) -> PromptFormat | None:
        """Returns the form in which the training rows of an adapter are written; None if they were given as tokens."""
        rows = self.train.get(adapter) if isinstance(self.train, Mapping) else self.train
        form: PromptFormat | None = getattr(rows, "format", None)
        return form if isinstance(form, PromptFormat) else None


def training_rows(request: TrainRequest, *, loss: bool = True) -> TrainingRows:
    """Prepares the rows of a training for its model.

    Args:
        request: the arguments of the training; its model may be bare.
        loss: whether a loss will be computed, so that the rows need labels for the model's head.

    Raises:
        ConfigError: an argument is invalid.
        TrainingError: the data cannot be read, or does not fit the model.
    """
    request = request.opened()
    if request.own_rows:
        return _rows_of_adapters(request)
    inputs = inputs_of(request)
    if loss:
        _check_loss(base_of(request.model))
    else:
        inputs = replace(inputs, tokens_only="", labels_needed=False)
    if request.eval_by is not None and not is_amount(request.eval_data):
        raise ConfigError(
            "eval_by groups the rows that are held out for evaluation: give their share or number (eval_data=0.1)",
            field="eval_by",
        )
    read = _prepared(request, request.data, inputs)
    if read.classes is not None and read.classes is not inputs.classes:
        _check_head_is_new(request)
        inputs = replace(inputs, classes=read.classes)
    rows, notes, amount = read.rows, [read.notes] if read.notes else [], request.eval_data
    if not is_amount(amount):
        measured = PreparedRows(None) if amount is None else _prepared(request, amount, inputs)
        notes += [f"evaluation rows: {measured.notes}"] if measured.notes else []
        notes += filter(None, [leaked(rows, measured.rows, "evaluation row")])
        unlearned = _unlearned(request, rows, ())
        return TrainingRows(rows, measured.rows, tuple(notes), classes=inputs.classes, unlearned=unlearned)
    groups = groups_of(rows, request.data, request.eval_by)
    train, evaluation, places = hold_out(rows, amount, request.seed, groups)
    if isinstance(rows, StreamedRows) and rows.notes:  # reading the held-out rows may have added notes
        notes = [rows.notes]
    known = f"{count(len(evaluation))} of {plural(len(rows), 'row')}" if hasattr(rows, "__len__") else ""
    held = f"{known or plural(len(evaluation), 'row')} held out for evaluation"
    if groups is not None and request.eval_by is not None:
        held += f", in whole groups by {request.eval_by!r} ({plural(len({*groups}), 'group')})"
    repeats = leaked(train, evaluation)
    if repeats:
        notes.append(
            repeats if request.eval_by else f"{repeats}: {grouping(columns_of(request.data), request.columns)}"
        )
    return TrainingRows(train, evaluation, tuple(notes), held, inputs.classes, _unlearned(request, rows, places))


def _unlearned(request: TrainRequest, rows: Any, places: Sequence[int] | None) -> dict[str, HeldOut]:
    """Which rows of the data are held out: those at these places of the rows that were read."""
    if places is None or not hasattr(request.data, "__len__"):
        return {}
    numbers = getattr(rows, "numbers", None)
    held = {*places} if numbers is None else {numbers[place] for place in places}
    return {"": HeldOut(tuple(sorted(held)), len(request.data))}


def _rows_of_adapters(request: TrainRequest) -> TrainingRows:
    """Prepares the rows of adapters that each have rows of their own."""
    parts: dict[str, TrainingRows] = {}
    for name in request.own_rows:
        try:
            part = parts[name] = training_rows(request.of_adapter(name))
        except TrainingError as error:
            raise TrainingError(f"rows of {name!r}: {error}") from error
        if not hasattr(part.train, "__len__"):
            raise TrainingError(
                f"the rows of {name!r} are a stream: rows for each adapter have to be lists or datasets"
            )
    notes = [
        f"{name}: columns does not apply to these rows, which have {listed(columns_of(request.data[name]))}"
        for name in request.unmapped
    ]
    first, *others = parts
    classes = parts[first].classes
    for name in others:
        if parts[name].classes != classes:
            raise TrainingError(f"the rows of {first!r} and {name!r} have different classes: train them one by one")
    evaluation = {name: part.evaluation for name, part in parts.items()}
    return TrainingRows(
        train={name: part.train for name, part in parts.items()},
        evaluation=evaluation if parts[first].evaluation is not None else None,
        notes=(*notes, *(f"{name}: {note}" for name, part in parts.items() for note in part.notes)),
        held_out="; ".join(f"{name}: {part.held_out}" for name, part in parts.items() if part.held_out),
        classes=classes,
        unlearned={name: found for name, part in parts.items() for found in part.unlearned.values()},
    )


def inputs_of(request: TrainRequest) -> ModelInputs:
    """Returns the inputs of a training's model; all columns of tokenized rows with ``remove_unused_columns=False``."""
    from nbpeft.training.transformers.trainer import why_unweighted  # here, as it imports transformers' Trainer

    own_batches = request.arguments.get("data_collator") is not None
    inputs = model_inputs(
        request.model,
        all_columns=request.arguments.get("remove_unused_columns") is False,
        unweighted=why_unweighted(request.trainer_class, own_batches=own_batches),
    )
    if own_batches:
        inputs = replace(inputs, main=None, tokens_only="")
    objective = request.objective
    if not isinstance(objective, Objective) or not objective.rows:
        return inputs
    rejected = {f"{REJECTED}{name}" for name in ("input_ids", "labels")}
    taken = None if inputs.columns is None else inputs.columns | rejected
    inputs = replace(inputs, numbers=()) if objective.generates else inputs
    why = f"the loss of {objective.name} does not support weights"
    classes = None if objective.scores else inputs.classes
    return replace(inputs, kind=objective.rows, columns=taken, unweighted=why, classes=classes)


def model_inputs(model: nn.Module, *, all_columns: bool = False, unweighted: str = "") -> ModelInputs:
    """Returns the inputs that a model accepts.

    Args:
        model: the model, adapted or bare.
        all_columns: whether it gets all columns of tokenized rows.
        unweighted: why its loss does not support weights of rows; empty if it does.
    """
    base, numbers, classes = base_of(model), call_columns(model), classes_of(model)
    if classes is not None and classes.problem != SINGLE_LABEL:
        unweighted = unweighted or f"the loss of {classes.problem} does not support weights"
    parameters = [*inspect.signature(base.forward).parameters]
    return ModelInputs(
        encoder_decoder=classes is None and is_encoder_decoder(model),
        classes=classes,
        numbers=numbers,
        columns=None if all_columns else frozenset((*parameters, *numbers)),
        unweighted=unweighted,
        tokens_only=_why_tokens_only(base),
        main=str(getattr(base, "main_input_name", None) or next(iter(parameters), "")),
    )


def _why_tokens_only(base: nn.Module) -> str:
    """Returns why a model accepts only rows that are its inputs; empty if it accepts text."""
    heads = [found for name in class_names(base) if (found := _HEAD.search(name))]
    transformers_model = hasattr(type(base), "_from_config")
    if not (transformers_model and heads) or classes_of(base) is not None:
        return ""
    if embedding_of(base, output=True) is not None:
        return ""
    if any(found[1].endswith(_LANGUAGE_HEADS) for found in heads):
        return ""
    labels = [name for name in inspect.signature(base.forward).parameters if name in _OWN_LABELS]
    main = str(getattr(base, "main_input_name", "input_ids"))
    return (
        f"{type(base).__name__} is neither a language model nor a classifier of texts or tokens: it needs "
        f"{'tokenized rows' if main == 'input_ids' else 'rows'} with {listed((main, *labels))}"
    )


def classes_of(model: nn.Module) -> Classes | None:
    """Returns the classes of a classifier of texts or tokens; None for any other model."""
    base = base_of(model)
    config, per_token = getattr(base, "config", None), is_token_classifier(base)
    if not (per_token or is_text_classifier(base)) or not hasattr(config, "num_labels"):
        return None
    return Classes.of(config, per_token=per_token)


def is_of_texts(model: nn.Module) -> bool:
    """Returns whether a model is a classifier of texts."""
    classes = classes_of(model)
    return classes is not None and not classes.per_token


def collator_for(model: nn.Module, tokenizer: Any) -> Collator:
    """Returns a collator that pads with the pad token of the tokenizer or the model's config."""
    config = getattr(base_of(model), "config", None)
    candidates = [
        getattr(owner, name, None) for name in ("pad_token_id", "eos_token_id") for owner in (tokenizer, config)
    ]
    size = _vocabulary(model)  # a tokenizer may have more tokens; padding is masked, so that any token serves
    valid = (int(token) for token in candidates if isinstance(token, int) and (size is None or token < size))
    pad = next((token for token in valid if token >= 0), 0)
    return Collator(pad_token_id=pad, copy_labels=is_causal(model))


@dataclass(frozen=True)
class FirstRows:
    """The first rows of data in the form that training gives to a model.

    Attributes:
        rows: the tokenized rows.
        collate: makes a batch of rows.
        read_notes: messages about rows that were cut, left out or not used.
    """

    rows: Sequence[Mapping[str, Any]]
    collate: Collator
    read_notes: tuple[str, ...] = ()

    def notes(self, *, loss: bool) -> tuple[str, ...]:
        """Returns messages for the user about the rows.

        Args:
            loss: whether a loss is computed, which uses the weights of rows.
        """
        unused = any(LOSS_WEIGHTS in row for row in self.rows) and not loss
        return (*self.read_notes, *(["not used: weights of the rows"] if unused else []))

    def batches(self, size: int = BATCH_SIZE, *, labels: bool = True) -> list[dict[str, Tensor]]:
        """Returns the rows in batches."""
        given = (self.collate(self.rows[first : first + size]) for first in range(0, len(self.rows), size))
        found = [with_loss_weights(batch) for batch in given]
        return [{name: value for name, value in batch.items() if labels or name != "labels"} for batch in found]


def first_rows(
    model: nn.Module, data: Any, *, rows: int, tokenizer: Any = None, loss: bool = True, **reading: Any
) -> FirstRows:
    """Returns the first rows of data in the form that training gives to the model.

    Args:
        model: the model, adapted or bare.
        data: see :func:`prepare_data`.
        rows: maximal number of rows.
        tokenizer: see :func:`prepare_data`.
        loss: whether a loss will be computed.
        **reading: ``columns`` and ``max_length``; see :func:`prepare_data`.

    Raises:
        ConfigError: an argument is invalid.
        TrainingError: the data cannot be read, or does not fit the model.
    """
    from nbpeft.training.request import TrainRequest  # here, as it imports transformers' Trainer

    found = training_rows(TrainRequest(model, data, tokenizer=tokenizer, skip_bad=None, **reading), loss=loss)
    return FirstRows(list(itertools.islice(iter(found.train), rows)), collator_for(model, tokenizer), found.notes)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Returns whether prompt and completion are inputs of different halves of the model."""
    return bool(getattr(getattr(base_of(model), "config", None), "is_encoder_decoder", False))


def is_causal(model: nn.Module) -> bool:
    """Returns whether each token id has a label at the same position, as in a causal language model."""
    return (
        not is_encoder_decoder(model)
        and classes_of(model) is None
        and embedding_of(base_of(model), output=True) is not None
    )


def check_reading(tokenizer: Any, max_length: Any) -> None:
    """Refuses an invalid tokenizer or length.

    Raises:
        ConfigError: the tokenizer or the length is invalid.
    """
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise ConfigError(f"max_length must be a whole number of at least 1, not {max_length!r}", field="max_length")
    if tokenizer is not None and (not callable(tokenizer) or isinstance(tokenizer, nn.Module)):
        what = ", which is a model" if isinstance(tokenizer, nn.Module) else ""
        raise ConfigError(f"tokenizer must be a tokenizer, not {with_article(tokenizer)}{what}", field="tokenizer")


def _prepared(request: TrainRequest, rows: Any, inputs: ModelInputs) -> PreparedRows:
    model, tokenizer = request.model, request.tokenizer
    check_reading(tokenizer, request.max_length)
    read = prepared(rows, tokenizer, inputs=inputs, **request.reading)
    check: dict[str, Any] = {
        "vocabulary": _vocabulary(model),
        "causal": is_causal(model),
        "classes": inputs.classes if inputs.labels_needed or is_of_texts(model) else None,
    }
    if is_of_texts(model):
        _check_padding(model, tokenizer)
    if isinstance(read.rows, StreamedRows):
        read.rows.check = partial(check_row, **check)
    else:
        check_rows(read.rows, **check)
    return read


def _vocabulary(model: nn.Module) -> int | None:
    """Returns the number of tokens that a model knows; None if it has no embedding."""
    size = getattr(embedding_of(base_of(model)), "num_embeddings", None)
    return size if isinstance(size, int) else None


def _check_loss(base: nn.Module) -> None:
    """Refuses a head without a loss: transformers chooses the loss by the name of the model's own class."""
    if getattr(base, "loss_type", "") is not None or hasattr(base, "_loss_function"):
        return
    head = next((found[0] for name in class_names(base) if (found := _HEAD.search(name))), "")
    code = getattr(inspect.unwrap(type(base).forward), "__code__", None)
    if head and not head.endswith(_LANGUAGE_HEADS) and "loss_function" in getattr(code, "co_names", ()):
        raise TrainingError(
            f"transformers selects the loss by the name of the class and has none for {type(base).__name__}: set "
            f"loss_type = {head!r} on the base model."
        )


def _check_head_is_new(request: TrainRequest) -> None:
    """Refuses names of classes that the rows give to a head which an adapter has trained with numbers."""
    manager = manager_of(request.model)
    if manager is None:
        return
    names = trained_names(request.model) if request.adapter is None else (request.adapter,)
    for copied in manager.copies.values():
        first = dict(copied.original_module.named_parameters())
        for name in names:
            copy = copied.modules_to_save[name].named_parameters() if name in copied.modules_to_save else ()
            if any(part in first and not torch.equal(tensor, first[part].to(tensor)) for part, tensor in copy):
                raise TrainingError(
                    f"the head of {name!r} has learned classes without names, and the rows name their labels: give "
                    "the numbers of the classes, or set label2id and id2label of the model's config"
                )


def _check_padding(model: nn.Module, tokenizer: Any) -> None:
    """Refuses a classifier without a pad token, with which it finds the last token of a text."""
    base: Any = base_of(model)
    if getattr(tokenizer, "pad_token_id", None) is None and getattr(base.config, "pad_token_id", None) is None:
        raise TrainingError(
            f"{type(base).__name__} needs a padding token, but neither its config nor the tokenizer defines one: set "
            "tokenizer.pad_token = tokenizer.eos_token"
        )
