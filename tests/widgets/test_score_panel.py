"""The panel of scores: one filters the items and pages through them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace

import ipywidgets
import pytest

from nbpeft.scoring.items import MetricFacts
from nbpeft.scoring.result import ScoreResult
from nbpeft.session.results.paged_scores import PagedScores
from nbpeft.widgets import ScorePanel
from nbpeft.widgets.score_panel import MOST
from tests.scoring.samples import orders
from tests.widgets.support import button, parts

pytestmark = pytest.mark.usefixtures("no_widget_stays")


@pytest.fixture
def panel() -> Iterator[ScorePanel]:
    made = ScorePanel(orders(), ui="widgets")
    yield made
    made.close()


def page(panel: ScorePanel) -> str:
    return "".join(part.value for part in parts(panel, ipywidgets.HTML, hidden=True))


def rows(panel: ScorePanel) -> list[int]:
    return [int(part.partition("<")[0]) for part in page(panel).split(">row ")[1:]]


def test_one_pages_through_the_items_of_a_filter(panel: ScorePanel) -> None:
    assert button(panel, "fixed by orders: 18") is not None
    first = rows(panel)
    assert len(first) == 5 and "1–5 of 18" in page(panel) and button(panel, "Previous", hidden=True).disabled
    seen = [*first]
    while not button(panel, "Next", hidden=True).disabled:
        button(panel, "Next", hidden=True).click()
        seen += rows(panel)
    assert "16–18 of 18" in page(panel)
    assert seen == [item.number for item in orders().flips("base", "orders").fixed]
    button(panel, "Previous", hidden=True).click()
    assert "11–15 of 18" in page(panel)
    button(panel, "broken by orders: 3").click()
    assert rows(panel) == [30, 31, 32]
    assert button(panel, "Next", hidden=True).layout.display == "none"
    assert "nbpeft-on" in button(panel, "broken by orders: 3")._dom_classes
    assert "nbpeft-on" not in button(panel, "fixed by orders: 18")._dom_classes
    button(panel, "all items: 48").click()
    assert (rows(panel) == [0, 1, 2, 3, 4] and "<mark" in page(panel)) or "background" in page(panel)


def test_one_goes_to_a_page_and_searches(panel: ScorePanel) -> None:
    (at,) = parts(panel, ipywidgets.BoundedIntText, hidden=True)
    (search,) = parts(panel, ipywidgets.Text, hidden=True)
    button(panel, "all items: 48").click()
    at.value = 9
    assert rows(panel) == [40, 41, 42, 43, 44] and at.max == 10
    at.value = 99
    assert rows(panel) == [45, 46, 47] and at.value == 10
    search.value = "cork LAMPS"
    assert "1–4 of 4" in page(panel) and rows(panel) == [9, 21, 33, 45] and at.value == 1
    button(panel, "wrong with orders: 18").click()
    assert rows(panel) == [33, 45] and at.layout.display == "none"
    search.value = "nowhere"
    assert rows(panel) == [] and "no item matches" in page(panel)
    search.value = ""
    assert rows(panel) == [30, 31, 32, 33, 34] and at.layout.display is None


def test_another_metric_has_filters_of_its_own() -> None:
    result = orders()
    items = tuple(
        replace(item, values={**item.values, "f1": {name: 0.5 for name in result.columns}}) for item in result.items
    )
    both = replace(result, items=items, metrics=(*result.metrics, MetricFacts("f1", is_share=False)))
    panel = ScorePanel(both, ui="widgets")
    disagreeing = f"disagreeing: {len(result.disagreeing)}"
    button(panel, disagreeing).click()
    button(panel, "f1").click()
    assert "nbpeft-on" in button(panel, "all items: 48")._dom_classes  # nothing differs by it
    button(panel, "exact").click()
    assert "nbpeft-on" in button(panel, disagreeing)._dom_classes
    panel.close()


def test_without_widgets_it_is_the_card(panel: ScorePanel) -> None:
    saved = panel._repr_mimebundle_()
    assert "fixed 18, broke 3" in saved["text/html"] and "<details" in saved["text/html"]
    assert "exact · 48 items" in saved["text/plain"] and "for buttons" in saved["text/plain"]


def test_the_oldest_panels_become_cards() -> None:
    panels = [ScorePanel(orders(), ui="widgets") for _ in range(MOST + 1)]
    for panel in panels:
        panel.widget  # noqa: B018
    assert [panel.closed for panel in panels] == [True, *[False] * MOST]
    for panel in panels:
        panel.close()


def test_the_result_of_the_line_is_shown_as_a_panel_and_copied_as_a_card() -> None:
    result = PagedScores.of(orders(), lambda paged: ScorePanel(paged, ui="html")._ipython_display_())
    assert result.to_dict() == orders().to_dict()
    with pytest.raises(NotImplementedError):  # without widgets IPython asks for the HTML
        result._ipython_display_()
    with pytest.raises(NotImplementedError):
        result.by("exact")._ipython_display_()
    copied = pickle.loads(pickle.dumps(result))
    assert type(copied) is ScoreResult and copied == orders()
