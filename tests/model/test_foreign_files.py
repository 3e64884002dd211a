"""Adapter folders from anywhere: tensors that are none, tensors of the base, bases that are not there."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from nbpeft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from nbpeft.errors import AdapterError, CheckpointError, ConfigError, CorruptCheckpointError
from nbpeft.model import AdapterPool, hotswap_adapter, load_peft_weights, merge_to_folder, set_peft_model_state_dict
from tests.closeness import assert_close
from tests.tiny_models import VOCABULARY, adapted, llama, logits, same_state, state

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EMBEDDING = "base_model.model.model.embed_tokens.weight"
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

Change = Callable[[dict[str, Tensor]], None]


def saved(folder: Path, change: Change | None = None, legacy: bool = False, **fields: Any) -> Path:
    """A saved adapter whose tensors and config fields were changed."""
    adapted().save_pretrained(str(folder))
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    if change is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(tensors)
    (folder / WEIGHTS).unlink()
    if legacy:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        safetensors.torch.save_file(tensors, folder / WEIGHTS)
    told = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**told, **fields}))
    return folder


def with_embedding(value: float) -> Change:
    return lambda tensors: tensors.update({EMBEDDING: torch.full((VOCABULARY, 32), value)})


def put(key: str, make: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({key: make(tensors[key])})


# Tensors of the base


def test_tensors_of_the_base_are_told_and_come_back(tmp_path: Path) -> None:
    base = llama()
    before = state(base)
    with pytest.warns(UserWarning, match="adapter 'default' has its own 'model.embed_tokens.weight': the base"):
        model = PeftModel.from_pretrained(base, saved(tmp_path / "a", with_embedding(0.5)))
    assert bool((base.get_input_embeddings().weight == 0.5).all())
    assert not base.get_input_embeddings().weight.requires_grad
    assert same_state(state(model.unload()), before)


def test_equal_tensors_of_the_base_are_nothing_to_tell(tmp_path: Path) -> None:
    own = llama().get_input_embeddings().weight.detach().clone()
    folder = saved(tmp_path / "a", lambda tensors: tensors.update({EMBEDDING: own}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_two_that_bring_their_own_can_go_in_any_order(tmp_path: Path, order: tuple[str, str]) -> None:
    base = llama()
    before = state(base)
    with pytest.warns(UserWarning, match="has its own"):
        model = PeftModel.from_pretrained(base, saved(tmp_path / "a", with_embedding(0.5)), adapter_name="x")
        model.load_adapter(saved(tmp_path / "b", with_embedding(0.25)), "b")
    model.manager.rename("x", "a")
    model.add_adapter("last", model.peft_config["a"])
    model.delete_adapter(order[0])
    assert float(base.get_input_embeddings().weight.mean()) == (0.25 if order[0] == "a" else 0.5)
    model.delete_adapter(order[1])
    assert same_state(state(model.unload()), before)


def test_loading_again_in_its_place_keeps_the_first_values(tmp_path: Path) -> None:
    base = llama()
    before = state(base)
    folder = saved(tmp_path / "a", with_embedding(0.5))
    with pytest.warns(UserWarning, match="has its own"):
        model = PeftModel.from_pretrained(base, folder)
        model.load_adapter(folder, "default")
    assert bool((base.get_input_embeddings().weight == 0.5).all())
    assert same_state(state(model.unload()), before)


def test_merged_for_good_they_stay(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has its own"):
        model = PeftModel.from_pretrained(llama(), saved(tmp_path / "a", with_embedding(0.5)))
    assert bool((model.merge_and_unload().get_input_embeddings().weight == 0.5).all())


def test_nothing_of_the_base_changes_if_loading_fails(tmp_path: Path) -> None:
    base = llama()
    before = state(base)

    def change(tensors: dict[str, Tensor]) -> None:
        with_embedding(0.5)(tensors)
        tensors[Q] = torch.zeros(1, 1)

    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(base, saved(tmp_path / "a", change))
    assert same_state(state(base), before)


# Tensors that are none of an adapter's


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tensor: tensor.to(torch.int64), "is of int64"),
        (lambda tensor: tensor > 0, "is of bool"),
        (lambda tensor: tensor.to(torch.complex64), "is of complex64"),
        (lambda tensor: tensor.to_sparse(), "is sparse"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "is of qint8"),
        (lambda tensor: tensor.to("meta"), "is without data"),
    ],
)
def test_tensors_that_are_not_plain_are_refused_by_name(
    tmp_path: Path, make: Callable[[Tensor], Tensor], message: str
) -> None:
    folder = saved(tmp_path / "a", put(Q, make), legacy=True)
    model = adapted()
    before = state(model)
    llama().save_pretrained(tmp_path / "base")
    pool = AdapterPool(model, 10)
    pool.register("p", folder)
    ways: tuple[Callable[[], object], ...] = (
        lambda: model.load_adapter(folder, "new"),
        lambda: hotswap_adapter(model, folder, "default"),
        lambda: pool.load("p"),
        lambda: merge_to_folder(tmp_path / "base", folder, tmp_path / "out"),
        lambda: set_peft_model_state_dict(model, load_peft_weights(folder, "cpu")),
    )
    for way in ways:
        with pytest.raises(CheckpointError, match=rf"q_proj\.lora_A\.weight' {message}"):
            way()
    assert same_state(state(model), before) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_once_with_its_layer(tmp_path: Path, broken: float) -> None:
    folder = saved(tmp_path / "a", put(Q, lambda tensor: tensor.index_fill(0, torch.tensor([1]), broken)))
    llama().save_pretrained(tmp_path / "base")
    model = adapted()
    pool = AdapterPool(model, 10)
    pool.register("p", folder)
    ways: tuple[Callable[[], object], ...] = (
        lambda: PeftModel.from_pretrained(llama(), folder),
        lambda: hotswap_adapter(model, folder, "default"),
        lambda: pool.load("p"),
        lambda: merge_to_folder(tmp_path / "base", folder, tmp_path / "out"),
    )
    for way in ways:
        with pytest.warns(UserWarning) as caught:
            way()
        told = [str(one.message) for one in caught if "not finite" in str(one.message)]
        assert (
            len(told) == 1
            and "1 tensor of the adapter is not finite" in told[0]
            and "layers.0.self_attn.q_proj" in told[0]
        )


def test_large_finite_numbers_are_nothing_to_tell(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", put(Q, lambda tensor: torch.full_like(tensor, 3e38)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(llama(), folder)


def test_a_file_may_hold_half_and_double_numbers(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", put(Q, lambda tensor: tensor.double()))
    llama().save_pretrained(tmp_path / "base")
    merge_to_folder(tmp_path / "base", folder, tmp_path / "out")
    merged = type(llama()).from_pretrained(tmp_path / "out").eval()
    expected = PeftModel.from_pretrained(llama(), folder).eval()
    assert_close(logits(merged), logits(expected))


def test_counters_of_whole_modules_stay_whole_numbers(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)

    fields = LoraConfig(target_modules=["first"], modules_to_save=["norm"])
    get_peft_model(Net(), fields).save_pretrained(str(tmp_path / "a"))
    PeftModel.from_pretrained(Net(), tmp_path / "a")
    tensors = safetensors.torch.load_file(tmp_path / "a" / WEIGHTS)
    key = next(key for key in tensors if key.endswith("num_batches_tracked"))
    safetensors.torch.save_file({**tensors, key: tensors[key].float()}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(CheckpointError, match="num_batches_tracked' is of float32"):
        PeftModel.from_pretrained(Net(), tmp_path / "a")


def test_a_rank_that_the_file_has_no_tensors_for_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", target_modules=["q_proj", "v_proj", "k_proj"], rank_pattern={"k_proj": 2**24})
    with pytest.raises(ConfigError, match=r"would have 1,610,613,632 values, more than ten times"):
        PeftModel.from_pretrained(llama(), folder)


# Files that cannot be read


def test_old_files_with_other_things_than_named_tensors(tmp_path: Path) -> None:
    for number, content in enumerate(({1: torch.zeros(1)}, {"a": 3}, [torch.zeros(1)], None)):
        folder = saved(tmp_path / str(number))
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "adapter_model.bin")
        with pytest.raises(CorruptCheckpointError, match="does not contain a dictionary of tensors"):
            PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02.", b"\x80\x02K\x01s.", b"cos\nsystem\n.", b"\x80\x04\x95" + b"\xff" * 9]
)
def test_broken_pickles_are_one_error(tmp_path: Path, content: bytes) -> None:
    folder = saved(tmp_path / "a", legacy=True)
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        PeftModel.from_pretrained(llama(), folder)


def test_an_archive_that_would_grow_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", legacy=True)
    path = folder / "adapter_model.bin"
    with zipfile.ZipFile(path) as plain:
        held = {member: plain.read(member) for member in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for member, data in held.items():
            packed.writestr(member, data)
    with pytest.raises(CorruptCheckpointError, match="archive is compressed"):
        PeftModel.from_pretrained(llama(), folder)


def test_a_dtype_that_nobody_knows(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data.replace(b'"F32"', b'"F4" ', 1))
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        PeftModel.from_pretrained(llama(), folder)


def test_places_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("x" * 300, "a/" + "x" * 300, "half\ud800", "nul\0"):
        with pytest.raises(CheckpointError) as caught:
            PeftModel.from_pretrained(llama(), place)
        assert len(str(caught.value)) < 400

    folder, looked = saved(tmp_path / "a"), os.stat

    def forbidden(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("adapter_config.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return looked(path, **options)

    monkeypatch.setattr(os, "stat", forbidden)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        PeftModel.from_pretrained(llama(), folder)


# The base that an adapter names


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"base_model_name_or_path": "/nowhere"}, OSError, "the base model '/nowhere', named by .*, cannot be loaded"),
        ({"base_model_name_or_path": 3}, ConfigError, "base_model_name_or_path must be a text, not 3"),
        ({"auto_mapping": 3}, ConfigError, "auto_mapping must be a dictionary, not 3"),
        (
            {"auto_mapping": {"parent_library": "transformers", "base_model_class": "Nothing"}},
            ConfigError,
            "base class 'Nothing' is not in 'transformers'",
        ),
        (
            {"auto_mapping": {"parent_library": "transformers.nothing", "base_model_class": "x"}},
            ConfigError,
            "is not in 'transformers.nothing'",
        ),
        ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, ConfigError, "import_allowlist"),
    ],
)
def test_a_base_that_is_not_there(tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str) -> None:
    folder = saved(tmp_path / "a", **{"base_model_name_or_path": "x", "task_type": None, **fields})
    auto = AutoPeftModelForCausalLM if "auto_mapping" not in fields else AutoPeftModel
    with pytest.raises(error, match=message) as caught:
        auto.from_pretrained(folder)
    assert isinstance(caught.value, CheckpointError | ConfigError)


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    folder = saved(tmp_path / "a", base_model_name_or_path=str(tmp_path / "base"))
    (folder / "tokenizer_config.json").write_text("[" * 2000)
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read"):
        AutoPeftModelForCausalLM.from_pretrained(folder)


# Errors as PEFT's callers expect them


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError])
def test_a_config_without_a_method_is_caught_as_with_peft(tmp_path: Path, error: type[Exception]) -> None:
    (tmp_path / CONFIG).write_text('{"r": 8}')
    with pytest.raises(error, match="has no 'peft_type'"):
        PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("error", [ValueError, NotImplementedError])
def test_an_impossible_bias_is_caught_as_with_peft(error: type[Exception]) -> None:
    with pytest.raises(error, match="bias must be one of"):
        adapted(bias="invalid")


# Names


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("training", "every torch module has an attribute of that name"),
        ("base", "means the base model"),
        ("__base__", "means the base model"),
        ("half\ud800", "a surrogate character"),
        ("x" * 10_000 + ".", "without dots"),
    ],
)
def test_names_that_mean_something_else_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    model = adapted()
    for way in (
        lambda: model.add_adapter(name, model.peft_config["default"]),
        lambda: model.load_adapter(saved(tmp_path / "a"), name),
        lambda: model.manager.rename("default", name),
        lambda: AdapterPool(adapted(), 10).register(name, tmp_path),
    ):
        with pytest.raises(AdapterError, match=reason) as caught:
            way()
        assert len(str(caught.value)) < 200
    assert list(model.peft_config) == ["default"]
    model.train(), model.eval()
