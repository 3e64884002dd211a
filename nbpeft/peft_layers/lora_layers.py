"""Base classes of custom LoRA layers: PEFT's ``LoraLayer`` and ``lora.Linear``.

    class LSTMWithLoRA(nn.Module, LoraLayer):
        def __init__(self, base_layer, adapter_name, config, r, lora_alpha, **kwargs): ...
        def forward(self, x): ...

    config._register_custom_module({nn.LSTM: LSTMWithLoRA})

``isinstance`` is also true for the layers that the engine adapts, although they do not derive from these classes.
LoRA is the only method for which PEFT has custom layers. The names of its tensors and settings are those that LoRA
declares: ``LowRankAdapter.peft``, and ``factor_names`` of the products.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import resolve_backend, resolve_layer_kind
from nbpeft.engine.methods.lora.adapter import LowRankAdapter
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.low_rank import LowRank, LowRankLookup
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import ConfigError, MergeError, PeftWarning, UnknownAdapterError
from nbpeft.peft_layers.classes import LayerType, refuse_pickle_of_peft
from nbpeft.peft_layers.replaced import own_forward
from nbpeft.peft_layers.single_layers import lora_layer


class LoraLayer(metaclass=LayerType):
    """A LoRA layer; derive a custom class from it and from ``nn.Module``.

    The layer stores which adapters are active until it is put into an adapted model; from then on the model does. For
    each of LoRA's tensors and settings it has a mapping by adapter name: of modules for the factors of a product, of
    parameters for those of a lookup.

    Args:
        base_layer: the frozen layer.
        ephemeral_gpu_offload: ignored; accepted as in PEFT.
        **kwargs: stored as ``kwargs``.

    Attributes:
        r: adapter name -> rank.
        scaling: adapter name -> factor on the product.
        in_features: input features of the frozen layer, or None if unknown.
    """

    peft_type = "LORA"

    adapter_layer_names: tuple[str, ...] = tuple(LowRankAdapter.peft.parameters.split())
    other_param_names: tuple[str, ...] = tuple(LowRankAdapter.peft.others.split())
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_dora: dict[str, bool]
    use_rslora: dict[str, bool]
    lora_bias: dict[str, bool]
    lora_dropout: nn.ModuleDict
    adapted_layer: Any = None
    """Its wrapper in the model's tree; see ``engine.injection.custom_layers``."""
    _active_adapter: str | list[str] = "default"
    _disable_adapters: bool = False
    fan_in_fan_out: bool = False

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        self.base_layer = base_layer
        names = LowRankAdapter.peft
        for name in self.other_param_names:
            setattr(self, name, {})
        for name in names.mappings:
            setattr(self, name, nn.ModuleDict() if name in (*names.wrapped, *names.modules) else nn.ParameterDict())
        self.lora_variant: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.ephemeral_gpu_offload = ephemeral_gpu_offload
        self.kwargs = kwargs
        self.in_features: int | None
        self.out_features: int | None
        self.in_features, self.out_features = self._get_in_out_features(base_layer)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        """Returns the (in, out) features of a layer; for an unknown layer class (None, None), with a warning."""
        kind, backend = resolve_layer_kind(module), resolve_backend(module)
        guessed = kind is None or (kind.name == "linear" and getattr(backend, "name", "dense") == "dense")
        if guessed and not isinstance(module, nn.Linear):
            warnings.warn(
                f"Unsupported layer type '{type(module)}' encountered, proceed at your own risk.", stacklevel=3
            )
        return (None, None) if kind is None else kind.features(module)

    # The frozen layer

    def get_base_layer(self) -> nn.Module:
        """Returns the frozen layer."""
        return self.base_layer

    def get_base_weight(self) -> Tensor:
        """Returns the frozen layer's weight as stored, detached."""
        return cast(Tensor, self.base_layer.weight).detach()

    @property
    def weight(self) -> Any:
        """The weight of the frozen layer."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The bias of the frozen layer."""
        return self.base_layer.bias

    # Active adapters

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; during a call of the model, those of the call."""
        if self.adapted_layer is not None:
            return list(self.adapted_layer.active_state.current().names or self.adapted_layer.chosen_names())
        return [self._active_adapter] if isinstance(self._active_adapter, str) else list(self._active_adapter)

    @property
    def active_adapter(self) -> str | list[str]:
        """Names of the active adapters."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are disabled, so that only the frozen layer computes."""
        if self.adapted_layer is not None:
            return not self.adapted_layer.active_state.current().names
        return self._disable_adapters

    @property
    def merged(self) -> bool:
        """Whether adapters are merged into the frozen layer."""
        return bool(self.merged_adapters)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activates adapters on this layer and makes only them trainable; all other adapters here are frozen.

        Args:
            adapter_names: one name or several.
            inference_mode: freeze the active adapters too.
        """
        if self.adapted_layer is not None:
            self.adapted_layer.set_adapter(adapter_names, inference_mode)
            return
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._set_trainable([] if inference_mode else names)
        self._active_adapter = names

    def enable_adapters(self, enabled: bool) -> None:
        """Enables or disables the adapters on this layer."""
        if self.adapted_layer is not None:
            self.adapted_layer.enable_adapters(enabled)
            return
        self._set_trainable(self.active_adapters if enabled else [])
        self._disable_adapters = not enabled

    def _set_trainable(self, names: Sequence[str]) -> None:
        for attribute in self.adapter_layer_names:
            for name, part in getattr(self, attribute).items():
                part.requires_grad_(name in names)

    @property
    def _with_product(self) -> Mapping[str, Any]:
        """Adapter name -> the first factor of a matrix product."""
        factors: Mapping[str, Any] = getattr(self, LowRank.factor_names[0])
        return factors

    def _factors(self, adapter: str, names: tuple[str, str] = LowRank.factor_names) -> tuple[Any, Any] | None:
        """The factors A and B of an adapter, or None; modules, or parameters for a lookup."""
        first, second = (getattr(self, name) for name in names)
        return (first[adapter], second[adapter]) if adapter in first else None

    def _get_available_adapters(self) -> set[str]:
        """Returns the names of the adapters that have parameters here."""
        return {name for attribute in self.adapter_layer_names for name in getattr(self, attribute)}

    # Adapters

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Creates an adapter's factors for a matrix product; override it for other kinds of layer.

        Args:
            adapter_name: the adapter.
            r: rank.
            lora_alpha: the product is multiplied by ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA.
            config: the other settings.
            **kwargs: ignored; accepted as in PEFT.

        Raises:
            ConfigError: the rank is not positive, or the config selects a variant or another init.
        """
        if r <= 0:
            raise ConfigError(f"`r` should be a positive integer value but the value passed is {r}", field="r")
        _check_plain(config, type(self).__name__)
        if self.in_features is None or self.out_features is None:
            raise ConfigError(
                f"the factors for a {type(self.base_layer).__name__} are unknown: override update_layer in "
                f"{type(self).__name__}"
            )
        if config.lora_bias and getattr(self.base_layer, "bias", None) is None:
            layer = type(self.base_layer).__name__
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {layer} has no bias. This means that "
                "merging LoRA weights won't be possible.",
                PeftWarning,
                stacklevel=2,
            )
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.use_dora[adapter_name], self.use_rslora[adapter_name] = config.use_dora, config.use_rslora
        self.lora_bias[adapter_name] = config.lora_bias
        self.scaling[adapter_name] = self._trained_scaling(adapter_name)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        factors = nn.Linear(self.in_features, r, bias=False), nn.Linear(r, self.out_features, bias=config.lora_bias)
        for attribute, factor in zip(LowRank.factor_names, factors, strict=True):
            getattr(self, attribute)[adapter_name] = factor
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, config.inference_mode)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Reinitializes the factors of an adapter.

        Args:
            adapter_name: the adapter.
            init_lora_weights: False leaves the factors unchanged; a string initializes A from a normal distribution,
                and True as ``nn.Linear``.
        """
        if init_lora_weights is False:
            return
        if (factors := self._factors(adapter_name)) is not None:
            A, B = factors
            if isinstance(init_lora_weights, str):
                nn.init.normal_(A.weight, std=1 / self.r[adapter_name])
            else:
                nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
            for parameter in B.parameters():
                parameter.zero_()
        if (factors := self._factors(adapter_name, LowRankLookup.factor_names)) is not None:
            nn.init.zeros_(factors[0])
            nn.init.normal_(factors[1])

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter from this layer; has no effect if the layer lacks it."""
        if self.adapted_layer is not None:
            self.adapted_layer.delete_adapter(adapter_name)
            return
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            by_adapter = getattr(self, attribute)
            if adapter_name in by_adapter:
                del by_adapter[adapter_name]
        if adapter_name in self.active_adapters:
            left = [name for name in self.active_adapters if name != adapter_name]
            self.set_adapter(left or list(self._with_product)[:1])

    def _trained_scaling(self, adapter: str) -> float:
        rank = self.r[adapter]
        return self.lora_alpha[adapter] / (math.sqrt(rank) if self.use_rslora.get(adapter) else rank)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets an adapter's scaling to ``scale`` times its trained scaling; ignored if the layer lacks the adapter."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._trained_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scalings of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scalings of the active adapters; without a factor, restores their trained scalings."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self._trained_scaling(name) if scale is None else self.scaling[name] / scale

    # For the forward of custom classes

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Raises ConfigError if a call has ``adapter_names`` (an adapter for each row)."""
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(f"{type(self).__name__} does not support adapter_names: all rows use the same adapters")

    def _cast_input_dtype(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Returns the input in the dtype of the factors."""
        return x if x is None or not self.cast_input_dtype_enabled else x.to(dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves an adapter to the frozen layer's device, and casts it to the layer's dtype if it is floating-point."""
        first = next(self.base_layer.parameters(), None)
        if first is None or first.is_meta:
            return
        dtype = first.dtype if first.is_floating_point() else None
        for attribute in (*self.adapter_layer_names, "lora_dropout"):
            by_adapter = getattr(self, attribute)
            if adapter_name in by_adapter:
                by_adapter[adapter_name] = by_adapter[adapter_name].to(device or first.device, dtype)


class Linear(nn.Module, LoraLayer):
    """PEFT's ``lora.Linear`` as a base of custom classes: a matrix product with two factors for each adapter.

    Args:
        base_layer: a linear layer, or one that has ``in_features``, ``out_features`` and a ``weight`` (out, in).
        adapter_name: name of the first adapter.
        config: config of this adapter.
        r: rank of this adapter.
        lora_alpha: alpha of this adapter.
        is_target_conv_1d_layer: only stored; accepted as in PEFT.
        **kwargs: ignored; accepted as in PEFT.
    """

    title = "lora.Linear"

    @staticmethod
    def _build(base_layer: nn.Module, adapter_name: str, config: LoraConfig, *args: Any, **kwargs: Any) -> Any:
        """Returns the engine's layer for settings that this class does not compute, else None."""
        if not _requested(config) or config.custom_layer_class(base_layer) is not None:
            return None
        return lora_layer(Linear.title, base_layer, adapter_name, config, *args, **kwargs)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        kind = resolve_layer_kind(base_layer)
        self.fan_in_fan_out = config.fan_in_fan_out or (kind is not None and kind.name == "conv1d")
        self.is_target_conv_1d_layer = is_target_conv_1d_layer
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_caches" in state:  # pickles of PEFT's layers have it; these layers do not
            refuse_pickle_of_peft(self, state)
        super().__setstate__(state)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the frozen layer's output plus the active adapters' deltas, in the dtype of the layer's output.

        Args:
            x: (…, in), floating-point.
            *args: passed to the frozen layer.
            **kwargs: passed to the frozen layer.

        Returns:
            (…, out).
        """
        if isinstance(cast(object, self), AdaptedLayer):  # called by a function that a script put in its place
            return own_forward(self, x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        output: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        total = output
        for name in self.active_adapters:
            if (factors := self._factors(name)) is not None:
                A, B = factors
                cast_x = self._cast_input_dtype(x, A.weight.dtype)
                total = total + B(A(self.lora_dropout[name](cast_x))) * self.scaling[name]
        return total.to(output.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns the delta that merging an adapter adds to the weight, in the orientation of the stored weight.

        Raises:
            UnknownAdapterError: the layer does not have the adapter.
        """
        factors = self._factors(adapter)
        if factors is None:
            raise UnknownAdapterError(f"this layer has no adapter {adapter!r}, but: {', '.join(self._with_product)}")
        A, B = factors
        delta: Tensor = (B.weight @ A.weight) * self.scaling[adapter]
        return delta.T if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Merges adapters that are not yet merged into the frozen weight and bias.

        Args:
            safe_merge: refuse a weight that would not be finite.
            adapter_names: the adapters; None for the active ones.

        Raises:
            MergeError: the weight would not be finite, or an adapter has a bias but the layer does not.
        """
        base: Any = self.base_layer
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name not in self._with_product or name in self.merged_adapters:
                continue
            merged = base.weight + self.get_delta_weight(name).to(base.weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise MergeError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._add_bias(name, self.scaling[name])
            base.weight.data.copy_(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtracts the merged deltas, in reverse order."""
        base: Any = self.base_layer
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self._with_product:
                base.weight.data -= self.get_delta_weight(name).to(base.weight.dtype)
                self._add_bias(name, -self.scaling[name])

    def _add_bias(self, name: str, factor: float) -> None:
        factors = self._factors(name)
        if factors is None or not self.lora_bias.get(name):
            return
        bias = getattr(self.base_layer, "bias", None)
        if bias is None:
            raise MergeError(f"adapter {name!r} adds a bias, but the base layer has no bias to merge it into")
        bias.data += factors[1].bias * factor

    def _get_name(self) -> str:
        return f"lora.{type(self).__name__}"


def _requested(config: LoraConfig) -> str:
    """The first setting that a custom layer class would have to implement itself; empty if there is none."""
    requested = {
        "use_dora=True": config.use_dora,
        f"init_lora_weights={config.init_lora_weights!r}": config.init_name not in ("default", "random", "gaussian"),
        config.variant: bool(config.variant),
    }
    return next((field for field, is_requested in requested.items() if is_requested), "")


def _check_plain(config: LoraConfig, layer_class: str) -> None:
    """Raises ConfigError for settings that a custom layer class would have to implement itself."""
    if unsupported := _requested(config):
        raise ConfigError(f"{unsupported} is not supported by custom layer classes ({layer_class}): leave it out")
