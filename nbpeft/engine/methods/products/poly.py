"""Polytropon: skills that tasks share, mixed for each (Ponti et al. 2022, arXiv:2202.13914; Caccia et al., 2211.03831).

    y = W x + 1 / r B A x        A = Σ_s p_s A_s,  B = Σ_s p_s B_s,  p = σ(z_t) / Σ_s σ(z_ts) for the task t of the row

Each call has the task of each row in ``task_ids`` (rows,), which is optional if there is only one task. With
``n_splits`` the inputs of A and the outputs of B are split into as many parts, each with its own shares (multi-head
routing). In training the shares are drawn for each row, from a relaxed Bernoulli distribution with the logits z: σ(z +
log u / (1 - u)) with u uniform. With one task the delta in evaluation is a change of the weight, which can be merged or
converted to a LoRA; with several tasks it is not.

All beams of a row have the row's task, and a negative task is refused; PEFT raises for beams, and counts negative tasks
from the last one. PEFT does not merge, and passes the tasks on only to models with a task type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.task_ids import TASK_IDS, checked_task_ids
from nbpeft.engine.config.config_checks import check_divides, check_linear
from nbpeft.engine.config.layers_config import LayersConfig
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import Adapter, AdapterSite, ConvertsToLora, HotSwaps, LowRankDelta, ShowsModules
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shape, Shapes
from nbpeft.engine.contract.bindable import axis_size
from nbpeft.engine.contract.initial_draws import linear_, uniform_
from nbpeft.engine.contract.method_records import CallInputs, FileFormat, Listing
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.weight_delta import keeping_inputs
from nbpeft.engine.kernels.numerics import compute_dtype
from nbpeft.engine.views.part_modules import ParameterModule
from nbpeft.errors import AdapterError

A, B, ROUTER, LOGITS = "poly_lora_A", "poly_lora_B", "poly_router", "module_logits"
_LARGEST_LOGIT = 1e-3
"""To each side, of a new router."""


@dataclass
class PolyConfig(LayersConfig):
    """Config of Polytropon. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    With several tasks, calls say with ``task_ids`` (rows,), and rows of a training in a column of that name, which
    task each row is of.

    Attributes:
        r: rank of each skill.
        init_weights: start at the base model; False for random skills.
        poly_type: how skills are mixed; ``poly`` is the only way.
        n_tasks: number of tasks.
        n_skills: number of skills that the tasks share.
        n_splits: into how many parts inputs and outputs are cut, which it divides; more than 1 for multi-head routing.
    """

    r: int = field(default=8)
    init_weights: bool = field(default=True)
    poly_type: str = field(default="poly")
    n_tasks: int = field(default=1)
    n_skills: int = field(default=4)
    n_splits: int = field(default=1)

    method_type: ClassVar[str] = "POLY"
    not_in_peft: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")
    counts: ClassVar[tuple[str, ...]] = ("r", "n_tasks", "n_skills", "n_splits")
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"poly_type": ("poly",)}
    value_fields: ClassVar[tuple[str, ...]] = ("init_weights",)


def _tasks_of_rows(config: PolyConfig, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return checked_task_ids(kwargs.get(TASK_IDS), config.n_tasks)


@register(
    PolyConfig,
    draws_in_training=True,
    label="Polytropon",
    listing=Listing(
        when="multi-task training: tasks share skills, and a new task learns how to mix them",
        paper="arXiv:2202.13914",
        summary=lambda config: {
            "r": str(config.r),
            "tasks": str(config.n_tasks),
            "skills": str(config.n_skills),
        },
    ),
    default_targets=usual_targets,
    sample_configs={"one-task": {"r": 4}, "split": {"r": 2, "n_skills": 3, "n_splits": 4}},
    files=FileFormat(keys={ROUTER: f"{ROUTER}.{LOGITS}"}),
    calls=CallInputs(context=_tasks_of_rows, arguments=(TASK_IDS,)),
)
class Polytropon(Adapter, ConvertsToLora, ShowsModules, HotSwaps):
    """The skills of one layer, A and B, and which of them each task uses.

    Attributes:
        poly_lora_A: (splits, skills, in / splits, r).
        poly_lora_B: (splits, skills, r, out / splits).
        poly_router: (tasks, splits · skills), logits.
    """

    peft: ClassVar[PeftNames] = PeftNames(
        "poly_lora_A poly_lora_B poly_router",
        "r n_tasks n_skills n_splits poly_type",
        wrapped=(ROUTER,),
        names_in_modules={ROUTER: LOGITS},
        attributes={
            **{"r": "rank", "n_tasks": "task_count", "n_skills": "skill_count", "n_splits": "split_count"},
            "poly_type": "poly_type",
        },
    )
    poly_type: ClassVar[str] = "poly"
    identity: ClassVar[Mapping[str, float]] = {B: 0.0}

    @classmethod
    def parameter_shapes(cls, config: PolyConfig, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The skills and the router."""
        check_linear("Polytropon", path, kind)
        splits, skills, (inputs, outputs) = config.n_splits, config.n_skills, kind.features(module)
        check_divides("n_splits", splits, path, (inputs, outputs))
        return {
            ROUTER: (config.n_tasks, splits * skills),
            A: (splits, skills, inputs // splits, config.r),
            B: (splits, skills, config.r, outputs // splits),
        }

    @classmethod
    def initial_tensors(cls, config: PolyConfig, site: AdapterSite) -> Mapping[str, Tensor]:
        first = _skills(site.shapes[A], site)
        second = site.new(site.shapes[B]) if config.init_weights else _skills(site.shapes[B], site)
        router = site.new(site.shapes[ROUTER], partial(uniform_, bound=_LARGEST_LOGIT))
        return {A: first, B: second, ROUTER: router}

    rank: int = axis_size(A, 3)  # The rank of each skill
    delta_rank = rank

    task_count: int = axis_size(ROUTER)  # Number of tasks of the router
    skill_count: int = axis_size(A, 1)  # Number of skills that are mixed
    split_count: int = axis_size(A)  # Number of parts with separate shares

    @classmethod
    def size_of(cls, shapes: Mapping[str, Shape]) -> int | None:
        return shapes[A][3]

    def shares(self, ids: Tensor, *, drawn: bool) -> Tensor:
        """The share of each skill for each row, (rows, splits, skills), float32 or wider.

        Args:
            ids: the task of each row, int64, (rows,).
            drawn: sample the shares, as in training.
        """
        logits = self.tensor(ROUTER)
        chosen = logits[ids.to(logits.device)].view(len(ids), self.split_count, self.skill_count)
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        if drawn:
            chosen = chosen + torch.rand_like(chosen).logit(torch.finfo(chosen.dtype).eps)
        weights: Tensor = chosen.sigmoid()
        return weights / (weights.sum(-1, keepdim=True) + 1e-12)

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """The mixed skills of each row's task, applied to it.

        The context of ``base`` is the task of each row of the call, (rows,), or None for a single task; with beams the
        input has several rows for each of them.

        Raises:
            AdapterError: the input does not have the rows of the batch in front.
        """
        ids = base.context if isinstance(base.context, Tensor) else checked_task_ids(base.context, self.task_count)
        shares = self.shares(self._of_each_row(ids, x), drawn=self.training)
        return keeping_inputs(_mixed, x, self.tensor(A), self.tensor(B), shares, keeps_little=True)

    def _of_each_row(self, ids: Tensor, x: Tensor) -> Tensor:
        """The task of each row of an input, (rows,); (1,) if all rows use one mixture."""
        rows = len(x) if x.dim() > 1 else 1
        if len(ids) == 1:
            return ids.expand(rows) if self.training else ids
        beams, rest = divmod(rows, len(ids))
        if rest or not beams or (beams > 1 and x.dim() == 2):
            raise AdapterError(
                f"task_ids has {len(ids)} rows, but the input of a layer with Polytropon has shape {tuple(x.shape)}: "
                "pass one number for each row, and do not target layers whose input does not start with the rows"
            )
        return ids.repeat_interleave(beams)

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta | None:
        if self.task_count > 1:
            return None
        shares = self.shares(checked_task_ids(None, 1), drawn=False)
        down, up = _factors(self.tensor(A), self.tensor(B), shares)
        return LowRankDelta(down[0].T, up[0].T, 1 / self.rank)

    def unmergeable_reason(self, base: BaseLayer) -> str:
        return "a weight: Polytropon mixes its skills by the task of each row" if self.task_count > 1 else ""

    def peft_module(self, name: str, base: BaseLayer) -> nn.Module | None:
        return PolyRouter()


class PolyRouter(ParameterModule):
    """The router of a layer, as PEFT shows it: ``layer.poly_router["default"]``."""

    def forward(self, task_ids: Tensor | None, input_ids: Tensor | None = None) -> Tensor:
        """How much of each skill rows of some tasks get; see ``Polytropon.shares``."""
        ids = checked_task_ids(task_ids, self.adapter.task_count)
        return self.adapter.shares(ids, drawn=self.training)


def _skills(shape: Sequence[int], site: AdapterSite) -> Tensor:
    """New matrices (splits, skills, n, m), each drawn as the weight of a layer with n inputs."""
    splits, skills, inputs, outputs = shape
    made = torch.empty(tuple(shape), device=site.base.device, dtype=site.dtype)
    for skill in range(skills):
        for split in range(splits):
            made[split, skill] = site.new((outputs, inputs), linear_).T
    return made


def _mixed(x: Tensor, first: Tensor, second: Tensor, shares: Tensor) -> Tensor:
    """The output of the skills, (rows, …, out), for an input (rows, …, in); one mixture is used for all rows."""
    dtype, rank, rows = compute_dtype(x, first), first.shape[3], len(shares)
    down, up = _factors(first.to(dtype), second.to(dtype), shares)
    tokens = x.to(dtype).reshape(rows, x.shape[:-1].numel() // max(1, rows), x.shape[-1])
    return (tokens @ down @ up / rank).reshape(*x.shape[:-1], up.shape[2])


def _factors(first: Tensor, second: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The mixture of the skills of each row: (rows, in, r) and (rows, r, out), in the dtype of the skills."""
    shares = shares.to(first.dtype)
    down = torch.einsum("bqs,qsdr->bqdr", shares, first).flatten(1, 2)
    up = torch.einsum("bqs,qsrd->brqd", shares, second).flatten(2)
    return down, up
