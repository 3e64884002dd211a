"""LoraConfig: PEFT's fields, names and defaults, shared by the methods of the LoRA family."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn

from nbpeft.engine.config.config_checks import (
    check_choice,
    check_count,
    check_not_negative,
    check_share,
    check_target_fields,
    checked_pattern,
    unused_patterns,
)
from nbpeft.engine.config.layers_config import LayerByLayer
from nbpeft.engine.config.module_paths import pattern_table
from nbpeft.engine.config.targets import with_target
from nbpeft.engine.contract.adapter import AdapterConfig, PeftType
from nbpeft.engine.contract.field_types import plain
from nbpeft.engine.methods.lora.init_configs import INIT_CONFIGS, CordaConfig, EvaConfig, LoraGAConfig, as_settings
from nbpeft.engine.methods.lora.variant_configs import (
    VARIANT_CONFIGS,
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
    no_variant,
)
from nbpeft.errors import ConfigError, did_you_mean, shown

INITS = ("gaussian", "orthogonal", "olora", "pissa", "mica", *INIT_CONFIGS)
"""Named inits of ``init_lora_weights`` besides True, False and ``pissa_niter_N``."""
_PISSA_ITERATIONS = re.compile(r"pissa_niter_([0-9]{1,3})")
_MOST_ITERATIONS = 128
"""Each iteration costs two decompositions; after a few the subspace no longer changes."""

_VARIANTS = ("use_dora", "alora_invocation_tokens", "use_qalora", *VARIANT_CONFIGS)
"""Fields that select another method than LoRA; see ``LoraConfig.variant``."""
_OWN_START = ("use_bdlora", "use_qalora", "kasa_config")
"""Variants with their own initialization, to which a named init does not apply."""
_BIASES = ("none", "all", "lora_only")


@dataclass
class LoraRuntimeConfig:
    """Settings of the current process, which are never saved."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(AdapterConfig, LayerByLayer):
    """Config of LoRA, rsLoRA and DoRA. Field names and defaults are PEFT 0.21's.

    Fields of PEFT that are not implemented here are accepted with their default, so that every
    config file loads, and refused with any other value.

    Attributes:
        r: rank of the two matrices: how much an adapter can learn, and its size.
        target_modules: names of the layers to adapt, 'all-linear', or a pattern; None for the model type's usual ones.
        exclude_modules: names of layers to leave as they are, or a pattern.
        lora_alpha: the delta is multiplied by lora_alpha / r.
        lora_dropout: dropout probability of the adapter's input, from 0 to 1.
        fan_in_fan_out: whether layers store their weight as (in, out); set when the adapter is added.
        bias: which biases of the model are also trained.
        use_rslora: divide lora_alpha by the square root of r, which suits ranks above 64.
        modules_to_save: names of other modules that are copied, trained as a whole and saved.
        init_lora_weights: initialization of the matrices; True starts at the base model.
        layers_to_transform: indices of the layers to adapt; None for all.
        layers_pattern: name of the module list that layers_to_transform indexes.
        rank_pattern: layer name or pattern -> another r.
        alpha_pattern: layer name or pattern -> another lora_alpha.
        trainable_token_indices: ids of tokens whose rows of the embedding are trained.
        use_dora: train the magnitude of each row of a weight separately from its direction (DoRA).
        layer_replication: ranges [start, end) of layers that make up the new model; each use has its own factors.
        lora_bias: give the second matrix a bias.
        target_parameters: names of bare parameters to adapt, such as those of experts: mlp.experts.gate_up_proj.
        ensure_weight_tying: if one of the modules that share the embedding's weight is in target_modules or in
            modules_to_save, train one pair of matrices, or one copy, for all of them, so that they stay tied when they
            are merged; trained token rows always stay tied.
        loftq_config: settings of init_lora_weights="loftq": loftq_bits and loftq_iter.
        eva_config: settings of init_lora_weights="eva".
        corda_config: settings of init_lora_weights="corda".
        lora_ga_config: settings of init_lora_weights="lora_ga".
        kasa_config: learn singular values that replace the weight's smallest (KaSA).
        use_qalora: apply the first factor to the means of groups of inputs (QA-LoRA).
        qalora_group_size: number of inputs in a group.
        use_bdlora: make one factor of each layer block-diagonal (BD-LoRA).
        alora_invocation_tokens: token ids from whose last occurrence in a row onward the adapter is active (aLoRA).
        arrow_config: route each token through other adapters of the model (Arrow, GenKnowSub).
        velora_config: save only a fraction of a layer's input for backward (VeLoRA).
        monteclora_config: train with random samples around A, and train their variance as well (MonteCLoRA).
        quantization_aware: on quantized layers compute, and train, as if the adapter were merged into the weight and
            rounded with it, so that merging changes nothing (not in PEFT).

    Raises:
        ConfigError: a value is invalid, or selects a feature that is not implemented.
    """

    r: int = field(default=8)
    target_modules: Collection[str] | str | None = field(default=None)
    exclude_modules: Collection[str] | str | None = field(default=None)
    lora_alpha: float = field(default=8)
    lora_dropout: float = field(default=0.0)
    fan_in_fan_out: bool = field(default=False)
    bias: str = field(default="none")
    use_rslora: bool = field(default=False)
    modules_to_save: list[str] | None = field(default=None)
    init_lora_weights: bool | str = field(default=True)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = field(default=None)
    megatron_core: str | None = field(default="megatron.core")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None)
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = field(default=None)
    corda_config: CordaConfig | None = field(default=None)
    lora_ga_config: LoraGAConfig | None = field(default=None)
    use_dora: bool = field(default=False)
    velora_config: VeloraConfig | None = field(default=None)
    alora_invocation_tokens: list[int] | None = field(default=None)
    use_qalora: bool = field(default=False)
    qalora_group_size: int = field(default=16)
    monteclora_config: MontecloraConfig | None = field(default=None)
    layer_replication: list[tuple[int, int]] | None = field(default=None)
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = field(default=False)
    target_parameters: list[str] | None = field(default=None)
    use_bdlora: BdLoraConfig | None = field(default=None)
    arrow_config: ArrowConfig | None = field(default=None)
    kasa_config: KasaConfig | None = field(default=None)
    ensure_weight_tying: bool = field(default=False)
    quantization_aware: bool = field(default=False)

    not_implemented: ClassVar[tuple[str, ...]] = ("megatron_config",)
    instead: ClassVar[Mapping[str, str]] = {
        "megatron_config": "Megatron's parallel layers are not adapted: use a model of transformers, with FSDP or DDP",
    }
    unused: ClassVar[tuple[str, ...]] = ("megatron_core", "runtime_config")
    checked_apart: ClassVar[tuple[str, ...]] = (
        *("r", "target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "loftq_config"),
    )

    pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    """Fields that map patterns over paths to values."""
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "bias": _BIASES,
        "init_lora_weights": (True, False, *INITS, "pissa_niter_4"),
    }
    slot_fields: ClassVar[tuple[str, ...]] = (
        *AdapterConfig.slot_fields,
        "lora_bias",
        "target_parameters",
        "layer_replication",
    )
    value_fields: ClassVar[tuple[str, ...]] = (
        *("lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights", "quantization_aware"),
    )
    own_fields: ClassVar[tuple[str, ...]] = ("quantization_aware",)
    card_fields: ClassVar[tuple[str, ...]] = (
        *("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "bias", "target_modules", "modules_to_save"),
        "alora_invocation_tokens",
    )
    card_tags: ClassVar[tuple[str, ...]] = ("lora",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LORA")
        self._check_numbers()
        self._check_choices()
        self._check_init_settings()
        self._check_conversion()
        self._check_invocation()
        self._check_variants()
        self._check_quantization_aware()
        check_target_fields(self, pattern_fields=self.pattern_fields)
        self._custom_modules: dict[type[nn.Module], type[nn.Module]] | None = None

    def _check_numbers(self) -> None:
        self.r = plain(self.r)
        check_count("r", self.r)
        check_not_negative("lora_alpha", self.lora_alpha)
        check_share("lora_dropout", self.lora_dropout)
        self.rank_pattern = checked_pattern("rank_pattern", self.rank_pattern, check_count)
        self.alpha_pattern = checked_pattern("alpha_pattern", self.alpha_pattern, check_not_negative)

    def _check_choices(self) -> None:
        check_choice("bias", self.bias, _BIASES)
        _check_init_name(self.init_lora_weights)
        if self.use_dora and self.lora_bias:
            raise ConfigError(
                "The argument lora_bias=True is not supported for DoRA (use_dora=True)", field="lora_bias"
            )
        if self.lora_bias and isinstance(self.init_lora_weights, str):
            raise ConfigError(
                f"The argument lora_bias=True is supported with init_lora_weights True or False, not "
                f"{self.init_lora_weights!r}",
                field="lora_bias",
            )

    def _check_init_settings(self) -> None:
        """Converts the settings of inits: to a dictionary for LoftQ as in PEFT, else to an object."""
        for init, (name, settings_class) in INIT_CONFIGS.items():
            settings = as_settings(name, getattr(self, name) or None, settings_class)
            used = self.init_name == init
            if settings is not None and not used:
                ignored = f"`{name}` specified but will be ignored when `init_lora_weights` is not {init!r}."
                warnings.warn(ignored, stacklevel=4)
            if init == "loftq":
                settings = dict(vars(settings)) if settings is not None and used else {}
            setattr(self, name, settings)
        if self.init_name == "loftq" and not self.loftq_config:
            raise ConfigError(
                "`loftq_config` must be specified when `init_lora_weights` is 'loftq'.", field="loftq_config"
            )
        for init in ("eva", "corda"):
            name, settings_class = INIT_CONFIGS[init]
            if self.init_name == init and getattr(self, name) is None:
                title = "CorDA" if init == "corda" else init.upper()
                warnings.warn(
                    f"`init_lora_weights` is {init!r} but `{name}` is not specified. Using default {title} config.",
                    stacklevel=4,
                )
                setattr(self, name, settings_class())
        if self.initialised_from_data and self.use_dora:
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} cannot be used with use_dora=True: its start could not "
                "be saved; use 'pissa' or 'olora'",
                field="use_dora",
            )

    def _check_conversion(self) -> None:
        """Warns before a training of what cannot be saved for the base as it was."""
        patterned = self.use_rslora and (self.rank_pattern or self.alpha_pattern)
        if patterned and self.init_name in ("olora", "pissa", "pissa_niter"):  # others are always saved as plain LoRA
            warnings.warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion do not go "
                f"together: an adapter that starts with init_lora_weights={self.init_lora_weights!r} cannot be saved "
                "with path_initial_model_for_weight_conversion then",
                stacklevel=4,
            )

    def _check_invocation(self) -> None:
        tokens = self.alora_invocation_tokens
        if tokens is None:
            return
        if not tokens or any(token < 0 for token in tokens):
            raise ConfigError(
                f"alora_invocation_tokens must be a list of token ids, not {shown(tokens)}",
                field="alora_invocation_tokens",
            )
        if self.use_dora or self.init_from_weight:
            other = "use_dora=True" if self.use_dora else f"init_lora_weights={self.init_lora_weights!r}"
            raise ConfigError(
                f"alora_invocation_tokens cannot be used with {other}: tokens before are the base model's",
                field="alora_invocation_tokens",
            )

    def _check_variants(self) -> None:
        for name, settings_class in VARIANT_CONFIGS.items():
            setattr(self, name, as_settings(name, getattr(self, name), settings_class))
        if self.use_qalora:
            check_count("qalora_group_size", self.qalora_group_size)
        selected = [name for name in (*_VARIANTS, "mica") if self._asks_for(name)]
        if len(selected) > 1:
            first, second = selected[:2]
            raise ConfigError(f"{first} cannot be combined with {second}: each is a method of its own", field=second)
        alone = self.variant if self.variant in _OWN_START else ""
        if alone and self.init_name not in ("default", "random", "gaussian"):
            raise ConfigError(
                f"{alone} cannot be used with init_lora_weights={self.init_lora_weights!r}, only with True, False or "
                "'gaussian'",
                field="init_lora_weights",
            )
        if alone and self.lora_bias and alone != "kasa_config":
            raise ConfigError(f"{alone} cannot be used with lora_bias=True", field="lora_bias")

    def _asks_for(self, variant: str) -> bool:
        init = self.init_lora_weights
        return bool(getattr(self, variant)) if variant != "mica" else isinstance(init, str) and init.lower() == "mica"

    @property
    def variant(self) -> str:
        """The method of the family that the config selects: the field that selects it, or ``mica``; empty for LoRA."""
        for name in (*_VARIANTS, "mica"):
            if self._asks_for(name):
                return name
        return ""

    def _check_quantization_aware(self) -> None:
        """Refuses settings whose effect is not part of the rounded weight."""
        variant = "init_lora_weights" if self.variant == "mica" else self.variant
        for name in ("lora_dropout", variant) if self.quantization_aware else ():
            if name and getattr(self, name):
                raise ConfigError(
                    f"quantization_aware=True does not work with {name}={getattr(self, name)!r}, whose effect is not "
                    "part of the rounded weight: remove one of the two",
                    field=name,
                )

    @property
    def is_quantization_aware(self) -> bool:
        """The value of ``quantization_aware``."""
        return self.quantization_aware

    def rounded(self) -> Self:
        """A copy that is ``quantization_aware``."""
        twin = self.copy(quantization_aware=True)
        twin._check_quantization_aware()
        return twin

    @property
    def init_name(self) -> str:
        """``default`` for True, ``random`` for False, else the name without its number of iterations."""
        init = self.init_lora_weights
        if isinstance(init, str):
            return init.lower() if init.lower() in INITS else "pissa_niter"
        return "default" if init else "random"

    @property
    def pissa_iterations(self) -> int | None:
        """N of ``pissa_niter_N``, or None."""
        match = _PISSA_ITERATIONS.fullmatch(str(self.init_lora_weights).lower())
        return None if match is None else int(match[1])

    @property
    def initialised_from_weight(self) -> bool:
        """Whether the variant is KaSA, or the init OLoRA, PiSSA, LoftQ, CorDA or LoRA-GA."""
        return self.kasa_config is not None or self.init_from_weight

    @property
    def init_from_weight(self) -> bool:
        """Whether ``init_lora_weights`` is OLoRA, PiSSA, LoftQ, CorDA or LoRA-GA."""
        return self.init_name in ("olora", "pissa", "pissa_niter", "loftq", "corda", "lora_ga")

    @property
    def initialised_from_data(self) -> bool:
        """Whether the init depends on data (CorDA, LoRA-GA), and so cannot be computed from the weight alone."""
        return self.init_name in ("corda", "lora_ga")

    def started_as(self, init: str) -> Self | None:
        """A copy with another init that can be recomputed from the weight."""
        config = self.copy(init_lora_weights=init)
        return config if config.initialised_from_weight and not config.initialised_from_data else None

    def has_scale_of(self, other: AdapterConfig, paths: Iterable[str]) -> bool:
        if not isinstance(other, LoraConfig) or self.variant != other.variant:
            return False
        return all(
            (self.rank_at(path), self.scaling_at(path)) == (other.rank_at(path), other.scaling_at(path))
            for path in paths
        )

    def rank_at(self, path: str) -> int:
        """The rank at a module path, ``rank_pattern`` included."""
        return int(pattern_table(self, "rank_pattern").get(path, self.r)) if self.rank_pattern else self.r

    def alpha_at(self, path: str) -> float:
        """The alpha at a module path as it was given, ``alpha_pattern`` included."""
        return (
            pattern_table(self, "alpha_pattern").get(path, self.lora_alpha) if self.alpha_pattern else self.lora_alpha
        )

    def scaling_at(self, path: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
        rank = self.rank_at(path)
        return self.alpha_at(path) / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def adapter_size(self) -> int | None:
        return None if self.rank_pattern else self.r

    def resized(self, size: int) -> Self:
        return self.copy(r=size)

    def set_size(self, size: int, paths: Sequence[str]) -> None:
        """Sets one rank for all layers and keeps the scaling of each path."""
        factor = math.sqrt(size) if self.use_rslora else size
        scalings = {path: self.scaling_at(path) for path in paths}
        usual = self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
        others = {path: scaling * factor for path, scaling in scalings.items() if scaling != usual}
        self.r, self.lora_alpha = size, usual * factor
        self.rank_pattern = dict.fromkeys(self.rank_pattern, size)
        self.alpha_pattern = dict(sorted(others.items(), key=lambda item: -len(item[0])))

    def unused_patterns(self, paths: Sequence[str]) -> str:
        return unused_patterns(self, self.pattern_fields, paths)

    def with_layer(self, path: str, layer_config: LoraConfig, *, target: bool) -> Self:
        """A copy with rank and alpha of one layer."""
        apart = ("init_lora_weights",) if self.initialised_from_weight or layer_config.initialised_from_weight else ()
        for name in ("lora_bias", *no_variant(), "qalora_group_size", *apart):
            if getattr(self, name) != getattr(layer_config, name):
                raise ConfigError(f"{name} must be the adapter's own, {getattr(self, name)!r}", field=name)
        exact, rank, scaling = f"^{path}", layer_config.rank_at(path), layer_config.scaling_at(path)
        alpha = scaling * (math.sqrt(rank) if self.use_rslora else rank)
        changed = self.copy(rank_pattern={exact: rank, **{**self.rank_pattern, exact: rank}})
        changed.alpha_pattern = {exact: alpha, **{**self.alpha_pattern, exact: alpha}}
        if target:
            changed.target_modules = with_target(self.target_modules, path)
        return changed

    # Custom layer classes

    def _register_custom_module(self, mapping: Mapping[type[nn.Module], type[nn.Module]]) -> None:
        """Registers custom adapter classes, derived from ``LoraLayer``, for classes of layers; as in PEFT.

        The mapping is not part of a saved config: register it again before loading an adapter.

        Args:
            mapping: class of layers in the model -> class of their wrappers, called as ``cls(base_layer,
                adapter_name, config=…, r=…, lora_alpha=…, target_name=…, …)``.
        """
        self._custom_modules = {**(self._custom_modules or {}), **mapping}

    def custom_layer_class(self, module: nn.Module) -> type[nn.Module] | None:
        registered = (self._custom_modules or {}).items()
        return next((custom for layer, custom in registered if isinstance(module, layer)), None)

    def make_custom_layer(self, layer_class: type[nn.Module], module: nn.Module, path: str, name: str) -> nn.Module:
        """Creates a wrapper of a custom class with the arguments that PEFT passes."""
        given: dict[str, Any] = {"r": self.rank_at(path), "lora_alpha": self.alpha_at(path), "target_name": path}
        given |= {"loaded_in_8bit": False, "loaded_in_4bit": False, "parameter_name": None, "tied_adapter": {}}
        offload = self.runtime_config.ephemeral_gpu_offload
        return layer_class(module, name, config=self, ephemeral_gpu_offload=offload, **given)

    @property
    def dropout(self) -> float:
        """Dropout probability of the adapter's input."""
        return float(self.lora_dropout)


def _check_init_name(init: object) -> None:
    name = init.lower() if isinstance(init, str) else ""
    iterations = _PISSA_ITERATIONS.fullmatch(name)
    if isinstance(init, bool) or name in INITS or (iterations and int(iterations[1]) <= _MOST_ITERATIONS):
        return
    names = (*INITS, "pissa_niter_4")
    most = f" (at most pissa_niter_{_MOST_ITERATIONS})" if name.startswith("pissa_niter_") else ""
    raise ConfigError(
        f"init_lora_weights={shown(init)} is not implemented{most}; use True, False or {', '.join(map(repr, names))}."
        + did_you_mean(str(init), names),
        field="init_lora_weights",
    )
