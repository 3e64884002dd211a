"""``PeftModel.base_model``: the object that PEFT has between the PeftModel and the base model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from nbpeft._util import hooks
from nbpeft.engine.calls.model_properties import checkpoints_gradients, has_encoder
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.config.adapter_names import names_in
from nbpeft.engine.config.default_targets import default_targets_of
from nbpeft.engine.contract.adapter import Adapter, AdapterConfig, Untargeted
from nbpeft.engine.contract.registry import Method, method_of, methods, methods_of_type
from nbpeft.engine.contract.shared_state import Together, add_shared, state_of_all, take_shared
from nbpeft.engine.runtime.adapter_tensors import parameter_paths
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.runtime.method_hooks import extra_loss_of_call, learns_with_hooks
from nbpeft.engine.tree.model_tree import MANAGER, embedding_of, is_quantized, manager_of
from nbpeft.engine.tree.tied_weights import modules_tied_to_embedding
from nbpeft.engine.views.shows_adapters import ShowsAdapters
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import AdapterError, StaleModelError, UnknownAdapterError, did_you_mean
from nbpeft.model.combine.combining import Combined, combine_adapters
from nbpeft.model.combine.conversion import can_convert
from nbpeft.model.handle.injection import inject, inject_adapter_in_model
from nbpeft.model.handle.listed_modules import list_parts
from nbpeft.model.handle.tuner_type import TunerType, check_overrides
from nbpeft.model.saving.user_configs import replace_configs
from nbpeft.peft_layers.classes import layer_type, refuse_pickle_of_peft
from nbpeft.peft_layers.shared_tensors import shared_by_name

_LABELS = ("labels", "start_positions")
"""Inputs with which transformers' models return the loss first, if they return a tuple."""


class BaseTuner(ShowsAdapters, metaclass=TunerType):
    """Has the base model as ``.model``, so that the keys of state dicts have PEFT's prefix.

    Each method has its own subclass, named as in PEFT: ``LoraModel``, ``IA3Model``; see ``tuner_class``. Creating a
    tuner invalidates the previous one of the base model and its PeftModel, whose commands then raise an error.
    Attributes that the tuner lacks are looked up on the base model.

    Args:
        model: the base model, changed in place.
        peft_config: config of an adapter, or adapter name -> config, of which that of ``adapter_name`` is used.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: leave the parameters on the meta device.
        state_dict: its keys select the modules to adapt; see ``inject_adapter_in_model``.

    Raises:
        TargetError: neither the config nor any key fits the model, which is not changed.
        NotSupportedError: a class derived from a tuner overrides a function that would not be called.
    """

    prefix: str = ""
    """Prefix of the parameter names of the first adapter's method."""
    tuned_type: str = ""
    """``peft_type`` of the first adapter's method."""
    uses_shared_state: bool = False
    """Whether the method's layers share tensors."""
    tuner_layer_cls: type[Any] = AdaptedLayer
    """Class or type of the adapted layers, for ``isinstance``."""
    target_module_mapping: Mapping[str, Any] = {}
    """Model type -> default targets of the method."""
    _on_model: tuple[str, ...] = ()
    """Names of the modules that the method's adapters have on the tuner; see ``list_parts``."""

    model: nn.Module
    _token: object

    def __init__(
        self,
        model: nn.Module,
        peft_config: AdapterConfig | Mapping[str, AdapterConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_overrides(type(self))
        super().__init__()
        config = peft_config[adapter_name] if isinstance(peft_config, Mapping) else peft_config
        inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage, state_dict)
        manager = manager_of(model)
        assert manager is not None
        self._take(model, manager)
        self.training = True

    @classmethod
    def over(cls, model: nn.Module, manager: AdapterManager) -> Self:
        """Creates a tuner for a model whose manager already has adapters.

        Args:
            model: the base model.
            manager: its manager.
        """
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner._take(model, manager)
        return tuner

    def _take(self, model: nn.Module, manager: AdapterManager) -> None:
        self.model = model
        self.__dict__[MANAGER] = manager
        self.__dict__["_token"] = manager.owner = object()
        self.training = model.training
        self.show_adapters()
        hooks.adapted()

    def show_adapters(self) -> None:
        """Updates the modules that adapters have on the tuner."""
        list_parts(self.manager, self._on_model, self._modules)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if MANAGER not in state:
            refuse_pickle_of_peft(self, state)
        super().__setstate__(state)
        self.show_adapters()
        hooks.adapted()

    @property
    def manager(self) -> AdapterManager:
        """The manager of the base model's adapters."""
        manager: AdapterManager = self.__dict__[MANAGER]
        return manager

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the state dict in PEFT's layout; see ``nn.Module``."""
        found = super().state_dict(*args, **kwargs)
        add_shared(self._shared(), found, kwargs.get("prefix", ""), keep_vars=kwargs.get("keep_vars", False))
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        take_shared(self._shared(), state_dict, prefix, args[2], args[4])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _shared(self) -> dict[str, Adapter]:
        """Adapter name -> an adapter, for those whose layers share tensors."""
        configs, layers = self.manager.configs, self.manager.layers.values()
        sharing = [name for name, config in configs.items() if method_of(config).shares.state is not None]
        found = {name: layer.adapters[name] for layer in layers for name in sharing if name in layer.adapters}
        return {name: one for name, one in found.items() if state_of_all(one) is not None}

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Passes on the module to adapt, for a function that a script puts in this one's place; see ``TunerType``."""
        if "passed_on" not in self.__dict__:
            raise AdapterError("_create_and_replace is called by nbpeft alone: add an adapter with add_adapter()")
        self.__dict__["passed_on"].append(target)

    @property
    def is_live(self) -> bool:
        """Whether the adapters are on the model and no other PeftModel owns it."""
        return self.manager.alive and self.manager.owner is self._token

    def check_live(self) -> None:
        """Raises StaleModelError if the adapters were unloaded or another PeftModel owns the base model."""
        self.manager.check_alive()
        if self.manager.owner is not self._token:
            raise StaleModelError(
                "this PeftModel is invalid: another PeftModel was created on the same base model; use that one, or "
                "load the base model again"
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter can be converted into a LoRA; see ``convert_to_lora``."""
        return can_convert(self.manager, adapter_name)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """Returns a base model's config as a dictionary; ``{"model_type": "custom"}`` if it has none."""
        config: Any = getattr(model, "config", None)
        if hasattr(config, "to_dict"):
            found: dict[str, Any] = config.to_dict()
            return found
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            return dataclasses.asdict(config)
        return {"model_type": "custom"} if config is None else config

    @property
    def peft_config(self) -> dict[str, Any]:
        """Adapter name -> config; a dictionary with the same names can be assigned."""
        return self.manager.configs

    @peft_config.setter
    def peft_config(self, configs: Mapping[str, AdapterConfig]) -> None:
        self.check_live()
        replace_configs(self.manager, configs)

    @property
    def active_adapter(self) -> list[str]:
        """Names of the active adapters."""
        return list(self.manager.active)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self.manager.active)

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the layers that adapters target in the base model, in the order of the adapters."""
        bare = self.targeted_parameter_names
        targeted = [
            path
            for name in self.manager.names
            for path, layer in self.manager.layers_with(name).items()
            if path not in bare and not isinstance(layer.adapter(name), Untargeted)
        ]
        return list(dict.fromkeys(targeted))

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Names of the bare parameters that adapters target in the base model (``target_parameters``)."""
        return list(parameter_paths(self.manager.layers))

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Initializes an adapter from its config in ``peft_config``; does not activate it.

        Args:
            model: accepted for compatibility with PEFT and ignored; it is the tuner's base model.
            adapter_name: name of an adapter of the model.
            autocast_adapter_dtype: accepted for compatibility with PEFT and ignored.
            low_cpu_mem_usage: leave the parameters on the meta device.
            state_dict: its keys select the modules to adapt; see ``inject_adapter_in_model``.

        Raises:
            UnknownAdapterError: the model has no such adapter.
        """
        self.check_live()
        with self.manager.reading():
            self.manager.require(adapter_name)
            config = self.manager.configs[adapter_name]
        options: dict[str, Any] = {"state_dict": state_dict, "replace": True, "activate": False}
        inject(self.manager, config, adapter_name, empty=low_cpu_mem_usage, **options)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """Returns paths of the modules that share the input embedding's weight; called by other libraries."""
        return modules_tied_to_embedding(self.model)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Makes reentrant gradient checkpointing work with frozen embeddings.

        Quantized models are not changed, because ``prepare_model_for_kbit_training`` does this for them.

        Args:
            model: the PeftModel or the base model.

        Returns:
            The same model.
        """
        enable = getattr(model, "enable_input_require_grads", None)
        if enable is not None and not is_quantized(model):
            enable()
        return model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the base model's forward with the active adapters, and adds their methods' extra loss in training."""
        if not self.training:
            return self.model(*args, **kwargs)
        if not torch.compiler.is_compiling():
            return self._forward_in_training(*args, **kwargs)
        if not self._learns_with_hooks(self.manager.active_state.traced.names):
            return self.model(*args, **kwargs)
        alone: Any = torch.compiler.disable(self._forward_in_training)
        return alone(*args, **kwargs)

    def _forward_in_training(self, *args: Any, **kwargs: Any) -> Any:
        return with_extra_loss(self.manager, self.model(*args, **kwargs), kwargs)

    def _learns_with_hooks(self, names: tuple[str, ...]) -> bool:
        configs = self.manager.configs
        return any(learns_with_hooks(configs[name]) for name in names if name in configs)

    _learns_with_hooks._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as PeftModel._transforms_calls

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activates one adapter or several, and makes them trainable or, with ``inference_mode``, frozen."""
        self.check_live()
        self.manager.activate(adapter_name, trainable=not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Sets ``requires_grad`` of the parameters of adapters, active or not."""
        self.check_live()
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.manager.set_requires_grad(name, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Enables the active adapters."""
        self.check_live()
        self.manager.enable()

    def disable_adapter_layers(self) -> None:
        """Disables all adapters, so that only the base model computes."""
        self.check_live()
        warn_of_trained_biases(self.manager)
        self.manager.disable()

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Removes one adapter or several, all or none; if no active adapter is left, the oldest is activated."""
        self.check_live()
        remove_adapters(self.manager, adapter_name)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str | None = None,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> Combined:
        """Adds the weighted combination of several adapters as a new adapter, which is frozen and inactive.

        Types with PEFT's names give PEFT's values for the same seed, except that rsLoRA's scaling and ranks of
        ``rank_pattern`` are handled correctly. ``exact`` is the weighted sum of the true deltas, also for DoRA.

        Args:
            adapters: names of the adapters to combine.
            weights: one factor per adapter; negative ones subtract.
            adapter_name: name of the new adapter.
            combination_type: how to combine; the types and the default depend on the method (``svd`` for LoRA).
            svd_rank: rank of the result, for types that let it be chosen.
            svd_clamp: quantile at which the entries of the result are clamped.
            svd_full_matrices: see ``torch.linalg.svd``.
            svd_driver: see ``torch.linalg.svd``.
            density: share of the entries that pruning preserves, from 0 to 1.
            majority_sign_method: "total" or "frequency".

        Returns:
            The new adapter's name, rank and errors, in total and for each layer.
        """
        self.check_live()
        settings = {
            "combination_type": combination_type,
            "svd_rank": svd_rank,
            "svd_clamp": svd_clamp,
            "svd_full_matrices": svd_full_matrices,
            "svd_driver": svd_driver,
            "density": density,
            "majority_sign_method": majority_sign_method,
        }
        for what, given in (("adapters", adapters), ("weights", weights)):
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise AdapterError(f"{what} must be a list, one entry for each adapter, not {given!r:.60}")
        return combine_adapters(self.manager, list(adapters), list(weights), adapter_name, settings)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters into the base weights, in addition to those merged before; None for the active ones.

        Args:
            adapter_names: names of the adapters.
            safe_merge: raise an error if a merged weight would not be finite.
        """
        self.check_live()
        self.manager.merge(adapter_names, safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """Restores the base weights, bit for bit."""
        self.check_live()
        self.manager.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Merges permanently and returns the base model without wrappers.

        Args:
            progressbar: accepted for compatibility with PEFT and ignored; merging is too fast to need one.
            safe_merge: raise an error if a merged weight would not be finite.
            adapter_names: adapters to merge; None for the active ones.
        """
        self.check_live()
        return self.manager.unload(merge=True, names=adapter_names, safe=safe_merge)

    def unload(self) -> nn.Module:
        """Returns the original base model without wrappers."""
        self.check_live()
        return self.manager.unload(merge=False)

    def __getattr__(self, name: str) -> Any:
        if name in self._on_model:
            self.show_adapters()
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__.get("_modules", {}):
                raise
        try:
            return getattr(self.model, name)
        except AttributeError:
            if name.startswith("_"):
                raise
            manager = self.manager
            with manager.reading():
                shared = {owner: state for owner in manager.configs if (state := manager.shared(owner)) is not None}
            if (found := shared_by_name(shared, name)) is None:
                raise
        return found


def tuner_class(method: Method) -> type[BaseTuner]:
    """Returns the class of ``base_model`` if the first adapter is of this method, e.g. ``LoraModel``, ``IA3Model``."""
    name = _class_name(method)
    if name not in _classes:
        alike = [other for other in methods_of_type(method.peft_type) if other.config_class is method.config_class]
        functions = {name: function for other in alike for name, function in other.peft.model_functions.items()}
        layer = method.peft.layer.rpartition(".")[2]
        own: dict[str, Any] = {
            "prefix": method.prefix,
            "tuned_type": method.peft_type,
            "uses_shared_state": method.shares.state is not None and not issubclass(method.shares.state, Together),
            "target_module_mapping": default_targets_of(method.peft_type),
            "tuner_layer_cls": layer_type(method.peft_type, layer or name.replace("Model", "Layer")),
            "__doc__": f"``base_model`` of a handle whose first adapter is one of type {method.peft_type}.",
            "__module__": __name__,
            **{name: _model_function(function) for name, function in functions.items()},
            "_on_model": method.adapter_class.peft.on_model,
            **{name: _model_attribute(read) for other in alike for name, read in other.peft.model_attributes.items()},
        }
        _classes[name] = type(name, (BaseTuner,), own)
    return _classes[name]


def _model_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method of a tuner class that calls a function of an adapter method on the manager."""

    def call(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
        self.check_live()
        return function(self.manager, *args, **kwargs)

    call.__doc__ = function.__doc__
    return call


def _model_attribute(read: Callable[[Any], Any] | property) -> property:
    """Returns a property of a tuner class that reads an attribute defined by an adapter method."""
    return read if isinstance(read, property) else property(lambda self: read(self), doc=read.__doc__)


def _class_name(method: Method) -> str:
    return method.config_class.__name__.removesuffix("Config") + "Model"


_classes: dict[str, type[BaseTuner]] = {}


def __getattr__(name: str) -> Any:
    found = next((method for method in methods() if _class_name(method) == name), None)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return tuner_class(found)


def with_extra_loss(manager: AdapterManager, output: Any, kwargs: Mapping[str, Any]) -> Any:
    """Adds the extra loss of the adapters' methods to the output of a training call, if it has a loss.

    Args:
        manager: manager of the model.
        output: output of the base model, changed in place unless it is a tuple.
        kwargs: keyword arguments of the call.

    Returns:
        The output with the total loss.
    """
    in_tuple = isinstance(output, tuple) and any(kwargs.get(name) is not None for name in _LABELS)
    loss: Any = output[0] if in_tuple else getattr(output, "loss", None)
    if loss is None:
        return output
    labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    extra = extra_loss_of_call(manager, labels, items, shifts=not has_encoder(manager.model))
    if extra is None:
        return output
    total = loss + extra.to(loss.device)
    if in_tuple:
        return total, *output[1:]
    output.loss = total
    return output


def enable_input_grads_for_checkpointing(model: nn.Module, change: Transaction) -> None:
    """Makes the embeddings' output require gradients if gradient checkpointing is on.

    Reentrant checkpointing computes no gradient if no input requires one, as with frozen embeddings.

    Args:
        model: the base model.
        change: transaction that records the hooks added to the embeddings.
    """
    enable = getattr(model, "enable_input_require_grads", None)
    if callable(enable) and checkpoints_gradients(model):
        embeddings = embedding_of(model)
        if embeddings is not None:
            change.keep(embeddings._forward_hooks)
        change.keep(model.__dict__)
        enable()


def remove_adapters(manager: AdapterManager, names: str | Sequence[str]) -> None:
    """Removes one adapter or several, all or none; warns if another adapter was activated in their place.

    If one of them was active, those that are active now are trainable.

    Args:
        manager: manager of the model.
        names: one name or several.

    Raises:
        UnknownAdapterError: one of them does not exist.
    """
    names = names_in(names)
    with manager.transaction():
        for name in names:
            if name not in manager.configs:  # PEFT's wording, which its users search for
                have = ", ".join(map(repr, manager.configs)) or "none"
                raise UnknownAdapterError(
                    f"Adapter {name} does not exist; the model has: {have}." + did_you_mean(str(name), manager.configs)
                )
        active = manager.active
        for name in names:
            manager.remove(name)
        left = manager.active
        if left and {*active} & {*names}:
            manager.activate(left, trainable=True)  # as in PEFT, even if they were loaded for inference
    if active and left and not {*active} & {*left}:
        gone = " and ".join(map(repr, active))
        warnings.warn(f"the active adapter {gone} was deleted: {left[0]!r} is active now", stacklevel=3)


def warn_of_trained_biases(manager: AdapterManager) -> None:
    """Warns if the model still differs from the base model with adapters disabled, because biases were trained."""
    if not manager.biases.are_trained:
        return
    with manager.reading():
        configs = {name: manager.configs[name] for name in manager.active}
    for name, config in configs.items():
        kind = getattr(config, "bias", "none")
        if kind != "none":
            warnings.warn(
                f"adapter {name!r} trained the base model's biases (bias={kind!r}), which stay changed while it is "
                "disabled: the output is not that of the original base model",
                stacklevel=3,
            )
