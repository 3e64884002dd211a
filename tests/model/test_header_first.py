"""Files larger than memory: they are refused by their header, or only what the model takes of them is read."""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from nbpeft import PeftModel, VBLoRAConfig, get_peft_model
from nbpeft.checkpoint import read_checkpoint
from nbpeft.checkpoint.tensor_file import read_metadata
from nbpeft.errors import CheckpointError, NbpeftError
from nbpeft.model import AdapterPool, hotswap_adapter, merge_to_folder
from nbpeft.training.disk.checkpoints import flaw_of
from tests.tiny_models import adapted, llama, logits, randomize

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HUGE = 6 * 2**30
A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{name}.weight" for name in "AB")
READ_AT_MOST, GROWS_AT_MOST = 4 * 2**20, 64 * 2**20


def bytes_read() -> int:
    counts = Path("/proc/self/io")
    return int(counts.read_text().partition("rchar: ")[2].split()[0]) if counts.exists() else 0


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Bounded:
    """Little is read and little memory is taken inside the block."""

    def __enter__(self) -> None:
        self.before = bytes_read(), peak()

    def __exit__(self, *_: object) -> None:
        assert bytes_read() - self.before[0] < READ_AT_MOST
        assert peak() - self.before[1] < GROWS_AT_MOST


def with_huge(path: Path, *keys: str, first: bool = False, **shaped: tuple[str, list[int]]) -> None:
    """Adds tensors of some gigabytes, all holes, to a small file of tensors, behind the others or before them."""
    data = path.read_bytes() if path.exists() else (2).to_bytes(8, "little") + b"{}"
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    held = [entry for name, entry in header.items() if name != "__metadata__"]
    start = end = 0 if first else len(rest)
    for key, (dtype, shape) in {**dict.fromkeys(keys, ("F32", [4, HUGE // 16])), **shaped}.items():
        end = start + math.prod(shape) * {"F32": 4, "I64": 8, "U8": 1}[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    for entry in held if first else ():
        entry["data_offsets"] = [place + end for place in entry["data_offsets"]]
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + (b"" if first else rest))
        file.truncate(8 + len(text) + (end if first else max(end, len(rest))))
        file.seek(0, os.SEEK_END)
        file.write(rest if first else b"")


def instead(folder: Path, key: str, dtype: str = "F32") -> None:
    """Puts a huge tensor into the place of another."""
    tensors = dict(read_checkpoint(folder).tensors)
    del tensors[key]
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    with_huge(folder / WEIGHTS, **{key: (dtype, [4, HUGE // 16])})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = adapted(llama())
    randomize(model, seed=3)
    model.save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def alone(folder: Path) -> None:
    """No key of it fits."""
    (folder / WEIGHTS).unlink()
    with_huge(folder / WEIGHTS, "base_model.model.no.such.layer.lora_A.weight")


def other_shape(folder: Path) -> None:
    instead(folder, A)


def whole_numbers(folder: Path) -> None:
    instead(folder, A, "I64")


def another_method(folder: Path) -> None:
    (folder / CONFIG).write_text('{"peft_type": "NOTHING"}')
    with_huge(folder / WEIGHTS, "x")


def another_config(folder: Path) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**fields, "r": "four"}))
    with_huge(folder / WEIGHTS, "x")


def no_such_targets(folder: Path) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**fields, "target_modules": ["nothing"]}))
    with_huge(folder / WEIGHTS, "x")


def load(folder: Path) -> None:
    PeftModel.from_pretrained(llama(), folder)


def swap(folder: Path) -> None:
    hotswap_adapter(adapted(llama()), folder, "default")


def pool(folder: Path) -> None:
    AdapterPool(llama(), limit_mb=100, adapters={"a": folder}).set_adapter("a")


WAYS = (load, swap, pool)


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (alone, r"nothing in the checkpoint fits|has unexpected|has no"),
        (other_shape, r"size mismatch"),
        (whole_numbers, r"is of int64"),
        (another_method, r"NOTHING"),
        (another_config, r"r must be"),
        (no_such_targets, r"nothing|has unexpected x|has no x"),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_does_not_fit_is_refused_unread(
    way: Callable[[Path], None], change: Callable[[Path], None], reported: str, folder: Path
) -> None:
    change(folder)
    assert (folder / WEIGHTS).stat().st_size > HUGE
    with Bounded(), pytest.raises(NbpeftError, match=reported):
        way(folder)


@pytest.mark.parametrize("first", [True, False])
def test_what_the_model_does_not_take_is_not_read(first: bool, folder: Path) -> None:
    expected = logits(PeftModel.from_pretrained(llama(), folder))
    with_huge(folder / WEIGHTS, "base_model.model.extra.lora_A.weight", first=first)
    with Bounded(), pytest.warns(UserWarning, match=r"unexpected in .*extra"):
        model = PeftModel.from_pretrained(llama(), folder)
    assert torch.equal(logits(model), expected)


def test_what_peft_wrote_more_than_once_is_read_once(folder: Path) -> None:
    """Such keys are not reported, whatever their shape."""
    name = A.removesuffix("weight")
    with_huge(folder / WEIGHTS, f"{name}modules_to_save.weight")
    with Bounded():
        PeftModel.from_pretrained(llama(), folder)


def test_tensors_of_another_shape_that_may_be_left_out_are_not_read(folder: Path) -> None:
    instead(folder, A)
    with Bounded(), pytest.warns(UserWarning, match="1 tensor of another shape skipped: 'base_model"):
        PeftModel.from_pretrained(llama(), folder, ignore_mismatched_sizes=True)


def test_what_is_made_of_much_that_the_model_lacks_is_not_read(tmp_path: Path) -> None:
    """Indices and shares stand for the logits of VB-LoRA: those of a layer that is not there."""
    fields: dict[str, Any] = {"num_vectors": 16, "vector_length": 8, "save_only_topk_weights": True}
    config = VBLoRAConfig(r=2, target_modules=["q_proj"], **fields)
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    key = "base_model.model.model.layers.9.q_proj.vblora_logits_A"
    packed = {f"{key}_topk_weights": ("F32", [1, 2**30, 1]), f"{key}_topk_indices": ("U8", [1, 2**30, 2])}
    with_huge(tmp_path / WEIGHTS, **packed)
    with Bounded(), pytest.raises(CheckpointError, match="fits nothing in this model"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.slow
def test_a_pickled_file_is_mapped_until_it_is_known_to_fit(folder: Path) -> None:
    tensors = dict(read_checkpoint(folder).tensors)
    (folder / WEIGHTS).unlink()
    large = torch.zeros(40 * 2**20)
    torch.save({**tensors, "base_model.model.extra.lora_A.weight": large}, folder / "adapter_model.bin")
    expected = logits(adapted(llama()))
    with Bounded(), pytest.warns(UserWarning, match="unexpected in"):
        model = PeftModel.from_pretrained(llama(), folder)
    assert not torch.equal(logits(model), expected)
    torch.save({"x": large}, folder / "adapter_model.bin")
    with Bounded(), pytest.raises(CheckpointError, match="nothing in the checkpoint fits"):
        PeftModel.from_pretrained(llama(), folder)
    torch.save({"x": torch.zeros(70 * 2**20)}, folder / "adapter_model.bin", _use_new_zipfile_serialization=False)
    with Bounded(), pytest.raises(CheckpointError, match="it is not a zip archive, and has more than"):
        PeftModel.from_pretrained(llama(), folder)


def test_one_file_of_the_picture_world_is_not_read_either(tmp_path: Path) -> None:
    with_huge(tmp_path / "style.safetensors", "lora_unet_down_blocks_0.lora_down.weight")
    with Bounded(), pytest.raises(CheckpointError, match="fits this model"):
        PeftModel.from_pretrained(llama(), tmp_path / "style.safetensors")
    stem = "lora_te_model_layers_0_self_attn_q_proj"
    (tmp_path / "style.safetensors").unlink()
    ends = ("alpha", "lora_down.weight", "lora_up.weight")
    with_huge(tmp_path / "style.safetensors", *(f"{stem}.{end}" for end in ends))
    with (
        Bounded(),
        pytest.raises(CheckpointError, match=r"alpha' in .* has .* elements: an alpha, if present, is one number"),
    ):
        PeftModel.from_pretrained(llama(), tmp_path / "style.safetensors")


def test_merging_into_a_folder_reads_no_more(folder: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    alone(folder)
    with Bounded(), pytest.raises(CheckpointError, match="nothing in the checkpoint fits"):
        merge_to_folder(tmp_path / "base", folder, tmp_path / "merged")


def test_looking_at_a_state_reads_no_tensor(folder: Path) -> None:
    alone(folder)
    (folder / "trainer_state.json").write_text("{}")
    with Bounded():
        assert read_metadata(folder / WEIGHTS) == {} and flaw_of(folder) is None
