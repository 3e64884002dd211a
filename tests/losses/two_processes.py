"""What each of two processes runs: losses of training loops, from whole logits and in chunks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from nbpeft.losses import chunked_head, without_logits
from tests.tiny_models import adapted, llama, tokens

ADAPTERS: dict[str, Any] = {
    "frozen": {},
    "adapted": {"target_modules": ["q_proj", "lm_head"]},
    "copied": {"modules_to_save": ["lm_head"]},
}
WRAPPINGS = ("ddp", "ddp-unused", "fsdp", "fsdp-head")


def wrapped(model: Any, wrapping: str) -> Any:
    """The model as two processes share its training."""
    from torch.distributed.fsdp import fully_shard

    if wrapping.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters=wrapping == "ddp-unused")
    base = model.get_base_model()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in (*base.model.layers, *([base.lm_head] if wrapping == "fsdp-head" else [])):
        fully_shard(layer, mesh=mesh)
    fully_shard(base, mesh=mesh)
    return model


def losses(wrapping: str, adapter: str, chunk_size: int) -> list[float]:
    """Losses of some steps, each process with rows of its own."""
    model = wrapped(adapted(llama(), lora_dropout=0.0, **ADAPTERS[adapter]).train(), wrapping)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    found = []
    for step in range(3):
        ids = tokens(2, 9, seed=2 * step + distributed.get_rank())
        labels = ids.clone()
        labels[0, : 4 + distributed.get_rank()] = -100
        with chunked_head(model, chunk_size) as head, without_logits(model):
            loss = model(input_ids=ids, labels=labels).loss
        # A head that is sharded by itself is whole during its own call alone.
        assert head.chunked == (chunk_size > 0 and wrapping != "fsdp-head")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def main() -> None:
    distributed.init_process_group("gloo")
    result = {
        f"{wrapping} {adapter}": [losses(wrapping, adapter, chunk_size) for chunk_size in (0, 4)]
        for wrapping in WRAPPINGS
        for adapter in ADAPTERS
    }
    (Path(sys.argv[1]) / f"rank{distributed.get_rank()}.json").write_text(json.dumps(result))
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # threads of torch that still wait would abort a normal exit


if __name__ == "__main__":
    main()
