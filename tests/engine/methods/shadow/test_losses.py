"""The losses of the side network, and which token of a row its classifier reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nbpeft.engine.methods.shadow.losses import class_loss, language_loss, last_tokens


def test_each_kind_of_labels_has_its_loss() -> None:
    torch.manual_seed(0)
    logits, classes = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    assert class_loss(logits, classes) == F.cross_entropy(logits, classes)
    several = F.one_hot(classes, 3).float()
    assert class_loss(logits, several) == F.binary_cross_entropy_with_logits(logits, several)
    for labels in (classes, classes[:, None]):
        assert class_loss(logits[:, :1], labels) == F.mse_loss(logits[:, 0], classes.float())
    words = torch.tensor([[0, -100], [2, 1]])
    expected = F.cross_entropy(logits[[0, 2, 3]], torch.tensor([0, 2, 1]))
    assert language_loss(logits.view(2, 2, 3), words) == expected


def test_the_last_token_of_a_row_is_no_padding() -> None:
    hidden = torch.arange(12.0).view(4, 3, 1)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]])
    assert last_tokens(hidden, mask).flatten().tolist() == [2, 4, 6, 11]
    assert last_tokens(hidden, None).flatten().tolist() == [2, 5, 8, 11]
