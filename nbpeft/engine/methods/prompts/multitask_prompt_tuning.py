"""Multitask prompt tuning: one prompt for all tasks, times a low-rank matrix of each (Wang et al. 2023, 2303.02861).

    x' = [P ∘ (u_t v_t), E(x)]        P: (n, features), u_t: (n, r), v_t: (r, features) for task t, all trained

Each call says with ``task_ids`` (rows,) which task a row is of.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.manual_prompts import note_requested
from nbpeft.engine.calls.task_ids import TASK_IDS, checked_task_ids
from nbpeft.engine.calls.token_prompt import TokenPrompt, base_of_embedding
from nbpeft.engine.config.prompt_config import PROMPT_KEY, InitialisedPromptConfig, prompt_listing
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.method_records import CallInputs, FileFormat
from nbpeft.engine.contract.registry import register
from nbpeft.errors import ConfigError

_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"


class MultitaskPromptTuningInit(str, enum.Enum):
    """How prompt and matrices are initialized: the last three read a trained file. Values as in PEFT's files."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


@dataclass
class MultitaskPromptTuningConfig(InitialisedPromptConfig):
    """Config of multitask prompt tuning. Field names and defaults are PEFT's; see ``InitialisedPromptConfig``.

    Attributes:
        prompt_tuning_init: what prompt and matrices start as.
        prompt_tuning_init_state_dict_path: file of the trained adapter to start from.
        prompt_tuning_init_task: number of the task in it, for EXACT_SOURCE_TASK.
        num_ranks: rank of each task's matrix.
        num_tasks: number of tasks.
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = field(default=MultitaskPromptTuningInit.RANDOM)
    prompt_tuning_init_state_dict_path: str | None = field(default=None)
    prompt_tuning_init_task: int | None = field(default=0)
    num_ranks: int | None = field(default=1)
    num_tasks: int | None = field(default=1)

    counts: ClassVar[tuple[str, ...]] = (*InitialisedPromptConfig.counts, "num_ranks", "num_tasks")
    method_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"prompt_tuning_init": tuple(MultitaskPromptTuningInit)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of_a_source and self.prompt_tuning_init_state_dict_path is None:
            raise ConfigError(
                "prompt_tuning_init_state_dict_path needs to be specified with prompt_tuning_init="
                f"{str(getattr(self.prompt_tuning_init, 'value', self.prompt_tuning_init))!r}",
                field="prompt_tuning_init_state_dict_path",
            )

    @property
    def of_a_source(self) -> bool:
        """Whether it starts from a trained file."""
        return self.starts_as("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@register(
    MultitaskPromptTuningConfig,
    label="multitask prompt tuning",
    listing=prompt_listing(
        when="several related tasks with little data each",
        paper="arXiv:2303.02861",
        more=lambda config: {"tasks": str(config.num_tasks), "r": str(config.num_ranks)},
    ),
    sample_configs={"two-tasks": {"num_virtual_tokens": 4, "num_tasks": 2, "num_ranks": 2}},
    files=FileFormat(keys={"embedding.weight": PROMPT_KEY}),
    calls=CallInputs(context=lambda config, args, kwargs: kwargs.get(TASK_IDS), arguments=(TASK_IDS,)),
)
class MultitaskPromptEmbedding(TokenPrompt):
    """The prompt, and two factors for each task.

    Args:
        config: the method's config.
        word_embeddings: the model's input embedding, for the initial values of a prompt that a script makes itself.

    Attributes:
        prefix_task_cols: (tasks, tokens, r).
        prefix_task_rows: (tasks, r, features).
    """

    call_argument: ClassVar[str] = TASK_IDS
    prefix_task_cols: nn.Parameter
    prefix_task_rows: nn.Parameter

    def __init__(self, config: MultitaskPromptTuningConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, None if config.of_a_source else word_embeddings)
        tasks, rank, width = int(config.num_tasks or 1), int(config.num_ranks or 1), int(config.token_dim or 0)
        self.decoder_token_count = self.token_count if config.num_transformer_submodules == 2 else 0
        self.prefix_task_cols = nn.Parameter(torch.empty(tasks, config.total_tokens, rank).normal_(0, 0.02))
        self.prefix_task_rows = nn.Parameter(torch.empty(tasks, rank, width).normal_(0, 0.02))
        if config.of_a_source and word_embeddings is not None:
            with torch.no_grad():
                self.initialise(config, base_of_embedding(word_embeddings))

    def initialise(self, config: Any, base: BaseLayer) -> None:
        """Copies rows of the model's embedding, or a trained file."""
        if not config.of_a_source:
            super().initialise(config, base)
            return
        found = config.stored_tensors(str(config.prompt_tuning_init_state_dict_path))
        chosen = {"embedding.weight": found.get(PROMPT_KEY)}
        if not config.starts_as("ONLY_SOURCE_SHARED"):
            for name in (_COLUMNS, _ROWS):
                chosen[name] = _of_tasks(config, found.get(name))
        for name, value in chosen.items():
            own = self.get_parameter(name)
            if value is None or value.shape != own.shape:
                shape = "nothing" if value is None else tuple(value.shape)
                raise ConfigError(
                    f"prompt_tuning_init_state_dict_path has {shape} for {name}, expected {tuple(own.shape)}",
                    field="prompt_tuning_init_state_dict_path",
                )
            own.copy_(value)

    def all_tokens(self, base: BaseLayer) -> Tensor:
        """The prompts (rows, tokens, features) of the tasks that the call names."""
        return self.embedding.weight * self._task_factors(base.context)

    def tokens_at(self, ids: Tensor, *task_ids: Tensor) -> Tensor:
        """Rows of its embedding, (rows, tokens), times the matrices of the tasks."""
        factors = self._task_factors(*task_ids or (None,))
        note_requested()
        rows: Tensor = self.embedding(ids)
        return rows * factors

    def _task_factors(self, task_ids: Any) -> Tensor:
        """The matrices of tasks, (rows, tokens, features)."""
        ids = checked_task_ids(task_ids, len(self.prefix_task_cols)).to(self.prefix_task_cols.device)
        return self.prefix_task_cols[ids] @ self.prefix_task_rows[ids]

    def decoder_tokens(self, base: BaseLayer) -> Tensor:
        return self.all_tokens(base)[:, self.token_count :]


def _of_tasks(config: MultitaskPromptTuningConfig, tensor: Tensor | None) -> Tensor | None:
    """The mean over the tasks in a file, or one task, (1, …)."""
    if tensor is None:
        return None
    if config.starts_as("AVERAGE_SOURCE_TASKS"):
        return tensor.mean(0, keepdim=True)
    task = config.prompt_tuning_init_task or 0
    if not 0 <= task < len(tensor):
        raise ConfigError(
            f"prompt_tuning_init_task is {task}, but the file has {len(tensor)} tasks", field="prompt_tuning_init_task"
        )
    return tensor[task : task + 1]
