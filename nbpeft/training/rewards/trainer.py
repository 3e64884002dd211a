"""The Trainer that generates completions before each step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.checkpoint import inside
from nbpeft.checkpoint.tensor_file import storable, write_tensors
from nbpeft.engine.changes.random_numbers import drawing_from
from nbpeft.errors import CheckpointError, ConfigError
from nbpeft.names import IGNORED_LABEL
from nbpeft.state import Sample
from nbpeft.training.adapters.adapted_model import base_of
from nbpeft.training.adapters.method_state import note, read_state
from nbpeft.training.monitor.callback import RunCallback
from nbpeft.training.monitor.run import StopRun
from nbpeft.training.objectives.grpo import Generated, Grpo, deviation
from nbpeft.training.objectives.log_probs import token_log_probs
from nbpeft.training.rewards.functions import Rewards
from nbpeft.training.rewards.order import PromptOrder
from nbpeft.training.rewards.rollouts import Completion, PromptCollator, batches, check_cache, generated
from nbpeft.training.transformers.objective_trainer import ObjectiveTrainer
from nbpeft.training.watching.generation import whole_characters

_FILE = "completions.safetensors"
_APART = 1_000_003
"""Factor between seeds and steps, so that different seeds draw different completions in all steps."""
_KEPT = ("input_ids", "attention_mask", "labels", "advantages", "share", "earlier", "reference")
"""The tensors of completions in a checkpoint."""


class RolloutTrainer(ObjectiveTrainer):
    """Generates the completions of a step, scores them with the reward functions, and trains on them.

    Completions are drawn with random numbers that depend on the seed and the step alone, so that a resumed training
    draws the same.

    Args:
        *args: arguments of ``ObjectiveTrainer``.
        rewards: the reward functions.
        **kwargs: arguments of ``ObjectiveTrainer``.

    Raises:
        ConfigError: several processes train, or an argument does not support generated completions.
    """

    row_columns: ClassVar[tuple[str, ...]] = ("prompt", "columns", "number")
    objective: Grpo
    data_collator: PromptCollator

    def __init__(self, *args: Any, rewards: Rewards, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise ConfigError("grpo trains in one process, on one device", field="processes")
        self.rewards = rewards
        self._completed: list[dict[str, Any]] = []
        self._checked = False

    # The prompts

    def _get_train_sampler(self, train_dataset: Any = None) -> PromptOrder:
        """A sampler that repeats each prompt for each of its completions; see ``transformers.Trainer``."""
        args, owner = self.args, weakref.ref(self)

        def epoch() -> int:
            trainer = owner()
            return 0 if trainer is None else int(trainer.state.epoch or 0)

        shuffles = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)) != "sequential"
        seed = args.data_seed if args.data_seed is not None else args.seed
        copies = self.objective.num_generations
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return PromptOrder(
            len(rows),
            copies=copies,
            size=args.train_batch_size * args.gradient_accumulation_steps // copies,
            repeats=self.objective.num_iterations,
            seed=seed if shuffles else None,
            epoch=epoch,
        )

    # The completions

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of a step, with the completions of their prompts; see ``transformers.Trainer``."""
        samples, count = super().get_batch_samples(*args, **kwargs)
        if samples and self.state.global_step % self.objective.num_iterations == 0:
            self._completed = []  # its tensors would be in memory during generation
            rows = [row for sample in samples for row in sample["prompts"].rows]
            if not self._checked:
                model: Any = self.model
                check_cache(model, base_of(model), rows[0], self.processing_class)
                self._checked = True
            completions = self._complete(rows, self.state.global_step)
            sizes = [len(sample["prompts"].rows) for sample in samples]
            self._completed, rewards = self._scored(completions, sizes)
            self._show(completions, rewards)
        if samples and len(self._completed) != len(samples):
            raise CheckpointError(
                f"the checkpoint was written with another num_iterations than {self.objective.num_iterations}: it has "
                "no completions to learn again"
            )
        return (self._completed if samples else samples), count

    def _complete(self, rows: Sequence[Mapping[str, Any]], step: int) -> list[Completion]:
        model: Any = self.model
        with drawing_from(self.args.seed * _APART + step), self.compute_loss_context_manager():
            return generated(model, base_of(model), rows, self.processing_class, self.objective, self._stop)

    def _stop(self) -> bool:
        """Ends the run if Stop was requested; the weights are those before the step."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RunCallback) and callback.run.control.stop_requested and callback.run.entered:
                raise StopRun(callback.run)
        return False

    def _scored(
        self, completions: Sequence[Completion], sizes: Sequence[int]
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """Batches of completions with their advantages, and the total reward of each completion."""
        with drawing_from(self.args.seed * _APART + self.state.global_step):
            rewards = self.rewards.of_completions(completions, self.state)
        advantages, whole = self.objective.advantages(rewards)
        self.add_to_curves(self._curves(completions, rewards, whole), len(completions))
        if bool(whole.isnan().any()):
            note(self, "some completions have no reward, as every function returned None: they are not learned")
        if self.objective.mask_truncated_completions and not any(row.ended for row in completions):
            note(self, "nothing is learned from steps whose completions are all cut: raise max_completion_length")
        found = batches(completions, advantages, sizes, self.data_collator.collator, self.objective)
        return found, whole.tolist()

    def _curves(self, completions: Sequence[Completion], rewards: Tensor, whole: Tensor) -> dict[str, Tensor]:
        lengths = torch.tensor([len(row.token_ids) for row in completions], dtype=torch.float32)
        cut = torch.tensor([not row.ended for row in completions], dtype=torch.float32)
        groups = whole.view(-1, self.objective.num_generations)
        found = {"reward": whole.nanmean(), "reward_std": deviation(whole.view(1, -1)).squeeze()}
        for place, name in enumerate(self.rewards.names):
            found[f"rewards/{name}/mean"] = rewards[:, place].nanmean()
            found[f"rewards/{name}/std"] = deviation(rewards[:, place].view(1, -1)).squeeze()
        found |= {"frac_reward_zero_std": (deviation(groups) < 1e-8).float().mean()}
        found |= {"completions/mean_length": lengths.mean(), "completions/clipped_ratio": cut.mean()}
        return {name: value for name, value in found.items() if not bool(value.isnan())}

    def _show(self, completions: Sequence[Completion], rewards: Sequence[float]) -> None:
        """Gives the best and the worst completion of the first prompt to the run."""
        group = list(zip(completions, rewards, strict=True))[: self.objective.num_generations]
        known = sorted((pair for pair in group if pair[1] == pair[1]), key=lambda pair: -pair[1])
        step = self.state.global_step + 1
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RunCallback) and known:
                callback.run.rewarded(
                    Sample(step, row.prompt_text, whole_characters(row.text), reward=reward, cut=not row.ended)
                    for row, reward in (known[0], known[-1])
                )

    # The loss

    def items_in(self, batch: Mapping[str, Any]) -> Tensor:
        """The number of completions of a batch of prompts, (1,); its loss has its share of the step already."""
        return torch.tensor([float(len(batch["prompts"].rows))])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch of completions; see ``transformers.Trainer``."""
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        reference = inputs.get("reference")
        if reference is None:
            reference = self._reference_log_probs(inputs, batch)
        is_learned = model.training  # switching dropout off may end it
        self._switch_off_dropout()
        with self.compute_loss_context_manager():
            found = token_log_probs(
                model, batch, temperature=self.objective.temperature, chunk_size=self.loss_chunk_size
            )
        earlier = inputs.get("earlier", found.detach())
        if self.objective.num_iterations > 1 and is_learned:
            computed = {"earlier": earlier, "reference": reference}
            self._completed[inputs["place"]].update({name: part for name, part in computed.items() if part is not None})
        loss, curves = self.objective.loss_of(
            Generated(
                log_probs=found,
                earlier=earlier,
                reference=reference,
                mask=(batch["labels"][:, 1:] != IGNORED_LABEL).to(found),
                advantages=inputs["advantages"],
                share=inputs["share"],
            )
        )
        self.add_to_curves(curves)
        return (loss, {}) if return_outputs else loss

    def log_probs_of_the_reference(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The log-probability of each token."""
        return token_log_probs(model, batch, temperature=self.objective.temperature, chunk_size=self.loss_chunk_size)

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of the completions of some evaluation rows, whose rewards are curves."""
        copies = self.objective.num_generations
        rows = [row for row in inputs["prompts"].rows for _ in range(copies)]
        size = max(1, self.args.eval_batch_size // copies) * copies
        losses: list[Tensor] = []
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            completions = self._complete(part, -1 - first - part[0]["number"])
            for batch in self._scored(completions, [len(part)])[0]:
                with torch.no_grad():
                    loss = self.compute_loss(model, self._prepare_inputs(batch)).detach()
                losses += [loss.expand(len(part))]
        return torch.cat(losses).mean(), None, None

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The Trainer's method; also writes completions that further steps learn."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.state.global_step % self.objective.num_iterations == 0:
            return
        tensors = {
            f"{batch['place']}.{name}": batch[name] for batch in self._completed for name in _KEPT if name in batch
        }
        write_tensors(Path(output_dir) / _FILE, storable(tensors), {})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's method; also reads completions that further steps learn."""
        super()._load_optimizer_and_scheduler(checkpoint)
        file = Path(checkpoint or "") / _FILE
        if checkpoint is None or not inside.leads_to_file(file):
            return
        model: Any = self.model
        tensors, _ = read_state(file, model)
        places = sorted({int(name.partition(".")[0]) for name in tensors})
        self._completed = [
            {"place": place, **{name: tensors[key] for name in _KEPT if (key := f"{place}.{name}") in tensors}}
            for place in places
        ]
