"""Modules under the names that they had in 0.2."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from nbpeft._util import former_modules
from tests.closeness import assert_close

FORMER = Path(__file__).parents[1] / "former"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("file", ["models-0.2.pt", "trainable-tokens-0.2.pt"])
def test_pickled_models_of_then_answer_as_then(file: str) -> None:
    """Adapted ``nn.Sequential`` models with the inputs and outputs they had, pickled by nbpeft 0.2.0."""
    for name, (model, inputs, outputs) in torch.load(FORMER / file, weights_only=False).items():
        assert_close(model(inputs), outputs, message=name)


def test_every_former_name_leads_to_a_module() -> None:
    moved = [(room.rpartition(".")[0], name) for room, names in former_modules._ROOMS.items() for name in names.split()]
    places = [".".join(filter(None, place)) for place in moved] + list(former_modules._ELSEWHERE)
    assert len(places) == len(set(places))
    for place in places:
        assert importlib.util.find_spec(str(former_modules.new_name(f"nbpeft.{place}"))) is not None, place


def test_a_former_name_says_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nbpeft.engine.layer", raising=False)
    with pytest.warns(DeprecationWarning, match=r"nbpeft\.engine\.layer is nbpeft\.engine\.wrappers\.layer now"):
        former = importlib.import_module("nbpeft.engine.layer")
    assert former.AdaptedLayer is importlib.import_module("nbpeft.engine.wrappers.layer").AdaptedLayer


def test_other_names_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"nbpeft\.engine\.layers"):
        importlib.import_module("nbpeft.engine.layers")
