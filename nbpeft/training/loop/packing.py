"""Packing several rows into one sequence, for models that do not mix packed rows."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nbpeft._util.out_of_memory import is_out_of_memory
from nbpeft.display.numbers import plural
from nbpeft.engine.runtime.method_hooks import prepares_calls
from nbpeft.engine.tree.model_tree import is_quantized, main_dtype, manager_of
from nbpeft.errors import ConfigError, TrainingError, in_one_line
from nbpeft.model.from_data.observing import evaluated
from nbpeft.names import LOSS_WEIGHTS, REJECTED
from nbpeft.training.adapters.adapted_model import base_of
from nbpeft.training.data import (
    Collator,
    ModelInputs,
    PackedCollator,
    PackedRows,
    columns_of,
    is_stream,
    joined,
    open_data,
    prepared,
)
from nbpeft.training.data.forms import PROMPTED
from nbpeft.training.data.lengths import lengths_of
from nbpeft.training.data.packing import best_fit
from nbpeft.training.data.reading import default_length
from nbpeft.training.loop.rows import is_causal, model_inputs
from nbpeft.training.monitor.run import Run

_JOINED = {"input_ids", "labels", "attention_mask", "label", "label_ids"}
_CHECKED_TOKENS = 48
"""Number of tokens of each row in the check of a model."""
_ERROR = (1e-3, 0.2)
"""Largest difference of a packed row's logits from its own, in standard deviations: float32, half."""
_LEAK = (1e-3, 1e-2)
"""Largest change of a row's logits by another neighbour, which only changes the choice of a router in equal shapes."""


def pack(
    model: nn.Module,
    rows: Any,
    collator: Collator,
    *,
    max_length: int | None,
    tokenizer: Any,
    given: Mapping[str, Any],
) -> tuple[PackedRows, PackedCollator]:
    """Packs the training rows of a model.

    Args:
        model: the model, adapted or bare.
        rows: result of ``prepare_data``.
        collator: collator of unpacked rows.
        max_length: number of tokens per sequence; by default the length to which rows are cut, or that of the longest.
        tokenizer: determines the length to which rows are cut.
        given: options of the Trainer.

    Returns:
        The packed sequences, and their collator.

    Raises:
        ConfigError: these rows, or rows of this model, cannot be packed.
    """
    _refuse_to_pack(model)
    if "data_collator" in given:
        raise _refusal("the given data_collator makes its own batches")
    if is_stream(rows):
        raise _refusal("the rows of a stream are not known in advance; pass a list or a dataset")
    lengths = lengths_of(rows)
    if lengths is None:
        raise _refusal("only tokenized rows of a list or a dataset that is read at once can be packed")
    extra = sorted((set(rows[0]) - _JOINED) & set(inspect.signature(base_of(model).forward).parameters))
    if extra:
        raise _refusal(f"the rows have {', '.join(extra)} in addition to tokens and labels")
    packed = PackedRows(rows, max_length or max(default_length(tokenizer), *lengths))
    return packed, _packed_collator(model, collator)


class LongestSequence(NamedTuple):
    """The longest sequence in a training.

    Attributes:
        length: its length in tokens.
        per_row: the number of sequences of a row.
        description: which one it is, as text: ``the longest of 40 rows, whose median is 25``.
    """

    length: int
    per_row: int
    description: str


def longest_sequence(
    model: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    packing: bool = False,
) -> LongestSequence:
    """Returns the longest sequence in a training.

    A sequence is a row, or several rows packed together, or the chosen or the rejected completion of a row.

    Args:
        model: the trained model; a config or a name is treated as a causal language model.
        data: rows, or where they are.
        tokenizer: as for training, like the further arguments.
        max_length: number of tokens to which rows are cut.
        columns: names of the columns.
        packing: whether rows are packed.

    Raises:
        ConfigError: these rows, or rows of this model, cannot be packed.
        TrainingError: the data cannot be read, or the lengths of its rows are unknown.
    """
    inputs = replace(model_inputs(model) if isinstance(model, nn.Module) else ModelInputs(), kind=None)
    opened = open_data(data, skip_bad=None)  # no command that calls it can leave rows out
    rows = prepared(opened, tokenizer, max_length=max_length, columns=columns, inputs=inputs).rows
    lengths = lengths_of(rows)
    if lengths is None:
        raise TrainingError("the lengths of these rows are unknown; pass a sequence length")
    pairs = f"{REJECTED}input_ids" in columns_of(rows)
    if PROMPTED.needs[0] in columns_of(rows):
        raise TrainingError(
            f"these rows have prompts alone, of up to {max(lengths):,} tokens: give a sequence length that includes "
            "the completions"
        )
    if not packing:
        words = f"the longest of {plural(len(lengths), 'row')}, whose median is {statistics.median_low(lengths):,}"
        return LongestSequence(max(lengths), 2 if pairs else 1, words)
    if pairs:
        raise _refusal("each row has a chosen and a rejected completion")
    if isinstance(model, nn.Module):
        _refuse_to_pack(model)
    packs = best_fit(lengths, max_length or max(default_length(tokenizer), *lengths))
    longest = max(sum(lengths[row] for row in pack) for pack in packs)
    return LongestSequence(longest, 1, f"the fullest of {plural(len(packs), 'packed sequence')}")


def _refuse_to_pack(model: nn.Module) -> None:
    """Refuses a model whose architecture or adapters would mix the rows of one sequence."""
    base = base_of(model)
    name = type(base).__name__
    if not is_causal(model):
        raise _refusal(f"it needs a causal language model, and {name} is not one")
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise _refusal(f"{name} accepts no position_ids, so a row would attend to the row before it")
    if getattr(getattr(base, "config", None), "output_router_logits", False):
        raise _refusal(f"the router loss of {name} is that of whole sequences; set config.output_router_logits = False")
    manager = manager_of(model)
    configs = {} if manager is None else {adapter: manager.configs[adapter] for adapter in manager.active}
    for adapter, config in configs.items():
        if config.learns_prompt:
            raise _refusal(f"adapter {adapter!r} prepends tokens to each sequence, not to each row in it")
        if prepares_calls(config):
            raise _refusal(f"adapter {adapter!r} would process each sequence as a single row")


def _packed_collator(model: nn.Module, plain: Collator) -> PackedCollator:
    """Returns the packing collator for a model: without padding if its attention supports variable lengths."""
    base: Any = base_of(model)
    kernel = str(getattr(getattr(base, "config", None), "_attn_implementation", ""))
    takes_more = any(part.kind is part.VAR_KEYWORD for part in inspect.signature(base.forward).parameters.values())
    return PackedCollator(plain, flat="flash" in kernel and takes_more)


class PackingCheck(TrainerCallback):
    """Tests a model with two rows before the first step, packed and separate, and refuses it if it mixes them."""

    def __init__(self, run: Run, rows: PackedRows, collator: PackedCollator) -> None:
        self._rows, self._collator = rows, collator
        run.note(str(rows))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Raises ConfigError if the logits of a packed row differ from those of the row alone."""
        check_packing(model, self._rows, self._collator, args.device, mixed=args.bf16 or args.fp16)


def check_packing(
    model: nn.Module, rows: PackedRows, collator: PackedCollator, device: torch.device, *, mixed: bool = False
) -> None:
    """Compares the logits of two packed rows with those of each alone, and with another row before the second.

    This changes neither weights nor random state. If no sequence has two rows, nothing is compared.

    Args:
        model: the model in training.
        rows: the packed training rows, of which two are used.
        collator: the packing collator.
        device: the model's device.
        mixed: whether it computes in half precision regardless of the dtype of its weights.

    Raises:
        ConfigError: the logits differ, so that the model mixes packed rows.
    """
    numbers = next((pack for pack in map(rows.rows_of, range(len(rows))) if len(pack) > 1), None)
    if numbers is None:
        return
    cut = [{key: value[:_CHECKED_TOKENS] for key, value in rows.row(number).items()} for number in numbers[:2]]
    before, row = cut
    other = {**before, "input_ids": before["input_ids"][1:] + before["input_ids"][:1]}
    length, own = len(before["input_ids"]), len(row["input_ids"])
    with evaluated(model), torch.no_grad():
        try:
            packed = _logits(model, collator([joined([before, row]), joined([other, row])]), device)
            alone = _logits(model, collator([row]), device).reshape(own, -1)
            first, second = packed.reshape(2, length + own, -1)[:, length:]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            name = type(base_of(model)).__name__
            raise _refusal(f"{name} does not run on packed rows ({in_one_line(error):.120})") from error
    spread = float(alone.float().std()) or 1.0
    half = mixed or is_quantized(base_of(model)) or main_dtype(model).itemsize < 4
    leak, away = (float((first - other).abs().max()) / spread for other in (second, alone))
    if leak > _LEAK[half] or away > _ERROR[half]:
        raise _refusal(f"in a test, the logits of {type(base_of(model)).__name__} depended on the row before")


def _logits(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in ("labels", LOSS_WEIGHTS)
    }
    output: Tensor = model(**inputs).logits
    return output


def _refusal(reason: str) -> ConfigError:
    return ConfigError(f"packing: {reason}; train without packing", field="packing")
