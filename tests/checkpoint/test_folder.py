"""A whole saved adapter: with peft in both directions, and whatever happens to its folder."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from nbpeft.checkpoint import (
    Expected,
    compare,
    config_to_save,
    fingerprint,
    from_file,
    read_checkpoint,
    read_config,
    to_file,
    write_checkpoint,
)
from nbpeft.checkpoint.staging import staging_name
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.injection.plan import plan
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from tests.checkpoint.peft_files import saved_by_peft, shapes_of
from tests.closeness import assert_close
from tests.tiny_models import gpt2, llama, logits

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "rank patterns": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    ),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "dora": (llama, {"target_modules": ["q_proj"], "use_dora": True}),
    "modules_to_save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "bias all": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "bias lora_only": (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 32}),
}


def loaded_by_us(model: nn.Module, folder: Path) -> AdapterManager:
    checkpoint = read_checkpoint(folder)
    made = plan(model, checkpoint.config)
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = Expected(
        adapters={target.path: target.shapes for target in made.targets},
        copies={path: shapes_of(model.get_submodule(path).state_dict()) for path in made.copies},
        base={name: parameters[name] for name in made.biases},
    )
    loaded = from_file(checkpoint.tensors, expected, peft_type="LORA")
    assert loaded.missing == []
    assert loaded.unexpected == []
    manager = AdapterManager.attach(model)
    manager.add("default", made, loaded.weights)
    return manager


def fields_of(folder: Path) -> dict[str, Any]:
    fields = json.loads((folder / "adapter_config.json").read_text())
    return {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}


@pytest.mark.drawn(4)
@pytest.mark.parametrize("case", CASES)
def test_peft_saves_we_load_and_back(case: str, tmp_path: Path) -> None:
    build, fields = CASES[case]
    theirs = saved_by_peft(build(), tmp_path / "theirs", task_type="CAUSAL_LM", r=4, **fields).eval()
    ours = build()
    base = logits(ours)
    manager = loaded_by_us(ours, tmp_path / "theirs")
    assert_close(logits(ours), logits(theirs))
    assert (logits(ours) - base).abs().max() > 1e-3, "the adapter does something"

    config = config_to_save(manager.configs["default"], ours)
    written = write_checkpoint(tmp_path / "ours", config, to_file(manager.weights("default"), peft_type="LORA"))
    assert [path.name for path in written.paths] == ["adapter_model.safetensors", "adapter_config.json", "README.md"]
    assert written.byte_count == sum(path.stat().st_size for path in (tmp_path / "ours").iterdir())
    assert fields_of(tmp_path / "ours") == fields_of(tmp_path / "theirs")
    one = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    other = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    again = peft.PeftModel.from_pretrained(build(), str(tmp_path / "ours")).eval()
    assert torch.equal(logits(again), logits(theirs))


def a_config(**fields: Any) -> LoraConfig:
    return LoraConfig(target_modules=["q"], **fields)


def tensors_of(value: float = 1.0, rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        "base_model.model.q.lora_A.weight": torch.full((rank, 4), value),
        "base_model.model.q.lora_B.weight": torch.full((4, rank), value),
    }


def test_metadata_says_pt_and_the_base(tmp_path: Path) -> None:
    base = llama()
    write_checkpoint(tmp_path, a_config(), tensors_of(), fingerprint=fingerprint(base))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    checkpoint = read_checkpoint(tmp_path)
    assert compare(checkpoint.metadata, base) is None
    assert checkpoint.folder == tmp_path


def test_shared_and_transposed_tensors_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(24.0)
    tensors = {
        "a": whole[:8].view(2, 4),
        "b": whole[:8].view(2, 4),
        "c": whole[8:].view(4, 4).T,
        "d": nn.Parameter(torch.ones(2, 2)),
        "e": torch.ones(3, dtype=torch.bfloat16),
        "f": torch.zeros(0, 4),
    }
    write_checkpoint(tmp_path, a_config(), tensors)
    found = read_checkpoint(tmp_path).tensors
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor.detach())
        assert found[key].dtype == tensor.dtype


def test_read_tensors_own_their_memory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_config(), tensors_of(1.0))
    found = read_checkpoint(tmp_path).tensors
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for tensor in found.values():
        assert torch.equal(tensor, torch.ones_like(tensor))
        tensor.add_(1.0)


def test_the_device_that_is_asked_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_config(), tensors_of())
    assert all(tensor.is_meta for tensor in read_checkpoint(tmp_path, device="meta").tensors.values())


def test_nothing_or_no_data_to_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensors to save"):
        write_checkpoint(tmp_path / "x", a_config(), {})
    with pytest.raises(CheckpointError, match="meta device"):
        write_checkpoint(tmp_path / "x", a_config(), {"a": torch.zeros(2, device="meta")})
    assert not (tmp_path / "x").exists()


def test_legacy_bin(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_config(), tensors_of(3.0))
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors_of(3.0), tmp_path / "adapter_model.bin")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == tensors_of().keys()
    assert checkpoint.metadata == {}


class Evil:
    def __reduce__(self) -> Any:
        return (open, ("/nonexistent/should-not-be-called", "w"))


@pytest.mark.parametrize("content", [b"", b"not a pickle", Evil(), ["a list"]])
def test_a_bin_that_is_no_dictionary_of_tensors(content: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_config(), tensors_of())
    (tmp_path / "adapter_model.safetensors").unlink()
    path = tmp_path / "adapter_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CorruptCheckpointError, match=r"adapter_model\.bin") as caught:
        read_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def spoilt(data: bytes) -> dict[str, bytes]:
    header = int.from_bytes(data[:8], "little")
    return {
        "empty": b"",
        "cut in the header": data[: 8 + header // 2],
        "cut in the data": data[:-5],
        "grown": data + b"x" * 8,
        "header length altered": (header + 999_999).to_bytes(8, "little") + data[8:],
        "header altered": data[:8] + data[8 : 8 + header].replace(b"F32", b"F99") + data[8 + header :],
        "offsets altered": data[:8] + data[8 : 8 + header].replace(b"[0,32]", b"[0,99]") + data[8 + header :],
        "something else": b"<html>404</html>" * 10,
    }


@pytest.mark.parametrize("how", spoilt(b"\x00" * 16))
def test_spoilt_files(how: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_config(), tensors_of())
    path = tmp_path / "adapter_model.safetensors"
    good = path.read_bytes()
    bad = spoilt(good)[how]
    assert bad != good
    path.write_bytes(bad)
    with pytest.raises(CorruptCheckpointError, match=r"adapter_model\.safetensors cannot be read") as caught:
        read_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_no_text(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_config(), tensors_of())
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CorruptCheckpointError, match="not a text file"):
        read_config(tmp_path)


def test_unknown_fields_are_noted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_config(), tensors_of())
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "brand_new": 3, "quiet": None}))
    with pytest.warns(UserWarning, match="ignored the fields brand_new, which") as caught:
        read_checkpoint(tmp_path)
    assert len(caught) == 1


def test_a_config_edited_by_hand_counts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_config(lora_alpha=8), tensors_of())
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 99'))
    config = read_checkpoint(tmp_path).config
    assert isinstance(config, LoraConfig)
    assert config.lora_alpha == 99


def test_a_config_that_an_interrupted_write_left_unfinished_is_not_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_config(r=3), tensors_of())
    staging = tmp_path / staging_name(tmp_path)
    staging.mkdir()
    (staging / "adapter_config.json").write_bytes(b"\xff")
    assert read_config(tmp_path) == read_checkpoint(tmp_path).config


def test_a_file_stands_for_its_folder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_config(r=3), tensors_of())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        config = read_config(tmp_path / name)
        assert isinstance(config, LoraConfig)
        assert config.r == 3


def test_what_is_not_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "runs" / "sql", a_config(), tensors_of())
    with pytest.raises(CheckpointNotFoundError, match=r"Did you mean '\S*sql'"):
        read_checkpoint(tmp_path / "runs" / "sqll")
    with pytest.raises(CheckpointNotFoundError, match="adapters in its subfolders 'sql'"):
        read_checkpoint(tmp_path / "runs")
    assert read_checkpoint(tmp_path / "runs", subfolder="sql").tensors
    (tmp_path / "runs" / "sql" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"no adapter_model\.safetensors or adapter_model\.bin"):
        read_checkpoint(tmp_path / "runs" / "sql")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointNotFoundError, match="is a file"):
        read_checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointNotFoundError, match=r"there is no file '\S*none"):
        a_config().stored_tensors(str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"unknown option 'revison'.*Did you mean 'revision'"):
        read_config(tmp_path, revison="main")


def test_a_config_ignores_what_is_for_models_and_warns_of_misspellings(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_config(), tensors_of())
    of_models = ("trust_remote_code", "torch_dtype", "dtype", "device_map", "code_revision", "attn_implementation")
    options: dict[str, Any] = {**dict.fromkeys(of_models, True), "token": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = AdapterConfig.from_pretrained(str(tmp_path), **options)
    assert read == AdapterConfig.from_pretrained(str(tmp_path)) == read_config(tmp_path)
    with pytest.warns(UserWarning, match=r"'revison' is not a download option .* Did you mean 'revision'\?"):
        AdapterConfig.from_pretrained(str(tmp_path), revison="main")
    assert AdapterConfig.from_pretrained(str(tmp_path.parent), subfolder=tmp_path.name) == read


def test_other_files_stay_and_permissions_are_ordinary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    write_checkpoint(tmp_path, a_config(), tensors_of())
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    ordinary = (tmp_path / "tokenizer.json").stat().st_mode
    for path in tmp_path.iterdir():
        assert path.stat().st_mode == ordinary
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "adapter_model.safetensors", "adapter_config.json", "README.md"}


def test_a_linked_file_of_the_cache_is_replaced_not_followed(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    save_file(tensors_of(1.0), blob)
    content = blob.read_bytes()
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "adapter_model.safetensors").symlink_to(blob)
    write_checkpoint(folder, a_config(), tensors_of(2.0))
    assert blob.read_bytes() == content
    assert not (folder / "adapter_model.safetensors").is_symlink()


def test_home_and_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_checkpoint("~/adapter", a_config(), tensors_of(), write_card=False)
    assert not (tmp_path / "adapter" / "README.md").exists()
    shutil.copytree(tmp_path / "adapter", tmp_path / "copy")
    assert read_checkpoint("~/copy").tensors.keys() == tensors_of().keys()


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "endless", "huge"])
def test_files_in_the_way_that_cannot_be_read_are_replaced_or_left(name: str, kind: str, tmp_path: Path) -> None:
    """And never waited for, or read without bounds."""
    path = tmp_path / name
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero") if kind == "endless" else path.touch()
    if kind == "huge":
        os.truncate(path, 2**40)
    write_checkpoint(tmp_path, a_config(), tensors_of(3.0))
    read = read_checkpoint(tmp_path).tensors
    assert all(torch.equal(tensor, read[key]) for key, tensor in tensors_of(3.0).items())
    assert path.is_file() or name == "README.md"


def test_a_config_that_is_no_file_of_a_size_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_config(), tensors_of())
    os.truncate(tmp_path / "adapter_config.json", 2**40)
    with pytest.raises(CorruptCheckpointError, match=r"not the config of an adapter: .*has more than 8,000,000 bytes"):
        read_checkpoint(tmp_path)
