"""LLaMA-Adapter: the top attentions attend to a trained prompt, too, through a gate (Zhang et al. 2023, 2303.16199).

    y = attention(x) + W_o (g softmax(q K_p^T / sqrt(d)) V_p)        K_p = W_k p, V_p = W_v p

p (n, features) and g, one number that starts at zero, are trained for each layer; q are the queries of the attention,
with their positions, K_p has none. In GPT-2, as in PEFT, what is attended to is added without W_o.

If W_o has a bias, PEFT adds it twice, so training does not start at the base model; here it is added once. PEFT has one
adapter at a time; here several can be active, together with other methods and in mixed batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_count, check_declared
from nbpeft.engine.config.targets import is_all_linear
from nbpeft.engine.contract.adapter import AdapterConfig, PeftType
from nbpeft.engine.contract.base import BaseLayer
from nbpeft.engine.contract.method_records import FileFormat, Listing
from nbpeft.engine.contract.model_adapter import AddsInside, ModelAdapter
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.tree.model_tree import bare_modules
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import ConfigError, did_you_mean, shown

_PREFIX = "base_model.model."
"""Prefix of the keys in PEFT's files."""
_NAMES = (".adaption_prompt", ".adaption_gate")
"""Suffixes of these keys."""
_ATTENTIONS = {"gpt2": "attn", "llama": "self_attn", "mistral": "self_attn"}
"""Model type -> name of its attentions."""
_PROJECTIONS = {"gpt2": ("c_attn",), "llama": (_LLAMA := ("q_proj", "k_proj", "v_proj", "o_proj")), "mistral": _LLAMA}
"""Model type -> the layers of an attention that are called."""


@dataclass
class AdaptionPromptConfig(AdapterConfig):
    """Config of LLaMA-Adapter. Field names and defaults are PEFT's.

    Attributes:
        target_modules: name of the attention modules, or a list with it; by default the name in the model's type
            (GPT-2, LLaMA or Mistral).
        adapter_len: tokens of each prompt.
        adapter_layers: how many layers have one, from the top.

    Raises:
        ConfigError: a value is invalid.
    """

    target_modules: str | None = field(default=None)
    adapter_len: int | None = field(default=None)
    adapter_layers: int | None = field(default=None)

    counts: ClassVar[tuple[str, ...]] = ("adapter_len", "adapter_layers")
    on_last_layers: ClassVar[bool] = True
    places: ClassVar[tuple[str, ...]] = ()
    """Paths of the attentions in the model it was completed for."""
    features: ClassVar[int] = 0
    """Features of a token there."""

    def __post_init__(self) -> None:
        names: Any = self.target_modules
        if isinstance(names, list | set | tuple) and len(names) == 1:
            (self.target_modules,) = names
        super().__post_init__()
        self.peft_type = PeftType("ADAPTION_PROMPT")
        if is_all_linear(self.target_modules):
            raise ConfigError("target_modules is the name of the attentions; leave it out", field="target_modules")
        check_declared(self)

    def fill_in_sizes(self, model: nn.Module, width: int) -> None:
        """Looks for the attentions."""
        for name in self.counts:
            check_count(name, getattr(self, name))
        config: Any = getattr(model, "config", None)
        kind = str(getattr(config, "model_type", None))
        if kind not in _ATTENTIONS:
            raise ConfigError(
                f"Unsupported model type for adaption prompt: '{kind}'. It works with {', '.join(_ATTENTIONS)}"
            )
        self.target_modules = self.target_modules or _ATTENTIONS[kind]
        modules = dict(bare_modules(model))
        found = [path for path in modules if path.endswith(f".{self.target_modules}")]
        if len(found) < int(self.adapter_layers or 0):
            near = did_you_mean(str(self.target_modules), [_ATTENTIONS[kind]]) if not found else ""
            raise ConfigError(
                f"Config specifies more adapter layers '{self.adapter_layers}' than the model has '{len(found)}' of "
                f"{shown(self.target_modules)}.{near}",
                field="adapter_layers",
            )
        chosen = found[-int(self.adapter_layers or 0) :]
        strange = [path for path in chosen if any(name not in modules[path]._modules for name in _PROJECTIONS[kind])]
        if strange:
            raise ConfigError(
                f"{strange[0]} is no attention of {kind}: target_modules is their name, {_ATTENTIONS[kind]!r}",
                field="target_modules",
            )
        self.set_derived(places=tuple(chosen), features=width)


class AdaptedAttention(nn.Module):
    """The parts of an adapter for one attention.

    Attributes:
        adaption_prompt: (1, tokens, features).
        adaption_gate: (1,).
    """

    def __init__(self, tokens: int, features: int) -> None:
        super().__init__()
        self.adaption_prompt = nn.Parameter(torch.empty(1, tokens, features).normal_())
        self.adaption_gate = nn.Parameter(torch.zeros(1))


def _packed(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the keys of PEFT's files."""
    return {f"{_PREFIX}{key}" if key.endswith(_NAMES) else key: tensor for key, tensor in tensors.items()}


def _unpacked(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the paths of the parameters."""
    return {key.removeprefix(_PREFIX) if key.endswith(_NAMES) else key: tensor for key, tensor in tensors.items()}


@register(
    AdaptionPromptConfig,
    peft_type="ADAPTION_PROMPT",
    label="LLaMA-Adapter",
    listing=Listing(
        when="few examples: learned prompts in the top layers, gated to start at zero",
        paper="arXiv:2303.16199",
        summary=lambda config: {"tokens": str(config.adapter_len), "layers": str(config.adapter_layers)},
        smaller=lambda config: config.copy(adapter_len=max(1, int(config.adapter_len or 1) // 2)),
        listed_with={"adapter_len": 10, "adapter_layers": 2},
    ),
    sample_configs={"one-layer": {"adapter_len": 4, "adapter_layers": 1}},
    files=FileFormat(prefix="adaption_", pack=_packed, unpack=_unpacked),
)
class AdaptionPromptModel(ModelAdapter, AddsInside):
    """A prompt and a gate for each of the top attentions, saved under the paths of those attentions."""

    peft: ClassVar[PeftNames] = PeftNames(shown_as="adaption_prompts")

    def __init__(self, config: AdaptionPromptConfig) -> None:
        super().__init__(config)
        self.places = config.places
        for path in config.places:
            *parents, last = path.split(".")
            holder: nn.Module = self
            for name in parents:
                holder = holder._modules.setdefault(name, nn.Module())  # type: ignore[assignment]
            holder._modules[last] = AdaptedAttention(int(config.adapter_len or 0), config.features)

    def addition(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int
    ) -> Tensor:
        """The gated attention to the prompt."""
        own: Any = self.get_submodule(path)
        attention: Any = module
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        prompt = own.adaption_prompt.to(x.device, x.dtype).repeat(rows, 1, 1)
        fused = "c_attn" in module._modules
        if fused:
            queries = attention.c_attn(x).split(attention.split_size, 2)[0]
            keys, values = attention.c_attn(prompt).split(attention.split_size, 2)[1:]
        else:
            queries, keys, values = attention.q_proj(x), attention.k_proj(prompt), attention.v_proj(prompt)
        queries, keys, values = (
            part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in (queries, keys, values)
        )
        if not fused:
            queries = _with_positions(queries, *kwargs["position_embeddings"])
        found = _attended(queries, keys, values, own.adaption_gate.to(x.device)).transpose(1, 2).flatten(2)
        if fused:
            return found
        projected: Tensor = attention.o_proj(found)
        if isinstance(attention.o_proj, AdaptedLayer) or attention.o_proj.bias is not None:
            constant: Tensor = attention.o_proj(torch.zeros_like(found))  # is in the attention's own output already
            return projected - constant
        return projected

    def unmergeable_reason(self, base: BaseLayer) -> str:
        return "the weights: what it adds to an attention depends on the queries"


def _with_positions(queries: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries (rows, heads, length, features) rotated by their positions, both of those (rows, length, features)."""
    first, second = queries.chunk(2, -1)
    return queries * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)


def _attended(queries: Tensor, keys: Tensor, values: Tensor, gate: Tensor) -> Tensor:
    """Attention of queries (rows, heads, length, features) to a prompt, times the gate (1,); shaped like the queries.

    Keys and values are (1 or rows, heads or groups of heads, tokens, features).
    """
    groups = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = queries @ keys.to(queries).transpose(2, 3) / math.sqrt(queries.shape[-1])
    weights = gate.float() * torch.softmax(scores, -1, dtype=torch.float32)
    return weights.to(queries.dtype) @ values.to(queries.dtype)
