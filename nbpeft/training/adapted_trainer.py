"""What transformers' Trainer does otherwise where its model has adapters: save, load, tell about batches.

Functions that stand in for methods of ``transformers.Trainer``; each is given the method it stands
in for. :mod:`nbpeft.training.patching` puts them there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbpeft.errors import CheckpointError, CheckpointNotFoundError
from nbpeft.model import load_peft_weights, set_peft_model_state_dict
from nbpeft.training.checkpoints import resume_point, save_beside, save_whole

_DEFAULT_NAME = "default"
_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def training_step(
    original: Callable[..., Any], trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any
) -> Any:
    """As the Trainer's, and shows the batch to callbacks that want to see it (``saw``)."""
    for callback in trainer.callback_handler.callbacks:
        saw = getattr(callback, "saw", None)
        if saw is not None:
            saw(inputs)
    return original(trainer, model, inputs, *args, **kwargs)


def save(
    original: Callable[..., Any],
    trainer: Any,
    output_dir: str | None = None,
    state_dict: dict[str, Any] | None = None,
) -> None:
    """Writes the adapters alone, with the tokenizer and the arguments."""
    if not trainer.args.should_save:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    folder = Path(output_dir if output_dir is not None else trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    accepted = inspect.signature(model.save_pretrained).parameters
    gathered = {"state_dict": state_dict} if state_dict is not None and "state_dict" in accepted else {}
    model.save_pretrained(str(folder), **gathered)
    save_beside(folder, trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None), trainer.args)


def save_checkpoint(original: Callable[..., Any], trainer: Any, model: Any, trial: Any, **kwargs: Any) -> None:
    """As the Trainer's, whole or not at all."""
    save_whole(trainer, trial, functools.partial(original, trainer, model, trial, **kwargs))


def train(
    original: Callable[..., Any], trainer: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """As the Trainer's; ``resume_from_checkpoint=True`` passes over checkpoints that are not whole."""
    return original(trainer, resume_point(trainer, resume_from_checkpoint), *args, **kwargs)


def load_from_checkpoint(
    original: Callable[..., Any], trainer: Any, resume_from_checkpoint: str, model: Any = None
) -> None:
    """Reads the adapters of a checkpoint into the model's."""
    load_adapters(trainer.model if model is None else model, Path(resume_from_checkpoint))


def load_best_model(original: Callable[..., Any], trainer: Any) -> None:
    """Reads the adapters of the best checkpoint into the model's."""
    load_adapters(trainer.model, Path(trainer.state.best_model_checkpoint))


STAND_INS: dict[str, Callable[..., Any]] = {
    "training_step": training_step,
    "train": train,
    "_save": save,
    "_save_checkpoint": save_checkpoint,
    "_load_from_checkpoint": load_from_checkpoint,
    "_load_best_model": load_best_model,
}
"""Name of a method of ``transformers.Trainer`` -> what stands in for it."""


def load_adapters(model: Any, folder: Path) -> None:
    """Copies the weights of all adapters that a checkpoint folder holds into ``model``, in place.

    Which adapters are active and which are trainable stays as it is, and an optimizer that
    holds their parameters goes on holding them.

    Raises:
        CheckpointNotFoundError: the folder holds none of the model's adapters.
        CheckpointError: an adapter in it is not the one in the model.
    """
    names = tuple(model.peft_config)
    sources = {name: source for name in names if (source := _source(folder, name, names)) is not None}
    if not sources:
        raise CheckpointNotFoundError(
            f"{folder} holds none of the model's adapters ({', '.join(map(repr, names))}): expected "
            f"{_WEIGHT_FILES[0]} in it, or in a subfolder named like the adapter.",
            folder=str(folder),
        )
    weights = {name: load_peft_weights(source, device="cpu") for name, source in sources.items()}
    with model.manager.transaction():
        for name, source in sources.items():
            result = set_peft_model_state_dict(model, weights[name], name)
            if result.missing_keys:
                raise CheckpointError(
                    f"{source} lacks {len(result.missing_keys)} tensors of adapter {name!r}, "
                    f"{result.missing_keys[0]} among them: was its config changed since?",
                    missing=result.missing_keys,
                )


def _source(folder: Path, name: str, names: tuple[str, ...]) -> Path | None:
    places = [folder if name == _DEFAULT_NAME else folder / name]
    if len(names) == 1:
        places.append(folder)
    return next((place for place in places if any((place / file).is_file() for file in _WEIGHT_FILES)), None)
