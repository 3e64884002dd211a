"""The one file that programs for pictures read."""

from __future__ import annotations

from pathlib import Path

from nbpeft import checkpoint
from nbpeft.checkpoint import NewFile
from nbpeft.shipping.engines.diffusers import component_of
from nbpeft.shipping.facts import AdapterFacts
from nbpeft.shipping.formats import Package


def single_file(facts: AdapterFacts, spelling: str) -> Package:
    """An adapter in one file, its keys spelled as kohya's programs or diffusers do."""
    deltas = {path: delta for path, (_, delta) in facts.deltas.items()}
    name = "pytorch_lora_weights.safetensors" if spelling == "diffusers" else f"{facts.name}.safetensors"
    size = sum(factor.numel() * factor.element_size() for delta in deltas.values() for factor in (delta.down, delta.up))

    def made(path: Path) -> None:
        checkpoint.write_lora_file(path, deltas, component_of(facts.model_class), spelling)

    return Package(
        ((name, size),), lambda folder: checkpoint.replace_files(folder, [NewFile(name, made)], byte_count=size)
    )
