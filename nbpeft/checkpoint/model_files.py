"""Whole models on disk: reads and writes safetensors shards one tensor at a time.

A shard is a header (its length in eight bytes, then JSON: name -> dtype, shape, offsets), followed by the tensors'
bytes. ``safetensors.torch.save_file`` needs all tensors of a file in memory at once; written one by one, a model of
any size needs only the memory of its largest tensor.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nbpeft.checkpoint import inside
from nbpeft.checkpoint.atomic import NewFile, disk_errors, replace_files
from nbpeft.checkpoint.inside import shown
from nbpeft.checkpoint.staging import sweep
from nbpeft.checkpoint.tensor_file import DTYPES, LONGEST_HEADER, UNREADABLE, unreadable
from nbpeft.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ALIGNMENT = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def byte_count(self) -> int:
        """Size of its data in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ModelFolder:
    """The safetensors weights in a model's folder, read one at a time.

    Attributes:
        folder: the folder.
        shards: the tensors of each file.

    Raises:
        CheckpointNotFoundError: there are no safetensors weights.
        CorruptCheckpointError: a file cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(inside.expanded(folder))
        self._files: dict[str, Path] = {}
        self.shards: list[list[TensorSpec]] = []
        for path in _weight_files(self.folder):
            with _opened(path) as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
                self.shards.append(
                    [
                        TensorSpec(name, DTYPES[part.get_dtype()], tuple(part.get_shape()))
                        for name, part in parts.items()
                    ]
                )
            self._files |= dict.fromkeys(parts, path)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> Tensor:
        """Reads a tensor into new memory on the CPU.

        Raises:
            CorruptCheckpointError: the file has changed and can no longer be read.
        """
        with _opened(self._files[name]) as file:
            # Cloned, because a tensor of safe_open keeps the whole file mapped for as long as it lives.
            return file.get_tensor(name).clone()  # type: ignore[no-any-return]


def local_folder(name: str) -> Path:
    """Returns a model's folder: a local folder, or the cached download of a model on the hub. Nothing is downloaded.

    Args:
        name: path of the folder, or a hub id.

    Raises:
        CheckpointNotFoundError: the name is not a folder, and no such model is cached.
    """
    folder = Path(os.path.expanduser(name))
    if inside.leads_to_folder(folder):
        return folder
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, local_files_only=True))
    except (ValueError, OSError):  # not a hub id, or not in the cache
        raise CheckpointNotFoundError(f"{name} is neither a folder nor in the hub's cache", source=name) from None


def other_files(folder: Path) -> list[Path]:
    """Returns the files in a model's folder other than weights, such as config and tokenizer; no hidden files."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS)
    )


def write_model(
    folder: str | os.PathLike[str],
    shards: Sequence[Sequence[TensorSpec]],
    tensor: Callable[[str], Tensor],
    *,
    files: Sequence[NewFile] = (),
) -> list[Path]:
    """Writes a model's weights, the index of several shards, and other files, atomically.

    Args:
        folder: the target, created if needed; must not contain weights. Files of an interrupted write are removed.
        shards: the tensors of each file.
        tensor: returns the tensor of a name; it is released before the next one is requested.
        files: further files, such as config and tokenizer.

    Returns:
        The written files.

    Raises:
        CheckpointError: the folder contains weights, or cannot be written.
    """
    target = Path(inside.expanded(folder))
    with disk_errors(target):
        sweep(target, finish=False)  # removes an interrupted copy instead of finishing it
        there = target.iterdir() if inside.leads_to_folder(target) else ()
        existing = [path.name for path in there if path.name.endswith(_WEIGHTS)]
    if existing:
        remedy = "choose another folder, or replace it (replace=…)"
        raise CheckpointError(f"{shown(target)} already contains weights ({min(existing)}); {remedy}")
    count = len(shards)
    names = (
        [SINGLE] if count == 1 else [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    )
    total = sum(spec.byte_count for shard in shards for spec in shard)
    weights = [
        NewFile(name, lambda path, shard=shard: _write_shard(path, shard, tensor))  # type: ignore[misc]
        for name, shard in zip(names, shards, strict=True)
    ]
    if count > 1:
        where = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        weights.append(NewFile.of_text(INDEX, json.dumps(index, indent=2) + "\n"))
    # The config is written before the weights: without it, they would be loaded as a model of the default size. The
    # index is written last: shards without an index are not a model.
    return list(replace_files(target, [*files, *weights], byte_count=total, finish_others=False))


def in_shards(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Splits tensors into shards.

    Args:
        specs: the tensors; their order is kept.
        limit: largest size of a shard in bytes; a tensor that is larger gets its own shard.
    """
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.byte_count > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.byte_count
    return shards


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if inside.leads_to_file(index):
        try:
            names = set(json.loads(inside.read_file(index, LONGEST_HEADER))["weight_map"].values())
            if not all(name == os.path.basename(name) for name in names):
                raise ValueError("a shard is in another folder")
            paths = [folder / name for name in sorted(names)]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise CorruptCheckpointError(f"{index} is not an index of weights") from None
        missing = next((path for path in paths if not inside.leads_to_file(path)), None)
        if missing is not None:
            raise CheckpointNotFoundError(f"{missing} is listed in {INDEX}, but does not exist")
        return paths
    if inside.leads_to_file(folder / SINGLE):
        return [folder / SINGLE]
    raise CheckpointNotFoundError(f"{folder} contains neither {SINGLE} nor {INDEX}", source=str(folder))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def _write_shard(path: Path, shard: Sequence[TensorSpec], tensor: Callable[[str], Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for spec in shard:
        end = place + spec.byte_count
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for spec in shard:
            _write_tensor(file, spec, tensor(spec.name))


def _write_tensor(file: Any, spec: TensorSpec, value: Tensor) -> None:
    if value.dtype != spec.dtype or tuple(value.shape) != spec.shape:
        raise CheckpointError(f"{spec.name} is {value.dtype} {tuple(value.shape)}, expected {spec.dtype} {spec.shape}")
    if value.numel():
        file.write(value.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
