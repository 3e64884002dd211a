"""Every result and state as HTML and as text: escaped, complete, in the colours of one palette."""

from __future__ import annotations

import re

import pytest
import rich
from rich.console import Console

from nbpeft.display import palette
from nbpeft.display.blocks import Bar, Text, card, line
from nbpeft.display.differences import differences
from nbpeft.display.html import to_html
from nbpeft.display.memory import memory_bar
from nbpeft.display.text import columns, to_text
from nbpeft.state import MemoryPart
from tests.display.samples import plan_result, results, states
from tests.display.test_states import EVIL, Reader
from tests.widgets.fakes import MEMORY

PLAIN, HOSTILE = results(), results(EVIL)
STATES, HOSTILE_STATES = states(), states(EVIL)


@pytest.mark.parametrize("name", PLAIN)
def test_results_escape_what_was_typed(name: str) -> None:
    html = HOSTILE[name]._repr_html_()
    read = Reader(html)
    assert "onerror" not in read.attributes
    if name != "status of nothing":
        assert "<script>alert(" in "".join(read.words)
        assert "[red]" not in to_text(PLAIN[name].view())


@pytest.mark.parametrize("name", STATES)
def test_states_escape_what_was_typed(name: str) -> None:
    read = Reader(to_html(HOSTILE_STATES[name]))
    assert "onerror" not in read.attributes
    assert "<script>alert(" in "".join(read.words)


@pytest.mark.parametrize("name", [*PLAIN, *STATES])
def test_text_says_what_html_says(name: str) -> None:
    block = PLAIN[name].view() if name in PLAIN else STATES[name]
    text = "".join(character for character in to_text(block, 400) if character.isalnum())
    drawn = name in ("inspect", "run", "failed run", "finished run")  # pictures are described, not drawn
    for words in () if drawn else Reader(to_html(block)).words:
        assert "".join(character for character in words if character.isalnum()) in text


@pytest.mark.parametrize("name", PLAIN)
def test_a_line_in_a_terminal_and_a_card_by_rich(name: str) -> None:
    result = PLAIN[name]
    assert repr(result) and type(result).__name__ != str(result)
    console = Console(width=90, file=None, color_system=None, force_jupyter=False)
    with console.capture() as capture:
        console.print(result)
    assert all(len(row) <= 90 for row in capture.get().splitlines())


def test_markup_of_rich_is_text() -> None:
    assert to_text(line("[red]x[/red] :smile:", Text("[bold]", "dim"))) == "[red]x[/red] :smile: [bold]"
    assert "[red]" in to_text(card("[red]", aside="[/red]"))
    assert columns([("[a]", "1"), ("b", "2\n3")]) == "  [a]  1\n  b    2\n       3"
    assert columns([]) == ""


def test_text_is_text_in_a_kernel_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    assert columns([("a", "b")]) == "  a  b"


def colours(html: str) -> dict[str, str]:
    """Part -> colour in a legend."""
    pattern = r'border-radius:2px;margin-right:5px;background:([^"]*)"></span>([a-z ]+?) [\d.]+ [kMG]?B'
    return {name: colour for colour, name in re.findall(pattern, html, flags=re.IGNORECASE)}


def test_a_part_has_one_colour_in_a_forecast_and_a_measurement() -> None:
    forecast, measured = colours(plan_result()._repr_html_()), colours(to_html(memory_bar(MEMORY)))
    assert {"base weights", "adapters", "gradients", "optimizer", "activations"} <= forecast.keys() & measured.keys()
    for name in forecast | measured:
        assert {found[name] for found in (forecast, measured) if name in found} == {
            palette.PARTS[{"temporary buffers": "temporary"}.get(name, name)]
        }
    assert len(set(palette.PARTS.values())) == len(palette.PARTS)


def test_every_colour_is_of_the_palette() -> None:
    known = " ".join(value for value in vars(palette).values() if isinstance(value, str))
    known += " ".join([*palette.PARTS.values(), *palette.PLAIN.values()])
    for name in [*PLAIN, *STATES]:
        html = PLAIN[name]._repr_html_() if name in PLAIN else to_html(STATES[name])
        for style in re.findall(r'style="([^"]*)"', html):
            for colour in re.findall(r"(?:background|color):((?:var|rgba)\([^;]*\)|#\w+)", style):
                assert colour in known, (name, colour)


def test_a_part_without_a_colour_of_its_own_and_an_empty_one() -> None:
    html = to_html(Bar((MemoryPart("unheard of", 5), MemoryPart("adapters", 0)), 10))
    assert palette.PARTS["other"] in html and "adapters" not in html and "width:50.00%" in html


def test_the_end_of_a_device_that_is_too_small() -> None:
    html = to_html(Bar((MemoryPart("base weights", 12),), 12, 6, "small"))
    assert "width:50.00%" in html and "#d32f2f" in html
    assert "#d32f2f" not in to_html(Bar((MemoryPart("base weights", 6),), 12, 12, "large"))


def test_nothing_is_drawn_of_nothing() -> None:
    assert to_html(line("", Text(""))) == ""
    with pytest.raises(TypeError, match="not a block"):
        to_html("text")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not a block"):
        to_text(5)  # type: ignore[arg-type]


def test_words_that_differ() -> None:
    assert differences("a  b", "a b") == ((("a  b", False),), "same")
    assert differences("one two four", "one three four") == ((("one ", False), ("two", True), (" four", False)), "")
    assert differences("a b c", "x y z")[1] == "differs"
    assert differences('{"a": "b", "c": "d"}', '{"w": "x", "y": "z"}') == (
        (('{"a": "b", "c": "d"}', False),),
        "differs",
    ), "punctuation makes no two answers alike"
    assert differences("(!)", "(?)")[0] == (("(", False), ("!", True), (")", False))
