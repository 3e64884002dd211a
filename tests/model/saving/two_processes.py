"""What each of two processes runs: python -m torch.distributed.run --nproc_per_node 2 this.py FOLDER."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import nbpeft
from tests.tiny_models import adapted, llama, randomize


class Attention(nn.Module):
    """A model of PyTorch's attention, whose projections are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.mha(x, x, x)[0]
        return output


def adapted_attention() -> Any:
    """The attention with an adapter on both of its projections; the same in each process."""
    torch.manual_seed(0)
    return nbpeft.get_peft_model(Attention(), nbpeft.LoraConfig(r=2, target_modules=["mha"], init_lora_weights=False))


def save(folder: Path, rank: int) -> None:
    """Saves a sharded adapter as scripts do, and compares the file."""
    model = adapted(llama())
    randomize(model)
    expected = {name: tensor.clone() for name, tensor in nbpeft.get_peft_model_state_dict(model).items()}
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    model.save_pretrained(str(folder), is_main_process=rank == 0)
    distributed.barrier()
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)


def state_dicts() -> None:
    """Compares the state dict of an adapter in a wrapped model with that of the model alone, and loads it."""
    model = adapted_attention()
    expected = {name: tensor.clone() for name, tensor in nbpeft.get_peft_model_state_dict(model).items()}
    assert len(expected) == 4
    wrapped: Any = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    found = nbpeft.get_peft_model_state_dict(wrapped)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    other, x = adapted_attention(), torch.randn(3, 2, 8)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2 if parameter.requires_grad else 1)
    nbpeft.set_peft_model_state_dict(other, found)
    assert torch.equal(other(x), wrapped(x))


def main() -> None:
    distributed.init_process_group("gloo")
    distributed.device_mesh.init_device_mesh("cpu", (2,))
    save(Path(sys.argv[1]), distributed.get_rank())
    state_dicts()
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # threads of torch that still wait would abort a normal exit


if __name__ == "__main__":
    main()
