"""Several values for one field: combinations and names."""

from __future__ import annotations

from typing import Any

import pytest

import nbpeft
from nbpeft.engine.config.adapter_names import check_name
from nbpeft.errors import ConfigError
from nbpeft.sweeps import MOST, combinations, names_of, number_text, remaining, stem_of, swept


def test_several_fields_give_every_combination() -> None:
    fields = {"learning_rate": nbpeft.sweep(1e-4, 3e-4), "max_steps": 3, "r": nbpeft.sweep(8, 64)}
    found = list(combinations(swept(fields)))
    assert found == [
        {"learning_rate": 1e-4, "r": 8},
        {"learning_rate": 1e-4, "r": 64},
        {"learning_rate": 3e-4, "r": 8},
        {"learning_rate": 3e-4, "r": 64},
    ]
    assert names_of("codes", found) == ["codes-lr1e-4-r8", "codes-lr1e-4-r64", "codes-lr3e-4-r8", "codes-lr3e-4-r64"]


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("learning_rate", 2.5e-5, "a-lr25e-6"),
        ("learning_rate", 1.0, "a-lr1"),
        ("lora_dropout", 0.05, "a-dropout5e-2"),
        ("lora_dropout", 0.0, "a-dropout0"),
        ("use_dora", True, "a-dora"),
        ("use_dora", False, "a-nodora"),
        ("lr_scheduler_type", "cosine", "a-cosine"),
        ("target_modules", ["q_proj", "v_proj"], "a-q_proj+v_proj"),
        ("target_modules", "model/layers.0.*", "a-model_layers_0_"),
        ("init_lora_weights", "pissa", "a-initpissa"),
        ("warmup_steps", 10, "a-warmup10"),
        ("adam_beta1", -0.5, "a-adambeta1-5e-1"),
    ],
)
def test_a_name_says_what_differs_and_may_name_an_adapter(field: str, value: Any, name: str) -> None:
    assert names_of("a", [{field: value}]) == [name]
    check_name(name)


def test_equal_names_are_numbered() -> None:
    assert names_of("a", [{"x": "b.c"}, {"x": "b_c"}]) == ["a-xb_c-1", "a-xb_c-2"]


def test_the_names_of_a_sweep_tell_what_they_have_in_common() -> None:
    assert stem_of(["codes-lr1e-4", "codes-lr3e-4"]) == "codes"
    assert stem_of(["a-b-r8", "a-b-r64"]) == "a-b"
    assert stem_of(["chat", "sql"]) == ""
    assert stem_of(["c-lr1e-4", "c-lr1e-3"]) == "c"  # a minus in an exponent separates nothing
    assert stem_of(["c-r8-lr1e-4", "c-r8-lr5e-4"]) == "c-r8"


@pytest.mark.parametrize("value", [1e-4, 3e-4, 0.05, 8, 64.0, 0.0, 1.5, 1e30, 1 / 3])
def test_a_number_is_read_back_from_its_text(value: float) -> None:
    assert float(number_text(value)) == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((), "at least two values"),
        ((1e-4,), "at least two values"),
        (([1e-4, 3e-4],), r"sweep\(0.0001, 0.0003\)"),
        ((8, 16, 8), "has 8 twice"),
    ],
)
def test_values_that_are_no_sweep_are_refused(values: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        nbpeft.sweep(*values)


def test_one_and_true_are_two_values() -> None:
    assert nbpeft.sweep(1, True).values == (1, True)


def test_too_many_combinations_are_refused() -> None:
    fields = {"r": nbpeft.sweep(*range(1, MOST + 2)), "use_dora": nbpeft.sweep(True, False)}
    words = rf"{2 * MOST + 2} combinations \({MOST + 1} r × 2 use_dora\); at most {MOST}"
    with pytest.raises(ConfigError, match=words):
        list(combinations(fields))


def test_adapters_are_halved_each_time_the_steps_have_doubled() -> None:
    assert [remaining(8, step, 80) for step in (9, 10, 19, 20, 39, 40, 80)] == [8, 4, 4, 2, 2, 1, 1]
    assert [remaining(5, step, 80) for step in (9, 10, 20, 40)] == [5, 3, 2, 1]
    assert [remaining(2, step, 7) for step in (3, 4)] == [2, 1]
