"""Rounding blocks to levels by a table, against bitsandbytes' own search."""

from __future__ import annotations

import pytest
import torch

from nbpeft.engine.kernels.nf4_rounding import round_blocks
from tests.closeness import assert_close

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "size"), [((40, 64), 64), ((130, 1024), 64), ((3, 21), 64), ((5, 77), 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_the_library_but_for_numbers_between_two_levels(
    kind: str, shape: tuple[int, int], size: int, dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[0, :3] = torch.tensor([0.0, -0.0, 1e-30])
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=size, quant_type=kind)
    mine, constants = round_blocks(weight, size, state.code.float())
    assert mine.shape == codes.shape and constants.shape == state.absmax.shape

    def values(data: torch.Tensor) -> torch.Tensor:
        places = torch.stack([data.view(-1) >> 4, data.view(-1) & 15], 1).view(-1).long()
        return state.code.float()[places][: weight.numel()]

    def error(data: torch.Tensor, absmax: torch.Tensor) -> float:
        return float((values(data) * absmax.repeat_interleave(size)[: weight.numel()] - weight.float().view(-1)).norm())

    assert float((values(mine) != values(codes)).float().mean()) < 1e-2
    assert error(mine, constants) <= error(codes, state.absmax) * (1 + 1e-5)


def test_what_lies_on_levels_stays_and_what_is_not_finite_ends_nothing() -> None:
    code = bnb.functional.get_4bit_type("nf4", device="cpu")
    places = torch.arange(128) % 16
    weight = code[places] * 0.3
    codes, constants = round_blocks(weight, 64, code)
    assert torch.equal(torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1).view(-1).long(), places)
    assert_close(constants, torch.full((2,), 0.3))
    zeros, of_zeros = round_blocks(torch.zeros(64), 64, code)
    assert torch.equal(of_zeros, torch.zeros(1)) and len(zeros) == 32
    weight[3] = torch.nan
    round_blocks(weight, 64, code)
    weight[3] = torch.inf
    round_blocks(weight, 64, code)
