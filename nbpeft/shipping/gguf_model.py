"""The layout of models and adapters in llama.cpp's GGUF files: tensor names, order of rows, and metadata.

Tensor names come from the package ``gguf``. In llama.cpp's ``llama`` architecture rotary embeddings rotate pairs of
adjacent elements, in transformers pairs from the two halves of a head. So the rows of the query and key projections
are reordered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nbpeft.checkpoint import GgufTensor, TensorSpec, file_type, gguf_package
from nbpeft.engine.contract.adapter import LowRankDelta
from nbpeft.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """The layout of one model class in GGUF files.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        neighbours: whether rotary embeddings rotate adjacent elements, so that query and key rows are reordered.
        rotary_size: whether the metadata contains the rotary dimension count and the vocabulary size.
        adapters_only: whether only adapters can be written, because whole models need tensors or metadata that are
            not written here.
    """

    architecture: str
    neighbours: bool = False
    rotary_size: bool = False
    adapters_only: bool = False


_LLAMA = Layout("llama", neighbours=True, rotary_size=True)
LAYOUTS: dict[str, Layout] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Layout("qwen2"),
    "Qwen3ForCausalLM": Layout("qwen3"),
    "Gemma2ForCausalLM": Layout("gemma2", adapters_only=True),
    "Gemma3ForCausalLM": Layout("gemma3", adapters_only=True),
    "GraniteForCausalLM": Layout("granite", neighbours=True, adapters_only=True),
    "Phi3ForCausalLM": Layout("phi3", adapters_only=True),
    "SmolLM3ForCausalLM": Layout("smollm3", neighbours=True, adapters_only=True),
}
"""Model class of transformers -> layout. Each was compared with llama.cpp's own converters, adapters byte by byte."""

MIXTURES = {"q4_k_m": ("q4_k", "q6_k"), "q5_k_m": ("q5_k", "q6_k"), "q6_k": ("q6_k", "q6_k")}
"""Storage type of a model -> that of most matrices, and that of those whose errors count most."""
_LAYER = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight")
_LAYERS_OF_70B = 80
_SCALING_TYPES = ("default", "linear", "yarn", "llama3")


class GgufModel:
    """Names, tensors and metadata of one model in a GGUF file.

    Args:
        model_class: name of the model's class.
        config: its transformers config.

    Raises:
        ConfigError: nbpeft or the installed package ``gguf`` does not know the architecture.
    """

    def __init__(self, model_class: str, config: Any) -> None:
        if model_class not in LAYOUTS:
            known = ", ".join(sorted(LAYOUTS))
            raise ConfigError(f"the GGUF layout of {model_class} is not supported; supported: {known}")
        gguf = gguf_package()
        self.layout, self._config = LAYOUTS[model_class], config
        self.architecture = self.layout.architecture
        architecture = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture), None)
        if architecture is None:
            raise ConfigError(f"the installed package gguf does not support {self.architecture}: pip install -U gguf")
        self._names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def name(self, key: str) -> str:
        """Returns the GGUF name of a tensor.

        Raises:
            ConfigError: the architecture has no such tensor.
        """
        found = self._names.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(f"GGUF files of {self.architecture} have no tensor for {key}")
        return str(found)

    # Tensors

    def adapter_tensors(self, deltas: Mapping[str, LowRankDelta], alpha: float, stored_as: str) -> list[GgufTensor]:
        """Returns the factor pairs of an adapter.

        Args:
            deltas: path of a layer -> its low-rank update.
            alpha: the file's single alpha; a pair with another one is rescaled.
            stored_as: storage type of the tensors.

        Raises:
            ConfigError: the architecture has no tensor for a layer.
        """
        return [tensor for path in sorted(deltas) for tensor in self._pair(path, deltas[path], alpha, stored_as)]

    def _pair(self, path: str, delta: LowRankDelta, alpha: float, stored_as: str) -> Iterator[GgufTensor]:
        name = self.name(f"{path}.weight")
        down = delta.down.T if name == "token_embd.weight" else delta.down  # stored transposed: looked up by row
        ratio = delta.scaling * delta.rank / alpha
        heads = self._heads(path)

        def up() -> Tensor:
            value = delta.up if ratio == 1 else delta.up.float() * ratio
            return _neighbours(value, heads) if heads else value

        yield GgufTensor(f"{name}.lora_a", tuple(down.shape), stored_as, lambda: down)
        yield GgufTensor(f"{name}.lora_b", tuple(delta.up.shape), stored_as, up)

    def model_tensors(
        self,
        specs: Sequence[TensorSpec],
        read: Callable[[str], Tensor],
        stored_as: str,
        importance: Callable[[str], Tensor | None] = lambda key: None,
    ) -> list[GgufTensor]:
        """Returns the tensors of a model, sorted by name; vectors are always float32.

        Args:
            specs: the model's tensors.
            read: returns a tensor by name.
            stored_as: storage type of the matrices.
            importance: returns how much errors in each input of a matrix count, by its name; None if unknown.

        Raises:
            ConfigError: its rotary embeddings have an unsupported scaling type.
        """
        scaling = self._rope.get("rope_type", "default")
        if scaling not in _SCALING_TYPES:
            known = ", ".join(_SCALING_TYPES)
            raise ConfigError(
                f"rotary embeddings of type {scaling!r} cannot be written to GGUF files; supported: {known}"
            )
        factors = self._rotary_factors()
        tensors = (
            [GgufTensor("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors)]
            if factors is not None
            else []
        )
        output = "output.weight" if any(spec.name == "lm_head.weight" for spec in specs) else "token_embd.weight"
        for spec in sorted(specs, key=lambda spec: spec.name):
            name = self.name(spec.name)
            kind = self._type(name, stored_as, output=name == output) if len(spec.shape) > 1 else "f32"
            counts = partial(importance, spec.name)
            tensors.append(GgufTensor(name, spec.shape, kind, self._reader(spec.name, read), counts))
        return tensors

    def _type(self, name: str, stored_as: str, *, output: bool) -> str:
        """Returns the storage type of a matrix, as ``llama-quantize`` chooses it."""
        if stored_as not in MIXTURES:
            return stored_as
        most, important = MIXTURES[stored_as]
        found = _LAYER.fullmatch(name)
        layers = int(self._config.num_hidden_layers)
        if output or (found and _has_more_bits(int(found[1]), layers)):
            return important
        return "q5_k" if layers == _LAYERS_OF_70B and found and found[2] == "attn_v" and most == "q4_k" else most

    def _reader(self, key: str, read: Callable[[str], Tensor]) -> Callable[[], Tensor]:
        heads = self._heads(key.rpartition(".")[0])
        return lambda: _neighbours(read(key), heads) if heads else read(key)

    def _heads(self, path: str) -> int:
        """Returns the number of heads whose rows are reordered in a projection; 0 if its rows stay."""
        if not self.layout.neighbours:
            return 0
        queries = int(self._config.num_attention_heads)
        keys = int(getattr(self._config, "num_key_value_heads", None) or queries)
        return {"q_proj": queries, "k_proj": keys}.get(path.rpartition(".")[2], 0)

    def _rotary_factors(self) -> Tensor | None:
        """Returns the divisor of each frequency under Llama 3's scaling (arXiv:2407.21783), shape (head size / 2,)."""
        if self._rope.get("rope_type") != "llama3":
            return None
        size, rope = self._head_size, self._rope
        frequencies = 1.0 / (float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
        lengths = 2 * math.pi / frequencies
        low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
        smooth = (float(rope["original_max_position_embeddings"]) / lengths - low) / (high - low)
        smooth = smooth.clamp(0, 1)
        return 1 / ((1 - smooth) / factor + smooth)

    # Keys

    @property
    def _rope(self) -> dict[str, Any]:
        return dict(getattr(self._config, "rope_parameters", None) or {})

    @property
    def _head_size(self) -> int:
        config = self._config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def describe(self, writer: Any, stored_as: str) -> None:
        """Adds the model's metadata: sizes, rotary embeddings, file type.

        Args:
            writer: a ``GGUFWriter``.
            stored_as: storage type of the weights.
        """
        config = self._config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        self._describe_rope(writer)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        if getattr(config, "head_dim", None) is not None:
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
        writer.add_file_type(file_type(stored_as))
        if self.layout.rotary_size:
            writer.add_vocab_size(config.vocab_size)
            writer.add_rope_dimension_count(self._head_size)

    def _describe_rope(self, writer: Any) -> None:
        rope = self._rope
        kinds = gguf_package().RopeScalingType
        if rope.get("rope_type") in ("linear", "yarn") and rope.get("factor") is not None:
            writer.add_rope_scaling_type(kinds[str(rope["rope_type"]).upper()])
            writer.add_rope_scaling_factor(rope["factor"])
            if rope["rope_type"] == "yarn":
                writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if rope.get("rope_theta") is not None:
            writer.add_rope_freq_base(rope["rope_theta"])


def common_alpha(deltas: Mapping[str, LowRankDelta]) -> float:
    """Returns the most frequent alpha (scaling times rank) of the pairs, or 1 if that is 0."""
    alphas = [delta.scaling * delta.rank for delta in deltas.values()]
    return max(alphas, key=alphas.count) or 1.0


def _has_more_bits(layer: int, layers: int) -> bool:
    """Whether llama.cpp stores a layer more exactly: the first and last eighth of the layers, and every third."""
    begin = layers // 8
    return layer < begin or layer >= 7 * layers // 8 or (layer - begin) % 3 == 2


def _neighbours(value: Tensor, heads: int) -> Tensor:
    """Reorders rows, (heads * size, …), from the halves of each head to adjacent pairs."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
