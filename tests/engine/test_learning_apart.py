"""Adapters that learn side by side: who acts, who trains, and which rows are whose."""

from __future__ import annotations

import torch

from nbpeft.engine.changes.active_state import RowAssignment
from nbpeft.model.handle.serving import serving_rows
from tests.closeness import assert_close
from tests.tiny_models import adapted, logits, tokens


def two() -> tuple[object, torch.Tensor]:
    model = adapted(name="a", modules_to_save=["lm_head"])
    model.add_adapter("b", model.peft_config["a"].copy(r=2))
    return model, tokens(4)


def test_all_train_and_the_first_acts() -> None:
    model, _ = two()
    first = logits(model)
    model.set_adapter("b")
    with model.manager.use(["a", "b"], independent=True):
        assert model.active_adapters == ["a", "b"]
        assert all(part.requires_grad for name in "ab" for part in model.manager.parameters(name))
        assert torch.equal(logits(model), first)
    assert model.active_adapters == ["b"]
    assert not any(part.requires_grad for part in model.manager.parameters("a"))


def test_runs_of_rows_follow_beams() -> None:
    rows = RowAssignment(("a", "b"), (0, 0, -1, 1, 0), (1.0, 1.0))
    assert rows.runs(10) == [("a", slice(0, 4)), ("", slice(4, 6)), ("b", slice(6, 8)), ("a", slice(8, 10))]


def test_a_mixed_batch_gives_each_adapter_its_gradient() -> None:
    """Rows of one adapter apart, of another, and of none: outputs and gradients are those of batches of their own."""
    model, batch = two()
    names = ["a", "b", "__base__", "a"]
    model.train()
    with model.manager.use(["a", "b"], independent=True):
        with serving_rows(model.manager, names, (), {"input_ids": batch}):
            mixed = model(input_ids=batch).logits
            mixed.square().sum().backward()
        found = {name: [part.grad.clone() for part in model.manager.parameters(name)] for name in "ab"}
        for name, places in (("a", [0, 3]), ("b", [1])):
            model.zero_grad()
            with model.manager.use(name):
                alone = model(input_ids=batch[places]).logits
                alone.square().sum().backward()
            assert_close(mixed[places], alone)
            assert_close(found[name], [part.grad for part in model.manager.parameters(name)])
