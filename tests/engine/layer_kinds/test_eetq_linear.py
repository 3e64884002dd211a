"""transformers' layer of EETQ weights, with its GPU kernel played by torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbpeft.engine.contract.registry import resolve_backend, resolve_layer_kind
from nbpeft.engine.injection.plan import plan
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import MergeError
from tests.closeness import assert_close


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Any:
    eetq: Any = pytest.importorskip("transformers.integrations.eetq")

    def product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        return x @ (weight.to(x.dtype) * scales.to(x.dtype))

    monkeypatch.setattr(eetq, "eetq_kernels_hub", SimpleNamespace(w8_a16_gemm=product), raising=False)
    made = eetq.EetqLinear(16, 6, bias=True)
    made.weight.data.copy_(torch.randint(-20, 20, (16, 6)))
    made.weight_scales.data.fill_(0.01)
    made.bias.data.normal_()
    return made


def test_it_is_adapted_by_the_shape_of_its_weight(layer: Any) -> None:
    host, backend = resolve_layer_kind(layer), resolve_backend(layer)
    assert host is not None and backend is not None
    assert (host.name, backend.name, host.features(layer)) == ("eetq_linear", "eetq", (16, 6))


def test_an_adapter_on_it_runs_trains_and_refuses_to_merge(layer: Any) -> None:
    model = nn.Sequential(layer)
    x = torch.randn(1, 3, 16)
    before = model(x)
    manager = AdapterManager(model)
    manager.add("one", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    manager.activate("one")
    output = model(x)
    lora_A, lora_B = (dict(model.named_parameters())[f"0.lora_{name}.one.weight"] for name in "AB")
    assert_close(output, before + x @ lora_A.T @ lora_B.T * 4.0)
    output.sum().backward()
    assert lora_A.grad is not None and lora_B.grad is not None and layer.weight_scales.grad is None
    with pytest.raises(MergeError, match="GPU kernel"):
        manager.merge()


def test_all_linear_reaches_it(layer: Any) -> None:
    model = nn.Sequential(layer, nn.Linear(6, 4), nn.Embedding(3, 3), nn.Conv1d(2, 2, 1))
    assert plan(model, LoraConfig(target_modules="all-linear")).paths == ("0", "1")
