"""Files of tensors: the header says all that is checked before a tensor is read, or the file is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from nbpeft.checkpoint import tensor_file
from nbpeft.checkpoint.tensor_file import DTYPES, TensorFile, UnreadTensors, read_metadata, read_tensors
from nbpeft.errors import CheckpointError, ConfigError, CorruptCheckpointError
from tests.fuzz.corpus import WEIGHTS, entry, weights


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.uint8).repeat(8)
    written = {name: dtype for name, dtype in DTYPES.items() if name != "BOOL" and dtype in safetensors.torch._SIZE}
    tensors = {name: whole.clone().view(dtype).view(-1, 2) for name, dtype in written.items()}
    tensors |= {"BOOL": torch.tensor([True, False]), "none": torch.empty(0, 3), "one": torch.tensor(3.0)}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"a": "b"})
    expected, (read, metadata) = safetensors.torch.load_file(path), read_tensors(path)
    assert metadata == read_metadata(path) == {"a": "b"} and read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert read[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
        assert TensorFile(path).header[name].is_meta


@pytest.mark.parametrize("how", WEIGHTS)
def test_a_header_that_does_not_describe_the_file_is_refused(how: str, tmp_path: Path) -> None:
    content, reported = WEIGHTS[how]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"x\.safetensors cannot be read: .*truncated") as caught:
        TensorFile(path)
    assert reported in str(caught.value) and len(str(caught.value)) < 520 and "\n" not in str(caught.value)
    with pytest.raises(Exception, match=r".+"):  # safetensors does not take it either
        safetensors.torch.load(path.read_bytes())


@pytest.mark.parametrize("length", [0, 2**26 + 1, 2**40, 2**63])
def test_a_header_of_any_length_is_read_within_bounds(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(weights({"a": entry()}, length=length))
    os.truncate(path, 2**33)
    with pytest.raises(CorruptCheckpointError, match="its header"):
        TensorFile(path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_is_not_told_as_damage(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    file = TensorFile(path)

    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(TensorFile, "_run", run)
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read: memory ran out") as caught:
        file.read(["a"])
    assert not isinstance(caught.value, CorruptCheckpointError) and "truncated" not in str(caught.value)
    monkeypatch.undo()
    assert file.read(["a"])["a"].equal(torch.ones(2))


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "zero.bin").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.bin")
    for name in os.listdir(tmp_path):
        with pytest.raises(CorruptCheckpointError, match="not a plain file"):
            TensorFile(tmp_path / name)


@pytest.mark.parametrize("length", [0, 2**20])
def test_a_header_is_within_its_file(length: int, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(weights({"a": entry()}, length=length))
    with pytest.raises(CorruptCheckpointError, match="its header is longer than the file"):
        TensorFile(tmp_path / "x.safetensors")


def test_a_header_may_be_all_of_its_file(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(0, 4)}, tmp_path / "x.safetensors")
    assert read_tensors(tmp_path / "x.safetensors")[0]["a"].shape == (0, 4)


def test_a_file_that_is_gone_is_not_current(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.is_current
    file.path.unlink()
    assert not file.is_current


def test_files_of_torch_before_it_wrote_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.arange(5.0)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert read_tensors(tmp_path / "x.bin")[0]["a"].equal(torch.arange(5.0))
    monkeypatch.setattr(tensor_file, "_LARGEST_UNMAPPED", 10)
    with pytest.raises(CorruptCheckpointError, match="not a zip archive, and has more than 10 bytes"):
        read_tensors(tmp_path / "x.bin")


SUFFIXES = pytest.mark.parametrize("suffix", ["safetensors", "bin"])


def write(path: Path, value: float, count: int = 1000) -> None:
    tensors = {"a": torch.full((count,), value)}
    safetensors.torch.save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


@SUFFIXES
def test_what_is_read_belongs_to_the_header_when_another_file_takes_the_place(suffix: str, tmp_path: Path) -> None:
    path, other = tmp_path / f"x.{suffix}", tmp_path / f"y.{suffix}"
    write(path, 1)
    file = TensorFile(path)
    write(other, 0, count=2)
    os.replace(other, path)
    assert file.read(["a"])["a"].sum() == 1000


@SUFFIXES
def test_a_file_that_is_written_to_after_its_header_was_read_is_refused(suffix: str, tmp_path: Path) -> None:
    """Its tensors may be partly old and partly new; a mapped file that was shortened would kill the process."""
    path, other = tmp_path / f"x.{suffix}", tmp_path / f"y.{suffix}"
    write(other, 0)
    for change in (lambda: os.truncate(path, 1000), lambda: path.write_bytes(other.read_bytes())):
        write(path, 1)
        file = TensorFile(path)
        change()
        os.utime(path, ns=(0, 0))  # as if longer ago than a file system's clock shows
        with pytest.raises(CorruptCheckpointError, match="another program wrote to it while it was read"):
            file.read(["a"])


@SUFFIXES
def test_a_file_that_is_written_to_while_its_tensors_are_read_is_refused(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"x.{suffix}"
    write(path, 1)
    file = TensorFile(path)
    reads = {name: getattr(TensorFile, name) for name in ("_read_to", "_mapped_to")}

    def interfere(name: str) -> Any:
        def read(file: TensorFile, *args: Any) -> Any:
            found = reads[name](file, *args)
            os.utime(path, ns=(0, 0))
            return found

        return read

    for name in reads:
        monkeypatch.setattr(TensorFile, name, interfere(name))
    with pytest.raises(CorruptCheckpointError, match="another program wrote to it while it was read"):
        file.read(["a"])


def test_only_what_is_taken_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.ones(3), "large": torch.ones(2**20)}, path)
    unread = UnreadTensors(TensorFile(path))
    assert list(unread) == ["a", "b", "large"] and not unread.read(["b"])["a"].is_meta
    unread = UnreadTensors(TensorFile(path))
    assert [name for name, tensor in unread.read(["b", "large"]).items() if tensor.is_meta] == ["b", "large"]
    renamed = unread.changed(lambda tensors: {f"{key}!": one for key, one in tensors.items() if key != "large"})
    assert {key: one.is_meta for key, one in renamed.read(["b!"]).items()} == {"a!": False, "b!": True}
    joined = unread.changed(lambda tensors: {"ab": torch.cat([tensors["a"], tensors["b"]]), "large": tensors["large"]})
    assert joined.header["ab"].is_meta and joined.read(["large"])["ab"].sum() == 5
    summed = unread.changed(lambda tensors: {"sum": tensors["large"].sum().reshape(1), "a": tensors["a"]})
    with pytest.raises(CheckpointError, match=r"fits nothing in this model, e\.g\. b"):
        summed.read()
    assert not summed.read(["sum"])["a"].is_meta
    with pytest.raises(ConfigError, match="no device 'nowhere'"):
        UnreadTensors(TensorFile(path), "nowhere")


def test_adjacent_tensors_are_read_together_and_have_storages_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "many.safetensors"
    tensors = {f"t{number}": torch.full((16, number + 1), float(number)) for number in range(6)}
    tensors |= {"empty": torch.zeros(0, 4), "odd": torch.ones(3, dtype=torch.uint8), "large": torch.ones(2**22)}
    safetensors.torch.save_file(tensors, str(file))
    source = TensorFile(file)
    assert [len(run) for run in source._runs(tensors) if "large" not in run] == [7]  # "empty" fits before
    for keys in (list(tensors), ["t1", "t4", "odd"], ["empty"], []):
        found = source.read(keys)
        assert found.keys() == {*keys} and all(torch.equal(found[key], tensors[key]) for key in keys)
        places = [value.untyped_storage().data_ptr() for value in found.values() if value.numel()]
        assert len({*places}) == len(places)
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in found.values())


def test_tensors_at_odd_places_are_read_apart(tmp_path: Path) -> None:
    file = tmp_path / "odd.safetensors"
    header = {"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    header["b"] = {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]}
    content, tensor = json.dumps(header).encode(), torch.tensor([1.5, -2.0])
    file.write_bytes(len(content).to_bytes(8, "little") + content + b"abc" + tensor.numpy().tobytes())
    found, _ = read_tensors(file)
    assert torch.equal(found["b"], tensor) and found["b"].data_ptr() % 4 == 0
    assert found["a"].tolist() == [*b"abc"]


def test_tensors_begin_where_those_of_torch_do(tmp_path):
    """Else the last bits of products with them differ from those of the tensors that were saved."""
    saved = {f"{size}": torch.randn(size) for size in (3, 5, 1, 200, 7)}
    safetensors.torch.save_file(saved, tmp_path / "a.safetensors")
    read = TensorFile(tmp_path / "a.safetensors").read(saved)
    assert all(torch.equal(read[key], saved[key]) and not read[key].data_ptr() % 64 for key in saved)


@pytest.mark.parametrize("checked", [False, True])
def test_a_file_that_is_refused_leaves_nothing_behind(checked: bool, tmp_path: Path) -> None:
    """Torch keeps its sparse tensors for a check, which the next file that is loaded would not pass."""
    wrong = torch.sparse_coo_tensor(torch.tensor([[212]]), torch.ones(1), (16,), check_invariants=False)
    torch.save({"a": wrong, "b": Path}, tmp_path / "x.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "y.bin")
    with torch.sparse.check_sparse_tensor_invariants(checked):
        with pytest.raises(CorruptCheckpointError, match="more than tensors, and was not opened"):
            read_tensors(tmp_path / "x.bin")
        assert read_tensors(tmp_path / "y.bin")[0]["a"].equal(torch.ones(2))
        assert torch.load(tmp_path / "y.bin")["a"].equal(torch.ones(2))
