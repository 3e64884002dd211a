"""``nbpeft.Trainer``: transformers' Trainer, which knows adapters once it is patched, and computes losses in chunks."""

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
from nbpeft.errors import ConfigError, TrainingError
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

    A checkpoint folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` beside the
    Trainer's own files; adapters that are not called ``default`` lie in subfolders of their name.
    ``resume_from_checkpoint``, ``load_best_model_at_end`` and ``save_model`` work on adapters
    alone, and quantized bases are accepted. It calls ``nbpeft.patch_trainer()``.

    The loss of a language model is computed in chunks of learned tokens, as ``nbpeft.chunked_loss`` does, in
    training and in evaluations that ask for the loss alone. Where logits are needed (``compute_metrics``,
    ``preprocess_logits_for_metrics``, ``return_outputs=True``), they are there.

    ``loss_weights`` in a batch, in the shape of its labels, say how much each of them counts: a loss is the sum of
    weighted losses over the sum of the weights, of all batches whose gradients are accumulated.

    Args:
        *args: of ``transformers.Trainer``.
        loss_chunk_size: tokens whose logits are in memory at once; 0 for logits as a whole.
        recompute: whether activations and norms are computed again in backward instead of being kept, as
            ``nbpeft.selective_recompute`` does; compiled and data-parallel models keep them.
        **kwargs: of ``transformers.Trainer``.

    Raises:
        ConfigError: ``loss_chunk_size`` is no whole number of at least 0, or ``recompute`` neither True nor False.
    """

    def __init__(
        self, *args: Any, loss_chunk_size: int = LOSS_CHUNK_SIZE, recompute: bool = True, **kwargs: Any
    ) -> None:
        patch_trainer()
        self.loss_chunk_size = check_chunk_size(loss_chunk_size)
        if not isinstance(recompute, bool):
            raise ConfigError(f"recompute must be True or False, not {recompute!r:.60}", field="recompute")
        self.recompute = recompute
        self._loss_alone = False
        self._noted = False
        self._labels: Any = None
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:
            self.label_smoother = _ChunkedLabelSmoother(self.label_smoother.epsilon, self.label_smoother.ignore_index)

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the columns of rows that adapters take from each call, as those that the model takes."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            columns += [LOSS_WEIGHTS, *call_columns(self.model)]

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._recomputing():
            return super()._inner_training_loop(*args, **kwargs)

    def _recomputing(self) -> AbstractContextManager[Any]:
        if not self.recompute or self.args.torch_compile or self.args.n_gpu > 1 or self.model is None:
            return nullcontext()
        return selective_recompute(self.model)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The batch on the model's device, its weights on the labels: they reach whatever computes the loss."""
        prepared: Any = super()._prepare_inputs(inputs)
        if not isinstance(prepared, Mapping):
            return prepared
        if LOSS_WEIGHTS in prepared:
            model: Any = self.model
            if self.args.torch_compile or is_compiled(model):
                raise TrainingError("the rows have weights, which the loss of a compiled model does not take")
            prepared = with_loss_weights(prepared)
        self._labels = prepared.get("labels")
        return prepared

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """How many labels are learned in batches whose gradients are accumulated, each by its weight."""
        return super()._get_num_items_in_batch([_counted(batch) for batch in batch_samples], device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's step; see ``transformers.Trainer``.

        Raises:
            TrainingError: the rows have weights, and the loss does not use them.
        """
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        check_weights_used(self._labels, type(base_model_of(model)).__name__)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss, in chunks where nobody needs the logits; see ``transformers.Trainer``."""
        outside = self.label_smoother is not None or self.compute_loss_func is not None
        # DistributedDataParallel reads what a model returns, and so cannot return logits without data.
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
        """The Trainer's step of an evaluation; see ``transformers.Trainer``."""
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
        """Says why the loss is not computed in chunks, where a model has a head."""
        why = f"{head.needed_by} needs them" if head.needed_by and not head.chunked else ""
        if is_compiled(model):
            why = "the model is compiled"
        if not why or self._noted:
            return
        self._noted = True
        note(self, f"the loss is computed from logits as a whole: {why}")


def _counted(batch: Any) -> Any:
    """A batch whose labels count by their weights: in float32 all, since the sums of several processes are gathered."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        return batch
    labels = with_loss_weights(batch)["labels"]
    if isinstance(labels, WeightedLabels):
        return {**batch, "labels": _CountedLabels(labels.plain, labels.weights)}
    return {**batch, "labels": _CountedLabels(labels, torch.ones_like(labels, dtype=torch.float32))}


class _CountedLabels:
    """Labels as far as a Trainer counts them: ``labels[..., 1:].ne(-100).sum()``."""

    def __init__(self, labels: Tensor, weights: Tensor) -> None:
        self._labels, self._weights = labels, weights

    def __getitem__(self, index: Any) -> _CountedLabels:
        return _CountedLabels(self._labels[index], self._weights[index])

    def ne(self, ignore_index: int) -> Tensor:
        return sum_of_weights(self._labels, self._weights, ignore_index)


class _ChunkedLabelSmoother(LabelSmoother):
    """The Trainer's smoothed loss, computed in chunks from logits without data, and of weighted labels."""

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
    """Whether a Trainer class computes its loss in another way than transformers' Trainer and ours.

    Args:
        trainer_class: A subclass of ``transformers.Trainer``.
    """
    usual = (transformers.Trainer.compute_loss, Trainer.compute_loss)
    return getattr(trainer_class, "compute_loss", None) not in usual


def why_unweighted(trainer_class: type[Any], *, own_batches: bool = False) -> str:
    """Why the loss of a Trainer class counts no row more than another; empty if it can.

    Args:
        trainer_class: A subclass of ``transformers.Trainer``.
        own_batches: Whether somebody else makes the batches.
    """
    if own_batches:
        return "the data_collator that is given makes batches of its own: leave it out, or remove the weights"
    if issubclass(trainer_class, Trainer):
        return ""
    name = f"{trainer_class.__module__}.{trainer_class.__qualname__}"
    return f"{name} takes none: derive it from nbpeft.Trainer, or remove the weights"


def step_settings(trainer: Any) -> dict[str, Any]:
    """How a Trainer computes a step, as keywords of ``nbpeft.forecast``.

    Args:
        trainer: A Trainer or its class; one of another library keeps logits as a whole, and activations.
    """
    kind = trainer if isinstance(trainer, type) else type(trainer)
    if not issubclass(kind, Trainer):
        found: dict[str, Any] = {"loss_chunk_size": 0, "recompute": False}
    else:
        found = {name: getattr(trainer, name) for name in ("loss_chunk_size", "recompute") if hasattr(trainer, name)}
    group = getattr(trainer, "group", None)  # of adapters that learn side by side
    return found if group is None else {**found, "adapters": max(len(group.training), 1)}


def adapter_trainer(trainer_class: type[Any]) -> type[Any]:
    """The given Trainer class, which knows adapters from here on; for Trainers of other libraries.

    It is the class itself: ``nbpeft.patch_trainer()`` has changed ``transformers.Trainer`` below it.

    Args:
        trainer_class: A subclass of ``transformers.Trainer``.
    """
    patch_trainer()
    return trainer_class
