"""FRoD against peft's: directions that layers share, and what is found again in the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.frod.model import _category_from_key, _layer_index_from_key
from safetensors.torch import load, load_file, save_file
from torch import nn

import nbpeft
from nbpeft.engine.methods.projections.frod import block_of, role_of
from nbpeft.errors import ConfigError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import gpt2, llama, logits, logits_of_each, randomize

FIELDS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "sparse_rate": 0.05}
pytestmark = pytest.mark.filterwarnings("ignore")


def both(make: Any, **fields: Any) -> tuple[Any, Any]:
    """The same new adapter in both libraries."""
    models: list[Any] = []
    for library, wrap in ((nbpeft, get_peft_model), (peft, peft.get_peft_model)):
        torch.manual_seed(1)
        config: Any = library.FrodConfig(**fields)  # type: ignore[attr-defined]
        models.append(wrap(make(), config).eval())
    return models[0], models[1]


def singular() -> Any:
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[:, :8] = 0
            layer.self_attn.v_proj.weight.zero_()
    return model


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (llama, FIELDS),
        (llama, {**FIELDS, "layers_to_transform": [1], "regularization_alpha": 0.1}),
        (llama, {**FIELDS, "init_weights": False, "projection_prng_key": 5}),
        (llama, {**FIELDS, "sparse_rate": 1.0}),
        (singular, FIELDS),
        (gpt2, {}),
    ],
)
def test_a_new_adapter_is_that_of_peft(make: Any, fields: dict[str, Any]) -> None:
    ours, theirs = both(make, **fields)
    expected, found = peft.get_peft_model_state_dict(theirs), nbpeft.get_peft_model_state_dict(ours)
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert_close(found[key].detach(), tensor.detach())
    assert_close(logits(ours), logits(theirs))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_what_a_layer_has_is_that_of_peft() -> None:
    layers = [model.base_model.model.model.layers[1].self_attn.v_proj for model in both(llama, **FIELDS)]
    for name in ("frod_V", "frod_U", "frod_s_indices", "frod_s_size", "frod_lambda_l", "frod_lambda_s_values"):
        found, wanted = (getattr(layer, name)["default"] for layer in layers)
        assert_close(found.detach(), wanted.detach())
    assert layers[0].r["default"] == layers[1].r["default"]
    models = both(llama, **FIELDS)
    for name in ("frod_V", "frod_s_indices", "frod_s_size"):
        found, wanted = (getattr(model.base_model, name) for model in models)
        assert sorted(found) == sorted(wanted)
        assert_close(found["mlp_down_proj"]["default"], wanted["mlp_down_proj"]["default"])
    assert_close(layers[0].get_delta_weight("default"), torch.zeros(16, 32))


@pytest.mark.parametrize(
    "path",
    [
        *("linear", "0", "net.0", "layers.2", "model.layers.11.self_attn.q_proj", "layers.x.fc", "layers.x.3.fc"),
        *(
            "encoder.layer.7.attention.output.dense",
            "encoder.layer.7.output.dense",
            "h.4.attn.c_attn",
            "classifier.dense",
        ),
        *("model.decoder.layers.2.mlp.experts.3.up", "blocks.1.layers.fc1"),
    ],
)
def test_roles_and_blocks_are_those_of_peft(path: str) -> None:
    assert (role_of(path), block_of(path, 42)) == (_category_from_key(path), _layer_index_from_key(path, 42))


def test_directions_of_another_machine_are_followed_and_not_in_peft(tmp_path: Path) -> None:
    """A direction can have either sign: what is in a file has to go with outputs that are found for it."""
    model = get_peft_model(llama(), nbpeft.FrodConfig(**FIELDS))
    randomize(model, scale=0.2)
    layer: Any = model.base_model.model.model.layers[0].mlp.down_proj  # type: ignore[union-attr]
    sign = torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0)
    rows, columns = layer.frod_s_indices["default"]
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load(file.read_bytes())  # not mapped from the file, which is overwritten
    tensors["base_model.frod_V.mlp_down_proj"] *= sign
    for key in [key for key in tensors if key.endswith("down_proj.frod_lambda_s_values")]:
        tensors[key] *= sign[rows] * sign[columns]  # the same adapter, in the other signs
    save_file(tensors, file)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert_close(logits(again), expected)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert (logits(theirs) - expected).abs().max() > 1e-2
    nbpeft.set_peft_model_state_dict(model, tensors)
    assert_close(logits(model), expected)
    assert_close(
        layer.frod_U["default"] * sign,
        both(llama, **FIELDS)[0].base_model.model.model.layers[0].mlp.down_proj.frod_U["default"],
    )


def test_a_second_adapter_has_its_own_directions_and_not_in_peft(tmp_path: Path) -> None:
    """Where the first one is on more layers."""
    torch.manual_seed(2)
    moved: list[float] = []
    for library, wrap in ((nbpeft, get_peft_model), (peft, peft.get_peft_model)):
        make: Any = library.FrodConfig  # type: ignore[attr-defined]
        model = wrap(llama(), make(**FIELDS))
        model.add_adapter("other", make(**{**FIELDS, "layers_to_transform": [1], "init_weights": False}))
        model.set_adapter("other")
        expected = logits(model.eval())
        model.save_pretrained(tmp_path / library.__name__, selected_adapters=["other"])
        again: Any = library.PeftModel.from_pretrained(llama(), tmp_path / library.__name__ / "other")
        moved.append(float((logits(again) - expected).abs().max()))
    assert moved[0] < 1e-6 and moved[1] > 1e-3


def test_in_bfloat16_it_starts_at_the_base_and_not_in_peft() -> None:
    ours, theirs = both(lambda: llama(dtype=torch.bfloat16), **FIELDS)
    base = logits(llama(dtype=torch.bfloat16))
    assert torch.equal(logits(ours), base) and not torch.equal(logits(theirs), base)


@pytest.mark.parametrize("saved", [True, False])
def test_deleting_and_reloading_beside_another_keeps_both(saved: bool, tmp_path: Path) -> None:
    model: Any = get_peft_model(llama(), nbpeft.FrodConfig(**FIELDS, save_projection=saved))
    model.add_adapter("other", nbpeft.FrodConfig(target_modules=["o_proj", "v_proj"], projection_prng_key=9))
    randomize(model, scale=0.3)
    expected = logits_of_each(model)
    model.save_pretrained(tmp_path)
    assert any("frod_V" in key for key in load_file(tmp_path / "adapter_model.safetensors")) == saved
    model.delete_adapter("default")
    model.load_adapter(str(tmp_path), "default")
    assert_close(logits_of_each(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    model.merge_adapter()
    assert_close(logits(model), expected["other"])
    assert torch.equal(logits(model.unload()), logits(llama()))


def test_layers_of_a_role_need_as_many_inputs() -> None:
    model = nn.ModuleDict({f"layers_{n}": nn.ModuleDict({"fc": nn.Linear(n, 4)}) for n in (4, 6)})
    get_peft_model(model, nbpeft.FrodConfig(target_modules=["fc"]))  # two roles
    other = nn.Sequential(*(nn.ModuleDict({"fc": nn.ModuleDict({"in": nn.Linear(n, 4)})}) for n in (4, 6)))
    with pytest.raises(ConfigError, match=r"1.fc.in has 6 inputs and 0.fc.in 4: FRoD's layers of one role, fc_in"):
        get_peft_model(other, nbpeft.FrodConfig(target_modules=["in"]))


@pytest.mark.parametrize(
    ("value", "words"), [(99, "places outside of 32 x 32"), (-1, "places outside"), (None, "must be")]
)
def test_damaged_places_are_refused(value: int | None, words: str, tmp_path: Path) -> None:
    get_peft_model(llama(), nbpeft.FrodConfig(**FIELDS)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load(file.read_bytes())
    if value is None:
        tensors["base_model.frod_s_size.self_attn_q_proj"] += 1
    else:
        tensors["base_model.frod_s_indices.self_attn_q_proj"][0, 0] = value
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=words):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("fields", [{"sparse_rate": 1.5}, {"regularization_alpha": -1}, {"projection_prng_key": -1}])
def test_impossible_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        nbpeft.FrodConfig(**fields)


def test_weights_without_directions_are_refused_and_left_alone() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    fields = {**FIELDS, "regularization_alpha": 0}
    with pytest.raises(ConfigError, match="no directions in the weights of self_attn_q_proj; raise") as caught:
        get_peft_model(model, nbpeft.FrodConfig(**fields))
    assert "\n" not in str(caught.value)
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)


@pytest.mark.parametrize(
    ("rate", "size", "count"), [(0.01, 4, 1), (0.5, 4, 8), (1.0, 4, 12), (0.01, 1, 0), (0.0, 4, 0)]
)
def test_a_square_has_an_entry_if_it_can_have_one(rate: float, size: int, count: int) -> None:
    assert nbpeft.FrodConfig(sparse_rate=rate).entry_count(size) == count
