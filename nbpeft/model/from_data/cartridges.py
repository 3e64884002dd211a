"""Initializing prefixes and cartridges from a text or a KV cache, and concatenating cartridges."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.engine.calls.cached_prefix import CachedPrefix
from nbpeft.engine.config.config_checks import check_count
from nbpeft.engine.config.prompt_config import PROMPT_KEY
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.methods.prompts.cartridge import CartridgeConfig
from nbpeft.engine.runtime.manager import require_manager
from nbpeft.errors import AdapterError, CheckpointError, ConfigError
from nbpeft.model.from_data.observing import base_alone, device_of, evaluated, moved
from nbpeft.model.handle.state_dicts import set_peft_model_state_dict
from nbpeft.names import DEFAULT_ADAPTER

_SAME = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
"""Fields that must be equal in cartridges to be concatenated."""


@torch.no_grad()
def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """Converts the first keys and values of a cache to the layout of a prefix or a cartridge.

    Args:
        past_key_values: a cache of transformers, or (keys, values) per layer, each (1, heads, tokens, features).
        num_virtual_tokens: number of tokens to take from the start of the cache.

    Returns:
        A copy in the dtype of the cache, (num_virtual_tokens, layers * 2 * heads * features).

    Raises:
        ConfigError: the number is not positive, or the cache is empty, has more than one row or fewer tokens, or its
            layers differ in shape.
    """
    check_count("num_virtual_tokens", num_virtual_tokens)
    layers = _layers_of(past_key_values)
    if not layers:
        raise ConfigError("past_key_values is empty: run the model with use_cache=True first")
    first = layers[0][0]
    if first.ndim != 4 or first.shape[0] != 1:
        raise ConfigError(
            "past_key_values must be of one sequence, keys and values (1, heads, tokens, features), not "
            f"{tuple(first.shape)}"
        )
    for number, pair in enumerate(layers):
        for tensor in pair:
            if tensor.shape[:2] != first.shape[:2] or tensor.shape[3:] != first.shape[3:]:
                raise ConfigError(
                    f"the keys and values of layer {number} in past_key_values are {tuple(tensor.shape)}, those of the "
                    f"first {tuple(first.shape)}: all layers of a prefix must have the same heads"
                )
            if tensor.shape[2] < num_virtual_tokens:
                raise ConfigError(
                    f"need at least {num_virtual_tokens} cached tokens, but layer {number} of past_key_values has "
                    f"{tensor.shape[2]}"
                )
    parts = [tensor[0, :, :num_virtual_tokens].transpose(0, 1) for pair in layers for tensor in pair]
    return torch.stack([part.to(first.device) for part in parts], dim=1).flatten(1)


def _layers_of(past: Any) -> list[tuple[Tensor, Tensor]]:
    """Returns the keys and values of each layer."""
    if isinstance(own := getattr(past, "self_attention_cache", None), Iterable):
        past = own
    pairs = list(past) if isinstance(past, Iterable) else [past]
    if not all(isinstance(pair, tuple | list) and all(isinstance(part, Tensor) for part in pair[:2]) for pair in pairs):
        raise ConfigError(
            f"past_key_values must be a cache or a (keys, values) pair per layer, not {type(past).__name__}"
        )
    return [(pair[0], pair[1]) for pair in pairs]


def initialize_kv_prefix_from_past_key_values(
    model: nn.Module, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Overwrites the keys and values of a prefix or a cartridge with the first ones of a cache.

    Args:
        model: the model with the adapter.
        adapter_name: name of the adapter; None for the active one.
        past_key_values: see ``prompt_embeddings_from_past_key_values``.
        num_virtual_tokens: number of tokens of the cache; None for the adapter's number.

    Returns:
        The written values, (tokens, layers * 2 * features).

    Raises:
        AdapterError: the adapter is neither a prefix nor a cartridge.
        ConfigError: the adapter computes its keys and values with a network, or the cache does not fit.
        BaseMismatchError: the cache has other sizes.
    """
    name, count = _with_prefix(model, adapter_name)
    count = count if num_virtual_tokens is None else num_virtual_tokens
    rows = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    set_peft_model_state_dict(model, {PROMPT_KEY: rows}, name)
    return rows


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: nn.Module,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Overwrites the keys and values of a prefix or a cartridge with those of the base model for a text.

    Attention is causal, so the model only reads the tokens whose keys and values are used, in evaluation mode. Memory
    therefore depends on the adapter's number of tokens, and not on the length of the text. (PEFT reads the whole text,
    with dropout if the model is in training mode; sliding-window layers then have keys and values of its end.)

    Args:
        model: the model with the adapter.
        tokenizer: the model's tokenizer.
        text: the text, of which the first tokens are used.
        adapter_name: name of the adapter; None for the active one.
        num_virtual_tokens: number of tokens; None for the adapter's number.
        use_chat_template: format the text as a system message, if the tokenizer has a chat template.
        max_length: truncate the text to this number of tokens.

    Returns:
        The written values, (tokens, layers * 2 * features).

    Raises:
        AdapterError: the adapter is neither a prefix nor a cartridge.
        ConfigError: the adapter computes its keys and values with a network, the text has too few tokens, or the
            number of tokens is not positive.
    """
    name, count = _with_prefix(model, adapter_name)
    count = count if num_virtual_tokens is None else num_virtual_tokens
    check_count("num_virtual_tokens", count)
    ids = _tokens_of(tokenizer, text, chat=use_chat_template)[:, :max_length]
    if ids.shape[1] < count:
        raise ConfigError(f"the text has {ids.shape[1]} tokens, fewer than the {count} that the adapter has")
    ids = moved(ids[:, :count], device_of(model))
    with evaluated(model), base_alone(model):
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=name, past_key_values=outputs.past_key_values, num_virtual_tokens=count
    )


def _tokens_of(tokenizer: Any, text: str, *, chat: bool) -> Tensor:
    """Returns the token ids of a text, (1, tokens)."""
    if chat and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(message, tokenize=True, add_generation_prompt=False, return_dict=False)
    else:
        ids = tokenizer(text)["input_ids"]
    return torch.tensor([list(ids)], dtype=torch.long)


def _with_prefix(model: nn.Module, adapter_name: str | None) -> tuple[str, int]:
    """Returns the name of a prefix or cartridge adapter, and its number of tokens."""
    manager = require_manager(model)
    name = adapter_name if adapter_name is not None else next(iter(manager.active), DEFAULT_ADAPTER)
    manager.require(name)
    config: Any = manager.configs[name]
    if not issubclass(method_of(config).adapter_class, CachedPrefix):
        raise AdapterError(
            f"adapter {name!r} must be a CARTRIDGE or PREFIX_TUNING adapter, not {method_of(config).peft_type}"
        )
    if getattr(config, "has_encoder", False):
        raise ConfigError(
            f"adapter {name!r} cannot be initialized from a cache: with prefix_projection=True a network computes its "
            "keys and values",
            field="prefix_projection",
        )
    return name, int(config.num_virtual_tokens)


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]],
    *,
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:
    """Concatenates the tokens of several cartridges in the given order into one (Eyuboglu et al.) and saves it.

    What is frozen in the first one is also frozen in the result. Either all files are written or none.

    Args:
        adapter_paths: folders of at least two saved cartridges.
        output_path: folder to write.
        safe_serialization: False writes PEFT's former ``adapter_model.bin``.

    Raises:
        ConfigError: there are fewer than two, one is not a cartridge, or they are of models of different sizes.
        CheckpointError: a folder cannot be read or written, or a file has no prompt tensor.
    """
    if len(adapter_paths) < 2:
        raise ConfigError(f"compose_cartridge_adapters needs at least two adapters, not {len(adapter_paths)}")
    rows, first = [], None
    for path in adapter_paths:
        saved = checkpoint.read_checkpoint(path)
        config = saved.config
        if not isinstance(config, CartridgeConfig):
            raise ConfigError(f"the adapter at {path} is not a CARTRIDGE adapter but {method_of(config).peft_type}")
        first = first or config
        name = next((field for field in _SAME if getattr(config, field) != getattr(first, field)), None)
        if name is not None:
            raise ConfigError(
                f"cartridges that differ in {name} cannot be concatenated: {getattr(first, name)} at "
                f"{adapter_paths[0]}, {getattr(config, name)} at {path}",
                field=name,
            )
        rows.append(method_of(config).files.pack(config, saved.tensors).get(PROMPT_KEY))
    tensors = [tensor for tensor in rows if tensor is not None and tensor.ndim == 2]
    if first is None or len(tensors) < len(rows) or len({tensor.shape[1] for tensor in tensors}) > 1:
        raise CheckpointError(
            f"the files at {', '.join(map(str, adapter_paths))} must each have {PROMPT_KEY}, all of the same width"
        )
    whole = torch.cat(tensors)
    config = dataclasses.replace(first, num_virtual_tokens=len(whole))
    checkpoint.write_checkpoints(output_path, {"": (config, {PROMPT_KEY: whole})}, pickled=not safe_serialization)
