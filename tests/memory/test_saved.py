from __future__ import annotations

import gc

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nbpeft.memory import SavedTensors


def test_linear_keeps_its_input_and_no_parameter():
    layer = nn.Linear(8, 4)
    x = torch.randn(3, 8)
    with SavedTensors(layer) as saved:
        y = layer(x)
    assert saved.byte_count == 3 * 8 * 4
    del y
    gc.collect()
    assert saved.byte_count == 0
    assert saved.peak == 3 * 8 * 4


def test_a_storage_counts_once():
    a, b = (nn.Linear(8, 4, bias=False) for _ in range(2))
    model = nn.ModuleList([a, b])
    x = torch.randn(3, 8)
    with SavedTensors(model) as saved:
        y = a(x) + b(x.view(1, 3, 8)).view(3, 4)
    assert saved.byte_count == 3 * 8 * 4
    y.sum().backward()
    assert saved.byte_count == 0


def test_backward_frees_and_gradients_stay_right():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    x = torch.randn(5, 8)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with SavedTensors(model) as saved:
        loss = model(x).sum()
        assert saved.byte_count == 4 * (5 * 8 + 5 * 16 + 5 * 16)
        loss.backward()
    assert saved.byte_count == 0
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_a_graph_kept_alive_stays_counted():
    layer = nn.Linear(8, 4)
    with SavedTensors(layer) as saved:
        losses = [layer(torch.randn(3, 8)).sum() for _ in range(3)]
    assert saved.byte_count == 3 * 3 * 8 * 4
    losses.pop()
    assert saved.byte_count == 2 * 3 * 8 * 4


def test_checkpointing_shows():
    block = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(4)))
    x = torch.randn(6, 16, requires_grad=True)
    with SavedTensors(block) as plain:
        y = block(x)
    with SavedTensors(block) as checkpointed:
        z = checkpoint(block, x, use_reentrant=False)
    assert plain.byte_count == 4 * 6 * 16 * 8
    assert checkpointed.byte_count == 4 * 6 * 16
    z.sum().backward()
    del y


def test_meta_tensors_count_as_they_would():
    layer = nn.Linear(8, 4, device="meta")
    with SavedTensors(layer) as saved:
        y = layer(torch.empty(3, 8, device="meta"))
    assert saved.byte_count == 3 * 8 * 4
    assert y.is_meta
