"""Reads and writes files of tensors. Nothing but plain tensors is ever unpickled.

A file is read in two steps: first its header, with which names, dtypes and shapes are checked, then the tensors that
are used. A file that does not fit the model takes no memory, however large it is.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import math
import os
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nbpeft._util.out_of_memory import is_out_of_memory
from nbpeft.checkpoint import inside
from nbpeft.checkpoint.staging import Mark
from nbpeft.errors import CheckpointError, ConfigError, CorruptCheckpointError, shortened

WEIGHTS_NAME = "adapter_model.safetensors"
LEGACY_WEIGHTS_NAME = "adapter_model.bin"

DTYPES = {
    name: getattr(torch, full)
    for name, full in {
        **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64"},
        **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"},
        **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
        **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
        **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
    }.items()
    if hasattr(torch, full)
}
"""Name of a dtype in safetensors files -> dtype."""
LONGEST_HEADER = 2**26
"""Largest accepted header in bytes; enough for about 400,000 tensors."""
_LARGEST_UNMAPPED = 2**28
_MOST_AT_ONCE = 2**24
"""Most bytes of tensors that are read together. The C library keeps the memory of blocks of up to 32 MiB for the next
file, which saves a page fault for every 4 KiB: half of the time of a hot-swap."""
_MOST_UNUSED = 2**20
"""Bytes that may be read without being used."""
_ALIGNMENT = 64
"""Bytes, as in memory of torch: the last bits of a matrix product depend on where its factors begin."""
_MOST_OF_MADE = 16
"""Most bytes that may be read for each byte of a computed tensor; packed indices can be larger than the result."""

Change = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

UNREADABLE = (safetensors.SafetensorError, OSError, MemoryError, KeyError, ValueError, TypeError, RuntimeError)
"""Errors raised by reading a damaged file; a KeyError names a dtype that the installed libraries do not know."""


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors as safetensors needs them: detached, contiguous and without shared memory.

    Raises:
        CheckpointError: a tensor has no data (it is on the meta device).
    """
    seen: set[tuple[str, int]] = set()
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach()
        if tensor.is_meta:
            raise CheckpointError(f"{key} has no data (meta device): load the adapter's weights first", key=key)
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        # By the address of the storage, not of the tensor: safetensors refuses views with different offsets, too.
        memory = (str(tensor.device), tensor.untyped_storage().data_ptr())
        if memory in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        elif not tensor.is_contiguous():
            tensor = tensor.contiguous()
        seen.add(memory)
        result[key] = tensor
    return result


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file.

    The file gets the permissions of any new file; safetensors itself makes it readable by its owner alone.

    Args:
        path: the file.
        tensors: key -> tensor, as returned by ``storable``.
        metadata: entries of the file's metadata.
    """
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(dict(tensors), str(path), metadata={"format": "pt", **metadata})
    with contextlib.suppress(OSError):  # mounted drives may not have permissions
        path.chmod(mode & 0o7777)


def write_pickled(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as a pickle, as PEFT did before safetensors, for programs that read nothing else.

    Args:
        path: the file.
        tensors: key -> tensor.
    """
    # Cloned, because torch.save writes the whole storage of a view.
    torch.save({key: tensor.clone() for key, tensor in tensors.items()}, path)


class TensorFile:
    """A file of tensors, safetensors or PEFT's old ``.bin``. Creating it reads only the header.

    The file stays open, so that tensors read later match the header even if the file at the path is replaced.

    Args:
        path: the file.

    Attributes:
        path: the file.
        header: key -> a tensor of the dtype and shape in the file, without data: on the meta device, or memory-mapped
            for a ``.bin``.
        metadata: metadata of a safetensors file, including the base model's fingerprint.

    Raises:
        CorruptCheckpointError: the file is truncated, altered or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, int] = {}
        self._legacy = path.suffix == ".bin"
        try:
            self._handle = inside.open_file(path)
            # Stays open, so that the tensors are those of this header even if the file is replaced meanwhile.
            weakref.finalize(self, os.close, self._handle)
            self._version = _version(os.fstat(self._handle))
            if self._legacy:
                self.header = _mapped(path)
            else:
                with open(self._handle, "rb", closefd=False) as file:
                    self._read_header(file, self._version[0])
        except CheckpointError:
            raise
        except UNREADABLE as error:
            raise unreadable(path, error) from None

    @property
    def is_current(self) -> bool:
        """Whether the file at the path has not been replaced since the header was read."""
        try:
            return _version(self.path.stat()) == self._version
        except OSError:
            return False

    def read(self, keys: Iterable[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Reads tensors into new memory, so that the file may be replaced while they are in use.

        Args:
            keys: keys of the tensors.
            device: device of the tensors.

        Raises:
            ConfigError: there is no such device.
            CorruptCheckpointError: the file was written to after its header was read.
        """
        target = _device(device)
        try:
            self._check_unchanged()  # an access to what was cut off from a mapped file kills the process
            tensors = self._mapped_to(keys, target) if self._legacy else self._read_to(keys, target)
            self._check_unchanged()  # otherwise some tensors may be old and others new
        except UNREADABLE as error:
            raise unreadable(self.path, error) from None
        return tensors

    def _check_unchanged(self) -> None:
        if _version(os.fstat(self._handle)) != self._version:
            raise ValueError("another program wrote to it while it was read")

    def _mapped_to(self, keys: Iterable[str], target: torch.device) -> dict[str, Tensor]:
        found = {key: self.header[key] for key in keys}
        return {key: value if value.is_meta else value.to(target, copy=True) for key, value in found.items()}

    def _read_to(self, keys: Iterable[str], target: torch.device) -> dict[str, Tensor]:
        with open(self._handle, "rb", closefd=False) as file:
            runs = map(partial(self._run, file), self._runs(keys))
            tensors = dict(itertools.chain.from_iterable(runs))
        return tensors if target.type == "cpu" else {key: tensor.to(target) for key, tensor in tensors.items()}

    def _runs(self, keys: Iterable[str]) -> Iterator[list[str]]:
        """Yields keys of adjacent tensors that are read together: a call for each small tensor takes longer.

        All tensors of a run are aligned when the first one is.
        """
        run: list[str] = []
        start = end = 0
        for key in sorted(keys, key=self._places.__getitem__):
            place, size = self._places[key], self.header[key].nbytes
            if run and (place != end or (place - start) % _ALIGNMENT or place + size > start + _MOST_AT_ONCE):
                yield run
                run = []
            if not run:
                start = place
            run.append(key)
            end = place + size
        if run:
            yield run

    def _run(self, file: BinaryIO, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields (key, tensor) of adjacent tensors, each with a storage of its own."""
        start = self._places[keys[0]]
        size = self._places[keys[-1]] + self.header[keys[-1]].nbytes - start
        own = np.empty(size + _ALIGNMENT, dtype=np.uint8)
        own = own[-own.ctypes.data % _ALIGNMENT :][:size]
        file.seek(start)
        # Not memory-mapped: if another program truncates a mapped file, an access kills the process.
        if file.readinto(own) != size:  # type: ignore[attr-defined]
            raise ValueError("it was truncated while it was read")
        for key in keys:
            like, offset = self.header[key], self._places[key] - start
            if like.dtype is torch.float32:  # numpy, which lacks some dtypes, is faster
                yield key, torch.from_numpy(np.ndarray(like.shape, np.float32, own, offset))
            elif like.nbytes:
                tensor = torch.frombuffer(own, dtype=like.dtype, count=like.numel(), offset=offset)
                yield key, tensor.view(like.shape)
            else:
                yield key, torch.empty(like.shape, dtype=like.dtype, device="cpu")

    def _read_header(self, file: BinaryIO, size: int) -> None:
        """Reads the header and checks that its tensors cover the rest of the file exactly."""
        length = int.from_bytes(_exactly(file, 8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("its header is longer than the file")
        if length > LONGEST_HEADER:
            raise ValueError(f"its header has more than {LONGEST_HEADER:,} bytes")
        header = json.loads(_exactly(file, length))
        if not isinstance(header, dict):
            raise TypeError("its header is not a JSON object")
        start = end = 8 + length
        self.metadata = _metadata(header.pop("__metadata__", None))
        likes = _Likes()
        entries = [_entry(key, given, likes) for key, given in header.items()]
        for first, after, key, _ in sorted(entries):
            if start + first != end:
                raise ValueError("its tensors overlap, or there are other bytes between them")
            self._places[key], end = end, start + after
        if end != size:
            raise ValueError(f"its tensors end at byte {end:,}, and it has {size:,}")
        self.header = {key: tensor for _, _, key, tensor in entries}


class TensorFileToFetch(TensorFile):
    """A large remote safetensors file of which only the header has been downloaded.

    Args:
        path: path that the file will have, for messages.
        start: the first bytes of the file, with the whole header.
        size: size of the whole file in bytes.
        fetch: downloads the file and returns its path.

    Raises:
        CorruptCheckpointError: the bytes are not a valid header.
    """

    def __init__(self, path: Path, start: bytes, size: int, fetch: Callable[[], Path]) -> None:
        self.path, self._fetch = path, fetch
        self.header, self.metadata, self._places = {}, {}, {}
        try:
            self._read_header(io.BytesIO(start), size)
        except UNREADABLE as error:
            raise unreadable(path, error) from None

    def read(self, keys: Iterable[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Downloads the file and reads tensors.

        Args:
            keys: keys of the tensors.
            device: device of the tensors.

        Raises:
            CorruptCheckpointError: the downloaded file has another header.
        """
        file, wanted = TensorFile(self._fetch()), list(keys)
        if file._places != self._places or file.metadata != self.metadata:
            raise CorruptCheckpointError(f"{file.path} is not the file whose header was read", path=str(file.path))
        return file.read(wanted, device)

    @property
    def is_current(self) -> bool:
        """Always True: there is no local file that could be replaced."""
        return True


def _entry(key: str, given: Any, likes: _Likes) -> tuple[int, int, str, Tensor]:
    """Returns the byte offsets in a header's entry, its key, and a tensor of its dtype and shape without data."""
    if not isinstance(given, dict) or not isinstance(given.get("dtype"), str):
        raise TypeError(f"its header has no dtype for {shortened(key, 60)!r}")
    dtype, shape, place = DTYPES[given["dtype"]], given.get("shape"), given.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(place, list) or len(place) != 2:
        raise TypeError(f"its header lacks the shape or the offsets of {shortened(key, 60)!r}")
    sizes = (*shape, *place)
    if {*map(type, sizes)} != {int} or min(sizes) < 0 or max(sizes) >= 2**63:
        raise TypeError(f"the shape or the offsets of {shortened(key, 60)!r} are not valid")
    start, end = place
    if math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"{shortened(key, 60)!r} has more or fewer bytes than its shape says")
    return start, end, key, likes[dtype, tuple(shape)].detach()  # detached: faster than a new one


class _Likes(dict[tuple[torch.dtype, tuple[int, ...]], Tensor]):
    """(dtype, shape) -> a tensor of them without data."""

    def __missing__(self, key: tuple[torch.dtype, tuple[int, ...]]) -> Tensor:
        self[key] = like = torch.empty(key[1], dtype=key[0], device="meta")
        return like


def _metadata(given: Any) -> dict[str, str]:
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise TypeError("its metadata is not a mapping of strings")
    return given


def _exactly(file: Any, count: int) -> bytes:
    content = file.read(count)
    if len(content) != count:
        raise ValueError("it is truncated")
    return bytes(content)


class UnreadTensors:
    """Tensors of a file that are not read yet, with the changes to apply to them after reading.

    Args:
        file: the file.
        device: device of the tensors.
        keys: keys of the tensors; all of the file by default.

    Attributes:
        header: key -> a tensor without data, after the changes.
    """

    def __init__(self, file: TensorFile, device: str | torch.device = "cpu", keys: Iterable[str] | None = None) -> None:
        _device(device)
        self._file, self._device = file, device
        self._keys = tuple(file.header if keys is None else keys)
        self._changes: tuple[Change, ...] = ()
        self._read: dict[str, Tensor] = {}
        self.header: Mapping[str, Tensor] = {key: file.header[key] for key in self._keys}

    def __iter__(self) -> Iterator[str]:
        return iter(self.header)

    def changed(self, change: Change) -> Self:
        """Returns a copy with one more change.

        Args:
            change: maps a dictionary key -> tensor to another one. It is called twice: with the header's tensors, and
                with the tensors that were read.
        """
        twin = copy.copy(self)
        twin._changes, twin.header = (*self._changes, change), change(self.header)
        return twin

    def unchanged(self) -> Self:
        """Returns a copy without changes, with the tensors as they are in the file."""
        twin = copy.copy(self)
        twin._changes, twin.header = (), {key: self._file.header[key] for key in self._keys}
        return twin

    def read(self, leave: Iterable[str] = ()) -> Mapping[str, Tensor]:
        """Reads the tensors that are used and applies the changes.

        Args:
            leave: keys (after the changes) that are not used; they keep the header's tensors without data.

        Raises:
            CheckpointError: most of the data would be read without being used.
            CorruptCheckpointError: the file was truncated after its header was read.
        """
        left = set(leave)
        taken = {id(tensor): tensor for key, tensor in self.header.items() if key not in left}
        wanted = [key for key in self._keys if id(self._file.header[key]) in taken]
        wanted += self._sources(taken)
        self._read |= self._file.read([key for key in wanted if key not in self._read], self._device)
        tensors: Mapping[str, Tensor] = {key: self._read.get(key, self._file.header[key]) for key in self._keys}
        for change in self._changes:
            tensors = change(tensors)
        return tensors

    def _sources(self, taken: Mapping[int, Tensor]) -> list[str]:
        """Returns the keys from which a change may have computed new tensors.

        A change passes a tensor on as the same object, or computes new ones from tensors that it does not pass on.
        """
        own = {id(self._file.header[key]) for key in self._keys}
        made = sum(tensor.nbytes for place, tensor in taken.items() if place not in own)
        passed = {id(tensor) for tensor in self.header.values()}
        sources = [key for key in self._keys if id(self._file.header[key]) not in passed] if made else []
        if sum(self._file.header[key].nbytes for key in sources) > _MOST_OF_MADE * made + _MOST_UNUSED:
            raise CheckpointError(
                f"most of {self._file.path} fits nothing in this model, e.g. {shortened(sources[0], 60)}"
            )
        return sources


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads all tensors and the metadata of a file, safetensors or PEFT's old ``.bin``, into CPU memory.

    Raises:
        CorruptCheckpointError: the file is truncated, altered or of another format.
    """
    file = TensorFile(path)
    return file.read(file.header), file.metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Reads only the metadata of a file; empty for a ``.bin``.

    Raises:
        CorruptCheckpointError: the file is truncated, altered or of another format.
    """
    return {} if path.suffix == ".bin" else TensorFile(path).metadata


def _version(found: os.stat_result) -> Mark:
    return found.st_size, found.st_mtime_ns


def _device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        target = None
    library: Any = None if target is None else getattr(torch, target.type, None)
    if target is None or (hasattr(library, "is_available") and not library.is_available()):
        raise ConfigError(f"this machine has no device {str(device)!r} to load an adapter to", device=str(device))
    return target


def _mapped(path: Path) -> dict[str, Tensor]:
    """Returns the memory-mapped tensors of a ``.bin``; their data is read on first use."""
    try:
        mapped = _check_archive(path)
        tensors = unpickled(path, mmap=mapped)
    except CheckpointError:
        raise
    except Exception as error:  # unpickling an untrusted file can raise anything
        raise unreadable(path, error) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in tensors.items()
    ):
        raise CorruptCheckpointError(f"{path} does not contain a dictionary of tensors", path=str(path))
    return tensors


def unpickled(path: str | os.PathLike[str], *, mmap: bool = False) -> Any:
    """Reads a file of ``torch.save`` that may come from anyone: tensors and plain values are read, nothing else.

    Of a file that it refuses, torch keeps the sparse tensors, holds them against the next file, and refuses that too
    (always since 2.15, before only with ``torch.sparse.check_sparse_tensor_invariants``): here they are dropped.

    Args:
        path: the file.
        mmap: whether the tensors' data is read on first use.

    Returns:
        The content, on the CPU.

    Raises:
        Exception: of any kind; the file contains something else, or cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except BaseException:
        with contextlib.suppress(Exception):
            torch._utils._validate_loaded_sparse_tensors()
        raise


def _check_archive(path: Path) -> bool:
    """Returns whether a ``.bin`` is a zip archive, which can be memory-mapped.

    Raises:
        ValueError: reading the file could take unlimited memory.
    """
    if not zipfile.is_zipfile(path):  # torch.save's format before torch 1.6
        if path.stat().st_size > _LARGEST_UNMAPPED:
            raise ValueError(f"it is not a zip archive, and has more than {_LARGEST_UNMAPPED:,} bytes")
        return False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):  # torch never compresses
        raise ValueError("its archive is compressed")
    if any(member.file_size > LONGEST_HEADER for member in members if member.filename.endswith(".pkl")):
        raise ValueError(f"the description of its tensors has more than {LONGEST_HEADER:,} bytes")
    return True


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Returns the error to raise for a file that cannot be read.

    Args:
        path: the file.
        error: one of ``UNREADABLE``.
    """
    text = f"its dtype {error} is not known here" if isinstance(error, KeyError) else str(error)
    if "weights_only" in text:  # torch's message recommends loading the file without this protection
        text = "it contains more than tensors, and was not opened"
    reason = (text.strip().splitlines() or [type(error).__name__])[0][:200]
    if is_out_of_memory(error):
        return CheckpointError(f"{path} cannot be read: memory ran out ({reason})", path=str(path))
    return CorruptCheckpointError(
        f"{path} cannot be read: it is truncated, altered or not a file of tensors ({reason})", path=str(path)
    )


def weights_mark(folder: str | os.PathLike[str]) -> Mark | None:
    """Returns the mark that identifies the weights file in an adapter's folder; None if there is none."""
    for name in (WEIGHTS_NAME, LEGACY_WEIGHTS_NAME):
        with contextlib.suppress(OSError):
            return _version(os.stat(os.path.join(folder, name)))
    return None
