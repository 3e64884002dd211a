"""torch.func, forward-mode and second derivatives of adapted models, beside PEFT's."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import nbpeft
from tests.closeness import assert_close


class Net(nn.Module):
    """One layer of each kind, over four rows of five ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.convolution(self.embedding(ids).transpose(-1, -2)).transpose(-1, -2)
        result: Tensor = self.out(torch.tanh(self.linear(x))).mean(-2)
        return result


IDS = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(5))
TARGETS = torch.randn(4, 3, generator=torch.Generator().manual_seed(6))


def pair(folder: Path, targets: list[str], dtype: torch.dtype = torch.float32, **config: Any) -> list[Any]:
    """The same adapter in a model of PEFT, which wrote it, and in one of ours."""
    theirs = peft.get_peft_model(Net().to(dtype), peft.LoraConfig(r=2, target_modules=targets, **config))
    torch.manual_seed(9)
    for name, parameter in theirs.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(str(folder))
    return [theirs, nbpeft.PeftModel.from_pretrained(Net().to(dtype), folder, is_trainable=True)]


def derivatives(model: Any) -> dict[str, list[Tensor]]:
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    frozen = {name: value.detach() for name, value in model.named_parameters() if not value.requires_grad}
    tangents = {name: torch.ones_like(value) for name, value in trained.items()}
    first = next(iter(trained))

    def loss(values: dict[str, Tensor], ids: Tensor = IDS, targets: Tensor = TARGETS) -> Tensor:
        result: Tensor = ((functional_call(model, (values, frozen), (ids,)) - targets) ** 2).mean()
        return result

    def of_row(values: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        return loss(values, ids[None], targets[None])

    found = {
        "grad": list(grad(loss)(trained).values()),
        "per sample": list(vmap(grad(of_row), in_dims=(None, 0, 0))(trained, IDS, TARGETS).values()),
        "jvp": [jvp(loss, (trained,), (tangents,))[1]],
        "hessian": [hessian(lambda value: loss({**trained, first: value}))(trained[first])],
        "jacobian": [
            jacrev(lambda value: functional_call(model, ({**trained, first: value}, frozen), (IDS,)))(trained[first])
        ],
    }
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(value, tangents[name]) for name, value in trained.items()}
        found["forward mode"] = [forward_ad.unpack_dual(loss(duals)).tangent]
    return found


@pytest.mark.parametrize(
    ("targets", "config"),
    [
        (["linear", "out", "convolution", "embedding"], {}),
        (["linear", "out"], {"dtype": torch.bfloat16}),
        (["convolution"], {"dtype": torch.bfloat16}),
        (["linear"], {"use_dora": True}),
        (["convolution"], {"use_dora": True}),
    ],
    ids=["every layer", "linear bf16", "convolution bf16", "dora", "dora convolution"],
)
def test_derivatives_equal_those_of_peft(targets: list[str], config: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = (derivatives(model) for model in pair(tmp_path, targets, **config))
    assert ours.keys() == theirs.keys()
    for kind, expected in theirs.items():
        assert any(value.abs().max() > 1e-3 for value in expected), kind
        for one, other in zip(ours[kind], expected, strict=True):
            assert_close(one, other, message=kind)


def test_dropout_in_a_transform_asks_for_randomness_as_torch_does(tmp_path: Path) -> None:
    model = pair(tmp_path, ["linear"], lora_dropout=0.5)[1].train()
    values = {name: value.detach() for name, value in model.named_parameters()}

    def of_row(ids: Tensor) -> Tensor:
        result: Tensor = functional_call(model, values, (ids[None],))
        return result

    same = IDS[:1].expand(4, 5)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(of_row)(same)
    rows = vmap(of_row, randomness="different")(same)
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_equal_those_of_peft(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    found = []
    for model in pair(tmp_path, [kind], dtype):
        trained = [value for value in model.parameters() if value.requires_grad]
        first = torch.autograd.grad(((model(IDS) - TARGETS) ** 2).mean(), trained, create_graph=True)
        found.append(torch.autograd.grad(sum(value.square().sum() for value in first), trained))
    assert max(float(value.abs().max()) for value in found[0]) > 0.1
    for one, other in zip(found[1], found[0], strict=True):
        assert_close(one, other, depth=6)  # forwards, backwards, and both again


def test_the_second_derivative_of_a_convolution_with_dropout_is_right() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv1d(2, 2, 1).double())
    model = nbpeft.get_peft_model(base, nbpeft.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.4))
    model = model.double().train()
    x = torch.randn(1, 2, 3, dtype=torch.float64)

    def output(value: Tensor, other: Tensor) -> Tensor:
        torch.manual_seed(3)
        result: Tensor = functional_call(model, {names[0]: value, names[1]: other}, (x,))
        return result

    names, values = zip(
        *[(name, value) for name, value in model.named_parameters() if value.requires_grad], strict=True
    )
    inputs = tuple(torch.randn_like(value).requires_grad_() for value in values)
    assert torch.autograd.gradgradcheck(output, inputs)


@pytest.mark.parametrize("targets", [["0"], ["0", "1"]])
def test_the_older_onnx_exporter_traces_the_model(targets: list[str]) -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model = nbpeft.get_peft_model(layers, nbpeft.LoraConfig(target_modules=targets)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            torch.onnx.export(model, (torch.ones(1, 4),), io.BytesIO(), dynamo=False)
        except torch.onnx.OnnxExporterError as error:
            assert "onnx is not installed" in str(error), "the trace is done, and only then the package is asked for"
