"""Several lines with magics in one cell: the result of each is shown."""

from __future__ import annotations

import pytest

from tests.magics.notebook import Notebook

_STATUS = "no adapted model yet"


@pytest.mark.parametrize(
    ("cell", "count"),
    [
        ("%lora\n%lora\n%lora", 2),
        ("%lora\nx = 2", 1),
        ("for _ in range(3):\n    %lora", 3),
        ("if True:\n    %lora\nelse:\n    pass", 1),
        ("def f():\n    %lora\nf()\nf()", 2),
        ("%%time\n%lora\n%lora", 1),
        ("%lora ;\n%lora", 0),
        ("x = %lora\n%lora", 0),
    ],
)
def test_a_result_that_ipython_would_drop_is_displayed(bare: Notebook, cell: str, count: int) -> None:
    outcome = bare.run(cell)
    assert outcome.error is None
    assert outcome.shown == (_STATUS,) * count


def test_the_cell_that_loads_the_extension_shows_each_result(bare: Notebook) -> None:
    bare.do("%unload_ext nbpeft")
    outcome = bare.run("%load_ext nbpeft\n%lora\nfor _ in range(2):\n    %lora\nx = %lora\n%lora")
    assert outcome.error is None
    assert outcome.shown == (_STATUS,) * 3
    assert str(outcome.value) == _STATUS
    assert bare.run("%reload_ext nbpeft\n%lora\n%lora").shown == (_STATUS,)  # not twice
    assert bare.run("%lora\n%lora").shown == (_STATUS,)


def test_the_last_result_is_the_value_of_the_cell(bare: Notebook) -> None:
    outcome = bare.run("%lora help use\n%lora")
    assert str(outcome.value) == _STATUS
    (shown,) = outcome.shown
    assert shown.startswith("%lora use")


def test_an_assigned_result_is_not_displayed(bare: Notebook) -> None:
    assert bare.run("status = %lora\nlast = 1").shown == ()
    assert str(bare["status"]) == _STATUS


def test_what_was_done_before_a_mistake_is_displayed(adapted: Notebook) -> None:
    outcome = adapted.run("%lora use chat\n%lora use nothing\n%lora use sql")
    assert "'nothing'" in outcome.line
    (shown,) = outcome.shown
    assert "chat" in shown
    assert adapted["model"].active_adapters == ["chat"]


def test_lines_of_others_are_left_to_ipython(bare: Notebook) -> None:
    assert bare.run("%pwd\n'text'\n%lora").shown == ()
