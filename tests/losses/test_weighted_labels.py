"""Labels that count by weights: the loss of any model is their weighted mean, whole or in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nbpeft import chunked_loss
from nbpeft.errors import TrainingError
from nbpeft.losses import WeightedLabels, with_loss_weights
from nbpeft.losses.cross_entropy import chunked_cross_entropy
from tests.closeness import assert_close
from tests.losses.models import model_of
from tests.tiny_models import classifier, llama, tokens

SHIFTING = {"llama": True, "opt": True, "gemma2": True, "bert": False, "t5": False}
"""Architectures, and whether their labels are compared with the logits of the token before."""


def batch() -> dict[str, Tensor]:
    ids = tokens(3, 9)
    labels = ids.clone()
    labels[0, :4] = labels[2, 6:] = -100
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) * 2
    return {"input_ids": ids, "labels": labels, "loss_weights": weights}


@pytest.mark.parametrize("chunk_size", [0, 5])
@pytest.mark.parametrize(("name", "items"), [*((name, None) for name in SHIFTING), ("llama", 7.5)])
def test_a_loss_is_the_weighted_mean_of_its_labels(name: str, items: float | None, chunk_size: int) -> None:
    model, given = model_of(name).eval(), batch()
    options = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    loss = chunked_loss(model, loss_chunk_size=chunk_size, **given, **options)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    labels, weights = given["labels"], given.pop("loss_weights")
    logits = model(**given).logits
    if SHIFTING[name]:
        logits, labels, weights = logits[:, :-1], labels[:, 1:], weights[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none") * weights.flatten()
    expected = losses.sum() / ((weights * (labels != -100)).sum() if items is None else items)
    expected.backward()
    assert_close(loss, expected)
    wanted = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    # The bias of the keys changes nothing: its gradient is what is left of sums as large as the others'.
    assert_close(gradients, wanted, scale=max(float(one.abs().max()) for one in wanted))


def test_weights_of_zero_and_one_are_a_mask() -> None:
    model, given = llama(), batch()
    mask = (given["loss_weights"] > 1).float()
    masked = {**given, "labels": given["labels"].masked_fill(mask == 0, -100)}
    del masked["loss_weights"]
    assert_close(chunked_loss(model, **given | {"loss_weights": mask}), chunked_loss(model, **masked))


def test_a_class_counts_by_the_weight_of_its_row() -> None:
    model, labels, weights = classifier(), torch.tensor([0, 1, 2]), torch.tensor([1.0, 0.5, 2.0])
    losses = F.cross_entropy(model(tokens(3)).logits, labels, reduction="none")
    found = chunked_loss(model, input_ids=tokens(3), labels=labels, loss_weights=weights)
    assert_close(found, (losses * weights).sum() / weights.sum())


@pytest.mark.parametrize(
    "placed",
    [
        lambda value: value.reshape(-1)[3:].view(3, 5).contiguous(),
        lambda value: F.pad(value, (0, 1), value=0)[..., 1:].clone().flatten(),
        lambda value: F.pad(value, pad=(1, 0)).to("cpu"),
        lambda value: torch.cat([value, value], 1),
        lambda value: torch.reshape(value, (6, 3)).to(torch.device("cpu")),
    ],
)
def test_weights_go_where_their_labels_go(placed: Any) -> None:
    labels, weights = torch.arange(18).view(2, 9), torch.arange(18).view(2, 9).float()
    found = placed(WeightedLabels.of(labels, weights))
    assert torch.equal(found.plain, placed(labels)) and torch.equal(found.weights, placed(weights))


def test_labels_in_front_of_weighted_ones_count_once() -> None:
    labels = WeightedLabels.of(torch.ones(1, 2, dtype=torch.long), torch.full((1, 2), 0.5))
    assert torch.cat([labels.new_full((1, 1), -100), labels], 1).weights.tolist() == [[1.0, 0.5, 0.5]]


def test_what_is_made_of_labels_otherwise_is_plain() -> None:
    labels = WeightedLabels.of(torch.arange(4), torch.rand(4))
    for found in (
        labels + 1,
        labels.ne(2),
        labels.float(),
        labels.masked_fill(labels > 1, 0),
        labels.to(torch.float32),
        torch.zeros(4).to(labels),
    ):
        assert type(found) is Tensor


def test_a_loss_that_leaves_weights_out_is_refused() -> None:
    model = llama()
    model.loss_function = lambda logits, labels, **unused: logits.float().logsumexp(-1).mean()
    with pytest.raises(TrainingError, match="the loss of LlamaForCausalLM does not use them: leave the weights out"):
        chunked_loss(model, **batch())
    given = with_loss_weights(batch())
    assert "loss_weights" not in given and isinstance(given["labels"], WeightedLabels)
    assert with_loss_weights({"input_ids": 1}) == {"input_ids": 1}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_chunks_of_weighted_rows_add_up(reduction: str) -> None:
    torch.manual_seed(0)
    layer, hidden = torch.nn.Linear(8, 11), torch.randn(12, 8, requires_grad=True)
    targets, weights = torch.randint(0, 11, (12,)), torch.rand(12)
    targets[::5] = -100
    options: dict[str, Any] = {"label_smoothing": 0.1, "reduction": reduction, "weights": weights}
    loss = chunked_cross_entropy(layer, hidden, targets, chunk_size=5, **options)
    found = torch.autograd.grad(loss, [hidden, *layer.parameters()])
    losses = F.cross_entropy(layer(hidden), targets, reduction="none", label_smoothing=0.1) * weights
    total = losses.sum() / (1 if reduction == "sum" else weights[targets != -100].sum())
    assert_close(loss, total)
    for one, other in zip(found, torch.autograd.grad(total, [hidden, *layer.parameters()]), strict=True):
        assert_close(one, other)
