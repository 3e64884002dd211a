"""Small classes and functions of PEFT's implementation that other libraries import."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from nbpeft.checkpoint import CONFIG_NAME
from nbpeft.engine.methods.lora.optimizers import LoraFAOptimizer as LoraFAOptimizer
from nbpeft.engine.methods.lora.optimizers import RiemannianPreconditioner, trained_pairs
from nbpeft.engine.methods.lora.peft_modules import BlockDiagonalFactor
from nbpeft.engine.methods.lora.variants.allocator_by_names import RankAllocator as RankAllocator
from nbpeft.engine.methods.lora.variants.alora import invocation_starts
from nbpeft.engine.methods.lora.variants.velora import normalised, pieces
from nbpeft.engine.methods.products.lokr import two_factors
from nbpeft.errors import CheckpointNotFoundError, ConfigError
from nbpeft.model.handle.arrow import repository_of

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_RiemannianPreconditioner = RiemannianPreconditioner
_collect_lora_pairs = trained_pairs
_normalize_projection = normalised
factorization = two_factors


def calculate_alora_offsets(
    peft_config: Mapping[str, Any],
    active_adapter: str,
    input_ids: Tensor | None,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """Returns how many tokens before the end of each row the last invocation of an aLoRA adapter starts.

    Args:
        peft_config: adapter name -> config.
        active_adapter: the adapter of every row without ``adapter_names``.
        input_ids: (batch, tokens); None for no rows.
        adapter_names: the adapter of each row.

    Returns:
        One value per row; None for a row without invocation, or whose adapter is not aLoRA.
    """
    rows = [] if input_ids is None else list(input_ids)
    found: list[int | None] = []
    for row, name in zip(rows, adapter_names or [active_adapter] * len(rows), strict=True):
        tokens = getattr(peft_config.get(name), "alora_invocation_tokens", None)
        start = int(invocation_starts(row, tokens)) if tokens else -1
        found.append(len(row) - start if start >= 0 else None)
    return found


def is_alora_relevant_in_batch(model: Any, adapter_names: Sequence[str] | None = None) -> bool:
    """Returns whether a call uses an aLoRA adapter.

    Args:
        model: a ``PeftModel``.
        adapter_names: the adapter of each row; the first active adapter is checked too.
    """
    names = {model.active_adapter, *(adapter_names or ())}
    return any(getattr(model.peft_config.get(name), "alora_invocation_tokens", None) for name in names)


def get_alora_offsets_for_forward(
    model: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Returns the options of a call, with ``alora_offsets`` if it uses an aLoRA adapter.

    Args:
        model: a ``PeftModel``.
        input_ids: (batch, tokens), int64.
        inputs_embeds: (batch, tokens, features); without ``input_ids`` invocations cannot be found, with a warning.
        **kwargs: the other options.
    """
    problem = "when only inputs_embeds are provided. Disabling aLoRA for this forward pass."
    return _with_offsets(model, input_ids, kwargs, problem if inputs_embeds is not None else "")


def get_alora_offsets_for_generate(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns the options of ``generate``, with ``alora_offsets`` if it uses an aLoRA adapter.

    Args:
        model: a ``PeftModel``.
        *args: positional arguments of ``generate``; the first one may be ``input_ids``, (batch, tokens) or (tokens,).
        **kwargs: its options.
    """
    given = kwargs.get("input_ids", args[0] if args and isinstance(args[0], Tensor) else None)
    rows = given.unsqueeze(0) if given is not None and given.ndim == 1 else given
    return _with_offsets(model, rows, kwargs, "during generate as input_ids are not available. Disabling aLoRA.")


def _with_offsets(model: Any, input_ids: Tensor | None, options: dict[str, Any], problem: str) -> dict[str, Any]:
    """Adds ``alora_offsets`` to the options of a call; warns about ``problem`` if there are no ``input_ids``."""
    names = options.get("adapter_names")
    if not is_alora_relevant_in_batch(model, names) or options.get("alora_offsets") is not None:
        return options
    if input_ids is None and problem:
        warnings.warn(f"Cannot calculate aLoRA offsets {problem}", stacklevel=3)
    if input_ids is None:
        return {**options, "alora_offsets": None}
    return {
        **options,
        "alora_offsets": calculate_alora_offsets(model.peft_config, model.active_adapter, input_ids, names),
    }


class BufferDict(nn.Module):
    """Buffers by name, like ``nn.ParameterDict`` for parameters.

    Args:
        buffers: name -> tensor, or pairs of both.
        persistent: whether they are part of the state dict.
    """

    def __init__(self, buffers: Any = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        self.update(() if buffers is None else buffers)

    def update(self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | BufferDict) -> None:
        """Sets buffers from a mapping, or from pairs of name and tensor."""
        for name, buffer in dict(buffers).items():
            self[name] = buffer

    def pop(self, key: str) -> Tensor:
        """Removes a buffer and returns it."""
        found: Tensor = self[key]
        del self[key]
        return found

    def clear(self) -> None:
        """Removes all buffers."""
        self._buffers.clear()

    def keys(self) -> Any:
        """Returns the names."""
        return self._buffers.keys()

    def values(self) -> Any:
        """Returns the tensors."""
        return self._buffers.values()

    def items(self) -> Any:
        """Returns pairs of name and tensor."""
        return self._buffers.items()

    def __getitem__(self, key: str) -> Any:
        return self._buffers[key]

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers


class _IncludesFactors(type):
    """Makes ``isinstance`` of the class true for the block-diagonal factors of adapters too."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, BlockDiagonalFactor)


class BlockDiagonalLinear(BlockDiagonalFactor, metaclass=_IncludesFactors):
    """A linear layer with a block-diagonal weight, of which only the blocks are stored, stacked along the rows.

    Args:
        in_features: must be divisible by ``nblocks``.
        out_features: must be divisible by ``nblocks``.
        nblocks: number of blocks.
        init_zero: initialize with zeros.
        dtype: dtype of the weight, (out_features, in_features / nblocks).
        device: device of the weight; None for the CPU.

    Raises:
        ConfigError: the features are not divisible by the number of blocks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        init_zero: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(nblocks)
        if in_features % nblocks or out_features % nblocks:
            raise ConfigError(f"in_features={in_features} or out_features={out_features} not divisible by {nblocks}")
        size = out_features, in_features // nblocks
        self.register_parameter("weight", nn.Parameter(torch.zeros(size, dtype=dtype, device=device or "cpu")))
        if not init_zero:
            nn.init.kaiming_uniform_(self.weight)


class VeloraFunction:
    """A linear layer that stores a compressed input for the gradient of its weight; see ``lora.variants.velora``."""

    @staticmethod
    def apply(
        input: Tensor, weight: Tensor, bias: Tensor | None, embed: Tensor, num_groups: int, velora_scale: float
    ) -> Tensor:
        """Returns the layer's output, (…, out).

        Args:
            input: (…, in).
            weight: (out, in).
            bias: (out,), or None.
            embed: unit vector onto which groups of the input are projected.
            num_groups: number of groups.
            velora_scale: factor on the gradient of the weight.
        """
        direction = embed.to(input.dtype)
        compressed = pieces(input.detach(), num_groups) @ direction
        learned = F.linear(compressed, pieces(weight, num_groups) @ direction * velora_scale)
        # The added term is zero; it only connects the output to the weight by the compressed input.
        return F.linear(input, weight.detach(), bias) + (learned - learned.detach())


def _reshape_to_grouped_subtokens(x: Tensor, num_groups: int) -> Tensor:
    """Returns the groups of tokens, (tokens, num_groups, size)."""
    return pieces(x, num_groups).flatten(0, -3)


def _compress_activations(x: Tensor, embed: Tensor, num_groups: int) -> Tensor:
    """Returns the compressed tokens, (tokens, num_groups)."""
    return _reshape_to_grouped_subtokens(x, num_groups) @ embed


def _reconstruct_activations(compressed: Tensor, embed: Tensor, in_features: int, velora_scale: float) -> Tensor:
    """Returns the reconstructed tokens for computing gradients, (tokens, in_features)."""
    return (compressed.unsqueeze(-1) * embed).flatten(1)[:, :in_features] * velora_scale


def _resolve_adapter_source(path: str) -> tuple[str, str | None]:
    """Splits a path into a folder or repository id, and the subfolder, or None.

    Raises:
        CheckpointNotFoundError: the folder exists, but has no adapter.
    """
    place, options = repository_of(path)
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, CONFIG_NAME)):
        raise CheckpointNotFoundError(f"Local adapter path '{path}' does not contain '{CONFIG_NAME}'.")
    return place, options.get("subfolder")


_real_values = False
"""Whether ``skip_init_on_device`` suspends ``init_empty_weights``; torch's registration hooks are global, too."""


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Creates modules without values inside the block: their parameters are on the meta device.

    Args:
        include_buffers: whether buffers are on the meta device too.
    """

    def empty(module: nn.Module, name: str, tensor: Any) -> Any:
        if tensor is None or _real_values:
            return None
        moved = tensor.detach().to("meta")
        return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved

    hooks = [register_module_parameter_registration_hook(empty)]
    if include_buffers:
        hooks.append(register_module_buffer_registration_hook(empty))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def skip_init_on_device(func: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorates a function whose new modules have values even inside ``init_empty_weights``."""

    @functools.wraps(func)
    def with_values(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        global _real_values
        before, _real_values = _real_values, True
        try:
            return func(*args, **kwargs)
        finally:
            _real_values = before

    return with_values
