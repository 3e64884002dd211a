"""Text that comes from files: control characters of names and labels reach neither a terminal nor a page."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from nbpeft.display import blocks
from nbpeft.display.blocks import card, line
from nbpeft.display.html import to_html
from nbpeft.display.quoting import escape, isolated
from nbpeft.display.shown import Shown
from nbpeft.display.text import columns, to_text
from nbpeft.errors import ConfigError, visible
from nbpeft.scoring.items import MetricFacts, ScoreItem
from nbpeft.scoring.result import ScoreResult

HOSTILE = "a\x1b[31m\x1b[2J\x9b2J\x07\r\x7f\x00<b>"


def controls(text: str) -> set[str]:
    return {character for character in text if not character.isprintable() and character not in "\n\t"}


def test_every_control_character_but_lines_and_tabs_is_shown() -> None:
    everything = "".join(map(chr, range(0x100)))
    assert controls(everything) and not {*map(ord, visible(everything))} & ({*range(32), *range(0x7F, 0xA0)} - {9, 10})
    assert visible("lines\nand\ttabs é 漢 \u202e") == "lines\nand\ttabs é 漢 \u202e"
    assert visible("\x1b[31m") == "\u241b[31m" and escape("\x1b<") == "\u241b&lt;"


def test_words_written_from_right_to_left_are_isolated_and_others_are_not() -> None:
    arabic, hebrew = "\u0639\u0631\u0628\u064a", "\u05e9\u05dc\u05d5\u05dd"
    assert isolated(f"{arabic}-3 300 rows <b>") == f"<bdi>{arabic}-3</bdi> 300 rows &lt;b&gt;"
    assert (
        isolated(f"said {hebrew} {arabic}! (2) {hebrew}")
        == f"said <bdi>{hebrew} {arabic}!</bdi> (2) <bdi>{hebrew}</bdi>"
    )
    assert isolated("a <b> \x1b \u6f22") == escape("a <b> \x1b \u6f22")
    assert "<bdi>" not in to_html(card("t", line(blocks.Text("x", tooltip=arabic)))).replace(f"<bdi>{arabic}", "")


def test_a_page_has_no_overrides_of_the_direction_and_no_lone_surrogates() -> None:
    overrides = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    for text in (f"a{overrides}b", f"\u05e9{overrides}", "a\ud800b\udfff"):
        page = to_html(card(text, line(text, blocks.Text("x", tooltip=text))))
        assert not {*page} & {*overrides} and page.encode() and "\ufffd" in page
    marks = "\u200e\u200f\U0001f600"
    assert escape(marks) == marks


def test_a_long_text_without_spaces_is_isolated() -> None:
    """A pattern that backtracks would take days for a million letters."""
    for text in ("\u6f22" * 1_000_000, "a" * 1_000_000, "\u05e9 " * 50_000 + "a" * 1_000_000):
        assert isolated(text).replace("<bdi>", "").replace("</bdi>", "") == text


@dataclass(frozen=True, repr=False)
class Named(Shown):
    """A result with a name from a file."""

    name: str

    def __str__(self) -> str:
        return f"named {self.name}"


@pytest.mark.parametrize(
    "text",
    [
        str(Named(HOSTILE)),
        repr(Named(HOSTILE)),
        Named(HOSTILE)._repr_html_(),
        str(ConfigError(f"no {HOSTILE}")),
        columns([(HOSTILE, HOSTILE)]),
        to_text(card(HOSTILE, line(HOSTILE))),
        to_html(card(HOSTILE, line(HOSTILE), blocks.Details(HOSTILE, line(HOSTILE)))),
    ],
)
def test_no_way_of_showing_text_obeys_it(text: str) -> None:
    assert not controls(text)


def test_names_and_labels_of_scores_are_shown() -> None:
    values = {HOSTILE: {"base": 0.0, HOSTILE: 1.0}}
    items = tuple(ScoreItem(n, HOSTILE, HOSTILE, {"base": HOSTILE, HOSTILE: "x"}, values) for n in range(4))
    result = ScoreResult(HOSTILE, ("base", HOSTILE), (MetricFacts(HOSTILE),), HOSTILE, items, 4, notes=(HOSTILE,))
    for text in (str(result), result._repr_html_(), to_text(result.view())):
        assert not controls(text) and "\u241b" in text
