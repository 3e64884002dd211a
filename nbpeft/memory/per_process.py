"""The memory of one of several processes: with DDP it has the whole model, with FSDP2 a shard of the weights."""

from __future__ import annotations

import dataclasses

from nbpeft.memory.formatting import size_text
from nbpeft.state import MemoryPart

_GATHERED_LAYERS = 2
"""The layer that is being computed and the next one, which is prefetched."""
_SHARED = ("adapters", "optimizer", "gradients")


def for_one_process(
    parts: tuple[MemoryPart, ...],
    processes: int,
    *,
    sharded: bool,
    base_bytes: int,
    shardable_bytes: int,
    layer_bytes: int,
    layer_count: int,
    trained_bytes: int,
) -> tuple[MemoryPart, ...]:
    """Return the parts of a forecast for one of several processes, each with its own batch.

    DDP copies gradients into buckets before it sends them. FSDP2 shards weights and gathers a layer before it is
    computed. Weights outside the layers (embeddings and head) count as gathered all the time.

    Args:
        parts: the forecast of a single process with the same batch.
        processes: number of processes.
        sharded: whether FSDP2 shards the model; DDP copies it.
        base_bytes: bytes of all base weights.
        shardable_bytes: bytes of those that FSDP2 shards.
        layer_bytes: bytes of those of one layer that FSDP2 shards; 0 if layers differ.
        layer_count: number of layers.
        trained_bytes: bytes of all trained tensors, and so of their gradients.
    """
    if not sharded:
        return (*parts, MemoryPart("gradient buckets", trained_bytes, "sent to the other processes"))
    whole, outside = base_bytes - shardable_bytes, max(shardable_bytes - layer_bytes * layer_count, 0)
    gathered = min(outside + _GATHERED_LAYERS * layer_bytes, shardable_bytes)
    base = whole + -(-shardable_bytes // processes)
    detail = f"a shard of {size_text(shardable_bytes)}" + (f", and {size_text(whole)} not sharded" if whole else "")
    result = [MemoryPart("base weights", base, detail)]
    for part in parts[1:]:
        sharded_part = part.name in _SHARED
        result.append(dataclasses.replace(part, byte_count=-(-part.byte_count // processes)) if sharded_part else part)
    return (*result, MemoryPart("gathered weights", gathered, "layers in use, embeddings and head"))
