"""The engine at work, as a script: ``python tests/engine_alone.py [PACKAGE …]`` in an interpreter without the packages.

It adapts a tiny model, trains it in a loop of its own, saves, loads and merges, and prints ``ok`` and which of the
packages, which it must not need, were imported all the same. It imports nothing of the tests, so that it runs
wherever nbpeft is installed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Without:
    """A finder of modules that finds what another one does, but for some packages."""

    def __init__(self, finder: Any, packages: Sequence[str]) -> None:
        self._finder, self._packages = finder, packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        absent = fullname.partition(".")[0] in self._packages
        return None if absent else self._finder.find_spec(fullname, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def tiny_model() -> Any:
    """A model of two layers, the same each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()


def use() -> None:
    """Adapts, trains, saves, loads and merges; asserts that each did what it should."""
    import torch

    from nbpeft import LoraConfig, PeftModel, get_peft_model

    ids = torch.arange(12).reshape(2, 6)
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0], losses
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = model(input_ids=ids).logits
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(tiny_model(), folder)
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        merged = loaded.merge_and_unload()
        # The bound of ``tests.closeness``, which is not there: 64 terms, 16 products one after another.
        bound = 8 * torch.finfo(torch.float32).eps * (64 * 16) ** 0.5 * float(expected.abs().max())
        assert float((merged(input_ids=ids).logits - expected).abs().max()) <= bound


if __name__ == "__main__":
    packages = sys.argv[1:]
    sys.meta_path[:] = [Without(finder, packages) for finder in sys.meta_path]
    use()
    print("ok", *(name for name in packages if name in sys.modules))
