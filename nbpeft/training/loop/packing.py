"""Several rows in one sequence, for models of which each row then learns what it would learn alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from nbpeft.engine.runtime.method_hooks import prepares_calls
from nbpeft.engine.tree.model_tree import is_quantized, manager_of
from nbpeft.errors import ConfigError, TrainingError, in_one_line
from nbpeft.model.from_data.observing import evaluated
from nbpeft.names import LOSS_WEIGHTS
from nbpeft.training.adapters.adapted_model import base_of, main_dtype
from nbpeft.training.data import Collator, PackedCollator, PackedRows, is_stream, joined, prepare_data
from nbpeft.training.data.lengths import lengths_of
from nbpeft.training.data.packing import best_fit
from nbpeft.training.data.reading import default_length
from nbpeft.training.loop.rows import is_causal, model_inputs
from nbpeft.training.monitor.failures import is_out_of_memory
from nbpeft.training.monitor.run import Run

_JOINED = {"input_ids", "labels", "attention_mask", "label", "label_ids"}
_CHECKED_TOKENS = 48
"""Of each row that the model is tried with."""
_ERROR = (1e-3, 0.2)
"""How far the logits of a packed row may be from its own, as a share of their standard deviation; in half precision."""
_LEAK = (1e-3, 1e-2)
"""How far another neighbour may move them: nothing should, in one and the same shape, but for a router's choice."""


def pack(
    model: nn.Module,
    rows: Any,
    collator: Collator,
    *,
    max_length: int | None,
    tokenizer: Any,
    given: Mapping[str, Any],
) -> tuple[PackedRows, PackedCollator]:
    """Packs the rows that a model is to learn.

    Args:
        model: adapted or bare.
        rows: what ``prepare_data`` gave.
        collator: of rows that are not packed.
        max_length: tokens of a sequence; by default what rows are cut to, or the longest of them.
        tokenizer: says what rows are cut to.
        given: options of the Trainer.

    Returns:
        The sequences, and what makes batches of them.

    Raises:
        ConfigError: these rows, or those of this model, cannot be packed.
    """
    refuse_to_pack(model)
    if "data_collator" in given:
        raise _refusal("the data_collator that is given makes batches of its own")
    if is_stream(rows):
        raise _refusal("a stream's rows are not known before they come; give a list of them, or a dataset")
    lengths = lengths_of(rows)
    if lengths is None:
        raise _refusal("only rows of tokens can be packed, from a list or a dataset that is read at once")
    extra = sorted((set(rows[0]) - _JOINED) & set(inspect.signature(base_of(model).forward).parameters))
    if extra:
        raise _refusal(f"the rows hold {', '.join(extra)} besides tokens and labels")
    packed = PackedRows(rows, max_length or max(default_length(tokenizer), *lengths))
    return packed, packed_collator(model, collator)


def longest_sequence(
    model: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    packing: bool = False,
) -> int:
    """Tokens of the longest sequence that a training on some data would have: of a row, or of rows packed together.

    Args:
        model: that is trained; a config or name of one is taken for a causal language model.
        data: rows, or where they are.
        tokenizer: as for training, like the others.
        max_length: tokens a row is cut to.
        columns: what the columns are called.
        packing: whether rows are packed.

    Raises:
        ConfigError: these rows, or those of this model, cannot be packed.
        TrainingError: the data cannot be read, or its rows have no known length.
    """
    inputs = model_inputs(model) if isinstance(model, nn.Module) else None
    rows = prepare_data(data, tokenizer, max_length=max_length, columns=columns, inputs=inputs)
    lengths = lengths_of(rows)
    if lengths is None:
        raise TrainingError("how long these rows are is not known without going through them; give a sequence length")
    if not packing:
        return max(lengths)
    if isinstance(model, nn.Module):
        refuse_to_pack(model)
    packs = best_fit(lengths, max_length or max(default_length(tokenizer), *lengths))
    return max(sum(lengths[row] for row in pack) for pack in packs)


def refuse_to_pack(model: nn.Module) -> None:
    """Refuses a model whose kind says already that rows of one sequence would not be apart.

    Raises:
        ConfigError: it is one.
    """
    base = base_of(model)
    name = type(base).__name__
    if not is_causal(model):
        raise _refusal(f"it is for causal language models, and {name} is none")
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise _refusal(f"{name} takes no position_ids, so that a row would read on from the one before it")
    if getattr(getattr(base, "config", None), "output_router_logits", False):
        raise _refusal(f"the routers of {name} have a loss of whole sequences; config.output_router_logits = False")
    manager = manager_of(model)
    configs = {} if manager is None else {adapter: manager.configs[adapter] for adapter in manager.active}
    for adapter, config in configs.items():
        if config.is_prompt_learning:
            raise _refusal(f"adapter {adapter!r} puts tokens in front of each sequence, not of each row in it")
        if prepares_calls(config):
            raise _refusal(f"adapter {adapter!r} looks for something in each sequence, and would take it for one row")


def packed_collator(model: nn.Module, plain: Collator) -> PackedCollator:
    """The collator for a model: flat where its attention takes sequences of any length beside each other."""
    base: Any = base_of(model)
    kernel = str(getattr(getattr(base, "config", None), "_attn_implementation", ""))
    takes_more = any(part.kind is part.VAR_KEYWORD for part in inspect.signature(base.forward).parameters.values())
    return PackedCollator(plain, flat="flash" in kernel and takes_more)


class PackingCheck(TrainerCallback):
    """Tries a model with two rows before the first step, packed and alone, and refuses one that mixes them.

    Args:
        run: says how full the sequences are.
        rows: that the model is to learn.
        collator: of the batches.
    """

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
        """Raises ConfigError where logits of a packed row are not those that it has alone."""
        check_packing(model, self._rows, self._collator, args.device, mixed=args.bf16 or args.fp16)


def check_packing(
    model: nn.Module, rows: PackedRows, collator: PackedCollator, device: torch.device, *, mixed: bool = False
) -> None:
    """Compares the logits of two rows packed with those of each alone, and with another row before the second.

    Nothing is learned or drawn meanwhile; where no sequence holds two rows there is nothing to compare.

    Args:
        model: as it is trained.
        rows: two of which are tried.
        collator: of the batches.
        device: where the model is.
        mixed: whether it computes in half precision whatever its weights are.

    Raises:
        ConfigError: they differ, so that packed rows would not be learned as they are.
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
        raise _refusal(f"{type(base_of(model)).__name__} reads a row differently behind another one, as it was tried")


def _logits(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    given = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in ("labels", LOSS_WEIGHTS)
    }
    output: Tensor = model(**given).logits
    return output


def _refusal(reason: str) -> ConfigError:
    return ConfigError(f"packing: {reason}; train without packing", field="packing")
