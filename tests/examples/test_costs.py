"""What several trainings learned and cost, in one picture."""

from __future__ import annotations

import base64
import re

from nbpeft.examples import Costs, Trained

COSTS = Costs(
    "after 30 steps",
    {"LoRA": Trained(0.9, 4_884_480, 240_000_000, 2.0), "(IA)³": Trained(0.0, 184_320, 120_000_000, 1.0)},
)


def test_each_figure_is_in_words() -> None:
    assert str(COSTS) == (
        "after 30 steps: LoRA: 90.0 % correct, 4.9 M parameters, 240.0 MB memory, 2.00 s a step; "
        "(IA)³: 0 % correct, 184.3 k parameters, 120.0 MB memory, 1.00 s a step"
    )


def test_bars_are_shares_of_the_largest_and_scores_of_all() -> None:
    image = re.search(r"base64,([^\"]+)\"", COSTS._repr_html_())
    assert image is not None
    svg = base64.b64decode(image[1]).decode()
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="8"', svg)]
    tracks, bars = widths[::2], widths[1::2]
    assert len(bars) == 8 and len(set(tracks)) == 1
    shares = [round(bar / tracks[0], 1) for bar in bars]
    assert shares == [0.9, 1.0, 1.0, 1.0, 0.0, 0.0, 0.5, 0.5]
    assert "184.3 k" in svg and "a step" in svg and "(IA)³" in svg


def test_nothing_and_zeros_are_drawn_too() -> None:
    assert "<img" in Costs("nothing", {})._repr_html_()
    assert "0.00 s" in str(Costs("zeros", {"a": Trained(0.0, 0, 0, 0.0)}))
