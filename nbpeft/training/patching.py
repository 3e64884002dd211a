"""The one place where nbpeft changes other libraries: their Trainers take our models as they take PEFT's.

transformers, accelerate and TRL know models with adapters by their class, which is one of the
``peft`` package. For any other class a Trainer writes whole state dicts as checkpoints (and fails at
that where weights are tied), refuses quantized bases and drops columns it takes for unused; TRL
takes the wrong module for the backbone. :func:`patch_trainer` changes, until :func:`unpatch_trainer`:

* ``accelerate.utils.is_peft_model`` and transformers' ``_is_peft_model`` say yes to our models. The
  functions stay the same objects and get other code, since everybody imports them by name: so it
  matters not who did that before or after.
* Some methods of ``transformers.Trainer`` itself do otherwise where its model is ours (see
  :data:`nbpeft.training.adapted_trainer.STAND_INS`). They lie below a derived Trainer: what that
  overrides stays overridden, and its ``super()`` reaches ours. What the model is is asked when they
  are called, so ``model_init`` and hyperparameter search are served as well.
* In modules of TRL that derive a Trainer, the names of PEFT's classes that are compared with, and
  ``get_peft_model``, cover ours too: an adapted output head is refused there as one of PEFT's is, and
  ``peft_config=nbpeft.LoraConfig(...)`` is taken. Where PEFT is not installed, they are ours alone.

For all other models everything is as before. It happens when the first adapted model is made, not
on import. Importing ``transformers.trainer`` at that moment would cost those who only run models
about half a second; so where it is not imported yet, a finder in ``sys.meta_path`` waits for it, and
takes itself out when it comes. A hook in the model instead would have to rely on what the
constructor of some Trainer happens to read from it.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

from nbpeft.engine.adapter import AdapterConfig
from nbpeft.engine.model_tree import unwrapped
from nbpeft.model import LoraLayer, PeftModel, get_peft_model
from nbpeft.training.adapted_trainer import STAND_INS
from nbpeft.training.late_imports import LateImports

_ACCELERATE, _SHARDED, _TRANSFORMERS = (
    "accelerate.utils.modeling",
    "accelerate.utils.fsdp_utils",
    "transformers.trainer",
)
_ABSENT = object()
_originals: dict[str, Callable[[Any], bool]] = {}
_undo: list[Callable[[], None]] = []
_taught: set[str] = set()
_lock = threading.RLock()
_finder: LateImports | None = None
_declined = False


def patch_trainer() -> None:
    """Has Trainers of transformers, accelerate and TRL take models of nbpeft as they take those of PEFT.

    Done by itself when the first adapted model is made, unless it was undone; a second time does
    nothing. What it changes is told at the top of :mod:`nbpeft.training.patching`.
    """
    global _finder, _declined
    with _lock:
        _declined = False
        if _finder is None:
            _finder = LateImports(
                {_ACCELERATE: _patch_accelerate, _SHARDED: _patch_sharded, _TRANSFORMERS: _patch_transformers}
            )
        _finder.serve()


def unpatch_trainer() -> None:
    """Gives Trainers back as they were, until ``patch_trainer`` or ``nbpeft.Trainer`` is called."""
    global _finder, _declined
    with _lock:
        _declined = True
        if _finder is not None:
            _finder.stop()
            _finder = None
        while _undo:
            _undo.pop()()
        _originals.clear()
        _taught.clear()


def patch_for_models() -> None:
    """``patch_trainer``, unless somebody said no."""
    if not _declined:
        patch_trainer()


def is_ours(model: Any) -> bool:
    """Whether ``model`` is a model of nbpeft, compiled and distributed ones included."""
    return isinstance(unwrapped(model), PeftModel)


def answer(home: str, model: Any) -> bool:
    """Whether a model has adapters, ours or, as ``home`` sees it, PEFT's."""
    return is_ours(model) or _originals[home](model)


# The code of the two functions that ask. It runs with the names of their modules, so it imports what it needs.


def _accelerate_asks(model: Any) -> bool:
    from nbpeft.training.patching import answer

    return answer("accelerate.utils.modeling", model)


def _transformers_asks(model: Any) -> bool:
    from nbpeft.training.patching import answer

    return answer("transformers.trainer", model)


def _patch_accelerate(module: ModuleType) -> None:
    _give_code(_ACCELERATE, module.is_peft_model, _accelerate_asks)


def _patch_sharded(module: ModuleType) -> None:
    """Sharded state dicts of adapters alone are made by functions of PEFT for its own models: not for ours."""
    _set(module, "is_peft_model", _originals[_ACCELERATE])


def _patch_transformers(module: ModuleType) -> None:
    _give_code(_TRANSFORMERS, module._is_peft_model, _transformers_asks)
    if find_spec("peft") is None and hasattr(module, "update_fsdp_plugin_peft"):  # asked for our models now, needs PEFT
        _set(module, "update_fsdp_plugin_peft", lambda model, accelerator: None)
    trainer_class = module.Trainer
    for name, stand_in in STAND_INS.items():
        _set(trainer_class, name, _for_ours(trainer_class.__dict__[name], stand_in))
    _set(trainer_class, "__init_subclass__", classmethod(_derived))
    for derived in _below(trainer_class):
        _teach_trl(derived)


def _give_code(home: str, function: Any, asks: Any) -> None:
    code = function.__code__
    _originals[home] = FunctionType(code, function.__globals__, function.__name__)
    function.__code__ = asks.__code__
    _undo.append(lambda: setattr(function, "__code__", code))


def _set(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute, and notes how to take it back where nobody has set it again."""
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)

    def undo() -> None:
        if vars(owner).get(name) is not value:
            return
        delattr(owner, name) if before is _ABSENT else setattr(owner, name, before)

    _undo.append(undo)


def _for_ours(original: Any, stand_in: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _finder is not None and is_ours(self.model):
            return stand_in(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return method


# TRL


def _below(trainer_class: type) -> list[type]:
    direct: list[type] = trainer_class.__subclasses__()
    return direct + [further for derived in direct for further in _below(derived)]


def _derived(cls: type, /, **kwargs: Any) -> None:
    super(sys.modules[_TRANSFORMERS].Trainer, cls).__init_subclass__(**kwargs)
    with _lock:
        _teach_trl(cls)


def _teach_trl(derived: type) -> None:
    """Has the module of a Trainer of TRL compare with our classes where it compares with PEFT's."""
    home = derived.__module__
    names = vars(sys.modules[home]) if home.startswith("trl.") and home in sys.modules else {}
    if "is_peft_model" not in names or home in _taught:
        return
    _taught.add(home)
    module = sys.modules[home]
    if find_spec("peft") is None:
        for name, value in _INSTEAD_OF_PEFT.items():
            _set(module, name, value)
        if "use_adapter" in names:
            _set(sys.modules[names["use_adapter"].__module__], "is_peft_available", _yes)
        return
    for name, ours in (("BaseTunerLayer", LoraLayer), ("PeftConfig", AdapterConfig)):
        if name in names:
            _set(module, name, (names[name], ours))
    if "get_peft_model" in names:
        _set(module, "get_peft_model", _either(names["get_peft_model"]))


def _yes() -> bool:
    return True


_INSTEAD_OF_PEFT: dict[str, Any] = {
    "BaseTunerLayer": LoraLayer,
    "LoraConfig": (),  # nothing is one: asked for before PEFT's version is
    "PeftConfig": AdapterConfig,
    "PrefixTuningConfig": (),
    "get_peft_model": get_peft_model,
    "is_peft_available": _yes,
}
"""Names that TRL takes from PEFT and lacks where that is not installed."""


def _either(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """``get_peft_model`` of the library that the config is of."""

    @functools.wraps(theirs)
    def make(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = get_peft_model if isinstance(peft_config, AdapterConfig) else theirs
        return chosen(model, peft_config, *args, **kwargs)

    return make
