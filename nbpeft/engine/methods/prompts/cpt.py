"""Context-aware prompt tuning: examples in front of the input, whose embeddings are trained a little (2410.17222).

    x' = [e_1 + d_1 … e_n + d_n, E(x)]        e: (n, features), of the examples, frozen; d: trained, |d_i| <= ε_i

Each token has a type: in the k-th example 4k + 1 for the format around its input, 4k + 2 for the input, 4k + 3 for
the format around its output, 4k + 4 for the output, which the model learns; 0 is none of these. Calls with labels may
say the types of their own tokens as ``input_type_mask`` (rows, length), counted from the first example; without it
all are output. ε_i is ``opt_projection_format_epsilon`` for types 4k + 1 and 4k + 3, ``opt_projection_epsilon`` for
4k + 2, each times sqrt(features / 2048); the embeddings of outputs are not changed. With
``opt_weighted_loss_type="decay"`` each earlier output counts ``opt_loss_decay_factor`` times as much as the next one.

In PEFT the types of the input come after the largest type of the examples: if that is not an output, they change their
meaning, and with the defaults nothing is learned (the loss is NaN); here they start after the last example. PEFT
writes to the caller's ``input_type_mask``, takes the loss's settings from the adapter named ``default``, and sums the
losses of accumulated batches. Its file contains only the sum e + d, so d restarts at zero. Here the file has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.manual_prompts import note_requested
from nbpeft.engine.calls.model_properties import has_encoder
from nbpeft.engine.calls.token_prompt import TokenPrompt
from nbpeft.engine.config.prompt_config import PROMPT_KEY, PromptLearningConfig, prompt_listing
from nbpeft.engine.contract.adapter import TaskType
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.method_records import CallInputs, FileFormat
from nbpeft.engine.contract.model_adapter import WeighsTokens
from nbpeft.engine.contract.registry import register
from nbpeft.errors import AdapterError, ConfigError, shown

_TYPES = "input_type_mask"
_ROWS, _DELTA = "embedding.weight", "delta_embedding.weight"
_PER_EXAMPLE = 4
"""Types of tokens of one example."""
_WIDTH = 2048
"""Number of features for which a radius applies without scaling."""
_FIXED = 1e-10
"""Radius for tokens that are not trained, as in PEFT."""


@dataclass
class CPTConfig(PromptLearningConfig):
    """Config of context-aware prompt tuning. Field names and defaults are PEFT's; see ``PromptLearningConfig``.

    Attributes:
        cpt_token_ids: the tokens of the examples; their number is ``num_virtual_tokens``.
        cpt_mask: unused, as in PEFT; must be as long as the tokens.
        cpt_tokens_type_mask: the type of each token; by default 1, the format around an input.
        opt_weighted_loss_type: "none", or "decay" where earlier examples count less.
        opt_loss_decay_factor: the weight of an output's loss relative to that of the next output.
        opt_projection_epsilon: the largest change of the embeddings of inputs.
        opt_projection_format_epsilon: likewise, for the format around inputs and outputs.
        tokenizer_name_or_path: unused, as in PEFT.

    Raises:
        ConfigError: a value is invalid, or ``task_type`` is not CAUSAL_LM.
    """

    cpt_token_ids: list[int] | None = field(default=None)
    cpt_mask: list[int] | None = field(default=None)
    cpt_tokens_type_mask: list[int] | None = field(default=None)
    opt_weighted_loss_type: str | None = field(default="none")
    opt_loss_decay_factor: float | None = field(default=1.0)
    opt_projection_epsilon: float | None = field(default=0.1)
    opt_projection_format_epsilon: float | None = field(default=0.1)
    tokenizer_name_or_path: str | None = field(default=None)

    not_negative: ClassVar[tuple[str, ...]] = (
        *("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"),
    )
    method_type: ClassVar[str] = "CPT"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"opt_weighted_loss_type": ("none", "decay", None)}

    def __post_init__(self) -> None:
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        count = len(self.cpt_token_ids) if isinstance(self.cpt_token_ids, list) else 0
        # The sizes are determined by the tokens and the model; given values are ignored.
        self.num_virtual_tokens, self.num_transformer_submodules = count or None, 1
        self.num_layers = self.token_dim = self.num_attention_heads = None
        self.cpt_mask = [1] * count if self.cpt_mask is None else self.cpt_mask
        self.cpt_tokens_type_mask = [1] * count if self.cpt_tokens_type_mask is None else self.cpt_tokens_type_mask
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError(
                f"{type(self).__name__} only supports task_type = {TaskType.CAUSAL_LM.value}.", field="task_type"
            )
        if not count or min(self.cpt_token_ids) < 0:
            raise ConfigError(
                f"cpt_token_ids must be the ids of at least one token, not {shown(self.cpt_token_ids)}",
                field="cpt_token_ids",
            )
        if not count == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ConfigError(
                "cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length, not "
                f"{count}, {len(self.cpt_mask)} and {len(self.cpt_tokens_type_mask)}",
                field="cpt_tokens_type_mask",
            )
        if not all(0 <= kind < 2**31 for kind in self.cpt_tokens_type_mask):
            raise ConfigError(
                f"cpt_tokens_type_mask must be the types of tokens, 0 or more, not {shown(self.cpt_tokens_type_mask)}",
                field="cpt_tokens_type_mask",
            )


def _both(config: CPTConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The embeddings and their trained changes; the changes are zero if the file has only the sum."""
    others = {key: tensor for key, tensor in tensors.items() if key != PROMPT_KEY}
    whole = tensors.get(PROMPT_KEY)
    if whole is None or {_ROWS, _DELTA} <= others.keys():
        return others
    return others | {_ROWS: whole, _DELTA: torch.zeros_like(whole)}


def _sum(config: CPTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensor in PEFT's files: embeddings plus changes, (tokens, features)."""
    with torch.no_grad():
        return {PROMPT_KEY: CPTEmbedding.bound(config, tensors).prompt()}


@register(
    CPTConfig,
    label="CPT",
    listing=prompt_listing(
        when="few examples: starts from in-context examples and avoids overfitting",
        paper="arXiv:2410.17222",
        more=lambda config: {"ε": f"{config.opt_projection_epsilon:g}/{config.opt_projection_format_epsilon:g}"},
        smaller=lambda config: None,
        listed_with={"task_type": "CAUSAL_LM"},
    ),
    sample_configs={
        "two-examples": {
            "cpt_token_ids": [5, 7, 9, 3, 6, 8, 4, 9],
            "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 6, 8],
            "opt_weighted_loss_type": "decay",
            "opt_loss_decay_factor": 0.9,
            "opt_projection_epsilon": 0.4,
        },
    },
    files=FileFormat(derived=_sum, unpack=_both),
    calls=CallInputs(
        context=lambda config, args, kwargs: kwargs.get(_TYPES), arguments=(_TYPES,), token_arguments=(_TYPES,)
    ),
)
class CPTEmbedding(TokenPrompt, WeighsTokens):
    """The embeddings of the examples and their trained changes.

    In training the projected changes are written back, so that the optimizer's next step starts from them.

    Args:
        config: the method's config.
        word_embeddings: the model's input embedding, for the initial values of a prompt that a script makes itself.

    Attributes:
        embedding: (tokens, features), frozen.
        delta_embedding: (tokens, features).
    """

    call_argument: ClassVar[str] = _TYPES
    frozen_parameters: ClassVar[tuple[str, ...]] = (_ROWS,)
    delta_embedding: nn.Embedding

    def __init__(self, config: CPTConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, word_embeddings)
        self.config: Any = config
        self.delta_embedding = nn.Embedding(config.total_tokens, int(config.token_dim or 0))
        nn.init.zeros_(self.delta_embedding.weight)

    @staticmethod
    def initial_tokens(config: Any, base: BaseLayer) -> Tensor | None:
        return torch.tensor(config.cpt_token_ids, dtype=torch.long)

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        shapes = super().parameter_shapes(config, path, module, kind)
        known, last = kind.features(module)[0], max(config.cpt_token_ids)
        if last >= known:
            raise ConfigError(f"cpt_token_ids has {last}, but the model has {known} tokens", field="cpt_token_ids")
        return shapes

    @classmethod
    def check_model(cls, config: CPTConfig, model: nn.Module) -> None:
        """Refuses models with an encoder."""
        if has_encoder(model):
            raise ConfigError(f"CPT is for causal language models, and {type(model).__name__} has an encoder")

    def get_epsilon(self) -> Tensor:
        """The largest change of each embedding, float32 (tokens,); on the CPU."""
        kinds = self._kinds()
        scale = (self.delta_embedding.embedding_dim / _WIDTH) ** 0.5
        radii = torch.where(kinds % _PER_EXAMPLE == 2, float(self.config.opt_projection_epsilon) * scale, _FIXED)
        return torch.where(kinds % 2 == 1, float(self.config.opt_projection_format_epsilon) * scale, radii)

    @torch.no_grad()
    def get_projection(self) -> Tensor:
        """The changes with limited norms, (tokens, features)."""
        delta = self.delta_embedding.weight
        norms = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
        radii = self.get_epsilon().to(norms).unsqueeze(1)
        return torch.where(norms > 0, delta * (radii / norms.clamp(min=radii)), delta)

    def prompt(self) -> Tensor:
        """The changed embeddings, (tokens, features)."""
        delta, projected = self.delta_embedding.weight, self.get_projection()
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                delta.copy_(projected)
        trained = (self._kinds() % _PER_EXAMPLE != 0).unsqueeze(1).to(delta.device)
        return self.embedding.weight.detach() + (projected + torch.where(trained, delta - delta.detach(), 0.0))

    def input_tokens(self, base: BaseLayer) -> Tensor:
        return self.prompt().unsqueeze(0)

    def tokens_at(self, ids: Tensor, *task_ids: Tensor) -> Tensor:
        """Rows of the changed embeddings."""
        note_requested()
        return self.prompt()[ids]

    def learned(self, labels: Tensor, start: int, front: int, base: BaseLayer) -> tuple[Tensor, Tensor]:
        """Only tokens of outputs count, including those of the examples."""
        own, given = labels[:, front:], base.context
        if given is None:
            given = torch.full_like(own, _PER_EXAMPLE)
        elif not isinstance(given, Tensor) or given.shape != own.shape:
            has = tuple(given.shape) if isinstance(given, Tensor) else shown(given)
            raise AdapterError(f"{_TYPES} must have the shape {tuple(own.shape)}, as the input, not {has}")
        examples = -(-max(self.config.cpt_tokens_type_mask) // _PER_EXAMPLE)
        types, learned, end = torch.zeros_like(labels), labels.clone(), start + self.token_count
        types[:, start:end] = self._kinds().to(labels)
        types[:, front:] = torch.where(given > 0, given + examples * _PER_EXAMPLE, 0).to(labels)
        learned[:, start:end] = torch.tensor(self.config.cpt_token_ids).to(labels)
        outputs = torch.where(types % _PER_EXAMPLE == 0, types, 0)
        return torch.where(outputs > 0, learned, -100), self._weights(outputs)

    def _weights(self, outputs: Tensor) -> Tensor:
        """The weight of each token in the loss, (rows, positions), from the types of outputs, which are 0 elsewhere."""
        weights = torch.ones_like(outputs, dtype=torch.float32)
        if self.config.opt_weighted_loss_type != "decay":
            return weights
        # Nothing predicts the first token: it is no output among the others.
        ordered, places = outputs[:, 1:].sort(1)
        number = (ordered.diff(dim=1, prepend=torch.zeros_like(ordered[:, :1])) != 0).cumsum(1)
        decay = torch.full_like(number, float(self.config.opt_loss_decay_factor), dtype=torch.float32)
        weights[:, 1:] = weights[:, 1:].scatter(1, places, decay ** (number[:, -1:] - number))
        return weights

    def _kinds(self) -> Tensor:
        """The type of each token, int64 (tokens,); on the CPU."""
        return torch.tensor(self.config.cpt_tokens_type_mask)
