"""A method whose rank can be padded and whose values are checked, both by declaration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.session import Session
from tests.closeness import assert_close
from tests.tiny_models import llama, logits, randomize

MOST_LINES = 60


@pytest.fixture(autouse=True)
def kronecker(registered: Callable[[str], ModuleType]) -> Any:
    """The module with the method, which is registered for one test."""
    return registered("kronecker")


def adapted(kronecker: Any, seed: int = 0, **fields: Any) -> Any:
    config = kronecker.KronSumConfig(**{"r": 2, "size": 4, "target_modules": ["q_proj", "down_proj"], **fields})
    model = nbpeft.get_peft_model(llama(), config).eval()
    randomize(model, seed=seed)
    return model


def test_it_is_short_and_passes_the_checks_of_methods(kronecker: Any) -> None:
    assert len(Path(kronecker.__file__).read_text("utf-8").splitlines()) <= MOST_LINES
    report = nbpeft.check_method(kronecker.KronSumConfig(r=2, size=4, target_modules=["q_proj", "down_proj"]))
    report.raise_for_failures()


def test_adapters_of_another_rank_fit_into_a_padded_slot_and_files_have_no_padding(
    kronecker: Any, tmp_path: Path
) -> None:
    adapted(kronecker, seed=1, r=3, alpha=4.0).save_pretrained(str(tmp_path / "three"))
    adapted(kronecker, seed=2, r=1).save_pretrained(str(tmp_path / "one"))
    model, grown = adapted(kronecker), adapted(kronecker)
    nbpeft.hotswap_adapter(grown, str(tmp_path / "three"), "default")
    before = logits(model)
    nbpeft.prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert_close(logits(model), before)
    assert {parameter.shape[0] for parameter in model.manager.parameters("default")} == {4}
    for name in ("three", "one"):
        nbpeft.hotswap_adapter(model, str(tmp_path / name), "default")
        model.save_pretrained(str(tmp_path / "again"))
        expected, again = (
            nbpeft.PeftModel.from_pretrained(llama(), str(tmp_path / folder)).eval() for folder in (name, "again")
        )
        assert_close(logits(model), logits(expected))
        assert torch.equal(logits(again), logits(expected))
        assert name == "one" or torch.equal(logits(grown), logits(expected))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be a positive whole number, not 0"),
        ({"size": -1}, "size must be a positive whole number, not -1"),
        ({"r": None}, "r must have a value, such as 4, not None"),
        ({"dropout": 1.5}, "dropout must be between 0 and 1, not 1.5"),
        ({"alpha": float("nan")}, "alpha must be a finite number, not nan"),
    ],
)
def test_values_that_the_config_does_not_declare_as_valid_are_refused(
    kronecker: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        kronecker.KronSumConfig(**fields)


def test_a_field_called_size_is_not_taken_for_the_rank() -> None:
    planned = Session().plan(llama(), {"peft_type": "kronsum", "r": 2, "size": 4}, batch_size=1, max_length=8)
    assert planned.settings.rank is None and "rank" not in str(planned.settings)
