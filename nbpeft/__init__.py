"""nbpeft: parameter-efficient fine-tuning in Jupyter.

In a notebook ``%load_ext nbpeft`` adds ``%%lora``, ``%%qlora``, ``%%lora_train`` and ``%lora``. In Python the
public names, listed in ``__init__.pyi``, include those of PEFT and the config class of every
registered method; PEFT's import paths work too (``nbpeft.tuners.lora``). Heavy packages are imported
only when a name needs them, and importing nbpeft changes nothing in other libraries.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from nbpeft._util.hooks import when_adapted, when_configured, when_engine_imported, when_scored
from nbpeft._util.lazy import lazy_names
from nbpeft.peft_api.modules import add_import_paths, attribute

__version__ = "0.2.0"

# The stub also lists the config classes, for type checkers. They are looked up in the registry instead, because
# importing it also makes `from_pretrained` and `save_pretrained` of configs work.
_METHODS = f"{__name__}.engine.methods."
_NAMES = {
    name: home
    for name, home in lazy_names(__name__, __file__).items()
    if not (home.startswith(_METHODS) and name.endswith("Config"))
}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = globals()[name] = getattr(importlib.import_module(_NAMES[name]), name)
        return value
    if name == "examples":
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__all__":
        return sorted({"__version__", *_NAMES, *_config_classes()})
    # Not cached in the module: registering a method again replaces its class.
    if name.endswith("Config") and (config_class := _config_classes().get(name)):
        return config_class
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return attribute(__name__, name)


def __dir__() -> list[str]:
    configs = _config_classes() if "nbpeft.model" in sys.modules else ()
    return sorted({*globals(), *_NAMES, *configs})


def _config_classes() -> dict[str, type]:
    """Name -> class of the configs of all registered methods."""
    importlib.import_module("nbpeft.model")  # registers the methods, and gives configs their file formats
    registry = importlib.import_module("nbpeft.engine.contract.registry")
    return {method.config_class.__name__: method.config_class for method in registry.methods()}


def _patch_libraries() -> None:
    model = sys.modules.get(f"{__name__}.model")  # absent if only the engine is used
    # While `nbpeft.model` is still being imported, importing the patch would be an import cycle.
    if model is not None and not getattr(model.__spec__, "_initializing", False):
        from nbpeft.training.transformers.trainer_patch import patch_when_used

        patch_when_used()


def _add_peft_attributes() -> None:
    importlib.import_module(f"{__name__}.peft_layers")


def _new_scorer(*args: Any, **options: Any) -> Any:
    from nbpeft.scoring.in_training import RowScorer

    return RowScorer(*args, **options)


when_engine_imported(_add_peft_attributes)
when_configured(_patch_libraries)
when_adapted(_patch_libraries)
when_scored(_new_scorer)
add_import_paths()


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext nbpeft``."""
    from nbpeft.magics import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """``%unload_ext nbpeft``: removes magics and panels; adapters stay in their models."""
    from nbpeft.magics import unload

    unload(shell)
