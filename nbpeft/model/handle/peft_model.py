"""PeftModel: the wrapper of a base model with adapters."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, Self

import torch
from torch import nn

from nbpeft._util.push_to_hub import PushesToHub
from nbpeft.engine.calls.prompt_twins import twin_without_prompts
from nbpeft.engine.changes.called_modules import is_plain
from nbpeft.engine.contract.adapter import TASK_HEADS, AdapterConfig, TaskType
from nbpeft.engine.contract.registry import method_of
from nbpeft.engine.injection.injection_plan import InjectionPlan
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.runtime.method_hooks import generation_arguments, learns_with_hooks, prepares_calls, transforms_calls
from nbpeft.engine.runtime.scopes import AdapterContext
from nbpeft.engine.tree.model_tree import MANAGER, base_model_of, manager_of, parameter_counts, unwrapped
from nbpeft.errors import ConfigError, UnknownAdapterError, with_article
from nbpeft.model.handle.injection import put_active, replacing
from nbpeft.model.handle.prompts import ShowsPrompts, resize_token_embeddings
from nbpeft.model.handle.serving import OF_CALLS, of_the_model, serving
from nbpeft.model.handle.state_dicts import drop_values
from nbpeft.model.handle.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from nbpeft.model.handle.tuner import (
    BaseTuner,
    enable_input_grads_for_checkpointing,
    remove_adapters,
    tuner_class,
    warn_of_trained_biases,
    with_extra_loss,
)
from nbpeft.model.quantization.quantize import clear_gguf_flags
from nbpeft.model.saving import files, loading
from nbpeft.model.saving.sharded import is_sharded
from nbpeft.model.saving.user_configs import adopt_config, user_config
from nbpeft.peft_layers.classes import refuse_pickle_of_peft

_SPECIAL = "special_peft_forward_args"
_loaded: ContextVar[AdapterManager | None] = ContextVar("_loaded", default=None)
"""The manager whose adapters a new PeftModel takes over, instead of adding one."""


class PeftModel(ShowsPrompts, PushesToHub):
    """A base model with adapters. Names and signatures are those of PEFT 0.21.

    The base model is changed in place and belongs to one PeftModel. Creating a second one on the same base invalidates
    the first, whose calls then raise an error, so that they do not share state silently. Exception: several PeftModels
    with only learned prompts can use the same base. Attributes that the PeftModel lacks are looked up on the base
    model.

    Args:
        model: the base model.
        peft_config: config of the first adapter.
        adapter_name: name of the first adapter.
        autocast_adapter_dtype: use float32 for the adapter on a half-precision base.
        low_cpu_mem_usage: leave the adapter's parameters on the meta device until they are loaded.
    """

    base_model: Any
    """A ``BaseTuner``, or the base model itself if the first adapter is a learned prompt."""
    _tuner: BaseTuner
    special_peft_forward_args: set[str]
    """Keyword arguments of calls that are not passed to the base model; names can be added."""
    task: ClassVar[TaskType | None] = None
    _hf_peft_config_loaded = True
    _by_task: ClassVar[dict[TaskType, type[PeftModel]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "task" in cls.__dict__ and cls.task is not None:
            PeftModel._by_task.setdefault(cls.task, cls)

    @staticmethod
    def for_task(config: AdapterConfig) -> type[PeftModel]:
        """Returns the subclass of PeftModel for a config's task."""
        return PeftModel if config.task_type is None else PeftModel._by_task[TaskType(config.task_type)]

    def __init__(
        self,
        model: nn.Module,
        peft_config: AdapterConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        if (loaded := _loaded.get()) is not None:
            _loaded.set(None)  # a subclass may make others
            with loaded.transaction(during_calls=True, quiet=True):
                AdapterManager.attach(model, loaded)
                self._take(model, loaded)
            return
        model = _base_for(model, peft_config)
        manager = manager_of(model) or AdapterManager(model)
        config, half = self.completed(peft_config, model), not autocast_adapter_dtype
        self._start(manager, config, peft_config, adapter_name, half=half, empty=low_cpu_mem_usage)

    def _start(
        self,
        manager: AdapterManager,
        wanted: AdapterConfig | InjectionPlan,
        given: AdapterConfig,
        name: str,
        *,
        half: bool = False,
        empty: bool = False,
    ) -> None:
        """Adds an adapter to the base model, and becomes its PeftModel."""
        config = wanted.config if isinstance(wanted, InjectionPlan) else wanted
        options: dict[str, Any] = {"trainable": not config.inference_mode, "replace": name in manager.configs}
        put = manager.prepare(name, wanted, half=half, training=True, draws=not empty, **options)
        with manager.transaction() as change:
            put_active(manager, put, name, empty=empty)
            adopt_config(manager, name, given, change)
            self._take(manager.model, manager)
            self.training = self._tuner.training = True  # like the new adapter, in whichever mode the base model is

    def _take(self, model: nn.Module, manager: AdapterManager) -> None:
        """Becomes the only PeftModel of a base model."""
        with manager.transaction(during_calls=True, quiet=True) as change:
            change.keep_attributes(manager, "owner")
            first = next(iter(manager.configs.values()), None)  # None if an AdapterPool owns all adapters
            tuner = (BaseTuner if first is None else tuner_class(method_of(first))).over(model, manager)
            self.__dict__.update({MANAGER: manager, "_tuner": tuner, _SPECIAL: {*OF_CALLS}})
            self.base_model = tuner
            self._list_prompts(change)
            if self._lists_prompts:
                self.base_model = model
            self.training = model.training
            clear_gguf_flags(model, change)
            enable_input_grads_for_checkpointing(model, change)

    @classmethod
    def over(cls, model: nn.Module, manager: AdapterManager) -> Self:
        """Creates a PeftModel for a model whose manager already has adapters.

        Args:
            model: the base model.
            manager: its manager.
        """
        token = _loaded.set(manager)
        try:
            # A class of a script may have its own __init__; a manager of a pool has no config.
            return cls(model, next(iter(manager.configs.values()), None))  # type: ignore[arg-type]
        finally:
            _loaded.reset(token)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if MANAGER not in state:
            refuse_pickle_of_peft(self, state)
        super().__setstate__({_SPECIAL: {*OF_CALLS}, **state})
        self._update_prompts()  # before the copy's embedding may be replaced

    @classmethod
    def completed(cls, config: AdapterConfig, model: nn.Module) -> AdapterConfig:
        """Returns a config as it is used on a base model: with the additions of the task, and the base's name.

        Args:
            config: the config.
            model: the base model.

        Raises:
            ConfigError: it is not the config of an adapter.
        """
        if not isinstance(config, AdapterConfig):
            raise ConfigError(f"an adapter needs a config such as LoraConfig, not {with_article(config)}")
        return files.with_base_name(cls._complete(user_config(config)), model)

    @classmethod
    def _complete(cls, config: AdapterConfig) -> AdapterConfig:
        """Returns the config with the additions of the task; here there are none."""
        return config

    def _check_live(self) -> None:
        self._tuner.check_live()

    @property
    def is_live(self) -> bool:
        """Whether the adapters are on the model and no other PeftModel owns it."""
        return self._tuner.is_live

    # Properties

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """Adapter name -> config; a dictionary with the same names can be assigned."""
        return self.manager.configs

    @peft_config.setter
    def peft_config(self, configs: Mapping[str, AdapterConfig]) -> None:
        self._tuner.peft_config = configs

    @property
    def peft_type(self) -> Any:
        """Type of the first adapter, such as ``PeftType.LORA``."""
        return next(iter(self.manager.configs.values())).peft_type

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter, or a list if several are active."""
        active = self.manager.active
        return active[0] if len(active) == 1 else list(active)

    @active_adapter.setter
    def active_adapter(self, name: str | list[str]) -> None:
        names = [name] if isinstance(name, str) else name
        if self._lists_prompts:
            self.set_adapter(names)
        elif not {*(names or ())} <= {*self.manager.active}:  # in PEFT, too, this does not switch any layer
            warnings.warn(
                f"active_adapter = {name!r} switches no layer: call set_adapter(…) or disable_adapter()", stacklevel=2
            )

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self.manager.active)

    @property
    def active_peft_config(self) -> AdapterConfig:
        """Config of the first active adapter.

        Raises:
            UnknownAdapterError: none is active.
        """
        with self.manager.reading():
            if not self.manager.active:
                raise UnknownAdapterError("no adapter is active, so there is no active config")
            return self.manager.configs[self.manager.active[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active and enabled."""
        return bool(self.manager.active) and self.manager.enabled

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train as a whole (``modules_to_save``)."""
        names = {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        }
        return names or None

    @property
    def base_model_torch_dtype(self) -> Any:
        """The dtype of the base model."""
        return getattr(self.get_base_model(), "dtype", None)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resizes the embeddings of the base model; the arguments are those of its method.

        Returns:
            The input embedding.

        Raises:
            AdapterError: an adapter on the embeddings has tensors of the size of the vocabulary.
        """
        self._check_live()
        return resize_token_embeddings(self.manager, *args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """Returns the base model, including the wrapped layers."""
        tuner = self.base_model
        return tuner.model if isinstance(tuner, BaseTuner) else tuner

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Returns the numbers of trainable and of all parameters; packed 4-bit weights count as unpacked."""
        return parameter_counts(self)

    def print_trainable_parameters(self) -> None:
        """Prints the number of trainable and of all parameters, and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Returns one record for each adapted layer."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Returns one record for the whole model."""
        return get_model_status(self)

    # Forward and generation

    @property
    def generation_config(self) -> Any:
        """The base model's settings of ``generate``; can be replaced."""
        return self.get_base_model().generation_config

    @generation_config.setter
    def generation_config(self, settings: Any) -> None:
        self.get_base_model().generation_config = settings

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the base model's forward with the active adapters.

        Args:
            *args: passed to the base model.
            **kwargs: passed to the base model, except ``adapter_names``: the adapter for each row of the batch, or
                ``"__base__"`` for none; only in evaluation mode. (It is not a named parameter, because tracers would
                pass its default by position.)
        """
        adapter_names: Sequence[str] | None = kwargs.pop("adapter_names", None)
        if self.__dict__.get("_is_replica"):  # of nn.DataParallel, whose call on the original has already prepared
            return self.get_base_model()(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self._forward_compiled(adapter_names, *args, **kwargs)
        return self._forward_pinned(adapter_names, *args, **kwargs)

    def _forward_compiled(self, adapter_names: Sequence[str] | None, *args: Any, **kwargs: Any) -> Any:
        if adapter_names is None and not self._transforms_calls(self.manager.active_state.traced.names, self.training):
            return self.get_base_model()(*args, **kwargs)
        # Rows are assigned in each call, and compiled code would not see that the assignment changed. Nor would it
        # run the method's preparation of each call or add its extra loss. So such calls are not compiled.
        alone: Any = torch.compiler.disable(self._forward_pinned)
        return alone(adapter_names, *args, **kwargs)

    def _transforms_calls(self, names: tuple[str, ...], training: bool) -> bool:
        """Returns whether an active adapter's method does something in each call besides its layers' computation."""
        configs = [config for name in names if (config := self.manager.configs.get(name)) is not None]
        return any(
            prepares_calls(config) or transforms_calls(config) or (training and learns_with_hooks(config))
            for config in configs
        )

    # torch.compile treats the result as a constant, with guards on the arguments. The public
    # torch.compiler.assume_constant_result is not used, because it would import the compiler with this module.
    _transforms_calls._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _forward_pinned(self, adapter_names: Sequence[str] | None, *args: Any, **kwargs: Any) -> Any:
        self._check_live()
        with (
            self._prompts_put_in(kwargs.get("task_ids")),
            self.manager.active_state.hold(),
            serving(self.manager, adapter_names, args, kwargs, training=self.training),
        ):
            kwargs = of_the_model(self.manager, kwargs, self.special_peft_forward_args)
            tuner = self.base_model
            if isinstance(tuner, BaseTuner) and not is_plain(tuner):  # its own hooks, or a replaced ``forward``
                return tuner(*args, **kwargs)
            output = self.get_base_model()(*args, **kwargs)
            return with_extra_loss(self.manager, output, kwargs) if self.training else output

    def train(self, mode: bool = True) -> Self:
        """Sets training or evaluation mode; ignored from other threads while a training runs in the background."""
        gate = self.manager.active_state.gate
        return self if gate is not None and not gate.is_mine else super().train(mode)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Runs the base model's ``generate``; activations during the call take effect in the next one.

        Args:
            *args: passed to the base model.
            adapter_names: the adapter for each row of the batch, or ``"__base__"`` for none; None for the active ones.
            **kwargs: passed to the base model.
        """
        self._check_live()
        with (
            self._prompts_put_in(kwargs.get("task_ids")),
            self.manager.active_state.hold(),
            serving(self.manager, adapter_names, args, kwargs, training=self.training),
        ):
            own = of_the_model(self.manager, kwargs, self.special_peft_forward_args)
            kwargs = {**generation_arguments(self.manager), **own}
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    # Managing adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: AdapterConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds another adapter to the model without activating it.

        Args:
            adapter_name: name of the adapter.
            peft_config: config of the adapter.
            low_cpu_mem_usage: leave the parameters on the meta device until they are loaded.
            autocast_adapter_dtype: use float32 for the adapter on a half-precision base.
        """
        self._check_live()
        config = self.completed(peft_config, self.get_base_model())
        with self.manager.transaction() as change:
            modes: dict[str, Any] = {"trainable": not config.inference_mode, "training": True}
            modes |= {"half": not autocast_adapter_dtype, "draws": not low_cpu_mem_usage}
            self.manager.prepare(adapter_name, config, **modes)()
            adopt_config(self.manager, adapter_name, peft_config, change)
            if low_cpu_mem_usage:
                drop_values(self.manager, adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activates one adapter or several, and makes them trainable or, with ``inference_mode``, frozen."""
        self._tuner.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Sets ``requires_grad`` of the parameters of adapters, active or not."""
        self._tuner.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Removes one adapter or several, all or none; if no active adapter is left, the oldest is activated."""
        self._check_live()
        remove_adapters(self.manager, adapter_name)
        self._update_prompts()

    def disable_adapter(self) -> AdapterContext:
        """Context manager: disables all adapters inside the block, and restores the previous state afterwards.

        Only the thread or asyncio task that runs the block is affected. Code compiled by ``torch.compile`` cannot
        distinguish threads: there the most recently entered block applies to all threads.
        """
        self._check_live()
        warn_of_trained_biases(self.manager)
        return self.manager.disabled()

    def use(self, adapter_names: str | Sequence[str]) -> AdapterContext:
        """Context manager: activates other adapters inside the block, with the scope of ``disable_adapter``."""
        self._check_live()
        return self.manager.use(adapter_names)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters into the base weights; None for the active ones. ``safe_merge`` checks for NaN and inf."""
        self._tuner.merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Restores the base weights, bit for bit."""
        self._tuner.unmerge_adapter()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Merges permanently and returns the base model without wrappers; this PeftModel is unusable afterwards.

        Args:
            progressbar: show a progress bar.
            safe_merge: raise an error if a merged weight would not be finite.
            adapter_names: adapters to merge; None for the active ones.
        """
        return self._tuner.merge_and_unload(progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """Returns the original base model without wrappers; this PeftModel is unusable afterwards."""
        return self._tuner.unload()

    # Saving and loading

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Loads a saved adapter onto a base model.

        Args:
            model: the base model, changed in place.
            model_id: a folder or a hub id.
            adapter_name: name to give the adapter. An existing adapter with this name is replaced, with a warning.
            is_trainable: whether to make the adapter trainable; otherwise it is frozen.
            config: used instead of the saved config.
            autocast_adapter_dtype: use float32 for the adapter on a half-precision base.
            ephemeral_gpu_offload: accepted for compatibility with PEFT and ignored.
            low_cpu_mem_usage: accepted for compatibility with PEFT; loading never initializes first.
            key_mapping: regular expression -> replacement, applied to the keys of the file.
            **kwargs: ``subfolder``, ``revision``, ``cache_dir``, ``token``, ``torch_device``, …

        Returns:
            The PeftModel, of the class for the config's task; without a task of this class.

        Raises:
            CheckpointError: the checkpoint cannot be read or does not fit.
        """
        model = _base_for(model, config or loading.saved_config(model, model_id, kwargs))
        manager = manager_of(model) or AdapterManager(model)
        put = loading.read(
            manager,
            model_id,
            adapter_name,
            trainable=is_trainable,
            half=not autocast_adapter_dtype,
            config=config,
            key_mapping=key_mapping,
            options=kwargs,
        )
        # transformers or another PeftModel may already have loaded an adapter with this name on the base.
        with replacing(manager, adapter_name, "the loaded one"), manager.transaction() as change:
            put()
            if manager.active != (adapter_name,):
                manager.activate(adapter_name)
            config = manager.configs[adapter_name]
            handle = (cls if config.task_type is None else PeftModel.for_task(config)).over(model, manager)
            change.keep_modes(handle)
            if is_trainable:
                handle.training = handle._tuner.training = True
            else:
                handle.eval()
        return handle

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> loading.LoadResult:
        """Loads a saved adapter in addition to the existing ones, without activating it.

        An existing adapter with the same name is replaced, both weights and config. The arguments are those of
        ``from_pretrained``; ``torch_device`` is the device to load the tensors to.

        Returns:
            The missing and unexpected keys.
        """
        options = {"autocast_adapter_dtype": autocast_adapter_dtype, "key_mapping": key_mapping, **kwargs}
        options["low_cpu_mem_usage"] = low_cpu_mem_usage
        return self.prepare_load(model_id, adapter_name, is_trainable, torch_device, **options)()

    def prepare_load(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Callable[[], loading.LoadResult]:
        """Reads a saved adapter and checks that it fits; the arguments are those of ``load_adapter``.

        Returns:
            A function that adds the adapter to the model.
        """
        self._check_live()
        put = loading.read(
            self.manager,
            model_id,
            adapter_name,
            trainable=is_trainable,
            half=not autocast_adapter_dtype,
            key_mapping=key_mapping,
            options={"torch_device": torch_device, **kwargs},
        )

        def load() -> loading.LoadResult:
            with self.manager.transaction() as change:
                result = put()
                if is_trainable:
                    self.manager.set_requires_grad(adapter_name, True)
                else:
                    change.keep_modes(self)
                    self.eval()
            return result

        return load

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves adapters: ``default`` into the folder itself, each other one into a subfolder with its name.

        Args:
            save_directory: folder, created if it does not exist.
            safe_serialization: write safetensors; False writes PEFT's former ``adapter_model.bin``, a pickle.
            selected_adapters: names of the adapters to save; None for all.
            save_embedding_layers: also save the embeddings; "auto" does so if an adapter targets them or the vocabulary
                was resized.
            is_main_process: False writes nothing. If the model is sharded and there is no ``state_dict``, all processes
                call this, because the shards are gathered from all.
            path_initial_model_for_weight_conversion: save adapters whose init changed the base weights (OLoRA, PiSSA)
                as plain LoRA of twice the rank, for the original base. Each adapter stores its initial weights. For an
                adapter that was loaded on a base without them, this folder with the initial adapter is read.
            state_dict: take the tensors from this dictionary, e.g. gathered from a sharded model; None for those of
                the model, or of a ``state_dict()`` method that was set on it.
            **kwargs: accepted for compatibility with PEFT and ignored.

        Raises:
            CheckpointError: the folder cannot be written; existing files are unchanged.
        """
        self._check_live()
        if not is_main_process and (state_dict is not None or not is_sharded(self)):
            return
        files.warn_of_saved_embeddings(self.manager, selected_adapters, save_embedding_layers)
        files.save(
            self.manager,
            save_directory,
            names=selected_adapters,
            embeddings=save_embedding_layers,
            state_dict=files.replaced_state_dict(self, self.manager) if state_dict is None else state_dict,
            initial=path_initial_model_for_weight_conversion,
            pickled=not safe_serialization,
            write=is_main_process,
        )

    def _push(self, repo_id: str, *, tags: Sequence[str], **options: Any) -> str:
        self._check_live()
        return files.push(self.manager, repo_id, tags=tags, **options)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Writes or updates the README of a saved adapter."""
        self._check_live()
        files.write_card(self.manager, output_dir)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_model" not in self.__dict__.get("_modules", {}):
                raise
        name = _OTHER_NAMES.get(name, name)
        with contextlib.suppress(AttributeError):
            return getattr(self.base_model, name)
        return getattr(self._tuner, name)


_OTHER_NAMES = {"base_model_prepare_inputs_for_generation": "prepare_inputs_for_generation"}
"""Attribute of PEFT's PeftModel -> that of the base model with its value."""


def handle_of_plan(manager: AdapterManager, plan: InjectionPlan, given: AdapterConfig, adapter_name: str) -> PeftModel:
    """Adds a planned adapter to a base model and returns the PeftModel, like ``get_peft_model`` for a config.

    Args:
        manager: manager of the base model, which may not be attached yet.
        plan: the manager's plan of the completed config.
        given: the user's config.
        adapter_name: name of the adapter.
    """
    kind = PeftModel.for_task(given)
    handle = kind.__new__(kind)
    nn.Module.__init__(handle)
    handle._start(manager, plan, given, adapter_name)
    return handle


def _base_for(model: nn.Module, config: object) -> nn.Module:
    """Returns the base model of a new PeftModel: a copy sharing weights for a prompt on a base that is in use."""
    base = base_model_of(model)
    manager = manager_of(model)
    taken = manager is not None and manager.alive and manager.owner is not None and base is unwrapped(model)
    if not (taken and isinstance(config, AdapterConfig) and config.learns_prompt) or config.task_type in TASK_HEADS:
        return base
    return twin_without_prompts(base) or base
