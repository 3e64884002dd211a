"""How many bytes a LoRA layer reads and writes in tensors of tokens x width, in comparison with PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.benchmarks.harness import OURS, PEFT, quiet
from tests.benchmarks.models import adapted, layers

TOKENS, WIDTH = 24, 64
_OVERWRITE = ("copy_", "bernoulli_", "fill_", "zero_")
"""Operations in place that do not read the tensor that they change."""


class WideTraffic(TorchDispatchMode):
    """Adds up the bytes of tensors of tokens x width that operations read and write; views do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if func.is_view or schema.name.startswith(("aten::empty", "aten::new_empty")):
            return result
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | (kwargs or {})
        changed = {one.name for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write}
        unread = changed if "out" in changed or func.overloadpacket.__name__ in _OVERWRITE else set()
        passed = [value for name, value in given.items() if name not in unread]
        passed += [given[name] for name in changed] or [result]
        wide = (one for one in tree_leaves(passed) if isinstance(one, Tensor) and one.numel() == TOKENS * WIDTH)
        self.bytes += sum(one.nbytes for one in wide)
        return result


def traffic(model: nn.Module, dtype: torch.dtype) -> int:
    """The bytes in a forward and a backward through a model, with a gradient for its input."""
    x = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    upstream = torch.randn(TOKENS, WIDTH, dtype=dtype)
    with WideTraffic() as counted:
        model(x).backward(upstream)
    return counted.bytes


@pytest.mark.parametrize(
    ("dtype", "dropout", "most"),
    [
        (torch.float32, 0.0, 0.5),
        # Inputs are cast again in backward; the product and the output of the layer are added in float32.
        (torch.bfloat16, 0.0, 0.82),
        # The mask is saved as bits, which takes additional operations.
        (torch.float32, 0.1, 0.82),
        (torch.bfloat16, 0.1, 0.73),
    ],
)
def test_a_lora_layer_moves_fewer_bytes_than_pefts(dtype: torch.dtype, dropout: float, most: float) -> None:
    def added(name: str) -> int:
        return traffic(adapted(name, layers(WIDTH, dtype), lora_dropout=dropout), dtype) - frozen

    frozen = traffic(layers(WIDTH, dtype), dtype)
    assert frozen == 4 * TOKENS * WIDTH * dtype.itemsize, "an input and an output in each direction"
    with quiet():
        assert added(OURS) <= most * added(PEFT)
