"""PVeRA: VeRA with a normal distribution between the projections (Fillioux et al. 2025, arXiv:2512.07703).

    y = W x + b ∘ B z        z ~ N(μ, σ²) in training, z = μ elsewhere;   μ, log σ² = the halves of d ∘ (A x)

A: (2 r, in), B: (out, r), frozen and shared by all layers. Merging and conversion to LoRA use the mean; with
``sample_at_inference`` the sampling is lost. With a ``generator_seed`` each layer draws from its own generator, which
starts at the seed whenever the adapter is created or loaded.

When activation checkpointing recomputes a call, the same numbers are drawn again; PEFT draws new numbers from a
generator with a seed, so its gradients are those of another call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nbpeft.engine.config.config_checks import check_seed
from nbpeft.engine.config.targets import usual_targets
from nbpeft.engine.contract.adapter import ConvertsToLora, LowRankDelta
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.method_records import FileFormat, Listing, SharedTensors
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.contract.training_hooks import HasTrainingState
from nbpeft.engine.kernels.numerics import compute_dtype
from nbpeft.engine.methods.projections.projected_vectors import ProjectedVectors, Projections, VectorsConfig
from nbpeft.errors import TrainingError

_GENERATOR = "generator"
"""Name in the training state."""
_CALLS = 256
"""So many calls of a layer are remembered that checkpointing may compute again; 5 kB each."""


@dataclass
class PveraConfig(VectorsConfig):
    """Config of PVeRA. Field names and defaults are PEFT's; see ``LayersConfig`` for the target fields.

    Attributes:
        pvera_dropout: dropout probability of the adapter's input, from 0 to 1.
        sample_at_inference: draw in evaluation too, instead of taking the mean.
        generator_seed: seed of the numbers that each layer draws; None for those of torch.
    """

    pvera_dropout: float = field(default=0.0)
    sample_at_inference: bool = field(default=False)
    generator_seed: int | None = field(default=None)

    method_type: ClassVar[str] = "PVERA"
    shares: ClassVar[tuple[str, ...]] = ("pvera_dropout",)
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"bias": ("none", "all", "pvera_only")}
    value_fields: ClassVar[tuple[str, ...]] = ("pvera_dropout", "sample_at_inference", "generator_seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generator_seed is not None:
            check_seed("generator_seed", self.generator_seed)

    @property
    def dropout(self) -> float:
        """Dropout probability of the adapter's input."""
        return self.pvera_dropout

    def normals(self, path: str) -> Normals | None:
        """The generator of a layer, if it has a separate one."""
        return None if self.generator_seed is None else Normals(self.generator_seed)


class Normals:
    """Standard normal numbers from a seed, on the CPU; a recomputed call gets the numbers of the original call.

    Args:
        seed: seed of the first call.

    Attributes:
        first_state: state of the generator, for the first call.
    """

    def __init__(self, seed: int) -> None:
        self._state = self.first_state = torch.Generator().manual_seed(seed).get_state()
        self._calls: deque[tuple[int, Tensor]] = deque(maxlen=_CALLS)

    @property
    def state(self) -> Tensor:
        """State of the generator, for the next call."""
        return self._state

    def continue_from(self, state: Tensor) -> None:
        """Sets the state, for resuming training."""
        self._state = state.clone()
        self._calls.clear()

    def like(self, tensor: Tensor) -> Tensor:
        """Draws numbers with the shape, dtype and device of a tensor."""
        start = self._start_of_this_call()
        generator = torch.Generator()
        generator.set_state(self._state if start is None else start)
        drawn = torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
        if start is None:
            self._calls.append((torch._C._autograd._get_sequence_nr(), self._state))
            self._state = generator.get_state()
        return drawn.to(tensor.device)

    def _start_of_this_call(self) -> Tensor | None:
        """The generator's state at the start of a call that backward recomputes; None in any other call.

        Autograd numbers its nodes consecutively. The running node is the last one of the recomputed call or, if one
        node represents the whole call, it comes just before the call's draw.

        Raises:
            TrainingError: too many calls came after it, so its state is no longer stored.
        """
        node = None if torch._C._current_graph_task_id() == -1 else torch._C._current_autograd_node()
        if node is None:
            return None
        before = [state for number, state in list(self._calls) if number - 1 <= node._sequence_nr()]
        if not before and len(self._calls) == _CALLS:
            raise TrainingError(
                f"PVeRA with a generator_seed remembers the draws of a layer's last {_CALLS} calls, and checkpointing "
                "computes an earlier one again: call backward() sooner, or leave generator_seed at None"
            )
        return before[-1] if before else None


class WideProjections(Projections):
    """A, (2 r, largest in), and B, (largest out, r): frozen, and drawn from a seed."""

    names: ClassVar[tuple[str, str]] = ("pvera_A", "pvera_B")
    rows_of_rank: ClassVar[int] = 2


@register(
    PveraConfig,
    peft_type="PVERA",
    draws_in_training=True,
    label="PVeRA",
    listing=Listing(
        when="like VeRA, for few examples: a probabilistic version that avoids overconfidence",
        paper="arXiv:2512.07703",
        summary=lambda config: {"r": str(config.r)},
        smaller=lambda config: config.copy(r=config.r // 2) if config.r > 1 else None,
    ),
    default_targets=lambda model_type: ["q_proj", "v_proj"] if model_type == "phi" else usual_targets(model_type),
    sample_configs={
        "r8": {"r": 8, "generator_seed": 3},
        "drawn": {"r": 5, "save_projection": False, "generator_seed": 0},
    },
    files=FileFormat(prefix="pvera_lambda_"),
    shares=SharedTensors(state=WideProjections),
)
class Pvera(ProjectedVectors, ConvertsToLora, HasTrainingState):
    """The two vectors of one layer: b, over its outputs, and d, over the mean and the logarithm of the variance."""

    names: ClassVar[tuple[str, str]] = ("pvera_lambda_b", "pvera_lambda_d")
    between: ClassVar[type[Projections]] = WideProjections
    peft: ClassVar[PeftNames] = PeftNames(
        "pvera_lambda_b pvera_lambda_d",
        "pvera_A pvera_B pvera_dropout r sample_at_inference pvera_generator",
        attributes={
            **{name: f"projections.{name}" for name in WideProjections.names},
            "r": "delta_rank",
            "sample_at_inference": "samples",
        },
    )
    from_config: ClassVar[Mapping[str, str]] = {
        "dropout": "dropout",
        "samples": "sample_at_inference",
        "normals": "normals",
    }
    identity: ClassVar[Mapping[str, float]] = {"pvera_lambda_b": 0.0}

    samples: bool
    normals: Normals | None

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """``b ∘ B z``; see ``Adapter``."""
        A, B, d, b = self.parts(base)  # (2 r, in), (out, r), (2 r,), (out,)
        dtype = compute_dtype(x, b)
        dropped = F.dropout(x.to(dtype), self.dropout, self.training)
        if self.training or self.samples:
            mean, log_variance = (F.linear(dropped, A.to(dtype)) * d.to(dtype)).chunk(2, dim=-1)
            z = mean + self._normals_like(mean) * (0.5 * log_variance).exp()
        else:
            z = F.linear(dropped, A[: B.shape[1]].to(dtype)) * d[: B.shape[1]].to(dtype)
        return F.linear(z, B.to(dtype)) * b.to(dtype)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """The delta of the mean; see ``Adapter``."""
        product = self.low_rank_delta(base)
        return product.up @ product.down

    @torch.no_grad()
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        """``d ∘ A`` of the mean and ``b ∘ B``; see ``ConvertsToLora``."""
        A, B, d, b = self.parts(base)
        rank = B.shape[1]
        return LowRankDelta(A[:rank] * d[:rank, None], B * b[:, None], 1.0)

    def _normals_like(self, tensor: Tensor) -> Tensor:
        if self.normals is None:
            return torch.randn_like(tensor)
        draw: Any = self.normals.like
        if torch.compiler.is_compiling():  # torch.compile does not support generators
            draw = torch.compiler.disable(draw)
        drawn: Tensor = draw(tensor)
        return drawn

    @property
    def has_training_state(self) -> bool:
        """Whether the layer has its own generator; see ``HasTrainingState``."""
        return self.normals is not None

    def training_state(self) -> dict[str, Tensor]:
        """The state of the generator; see ``HasTrainingState``."""
        return {} if self.normals is None else {_GENERATOR: self.normals.state}

    def set_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets the state of the generator; see ``HasTrainingState``."""
        if self.normals is not None:
            self.normals.continue_from(state.get(_GENERATOR, self.normals.first_state))
