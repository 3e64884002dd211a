"""Whole models on disk: reads and writes safetensors shards one tensor at a time.

A shard is a header (its length as eight bytes, then JSON: name -> dtype, shape, place) and the
tensors' bytes one after the other. Going through it tensor by tensor, a model of any size is
copied with the memory of its largest tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nbpeft.checkpoint.atomic import NewFile, disk_errors, replace_files, shown
from nbpeft.checkpoint.staging import sweep
from nbpeft.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000
_ALIGNMENT = 8
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def byte_count(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    path: Path
    start: int
    spec: TensorSpec


class ModelFolder:
    """The weights in a model's folder, read one at a time.

    Attributes:
        folder: where they are.
        shards: the tensors of each file, in the order they lie in it.

    Raises:
        CheckpointNotFoundError: there are no safetensors weights.
        CorruptCheckpointError: a file cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.expanduser(os.fspath(folder)))
        self._places: dict[str, _Place] = {}
        self.shards: list[list[TensorSpec]] = []
        for path in _weight_files(self.folder):
            places = sorted(_places(path), key=lambda place: place.start)
            self._places.update((place.spec.name, place) for place in places)
            self.shards.append([place.spec for place in places])

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> Tensor:
        """A tensor of its own memory, on the CPU.

        Raises:
            CorruptCheckpointError: the file ends before it.
        """
        place = self._places[name]
        data = torch.empty(place.spec.byte_count, dtype=torch.uint8)
        if data.numel():
            with open(place.path, "rb") as file:
                file.seek(place.start)
                if file.readinto(data.numpy().data) != data.numel():
                    raise CorruptCheckpointError(f"{place.path} is truncated: {name} is not all there")
        return data.view(place.spec.dtype).view(place.spec.shape)


def other_files(folder: Path) -> list[Path]:
    """Config, tokenizer and whatever else in a model's folder is no weight; no hidden files, no folders."""
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
    """Writes a model's weights, an index for several shards, and other files. All or nothing.

    Args:
        folder: made if need be; must not hold a model yet. What a call that died left there is taken away.
        shards: what goes into each file.
        tensor: gives a tensor when its turn comes; it is let go before the next one.
        files: config, tokenizer, ….

    Raises:
        CheckpointError: there is a model already, or the folder cannot be written.
    """
    target = Path(os.path.expanduser(os.fspath(folder)))
    with disk_errors(target):
        sweep(target, finish=False)  # a copy that was broken off half-way
        taken = [path.name for path in target.iterdir() if path.name.endswith(_WEIGHTS)] if target.is_dir() else []
    if taken:
        raise CheckpointError(f"{shown(target)} holds weights already ({min(taken)}); choose another folder")
    count = len(shards)
    names = (
        [SINGLE] if count == 1 else [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    )
    total = sum(spec.byte_count for shard in shards for spec in shard)
    made = [
        NewFile(name, lambda path, shard=shard: _write_shard(path, shard, tensor))  # type: ignore[misc]
        for name, shard in zip(names, shards, strict=True)
    ]
    if count > 1:
        where = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        made.append(NewFile.of_text(INDEX, json.dumps(index, indent=2) + "\n"))
    # Weights without their config would be loaded as a model of some other size: they come last, and the index,
    # without which shards are no model, at the very end.
    return list(replace_files(target, [*files, *made], byte_count=total, finish_others=False))


def in_shards(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Tensors in order, in shards of at most ``limit`` bytes; a larger tensor is a shard of its own."""
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
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            paths = [folder / name for name in sorted(set(names))]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CorruptCheckpointError(f"{index} is no index of weights") from None
        missing = next((path for path in paths if not path.is_file()), None)
        if missing is not None:
            raise CheckpointNotFoundError(f"{missing} is missing, which {INDEX} names")
        return paths
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise CheckpointNotFoundError(f"{folder} holds no {SINGLE} and no {INDEX}", source=str(folder))


def _places(path: Path) -> Iterator[_Place]:
    header, start = _header(path)
    size = path.stat().st_size
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype = _DTYPES[entry["dtype"]]
            spec = TensorSpec(name, dtype, tuple(int(length) for length in entry["shape"]))
            begin, end = (int(value) for value in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise CorruptCheckpointError(f"{path} describes {name} in a way that is not understood") from None
        if begin < 0 or end - begin != spec.byte_count or start + end > size:
            raise CorruptCheckpointError(f"{path} is truncated or altered: {name} does not lie inside it")
        yield _Place(path, start + begin, spec)


def _header(path: Path) -> tuple[Mapping[str, Any], int]:
    """The header and where the data begins."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_HEADER_LIMIT, path.stat().st_size - 8):
                raise CorruptCheckpointError(f"{path} is truncated or no safetensors file")
            header = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        if isinstance(error, CorruptCheckpointError):
            raise
        raise CorruptCheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(header, dict):
        raise CorruptCheckpointError(f"{path} has no header")
    return header, 8 + length


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
        raise CheckpointError(
            f"{spec.name} came as {value.dtype} {tuple(value.shape)}, planned as {spec.dtype} {spec.shape}"
        )
    if value.numel():
        file.write(value.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
