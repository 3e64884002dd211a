"""The product for an accelerator, computed here on a CPU: its numbers, PEFT's, and how many kernels it starts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from nbpeft.engine.methods.lora.launches import in_few_launches
from tests.benchmarks.harness import TOY, Row, measure, rows
from tests.closeness import assert_close

SCALING = 1.7


def inputs(dtype: torch.dtype, adapter: torch.dtype, tokens: int = 20, width: int = 8) -> dict[str, Tensor]:
    """An input, a frozen layer, and the factors of an adapter."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"x": (tokens // 5, 5, width), "weight": (6, width), "bias": (6,), "lora_A": (3, width), "lora_B": (6, 3)}
    drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    made = {name: value.to(adapter if name.startswith("lora") else dtype) for name, value in drawn.items()}
    for name in ("x", "lora_A", "lora_B"):
        made[name].requires_grad_()
    return made


def ours(made: dict[str, Tensor], probability: float, *, whole: bool, scaling: float | Tensor = SCALING) -> Tensor:
    x, weight, bias, lora_A, lora_B = made.values()
    torch.manual_seed(3)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else lora_A.dtype
    if whole:
        return in_few_launches(x, (lora_A, lora_B, scaling), None, (weight, bias), probability, dtype)
    return in_few_launches(x, (lora_A, lora_B, scaling), F.linear(x, weight, bias), None, probability, dtype)


def as_in_peft(made: dict[str, Tensor], probability: float) -> Tensor:
    x, weight, bias, lora_A, lora_B = made.values()
    torch.manual_seed(3)
    base = F.linear(x, weight, bias)
    wide = x.to(lora_A.dtype)
    dropped = torch.native_dropout(wide, probability, True)[0] if probability else wide  # as on a card
    return (base + F.linear(F.linear(dropped, lora_A), lora_B) * SCALING).to(base.dtype)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("scaling", [SCALING, torch.tensor(SCALING)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [
        *((torch.float32, torch.float32), (torch.bfloat16, torch.float32)),
        *((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)),
    ],
)
def test_outputs_and_gradients_are_pefts(
    dtype: torch.dtype, adapter: torch.dtype, scaling: float | Tensor, probability: float, whole: bool
) -> None:
    made = inputs(dtype, adapter)
    found, wanted = ours(made, probability, whole=whole, scaling=scaling), as_in_peft(made, probability)
    assert found.dtype == wanted.dtype and found._base is None
    if (dtype, adapter) == (torch.bfloat16, torch.float32):
        assert torch.equal(found, wanted)  # the same products, and the same one rounding
    learned = [made[name] for name in ("x", "lora_A", "lora_B")]
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(found.dtype)
    pairs = zip(*(torch.autograd.grad(one, learned, upstream) for one in (found, wanted)), strict=True)
    for mine, other in [(found, wanted), *pairs]:
        assert_close(mine, other, terms=20, depth=3, dtype=dtype)


def test_without_gradients_it_is_the_same() -> None:
    made = inputs(torch.bfloat16, torch.float32)
    with torch.no_grad():
        found = ours(made, 0.0, whole=True)
    assert torch.equal(found, ours(made, 0.0, whole=True))


def test_a_factor_beyond_the_range_of_the_dtype_becomes_infinite() -> None:
    made = inputs(torch.float16, torch.float16)
    assert not ours(made, 0.0, whole=True, scaling=1e9).isfinite().any()


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("whole", [True, False])
def test_derivatives_of_both_orders(probability: float, whole: bool) -> None:
    made = inputs(torch.float64, torch.float64, tokens=5, width=3)
    learned = [made.pop(name) for name in ("x", "lora_A", "lora_B")]

    def run(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return ours({"x": x, **made, "lora_A": lora_A, "lora_B": lora_B}, probability, whole=whole)

    assert gradcheck(run, learned) and gradgradcheck(run, learned)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask_again(reentrant: bool) -> None:
    made, results = inputs(torch.float32, torch.float32), []
    x, *learned = (made[name] for name in ("x", "lora_A", "lora_B"))
    for again in (False, True):

        def run(x: Tensor) -> Tensor:
            return in_few_launches(x, (*learned, SCALING), None, None, 0.4, torch.float32)  # type: ignore[arg-type]

        torch.manual_seed(11)
        output: Tensor = checkpoint(run, x, use_reentrant=reentrant) if again else run(x)
        output.square().sum().backward()
        results.append([value.grad for value in (x, *learned)])
        x.grad = learned[0].grad = learned[1].grad = None
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_in_both_directions(dtype: torch.dtype, probability: float) -> None:
    made = inputs(torch.float32, torch.float32)
    made["x"] = made["x"].detach().to(dtype).requires_grad_()
    learned, results = [made[name] for name in ("x", "lora_A", "lora_B")], []
    for run in (partial(ours, whole=True), partial(ours, whole=False), as_in_peft):
        with torch.autocast("cpu", torch.bfloat16):
            output = run(made, probability)
        assert output.dtype == torch.bfloat16
        results.append([output, *torch.autograd.grad(output.float().square().sum(), learned)])
    for mine in results[:2]:
        assert [one.dtype for one in mine] == [one.dtype for one in results[2]]
        for found, wanted in zip(mine, results[2], strict=True):
            assert_close(found, wanted, terms=20, depth=6, dtype=torch.bfloat16)


ROWS = [row for row in rows(["kernels"]) if "card" in row.title]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_no_more_kernels_are_started_than_by_peft(row: Row) -> None:
    """An exact count, the same on every machine."""
    result = measure(row, TOY)
    assert not result.problem and result.met, f"{result.ours} kernels, PEFT {result.rival}"
