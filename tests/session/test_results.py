from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from nbpeft.display import numbers
from nbpeft.display.html import to_html
from nbpeft.display.models import adapter_table, model_card
from nbpeft.errors import few
from nbpeft.model.saving.merge_export import LayerError, MergedFolder, MergeErrors
from nbpeft.session import CommandResult, StatusReport
from nbpeft.session.results import MergedCopy
from nbpeft.state import AdapterState, ModelState, SessionState

ADAPTER = AdapterState(
    "sql", "LoRA", 4, ("q_proj",), 1234567, 4938268, True, True, False, summary={"r": "8", "α": "16"}
)
MODEL = ModelState("model", "Llama", "bfloat16", "cpu", 10_000_000, 1234567, (ADAPTER,), ("sql",))


@pytest.mark.parametrize(
    ("byte_count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (18_600_000, "18.6 MB"),
        (None, "–"),
    ],
)
def test_sizes(byte_count: int | None, text: str) -> None:
    assert numbers.size(byte_count) == text


def test_names_are_cut_when_there_are_many() -> None:
    assert few(["a", "b", "c"], 2) == "'a', 'b' and 1 more"


@pytest.mark.parametrize("field", ["name", "method", "targets"])
def test_text_of_users_is_escaped(field: str) -> None:
    evil = "<script>x</script>"
    change: dict[str, Any] = {field: (evil,) if field == "targets" else evil}
    adapter = dataclasses.replace(ADAPTER, **change)
    model = dataclasses.replace(MODEL, name=evil, class_name=evil, adapters=(adapter,), active=(evil,))
    for html in (to_html(model_card(model)), CommandResult(evil, model, notes=(evil,))._repr_html_()):
        assert "<script>" not in html
        assert "&lt;script&gt;" in html


def test_colours_come_from_the_theme() -> None:
    html = to_html(model_card(MODEL))
    assert "var(--jp-ui-font-color1" in html
    assert "<style" not in html


def test_figures_are_not_broken_and_cards_stand_apart() -> None:
    html = StatusReport(SessionState((MODEL, dataclasses.replace(MODEL, name="second"))))._repr_html_()
    figure = html[: html.index("4.9 MB")]
    assert "white-space:nowrap" in figure[figure.rindex("<td") :]
    assert '<div style="height:10px"></div>' in html


def test_a_long_name_can_be_broken() -> None:
    html = to_html(adapter_table((dataclasses.replace(ADAPTER, name="for_all<b>_of_them_"),)))
    assert ">for_<wbr>all&lt;b&gt;_<wbr>of_<wbr>them_<" in html


@pytest.mark.parametrize("requantized", [None, 0.5])
def test_a_copy_shows_the_layers_that_lose(requantized: float | None) -> None:
    layers = (LayerError("exact", 0.0, None, 1.0, 1.0), LayerError("rounded", 1e-3, requantized, 1.0, 1.0))
    shown = [
        MergedCopy(
            "model", MergedFolder(Path("out"), ("sql",), (), 8, (8,), "float32", MergeErrors(some, "float32"))
        )._repr_html_()
        for some in (layers, layers[:1])
    ]
    assert ">rounded<" in shown[0] and ">exact<" not in shown[0]
    assert ("Quantized again" in shown[0]) == (requantized is not None)
    assert "Layers with the largest errors" not in shown[1] and ">0<" in shown[1] and "e+00" not in shown[1]


def test_the_report_of_nothing() -> None:
    assert str(StatusReport(SessionState())) == "no adapted model yet"
    assert "%%lora" in StatusReport(SessionState())._repr_html_()


def test_a_busy_session_says_so() -> None:
    assert "busy: training sql" in str(StatusReport(SessionState((MODEL,), "model", "training sql")))


def test_merged_off_and_scaled() -> None:
    assert "merged: sql" in str(StatusReport(SessionState((dataclasses.replace(MODEL, merged=("sql",)),))))
    assert "off: only the base" in str(StatusReport(SessionState((dataclasses.replace(MODEL, enabled=False),))))
    scaled = dataclasses.replace(MODEL, adapters=(dataclasses.replace(ADAPTER, scale=0.5),))
    assert "×\u00a00.5" in str(StatusReport(SessionState((scaled,))))
