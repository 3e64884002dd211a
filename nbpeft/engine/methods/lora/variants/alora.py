"""aLoRA: activated LoRA (Greenewald et al. 2025, arXiv:2504.12397).

The adapter is active on the tokens from the last occurrence of an invocation sequence in each row onward, and on no
token of a row without the sequence. So the cached keys and values of earlier tokens are those of the base model: one
prompt can be processed once and answered by several such adapters.

The position of the invocation is determined once for each call of the model, from its ``input_ids``. A layer's input
may have fewer tokens (``generate`` does not recompute cached ones) or more (generated tokens, without a cache): they
are the last tokens of the sequence. A call may pass the positions itself, in ``alora_offsets`` as in PEFT.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.adapter import AdapterWeights, FusesAdd, TaskType
from nbpeft.engine.contract.base import BaseLayer, LayerKind
from nbpeft.engine.contract.method_records import CallInputs
from nbpeft.engine.contract.registry import register
from nbpeft.engine.kernels.numerics import add_delta
from nbpeft.engine.methods.lora.combining.adapters import CombineLowRank
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.family import FAMILY, FILES, listing
from nbpeft.engine.methods.lora.plain import PlainLowRank
from nbpeft.errors import AdapterError

_OFFSETS = "alora_offsets"
"""Argument of a call: for each row, how many tokens before its end it is invoked, or None."""
_ANY_LENGTH = 2**31
"""The length of rows that a call does not show: tokens are counted from their end."""
_DRAFTING = ("assistant_model", "prompt_lookup_num_tokens")
"""Arguments of ``generate`` for assisted generation, which checks several new tokens at once."""


def invocation_starts(input_ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Finds the last occurrence of a sequence in each row.

    Args:
        input_ids: (batch, length), or (length,) for one row.
        tokens: the sequence.

    Returns:
        int64 (batch,) on the CPU: the position of its first token; -1 for rows without it.
    """
    rows = input_ids if input_ids.ndim == 2 else input_ids.unsqueeze(0)
    if rows.shape[1] < len(tokens):
        return torch.full((rows.shape[0],), -1)
    sought = torch.tensor(tokens, dtype=rows.dtype, device=rows.device)
    matches = (rows.unfold(1, len(tokens), 1) == sought).all(-1)
    places = torch.arange(matches.shape[1], device=rows.device)
    return torch.where(matches, places, -1).amax(1).cpu()


def _invoked(config: LoraConfig, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The context of layers in a call, int64 (batch, 3): start of the invocation, length, and whether it drafts."""
    offsets = kwargs.get(_OFFSETS)
    if config.task_type != TaskType.CAUSAL_LM and offsets is None:
        return None
    given = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if not isinstance(given, Tensor) or given.is_floating_point():
        if offsets is not None:
            return _of_rows(_starts(offsets, _ANY_LENGTH), _ANY_LENGTH, kwargs)
        if kwargs.get("inputs_embeds") is not None:
            warnings.warn(
                "inputs_embeds do not say where alora_invocation_tokens are: the adapter does not act in this call; "
                "pass input_ids",
                stacklevel=2,
            )
        return None
    length = given.shape[-1]
    starts = invocation_starts(given, config.alora_invocation_tokens or ())
    return _of_rows(starts if offsets is None else _starts(offsets, length), length, kwargs)


def _starts(offsets: Iterable[int | None], length: int) -> Tensor:
    """The first token that an adapter acts on in each row, (batch,) int64; -1 where it does not act."""
    return torch.tensor([-1 if offset is None else max(length - int(offset), 0) for offset in offsets])


def _of_rows(starts: Tensor, length: int, kwargs: Mapping[str, Any]) -> Tensor:
    drafts = any(kwargs.get(name) is not None for name in _DRAFTING)
    return torch.stack([starts, torch.full_like(starts, length), torch.full_like(starts, drafts)], 1)


class _CombineInvoked(CombineLowRank):
    """Combines adapters with the same invocation tokens."""

    def check(self, configs: Sequence[Any], adapters: Sequence[str]) -> None:
        for name, config in zip(adapters, configs, strict=True):
            if config.alora_invocation_tokens != configs[0].alora_invocation_tokens:
                raise AdapterError(
                    f"adapters with different alora_invocation_tokens cannot be combined: {adapters[0]!r} has "
                    f"{configs[0].alora_invocation_tokens}, {name!r} has {config.alora_invocation_tokens}"
                )


def _no_plain_lora(config: Any, adapters: Mapping[str, Any], weights: AdapterWeights) -> tuple[Any, AdapterWeights]:
    raise AdapterError("it is aLoRA, which acts on some tokens only: save it as it is")


@register(
    LoraConfig,
    label="aLoRA",
    listing=listing(
        when="switching adapters within a conversation: the KV cache of the prompt is reused",
        paper="arXiv:2504.12397",
        listed_with={"alora_invocation_tokens": [0], "task_type": "CAUSAL_LM"},
    ),
    applies=lambda config: config.variant == "alora_invocation_tokens",
    calls=CallInputs(context=_invoked, arguments=(_OFFSETS,)),
    **{**FAMILY, "combine": _CombineInvoked(), "files": replace(FILES, without_weight=_no_plain_lora)},
)
class ALoRA(PlainLowRank, FusesAdd):
    """An aLoRA adapter on one layer."""

    linear_setting: ClassVar[str] = "alora_invocation_tokens"

    @classmethod
    def config_warnings(cls, config: Any, modules: Sequence[tuple[str, nn.Module, LayerKind]]) -> Iterable[str]:
        yield from super().config_warnings(config, modules)
        if config.task_type != TaskType.CAUSAL_LM:
            yield (
                "alora_invocation_tokens acts only with task_type='CAUSAL_LM': this adapter will not act unless a call "
                "passes alora_offsets"
            )

    def unmergeable_reason(self, base: BaseLayer) -> str:
        return "a weight: aLoRA does not support merging, it acts only on tokens from its invocation onward"

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer, fused: bool = False) -> Tensor:
        """``s * B A dropout(x)`` for the tokens from the invocation onward, zeros before.

        An input of two dimensions is one token of each row. The context of ``base`` is the result of ``_invoked``, or
        None if the adapter is not invoked.

        Raises:
            AdapterError: the first dimension of the input is not the batch.
        """
        if x.ndim == 2:
            return self.forward(x.unsqueeze(1), base_output.unsqueeze(1), base, fused).squeeze(1)
        first = _first_tokens(base.context, x)
        lowest = int(first.min()) if len(first) else 0
        before, after = base_output[:, :lowest], base_output[:, lowest:]
        delta = super().forward(x[:, lowest:], after, base)
        if bool((first != lowest).any()):
            place = torch.arange(lowest, x.shape[1], device=x.device)
            acts = place >= first.to(x.device).unsqueeze(1)
            delta = delta.masked_fill(~acts.view(*acts.shape, *[1] * (delta.ndim - 2)), 0.0)
        if fused:
            delta, before = add_delta(after, delta), before.to(base_output.dtype)
        else:
            before = torch.zeros_like(before, dtype=delta.dtype)
        return torch.cat([before, delta], 1) if lowest else delta


def _first_tokens(invoked: Tensor | None, x: Tensor) -> Tensor:
    """The index of the first token of each row on which the adapter is active, (batch,) on the CPU."""
    batch, count = x.shape[:2]
    if invoked is None:
        return torch.full((batch,), count)
    beams, rest = divmod(batch, len(invoked))
    if rest or not beams:
        raise AdapterError(
            f"a layer with alora_invocation_tokens was given an input of shape {tuple(x.shape)} in a batch of "
            f"{len(invoked)} rows: leave layers whose input does not have the rows in front out of target_modules"
        )
    start, length, drafts = invoked.repeat_interleave(beams, 0).unbind(1)
    end = length.clamp_min(count)
    first = (start - (end - count)).clamp(0, count)
    first = first.masked_fill((drafts > 0) & (count < length), 0)
    return first.masked_fill(start < 0, count)
