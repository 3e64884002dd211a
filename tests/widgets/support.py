"""Helpers of the widget tests."""

from __future__ import annotations

from typing import Any


class Output:
    """One output of a cell.

    Args:
        bundle: What it shows first.
    """

    def __init__(self, bundle: dict[str, Any]) -> None:
        self.bundles = [bundle]

    def update(self, bundle: dict[str, Any], *, raw: bool) -> None:
        assert raw
        self.bundles.append(bundle)

    @property
    def last(self) -> dict[str, Any]:
        return self.bundles[-1]


def live_widgets() -> dict[str, Any]:
    """All widgets that were not closed, by id."""
    from ipywidgets.widgets import widget

    found = getattr(widget, "_instances", None)
    return dict(widget.Widget.widgets if found is None else found)  # the former name is that of ipywidgets 7
