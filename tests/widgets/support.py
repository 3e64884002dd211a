"""Helpers of the widget tests."""

from __future__ import annotations

from typing import Any

import ipywidgets


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


def walk(widget: Any, *, hidden: bool = False) -> list[Any]:
    """A widget and all below it, without those that are not shown unless ``hidden``."""
    if not hidden and widget.layout.display == "none":
        return []
    children = getattr(widget, "children", ())
    return [widget, *(found for child in children for found in walk(child, hidden=hidden))]


def parts(panel: Any, kind: type, *, hidden: bool = False) -> list[Any]:
    """The widgets of a class in a panel."""
    return [part for part in walk(panel.widget, hidden=hidden) if isinstance(part, kind)]


def labels(panel: Any) -> list[str]:
    """The words on the buttons of a panel."""
    return [part.description for part in parts(panel, ipywidgets.Button)]


def button(panel: Any, label: str, nth: int = 0, *, hidden: bool = False) -> Any:
    """The first button with a label, or the one at index ``nth``."""
    found = [part for part in parts(panel, ipywidgets.Button, hidden=hidden) if part.description == label]
    assert len(found) > nth, labels(panel)
    return found[nth]


def text(panel: Any) -> str:
    """The HTML that a panel shows."""
    return "\n".join(part.value for part in parts(panel, ipywidgets.HTML))
