"""GLoRA on layers with biases, in every form of its five parts, against peft's."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.model import PeftModel, get_peft_model, merge_to_folder
from tests.closeness import assert_close, differ
from tests.tiny_models import llama, logits, randomize

FORMS = [
    *itertools.product(["lora", "vector", "constant", "none"], ["lora", "none"], ["vector", "none"]),
    ("none", "vector", "constant"),
    ("vector", "vector", "vector"),
]


def biased() -> Any:
    """A model whose layers have biases that are not zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16, "num_hidden_layers": 1}
    model = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, vocab_size=97, max_position_embeddings=64)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


@pytest.mark.drawn(8)
@pytest.mark.parametrize("forms", [forms for forms in FORMS if forms != ("none", "none", "none")])
def test_every_form_is_that_of_peft(forms: tuple[str, str, str], tmp_path: Path) -> None:
    names = dict(zip(("config_A_B", "config_C", "config_D_E"), forms, strict=True))
    model: Any = get_peft_model(biased(), nbpeft.GloraConfig(r=2, **names)).eval()
    assert torch.equal(logits(model), logits(biased()))
    randomize(model, scale=0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(biased(), tmp_path, is_trainable=True).eval()
    assert_close(logits(theirs), expected)
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.save_pretrained(tmp_path / "theirs")
    assert_close(logits(PeftModel.from_pretrained(biased(), tmp_path / "theirs")), expected)
    model.merge_adapter()
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def test_zeros_that_peft_writes_are_passed_over(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    theirs = peft.get_peft_model(biased(), peft.GloraConfig(r=2, config_A_B="none"))
    theirs.save_pretrained(tmp_path)
    assert any(name.endswith("glora_A.zeros") for name in peft.get_peft_model_state_dict(theirs))
    again: Any = get_peft_model(biased(), nbpeft.GloraConfig(r=2, config_A_B="none"))
    result = again.load_adapter(str(tmp_path), "other")
    assert not result.unexpected_keys and not result.missing_keys
    assert not [warning for warning in recwarn if "zeros" in str(warning.message)]


@pytest.mark.parametrize("form", ["lora", "vector", "constant"])
def test_a_random_start_is_that_of_peft(form: str) -> None:
    other = "vector" if form == "lora" else form
    fields: Any = {"config_A_B": form, "config_C": "lora", "config_D_E": other, "init_weights": False, "r": 2}
    models: list[Any] = []
    for library, make in ((nbpeft, get_peft_model), (peft, peft.get_peft_model)):
        torch.manual_seed(3)
        made: Any = library
        models.append(make(biased(), made.GloraConfig(**fields)).eval())
    assert_close(logits(models[0]), logits(models[1]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [nbpeft.GloraConfig(r=2), nbpeft.IA3Config(feedforward_modules=[])])
def test_changes_of_biases_are_merged_from_folder_to_folder(config: Any, tmp_path: Path) -> None:
    biased().save_pretrained(tmp_path / "base")
    config.target_modules = {"q_proj", "fc1"}
    model = get_peft_model(biased(), config)
    randomize(model, scale=0.3)
    model.save_pretrained(tmp_path / "adapter")
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    wanted: nn.Module = model.merge_and_unload()
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    before = dict(biased().named_parameters())
    for name, value in wanted.named_parameters():
        assert_close(found[name], value)
    assert not torch.equal(found["model.decoder.layers.0.fc1.bias"], before["model.decoder.layers.0.fc1.bias"])


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(ConfigError, match="config_D_E must be one of 'vector', 'constant', 'none', not 'lora'"):
        nbpeft.GloraConfig(config_D_E="lora")


BIASES_ALONE: dict[str, Any] = {"config_A_B": "none", "config_D_E": "vector"}


def test_layers_without_a_bias_may_have_nothing_where_others_have(tmp_path: Path) -> None:
    config = nbpeft.GloraConfig(**BIASES_ALONE, target_modules=["up_proj", "q_proj"])
    model: Any = get_peft_model(llama(), config).eval()
    randomize(model, scale=0.3)
    expected = logits(model)
    assert differ(expected, logits(llama()))
    model.save_pretrained(tmp_path / "adapter")
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), expected)
    llama().save_pretrained(tmp_path / "base")
    merge_to_folder(model, "default", tmp_path / "live")
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "folders")
    for folder in ("live", "folders"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert_close(logits(found), expected)
    assert nbpeft.merge_errors(model)
    assert_close(logits(model.merge_and_unload()), expected)


def test_what_would_train_nothing_is_refused_unless_biases_learn() -> None:
    bare = llama(attention_bias=False)
    with pytest.raises(ConfigError, match=r"GLoRA .* no parameters on .*0.self_attn.q_proj and 3 more layers: nothing"):
        get_peft_model(bare, nbpeft.GloraConfig(**BIASES_ALONE, target_modules=["q_proj", "v_proj"]))
    assert not hasattr(bare, "peft_config")
    config = nbpeft.GloraConfig(config_A_B="none", config_C="none", config_D_E="none", bias="glora_only")
    assert get_peft_model(biased(), config).get_nb_trainable_parameters()[0] > 0
