"""GGUF files, written one tensor at a time through the package ``gguf``, which also knows the names in them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nbpeft._util.optional import needs
from nbpeft.errors import CheckpointError, in_one_line

GGUF_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""Type of weights -> name of the file type that says so."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to come.

    Attributes:
        name: as the file has it.
        shape: outermost dimension first.
        stored_as: one of ``GGUF_TYPES``.
        read: gives the tensor; it is called when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    stored_as: str
    read: Callable[[], Tensor]

    @property
    def type(self) -> Any:
        """The type in the package; f16 where the rows do not divide into blocks, as llama.cpp's converters do."""
        quantization = gguf_package().GGMLQuantizationType
        wanted = quantization[self.stored_as.upper()]
        block, _ = gguf_package().GGML_QUANT_SIZES[wanted]
        return quantization.F16 if self.shape[-1] % block else wanted

    @property
    def byte_count(self) -> int:
        """Bytes of its data."""
        block, size = gguf_package().GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // int(block) * int(size)


def gguf_package() -> Any:
    """The package ``gguf``.

    Raises:
        MissingPackageError: it is not installed.
    """
    with needs("gguf", "Writing a GGUF file"):
        return importlib.import_module("gguf")


def write_gguf(path: Path, architecture: str, describe: Callable[[Any], object], tensors: Sequence[GgufTensor]) -> None:
    """Writes a file.

    Args:
        path: the file; what is there is replaced.
        architecture: ``general.architecture``.
        describe: adds the other keys to a ``GGUFWriter``, which knows the tensors' names and shapes already.
        tensors: in the order in which they are read and written.

    Raises:
        CheckpointError: a tensor came in another shape than planned.
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
            writer.write_tensor_data(_data(tensor))
    finally:
        writer.close()


def read_gguf(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, dequantized to float32, by name.

    Raises:
        CheckpointError: it is not a GGUF file.
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
    """The value of ``general.file_type`` for a type of weights."""
    return gguf_package().LlamaFileType[GGUF_TYPES[stored_as]]


def _in_bytes(tensor: GgufTensor) -> bool:
    """Whether the package keeps the type as bytes: all but float32 and float16."""
    return tensor.type.name not in ("F32", "F16")


def _array_type(tensor: GgufTensor) -> Any:
    numpy = importlib.import_module("numpy")
    return numpy.dtype("uint8" if _in_bytes(tensor) else {"F32": "float32", "F16": "float16"}[tensor.type.name])


def _data(tensor: GgufTensor) -> Any:
    value = tensor.read()
    if tuple(value.shape) != tensor.shape:
        raise CheckpointError(f"{tensor.name} came as {tuple(value.shape)}, planned as {tensor.shape}")
    array = value.detach().to("cpu", torch.float32).contiguous().numpy()
    return gguf_package().quants.quantize(array, tensor.type)
