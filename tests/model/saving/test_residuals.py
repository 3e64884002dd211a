"""An adapter that starts in a part of the base, its files and its base: together they give the trained model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import corda as peft_corda
from torch import Tensor, nn

import nbpeft.model as nbpeft
from nbpeft.errors import CheckpointError
from nbpeft.model.from_data.data_inits import preprocess_corda
from tests.closeness import assert_approximates, assert_close, is_close
from tests.model.test_oracle import settings
from tests.test_matrix import CASES, make
from tests.tiny_models import llama, logits, tokens

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning:peft", "ignore:`corda_config` specified"
)

INITS = ("pissa", "pissa_niter_4", "olora", "corda")
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def base_of(init: str, library: Any = nbpeft) -> tuple[nn.Module, Any]:
    """A base, prepared for an init, and the config of an adapter for it."""
    base = llama()
    settings_class = nbpeft.CordaConfig if library is nbpeft else peft.tuners.lora.config.CordaConfig
    more = {"corda_config": settings_class(corda_method="kpm")} if init == "corda" else {}
    config = library.LoraConfig(**settings(init_lora_weights=init, **more))
    if init == "corda":
        prepare = preprocess_corda if library is nbpeft else peft_corda.preprocess_corda
        prepare(base, config, run_model=lambda: base(input_ids=tokens(1, 60)))
    return base, config


def started(init: str, library: Any = nbpeft) -> Any:
    torch.manual_seed(4)
    return library.get_peft_model(*base_of(init, library)).eval()


def train(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def same(first: Tensor, second: Tensor) -> bool:
    return is_close(first, second)


def by_hand(model: Any, folder: Path, init: Any = True) -> None:
    """Saves as PEFT's scripts do, for a base without what the adapter started from."""
    config = model.peft_config["default"]
    kept, config.init_lora_weights = config.init_lora_weights, init
    model.save_pretrained(folder)
    config.init_lora_weights = kept


@pytest.mark.parametrize("init", INITS)
def test_preprocessing_gives_the_residual_and_the_adapter_of_peft(init: str, tmp_path: Path) -> None:
    """PEFT's examples/pissa_finetuning/preprocess.py, examples/corda_finetuning/preprocess.py, GraphPKU/PiSSA."""
    found = {}
    for library in (nbpeft, peft):
        model, folder = started(init, library), tmp_path / library.__name__
        before = logits(model)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "init")
        residual = model.unload()
        residual.save_pretrained(folder)
        found[library] = residual.state_dict(), peft.load_peft_weights(str(folder / "init"), device="cpu"), before
        for reader in (nbpeft, peft):
            base = type(residual).from_pretrained(folder).eval()
            again = reader.PeftModel.from_pretrained(base, folder / "init", is_trainable=True)
            assert same(logits(again), before)
            trained = copy.deepcopy(again)
            train(trained)
            assert not same(logits(trained), before)
    (ours, own, _), (theirs, given, _) = found.values()
    assert ours.keys() == theirs.keys()
    if init != "pissa_niter_4":
        assert all(is_close(ours[key], theirs[key]) for key in theirs)
    assert own.keys() == given.keys() and {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in given.items()}
    if init in ("pissa", "olora"):  # the others draw, or have the signs of another decomposition
        assert all(is_close(own[key], given[key]) for key in given)


@pytest.mark.drawn(4)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("pickled", [False, True])
def test_a_backup_loaded_over_its_adapter_does_not_move_the_model(init: str, pickled: bool, tmp_path: Path) -> None:
    """LLaMA-Factory's PissaConvertCallback."""
    logs = []
    for library in (nbpeft, peft):
        model, folder = started(init, library), tmp_path / library.__name__
        by_hand(model, folder / "init")
        train(model)
        config = model.peft_config["default"]
        config.init_lora_weights = True
        model.save_pretrained(folder / "backup", safe_serialization=not pickled)
        config.init_lora_weights = init
        before = logits(model)
        if init != "corda":
            model.save_pretrained(folder / "lora", path_initial_model_for_weight_conversion=str(folder / "init"))
        model.load_adapter(folder / "backup", "default", is_trainable=True)
        model.set_adapter("default")
        model.peft_config["default"].init_lora_weights = init
        assert same(logits(model.eval()), before)
        logs.append(logits(model))
        if init != "corda":
            assert same(logits(library.PeftModel.from_pretrained(llama(), folder / "lora").eval()), before)
        rank = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.shape[0]
        assert rank == config.r
        residual = model.unload()
        again = library.PeftModel.from_pretrained(residual, folder / "backup").eval()
        assert same(logits(again), before)
    if init in ("pissa", "olora"):
        assert_close(logs[0], logs[1])


@pytest.mark.parametrize("init", INITS)
def test_files_and_bases_that_were_saved_together_give_the_trained_model(init: str, tmp_path: Path) -> None:
    for by_hand_too in (False, True):
        model, folder = started(init), tmp_path / str(by_hand_too)
        train(model)
        expected = logits(model)
        model.save_pretrained(folder / "adapter")
        if by_hand_too:
            by_hand(model, folder / "adapter")
        assert same(logits(model), expected)
        base = model.unload()
        base.save_pretrained(folder)
        assert same(logits(llama()), logits(base)) is not by_hand_too
        bases = [type(base).from_pretrained(folder).eval()]
        if not by_hand_too or init != "corda":
            bases.append(llama())  # as it was: the file says what is missing in it
        for one in bases:
            assert same(logits(nbpeft.PeftModel.from_pretrained(one, folder / "adapter").eval()), expected)


def test_a_file_whose_base_is_not_there_is_told_of(tmp_path: Path) -> None:
    model = started("corda")
    train(model)
    by_hand(model, tmp_path)
    with pytest.warns(UserWarning, match="a base model changed by its init"):
        nbpeft.PeftModel.from_pretrained(llama(), tmp_path)


def test_a_plain_lora_in_its_place_is_a_plain_lora(tmp_path: Path) -> None:
    plain = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(**settings(init_lora_weights=False))).eval()
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings(init_lora_weights=False))).eval()
    for number, other in enumerate((plain, theirs)):
        other.save_pretrained(tmp_path / str(number))
        model = started("pissa")
        model.load_adapter(tmp_path / str(number), "default")
        assert same(logits(model), logits(other))


def test_peft_backups_are_known_by_their_numbers(tmp_path: Path) -> None:
    theirs = started("pissa", peft)
    train(theirs)
    by_hand(theirs, tmp_path)
    model = started("pissa")
    model.load_adapter(tmp_path, "default")
    assert same(logits(model.eval()), logits(theirs))


@pytest.mark.parametrize("init", ["pissa", "corda"])
def test_copies_and_what_is_put_back_keep_their_start(init: str) -> None:
    from nbpeft.engine.runtime.snapshots import restore, snapshot

    model = started(init)
    train(model)
    expected, manager = logits(model), model.manager
    manager.configs["default"].init_lora_weights = True
    manager.copy("default", "twin")
    model.set_adapter("twin")
    assert same(logits(model), expected)
    kept = snapshot(manager, "twin")
    manager.remove("twin")
    restore(manager, kept)
    model.set_adapter("twin")
    assert same(logits(model), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_start_is_read_where_the_base_is_the_residual(init: str, tmp_path: Path) -> None:
    """PEFT's examples/pissa_finetuning/pissa_finetuning.py with --convert_pissa_to_lora."""
    found = []
    for library in (nbpeft, peft):
        model, folder = started(init, library), tmp_path / library.__name__
        by_hand(model, folder / "init")
        residual = model.unload()
        model = library.PeftModel.from_pretrained(residual, folder / "init", is_trainable=True).eval()
        train(model)
        expected = logits(model)
        model.save_pretrained(folder / "lora", path_initial_model_for_weight_conversion=str(folder / "init"))
        assert same(logits(library.PeftModel.from_pretrained(llama(), folder / "lora").eval()), expected)
        found.append(peft.load_peft_weights(str(folder / "lora"), device="cpu"))
    assert all(is_close(found[0][key], found[1][key]) for key in found[1])


def test_a_start_of_another_adapter_is_refused(tmp_path: Path) -> None:
    model = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(**settings(init_lora_weights=False)))
    other = nbpeft.get_peft_model(llama(), nbpeft.LoraConfig(**settings(r=2)))
    other.save_pretrained(tmp_path / "other")
    started("pissa").save_pretrained(tmp_path / "started")
    for name, reason in (("other", "has another rank"), ("started", "must be True")):
        with pytest.raises(CheckpointError, match=f"not the initial adapter of 'default'.*{reason}"):
            model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_unload_leaves_the_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = started("pissa")
    by_hand(model, tmp_path)
    expected, base = logits(model), model.get_base_model()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    monkeypatch.setattr("nbpeft.engine.runtime.unloading.replace_modules", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.unload()
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in before.items())
    assert torch.equal(logits(model), expected)


OTHERS: dict[str, dict[str, Any]] = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": nbpeft.LoftQConfig()},
    "kasa": {"kasa_config": nbpeft.KasaConfig()},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa-rslora": {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "olora-head": {"init_lora_weights": "olora", "target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.drawn(9)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("hand", [False, True])
@pytest.mark.filterwarnings("ignore:.*init_lora_weights", "ignore:lora with eva", "ignore:the embedding and the output")
def test_every_init_is_saved_with_its_base(name: str, hand: bool, tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=name == "olora-head")
    model = nbpeft.get_peft_model(base, nbpeft.LoraConfig(**settings(**OTHERS[name]))).eval()
    train(model)
    expected = logits(model)
    if hand:
        by_hand(model, tmp_path / "adapter")
    else:
        model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path).eval()
    assert same(logits(nbpeft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()), expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_the_residual_of_a_quantized_base_is_quantized(kind: str, tmp_path: Path) -> None:
    case = CASES[kind]
    base = make(case)
    plain = case.batch()
    model = nbpeft.get_peft_model(base, nbpeft.LoraConfig(r=4, target_modules=["target"], init_lora_weights="olora"))
    before = model.eval()(plain)
    by_hand(model, tmp_path)
    again = nbpeft.PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    assert_approximates(again(plain), before, case.rounded)
    with again.disable_adapter():
        assert (again(plain) - before).abs().max() > case.rounded * before.abs().max()
