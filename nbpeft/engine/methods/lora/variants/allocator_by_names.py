"""``model.base_model.rankallocator``: the allocator of an AdaLoRA by PEFT's names of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.engine.tree.model_tree import manager_of

FACTORS = ("lora_A", "lora_B", "lora_E")


class RankAllocator:
    """What scripts read and call of PEFT's object of that name; the model's own allocator does the work.

    Args:
        model: a model with the adapter.
        config: accepted for compatibility with PEFT and ignored; it is the adapter's.
        adapter_name: name of the adapter.
    """

    __slots__ = ("_state", "adapter_name")  # other attributes cannot be set, which would have no effect

    def __init__(self, model: nn.Module, config: object, adapter_name: str) -> None:
        manager: Any = manager_of(model)
        self._state = manager.shared(adapter_name)
        self.adapter_name = adapter_name

    @property
    def config(self) -> Any:
        """The config of the adapter."""
        return self._state.config

    @property
    def beta1(self) -> float:
        """Decay of the moving average of the importance."""
        return float(self.config.beta1)

    @property
    def beta2(self) -> float:
        """Decay of the moving average of its uncertainty."""
        return float(self.config.beta2)

    @property
    def name_set(self) -> list[str]:
        """The layers: names of their parameters with ``%s`` for the factor."""
        return sorted(f"{path}.%s.{self.adapter_name}" for path in self._state.adapters)

    @property
    def init_bgt(self) -> int:
        """Number of ranks of all layers."""
        return sum(adapter.rank for adapter in self._state.adapters.values())

    @property
    def target_bgt(self) -> int:
        """Number of ranks that are left at the end."""
        return int(self.config.target_r) * len(self._state.adapters)

    @property
    def exp_avg_ipt(self) -> dict[str, Tensor]:
        """Name of a parameter -> moving average of the importance of its entries; empty before the first step."""
        return self._averages(0)

    @property
    def exp_avg_unc(self) -> dict[str, Tensor]:
        """Name of a parameter -> moving average of the uncertainty of its entries; empty before the first step."""
        return self._averages(1)

    def _averages(self, which: int) -> dict[str, Tensor]:
        measured = self._state.importance
        return {
            f"{path}.{factor}.{self.adapter_name}": measured[path, factor][which]
            for path in self._state.adapters
            for factor in FACTORS
            if (path, factor) in measured
        }

    def set_total_step(self, total_step: int) -> None:
        """Sets the number of optimizer steps of the training."""
        self.config.total_step = total_step

    def reset_ipt(self) -> None:
        """Forgets the importance that was measured."""
        self._state.importance.clear()

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """Returns the number of ranks that are left after a step, and whether ranks are pruned in it."""
        config = self.config
        if step <= config.tinit:
            return self.init_bgt, False
        if step > config.last_allocation:
            return self.target_bgt, True
        return config.budget_at(step, len(self._state.adapters)), step % config.deltaT == 0

    @torch.no_grad()
    def update_ipt(self, model: object = None) -> None:
        """Measures the importance of each entry; the gradients of the step must be there.

        Args:
            model: accepted for compatibility with PEFT and ignored.
        """
        self._state.bind(reported=True)
        self._state.measure()

    @torch.no_grad()
    def mask_to_budget(self, model: object, budget: int) -> dict[str, list[bool]]:
        """Prunes the least important ranks.

        Args:
            model: accepted for compatibility with PEFT and ignored.
            budget: number of ranks to keep.

        Returns:
            Name of the singular values of a layer -> which of its ranks are left.
        """
        self._state.prune(budget)
        left = {path: self.config.ranks_left(path) for path in self._state.adapters}
        return {f"{path}.{FACTORS[2]}.{self.adapter_name}": flags for path, flags in left.items() if flags is not None}

    def update_and_allocate(
        self, model: object, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """Measures the importance until the last pruning, and prunes in the steps of the schedule.

        Args:
            model: accepted for compatibility with PEFT and ignored.
            global_step: number of the optimizer step, from 0.
            force_mask: prune in any step.

        Returns:
            The number of ranks of the schedule, and what ``mask_to_budget`` returns; None if nothing is pruned.
        """
        if global_step < self.config.last_allocation:
            self.update_ipt()
        budget, prunes = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(model, budget) if prunes or force_mask else None

    def mask_using_rank_pattern(self, model: object, rank_pattern: Mapping[str, list[bool]]) -> None:
        """Prunes all ranks but those of a pattern.

        Args:
            model: accepted for compatibility with PEFT and ignored.
            rank_pattern: what ``mask_to_budget`` returned, or that of a saved config.
        """
        for path, adapter in self._state.adapters.items():
            own = f"{path}.{FACTORS[2]}"
            flags = rank_pattern[own if own in rank_pattern else f"{own}.{self.adapter_name}"]
            present = [flag for flag, has in zip(flags, adapter.flags_of_places, strict=True) if has]
            adapter.keep_ranks_(torch.tensor(present, dtype=torch.bool))
