"""What is taken from where when an adapter is saved."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nbpeft.model as nbpeft
from nbpeft import IA3Config, PromptEncoderConfig, VeraConfig
from nbpeft.checkpoint import inside
from nbpeft.errors import AdapterError, CheckpointError, ConfigError, PeftWarning
from nbpeft.model import LoraConfig, get_peft_model, get_peft_model_state_dict
from tests.tiny_models import adapted, llama, logits


def shifted(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict gathered from elsewhere: other values under the model's keys."""
    return {key: value.detach() + 1 for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"use_dora": True},
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_state_dict_gives_every_tensor_as_in_peft(changes: dict[str, Any]) -> None:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], **changes}
    saved = []
    for library in (nbpeft, peft):
        torch.manual_seed(1)
        model = library.get_peft_model(llama(), library.LoraConfig(**settings))
        before = library.get_peft_model_state_dict(model)
        after = library.get_peft_model_state_dict(model, state_dict=shifted(model))
        saved.append({key: bool(torch.equal(after[key], before[key] + 1)) for key in before})
    assert saved[0] == saved[1] and all(saved[0].values())


def test_frozen_tensors_that_a_state_dict_lacks_are_the_models_own() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = get_peft_model_state_dict(model, state_dict=trained)
    frozen = next(tensor for key, tensor in tensors.items() if key.endswith("embed_tokens.base_layer.weight"))
    assert torch.equal(frozen, model.get_base_model().model.embed_tokens.weight)
    assert not any("lm_head" in key for key in tensors)


def lacking(model: nn.Module, ending: str) -> dict[str, torch.Tensor]:
    """The state dict of a model without the tensors whose names end so."""
    return {key: value for key, value in model.state_dict().items() if not key.endswith(ending)}


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_tensors_that_a_state_dict_lacks_are_not_saved_and_told(changes: dict[str, Any], tmp_path: Path) -> None:
    found: list[Any] = []
    for library in (peft, nbpeft):
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], **changes}
        model = library.get_peft_model(llama(), library.LoraConfig(**settings))
        rest = lacking(model, "layers.0.self_attn.v_proj.lora_A.default.weight")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model.save_pretrained(tmp_path / library.__name__, state_dict=rest)
            again = library.get_peft_model_state_dict(model, state_dict=rest)
        saved = load_file(tmp_path / library.__name__ / "adapter_model.safetensors")
        found.append((saved.keys(), again.keys()))
    names = "no 'model.layers.0.self_attn.v_proj.lora_A.default.weight' of adapter 'default': it is saved without"
    assert found[0] == found[1] and sum(names in str(one.message) for one in told) == 2
    assert len(saved) == len(get_peft_model_state_dict(model)) - 1
    with pytest.warns(UserWarning, match="1 adapter key is missing"):
        nbpeft.PeftModel.from_pretrained(llama(), tmp_path / nbpeft.__name__)


def test_a_state_dict_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"the state dict has no '.*lora_A\.default\.weight', .* more of adapter"):
        adapted().save_pretrained(tmp_path / "x", state_dict=llama().state_dict())
    prompt = get_peft_model(llama(), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(AdapterError, match=r"has no 'prompt_encoder\.default\.mlp_head\.2\.weight' of adapter"):
        prompt.save_pretrained(tmp_path / "x", state_dict=lacking(prompt, "mlp_head.2.weight"))
    assert not (tmp_path / "x").exists()


@pytest.mark.filterwarnings("ignore:the state dict has no")
def test_a_start_is_not_converted_without_one_of_its_factors(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    rest = lacking(model, "layers.0.self_attn.q_proj.lora_A.default.weight")
    initial = str(tmp_path / "initial")
    model.save_pretrained(tmp_path / "whole", state_dict=rest)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(initial)
    model.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(AdapterError, match="cannot be converted: the state dict has no 'lora_A' of one of its layers"):
        model.save_pretrained(tmp_path / "x", state_dict=rest, path_initial_model_for_weight_conversion=initial)
    assert not (tmp_path / "x").exists() and not any(
        "lora_A" in key and "layers.0" in key for key in load_file(tmp_path / "whole/adapter_model.safetensors")
    )


def test_embeddings_that_cannot_be_found_are_told(tmp_path: Path) -> None:
    for library in (nbpeft, peft):
        base = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
        model = library.get_peft_model(base, library.LoraConfig(target_modules=["1"]))
        with pytest.warns(UserWarning, match="embedding"):
            model.save_pretrained(tmp_path, save_embedding_layers=True)


def test_a_card_is_written_whichever_adapters_are_saved(tmp_path: Path) -> None:
    found = []
    for library in (peft, nbpeft):
        model = library.get_peft_model(llama(), library.LoraConfig(target_modules=["q_proj"]))
        model.add_adapter("other", library.LoraConfig(target_modules=["q_proj"]))
        folder = tmp_path / library.__name__
        model.save_pretrained(folder, selected_adapters=["other"])
        found.append({str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()})
    assert found[0] == found[1]


@pytest.mark.parametrize("folder", ["x" * 300, "a/" * 3000, "bad\0x", "lone\ud800", "/dev/null/x", "/dev/null"])
def test_a_place_that_cannot_be_is_told_in_one_line(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    writes: list[Callable[[], object]] = [
        lambda: model.save_pretrained(folder),
        lambda: model.create_or_update_model_card(folder),
        lambda: model.peft_config["default"].save_pretrained(folder),
        lambda: nbpeft.merge_to_folder(model, None, folder),
    ]
    for write in writes:
        with pytest.raises(CheckpointError, match=r"could not write|is not a folder") as caught:
            write()
        assert len(str(caught.value)) < 300 and str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_several_adapters_and_their_card_are_saved_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), "sql")
    model.add_adapter("chat", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    mine = (tmp_path / "README.md").read_text() + "Trained with care.\n"
    (tmp_path / "README.md").write_text(mine)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with torch.no_grad():
        model.manager.parameters("sql")[0].add_(1)
    real = inside.move

    def full(root: Path, name: str, target: Path, new: str) -> None:
        if new == "chat/adapter_model.safetensors" and ".old" not in name:
            raise OSError(errno.EIO, "Input/output error")
        real(root, name, target, new)

    monkeypatch.setattr(inside, "move", full)
    with pytest.raises(CheckpointError, match="Input/output error; nothing was changed"):
        model.save_pretrained(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == mine


@pytest.mark.filterwarnings("ignore:.*adapter_model.bin")
def test_pickled_files_are_written_as_peft_reads_them(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert {"adapter_config.json", "adapter_model.bin"} <= set(os.listdir(tmp_path / "bin"))
    assert not (tmp_path / "bin/adapter_model.safetensors").exists()
    for library in (nbpeft, peft):
        read = library.PeftModel.from_pretrained(llama(), tmp_path / "bin").eval()
        assert torch.equal(logits(read), logits(model))


def test_a_pickled_file_is_not_written_where_another_is_read_first(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=r"has adapter_model.safetensors, which is read before"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["0"], use_dora=True),
        VeraConfig(r=4, target_modules=["0"]),
        IA3Config(target_modules=["0"], feedforward_modules=[]),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_shards_are_saved_with_a_warning(config: Any, tmp_path: Path) -> None:
    """A sharded model's parameters are one-dimensional, or have no numbers, as long as they are not gathered."""
    model = nbpeft.get_peft_model(nn.Sequential(nn.Linear(10, 8)), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model.save_pretrained(tmp_path)
    parameter = model.manager.parameters("default")[0]
    parameter.data = parameter.data.flatten()[:0]
    with pytest.warns(PeftWarning, match=r"1 incomplete tensors \('0\..* DeepSpeed ZeRO-3 / FSDP shards"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_what_to_do_with_embeddings_is_one_of_three(tmp_path: Path) -> None:
    model = adapted()
    message = "save_embedding_layers must be one of 'auto', True, False, None, not 'x'"
    for save in (partial(model.save_pretrained, tmp_path / "x"), partial(nbpeft.get_peft_model_state_dict, model)):
        with pytest.raises(ConfigError, match=message):
            save(save_embedding_layers="x")
    assert not (tmp_path / "x").exists()


def test_layers_inside_an_adapted_module_are_found_in_a_state_dict() -> None:
    for library in (peft, nbpeft):
        model = library.get_peft_model(
            nn.TransformerEncoderLayer(8, 2, batch_first=True), library.LoraConfig(r=2, target_modules=["self_attn"])
        )
        whole = library.get_peft_model_state_dict(model)
        gathered = library.get_peft_model_state_dict(model, state_dict=shifted(model))
        assert len(whole) == 4 and set(gathered) == set(whole)  # in_proj, and out_proj inside it
        assert all(torch.equal(gathered[key], tensor.detach() + 1) for key, tensor in whole.items())
