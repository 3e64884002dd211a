"""GGUF files as such: sizes before writing, and what cannot be written or read."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from nbpeft.checkpoint import GGUF_TYPES, GgufTensor, file_type, read_gguf, write_gguf
from nbpeft.checkpoint.atomic import disk_errors
from nbpeft.errors import CheckpointError
from tests.closeness import assert_approximates


def nothing(writer: Any) -> None:
    """Adds no keys."""


TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_k": "Q5_0", "q5_k": "Q5_1", "q6_k": "Q8_0"}
"""Storage type -> that of rows which do not divide into blocks of 256 weights."""


@pytest.mark.parametrize("columns", [32, 64, 256, 40])
@pytest.mark.parametrize("stored_as", TYPES)
def test_sizes_are_known_before_and_values_come_back(stored_as: str, columns: int, tmp_path: Path) -> None:
    values = {"a": torch.randn(3, columns), "b": torch.randn(2, columns)}
    tensors = [
        GgufTensor(name, tuple(value.shape), stored_as, lambda value=value: value)  # type: ignore[misc]
        for name, value in values.items()
    ]
    write_gguf(tmp_path / "x.gguf", "llama", nothing, tensors)
    found = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    assert [tensor.n_bytes for tensor in found] == [tensor.byte_count for tensor in tensors]
    wanted = stored_as.upper() if columns == 256 or not stored_as.endswith("_k") else TYPES[stored_as]
    assert {tensor.tensor_type.name for tensor in found} == {wanted if columns != 40 or wanted[0] != "Q" else "F16"}
    # Half a step, of 16 or more between the least and the largest value of a block, or of 255; the step is in float16.
    step = 1 / 8 if stored_as.endswith("_k") else 1 / 127
    assert_approximates(read_gguf(tmp_path / "x.gguf"), values, step / 2 + 2**-11)


def test_file_types_are_named_after_their_storage_type() -> None:
    assert all(file_type(stored_as).name.lower().endswith(stored_as) for stored_as in GGUF_TYPES)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    tensor = GgufTensor("a", (2, 32), "f32", lambda: torch.zeros(2, 31))
    with pytest.raises(CheckpointError, match=r"a has shape \(2, 31\), expected \(2, 32\)"):
        write_gguf(tmp_path / "x.gguf", "llama", nothing, [tensor])


@pytest.mark.parametrize("content", [b"", b"GGUF", b"x" * 100])
def test_what_is_no_gguf_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.gguf cannot be read"):
        read_gguf(tmp_path / "x.gguf")


@contextlib.contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Files cannot grow beyond a size, as on a full disk."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_of_small_tensors_too(tmp_path: Path) -> None:
    tensors = [GgufTensor(f"t{number}", (4, 32), "f32", lambda: torch.ones(4, 32)) for number in range(3)]
    write_gguf(whole := tmp_path / "whole.gguf", "llama", nothing, tensors)
    for missing in (1, 600, 1200):
        with files_end_at(whole.stat().st_size - missing), pytest.raises(OSError, match="too large"):
            write_gguf(tmp_path / "cut.gguf", "llama", nothing, tensors)


def test_so_is_one_under_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"could not write to .*File too large"), disk_errors(tmp_path):
        raise Exception("File too large (os error 27)")
    with pytest.raises(Exception, match="other") as raised, disk_errors(tmp_path):
        raise Exception("other")
    assert type(raised.value) is Exception
