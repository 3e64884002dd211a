"""VB-LoRA's small files: which vectors each piece mixes, and their shares, in place of all logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file, save_file

import nbpeft
from nbpeft.errors import CheckpointError, ConfigError, TrainingError, UnknownAdapterError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import llama, logits, randomize

FIELDS: dict[str, Any] = {
    "num_vectors": 12,
    "vector_length": 4,
    "topk": 3,
    "save_only_topk_weights": True,
    "target_modules": ["q_proj", "down_proj"],
}


def made() -> PeftModel:
    model = get_peft_model(llama(), nbpeft.VBLoRAConfig(**FIELDS))
    randomize(model, scale=0.5)
    return model.eval()


def test_small_files_go_both_ways(tmp_path: Path) -> None:
    ours = made()
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert (logits(ours) - logits(llama())).abs().max() > 1e-3
    assert_close(logits(theirs), logits(ours))
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert {key: (one.shape, one.dtype) for key, one in files[0].items()} == {
        key: (one.shape, one.dtype) for key, one in files[1].items()
    }
    again = PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    assert_close(logits(again), logits(ours))
    state = nbpeft.get_peft_model_state_dict(ours)
    assert any(key.endswith("_topk_indices") for key in state)
    fresh = get_peft_model(llama(), nbpeft.VBLoRAConfig(**FIELDS)).eval()
    nbpeft.set_peft_model_state_dict(fresh, state)
    assert_close(logits(fresh), logits(ours))


def test_one_from_a_small_file_cannot_be_trained_further(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    with pytest.raises(TrainingError, match="the other logits are gone"):
        logits(again)


def test_a_broken_small_file_is_refused(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(one for key, one in tensors.items() if key.endswith("_topk_indices"))[0, 0, 0] = 200
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="do not say which of 12 vectors each piece mixes"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"topk": 13}, "more than the num_vectors = 12"), ({"vector_length": 5}, "must divide its 32 inputs")],
)
def test_impossible_values_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        get_peft_model(llama(), nbpeft.VBLoRAConfig(**FIELDS | fields))


@pytest.mark.parametrize("small", [True, False])
def test_what_a_file_takes_is_counted_as_in_peft(small: bool, capsys: Any) -> None:
    fields = FIELDS | {"save_only_topk_weights": small}
    counts: list[Any] = []
    lines: list[str] = []
    for library in (peft, nbpeft):
        model: Any = library.get_peft_model(llama(), library.VBLoRAConfig(**fields))
        model.base_model.model.lm_head.requires_grad_(True)
        counts.append(model.get_nb_savable_parameters())
        model.print_savable_parameters()
        lines.append(capsys.readouterr().out)
    assert counts[0] == counts[1] and lines[0] == lines[1] and "to-be-saved" in lines[0]
    with pytest.raises(UnknownAdapterError):
        model.get_nb_savable_parameters("other")


@pytest.mark.parametrize("count", [2**8 - 1, 2**8, 2**15 - 1, 2**15])
def test_indices_have_the_dtype_of_peft(count: int) -> None:
    dtypes = []
    for library in (nbpeft, peft):
        config = library.VBLoRAConfig(**FIELDS | {"num_vectors": count, "vector_length": 32, "r": 1})
        found = library.get_peft_model_state_dict(library.get_peft_model(llama(num_hidden_layers=1), config))
        dtypes.append({key: tensor.dtype for key, tensor in found.items()})
    assert dtypes[0] == dtypes[1]
