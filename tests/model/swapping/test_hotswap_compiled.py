"""Hot-swapping saved adapters in compiled models: compiled once, each output as loaded afresh.

Whether a graph is compiled again is decided before its backend sees it. Inductor, which takes most of the time,
compiles what has kernels of its own here, and everything in the long run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nbpeft.model import PeftModel, hotswap_adapter, prepare_model_for_compiled_hotswap
from tests.closeness import assert_close
from tests.effort import TIER
from tests.model.pool_support import save
from tests.tiny_models import adapted, classifier, gpt2, llama, tokens

pytestmark = pytest.mark.slow
RANKS = (4, 64, 8, 48, 16, 32, 24)
QUICK_BACKEND = "inductor" if TIER == "long" else "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled_since() -> int:
    """Graphs compiled since the last call."""
    graphs = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.utils.counters.clear()
    return graphs


def scores(model: Any, ids: Tensor) -> Tensor:
    output: Tensor = model(input_ids=ids, use_cache=False).logits
    return output


VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (llama, {"target_modules": "all-linear"}),
    "dora": (llama, {"use_dora": True}),
    "rslora": (llama, {"use_rslora": True}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (classifier, {"task_type": "SEQ_CLS"}),
}


WITH_INDUCTOR = ("lora", "dora")


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_of_all_ranks(variant: str, tmp_path: Path) -> None:
    """With ``dynamic=True``: one warm-up, then swaps among ranks 4 to 64 with batches of any size and length."""
    make, changes = VARIANTS[variant]
    sources = [save(tmp_path / str(rank), rank, make, r=rank, lora_alpha=rank // 2 + 3, **changes) for rank in RANKS]
    model = PeftModel.from_pretrained(make(), sources[0])
    prepare_model_for_compiled_hotswap(model, target_rank=64)
    backend = "inductor" if variant in WITH_INDUCTOR else QUICK_BACKEND
    compiled: Any = torch.compile(model, dynamic=True, backend=backend)
    shapes = [(2, 7), (3, 9), (5, 4)]
    with torch.no_grad():
        for rows, length in shapes:
            scores(compiled, tokens(rows, length))
        assert compiled_since() >= 1
        with torch._dynamo.config.patch(error_on_recompile=True):
            for turn, source in enumerate([*sources, sources[0]]):
                hotswap_adapter(compiled, source, "default")
                ids = tokens(*shapes[turn % 3], seed=turn)
                expected = scores(PeftModel.from_pretrained(make(), source), ids)
                assert_close(scores(compiled, ids), expected)
    assert compiled_since() == 0


def test_fifty_swaps_after_one_warm_up(tmp_path: Path) -> None:
    """Fixed shapes, fifty different adapters from files."""
    sources = [
        save(tmp_path / str(turn), turn, r=RANKS[turn % 7], lora_alpha=2 + turn % 8, target_modules="all-linear")
        for turn in range(50)
    ]
    model = adapted(r=4, target_modules="all-linear")
    prepare_model_for_compiled_hotswap(model, target_rank=64)
    compiled: Any = torch.compile(model)
    ids = tokens(rows=2, length=8)
    with torch.no_grad():
        scores(compiled, ids)
        assert compiled_since() >= 1
        with torch._dynamo.config.patch(error_on_recompile=True):
            for source in sources:
                hotswap_adapter(compiled, source, "default")
                expected = scores(PeftModel.from_pretrained(llama(), source), ids)
                assert_close(scores(compiled, ids), expected)
    assert compiled_since() == 0


def test_marked_dynamic_dimensions(tmp_path: Path) -> None:
    """``mark_dynamic`` on rows and length: the first call compiles for all sizes."""
    sources = [save(tmp_path / str(rank), rank, r=rank, lora_alpha=rank + 1) for rank in RANKS]
    model = PeftModel.from_pretrained(llama(), sources[0])
    prepare_model_for_compiled_hotswap(model, target_rank=64)
    compiled: Any = torch.compile(model, backend=QUICK_BACKEND)
    with torch.no_grad():
        for turn in range(14):
            ids = tokens(rows=2 + turn % 5, length=3 + turn, seed=turn)
            marked = ids.clone()
            torch._dynamo.mark_dynamic(marked, 0)
            torch._dynamo.mark_dynamic(marked, 1)
            source = sources[turn % 7]
            hotswap_adapter(compiled, source, "default")
            expected = scores(PeftModel.from_pretrained(llama(), source), ids)
            with torch._dynamo.config.patch(error_on_recompile=turn > 0):
                assert_close(scores(compiled, marked), expected)
            if turn == 0:
                assert compiled_since() >= 1
    assert compiled_since() == 0


def test_other_adapters_and_refused_swaps_leave_the_graph_alone(tmp_path: Path) -> None:
    """A swap of an adapter that rests, one that validation refuses, and one with fewer layers."""
    first, second = save(tmp_path / "1", 1, r=8), save(tmp_path / "2", 2, r=2, lora_alpha=9)
    fewer = save(tmp_path / "3", 3, r=6, target_modules=["v_proj"])
    model = PeftModel.from_pretrained(llama(), first)
    model.load_adapter(first, "resting")
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    compiled: Any = torch.compile(model)
    ids = tokens()
    with torch.no_grad():
        before = scores(compiled, ids)
        compiled_since()
        with torch._dynamo.config.patch(error_on_recompile=True):
            hotswap_adapter(compiled, second, "resting")
            assert torch.equal(scores(compiled, ids), before)
            with pytest.raises(ValueError, match="did not pass its validation"):
                hotswap_adapter(
                    compiled, second, "default", validate=lambda swapped: not scores(swapped, ids).isfinite().all()
                )
            assert torch.equal(scores(compiled, ids), before)
            hotswap_adapter(compiled, fewer, "default")
            expected = scores(PeftModel.from_pretrained(llama(), fewer), ids)
            assert_close(scores(compiled, ids), expected)
    assert compiled_since() == 0
