"""Widgets that are closed, and layouts that several of them have."""

from __future__ import annotations

from typing import Any

import ipywidgets

from nbpeft.widgets.lifetime import close_tree, shared
from tests.widgets.support import live_widgets


def made() -> Any:
    return ipywidgets.HTML(layout=shared(ipywidgets.Layout, margin="0", flex="0 0 auto"))


def test_equal_layouts_are_one_until_the_last_widget_is_closed() -> None:
    before = set(live_widgets())
    first, second = made(), made()
    assert first.layout is second.layout
    other = ipywidgets.HTML(layout=shared(ipywidgets.Layout, margin="1px"))
    assert first.layout is not other.layout
    close_tree(first)
    close_tree(first)
    assert second.layout.comm is not None
    close_tree(second)
    assert second.layout.comm is None
    again = made()
    assert again.layout is not second.layout
    for widget in (other, again, first, second):
        close_tree(widget)
        widget.style.close()
    assert set(live_widgets()) == before


def test_a_layout_that_was_closed_from_elsewhere_is_made_anew() -> None:
    first = made()
    first.layout.close()  # as by ``Widget.close_all()``
    second = made()
    assert second.layout is not first.layout and second.layout.comm is not None
    close_tree(first)
    assert second.layout.comm is not None
    close_tree(second)
    assert second.layout.comm is None
