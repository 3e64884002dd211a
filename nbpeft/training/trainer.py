"""A Trainer that knows adapters: what it writes, reads and measures is the adapter, not the base.

transformers' Trainer asks in many places whether its model comes from the ``peft`` package. What
it does there for such models, :class:`AdapterTrainerMixin` does for ours; everything else
(accelerate, schedulers, evaluation, checkpoint rotation, resuming) stays the Trainer's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_loss, find_labels

from nbpeft.errors import CheckpointError, CheckpointNotFoundError
from nbpeft.model import load_peft_weights, set_peft_model_state_dict
from nbpeft.training.adapted import base_of, is_adapted
from nbpeft.training.callback import RunCallback
from nbpeft.training.checkpoints import resume_point, save_beside, save_whole

_find_labels: Callable[[type], list[str]] = find_labels
_can_return_loss: Callable[[type], bool] = can_return_loss
_made: dict[type[Any], type[Any]] = {}
_DEFAULT_NAME = "default"
_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


class AdapterTrainerMixin:
    """What a Trainer subclass needs for models with adapters. Put it before the Trainer class."""

    model: Any
    args: Any
    accelerator: Any
    label_names: list[str]
    label_smoother: Any
    processing_class: Any
    data_collator: Any
    callback_handler: Any
    state: Any
    model_accepts_loss_kwargs: bool
    _signature_columns: list[str] | None

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        self.read_adapted_model()

    def read_adapted_model(self) -> None:
        """Takes from the base model what the Trainer's constructor looked for in the model with adapters."""
        if not is_adapted(self.model):
            return
        base = base_of(self.model)
        parameters = inspect.signature(base.forward).parameters.values()
        accepts = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        self.model_accepts_loss_kwargs = bool(getattr(base, "accepts_loss_kwargs", accepts))
        if self.args.label_names is None:
            self.label_names = _find_labels(type(base))
        self.can_return_loss = _can_return_loss(type(base))
        if self.label_smoother is not None and type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the Trainer's, and tells the run how many tokens the batch has."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RunCallback):
                callback.saw(inputs)
        return cast(torch.Tensor, super().training_step(model, inputs, *args, **kwargs))  # type: ignore[misc]

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None and is_adapted(self.model):
            columns = inspect.signature(base_of(self.model).forward).parameters
            self._signature_columns = list(dict.fromkeys([*columns, "label", "label_ids", *self.label_names]))
        super()._set_signature_columns_if_needed()  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not is_adapted(model):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        accepted = inspect.signature(model.save_pretrained).parameters
        gathered = {"state_dict": state_dict} if state_dict is not None and "state_dict" in accepted else {}
        model.save_pretrained(str(folder), **gathered)
        save_beside(folder, self.processing_class or getattr(self.data_collator, "tokenizer", None), self.args)

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        save = functools.partial(super()._save_checkpoint, model, trial, *args, **kwargs)  # type: ignore[misc]
        if is_adapted(self.accelerator.unwrap_model(self.model)):
            save_whole(self, trial, save)
        else:
            save()

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; ``resume_from_checkpoint=True`` passes over checkpoints that are not whole."""
        if is_adapted(self.model):
            resume_from_checkpoint = resume_point(self, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if not is_adapted(model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        load_adapters(model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if not is_adapted(self.model):
            super()._load_best_model()  # type: ignore[misc]
            return
        load_adapters(self.model, Path(self.state.best_model_checkpoint))


def adapter_trainer(trainer_class: type[Any]) -> type[Any]:
    """The given Trainer class, made to know adapters; for Trainers of other libraries.

    Args:
        trainer_class: A subclass of ``transformers.Trainer``.
    """
    if issubclass(trainer_class, AdapterTrainerMixin):
        return trainer_class
    if trainer_class not in _made:
        _made[trainer_class] = type(f"Adapter{trainer_class.__name__}", (AdapterTrainerMixin, trainer_class), {})
    return _made[trainer_class]


class Trainer(AdapterTrainerMixin, transformers.Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` for models with adapters, with the same arguments.

    A checkpoint folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` beside the
    Trainer's own files; adapters that are not called ``default`` lie in subfolders of their name.
    ``resume_from_checkpoint``, ``load_best_model_at_end`` and ``save_model`` work on adapters
    alone, and quantized bases are accepted.
    """


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
    for name, source in sources.items():
        result = set_peft_model_state_dict(model, load_peft_weights(source, device="cpu"), name)
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
