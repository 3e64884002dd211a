"""``nbpeft.Trainer``: transformers' Trainer for models with adapters, with losses computed in chunks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother

from nbpeft.engine.calls.model_properties import has_encoder
from nbpeft.engine.calls.selective_recompute import selective_recompute
from nbpeft.engine.tree.model_tree import base_model_of
from nbpeft.errors import TrainingError, check_bool, few
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
from nbpeft.names import IGNORED_LABEL, LOSS_CHUNK_SIZE, LOSS_WEIGHTS
from nbpeft.training.adapters.adapted_model import call_columns
from nbpeft.training.adapters.extra_loss import loss_divisor
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

    The loss of a step is the mean over its labels, however many batches and processes they are divided among: each
    batch counts by its labels, whether or not the model's loss takes ``num_items_in_batch``.

    The losses of a base in float16 are scaled before backward, where small gradients would be rounded to 0.

    ``loss_weights`` in a batch, in the shape of its labels, are factors on the loss of each label: a loss is the sum of
    weighted losses divided by the sum of the weights.

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
        self._predicts = False
        self._noted = False
        self._labels: Any = None
        super().__init__(*args, **kwargs)
        self._scales_losses = self.accelerator.scaler is None and self._needs_scaled_losses()
        if self._scales_losses:
            self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type)
            note(
                self, "the base computes in float16: losses are scaled, and steps whose gradients overflow are skipped"
            )
        if self.label_smoother is not None:
            self.label_smoother = _ChunkedLabelSmoother(self.label_smoother.epsilon, self.label_smoother.ignore_index)

    def _needs_scaled_losses(self) -> bool:
        """Whether the base computes in float16 and the trained parameters are in float32."""
        base = base_model_of(self.model)
        frozen = (part.dtype for part in base.parameters() if not part.requires_grad and part.is_floating_point())
        computed = (getattr(module, "compute_dtype", None) for module in base.modules())  # of quantized layers
        if torch.float16 not in {*frozen, *computed} or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        trained = [name for name, part in base.named_parameters() if part.requires_grad and part.dtype == torch.float16]
        if trained:
            raise TrainingError(
                f"{few(trained)}: parameters in float16 cannot be trained, their gradients overflow and vanish; load "
                "the base in bfloat16 or float32, or, if they are those of an adapter, add it with "
                "autocast_adapter_dtype=True"
            )
        if hasattr(self, "group"):
            raise TrainingError(
                "adapters of a base in float16 are not trained side by side, because one gradient scaler would skip "
                "the steps of all: load the base in bfloat16 or float32"
            )
        return True

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clips the gradients, which are no longer scaled; see ``transformers.Trainer``."""
        self._unscale()
        clip: Any = super()._clip_grad_norm
        return clip(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradients; see ``transformers.Trainer``."""
        if grad_norm is None:
            self._unscale()
        norm: Any = super()._get_grad_norm
        return norm(model, grad_norm=grad_norm)

    def _unscale(self) -> None:
        """Divides the gradients by the factor on the losses; accelerate does this only for mixed precision."""
        optimizer: Any = self.optimizer
        scaler: Any = self.accelerator.scaler
        if self._scales_losses:
            if self.state.global_step == 0:
                note(self, "the base is in float16: losses are scaled, and steps whose gradients overflow are skipped")
            scaler.unscale_(getattr(optimizer, "optimizer", optimizer))

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
        """The items of the batches whose gradients are accumulated, in all processes; see ``items_in``."""
        if self.args.n_gpu > 1:
            return super()._get_num_items_in_batch(batch_samples, device)
        if not batch_samples or not all(isinstance(batch, Mapping) for batch in batch_samples):
            return None
        found = torch.stack([self.items_in(batch).to(device) for batch in batch_samples]).sum(0)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            gather: Any = self.accelerator.gather
            found = gather(found[None]).sum(0)
        return found / self._copies_of_batch

    @property
    def _copies_of_batch(self) -> int:
        """The number of processes that have the same batch."""
        return int(self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def items_in(self, batch: Mapping[str, Any]) -> Tensor:
        """The number by which the sum of a batch's losses is divided, a scalar in float32.

        That is the sum of the weights of its labels; without labels that can be counted the number of its rows.
        """
        with_weights = with_loss_weights(batch)
        labels = with_weights.get("shift_labels", with_weights.get("labels"))
        if not isinstance(labels, Tensor):
            rows = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 1)
            return torch.tensor(float(rows))
        base: Any = base_model_of(self.model)
        loss = LOSS_MAPPING.get(getattr(base, "loss_type", ""))
        if loss is None and type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():  # such as GPT-2
            loss = ForCausalLMLoss
        shifts = loss is ForCausalLMLoss and not has_encoder(base)
        if shifts and "shift_labels" not in with_weights:
            labels = labels[..., 1:]
        if isinstance(labels, WeightedLabels):
            return sum_of_weights(labels.plain, labels.weights)
        known = torch.ones_like(labels) if labels.is_floating_point() else labels.ne(IGNORED_LABEL)
        return known.sum().float()

    def share_of_step(self, inputs: Mapping[str, Any], num_items_in_batch: Any) -> Any:
        """The factor with which the mean loss of a batch is added to that of its step.

        A Trainer may divide by the number of batches afterwards; the gradients of processes are averaged.
        """
        processes = 1
        if self.args.average_tokens_across_devices:
            processes = self.accelerator.num_processes // self.get_tp_size()
        factor = processes * loss_divisor(self, num_items_in_batch)
        return self.items_in(inputs).to(num_items_in_batch) * factor / num_items_in_batch

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
        # Whether a model uses num_items_in_batch cannot be seen from outside, so it computes the mean of its batch.
        is_mean = self.compute_loss_func is None and self.args.n_gpu <= 1
        is_step = is_mean and num_items_in_batch is not None and not self._predicts
        share = self.share_of_step(inputs, num_items_in_batch) if is_step else None
        if is_mean:
            num_items_in_batch = None
        # DistributedDataParallel traverses the tensors that a model returns, and cannot handle logits without data.
        shown = (return_outputs and not self._loss_alone) or (outside and self.accelerator.num_processes > 1)
        with ExitStack() as block:
            head = block.enter_context(chunked_head(model, 0 if shown else self.loss_chunk_size, num_items_in_batch))
            if not outside:
                block.enter_context(without_lazy_logits(model))
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not shown and self.loss_chunk_size:
            self._note_once(model, head)
        if share is None:
            return loss
        return (part_of_step(loss[0], share), *loss[1:]) if isinstance(loss, tuple) else part_of_step(loss, share)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The Trainer's evaluation step; see ``transformers.Trainer``."""
        self._loss_alone, self._predicts = prediction_loss_only, True
        try:
            result: tuple[Tensor | None, Tensor | None, Tensor | None] = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys
            )
            check_weights_used(self._labels, type(base_model_of(model)).__name__)
            size = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
            if result[0] is not None and self._has_copies:
                rows = first_rows(inputs, max(self.rows_counted(size), 1), size)
                return super().prediction_step(model, rows, True, ignore_keys)[0], *result[1:]
            return result
        finally:
            self._loss_alone = self._predicts = False

    @property
    def _has_copies(self) -> bool:
        """Whether the batch of the evaluation is the last one, filled up with copies of rows, in any process."""
        state = self.accelerator.gradient_state
        return self.accelerator.num_processes > 1 and bool(state.end_of_dataloader) and state.remainder > 0

    def rows_counted(self, size: int) -> int:
        """The number of rows of an evaluation batch of this process that are no copies of others.

        Several processes take batches of equal size, so that the last ones are filled up with rows of the first.

        Args:
            size: number of rows of the batch.
        """
        if not self._has_copies:
            return size
        remaining = self.accelerator.gradient_state.remainder - self.accelerator.process_index * size
        return min(max(int(remaining), 0), size)

    def _note_once(self, model: nn.Module, head: ChunkedHead) -> None:
        """Notes once why the loss is not computed in chunks, although the model has an output head."""
        why = f"{head.needed_by} needs them" if head.needed_by and not head.chunked else ""
        if is_compiled(model):
            why = "the model is compiled"
        if not why or self._noted:
            return
        self._noted = True
        note(self, f"the loss is computed from complete logits: {why}")


def first_rows(batch: Mapping[str, Any], count: int, size: int) -> dict[str, Any]:
    """The first rows of a batch.

    Args:
        batch: the batch.
        count: number of rows to return.
        size: number of rows of the batch.
    """
    in_rows = {
        name: isinstance(value, Tensor) and value.ndim > 0 and len(value) == size for name, value in batch.items()
    }
    return {name: value[:count] if in_rows[name] else value for name, value in batch.items()}


def part_of_step(loss: Tensor, share: Tensor) -> Tensor:
    """A batch's part of the loss of its step, given its mean; that of no labels, which is NaN, is no part."""
    return torch.where(share == 0, 0.0, loss * share)


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
    return settings if group is None else {**settings, "num_adapters": max(len(group.training), 1)}


def adapter_trainer(trainer_class: type[Any]) -> type[Any]:
    """Prepares a Trainer class of another library for models with adapters, and returns it.

    It returns the class itself: ``nbpeft.patch_trainer()`` changes ``transformers.Trainer``, its base class.
    """
    patch_trainer()
    return trainer_class
