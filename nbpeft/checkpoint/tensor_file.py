"""Reads and writes the file with the tensors. Nothing is ever unpickled but plain tensors."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nbpeft.errors import CheckpointError, ConfigError, CorruptCheckpointError

WEIGHTS_NAME = "adapter_model.safetensors"
LEGACY_WEIGHTS_NAME = "adapter_model.bin"

_READ_AT_ONCE = 2**30
"""Files of more bytes are copied tensor by tensor: slower, but never twice in memory."""

UNREADABLE = (safetensors.SafetensorError, OSError, MemoryError, KeyError, ValueError, TypeError, RuntimeError)
"""What reading a damaged file raises; a KeyError names a dtype that the libraries here do not know."""

_DIRECT_DEVICES = frozenset({"cpu", "cuda"})


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the file needs them: detached, contiguous, none sharing memory with another.

    Raises:
        CheckpointError: a tensor has no data (it lies on the meta device).
    """
    seen: set[tuple[str, int]] = set()
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach()
        if tensor.is_meta:
            raise CheckpointError(
                f"{key} has no data (meta device): load or offload the model's weights first", key=key
            )
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        memory = (str(tensor.device), tensor.untyped_storage().data_ptr())
        if memory in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        elif not tensor.is_contiguous():
            tensor = tensor.contiguous()
        seen.add(memory)
        result[key] = tensor
    return result


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with the permissions any new file would get."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(dict(tensors), str(path), metadata={"format": "pt", **metadata})
    path.chmod(mode & 0o7777)


def write_pickled(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the tensors as PEFT did before safetensors, for programs that read nothing else."""
    # A tensor that is a part of a larger one would take all of that along.
    torch.save({key: tensor.clone() for key, tensor in tensors.items()}, path)


def read_tensors(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file, safetensors or PEFT's old ``.bin``.

    The tensors own their memory: the file may be replaced while they are in use.

    Raises:
        ConfigError: there is no such device.
        CorruptCheckpointError: the file is truncated, altered or something else.
    """
    target = _device(device)
    if path.suffix == ".bin":
        return _read_legacy(path, device), {}
    direct = str(device) if target.type in _DIRECT_DEVICES else "cpu"
    try:
        metadata, tensors = _read_owned(path) if direct == "cpu" else _read_mapped(path, direct)
    except UNREADABLE as error:
        raise unreadable(path, error) from None
    if direct == "cpu" and target.type != "cpu":
        tensors = {key: tensor.to(target) for key, tensor in tensors.items()}
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone; empty for a ``.bin``.

    Raises:
        CorruptCheckpointError: the file is truncated, altered or something else.
    """
    if path.suffix == ".bin":
        return {}
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def _device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        target = None
    library: Any = None if target is None else getattr(torch, target.type, None)
    if target is None or (hasattr(library, "is_available") and not library.is_available()):
        raise ConfigError(f"there is no device {str(device)!r} here to read an adapter to", device=str(device))
    return target


def _read_owned(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    # Read, not mapped: when another program shortens a mapped file, the process dies.
    if path.stat().st_size > _READ_AT_ONCE:
        metadata, tensors = _read_mapped(path, "cpu")
        return metadata, {key: tensor.clone() for key, tensor in tensors.items()}
    data = path.read_bytes()
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__") or {}, tensors


def _read_mapped(path: Path, device: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safetensors.safe_open(str(path), framework="pt", device=device) as file:
        keys = file.keys()
        return file.metadata() or {}, {key: file.get_tensor(key) for key in keys}


def _read_legacy(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        _refuse_compressed(path)
        tensors: Any = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a pickle that somebody else made can raise anything
        raise unreadable(path, error) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in tensors.items()
    ):
        raise CorruptCheckpointError(f"{path} does not hold a dictionary of tensors", path=str(path))
    return tensors


def _refuse_compressed(path: Path) -> None:
    """Raises ValueError for an archive that grows when it is read; torch writes none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("its archive is compressed")


def unreadable(path: Path, error: Exception) -> CorruptCheckpointError:
    """The error to raise for one of ``UNREADABLE``."""
    text = f"its dtype {error} is not known here" if isinstance(error, KeyError) else str(error)
    if "weights_only" in text:  # torch's advice is to run what is in there
        text = "it holds more than tensors, and was not opened"
    reason = (text.strip().splitlines() or [type(error).__name__])[0][:200]
    return CorruptCheckpointError(
        f"{path} cannot be read: it is truncated, altered or not a file of tensors ({reason})", path=str(path)
    )
