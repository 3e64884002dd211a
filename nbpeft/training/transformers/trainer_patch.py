"""The one place where nbpeft changes other libraries: they accept its models and configs like PEFT's.

transformers, accelerate and TRL recognize models with adapters by their class, one of the
``peft`` package. For any other class a Trainer writes full state dicts as checkpoints (and fails
if weights are tied), refuses quantized bases and drops columns that it considers unused; TRL
uses the wrong module as the backbone. :func:`patch_trainer` makes these changes, until :func:`unpatch_trainer`:

* ``accelerate.utils.is_peft_model`` and transformers' ``_is_peft_model`` return True for models of nbpeft. The
  functions stay the same objects and get new code, because other modules import them by name: so it
  does not matter whether they were imported before or after.
* Some methods of ``transformers.Trainer`` itself behave differently for a model of nbpeft (see
  :data:`REPLACEMENTS`). They are methods of the base class: a derived Trainer's overrides stay in effect, and
  its ``super()`` reaches the replacement. The model is checked at each call, so ``model_init``
  and hyperparameter search work as well.
* In modules of TRL that derive a Trainer, the names of PEFT's classes used in ``isinstance`` checks, and
  ``get_peft_model``, include nbpeft's: an adapted output head is refused there like one of PEFT's, and
  ``peft_config=nbpeft.LoraConfig(...)`` is accepted. If PEFT is not installed, they are nbpeft's only.
  Methods that import from PEFT when they are called import from nbpeft if the model belongs to nbpeft.
* ``add_adapter`` and the other adapter methods of transformers' models accept nbpeft's configs;
  the error of those of diffusers says what to do (:mod:`nbpeft.training.transformers.adapter_mixins`).

The behaviour for all other models does not change. Importing nbpeft changes nothing: the package root
registers :func:`patch_when_used` with :mod:`nbpeft._util.hooks`, which calls it when the first config or
adapted model is created. Importing ``transformers.trainer`` at that moment would cost users who only run
models about half a second; so if it is not imported yet, an :class:`ImportHook` waits for it.
A hook in the model instead would depend on which attributes the constructor of each Trainer happens to
read from it.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

from nbpeft._util.interrupts import DeferredInterrupts
from nbpeft.checkpoint import inside
from nbpeft.engine.contract.adapter import AdapterConfig, PeftType
from nbpeft.engine.runtime.adapter_tensors import is_half
from nbpeft.engine.tree.model_tree import unwrapped
from nbpeft.errors import BaseMismatchError, CheckpointError, CheckpointNotFoundError, ConfigError, did_you_mean
from nbpeft.model import LoraLayer, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from nbpeft.model.saving import loading
from nbpeft.names import DEFAULT_ADAPTER
from nbpeft.training.adapters.extra_loss import with_extra_loss
from nbpeft.training.adapters.method_state import (
    keeps_method_state,
    read_method_state,
    save_in_training,
    set_method_state,
)
from nbpeft.training.adapters.optimizer_steps import watch_steps
from nbpeft.training.disk.checkpoints import in_checkpoint, resume_point, save_tokenizer_and_arguments, save_whole
from nbpeft.training.disk.sharded_trainer import load_optimizer, prepare_base, save_model, save_optimizer
from nbpeft.training.monitor.record import score_of
from nbpeft.training.transformers.adapter_mixins import explaining, importing, is_adapted, methods_with_imports
from nbpeft.training.transformers.import_hook import ImportHook

_ACCELERATE, _FSDP, _TRANSFORMERS, _MODELS, _DIFFUSERS = (
    "accelerate.utils.modeling",
    "accelerate.utils.fsdp_utils",
    "transformers.trainer",
    "transformers.integrations.peft",
    "diffusers.loaders.peft",
)
_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_ABSENT = object()
_originals: dict[str, FunctionType] = {}
_undo: list[Callable[[], None]] = []
_patched_trl: set[str] = set()
_lock = threading.RLock()
_hook: ImportHook | None = None
_declined = False


def patch_trainer() -> None:
    """Makes transformers, accelerate and TRL accept models and configs of nbpeft like those of PEFT.

    Called when the first config or adapted model is created, unless ``unpatch_trainer`` was called before; a second
    call does nothing. :mod:`nbpeft.training.transformers.trainer_patch` lists the changes.
    """
    global _hook, _declined
    with DeferredInterrupts(), _lock:
        _declined = False
        if _hook is None:
            callbacks = {
                _ACCELERATE: _patch_accelerate,
                _FSDP: _patch_fsdp,
                _TRANSFORMERS: _patch_transformers,
                _MODELS: _patch_models,
                **({_DIFFUSERS: _patch_diffusers} if find_spec("diffusers") else {}),
            }
            _hook = ImportHook(callbacks)
        _hook.run_pending()


def unpatch_trainer() -> None:
    """Restores the original libraries, until ``patch_trainer`` or ``nbpeft.Trainer`` is called."""
    global _hook, _declined
    with DeferredInterrupts(), _lock:
        _declined = True
        if _hook is not None:
            _hook.remove()
            _hook = None
        while _undo:
            _undo.pop()()
        _originals.clear()
        _patched_trl.clear()


def patch_when_used() -> None:
    """Calls ``patch_trainer``, unless ``unpatch_trainer`` was called."""
    if not _declined:
        patch_trainer()


def is_ours(model: Any) -> bool:
    """Whether a model belongs to nbpeft, also if it is wrapped by ``torch.compile`` or for distributed training."""
    return isinstance(unwrapped(model), PeftModel)


def is_ours_or_peft(library: str, model: Any) -> bool:
    """Whether a model has adapters of nbpeft, or of PEFT according to the original function of a library."""
    return is_ours(model) or _originals[library](model)


# Replacements of a Trainer's methods for models of nbpeft. Each is called with the original method first.


def training_step(
    original: Callable[..., Any], trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any
) -> Any:
    """The Trainer's method, with the loss terms of adapter methods added.

    Calls ``count_batch(inputs)`` of callbacks that have it before the step, and ``after_batch(loss)`` of the Trainer
    and of callbacks after it.
    """
    for callback in trainer.callback_handler.callbacks:
        count_batch = getattr(callback, "count_batch", None)
        if count_batch is not None:
            count_batch(inputs)
    with with_extra_loss(trainer, args[0] if args else kwargs.get("num_items_in_batch")):
        loss = original(trainer, model, inputs, *args, **kwargs)
    for listener in (trainer, *trainer.callback_handler.callbacks):
        after_batch = getattr(listener, "after_batch", None)
        if after_batch is not None:
            after_batch(loss)
    return loss


def save(
    original: Callable[..., Any],
    trainer: Any,
    output_dir: str | None = None,
    state_dict: dict[str, Any] | None = None,
) -> None:
    """Saves only the adapters, with the tokenizer and the arguments; a checkpoint includes all trainable tensors."""
    if not trainer.args.should_save:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    folder = Path(output_dir if output_dir is not None else trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    accepted = inspect.signature(model.save_pretrained).parameters
    gathered = {"state_dict": state_dict} if state_dict is not None and "state_dict" in accepted else {}
    if in_checkpoint(trainer) and keeps_method_state(model):
        save_in_training(model.manager, folder, **gathered)
    else:
        model.save_pretrained(str(folder), **gathered)
    save_tokenizer_and_arguments(folder, trainer)


def save_checkpoint(original: Callable[..., Any], trainer: Any, model: Any, trial: Any, **kwargs: Any) -> None:
    """The Trainer's method, made atomic: a checkpoint is written completely or not at all."""
    save_whole(trainer, trial, functools.partial(original, trainer, model, trial, **kwargs))


def train(
    original: Callable[..., Any], trainer: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """The Trainer's method; ``resume_from_checkpoint=True`` skips incomplete checkpoints."""
    return original(trainer, resume_point(trainer, resume_from_checkpoint), *args, **kwargs)


def log_save_evaluate(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> None:
    """The Trainer's method; afterwards calls ``after_step()`` of callbacks that have it, to write checkpoints."""
    original(trainer, *args, **kwargs)
    for callback in trainer.callback_handler.callbacks:
        after_step = getattr(callback, "after_step", None)
        if after_step is not None:
            after_step()


def training_loop(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """The Trainer's method, with the step hooks of adapter methods, inside ``recomputing()`` of Trainers with it."""
    prepare_base(trainer)
    if not trainer.is_deepspeed_enabled:
        trainer.accelerator.gradient_accumulation_steps = 1  # transformers 5.3 to 5.5 divide losses twice
    end = watch_steps(trainer.model, lambda: int(trainer.state.global_step))
    try:
        with getattr(trainer, "recomputing", nullcontext)():
            return original(trainer, *args, **kwargs)
    finally:
        end()


def load_from_checkpoint(
    original: Callable[..., Any], trainer: Any, resume_from_checkpoint: str, model: Any = None
) -> None:
    """Loads the adapters of a checkpoint into those of the model."""
    load_adapters(trainer.model if model is None else model, Path(resume_from_checkpoint))


def determine_best_metric(
    original: Callable[..., Any], trainer: Any, metrics: dict[str, float], *args: Any, **kwargs: Any
) -> bool:
    """The Trainer's method; an evaluation with NaN or infinity is never the best, nor one without the metric.

    Scores are measured at steps of their own, and some rows have no value of an objective's metric.
    """
    score = score_of(trainer.args, metrics)
    name = str(trainer.args.metric_for_best_model).removeprefix("eval_")
    of_objective = getattr(getattr(trainer, "objective", None), "metrics", ())
    if score is None and name in (*getattr(trainer, "scored_metrics", ()), *of_objective):
        return False
    if score is not None and not math.isfinite(score):
        return False
    try:
        return bool(original(trainer, metrics, *args, **kwargs))
    except KeyError:
        known = [key.removeprefix("eval_") for key in metrics if key.startswith("eval_")]
        known = [key for key in known if not key.endswith(("runtime", "_per_second"))]
        raise ConfigError(
            f"metric_for_best_model={name!r} is not measured: the evaluations have {', '.join(known)}."
            f"{did_you_mean(name, known)}",
            field="metric_for_best_model",
        ) from None


def load_best_model(original: Callable[..., Any], trainer: Any) -> None:
    """Loads the adapters of the best checkpoint into those of the model."""
    folder = Path(trainer.state.best_model_checkpoint)
    load_adapters(trainer.model, folder)
    read_method_state(trainer.model, folder)


REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "training_step": training_step,
    "train": train,
    "_inner_training_loop": training_loop,
    "_maybe_log_save_evaluate": log_save_evaluate,
    "_save": save,
    "_save_checkpoint": save_checkpoint,
    "_load_from_checkpoint": load_from_checkpoint,
    "_load_best_model": load_best_model,
    "_determine_best_metric": determine_best_metric,
    "save_model": save_model,
    "_save_optimizer_and_scheduler": save_optimizer,
    "_load_optimizer_and_scheduler": load_optimizer,
}
"""Name of a method of ``transformers.Trainer`` -> its replacement for models of nbpeft."""


def load_adapters(model: Any, folder: Path) -> None:
    """Copies the weights of all adapters in a checkpoint folder into a model, in place.

    The active and the trainable adapters do not change, and an optimizer's references to their parameters stay
    valid.

    Raises:
        CheckpointNotFoundError: the folder contains none of the model's adapters.
        CheckpointError: an adapter in it does not fit the one in the model.
    """
    names = tuple(model.peft_config)
    sources = {name: source for name in names if (source := _source(folder, name, names)) is not None}
    if not sources:
        raise CheckpointNotFoundError(
            f"{folder} contains none of the model's adapters ({', '.join(map(repr, names))}): expected "
            f"{_WEIGHT_FILES[0]} in it, or in a subfolder named like the adapter.",
            folder=str(folder),
        )
    weights = {name: load_peft_weights(source, device="cpu") for name, source in sources.items()}
    with model.manager.transaction():
        set_method_state(model, {})
        for name, source in sources.items():
            result = _written(model, source, weights[name], name)
            if result.missing_keys:
                raise CheckpointError(
                    f"{source} lacks {len(result.missing_keys)} tensors of adapter {name!r}, "
                    f"{result.missing_keys[0]} among them: was its config changed since?",
                    missing=result.missing_keys,
                )


def _written(model: Any, source: Path, weights: Any, name: str) -> Any:
    """Writes weights into an adapter; if ranks were pruned, replaces it by an adapter of the saved shape."""
    try:
        return set_peft_model_state_dict(model, weights, name)
    except BaseMismatchError:
        if not keeps_method_state(model):
            raise
        half = is_half(model.manager.layers, name)
        return loading.read(model.manager, source, name, trainable=True, half=half, options={})()


def _source(folder: Path, name: str, names: tuple[str, ...]) -> Path | None:
    places = [folder if name == DEFAULT_ADAPTER else folder / name]
    if len(names) == 1:
        places.append(folder)
    return next((place for place in places if any(inside.leads_to_file(place / file) for file in _WEIGHT_FILES)), None)


# Patching the libraries. The code of the first four functions is assigned to functions of the libraries, and so runs
# with the globals of those modules: they import what they need. The function objects must stay the same: in
# ``model.add_adapter(LoraConfig())`` Python looks up the method before the config is created and triggers the patch.


def _accelerate_is_peft_model(model: Any) -> bool:
    from nbpeft.training.transformers.trainer_patch import is_ours_or_peft

    return is_ours_or_peft("accelerate.utils.modeling", model)


def _transformers_is_peft_model(model: Any) -> bool:
    from nbpeft.training.transformers.trainer_patch import is_ours_or_peft

    return is_ours_or_peft("transformers.trainer", model)


def _transformers_add_adapter(*args: Any, **kwargs: Any) -> Any:
    from nbpeft.training.transformers.trainer_patch import add_to_transformers

    return add_to_transformers(*args, **kwargs)


def _diffusers_add_adapter(*args: Any, **kwargs: Any) -> Any:
    from nbpeft.training.transformers.trainer_patch import add_to_diffusers

    return add_to_diffusers(*args, **kwargs)


def add_to_transformers(*args: Any, **kwargs: Any) -> Any:
    """``add_adapter`` of a model of transformers."""
    return importing(_originals[_MODELS], is_adapted)(*args, **kwargs)


def add_to_diffusers(*args: Any, **kwargs: Any) -> Any:
    """``add_adapter`` of a model of diffusers."""
    return explaining(_originals[_DIFFUSERS])(*args, **kwargs)


def _patch_accelerate(module: ModuleType) -> None:
    _replace_code(_ACCELERATE, module.is_peft_model, _accelerate_is_peft_model)


def _patch_fsdp(module: ModuleType) -> None:
    """Keeps accelerate from calling PEFT's functions for sharded state dicts, which support only PEFT's own models."""
    _replace(module, "is_peft_model", _originals[_ACCELERATE])


def _patch_transformers(module: ModuleType) -> None:
    _replace_code(_TRANSFORMERS, module._is_peft_model, _transformers_is_peft_model)
    # It is now called for nbpeft's models, but needs PEFT.
    if find_spec("peft") is None and hasattr(module, "update_fsdp_plugin_peft"):
        _replace(module, "update_fsdp_plugin_peft", lambda model, accelerator: None)
    trainer_class = module.Trainer
    for name, replacement in REPLACEMENTS.items():
        _replace(trainer_class, name, _WhereOurs(trainer_class.__dict__[name], replacement))
    _replace(trainer_class, "__init_subclass__", classmethod(_init_subclass))
    for derived in _subclasses(trainer_class):
        _patch_trl(derived)


def _patch_models(module: ModuleType) -> None:
    mixin = module.PeftAdapterMixin
    _replace_code(_MODELS, mixin.add_adapter, _transformers_add_adapter)
    for name, method in methods_with_imports(mixin, is_adapted).items():
        _replace(mixin, name, method)


def _patch_diffusers(module: ModuleType) -> None:
    _replace_code(_DIFFUSERS, module.PeftAdapterMixin.add_adapter, _diffusers_add_adapter)


def _replace_code(library: str, function: Any, replacement: Any) -> None:
    code = function.__code__
    original = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    original.__kwdefaults__, original.__annotations__ = function.__kwdefaults__, function.__annotations__
    _originals[library] = function.__wrapped__ = original
    function.__code__ = replacement.__code__

    def undo() -> None:
        function.__code__ = code
        del function.__wrapped__

    _undo.append(undo)


def _replace(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute; ``unpatch_trainer`` restores it, unless it was set again since."""
    previous = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)

    def undo() -> None:
        if vars(owner).get(name) is not value:
            return
        delattr(owner, name) if previous is _ABSENT else setattr(owner, name, previous)

    _undo.append(undo)


class _WhereOurs:
    """A method of a class that Trainers of models of nbpeft replace.

    Looking the method up chooses it, so that a traceback through a training has no frame for the choice.
    """

    def __init__(self, original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._original = original
        self._replacement: Any = functools.update_wrapper(functools.partial(replacement, original), original)

    def __get__(self, trainer: Any, owner: Any = None) -> Callable[..., Any]:
        if trainer is None:
            return self
        ours = _hook is not None and is_ours(getattr(trainer, "model", None))
        return MethodType(self._replacement if ours else self._original, trainer)

    def __call__(self, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        """The method of a Trainer, for those who call it by the class."""
        return self.__get__(trainer)(*args, **kwargs)


# Patching TRL


def _subclasses(trainer_class: type) -> list[type]:
    direct: list[type] = trainer_class.__subclasses__()
    return direct + [further for derived in direct for further in _subclasses(derived)]


def _init_subclass(cls: type, /, **kwargs: Any) -> None:
    super(sys.modules[_TRANSFORMERS].Trainer, cls).__init_subclass__(**kwargs)
    with DeferredInterrupts(), _lock:
        _patch_trl(cls)


def _patch_trl(derived: type) -> None:
    """Makes the module of a TRL Trainer recognize nbpeft's classes where it checks for PEFT's."""
    name = derived.__module__
    names = vars(sys.modules[name]) if name.startswith("trl.") and name in sys.modules else {}
    for own, method in methods_with_imports(derived, _has_ours).items() if names else ():
        _replace(derived, own, method)
    if "is_peft_model" not in names or name in _patched_trl:
        return
    _patched_trl.add(name)
    module = sys.modules[name]
    if find_spec("peft") is None:
        for missing, value in _INSTEAD_OF_PEFT.items():
            _replace(module, missing, value)
        if "use_adapter" in names:
            _replace(sys.modules[names["use_adapter"].__module__], "is_peft_available", _yes)
        return
    for theirs, ours in (("BaseTunerLayer", LoraLayer), ("PeftConfig", AdapterConfig)):
        if theirs in names:
            _replace(module, theirs, (names[theirs], ours))
    if "get_peft_model" in names:
        _replace(module, "get_peft_model", _by_config(names["get_peft_model"]))


def _has_ours(value: Any) -> bool:
    return is_ours(value) or is_ours(getattr(value, "model", None))


def _yes() -> bool:
    return True


_INSTEAD_OF_PEFT: dict[str, Any] = {
    "BaseTunerLayer": LoraLayer,
    "LoraConfig": (),  # nothing is an instance, so that TRL does not check PEFT's version
    "PeftConfig": AdapterConfig,
    "PeftModel": PeftModel,
    "PeftType": PeftType,
    "PrefixTuningConfig": (),
    "get_peft_model": get_peft_model,
    "is_peft_available": _yes,
}
"""Names that TRL imports from PEFT, and which are missing if it is not installed."""


def _by_config(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a ``get_peft_model`` that calls the function of the library to which the config belongs."""

    @functools.wraps(theirs)
    def make(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = get_peft_model if isinstance(peft_config, AdapterConfig) else theirs
        return chosen(model, peft_config, *args, **kwargs)

    return make
