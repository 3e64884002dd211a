"""A chart of scores: bars with intervals, or a grid."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest

from nbpeft.display.text import to_text
from nbpeft.errors import ConfigError
from nbpeft.examples import Scores
from nbpeft.scoring.items import Score


def scored(right: int, low: float, high: float) -> Score:
    return Score(right / 4, low, high, 4, "Wilson")


def picture_of(shown: Any) -> str:
    (data,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', shown._repr_html_())
    return base64.b64decode(data).decode()


def test_scores_are_one_picture_with_their_intervals() -> None:
    scores = Scores("held-out orders", {"base <model>": scored(0, 0.0, 0.49), "ten examples": scored(1, 0.05, 0.7)})
    scores["adapter"] = scored(4, 0.51, 1.0)
    picture = picture_of(scores)
    for words in ("base &lt;model&gt;", "0 %", "25.0 %", "100 %", "95 % interval", "0–49 %", "5–70 %", "51–100 %"):
        assert words in picture
    assert picture.count("<line") == 9
    assert str(scores) == "held-out orders: base <model> 0 %, ten examples 25.0 %, adapter 100 %"
    assert "100 %" in to_text(scores.view())
    assert list(scores) == ["base <model>", "ten examples", "adapter"]


def test_shares_alone_have_no_intervals() -> None:
    picture = picture_of(Scores("orders", {"a": 0.25, "b": scored(4, 0.5, 1.0)}))
    assert "25.0 %" in picture and "interval" not in picture and "<line" not in picture


def test_other_values_and_mixed_names_are_refused() -> None:
    scores = Scores("orders", {"a": 1})
    for value in (48, "0.5", float("nan"), None):
        with pytest.raises(ConfigError, match="expected a score, or a share from 0 to 1, not"):
            scores["wrong"] = value  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="pairs of names"):
        scores["a", "b"] = 0.5


def test_pairs_are_a_grid() -> None:
    scores = Scores("adapters on tasks", {("codes", "codes"): 1.0, ("codes", "dates"): scored(1, 0.05, 0.7)})
    scores["dates", "dates"] = 0.9
    picture = picture_of(scores)
    assert picture.count("<rect") == 4 and "90.0 %" in picture and "–" in picture
    assert "codes on dates 25.0 %" in str(scores)


def test_the_text_of_a_grid_is_readable_on_every_shade() -> None:
    picture = picture_of(Scores("shades", {("row", str(share)): share / 50 for share in range(51)}))
    cells = re.findall(r'fill="rgb\((\d+),(\d+),(\d+)\)"/><text [^>]*fill="#(000|fff)"', picture)
    assert len(cells) == 51 and len(set(cells)) == 51
    for *colour, text in cells:
        linear = [((int(value) / 255 + 0.055) / 1.055) ** 2.4 for value in colour]
        luminance = sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
        assert max(luminance, text == "fff") + 0.05 >= 4.5 * (min(luminance, text == "fff") + 0.05)
