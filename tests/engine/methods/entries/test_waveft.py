"""WaveFT's filters: what makes them wavelets, and peft's where those are right; layers of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.wavelet import Wavelet
from torch import nn

import nbpeft
from nbpeft.engine.methods.entries.waveft import scaling_filter
from nbpeft.errors import ConfigError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import gpt2, llama, logits, randomize

NAMES = [
    *(f"db{order}" for order in range(1, 39)),
    *(f"sym{order}" for order in range(2, 21)),
    *(f"coif{order}" for order in range(1, 6)),
]
IN_PEFT = [*(f"db{n}" for n in range(1, 11)), *(f"sym{n}" for n in range(2, 11)), "coif1", "coif2", "coif3"]


def autocorrelation(taps: Any) -> Any:
    """At even shifts."""
    return np.correlate(taps, taps, "full")[len(taps) - 1 :: 2]


@pytest.mark.parametrize("name", NAMES)
def test_filters_are_orthogonal_and_have_their_vanishing_moments(name: str) -> None:
    taps = np.array(scaling_filter(name))
    order = int(name.lstrip("dbsymcoif"))
    assert len(taps) - 2 == WAVELET_REDUCTIONS[name][0] and taps.sum() == pytest.approx(2**0.5, abs=1e-12)
    shifted = autocorrelation(taps)
    assert shifted[0] == pytest.approx(1, abs=1e-12) and np.abs(shifted[1:]).max(initial=0) < 1e-12
    moments, places = (2 * order if name.startswith("coif") else order), np.linspace(-1, 1, len(taps))
    wavelet = taps * (-1.0) ** np.arange(len(taps))
    assert np.abs(np.polynomial.chebyshev.chebvander(places, moments - 1).T @ wavelet).max() < 1e-10
    if name.startswith("coif"):
        about = np.arange(len(taps)) / (2 * order) - 1
        assert np.abs(np.vander(about, 2 * order).T[:-1] @ taps).max() < 1e-9


@pytest.mark.parametrize("name", IN_PEFT)
def test_filters_are_those_of_peft(name: str) -> None:
    np.testing.assert_allclose(scaling_filter(name), Wavelet(name).rec_lo, atol=1e-10)


def test_symlets_that_peft_lacks_are_those_of_pywavelets() -> None:
    """By the tap after the middle: other zeros outside of the circle give wavelets as well. Its sym13 is mirrored."""
    taps = [0.0972, 0.3989, 0.6446, 0.3932, 0.1115, 0.3971, 0.6507, 0.7536, 0.1090, 0.4058]
    assert [scaling_filter(f"sym{order}")[order] for order in range(11, 21)] == pytest.approx(taps, abs=1e-4)


@pytest.mark.parametrize("name", ["coif4", "coif5"])
def test_what_peft_has_under_other_names_is_no_wavelet(name: str) -> None:
    assert abs(autocorrelation(np.array(Wavelet(name).rec_lo))[0] - 1) > 1e-3
    with pytest.raises(ValueError, match="Unknown wavelet"):
        Wavelet("db11")


@pytest.mark.parametrize("name", ["db1", "db2", "sym5", "coif1"])
@pytest.mark.parametrize("shape", [(7, 9), (8, 9), (5, 12)])
def test_layers_of_odd_sizes_change_as_in_peft(name: str, shape: tuple[int, int]) -> None:
    fields = {"n_frequency": 20, "wavelet_family": name, "target_modules": ["0"]}
    ours: Any = get_peft_model(nn.Sequential(nn.Linear(*shape)), nbpeft.WaveFTConfig(**fields))
    theirs: Any = peft.get_peft_model(nn.Sequential(nn.Linear(*shape)), peft.WaveFTConfig(**fields))
    randomize(ours)
    nbpeft_state = nbpeft.get_peft_model_state_dict(ours)
    peft.set_peft_model_state_dict(theirs, nbpeft_state)
    found, expected = (model.base_model.model[0].get_delta_weight("default") for model in (ours, theirs))
    assert_close(found, expected.detach())


def test_coefficients_are_shared_out_as_in_peft(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"n_frequency": 30, "proportional_parameters": True}
    fields["target_modules"] = ["q_proj", "k_proj", "down_proj"]
    model: Any = get_peft_model(llama(), nbpeft.WaveFTConfig(**fields)).eval()
    theirs = peft.get_peft_model(llama(), peft.WaveFTConfig(**fields))
    shapes, expected = (
        {name: tuple(tensor.shape) for name, tensor in states.items()}
        for states in (nbpeft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(theirs))
    )
    assert shapes == expected and len({*shapes.values()}) > 1
    model.add_adapter("small", nbpeft.WaveFTConfig(**{**fields, "target_modules": ["k_proj"]}))
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert again.peft_config["default"].proportional_parameters
    assert_close(logits(again), logits(model))
    oracle = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_close(logits(oracle), logits(model))
    model.set_adapter("small")
    assert [tuple(p.shape) for p in model.parameters() if p.requires_grad] == [(30,), (30,)]


def test_coefficients_that_are_shared_out_are_swapped(tmp_path: Path) -> None:
    """The counts at the layers follow from all layers, which a config read from a file does not know."""
    expected = {}
    for scaling in (2.0, 3.0):
        fields: dict[str, Any] = {"n_frequency": 30, "proportional_parameters": True, "scaling": scaling}
        model = get_peft_model(llama(), nbpeft.WaveFTConfig(**fields, target_modules=["q_proj", "v_proj"])).eval()
        randomize(model, seed=int(scaling))
        model.save_pretrained(tmp_path / f"x{scaling:g}")
        expected[f"x{scaling:g}"] = logits(model)
    nbpeft.hotswap_adapter(model, tmp_path / "x2", "default")
    assert_close(logits(model), expected["x2"])
    model.save_pretrained(tmp_path / "again")
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "again")), expected["x2"])
    room = sum(parameter.nbytes for parameter in model.manager.parameters("default"))
    pool = nbpeft.AdapterPool(llama(), room / 10**6, adapters={name: tmp_path / name for name in expected})
    for name in (*expected, *expected):
        pool.set_adapter(name)
        assert_close(logits(pool.model.eval()), expected[name])
    assert pool.statistics.swaps == 3
    pool.close()


def test_a_transposed_layer_merges_with_a_long_filter() -> None:
    config = nbpeft.WaveFTConfig(n_frequency=15, wavelet_family="db20", n_frequency_pattern={"h.0.attn.c_attn": 9})
    config.target_modules = {"c_attn"}
    model: Any = get_peft_model(gpt2(), config).eval()
    randomize(model)
    assert [tuple(p.shape) for p in model.parameters() if p.requires_grad] == [(9,), (15,)]
    before = logits(model)
    assert (before - logits(gpt2())).abs().max() > 1e-3
    assert_close(logits(model.merge_and_unload()), before)


@pytest.mark.parametrize("name", ["db39", "sym1", "coif6", "haar", "db0", "db1 "])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="one of db1 to db38, sym2 to sym20, coif1 to coif5, not"):
        nbpeft.WaveFTConfig(wavelet_family=name)


def test_what_peft_computes_otherwise_is_said() -> None:
    with pytest.warns(UserWarning, match="PEFT's coif4 is not"):
        get_peft_model(
            nn.Sequential(nn.Linear(8, 8)),
            nbpeft.WaveFTConfig(n_frequency=8, wavelet_family="coif4", target_modules=["0"]),
        )
