"""Times as bars with seconds behind them."""

from __future__ import annotations

import base64
import re

from nbpeft.display.html import to_html
from nbpeft.display.text import to_text
from nbpeft.examples import Times


def test_times() -> None:
    times = Times("first answer", {"swap": 0.021, "one pass": 3.44, "compile": 38.5}, {"compile": "1"}, "graphs")
    assert str(times) == "first answer: swap 21 ms, one pass 3.4 s, compile 38 s"
    page = to_html(times.view())
    images = re.findall(r"base64,([^\"]+)", page)
    picture = "".join(base64.b64decode(image).decode() for image in images)
    for words in ("21 ms", "3.4 s", "38 s", "graphs", ">1<"):
        assert words in picture
    assert "%" not in re.sub(r"<[^>]*>", "", picture) and 'alt="swap 21 ms, one pass 3.4 s, compile 38 s"' in page
    assert "38 s" in to_text(times.view()) and "%" not in to_text(times.view())


def test_no_time_at_all() -> None:
    assert "0 ms" in to_text(Times("nothing", {"a": 0.0}).view())
