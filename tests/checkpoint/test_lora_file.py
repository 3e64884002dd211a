"""LoRA files of the picture world: written and read back in each spelling, and read as others write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from nbpeft import LoraConfig, PeftModel, get_peft_model
from nbpeft.checkpoint import lora_file
from nbpeft.errors import AdapterError, CheckpointError, NbpeftError
from nbpeft.model.saving.saved_places import owner_of
from nbpeft.shipping import ship
from tests.closeness import assert_close
from tests.tiny_models import llama, randomize


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_out[0](self.to_q(x))
        return out


class UNet2DConditionModel(nn.Module):
    """As much of diffusers' UNet as its names need."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.mid_block = nn.ModuleDict({"attn1": Attention()})

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv_in(x).flatten(2).transpose(1, 2)
        out: Tensor = self.mid_block["attn1"](hidden)
        return out


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel().eval()


def adapted(**fields: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_out.0", "conv_in"]}
    model = get_peft_model(unet(), LoraConfig(**settings | fields), "style")
    randomize(model, "style")
    return model.eval()


PICTURE = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
UNEVEN: dict[str, Any] = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"conv_in": 3}, "use_rslora": True}


@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
@pytest.mark.parametrize("fields", [{}, UNEVEN], ids=["plain", "uneven"])
def test_a_file_is_written_and_read_back(spelling: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**fields)
    done = ship(model, engine=spelling, to=tmp_path / "served")
    (path,) = (tmp_path / "served").iterdir()
    keys = safetensors.torch.load_file(path)
    stem = {"kohya": "lora_unet_mid_block_attn1_to_out_0.", "diffusers": "unet.mid_block.attn1.to_out.0."}[spelling]
    assert sum(key.startswith(stem) for key in keys) == (3 if spelling == "kohya" else 2)
    assert done.byte_count == sum(tensor.nbytes for key, tensor in keys.items() if not key.endswith(".alpha"))
    for source in (path, path.parent):
        loaded = PeftModel.from_pretrained(unet(), source).eval()
        assert owner_of(loaded.manager, "default", source) is None  # as an adapter it is not saved there yet
        assert_close(loaded(PICTURE), model(PICTURE))


FACTORS = {"down": torch.randn(2, 8), "up": torch.randn(8, 2)}
SPELLINGS = {
    "kohya": "lora_unet_mid_block_attn1_to_q.lora_{}.weight",
    "old diffusers": "unet.mid_block.attn1.processor.to_q_lora.{}.weight",
    "diffusers": "unet.mid_block.attn1.to_q.lora.{}.weight",
    "linear layers": "unet.mid_block.attn1.to_q.lora_linear_layer.{}.weight",
    "without a component": "mid_block.attn1.to_q.lora.{}.weight",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_what_others_write_is_read(spelling: str, alpha: float | None, tmp_path: Path) -> None:
    tensors = {SPELLINGS[spelling].format(part): value for part, value in FACTORS.items()}
    if alpha is not None:
        stem = SPELLINGS[spelling].partition(".lora")[0].partition("_lora.")[0]
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    safetensors.torch.save_file(tensors, tmp_path / "style.safetensors")
    model = PeftModel.from_pretrained(unet(), tmp_path / "style.safetensors")
    layer = model.manager.layers["mid_block.attn1.to_q"]
    expected = FACTORS["up"] @ FACTORS["down"] * ((alpha or 2.0) / 2)
    assert_close(layer.get_delta_weight("default"), expected)


ALPHAS: dict[str, tuple[Tensor, float | str]] = {
    "whole": (torch.tensor(1), 1.0),
    "whole, of one element": (torch.tensor([[3]], dtype=torch.int16), 3.0),
    "half": (torch.tensor([0.5], dtype=torch.bfloat16), 0.5),
    "two": (torch.ones(2), "has 2 elements: an alpha, if present, is one number"),
    "none": (torch.ones(0), "has 0 elements"),
    "complex": (torch.tensor(1 + 1j), "is complex64: an alpha, if present, is one number"),
    "a truth": (torch.tensor(True), "is bool"),
    "NaN": (torch.tensor(float("nan")), "is nan: an alpha, if present, is a finite number"),
    "infinite": (torch.tensor(float("inf")), "is inf: an alpha, if present, is a finite number"),
}


@pytest.mark.parametrize("case", ALPHAS)
@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
def test_an_alpha_is_one_finite_number(spelling: str, case: str, tmp_path: Path) -> None:
    alpha, expected = ALPHAS[case]
    if alpha.dtype not in safetensors.torch._SIZE:
        pytest.skip("the installed safetensors does not write this type")
    tensors = {SPELLINGS[spelling].format(part): value for part, value in FACTORS.items()}
    tensors[f"{SPELLINGS[spelling].partition('.lora')[0]}.alpha"] = alpha
    safetensors.torch.save_file(tensors, tmp_path / "style.safetensors")
    if isinstance(expected, str):
        with pytest.raises(CheckpointError, match=rf"to_q\.alpha' in .*style.safetensors {expected}"):
            PeftModel.from_pretrained(unet(), tmp_path / "style.safetensors")
        return
    model = PeftModel.from_pretrained(unet(), tmp_path / "style.safetensors")
    assert model.manager.layers["mid_block.attn1.to_q"].adapter("default").scaling == expected / 2


@pytest.mark.parametrize("alpha", [None, "8", [8], {}, float("nan"), 10**400, True])
def test_an_alpha_in_the_config_that_diffusers_writes_is_a_number(alpha: Any, tmp_path: Path) -> None:
    tensors = {SPELLINGS["diffusers"].format(part): value for part, value in FACTORS.items()}
    config = json.dumps({"unet.r": 2, "unet.lora_alpha": alpha})
    safetensors.torch.save_file(tensors, tmp_path / "style.safetensors", {"lora_adapter_metadata": config})
    with pytest.raises(NbpeftError, match="lora_alpha"):
        PeftModel.from_pretrained(unet(), tmp_path / "style.safetensors")


@pytest.mark.parametrize("component", ["", "unet."])
def test_the_config_that_diffusers_writes_is_read(component: str, tmp_path: Path) -> None:
    tensors = {SPELLINGS["diffusers"].removeprefix("unet.").format(part): value for part, value in FACTORS.items()}
    config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {"^mid_block.attn1.to_q": 6}, "use_rslora": False}
    text = json.dumps({component + key: value for key, value in config.items()})
    tensors = {component + key: value for key, value in tensors.items()}
    for metadata in (text, "{", "[]", "[" * 100_000):
        safetensors.torch.save_file(tensors, tmp_path / "style.safetensors", {"lora_adapter_metadata": metadata})
        model = PeftModel.from_pretrained(unet(), tmp_path / "style.safetensors")
        scaling = model.manager.layers["mid_block.attn1.to_q"].adapter("default").scaling
        assert scaling == (3 if metadata == text else 1)


@pytest.mark.parametrize("key", ["mid_block_attn1_to_q.dora_scale", "mid_block_attn1_to_q.hada_w1_a"])
def test_more_than_two_factors_are_refused(key: str, tmp_path: Path) -> None:
    tensors = {SPELLINGS["kohya"].format(part): value for part, value in FACTORS.items()}
    safetensors.torch.save_file(tensors | {f"lora_unet_{key}": torch.ones(8)}, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match="only the two factors of LoRA and its alpha are supported"):
        PeftModel.from_pretrained(unet(), tmp_path / "style.safetensors")


def test_keys_of_another_component_are_left_out(tmp_path: Path) -> None:
    tensors = {SPELLINGS["kohya"].format(part): value for part, value in FACTORS.items()}
    tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.randn(2, 4)
    safetensors.torch.save_file(tensors, tmp_path / "style.safetensors")
    with pytest.warns(UserWarning, match="this model has no modules for these keys: 'lora_te_text_model"):
        PeftModel.from_pretrained(unet(), tmp_path / "style.safetensors")


def test_files_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    safetensors.torch.save_file({"lora_unet_other.lora_down.weight": torch.randn(2, 8)}, path)
    with pytest.raises(CheckpointError, match=r"nothing in .* fits this model: it has 'lora_unet_other"):
        PeftModel.from_pretrained(unet(), path)
    safetensors.torch.save_file({SPELLINGS["kohya"].format("down"): FACTORS["down"]}, path)
    with pytest.raises(CheckpointError, match=r"only one of the two factors of mid_block\.attn1\.to_q"):
        PeftModel.from_pretrained(unet(), path)
    safetensors.torch.save_file({SPELLINGS["kohya"].format(part): torch.randn(3) for part in FACTORS}, path)
    with pytest.raises(CheckpointError, match="is not a matrix"):
        PeftModel.from_pretrained(unet(), path)
    path.write_bytes(b"x" * 40)
    with pytest.raises(CheckpointError, match="cannot be read"):
        PeftModel.from_pretrained(unet(), path)


def test_a_folder_with_a_config_is_read_as_before(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    folder = tmp_path / "style"
    weights = folder / "adapter_model.safetensors"
    assert weights.is_file() and lora_file(folder) is None and lora_file(weights) is None
    other = weights.rename(folder / "other.safetensors")
    assert lora_file(other) is None
    (folder / "adapter_config.json").unlink()
    assert lora_file(other) == other
    assert lora_file(other.rename(weights)) is None
    assert lora_file("user/name") is None


def test_language_models_are_not_for_kohya() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]), "style")
    with pytest.raises(AdapterError, match="not a component of a pipeline"):
        ship(model, engine="kohya", dry_run=True)
