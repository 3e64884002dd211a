"""Hot-swapping under CUDA graphs: compiled once, recorded once, each swap in place."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nbpeft import LoraConfig, PeftModel, get_peft_model
from nbpeft.model import hotswap_adapter, prepare_model_for_compiled_hotswap
from tests.gpu.card import finish
from tests.tiny_models import llama, tokens


@dataclass(frozen=True)
class Swaps:
    """What came of it.

    Attributes:
        count: swaps done.
        recompiled: graphs that were compiled after the first call.
        largest_error: of an output, beside the adapter loaded afresh.
        seconds: of one swap from a file, the median.
    """

    count: int
    recompiled: int
    largest_error: float
    seconds: float


def check_swaps(device: torch.device, *, count: int = 6, graphs: bool = True) -> Swaps:
    """Swaps adapters of several ranks into one compiled model.

    Args:
        device: to run on.
        count: swaps.
        graphs: compile with ``mode="reduce-overhead"``, which records CUDA graphs; else without a compiler's backend.
    """
    options: dict[str, Any] = {"mode": "reduce-overhead"} if graphs else {"backend": "eager"}
    ids, errors, seconds = tokens(2, 8).to(device), [], []
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        sources = [_saved(Path(place) / str(turn), turn) for turn in range(count)]
        model = PeftModel.from_pretrained(llama().to(device), sources[0]).eval()
        prepare_model_for_compiled_hotswap(model, target_rank=64)
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, **options)
        for _ in range(3):  # the third call replays the graph
            compiled(input_ids=ids, use_cache=False)
        torch._dynamo.utils.counters.clear()
        for source in sources:
            began = time.perf_counter()
            hotswap_adapter(compiled, source, "default")
            finish(device)
            seconds.append(time.perf_counter() - began)
            fresh = PeftModel.from_pretrained(llama().to(device), source).eval()
            expected = fresh(input_ids=ids, use_cache=False).logits
            errors.append(float((compiled(input_ids=ids, use_cache=False).logits - expected).abs().max()))
        recompiled = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        torch._dynamo.reset()
    return Swaps(count, recompiled, max(errors), sorted(seconds)[count // 2])


def _saved(place: Path, turn: int) -> str:
    torch.manual_seed(turn)
    config = LoraConfig(r=(4, 64, 8, 48, 16, 32)[turn % 6], init_lora_weights=False, target_modules="all-linear")
    get_peft_model(llama(), config).save_pretrained(str(place))
    return str(place)
