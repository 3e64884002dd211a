"""The network for Flux 2: a smaller Flux 2 model, whose single-stream blocks read the input of the model's first block.

The whole smaller model is trained and saved, as in PEFT, although only its single-stream blocks compute.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.methods.shadow.recipe import Recipe, unreadable
from nbpeft.engine.tree.model_tree import bare_modules, frozen_module
from nbpeft.errors import ConfigError

FLUX = "Flux2Transformer2DModel"
"""Name of the class of such models in diffusers."""
_EMBEDDINGS = ("x_embedder", "context_embedder", "time_guidance_embed", "pos_embed")
_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"
_SAME = (
    *("in_channels", "out_channels", "joint_attention_dim", "timestep_guidance_channels", "attention_head_dim"),
    *("axes_dims_rope", "guidance_embeds"),
)
"""Fields of a config that a saved network must have in common with the model."""
_MODULATIONS = {
    "double_stream_modulation_img.linear.weight": 6,
    "double_stream_modulation_txt.linear.weight": 6,
    "single_stream_modulation.linear.weight": 3,
    "norm_out.linear.weight": 2,
}
"""Name of a weight -> how many shifts, scales and gates, each with all features, are its rows."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Flux 2 model.

    Attributes:
        heads: number of attention heads.
        head: features of a head.
        inner: features between the feed-forward layers.
        double: number of double-stream blocks.
        single: number of single-stream blocks.
    """

    heads: int
    head: int
    inner: int
    double: int
    single: int

    @property
    def width(self) -> int:
        """Features of the hidden states."""
        return self.heads * self.head

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Reads the sizes from a model's config."""
        heads, head = int(config["num_attention_heads"]), int(config["attention_head_dim"])
        inner = int(heads * head * float(config["mlp_ratio"]))
        return cls(heads, head, inner, int(config["num_layers"]), int(config["num_single_layers"]))


@dataclass(frozen=True)
class FluxNetworkConfig:
    """How the network for a Flux 2 model is built.

    Attributes:
        model_class: class of the model.
        fields: config of the network.
        shared: names of the embeddings that are the model's own.
    """

    model_class: Any
    fields: Mapping[str, Any]
    shared: tuple[str, ...] = ()

    @property
    def hidden_size(self) -> int:
        """Features of the network."""
        return Sizes.of(self.fields).width


class SharedModule(nn.Module):
    """A module of the model in the place of the network's own; it is no submodule here, and not trained or saved."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["shared_module"] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        return self.__dict__["shared_module"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "shared_module" not in self.__dict__:
            return super().__getattr__(name)
        return getattr(self.__dict__["shared_module"], name)


class DetachedFluxShadowModel(nn.Module):
    """A smaller Flux 2 model as a side network, with PEFT's names."""

    def __init__(self, config: FluxNetworkConfig) -> None:
        super().__init__()
        self.model = config.model_class.from_config(dict(config.fields))

    @property
    def config(self) -> Any:
        """The config of the smaller model."""
        return self.model.config

    def forward(self, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Runs the single-stream blocks on the first features of what the model's first block reads.

        Args:
            hidden: the hidden states, (rows, length, features of the model).
            call: name -> argument of the model's block.

        Returns:
            (rows, length, features of the network).
        """
        width, dtype = Sizes.of(self.config).width, next(self.model.single_transformer_blocks.parameters()).dtype
        text, modulation = call.get("encoder_hidden_states"), call["temb_mod"]
        shared: dict[str, Any] = {
            "encoder_hidden_states": None if text is None else text[..., :width].to(dtype),
            "temb_mod": torch.cat([part[..., :width] for part in modulation.chunk(3, -1)], -1).to(dtype),
            **{name: call.get(name) for name in ("image_rotary_emb", "joint_attention_kwargs")},
        }
        state = hidden[..., :width].to(dtype)
        for block in self.model.single_transformer_blocks:
            state = block(state, **shared)
        return state


class FluxRecipe(Recipe):
    """Describes the network of a Flux 2 model.

    Args:
        config: how the network is built.
        model: the model.
        source: folder or hub id of its weights; empty for parts of the model's own.
    """

    def __init__(self, config: FluxNetworkConfig, model: nn.Module, source: str = "") -> None:
        super().__init__(DetachedFluxShadowModel, config, source)
        self.reads_states, self._model = True, weakref.ref(model)

    _model: Any

    @property
    def starts_from_tensors(self) -> bool:
        return True

    def network(self) -> Any:
        """A new network, with those embeddings of the model that it shares."""
        made = super().network()
        model = None if self._model is None else self._model()
        for name in self.network_config.shared:
            # A copy of the adapter brings the modules that it shares.
            module = nn.Module() if model is None else frozen_module(getattr(model, name))
            setattr(made.model, name, SharedModule(module))
        return made

    def frozen_modules(self, network: Any) -> list[nn.Module]:
        return [getattr(network.model, name) for name in _EMBEDDINGS] if self.source else []

    def weights(self, network: Any, reads: Any) -> tuple[dict[str, Tensor], Tensor | None]:
        """The tensors of a saved network or those of the model's parts, and a projection onto the first features."""
        model = self._model()
        if self.source:
            try:
                saved = self.network_config.model_class.from_pretrained(self.source).state_dict()
            except (OSError, ValueError, KeyError) as error:
                raise unreadable(self.source, error) from None
            found = {f"model.{key}": tensor for key, tensor in saved.items()}
        else:
            found = tensors_from(model, network)
        own = self.network_config.hidden_size
        return found, None if own == self.width else torch.eye(self.width, own)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": None}


def flux_recipe(config: Any, model: nn.Module) -> FluxRecipe:
    """How the network that a config asks for is made for a Flux 2 model.

    Args:
        config: a ``ShadowConfig``.
        model: the Flux 2 model.

    Raises:
        ConfigError: there is no such network, or it does not fit the model.
    """
    source = "" if config.shadow_model == "mirror" else config.shadow_model
    made = FluxRecipe(_saved(source, model) if source else _smaller(config, model), model, source)
    made.width = Sizes.of(model.config).width  # type: ignore[arg-type]
    return made


def _smaller(config: Any, model: Any) -> FluxNetworkConfig:
    """The network of the sizes that a config asks for.

    Args:
        config: a ``ShadowConfig``.
        model: the Flux 2 model.

    Raises:
        ConfigError: the model is smaller than these sizes.
    """
    base = Sizes.of(model.config)
    double = config.shadow_num_hidden_layers or 1
    for blocks, count, total in (("double", double, base.double), ("single", 2 * double, base.single)):
        if count > total:
            raise ConfigError(
                f"shadow_num_hidden_layers = {double} needs {count} {blocks}-stream blocks, and the model has {total}",
                field="shadow_num_hidden_layers",
            )
    heads = _heads(config, base)
    inner = config.shadow_intermediate_size or base.inner
    if inner > base.inner:
        raise ConfigError(
            f"shadow_intermediate_size must be between 1 and {base.inner}, as in the model, not {inner}",
            field="shadow_intermediate_size",
        )
    fields = {
        **dict(model.config),
        "num_layers": double,
        "num_single_layers": 2 * double,
        "num_attention_heads": heads,
        "mlp_ratio": inner / (heads * base.head),
    }
    shares = config.share_embeddings and heads == base.heads
    return FluxNetworkConfig(type(model), fields, _EMBEDDINGS if shares else ())


def _heads(config: Any, base: Sizes) -> int:
    """The number of attention heads, each of the model's size."""
    size, heads = config.shadow_hidden_size, config.shadow_num_attention_heads
    if size is not None and size != base.head * (heads or size // base.head):
        raise ConfigError(
            f"the network must preserve the base attention head dimension, {base.head}: shadow_hidden_size = {size} "
            f"is not {base.head} times {'a number of heads' if heads is None else f'{heads} heads'}",
            field="shadow_hidden_size",
        )
    heads = heads or (size or base.width) // base.head
    if not 1 <= heads <= base.heads:
        raise ConfigError(
            f"shadow_num_attention_heads must be between 1 and {base.heads}, as in the model, not {heads}",
            field="shadow_num_attention_heads",
        )
    return int(heads)


def _saved(source: str, model: Any) -> FluxNetworkConfig:
    """The network of a folder or of the hub.

    Args:
        source: folder or hub id of a Flux 2 model.
        model: the Flux 2 model that it is for.

    Raises:
        ConfigError: it does not fit the model, or cannot be read.
    """
    kind = type(model)
    try:
        with torch.device("meta"):
            fields: Mapping[str, Any] = kind.from_config(kind.load_config(source)).config
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(source, error) from None
    for name in _SAME:
        found, wanted = (_plain(config.get(name)) for config in (fields, model.config))
        if found != wanted:
            raise ConfigError(
                f"shadow_model {source!r} has an incompatible `{name}`: {found}, and the model has {wanted}",
                field="shadow_model",
            )
    own, base = Sizes.of(fields), Sizes.of(model.config)
    for name in ("heads", "double", "single", "inner"):
        count, total = getattr(own, name), getattr(base, name)
        if not 1 <= count <= total:
            raise ConfigError(
                f"shadow_model {source!r} must not be larger than the model: {name} is {count}, not 1 to {total}",
                field="shadow_model",
            )
    return FluxNetworkConfig(kind, fields)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def tensors_from(model: Any, network: Any) -> dict[str, Tensor]:
    """The first values of a network: those of some of the model's blocks, and of all of its other modules.

    Of wider tensors the first heads and features are used.

    Args:
        model: the Flux 2 model.
        network: the network, a ``DetachedFluxShadowModel``.

    Returns:
        Name in the network -> tensor of its size.
    """
    given = {
        f"{path}.{name}": tensor
        for path, module in bare_modules(model)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    }
    own, base = Sizes.of(network.config), Sizes.of(model.config)
    chosen = {_DOUBLE: _spread(base.double, own.double), _SINGLE: _spread(base.single, own.single)}
    found = {}
    for key, tensor in network.model.state_dict().items():
        blocks, _, inside = key.partition(".")
        number, _, rest = inside.partition(".")
        source = given[f"{blocks}.{chosen[blocks][int(number)]}.{rest}" if blocks in chosen else key]
        assert source is not None
        found[f"model.{key}"] = _part_of(source.detach(), key, tensor.shape, base, own)
    return found


def _spread(total: int, count: int) -> list[int]:
    """Indices of the model's blocks with which those of the network begin: the last one, or from the first to it."""
    return [total - 1] if count == 1 else [round(number * (total - 1) / (count - 1)) for number in range(count)]


def _part_of(source: Tensor, key: str, shape: Sequence[int], base: Sizes, own: Sizes) -> Tensor:
    """The part of a tensor of the model that is in the network; weights of several projections consist of their parts.

    Args:
        source: the tensor.
        key: its name in the network.
        shape: its shape there.
        base: sizes of the model.
        own: sizes of the network.
    """
    features, inner = (base.width, own.width), (base.inner, own.inner)
    parts = [[pair] for pair in zip(source.shape, shape, strict=True)]
    if key.endswith("attn.to_qkv_mlp_proj.weight"):
        parts[0] = [features] * 3 + [inner] * 2
    elif key.startswith(f"{_SINGLE}.") and key.endswith("attn.to_out.weight"):
        parts[1] = [features, inner]
    elif key in _MODULATIONS:
        parts[0] = [features] * _MODULATIONS[key]
    for axis, sizes in enumerate(parts):
        whole = torch.split(source, [size for size, _ in sizes], axis)
        source = torch.cat([one.narrow(axis, 0, kept) for one, (_, kept) in zip(whole, sizes, strict=True)], axis)
    return source.clone()
