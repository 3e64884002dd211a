"""How torchao's tensors are written again, without torchao."""

from __future__ import annotations

import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from nbpeft.engine.backends.torchao import _mapping

MappingType = Enum("MappingType", ["SYMMETRIC", "ASYMMETRIC"])


@pytest.mark.parametrize(
    ("zeros", "wanted"), [(None, "SYMMETRIC"), (torch.zeros(2), "SYMMETRIC"), (torch.tensor([0, 3]), "ASYMMETRIC")]
)
def test_zero_points_show_how_a_weight_was_mapped(
    zeros: Tensor | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torchao", "torchao.quantization", "torchao.quantization.quant_primitives"):
        monkeypatch.setitem(sys.modules, name, module := ModuleType(name))
        module.MappingType = MappingType  # type: ignore[attr-defined]
    assert _mapping(SimpleNamespace(zero_point=zeros)) is MappingType[wanted]
