"""The Trainer that computes the loss of an objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.contract.adapter import Adapter
from nbpeft.memory.checkpointing import is_checkpointing
from nbpeft.model.from_data.observing import evaluated, moved
from nbpeft.model.saving.sharded import is_sharded
from nbpeft.names import DESIRABLE, IGNORED_LABEL, REJECTED
from nbpeft.training.adapters.adapted_model import base_of
from nbpeft.training.data.forms import MARGIN
from nbpeft.training.data.sources import is_stream
from nbpeft.training.objectives.collator import ShiftedCollator, stacked
from nbpeft.training.objectives.log_probs import log_probs, log_probs_of, token_counts
from nbpeft.training.objectives.objective import Completions, Objective
from nbpeft.training.objectives.reference import Reference
from nbpeft.training.objectives.reference_cache import KnownLogProbs, digests_of
from nbpeft.training.transformers.trainer import Trainer, first_rows
from nbpeft.training.watching.scoring import named_metrics

_STEP = "step"
"""The element of a batch with the completions of other rows, if gradients are accumulated."""


@dataclass
class SecondsOfStep:
    """The second completions of all batches whose gradients are accumulated.

    Attributes:
        batches: their sequences.
        log_probs: the adapter that learns -> their mean log-probability in all processes, (1,), once computed.
        reference: the same of the reference.
    """

    batches: Sequence[Mapping[str, Tensor]]
    log_probs: dict[str, Tensor] = field(default_factory=dict)
    reference: Tensor | None = None


class ObjectiveTrainer(Trainer):
    """``nbpeft.Trainer`` with the loss of an objective that has one of its own.

    Attributes:
        row_columns: the parts of the objective's rows in addition to those that the model takes.
    """

    row_columns: ClassVar[tuple[str, ...]] = (
        *(MARGIN, DESIRABLE),
        *(f"{REJECTED}{name}" for name in ("input_ids", "labels", "attention_mask")),
    )
    objective: Objective
    reference: Reference | None

    def __init__(self, *args: Any, objective: Objective, reference: Reference | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective, self.reference = objective, reference
        self.model_accepts_loss_kwargs = False  # a loss is the mean over rows, also of accumulated batches
        self._sums: dict[str, dict[str, tuple[Tensor, Any]]] = {}  # owner -> curve -> weighted sum, and weights
        self._compared: tuple[Tensor, Tensor] | None = None
        self._known = KnownLogProbs()  # those of the reference
        self._evaluates = False
        self._without_dropout: dict[nn.Module, list[RemovableHandle]] = {}  # checkpointed blocks, and hooks on them
        self._counted = True  # whether rows of an evaluation are no copies, which fill up the last batch
        self.owner = ""  # the adapter that learns, if several do side by side
        self.rows_owner = ""  # the same, if each has rows of its own

    def _set_signature_columns_if_needed(self) -> None:
        """Adds the parts of the objective's rows to the columns that the Trainer does not drop."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            columns += self.row_columns

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean of the losses of the rows; see ``transformers.Trainer``."""
        known: Any = num_items_in_batch
        items = self.items_in(inputs).to(self.args.device) if known is None else known
        share = 1.0 if known is None else self.share_of_step(inputs, items)[0]
        inputs = dict(inputs)
        step = inputs.pop(_STEP, None)
        batch = stacked(inputs)
        margins, desirable = batch.pop(MARGIN, None), batch.pop(DESIRABLE, None)
        self._switch_off_dropout()
        if self.objective.learns_second:
            learned_batch, others = batch, None
        else:
            learned_batch, second = _halves(batch)
            others = self._unlearned(model, step or SecondsOfStep((second,)))
        reference = self._reference_log_probs(inputs, learned_batch)
        labels, half = learned_batch["labels"], len(batch["labels"]) // 2
        learned = [labels, *([_prompts(batch)[:half]] if self.objective.learns_prompts else [])]
        with self.compute_loss_context_manager():
            if self.objective.scores:
                found = [model(**{name: part for name, part in batch.items() if name != "labels"}).logits[:, 0].float()]
            else:
                found = log_probs_of(model, learned_batch, learned, chunk_size=self.loss_chunk_size)
        counts = [token_counts(part).to(found[0].device) for part in learned]
        means = items[1:] / items[0]
        prompts = Completions(found[1], None, counts[1], means[1]) if len(found) > 1 else None
        parts = [
            Completions(
                log_probs=found[0][rows],
                reference=None if reference is None else reference[rows],
                token_counts=counts[0][rows],
                mean_count=means[0],
                prompts=before,
                margins=None if margins is None else margins[rows],
                desirable=None if desirable is None else desirable[rows],
            )
            for rows, before in ((slice(half), prompts), (slice(half, None), None))
        ]
        losses, curves = self.objective.loss(parts[0], parts[1] if others is None else others)
        self.add_to_curves(curves)
        loss = losses.mean() * share
        return (loss, {}) if return_outputs else loss

    def items_in(self, batch: Mapping[str, Any]) -> Tensor:
        """The number of rows of a batch, of tokens of their chosen completions, and of tokens of prompts; (3,)."""
        labels = batch["labels"]
        prompts = token_counts(_prompts(batch)).sum() if self.objective.learns_prompts else labels.new_zeros(())
        return torch.stack([labels.new_tensor(len(labels)), token_counts(labels).sum(), prompts]).float()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of a step; completions of other rows are those of the row before in the step."""
        samples, count = super().get_batch_samples(*args, **kwargs)
        several = len(samples) * self.accelerator.num_processes > 1
        if isinstance(self.data_collator, ShiftedCollator) and several and count is not None:
            samples = self._paired_in_step(samples, self.data_collator)
            step = SecondsOfStep(tuple(_halves(stacked(sample))[1] for sample in samples))
            samples = [{**sample, _STEP: step} for sample in samples]
        return samples, count

    def _paired_in_step(
        self, samples: Sequence[dict[str, Tensor]], collator: ShiftedCollator
    ) -> list[dict[str, Tensor]]:
        """The batches of a step in this process, with rows paired as if the step had one batch in one process."""
        processes, batches = self.accelerator.num_processes, list(samples)
        if processes > 1:
            from accelerate.utils import gather_object

            found = gather_object([moved(sample, torch.device("cpu")) for sample in samples])
            batches = [found[rank * len(samples) + place] for place in range(len(samples)) for rank in range(processes)]
        own = collator.across(batches)[self.accelerator.process_index :: processes]
        return [moved(sample, samples[0]["labels"].device) for sample in own]

    def add_to_curves(self, curves: Mapping[str, Tensor], weight: float | Tensor | None = None) -> None:
        """Adds values of a batch to the means that are logged next.

        Args:
            curves: name of the curve -> its values, whose mean is added; none if there is no value for this batch.
            weight: weight of the mean among those of other batches; by default the number of values.
        """
        if not self._counted:
            weight = 0
        sums = self._sums.setdefault(self.owner, {})
        for name, values in curves.items():
            total, count = sums.get(name, (torch.zeros((), device=self.args.device), 0))
            added = values.numel() if weight is None else weight
            sums[name] = (total + values.mean() * added, count + added) if values.numel() else (total, count)

    def _unlearned(self, model: nn.Module, step: SecondsOfStep) -> Completions:
        """The mean of the second completions of a step in all processes, each of shape (1,), without gradients."""
        if self.owner not in step.log_probs:
            found: list[tuple[Tensor, Tensor]] = []
            for second in step.batches:
                batch: Any = self._prepare_input(second)
                with torch.no_grad(), self.compute_loss_context_manager():
                    values = log_probs(model, batch, chunk_size=self.loss_chunk_size)
                if self.reference is None or step.reference is not None:
                    found.append((values, values))
                else:
                    found.append((values, self._of_the_reference(batch, repeats=self._evaluates)))
            policy, reference = (self._mean([pair[place] for pair in found]) for place in (0, 1))
            step.log_probs[self.owner] = policy
            step.reference = reference if step.reference is None else step.reference
        policy = step.log_probs[self.owner]
        none = torch.ones_like(policy)
        return Completions(policy, step.reference if self.reference else None, none, none)

    def _mean(self, parts: Sequence[Tensor]) -> Tensor:
        """The mean of values of all processes, (1,)."""
        values = torch.cat(list(parts))
        sums = torch.stack([values.sum(), values.new_tensor(len(values))]) * self._counted
        reduced: Any = self.accelerator.reduce
        total: Tensor = reduced(sums, "sum")
        return total[:1] / total[1:]

    def log_probs_of_the_reference(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The log-probabilities of a batch, as the loss compares them with those of the reference."""
        return log_probs(model, batch, chunk_size=self.loss_chunk_size)

    def _reference_log_probs(self, inputs: Mapping[str, Any], batch: Mapping[str, Tensor]) -> Tensor | None:
        """The log-probabilities of the reference, computed once: for all adapters of a sweep, and for all epochs.

        Second completions that are not learned differ in each epoch, because they are drawn from other rows.
        """
        if self.reference is None:
            return None
        known = self._compared
        if known is not None and known[0] is inputs["input_ids"]:
            return known[1]
        found = self._of_the_reference(batch, repeats=not self.objective.generates)
        self._compared = inputs["input_ids"], found
        return found

    def _of_the_reference(self, batch: Mapping[str, Tensor], *, repeats: bool) -> Tensor:
        """The log-probabilities of the reference, which all processes know afterwards if the sequences are repeated.

        With shards, all processes have to compute together, so they do unless each knows those of its batch.
        """
        if not repeats or (is_stream(self.train_dataset) and not self._evaluates):
            return self._compute_reference(batch)
        model: Any = self.model
        digests, processes = digests_of(batch, self.rows_owner), self.accelerator.num_processes
        found = self._known.of(digests)
        if is_sharded(model):
            knows = torch.tensor(float(found is not None), device=self.args.device)
            total: Any = self.accelerator.reduce(knows, "sum")
            found = found if int(total) == processes else None
        new: list[tuple[bytes, float]] = []
        if found is None:
            found = self._compute_reference(batch)
            new = list(zip(digests, found.tolist(), strict=True))
        if processes > 1:
            from accelerate.utils import gather_object

            new = gather_object(new)
        self._known.add(new, found.dtype)
        return found.to(self.args.device)

    def _compute_reference(self, batch: Mapping[str, Tensor]) -> Tensor:
        model: Any = self.model
        assert self.reference is not None
        with torch.no_grad(), self.compute_loss_context_manager(), evaluated(model), self.reference.active():
            return self.log_probs_of_the_reference(model, batch)

    def _switch_off_dropout(self) -> None:
        """Switches off dropout, if the objective does, until the Trainer switches to training mode in the next step.

        So it is off in backward too, where layers are computed again. Layers with gradient checkpointing, and adapters
        without dropout, stay in training mode, which they need for other things; the forward of a checkpointed block,
        which may apply dropout itself, is computed out of training mode.
        """
        model: Any = self.model
        if not getattr(self.objective, "disable_dropout", False):
            return
        checkpoints = is_checkpointing(base_of(model))
        for module in called_modules(model):
            kept = isinstance(module, Adapter) and not getattr(module, "dropout", 0)
            if not (kept or (checkpoints and getattr(module, "gradient_checkpointing", False))):
                module.training = False
            elif isinstance(module, GradientCheckpointingLayer) and module not in self._without_dropout:
                self._without_dropout[module] = _computed_in_eval(module)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; see ``transformers.Trainer``."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for hooks in self._without_dropout.values():
                for hook in hooks:
                    hook.remove()
            self._without_dropout = {}

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of a batch to evaluate on; see ``transformers.Trainer``."""
        size = len(inputs["labels"])
        count = self.rows_counted(size)
        self._counted = count > 0
        try:
            inputs = self._prepare_inputs(first_rows(inputs, max(count, 1), size))
            with torch.no_grad():
                return self.compute_loss(model, inputs).detach(), None, None
        finally:
            self._counted = True

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's evaluation, with the metrics of the objective."""
        sums, self._sums, self._evaluates = self._sums, {}, True
        try:
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
            means = next(iter(self._means().values()), {})
            if output.metrics is not None:
                output.metrics.update(
                    {f"{prefix}_{name}": means[name] for name in self.objective.metrics if name in means}
                )
            return output
        finally:
            self._sums, self._compared, self._evaluates = sums, None, False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of the objective's curves since the last log of a loss."""
        if "loss" in logs and self._sums:
            means = self._means()
            logs = {**logs, **means.pop("", {}), **named_metrics(means)}
            self._sums = {}
        super().log(logs, *args, **kwargs)

    def _means(self) -> dict[str, dict[str, float]]:
        """Owner -> the means of its curves in all processes, without those that have no value in any."""
        found = {}
        for owner, sums in self._sums.items():
            parts = torch.stack([torch.stack([total, torch.full_like(total, count)]) for total, count in sums.values()])
            reduce: Any = self.accelerator.reduce
            totals = zip(sums, reduce(parts.float(), "sum").tolist(), strict=True)
            means = {name: total / count for name, (total, count) in totals if count}
            found[owner] = means | self.objective.summary(means)
        return found

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The Trainer's method; also writes the reference, for a resumed training."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.reference is not None and self.args.should_save:
            model: Any = self.model
            self.reference.write(Path(output_dir))
            self._known.write(Path(output_dir), model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's method; also reads the reference of the training that is resumed."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.reference is not None and checkpoint is not None:
            self.reference.read(Path(checkpoint))
            model: Any = self.model
            self._known.read(Path(checkpoint), model)


def _computed_in_eval(block: nn.Module) -> list[RemovableHandle]:
    """Makes a checkpointed block compute its forward out of training mode, which it needs to be checkpointed."""
    modes: list[bool] = []

    def begin(module: nn.Module, args: Any) -> None:
        modes.append(module.training)
        module.training = False

    def end(module: nn.Module, args: Any, output: Any) -> None:
        module.training = modes.pop()

    return [block.register_forward_pre_hook(begin), block.register_forward_hook(end, always_call=True)]


def _halves(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first and the second completions of a batch."""
    half = len(batch["labels"]) // 2
    first, second = (
        {name: values[rows] for name, values in batch.items()} for rows in (slice(half), slice(half, None))
    )
    return first, second


def _prompts(batch: Mapping[str, Tensor]) -> Tensor:
    """Labels for the prompts of a batch: its tokens without a label, except padding."""
    learned = (batch["labels"] != IGNORED_LABEL) | (batch["attention_mask"] == 0)
    return batch["input_ids"].masked_fill(learned, IGNORED_LABEL)
