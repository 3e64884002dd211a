"""``session.inspect``: numbers in the right places, in words and as a map."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbpeft.errors import AdapterError
from nbpeft.session import Session


def test_most_changed_first_in_words_and_as_a_map(session: Session, two_adapters: Any) -> None:
    result = session.inspect("pirate")
    changes = [layer.relative for layer in result.ranked]
    assert changes == sorted(changes, reverse=True) and changes[0] > 0
    text, html = str(result), result._repr_html_()
    assert text.startswith("pirate on model: median weight change ")
    assert text.index(result.ranked[0].path) < text.index(result.ranked[1].path)
    assert html.count("border-radius:2px") == 4 and "self_attn.q_proj" in html
    darkest = html[: html.index("opacity:1.00")].rindex("title=")
    assert result.ranked[0].path in html[darkest : darkest + 80]


def test_without_a_name_it_is_the_active_one(session: Session, two_adapters: Any) -> None:
    assert session.inspect().adapter == session.state.models[0].active[0]
    session.use(["orders", "pirate"])
    with pytest.raises(AdapterError, match="say which adapter to inspect: pirate, orders"):
        session.inspect()


def test_an_adapter_that_was_not_trained_changes_nothing(session: Session, two_adapters: Any) -> None:
    with torch.no_grad():
        for name, parameter in two_adapters.named_parameters():
            if ".lora_B.orders." in name:
                parameter.zero_()
    result = session.inspect("orders")
    assert str(result) == "orders on model: it changes nothing yet: train it first"
    session.scale("pirate", 0)
    assert str(session.inspect("pirate")) == "pirate on model: it changes nothing: its scale is 0", "it was trained"
    assert "<details" not in result._repr_html_()
