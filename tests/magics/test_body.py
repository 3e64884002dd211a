from __future__ import annotations

from typing import Any

import pytest

from nbpeft.errors import CellError
from nbpeft.magics.body import evaluate, excerpt, parse_body, parse_fields
from nbpeft.magics.lora import CELLS
from nbpeft.magics.parse import Subcommand
from nbpeft.magics.tokenize import tokenize


def values(source: str, **namespace: Any) -> dict[str, Any]:
    return evaluate(parse_body(source), namespace)


def test_lines_are_evaluated_in_the_notebook() -> None:
    assert values("r = rank\nlora_alpha = 2 * r  # twice\n", rank=4) == {"r": 4, "lora_alpha": 8}


def test_a_comprehension_sees_fields_and_variables() -> None:
    source = "names = ['q', 'v']\ntarget_modules = [f'{name}_{end}' for name in names]"
    assert values(source, end="proj")["target_modules"] == ["q_proj", "v_proj"]


def test_values_may_take_several_lines() -> None:
    assert values("target_modules = [\n  'q',\n  'v',\n]") == {"target_modules": ["q", "v"]}


def test_an_annotated_assignment_counts() -> None:
    assert values("r: int = 8") == {"r": 8}


def test_comments_alone_are_an_empty_body() -> None:
    assert values("# nothing yet\n\n") == {}


def test_the_notebook_is_not_changed() -> None:
    namespace: dict[str, Any] = {"rank": 4}
    evaluate(parse_body("r = (rank := 9)"), namespace)
    assert namespace == {"rank": 4}


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("r = 8\nlora_alpha = = 16", 2, "invalid syntax"),
        ("r = 8\n  lora_alpha = 16", 2, "unexpected indent"),
        ("r = [1, 2", 1, "never closed"),
        ("import os", 1, "only lines like 'field = value' are allowed here, not an import"),
        ("r = 8\nprint(r)", 2, "not a call"),
        ("r = 8\nr\n", 2, "not an expression"),
        ("for x in y:\n    r = x", 1, "not a loop"),
        ("r += 1", 1, "not an augmented assignment"),
        ("r: 16", 1, "expected 'r = 16', not 'r: 16'"),
        ("r = 8,\nlora_alpha = 3", 1, "comma at the end"),
        ("r = 8\n\nr = 16", 3, "r is set twice, in line 1 and in line 3"),
        ("config.r = 8", 1, "expected 'field = value', not an assignment to 'config.r'"),
        ("r, lora_alpha = 8, 16", 1, "expected 'field = value'"),
        ("r = 8\nlora_alpha = rnk", 2, "name 'rnk' is not defined. Did you mean 'rank'"),
        ("r = 1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("r = int('x\\ny')", 1, "ValueError: invalid literal"),
        ("r = await rank", 1, "'await' outside function"),
        ("r = (yield)", 1, "'yield' outside function"),
        ("r = 8\nlora_alpha = [i async for i in rank]", 2, "outside of an asynchronous function"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(source: str, line: int, message: str) -> None:
    with pytest.raises(CellError) as caught:
        values(source, rank=4)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.line == line
    assert caught.value.__cause__ is None


def test_a_tuple_in_brackets_is_a_value() -> None:
    assert values("betas = (0.9,)") == {"betas": (0.9,)}


def test_the_excerpt_points_at_the_column() -> None:
    source = "r = 8\nlora_alpha = = 16\n"
    with pytest.raises(CellError) as caught:
        parse_body(source)
    assert excerpt(source, caught.value) == "    lora_alpha = = 16\n                 ^"


def test_an_interrupt_is_not_taken_for_a_mistake() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        values("r = interrupt()", interrupt=interrupt)


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("r=8", {"r": 8}),
        ("target_modules=q_proj,v_proj", {"target_modules": ["q_proj", "v_proj"]}),
        ("target_modules=all-linear", {"target_modules": "all-linear"}),
        ('target_modules=["q", "v"]', {"target_modules": ["q", "v"]}),
        ("use_dora=True lora_dropout=0.1", {"use_dora": True, "lora_dropout": 0.1}),
        ("r={rank} lora_alpha=$rank", {"r": 4, "lora_alpha": 4}),
        ("target_modules=.*q{2}", {"target_modules": ".*q{2}"}),
        ("init_lora_weights='8'", {"init_lora_weights": "8"}),
    ],
)
def test_field_words(line: str, fields: dict[str, Any]) -> None:
    assert parse_fields(tokenize(line), {"rank": 4}) == fields


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("r=8 q_proj", "expected name=value, got 'q_proj'"),
        ("r=8 r=9", "r is set twice"),
        ("r={rnk}", "name 'rnk' is not defined. Did you mean 'rank'?"),
    ],
)
def test_field_words_that_cannot_be_read(line: str, message: str) -> None:
    with pytest.raises(CellError) as caught:
        parse_fields(tokenize(line), {"rank": 4})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "line", ["hub_token = hf_abcdefghijklmnopqrstuvwxyz0123456789", "wandb_api_key = s3cret", "optim = 'hf_" + "a" * 30]
)
def test_a_line_with_a_secret_is_shown_without_it(line: str) -> None:
    shown = excerpt(line, CellError("wrong", line=1, column=4))
    assert "***" in shown and "hf_a" not in shown and "s3cret" not in shown


@pytest.mark.parametrize("command", CELLS.values(), ids=list(CELLS))
def test_the_example_of_the_help_is_a_cell(command: Subcommand) -> None:
    _, *body = command.example.split("\n")
    assert parse_body("\n".join(body))
