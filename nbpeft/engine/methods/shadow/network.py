"""The side network of a model: finds the model's blocks, and builds a smaller network of the same architecture."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbpeft._util.hub_access import config_errors
from nbpeft.engine.calls.model_properties import has_encoder
from nbpeft.engine.config.prompt_config import WIDTHS
from nbpeft.engine.contract.adapter import TaskType
from nbpeft.engine.methods.shadow.flux_network import FLUX, flux_recipe
from nbpeft.engine.methods.shadow.recipe import Recipe, file_of, unreadable, width_of
from nbpeft.engine.methods.shadow.token_network import TokenNetwork, TokenNetworkConfig
from nbpeft.engine.tree.model_tree import bare_modules
from nbpeft.errors import ConfigError, in_one_line, shortened

_LISTS = ("layers", "h")
"""Names of the list of blocks in language models."""
_DIFFUSION_LISTS = ("single_transformer_blocks", "transformer_blocks")
"""The same in diffusion transformers, on the model itself."""
_HEADS = ("score", "classifier")
"""Names of the head of a sequence classifier in models."""
_PROJECTED = "causal_lm_with_hidden_projection"
"""The model type of a saved network with a projection to the features of a larger model."""


def blocks_of(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The module that has the blocks of a decoder or of a diffusion transformer, and their paths.

    Raises:
        ConfigError: the model is neither, or its blocks return more than hidden states.
    """
    name = type(model).__name__
    attribute = diffusion_blocks(model)
    if attribute and name != FLUX:
        several = next((block for block in getattr(model, attribute) if _returns_several(type(block))), None)
        if several is not None:
            raise ConfigError(
                "ShadowPEFT works with diffusion transformers whose blocks return only their hidden states, and "
                f"{type(several).__name__} of {name} returns several tensors"
            )
    if attribute:
        return model, [f"{attribute}.{number}" for number in range(len(getattr(model, attribute)))]
    config: Any = getattr(model, "config", None)
    if has_encoder(model):
        raise ConfigError(f"ShadowPEFT works with decoder language models, and {name} has an encoder and a decoder")
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    if text is None or text is not config:
        raise ConfigError(f"ShadowPEFT works with decoder language models of transformers, not with {name}")
    for path, module in bare_modules(model):
        for attribute in _LISTS:
            blocks = module._modules.get(attribute)
            if isinstance(blocks, nn.ModuleList) and len(blocks) and hasattr(module, "config"):
                prefix = f"{path}.{attribute}" if path else attribute
                return module, [f"{prefix}.{number}" for number in range(len(blocks))]
    raise ConfigError(f"ShadowPEFT works with decoder language models, and {name} has no list of blocks (layers, h)")


def diffusion_blocks(model: nn.Module) -> str:
    """Name of the list of blocks in a diffusion transformer; empty for other models."""
    lists = {name for name, module in model._modules.items() if isinstance(module, nn.ModuleList) and len(module)}
    return "" if "layers" in lists else next((name for name in _DIFFUSION_LISTS if name in lists), "")


def _returns_several(kind: type[nn.Module]) -> bool:
    """Whether ``forward`` of a class returns a tuple, according to its code; False if the code is not available."""
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    return any(isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) for node in ast.walk(code))


def recipe_for(config: Any, model: nn.Module, backbone: nn.Module) -> Recipe:
    """How the network that a config asks for is made.

    Args:
        config: a ``ShadowConfig``.
        model: the base model.
        backbone: the module that has its blocks.

    Raises:
        ConfigError: there is no such network, or it does not fit the model.
    """
    is_mirror = config.shadow_model == "mirror"
    if diffusion_blocks(model):
        return flux_recipe(config, model) if type(model).__name__ == FLUX else _of_tokens(config, model)
    made = _mirrored(config, backbone) if is_mirror else _saved(config.shadow_model)
    made.width = width_of(model.config)
    try:
        with torch.device("meta"):
            takes = inspect.signature(made.network().forward).parameters
    except Exception as error:
        reason = shortened(in_one_line(error), 200)
        raise ConfigError(
            f"a network like {type(backbone).__name__} with these sizes cannot be made: {reason}"
        ) from None
    same = width_of(made.network_config) == made.width
    made.shares = bool(config.share_embeddings and is_mirror and same and "inputs_embeds" in takes)
    made.is_lm = config.task_type == TaskType.CAUSAL_LM
    if config.task_type == TaskType.SEQ_CLS:
        modules = dict(bare_modules(model))
        head = next((modules[name] for name in _HEADS if name in modules), None)
        if head is not None:
            made.set_head(head)
    return made


def _of_tokens(config: Any, model: nn.Module) -> Recipe:
    """A new network for a diffusion transformer."""
    for field, given in (
        ("shadow_model", config.shadow_model != "mirror"),
        ("shadow_num_attention_heads", config.shadow_num_attention_heads is not None),
    ):
        if given:
            raise ConfigError(
                f"leave out {field}: the network for {type(model).__name__}, a diffusion transformer, is a new MLP",
                field=field,
            )
    width = width_of(getattr(model, "config", None))
    size = config.shadow_hidden_size or width
    layers, inner = config.shadow_num_hidden_layers or 1, config.shadow_intermediate_size or size
    made = Recipe(TokenNetwork, TokenNetworkConfig(width, size, layers, inner))
    made.width, made.reads_states = width, True
    return made


def _mirrored(config: Any, backbone: Any) -> Recipe:
    """A new network of the class of a model's backbone."""
    own = copy.deepcopy(backbone.config)
    for value, field, names in (
        (
            config.shadow_num_hidden_layers or 1,
            "shadow_num_hidden_layers",
            ("num_hidden_layers", "n_layer", "num_layers"),
        ),
        (config.shadow_hidden_size, "shadow_hidden_size", WIDTHS),
        (config.shadow_intermediate_size, "shadow_intermediate_size", ("intermediate_size", "ffn_dim", "n_inner")),
        (
            config.shadow_num_attention_heads,
            "shadow_num_attention_heads",
            ("num_attention_heads", "n_head", "num_heads"),
        ),
    ):
        name = next((one for one in names if hasattr(own, one)), None)
        if value is not None and name is None:
            raise ConfigError(f"{type(own).__name__} has no field for {field}", field=field)
        if value is not None:
            setattr(own, str(name), value)
    layers = int(own.num_hidden_layers)
    kinds = list(getattr(own, "layer_types", None) or [])
    if kinds:
        own.layer_types = (kinds + kinds[-1:] * layers)[:layers]
    if int(getattr(own, "max_window_layers", None) or 0) > layers:
        own.max_window_layers = layers
    return Recipe(type(backbone), own)


def _saved(source: str) -> Recipe:
    """A network of a folder or of the hub."""
    from transformers import AutoConfig, AutoModel

    try:
        fields = json.loads(Path(file_of(source, "config.json")).read_text(encoding="utf-8"))
        is_projected = fields.get("model_type") == _PROJECTED
        if is_projected:
            inner = dict(fields["shadow_model_config"])
            own = AutoConfig.for_model(inner.pop("model_type"), **inner)
        else:
            own = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            network_class = type(AutoModel.from_config(own))
    except config_errors(KeyError) as error:
        raise unreadable(source, error) from None
    return Recipe(network_class, own, source, is_projected=is_projected)
