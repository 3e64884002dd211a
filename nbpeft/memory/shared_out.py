"""What one of several processes needs of a step: the whole of it with DDP, a part of the weights with FSDP2."""

from __future__ import annotations

import dataclasses

from nbpeft.memory.formatting import size_text
from nbpeft.names import QUANTIZATIONS
from nbpeft.state import MemoryPart

_GATHERED_LAYERS = 2
"""The layer that is computed, and the one that is fetched meanwhile."""
_SHARED = ("adapters", "optimizer", "gradients")


def for_one_process(
    parts: tuple[MemoryPart, ...],
    processes: int,
    *,
    sharded: bool,
    kinds: dict[str, int],
    layer_bytes: int,
    layer_count: int,
    trained_bytes: int,
) -> tuple[MemoryPart, ...]:
    """Return the parts of a forecast, as one of several processes with its own batch needs them.

    DDP copies gradients into buckets before it sends them. FSDP2 shares weights out, and gathers a layer where it is
    computed; what lies outside of the layers, embeddings and head, is counted whole, as are weights in 4 or 8 bits,
    which it does not shard.

    Args:
        parts: of one process that trains alone with the same batch.
        processes: how many there are.
        sharded: whether FSDP2 shards the model; DDP copies it.
        kinds: bytes of base weights by the way they are stored.
        layer_bytes: of one layer's base weights that are not quantized; 0 where layers differ.
        layer_count: how many there are.
        trained_bytes: of all that trains, and so of its gradients.
    """
    if not sharded:
        return (*parts, MemoryPart("gradient buckets", trained_bytes, "sent to the other processes"))
    whole = sum(size for kind, size in kinds.items() if kind.split(" ")[0] in QUANTIZATIONS)
    dense = sum(kinds.values()) - whole
    outside = max(dense - layer_bytes * layer_count, 0)
    gathered = min(outside + _GATHERED_LAYERS * layer_bytes, dense)
    base = whole + -(-dense // processes)
    words = f"a share of {size_text(dense)}" + (f", {size_text(whole)} quantized whole" if whole else "")
    found = [MemoryPart("base weights", base, words)]
    for part in parts[1:]:
        shared = part.name in _SHARED
        found.append(dataclasses.replace(part, byte_count=-(-part.byte_count // processes)) if shared else part)
    return (*found, MemoryPart("gathered weights", gathered, "layers in use, embeddings and head"))
