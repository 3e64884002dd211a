"""The tensors of one adapter are one value, which is copied, counted and compared in one way."""

from __future__ import annotations

import torch

from nbpeft.engine.contract.adapter_weights import AdapterWeights, InitialComponent


def weights() -> AdapterWeights:
    tied, start = torch.ones(2, 3, requires_grad=True), torch.zeros(1)
    return AdapterWeights(
        adapters={"a": {"lora_A": tied, "lora_B": torch.ones(1)}, "b": {"lora_A": tied}},
        copies={"head": {"weight": torch.ones(4)}},
        base={"a.bias": torch.ones(5)},
        shared={"table": torch.ones(6)},
        parameters=("a",),
        starts={"a": InitialComponent(start, start, "pissa", ("lora_A", "lora_B"))},
    )


def test_copies_are_independent_and_what_is_tied_stays_tied() -> None:
    first = weights()
    second = first.copied()
    assert second.equals(first) and second.parameters == first.parameters
    assert second.adapters["a"]["lora_A"] is second.adapters["b"]["lora_A"]
    places = [tensor.data_ptr() for tensor in second.tensors.values()]
    assert not {tensor.data_ptr() for tensor in first.tensors.values()} & {*places}
    assert not any(tensor.requires_grad for tensor in second.tensors.values())
    assert second.starts["a"].down is not first.starts["a"].down


def test_each_tensor_counts_once() -> None:
    assert weights().byte_count == 4 * (6 + 1 + 4 + 5 + 6)


def test_other_values_and_other_names_are_other_weights() -> None:
    for group, name in (("adapters", "a"), ("copies", "head")):
        other = weights().copied()
        next(iter(getattr(other, group)[name].values())).add_(1)
        assert not other.equals(weights())
    for group in ("base", "shared"):
        other = weights().copied()
        getattr(other, group).clear()
        assert not other.equals(weights())
