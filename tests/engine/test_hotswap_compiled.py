"""Hot-swaps inside compiled models: nothing is compiled again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from nbpeft.engine.hotswap import prepare_for_hotswap, swap
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.runtime.manager import AdapterManager
from tests.closeness import assert_close
from tests.engine.test_hotswap import IDS, VARIANTS, config_of, fresh, manager_of, trained
from tests.tiny_models import llama


@pytest.fixture
def no_recompiles() -> Iterator[Callable[[], int]]:
    """Counts graphs compiled since the last call."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def compiled() -> int:
        frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch._dynamo.utils.counters.clear()
        return int(frames)

    yield compiled
    torch._dynamo.reset()


@pytest.mark.drawn(2)
@pytest.mark.parametrize("variant", ["lora", "rank-pattern", "dora", "lora-bias", "modules-to-save"])
def test_compiled_models_do_not_compile_again(variant: str, no_recompiles: Callable[[], int]) -> None:
    options = VARIANTS[variant]
    old = config_of(8, **options)
    model = fresh(old, trained(old)).eval()
    manager = manager_of(model)
    prepare_for_hotswap(manager, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(IDS)
        assert no_recompiles() == 1
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed, rank in enumerate([4, 64, 8, 32, 16, 6]):
                new = config_of(rank, lora_alpha=rank * (seed + 1) / 3, **options)
                weights = trained(new, seed)
                swap(manager, "default", new, weights)
                assert_close(compiled(IDS), fresh(new, weights)(IDS))
    assert no_recompiles() == 0


@pytest.mark.slow
def test_fifty_swaps_in_a_compiled_language_model(no_recompiles: Callable[[], int]) -> None:
    """Dynamic batch and length, ranks 4 to 64: compiled once, each output as loaded afresh."""
    model, plain = llama(), llama()

    def config(rank: int, alpha: float) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False)

    manager, eager = AdapterManager.attach(model), AdapterManager.attach(plain)
    manager.add("default", config(4, 8.0))
    prepare_for_hotswap(manager, 64)
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    shapes = [(2, 7), (3, 9), (5, 4)]
    with torch.no_grad():
        for batch, length in shapes:
            compiled(torch.zeros(batch, length, dtype=torch.long), use_cache=False)
        no_recompiles()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for count in range(50):
                rank = [4, 8, 16, 24, 32, 48, 64][count % 7]
                new = config(rank, 2.0 + count)
                eager.add("default", new, replace=True)
                swap(manager, "default", new, eager.weights("default"))
                ids = torch.randint(64, shapes[count % 3])
                found = compiled(ids, use_cache=False).logits
                assert_close(found, plain(ids, use_cache=False).logits)
    assert no_recompiles() == 0
