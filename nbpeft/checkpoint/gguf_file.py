"""Reads GGUF files, and writes them one tensor at a time, with the package ``gguf``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nbpeft._util.optional import needs
from nbpeft.checkpoint import k_quants
from nbpeft.errors import CheckpointError, in_one_line

GGUF_TYPES = {
    **{"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"},
    **{"q6_k": "MOSTLY_Q6_K", "q5_k_m": "MOSTLY_Q5_K_M", "q4_k_m": "MOSTLY_Q4_K_M"},
}
"""Storage type of the weights -> name of the GGUF file type (``general.file_type``)."""
_FOR_SHORT_ROWS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Type with blocks of 256 -> the type with blocks of 32 that llama.cpp uses where rows do not divide into them."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor that will be written.

    Attributes:
        name: its name in the file.
        shape: outermost dimension first, as in torch.
        stored_as: storage type: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q4_k``, ``q5_k`` or ``q6_k``.
        read: returns the tensor; called when it is written, so that only one is in memory at a time.
        importance: returns how much errors in each column count, for ``q4_k``, ``q5_k`` and ``q6_k``; None if unknown.
    """

    name: str
    shape: tuple[int, ...]
    stored_as: str
    read: Callable[[], Tensor]
    importance: Callable[[], Tensor | None] = lambda: None

    @property
    def type(self) -> Any:
        """The ``GGMLQuantizationType``; as in llama.cpp another one if rows do not divide into blocks, f16 at last."""
        types, sizes = gguf_package().GGMLQuantizationType, gguf_package().GGML_QUANT_SIZES
        wanted = self.stored_as.upper()
        for name in (wanted, _FOR_SHORT_ROWS.get(wanted, "F16")):
            if self.shape[-1] % sizes[types[name]][0] == 0:
                return types[name]
        return types.F16

    @property
    def byte_count(self) -> int:
        """Size of its data in bytes."""
        block, size = gguf_package().GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // int(block) * int(size)


@dataclass(frozen=True)
class _Written:
    """An array for ``GGUFWriter`` that is written by the file itself.

    ``numpy.ndarray.tofile`` does not report what a full disk refuses of a small array.
    """

    array: Any

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)

    def tofile(self, file: BinaryIO) -> None:
        file.write(self.array.reshape(-1).view("uint8").data)


def gguf_package() -> Any:
    """Imports the package ``gguf``.

    Raises:
        MissingPackageError: it is not installed.
    """
    with needs("gguf", "Writing a GGUF file"):
        return importlib.import_module("gguf")


def write_gguf(path: Path, architecture: str, describe: Callable[[Any], object], tensors: Sequence[GgufTensor]) -> None:
    """Writes a GGUF file.

    Args:
        path: the file; an existing one is replaced.
        architecture: value of the key ``general.architecture``.
        describe: called with the ``GGUFWriter`` after the tensors' names and shapes were added; adds the other keys.
        tensors: the tensors, in the order in which they are read and written.

    Raises:
        CheckpointError: a tensor does not have the shape of its ``GgufTensor``.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for tensor in tensors:
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type) if _in_bytes(tensor) else tensor.shape
            writer.add_tensor_info(tensor.name, shape, _array_type(tensor), tensor.byte_count, raw_dtype=tensor.type)
        describe(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_Written(_data(tensor)))
    finally:
        writer.close()


def read_gguf(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a GGUF file, dequantized to float32, by name.

    Raises:
        CheckpointError: the file is not a GGUF file.
    """
    gguf = gguf_package()
    try:
        found = gguf.GGUFReader(path).tensors
    except (OSError, ValueError, IndexError, KeyError) as error:  # the package reads past the end of a short file
        raise CheckpointError(f"{path} cannot be read: {in_one_line(error)}") from None
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in found
    }


def file_type(stored_as: str) -> Any:
    """Returns the value of ``general.file_type`` for a storage type."""
    return gguf_package().LlamaFileType[GGUF_TYPES[stored_as]]


def _in_bytes(tensor: GgufTensor) -> bool:
    """Returns whether the package represents the type as raw bytes: all but float32 and float16."""
    return tensor.type.name not in ("F32", "F16")


def _array_type(tensor: GgufTensor) -> Any:
    numpy = importlib.import_module("numpy")
    return numpy.dtype("uint8" if _in_bytes(tensor) else {"F32": "float32", "F16": "float16"}[tensor.type.name])


def _data(tensor: GgufTensor) -> Any:
    value = tensor.read()
    if tuple(value.shape) != tensor.shape:
        raise CheckpointError(f"{tensor.name} has shape {tuple(value.shape)}, expected {tensor.shape}")
    array = value.detach().to("cpu", torch.float32).contiguous().numpy()
    if tensor.type.name in _FOR_SHORT_ROWS:
        if not value.isfinite().all():
            raise CheckpointError(f"{tensor.name} is not finite everywhere, so {tensor.stored_as} cannot store it")
        counts = tensor.importance()
        return k_quants.quantize(array, tensor.type.name.lower(), None if counts is None else counts.numpy())
    return gguf_package().quants.quantize(array, tensor.type)
