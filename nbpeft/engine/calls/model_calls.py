"""Inserts prompts into the calls of a model: embeddings, mask, positions, cache and labels.

A hook on the model transforms each of its calls, whatever code makes it: ``forward`` of a ``PeftModel``, each step of
``generate``, a Trainer. Like every layer it reads which adapters are active, so threads, ``use`` and mixed batches work
here too. In a mixed batch, shorter prompts are padded on the left and masked. If an adapter weights the labels, they
are removed from the call, and a second hook computes the loss from the model's output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.manual_prompts import given_tokens, is_put_in
from nbpeft.engine.calls.model_properties import (
    CACHES,
    cache_argument,
    cache_in,
    checkpoints_gradients,
    has_encoder,
    is_text_classifier,
    parameters_of,
    part_with_cache,
)
from nbpeft.engine.changes.active_state import RowAssignment
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.config.adapter_names import check_scale
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.loss_terms import share_of_batch
from nbpeft.engine.contract.model_adapter import ModelAdapter, WeighsTokens, learns_prompt
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import AdapterError
from nbpeft.names import IGNORED_LABEL

# The hooks


def put_hooks(model: nn.Module, layer: AdaptedLayer, change: Transaction) -> None:
    """Registers the hooks that let an embedding's model adapters transform calls of the model; once for each.

    Args:
        model: the base model.
        layer: its adapted input embedding.
        change: records the hooks of the modules.
    """
    for module, hook in _hooks(model, layer).items():
        present = [type(other) for other in module._forward_pre_hooks.values() if _layer_of(other) is layer]
        if type(hook) not in present:
            # torch lists hooks that take keywords in a second dictionary, which has to be restored with the first.
            change.keep(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
            module.register_forward_pre_hook(hook, with_kwargs=True)
    weighs = any(isinstance(adapter, WeighsTokens) for adapter in layer.adapters._modules.values())
    if weighs and not any(_layer_of(hook) is layer for hook in model._forward_hooks.values()):
        change.keep(model._forward_hooks, model._forward_hooks_with_kwargs)
        model.register_forward_hook(_LossHook(layer), with_kwargs=True)


def take_hooks(modules: Iterable[nn.Module], layers: Collection[int], change: Transaction) -> None:
    """Removes the hooks for adapted embeddings that are no longer part of the model.

    Args:
        modules: all modules of the base model.
        layers: ids of the embeddings that were taken out.
        change: records the hooks of the modules.
    """
    # Not by the handles of the hooks: a copied or unpickled model has hooks, but nobody has their handles.
    for module in modules:
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            gone = [key for key, hook in hooks.items() if id(_layer_of(hook)) in layers]
            if gone:
                change.keep(hooks, with_kwargs)
            for key in gone:
                del hooks[key], with_kwargs[key]


def _layer_of(hook: Any) -> AdaptedLayer | None:
    return hook.layer if isinstance(hook, LayerHook) else None


def _encoder_of(model: nn.Module) -> nn.Module | None:
    return model.get_encoder() if has_encoder(model) and hasattr(model, "get_encoder") else None  # type: ignore[operator]


def _hooks(model: nn.Module, layer: AdaptedLayer) -> dict[nn.Module, _CallHook]:
    encoder = _encoder_of(model)
    if encoder is not None:
        return {model: _EncoderDecoderHook(layer), encoder: _EncoderHook(layer)}
    hooks: dict[nn.Module, _CallHook] = {model: _ModelHook(layer)}
    cached = part_with_cache(model)
    if cached is not None and cached is not model:
        hooks[cached] = _CacheHook(layer)
    return hooks


class _Call(dict[str, Any]):
    """The arguments of a call, by name.

    Attributes:
        learned: labels and their weights, if the loss is to be computed from the model's output; else None.
    """

    learned: tuple[Tensor, Tensor] | None = None


class LayerHook:
    """A hook on a module of a model on behalf of the adapters of a layer.

    Args:
        layer: the layer with the adapters; that of model adapters is the adapted input embedding.
    """

    def __init__(self, layer: AdaptedLayer) -> None:
        self.layer = layer


class _CallHook(LayerHook):
    """A hook that transforms the arguments of each call of a module."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prompts = _active_prompts(self.layer)
        if prompts is None:
            return None
        named = _Call(zip(parameters_of(module), args, strict=False))
        named.update(kwargs)
        if is_put_in(self.layer, named, cache_in(named, cache_argument(module))):
            return None
        prompts = prompts.with_arguments_of(named)
        with self.layer.onloaded_parts():
            self.transform(module, prompts, named)
        return (), named

    def transform(self, module: nn.Module, prompts: _Prompts, call: _Call) -> None:
        """Changes the arguments of a call.

        Args:
            module: the module that is called.
            prompts: the active adapters.
            call: name -> argument; changed in place.
        """
        raise NotImplementedError


class _ModelHook(_CallHook):
    """Hook on a model that has no separate encoder."""

    def transform(self, module: nn.Module, prompts: _Prompts, call: _Call) -> None:
        """Inserts tokens and, if the model takes a cache, keys and values."""
        name = cache_argument(module)
        states = prompts.counts(_STATES) if name else {}
        tokens = prompts.counts(_TOKENS)
        size = _size(call)
        if size is None or not (states or tokens):
            return
        batch, length, device = size
        seen = _seen(call, name)
        front = prompts.front(states, batch, device).followed_by(prompts.front(tokens, batch, device))
        new_tokens = prompts.front(tokens, batch, device) if not seen else None
        _extend_positions(module, call, front, new_tokens, length, seen)
        _extend_mask(call, "attention_mask", front, length, seen)
        if seen:
            return
        if states:
            call[name] = _filled(module, call.get(name), prompts.joined(_STATES, batch, device), self.layer.base)
        if tokens:
            _put_tokens(call, "inputs_embeds", "input_ids", prompts.joined(_TOKENS, batch, device), self.layer)
            _extend_labels(module, call, length, front.width - prompts.front(states, batch, device).width)
            _take_labels(call, prompts, length)


class _LossHook(LayerHook):
    """A hook that computes the loss of a call whose labels an adapter weights."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        learned = kwargs.learned if isinstance(kwargs, _Call) else None
        if learned is None:
            return None
        in_tuple = isinstance(output, tuple)
        logits = output[0] if in_tuple else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[:2] != learned[0].shape:
            raise AdapterError(
                f"{type(module).__name__} does not return the logits of all tokens, which the adapter's loss needs"
            )
        loss = _weighted_mean(logits, *learned)
        if in_tuple:
            return loss, *output
        if is_dataclass(output) and not isinstance(output, type):
            return replace(output, loss=loss)  # not appended: a ModelOutput is read by position, too
        output.loss = loss
        return output


def _take_labels(call: _Call, prompts: _Prompts, length: int) -> None:
    """Removes the labels from a call if an adapter weights them, and stores them with their weights in the call."""
    labels = call.get("labels")
    weighing = {name: pair for name, pair in prompts.adapters.items() if isinstance(pair[0], WeighsTokens)}
    if not weighing or not isinstance(labels, Tensor):
        return
    front = call["inputs_embeds"].shape[1] - length
    if labels.shape != call["inputs_embeds"].shape[:2]:
        raise AdapterError(f"labels must have one entry for each of the {length} tokens of a row")
    items = call.pop("num_items_in_batch", None)
    # With gradient accumulation the mean over all tokens is the sum of the batches' means times their shares of tokens.
    share = share_of_batch(labels[:, front:], items, shifts=True)
    weights = torch.ones_like(labels, dtype=torch.float32) * share
    counts = prompts.counts(_TOKENS)
    has_prompt = prompts.front(counts, len(labels), labels.device).mask
    if has_prompt is not None:  # the first token of a row without a prompt is predicted by nothing
        labels = labels.clone()
        labels[:, front].masked_fill_(~has_prompt[:, -1], IGNORED_LABEL)
    for name, (adapter, base) in weighing.items():
        assert isinstance(adapter, WeighsTokens)
        own_labels, factors = adapter.learned(labels, prompts.start_of(name, counts), front, base)
        if prompts.rows is not None:
            served = (prompts.rows.repeat_to(len(labels), labels.device) == prompts.rows.names.index(name)).unsqueeze(1)
            own_labels, factors = torch.where(served, own_labels, labels), torch.where(served, factors, 1.0)
        labels, weights = own_labels, weights * factors
    del call["labels"]
    call.pop("shift_labels", None)
    call.learned = labels, weights


def _weighted_mean(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The weighted cross entropy of next tokens, divided by the number of labels that are not ignored; float32."""
    labels, weights = labels[:, 1:].to(logits.device), weights[:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return (losses * weights.flatten()).sum() / (labels != IGNORED_LABEL).sum()


class _CacheHook(_CallHook):
    """Hook on a backbone that takes a cache, of a model that does not."""

    def transform(self, module: nn.Module, prompts: _Prompts, call: dict[str, Any]) -> None:
        """Inserts keys and values."""
        states, size = prompts.counts(_STATES), _size(call)
        if not states or size is None:
            return
        batch, length, device = size
        name = cache_argument(module)
        front = prompts.front(states, batch, device)
        _extend_positions(module, call, front, None, length, 0)
        _extend_mask(call, "attention_mask", front, length, 0)
        _seen(call, name)
        call[name] = _filled(module, call.get(name), prompts.joined(_STATES, batch, device), self.layer.base)


class _EncoderHook(_CallHook):
    """Hook on the encoder of an encoder-decoder model, which ``generate`` calls separately."""

    def transform(self, module: nn.Module, prompts: _Prompts, call: dict[str, Any]) -> None:
        """Inserts tokens; the mask is already extended if the whole model was called."""
        tokens, size = prompts.counts(_TOKENS), _size(call)
        if not tokens or size is None:
            return
        batch, length, device = size
        mask = call.get("attention_mask")
        if mask is None or mask.shape[-1] == length:
            _extend_mask(call, "attention_mask", prompts.front(tokens, batch, device), length, 0)
        _put_tokens(call, "inputs_embeds", "input_ids", prompts.joined(_TOKENS, batch, device), self.layer)


class _EncoderDecoderHook(_CallHook):
    """Hook on an encoder-decoder model: extends the encoder's mask, and inserts the decoder's part of a prompt."""

    def transform(self, module: nn.Module, prompts: _Prompts, call: dict[str, Any]) -> None:
        """Extends masks, the decoder's input and labels, and the cache."""
        tokens = prompts.counts(_TOKENS)
        encoded = call.get("encoder_outputs")
        if tokens:
            self._extend_encoder_mask(prompts, call, tokens, encoded)
        if encoded is None and prompts.counts(_DECODER_TOKENS):
            self._put_decoder_tokens(module, prompts, call)
        if prompts.counts(_STATES):
            self._put_states(module, prompts, call)

    def _extend_encoder_mask(
        self, prompts: _Prompts, call: dict[str, Any], tokens: Mapping[str, int], encoded: Any
    ) -> None:
        mask = call.get("attention_mask")
        size = _size(call)
        ragged = prompts.rows is not None
        if encoded is not None:
            length = encoded[0].shape[1] - max(tokens.values(), default=0) if ragged else None
            if mask is not None and mask.shape[-1] < encoded[0].shape[1]:
                _extend_mask(call, "attention_mask", prompts.front(tokens, len(mask), mask.device), mask.shape[-1], 0)
            elif mask is None and length is not None:
                front = prompts.front(tokens, len(encoded[0]), encoded[0].device)
                _extend_mask(call, "attention_mask", front, length, 0)
        elif size is not None:
            batch, length, device = size
            _extend_mask(call, "attention_mask", prompts.front(tokens, batch, device), length, 0)

    def _put_decoder_tokens(self, module: Any, prompts: _Prompts, call: dict[str, Any]) -> None:
        labels = call.get("labels")
        if call.get("decoder_input_ids") is None and call.get("decoder_inputs_embeds") is None:
            if labels is None:
                return
            call["decoder_input_ids"] = module.prepare_decoder_input_ids_from_labels(labels)
        size = _size(call, "decoder_input_ids", "decoder_inputs_embeds")
        assert size is not None
        batch, length, device = size
        front = prompts.front(prompts.counts(_DECODER_TOKENS), batch, device)
        _extend_mask(call, "decoder_attention_mask", front, length, 0)
        joined = prompts.joined(_DECODER_TOKENS, batch, device)
        _put_tokens(call, "decoder_inputs_embeds", "decoder_input_ids", joined, self.layer)
        if labels is not None:
            call["labels"] = _with_ignored(labels, front.width)

    def _put_states(self, module: nn.Module, prompts: _Prompts, call: dict[str, Any]) -> None:
        name = cache_argument(module)
        seen = _seen(call, name)
        size = _size(call, "decoder_input_ids", "decoder_inputs_embeds", "labels")
        if size is None:
            return
        batch, length, device = size
        front = prompts.front(prompts.counts(_STATES), batch, device)
        _extend_mask(call, "decoder_attention_mask", front, length, seen)
        if call.get("decoder_position_ids") is not None:
            call["decoder_position_ids"] = call["decoder_position_ids"] + front.offset
        if not seen:
            call[name] = _filled(module, call.get(name), prompts.joined(_STATES, batch, device), self.layer.base)


# The active adapters, and their part of the input


@dataclass(frozen=True)
class _Kind:
    """A part of the input that model adapters provide: tokens, decoder tokens, or keys and values."""

    count: Callable[[ModelAdapter], int]
    give: Callable[[ModelAdapter, BaseLayer], Tensor]


_TOKENS = _Kind(lambda adapter: adapter.token_count, lambda adapter, base: adapter.input_tokens(base))
_DECODER_TOKENS = _Kind(lambda adapter: adapter.decoder_token_count, lambda adapter, base: adapter.decoder_tokens(base))
_STATES = _Kind(lambda adapter: adapter.state_count, lambda adapter, base: adapter.cached_states(base))


@dataclass(frozen=True)
class _Front:
    """Positions of a prompt, before the input.

    Attributes:
        width: number of positions.
        mask: bool (batch, width), False for padding of rows with a shorter prompt; None if no row is padded.
    """

    width: int
    mask: Tensor | None

    def followed_by(self, other: _Front) -> _Front:
        """These positions, followed by the others."""
        if self.mask is None and other.mask is None:
            return _Front(self.width + other.width, None)
        mask = self.mask if self.mask is not None else other.mask
        assert mask is not None
        masks = [front.filled(len(mask), mask.device) for front in (self, other)]
        return _Front(self.width + other.width, torch.cat(masks, 1))

    def filled(self, batch: int, device: torch.device) -> Tensor:
        """The mask as a tensor, bool (batch, width)."""
        return torch.ones(batch, self.width, dtype=torch.bool, device=device) if self.mask is None else self.mask

    @property
    def offset(self) -> Any:
        """The shift of the input's positions: a number, or (batch, 1)."""
        return self.width if self.mask is None else self.mask.sum(1, keepdim=True)

    def positions(self) -> Tensor:
        """The position ids, int64 (1 or batch, width)."""
        if self.mask is None:
            return torch.arange(self.width).unsqueeze(0)
        return (self.mask.long().cumsum(1) - 1).clamp(min=0)


@dataclass(frozen=True)
class _Prompts:
    """The active model adapters of a call.

    Attributes:
        adapters: name -> adapter, and the embedding with the adapter's context.
        rows: the assignment of a mixed batch.
    """

    adapters: Mapping[str, tuple[ModelAdapter, BaseLayer]]
    rows: RowAssignment | None

    def with_arguments_of(self, call: dict[str, Any]) -> _Prompts:
        """A copy in which each adapter's base has the adapter's call argument, which is removed from the call."""
        names = {adapter.call_argument for adapter, _ in self.adapters.values()} - {""}
        arguments = {name: call.pop(name) for name in names if name in call}
        prompts = {
            name: (adapter, base if base.context is not None else base.within(arguments.get(adapter.call_argument)))
            for name, (adapter, base) in self.adapters.items()
        }
        return _Prompts(prompts, self.rows)

    def counts(self, kind: _Kind) -> dict[str, int]:
        """Adapter name -> number of positions of a kind that it provides, if any."""
        counts = {name: kind.count(adapter) for name, (adapter, _) in self.adapters.items()}
        return {name: count for name, count in counts.items() if count}

    def front(self, counts: Mapping[str, int], batch: int, device: torch.device) -> _Front:
        """The positions of the adapters' prompts: one after the other or, in a mixed batch, row by row.

        Args:
            counts: adapter name -> number of positions.
            batch: rows of the batch.
            device: device of the mask.
        """
        if self.rows is None or not counts:
            return _Front(sum(counts.values()), None)
        width = max(counts.values())
        index = self.rows.repeat_to(batch, device)
        per_name = torch.tensor([*(counts.get(name, 0) for name in self.rows.names), 0], device=device)
        missing = width - per_name[index]  # -1, the base alone, is the last entry
        return _Front(width, torch.arange(width, device=device).unsqueeze(0) >= missing.unsqueeze(1))

    def start_of(self, name: str, counts: Mapping[str, int]) -> int:
        """The position of an adapter's first token, given the adapters' numbers of positions."""
        if self.rows is not None:
            return max(counts.values()) - counts[name]
        names = list(counts)
        return sum(counts[other] for other in names[: names.index(name)])

    def joined(self, kind: _Kind, batch: int, device: torch.device) -> Tensor:
        """The values of a kind that the adapters provide, (batch, width, …)."""
        counts = self.counts(kind)
        alone = kind is _TOKENS and len(counts) == 1 and not self.counts(_DECODER_TOKENS)
        given = given_tokens(batch, usable=alone)
        if given is not None:
            return given.to(device)
        parts = {name: _for_rows(kind.give(*self.adapters[name]).to(device), batch) for name in counts}
        if self.rows is None:
            return torch.cat(list(parts.values()), 1)
        width, index = max(counts.values()), self.rows.repeat_to(batch, device)
        first = next(iter(parts.values()))
        joined = first.new_zeros(batch, width, *first.shape[2:])
        for name, part in parts.items():
            padded = torch.cat([part.new_zeros(batch, width - counts[name], *part.shape[2:]), part], 1)
            chosen = (index == self.rows.names.index(name)).view(batch, *[1] * (padded.dim() - 1))
            joined = torch.where(chosen, padded, joined)
        return joined


def _for_rows(values: Tensor, batch: int) -> Tensor:
    """Repeats values for one row or several, (rows, …), to a batch: for all its rows, or for each row's beams."""
    if len(values) == 1:
        return values.expand(batch, *values.shape[1:])
    repeats, rest = divmod(batch, len(values))
    if rest:
        raise AdapterError(f"task_ids has {len(values)} entries for {batch} rows: give one for each row")
    return values.repeat_interleave(repeats, 0)


def _active_prompts(layer: AdaptedLayer) -> _Prompts | None:
    active = layer.active_state.current()
    prompts: dict[str, tuple[ModelAdapter, BaseLayer]] = {}
    for name, scale in zip(active.call_names, active.call_scales, strict=True):
        adapter = layer.adapters._modules.get(name)
        if not learns_prompt(adapter):
            continue
        if scale != 1.0:
            check_scale(name, scale, fixed=True)
        base = layer.base.within(active.context[name]) if name in active.context else layer.base
        prompts[name] = adapter, base
    return _Prompts(prompts, active.rows) if prompts else None


# Arguments of a call


def _size(call: Mapping[str, Any], *names: str) -> tuple[int, int, torch.device] | None:
    """Batch size, length and device of the input; None if the call has no input."""
    for name in names or ("input_ids", "inputs_embeds"):
        tensor = call.get(name)
        if isinstance(tensor, Tensor):
            return tensor.shape[0], tensor.shape[1], tensor.device
    return None


def _seen(call: dict[str, Any], name: str) -> int:
    """Number of cached positions; a call with ``use_cache=False`` ignores the cache it is given, and starts at 0."""
    # ``generate`` of older versions of transformers counts positions without the prompt; without them the model does.
    call.pop("cache_position", None)
    if name and call.get(CACHES[1]) is not None:
        call[name] = call.pop(CACHES[1])
    past = call.get(name) if name else None
    if past is not None and call.get("use_cache") is False:
        past = call[name] = None
    return 0 if past is None else int(past.get_seq_length())


def _extend_mask(call: dict[str, Any], name: str, front: _Front, length: int, seen: int) -> None:
    """Extends an attention mask (batch, length) by the prompt's positions; creates one if rows are padded.

    ``seen`` is the number of cached positions, including the prompt's.
    """
    mask = call.get(name)
    if mask is None:
        if front.mask is None:
            return
        rest = length + max(seen - front.width, 0)
        mask = torch.ones(len(front.mask), rest, dtype=torch.long, device=front.mask.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise AdapterError(
            f"a prompt needs an {name} of shape (rows, length), not that of a static cache: omit cache_implementation"
        )
    before = front.filled(len(mask), mask.device).to(mask.device, mask.dtype)
    call[name] = torch.cat([before, mask], 1)


def _extend_positions(
    module: nn.Module, call: dict[str, Any], front: _Front, new: _Front | None, length: int, seen: int
) -> None:
    """Shifts position ids behind the prompt (``front``), and adds those of prompt tokens inserted now (``new``).

    If rows are padded and the call has no position ids, they are created. ``seen`` is the number of cached positions,
    including the prompt's.
    """
    position_ids = call.get("position_ids")
    if position_ids is None:
        if front.mask is None or "position_ids" not in parameters_of(module):
            return
        position_ids = torch.arange(length, device=front.mask.device).unsqueeze(0) + max(seen - front.width, 0)
    shifted = position_ids + (front.offset if front.mask is None else front.offset.to(position_ids.device))
    if new is not None and new.width:
        added = front.positions()[:, front.width - new.width :].to(position_ids.device, position_ids.dtype)
        shifted = torch.cat([added.expand(*shifted.shape[:-1], new.width), shifted], -1)
    call["position_ids"] = shifted


def _put_tokens(call: dict[str, Any], embeds: str, ids: str, tokens: Tensor, embedding: nn.Module) -> None:
    """Inserts tokens (batch, width, features) before the input, whose ids are replaced by embeddings."""
    input_ids = call.pop(ids, None)
    input_embeds = call.get(embeds)
    if input_embeds is None:
        input_embeds = embedding(input_ids)
    call[embeds] = torch.cat([tokens.to(input_embeds), input_embeds], 1)


def _extend_labels(module: nn.Module, call: dict[str, Any], length: int, width: int) -> None:
    """Extends per-token labels by ignored labels, and adjusts the other arguments that count or index tokens."""
    kinds = call.get("token_type_ids")
    if kinds is not None:
        call["token_type_ids"] = torch.cat([kinds.new_zeros(len(kinds), width), kinds], 1)
    logits_to_keep = call.get("logits_to_keep")
    if isinstance(logits_to_keep, Tensor):
        call["logits_to_keep"] = logits_to_keep + width
    labels_each_text = is_text_classifier(module)
    for name in ("labels", "shift_labels"):
        labels = call.get(name)
        if isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] == length and not labels_each_text:
            call[name] = _with_ignored(labels, width)


def _with_ignored(labels: Tensor, width: int) -> Tensor:
    return torch.cat([labels.new_full((len(labels), width), IGNORED_LABEL), labels], 1)


def _filled(module: nn.Module, past: Any, states: Tensor, base: BaseLayer) -> Any:
    """Puts keys and values (batch, width, layers, 2, heads, features) into a cache; a new one if ``past`` is None."""
    if module.training and torch.is_grad_enabled() and checkpoints_gradients(module):
        raise AdapterError(
            "a prefix does not work with gradient checkpointing, which drops cached keys and values: call "
            "gradient_checkpointing_disable()"
        )
    from transformers import DynamicCache, EncoderDecoderCache

    if past is None:
        config: Any = getattr(module, "config", None)
        past = DynamicCache(config=None if config is None else config.get_text_config(decoder=True))
        if has_encoder(module):
            past = EncoderDecoderCache(past, DynamicCache())
    into = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
    # Layers that share the keys and values of an earlier layer (Gemma 4's last ones) have no cache of their own: in a
    # cache made for the config, older versions of transformers leave their places out, at the end.
    places = {number for number, layer in enumerate(into.layers) if type(layer).__name__ != "DummyLayer"}
    for number, (keys, values) in enumerate(states.to(base.dtype).permute(2, 3, 0, 4, 1, 5)):
        if number in places or not places:
            into.update(keys, values, number)
    return past


# Prompts outside of calls


def prompt_of(adapter: ModelAdapter, base: BaseLayer, batch: int) -> Tensor:
    """All tokens of a prompt, (batch, tokens, features), those for a decoder after those of the encoder."""
    return _for_rows(adapter.all_tokens(base), batch)


def cache_of(model: nn.Module, adapter: ModelAdapter, base: BaseLayer, batch: int) -> Any:
    """A cache for a batch that contains the keys and values of a prefix."""
    return _filled(model, None, _for_rows(adapter.cached_states(base), batch), base)
