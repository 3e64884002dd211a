"""Whole models on disk: what an index may name, and how much of it is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from nbpeft.checkpoint import ModelFolder
from nbpeft.checkpoint.model_files import TensorSpec, in_shards, write_model
from nbpeft.errors import CorruptCheckpointError

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/hostname", "a/b.safetensors", 3, None, ["x"]])
def test_an_index_names_files_beside_it(shard: Any, tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "outside.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CorruptCheckpointError, match="is not an index of weights"):
        ModelFolder(tmp_path / "model")


def test_an_index_is_read_within_bounds(tmp_path: Path) -> None:
    (tmp_path / INDEX).touch()
    os.truncate(tmp_path / INDEX, 2**40)
    with pytest.raises(CorruptCheckpointError, match="is not an index of weights"):
        ModelFolder(tmp_path)


def test_each_shard_is_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    folder = ModelFolder(tmp_path)
    assert "w" in folder and folder.read("w").sum() == 2


def test_shards_are_named_as_transformers_names_them(tmp_path: Path) -> None:
    specs = [TensorSpec(name, torch.float32, (4,)) for name in "abc"]
    whole = {name: torch.full((4,), float(number)) for number, name in enumerate("abc")}
    written = write_model(tmp_path / "one", in_shards(specs, 48), whole.__getitem__)
    assert [path.name for path in written] == ["model.safetensors"]
    write_model(tmp_path / "two", in_shards(specs, 32), whole.__getitem__)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(os.listdir(tmp_path / "two")) == [*names, INDEX]
    index = json.loads((tmp_path / "two" / INDEX).read_text())
    assert index == {
        "metadata": {"total_size": 48},
        "weight_map": {"a": names[0], "b": names[0], "c": names[1]},
    }
    assert all(ModelFolder(tmp_path / "two").read(name).equal(tensor) for name, tensor in whole.items())
