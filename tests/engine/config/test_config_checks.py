"""What a config's class declares about the values of its fields."""

from __future__ import annotations

from typing import Any

import pytest

import nbpeft
from nbpeft.errors import ConfigError


def test_what_pefts_annotation_allows_is_read_from_files() -> None:
    fields = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "prompt_tuning_init_task": None}
    assert nbpeft.MultitaskPromptTuningConfig(**fields).prompt_tuning_init_task is None


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("MultitaskPromptTuningConfig", "num_tasks", None),
        ("CPTConfig", "opt_projection_epsilon", None),
        ("HiraConfig", "init_weights", None),
        pytest.param("DeloraConfig", "delora_lambda", 10**400, id="too large for a float"),
        ("DeftConfig", "alpha", float("nan")),
    ],
)
def test_numbers_that_are_needed_are_finite_and_there(kind: str, field: str, value: Any) -> None:
    needed: dict[str, Any] = {"cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1]}
    more = {"task_type": "CAUSAL_LM", **needed} if kind == "CPTConfig" else {}
    with pytest.raises(ConfigError, match=field):
        getattr(nbpeft, kind)(**more, **{field: value})
