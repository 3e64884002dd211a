"""The engine's matrix on a card: each method on each kind of layer gives what it gives on the CPU."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

from tests.test_matrix import CASES, DRAWS, PAIRS, adapted, labels, merge_refusal, stored_in

_EXACT = {torch.float32: 2e-4, torch.bfloat16: 0.2}
"""Share of the values by which a card's kernels differ: products of its convolutions have 10 bits."""
_PACKED = 5e-2
"""The same for weights in 4 and 8 bits, which other kernels round otherwise."""


def check_matrix(device: torch.device, *, every: int = 1) -> tuple[int, dict[str, str]]:
    """How many pairs of method and layer were run, and what went wrong: pair -> reason.

    Args:
        device: to run on.
        every: run each of so many pairs alone.
    """
    failures: dict[str, str] = {}
    chosen = PAIRS[::every]
    for kind, sample in chosen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                check_pair(kind, sample, device)
            except Exception as error:
                failures[f"{sample} on {kind}"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return len(chosen), failures


def check_pair(kind: str, sample: str, device: torch.device) -> None:
    """A step, inference and merging of one pair, beside the CPU.

    Raises:
        AssertionError: something differs.
    """
    case = CASES[kind]
    _, model = adapted(case, sample)
    twin, x = copy.deepcopy(model).to(device), case.batch()
    training = labels[sample] not in DRAWS  # a card draws other numbers
    expected, found = (_step(one, given, training) for one, given in ((model, x), (twin, x.to(device))))
    tolerance = _PACKED if case.quantized else _EXACT.get(case.dtype, _EXACT[torch.float32])
    assert found.keys() == expected.keys(), "other gradients"
    for name, value in expected.items():
        difference = float((found[name].cpu() - value).abs().max())
        limit = tolerance * max(float(value.abs().max()), 1.0)
        assert difference <= limit, f"{name or 'output'} differs by {difference:.2g}, {limit:.2g} is allowed"
    if merge_refusal(kind, sample):
        return
    with torch.no_grad():
        twin.eval()
        there = x.to(device)
        plain = twin(there)
        before = stored_in(twin)
        twin.merge_adapter()
        error = (twin(there) - plain).abs()
        limit = case.rounded or tolerance * max(float(plain.abs().max()), 1.0)
        assert float(error.mean() if case.quantized else error.max()) <= limit, (
            f"merged differs by {float(error.max()):.2g}, {limit:.2g} is allowed"
        )
        twin.unmerge_adapter()
        after = stored_in(twin)
    assert all(torch.equal(mine, other) for mine, other in zip(after, before, strict=True)), "unmerged is not as before"


def _step(model: Any, x: Tensor, training: bool) -> dict[str, Tensor]:
    """The output (under the empty name) and the gradients of all that trains."""
    model.train(training)
    torch.manual_seed(3)
    output = model(x)
    output.float().square().sum().backward()
    found = {name: part.grad.detach().float() for name, part in model.named_parameters() if part.grad is not None}
    return {"": output.detach().float(), **found}
