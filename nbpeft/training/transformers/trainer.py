"""``nbpeft.Trainer``: transformers' Trainer for models with adapters, with losses computed in chunks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.trainer_pt_utils import LabelSmoother

from nbpeft.engine.calls.selective_recompute import selective_recompute
from nbpeft.engine.tree.model_tree import base_model_of
from nbpeft.errors import TrainingError, check_bool
from nbpeft.losses import (
    ChunkedHead,
    LazyLogits,
    WeightedLabels,
    check_chunk_size,
    check_weights_used,
    chunked_head,
    is_compiled,
    sum_of_weights,
    with_loss_weights,
)
from nbpeft.losses import without_logits as without_lazy_logits
from nbpeft.names import LOSS_CHUNK_SIZE, LOSS_WEIGHTS
from nbpeft.training.adapters.adapted_model import call_columns
from nbpeft.training.adapters.method_state import note
from nbpeft.training.transformers.trainer_patch import patch_trainer


class Trainer(transformers.Trainer):
    """``transformers.Trainer`` for models with adapters, with the same arguments.

    A checkpoint folder contains ``adapter_config.json`` and ``adapter_model.safetensors`` in addition to the
    Trainer's own files; adapters with another name than ``default`` are in subfolders of their name.
    ``resume_from_checkpoint``, ``load_best_model_at_end`` and ``save_model`` work on the adapters
    only, and quantized bases are accepted. It calls ``nbpeft.patch_trainer()``.

    The loss of a language model is computed in chunks of tokens, as by ``nbpeft.chunked_loss``, in
    training and in evaluations that need only the loss. If logits are needed (``compute_metrics``,
    ``preprocess_logits_for_metrics``, ``return_outputs=True``), they are computed as a whole.

    ``loss_weights`` in a batch, in the shape of its labels, are factors on the loss of each label: a loss is the sum of
    weighted losses divided by the sum of the weights, over all batches whose gradients are accumulated.

    Args:
        *args: arguments of ``transformers.Trainer``.
        loss_chunk_size: the number of tokens whose logits are in memory at once; 0 to compute all logits at once.
        recompute: whether activations and norms are recomputed in backward instead of being stored, as by
            ``nbpeft.selective_recompute``; compiled and data-parallel models store them.
        **kwargs: arguments of ``transformers.Trainer``.

    Raises:
        ConfigError: ``loss_chunk_size`` is not a whole number of at least 0, or ``recompute`` not True or False.
    """

    def __init__(
        self, *args: Any, loss_chunk_size: int = LOSS_CHUNK_SIZE, recompute: bool = True, **kwargs: Any
    ) -> None:
        patch_trainer()
        self.loss_chunk_size = check_chunk_size(loss_chunk_size)
        check_bool("recompute", recompute)
        self.recompute = recompute
        self._loss_alone = False
        self._noted = False
        self._labels: Any = None
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:
            self.label_smoother = _ChunkedLabelSmoother(self.label_smoother.epsilon, self.label_smoother.ignore_index)

    def _set_signature_columns_if_needed(self) -> None:
        """Adds the columns that adapters take to those of the model's signature, which the Trainer does not drop."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            columns += [LOSS_WEIGHTS, *call_columns(self.model)]

    def recomputing(self) -> AbstractContextManager[Any]:
        """A block in which backward recomputes what the training need not store; the training loop runs in it."""
        if not self.recompute or self.args.torch_compile or self.args.n_gpu > 1 or self.model is None:
            return nullcontext()
        return selective_recompute(self.model)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Moves the batch to the model's device, and attaches its weights to the labels.

        Attached to the labels, the weights reach any function that computes the loss.
        """
        prepared: Any = super()._prepare_inputs(inputs)
        if not isinstance(prepared, Mapping):
            return prepared
        if LOSS_WEIGHTS in prepared:
            model: Any = self.model
            if self.args.torch_compile or is_compiled(model):
                raise TrainingError("the rows have weights, which the loss of a compiled model does not support")
            prepared = with_loss_weights(prepared)
        self._labels = prepared.get("labels")
        return prepared

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The sum of the weights of all labels in the batches whose gradients are accumulated."""
        return super()._get_num_items_in_batch([_counted(batch) for batch in batch_samples], device)

    def after_batch(self, loss: Tensor) -> None:
        """Checks the use of weights. Called after each training step.

        Raises:
            TrainingError: the rows have weights, but the loss does not use them.
        """
        check_weights_used(self._labels, type(base_model_of(self.model)).__name__)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss, computed in chunks if the logits are not needed; see ``transformers.Trainer``."""
        outside = self.label_smoother is not None or self.compute_loss_func is not None
        # DistributedDataParallel traverses the tensors that a model returns, and cannot handle logits without data.
        shown = (return_outputs and not self._loss_alone) or (outside and self.accelerator.num_processes > 1)
        with ExitStack() as block:
            head = block.enter_context(chunked_head(model, 0 if shown else self.loss_chunk_size, num_items_in_batch))
            if not outside:
                block.enter_context(without_lazy_logits(model))
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not shown and self.loss_chunk_size:
            self._note_once(model, head)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The Trainer's evaluation step; see ``transformers.Trainer``."""
        self._loss_alone = prediction_loss_only
        try:
            result: tuple[Tensor | None, Tensor | None, Tensor | None] = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys
            )
            check_weights_used(self._labels, type(base_model_of(model)).__name__)
            return result
        finally:
            self._loss_alone = False

    def _note_once(self, model: nn.Module, head: ChunkedHead) -> None:
        """Notes once why the loss is not computed in chunks, although the model has an output head."""
        why = f"{head.needed_by} needs them" if head.needed_by and not head.chunked else ""
        if is_compiled(model):
            why = "the model is compiled"
        if not why or self._noted:
            return
        self._noted = True
        note(self, f"the loss is computed from complete logits: {why}")


def _counted(batch: Any) -> Any:
    """A batch whose labels are counted by their weights, always in float32: processes gather their sums."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        return batch
    labels = with_loss_weights(batch)["labels"]
    if isinstance(labels, WeightedLabels):
        return {**batch, "labels": _CountedLabels(labels.plain, labels.weights)}
    return {**batch, "labels": _CountedLabels(labels, torch.ones_like(labels, dtype=torch.float32))}


class _CountedLabels:
    """Labels with the operations by which a Trainer counts them: ``labels[..., 1:].ne(-100).sum()``."""

    def __init__(self, labels: Tensor, weights: Tensor) -> None:
        self._labels, self._weights = labels, weights

    def __getitem__(self, index: Any) -> _CountedLabels:
        return _CountedLabels(self._labels[index], self._weights[index])

    def ne(self, ignore_index: int) -> Tensor:
        return sum_of_weights(self._labels, self._weights, ignore_index)


class _ChunkedLabelSmoother(LabelSmoother):
    """The Trainer's label smoothing, also for logits that are computed in chunks and for weighted labels."""

    def __call__(
        self, model_output: Any, labels: Tensor, shift_labels: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if not isinstance(logits, LazyLogits) and not isinstance(labels, WeightedLabels):
            smoothed: Any = super().__call__
            whole: Tensor = smoothed(model_output, labels, shift_labels, num_items_in_batch)
            return whole
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        loss = F.cross_entropy(
            logits.reshape(-1, logits.size(-1)),
            labels.reshape(-1),
            ignore_index=self.ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            label_smoothing=self.epsilon,
        )
        if num_items_in_batch is None:
            return loss
        return loss / (
            num_items_in_batch.to(loss.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch
        )


def has_own_loss(trainer_class: type[Any]) -> bool:
    """Whether a Trainer class overrides ``compute_loss`` of transformers' Trainer and of nbpeft's."""
    usual = (transformers.Trainer.compute_loss, Trainer.compute_loss)
    return getattr(trainer_class, "compute_loss", None) not in usual


def why_unweighted(trainer_class: type[Any], *, own_batches: bool = False) -> str:
    """Why the loss of a Trainer class does not support weights of rows; empty if it does."""
    if own_batches:
        return "the given data_collator does not add them to its batches: remove the data_collator or the weights"
    if issubclass(trainer_class, Trainer):
        return ""
    name = f"{trainer_class.__module__}.{trainer_class.__qualname__}"
    return f"{name} does not support weights: derive it from nbpeft.Trainer, or remove the weights"


def step_settings(trainer: Any) -> dict[str, Any]:
    """The settings with which a Trainer computes a step, as keywords of ``nbpeft.forecast``.

    Args:
        trainer: A Trainer or its class; that of another library computes all logits at once and stores activations.
    """
    kind = trainer if isinstance(trainer, type) else type(trainer)
    if not issubclass(kind, Trainer):
        settings: dict[str, Any] = {"loss_chunk_size": 0, "recompute": False}
    else:
        settings = {name: getattr(trainer, name) for name in ("loss_chunk_size", "recompute") if hasattr(trainer, name)}
    group = getattr(trainer, "group", None)  # of adapters that learn side by side
    return settings if group is None else {**settings, "adapters": max(len(group.training), 1)}


def adapter_trainer(trainer_class: type[Any]) -> type[Any]:
    """Prepares a Trainer class of another library for models with adapters, and returns it.

    It returns the class itself: ``nbpeft.patch_trainer()`` changes ``transformers.Trainer``, its base class.
    """
    patch_trainer()
    return trainer_class
