"""Lily: which layers share factors, in every place where an adapter is made, moved, loaded or trained."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import nbpeft
from nbpeft.engine.runtime.snapshots import keeps_weights, restore, snapshot
from nbpeft.errors import CheckpointError, ConfigError
from nbpeft.memory import forecast
from nbpeft.model import AdapterPool, PeftModel, get_peft_model
from tests.closeness import assert_close, differ
from tests.tiny_models import llama, logits, randomize, tokens

FIELDS: dict[str, Any] = {"r": 3, "stride_A": 3, "num_B": 3, "task_type": "CAUSAL_LM"}
TARGETS: dict[str, Any] = {
    "names": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "sizes": {"target_modules": ["self_attn.k_proj", "gate_proj", "mlp.down_proj"]},
    "pattern": {"target_modules": r".*\.(q|o|k)_proj"},
    "linear": {"target_modules": "all-linear"},
    "some": {"target_modules": "all-linear", "exclude_modules": ["layers.1.self_attn.q_proj", "gate_proj"]},
    "layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2, 3]},
    "paths": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]},
}


def base() -> Any:
    return llama(num_hidden_layers=4)


def made(seed: int = 0, **fields: Any) -> PeftModel:
    model = get_peft_model(base(), nbpeft.LilyConfig(**{**FIELDS, **TARGETS["names"], **fields}))
    randomize(model, seed=seed, scale=0.5)
    return model.eval()


def groups(model: Any) -> list[list[str]]:
    """Which tensors of the adapter are one, by the name of the first."""
    found: dict[int, list[str]] = {}
    for path, layer in model.manager.layers.items():
        for key, parameter in layer.adapter("default")._parameters.items():
            found.setdefault(id(parameter), []).append(f"{path}.{key}")
    return sorted(found.values())


def groups_of_peft(model: Any) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for name, parameter in model.base_model.model.named_parameters(remove_duplicate=False):
        if ".lily_" in name:
            found.setdefault(id(parameter), []).append(name.removesuffix(".default.weight"))
    return sorted(found.values())


@pytest.mark.parametrize("fields", TARGETS.values(), ids=TARGETS)
def test_the_layers_that_share_are_those_of_peft(fields: dict[str, Any], tmp_path: Path) -> None:
    ours = get_peft_model(base(), nbpeft.LilyConfig(**FIELDS, **fields))
    theirs = peft.get_peft_model(base(), peft.LilyConfig(**FIELDS, **fields))
    assert groups(ours) == groups_of_peft(theirs)
    assert any(len(group) > 1 for group in groups(ours)) == (fields != TARGETS["paths"])
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.manager.plan(nbpeft.LilyConfig(**FIELDS, **fields)).parameter_count == counted(ours)
    for model, folder in ((ours, tmp_path / "ours"), (theirs, tmp_path / "theirs")):
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(base(), folder, is_trainable=True)
        assert groups(again) == groups(ours)
    other = peft.PeftModel.from_pretrained(base(), tmp_path / "ours", is_trainable=True)
    assert groups_of_peft(other) == groups(ours)
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs")]
    assert {key: value.shape for key, value in files[0].items()} == {key: one.shape for key, one in files[1].items()}


def counted(model: Any) -> int:
    return int(model.get_nb_trainable_parameters()[0])


def test_a_forecast_counts_what_is_shared_once() -> None:
    config = nbpeft.LilyConfig(**FIELDS, **TARGETS["names"])
    parts = {part.name: part for part in forecast(base(), config, batch_size=1, max_length=8).parts}
    assert parts["adapters"].byte_count == 4 * counted(get_peft_model(base(), config))


def test_of_several_names_the_longest_counts() -> None:
    model = made(target_modules=["q_proj", "layers.1.self_attn.q_proj", "k_proj"], r=2)
    shared = [group for group in groups(model) if group[0].endswith("lily_B")]
    assert [[path.split(".")[2] for path in group] for group in shared] == [
        ["0", "1", "2", "3"],
        ["0", "2", "3"],
        ["1"],
    ]


def reloaded(model: PeftModel, folder: Path, **options: Any) -> PeftModel:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(base(), folder, **options)


def renamed(model: PeftModel, folder: Path) -> PeftModel:
    kept = snapshot(model.manager, "default")
    model.add_adapter("other", nbpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.delete_adapter("default")
    model.manager.add("default", kept.config)
    restore(model.manager, kept)
    model.delete_adapter("other")
    model.set_adapter("default")
    return model


def from_state(model: PeftModel, folder: Path) -> PeftModel:
    other = made(seed=7)
    nbpeft.set_peft_model_state_dict(other, nbpeft.get_peft_model_state_dict(model))
    return other


WAYS: dict[str, Callable[[PeftModel, Path], Any]] = {
    "file": lambda model, folder: reloaded(model, folder, is_trainable=True),
    "file-without-memory": lambda model, folder: reloaded(model, folder, is_trainable=True, low_cpu_mem_usage=True),
    "copy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "dtype": lambda model, folder: model.double().float(),
    "kept": renamed,
    "state": from_state,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_shared_stays_shared(way: str, tmp_path: Path) -> None:
    model = made()
    expected, shared = logits(model), groups(model)
    twin = WAYS[way](model, tmp_path).eval()
    assert_close(logits(twin), expected)
    assert groups(twin) == shared
    loss = twin.train()(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    trained = [one for one in twin.manager.parameters("default") if one.grad is not None and one.grad.abs().sum() > 0]
    assert len(trained) == len(shared) == 12 + 2 * 3 + 3  # routers, A of three layers and of the last, experts


def test_another_grouping_does_not_keep_the_weights() -> None:
    model = made()
    fields: dict[str, Any] = {**FIELDS, "target_modules": r".*\.(q|v|down)_proj"}
    plan = model.manager.plan(nbpeft.LilyConfig(**fields))
    assert keeps_weights(model.manager, "default", plan)  # k and v are of one size, but not of that of q
    three = made(target_modules=["k_proj", "v_proj"])
    plan = three.manager.plan(nbpeft.LilyConfig(**{**fields, "target_modules": r".*\.(k|v)_proj"}))
    assert not keeps_weights(three.manager, "default", plan)


def test_a_pool_serves_groupings_of_the_same_shapes(tmp_path: Path) -> None:
    expected = {}
    for name, stride in (("one", 1), ("two", 2)):
        model = made(stride_A=stride)
        model.save_pretrained(tmp_path / name)
        expected[name] = logits(model)
    room = sum(tensor.nbytes for tensor in nbpeft.get_peft_model_state_dict(model).values())
    pool = AdapterPool(base(), room / 1e6, adapters={name: tmp_path / name for name in expected})
    for name in ("one", "two", "one"):
        pool.set_adapter(name)
        assert_close(logits(pool.model.eval()), expected[name])
    assert pool.statistics.evictions >= 1


SECOND = "model.layers.1.self_attn.q_proj"


def test_copies_that_differ_do_not_go_into_one_tensor(tmp_path: Path) -> None:
    """PEFT takes the last copy in the file for all."""
    model = made()
    model.save_pretrained(tmp_path)
    before, tensors = logits(model), load_file(tmp_path / "adapter_model.safetensors")
    tensors[f"base_model.model.{SECOND}.lily_B.weight"] += 1
    words = rf"different lily_B for {SECOND} and model\.layers\.0\.self_attn\.q_proj, which share it"
    with pytest.raises(CheckpointError, match=words):
        nbpeft.set_peft_model_state_dict(model, tensors)
    assert torch.equal(logits(model), before)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        PeftModel.from_pretrained(base(), tmp_path)
    with pytest.raises(CheckpointError, match=words):
        AdapterPool(base(), 10, adapters={"one": tmp_path}).set_adapter("one")


@pytest.mark.parametrize("lacks", ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"])
def test_one_copy_of_what_is_shared_is_enough(lacks: str, tmp_path: Path) -> None:
    model = made(stride_A=2)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if lacks not in key or "router" in key}
    assert len(kept) == len(tensors) - 2
    save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="lily_"):
        loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_what_is_shared_is_kept_once() -> None:
    model = made()
    assert snapshot(model.manager, "default").byte_count == sum(
        one.nbytes for one in model.manager.parameters("default")
    )


def test_the_start_and_the_scaling_are_those_of_the_config() -> None:
    model = get_peft_model(base(), nbpeft.LilyConfig(**FIELDS, **TARGETS["names"])).eval()
    assert torch.equal(logits(model), logits(base()))
    drawn = get_peft_model(base(), nbpeft.LilyConfig(**FIELDS, **TARGETS["names"], init_weights=False)).eval()
    assert differ(logits(drawn), logits(base()))
    once, twice = made(), made(scaling=2.0)
    once.manager.set_scale("default", 2.0)
    assert_close(logits(once), logits(twice))


def test_a_row_depends_on_those_beside_it_as_in_peft(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    ids = tokens(4, 6)
    with torch.no_grad():
        together, alone = model(input_ids=ids).logits[:1], model(input_ids=ids[:1]).logits
        assert (together - alone).abs().max() > 1e-4
        assert_close(together, theirs(input_ids=ids).logits[:1])
        assert_close(alone, theirs(input_ids=ids[:1]).logits)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"num_B": 1}, "num_B must be at least 2"), ({"stride_A": 0}, "stride_A"), ({"r": 0}, "r must be a positive")],
)
def test_what_peft_refuses_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        nbpeft.LilyConfig(**fields)
    with pytest.raises(ValueError, match=next(iter(fields))):
        peft.get_peft_model(base(), peft.LilyConfig(**{"target_modules": ["q_proj"], **fields}))


def test_the_rank_is_read_in_the_shapes_of_a_file() -> None:
    model = made(r=2)
    adapter = next(iter(model.manager.layers.values())).adapter("default")
    shapes = {name: parameter.shape for name, parameter in adapter.named_parameters()}
    assert adapter.size_of(shapes) == adapter.delta_rank == 2
