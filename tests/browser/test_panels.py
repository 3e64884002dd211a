"""The panels in a real browser, with a session and a run that compute nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from nbpeft.display.html import to_html
from nbpeft.display.models import model_card
from nbpeft.display.training import training_card
from nbpeft.widgets.panel import AGAIN
from tests.browser.conftest import Opener
from tests.widgets.fakes import MEMORY, model, train_state

pytestmark = pytest.mark.browser

SET_UP = """\
from nbpeft.widgets import AdaptersPanel, show_run
from tests.widgets.fakes import FakeSession, simulate

session = FakeSession()
session.started.append(lambda run, name: show_run(run, session, name))
"""
PANEL = "AdaptersPanel(session, 'model')"
ACTS = "print('acts:', ', '.join(session.state.model('model').active) or 'base')"
RUN = "done = simulate(session, steps=600, seconds=0.05)\nprint('ended at', done.state.step, done.state.status)"
SHORT_RUN = "done = simulate(session, steps=40, seconds=0.02)\nprint('ended at', done.state.step, done.state.status)"


def step_shown(page, cell: int) -> int:
    found = re.search(r"(\d+) / \d+", page.output_text(cell))
    assert found, page.output_text(cell)
    return int(found[1])


@pytest.mark.slice
def test_a_click_switches_the_adapter(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(SET_UP, PANEL, ACTS)
    page.run_all()
    assert "acts: orders" in page.output_text(2)
    page.click("sql", cell=1)
    expect(page.output(1).locator(".nbpeft-row.nbpeft-on")).to_have_text([re.compile("sql")])
    page.run_cell(2)
    assert "acts: sql" in page.output_text(2)
    page.click("base", cell=1)
    expect(page.output(1).locator(".nbpeft-row.nbpeft-on")).to_have_count(0)
    page.run_cell(2)
    assert "acts: base" in page.output_text(2)
    page.click("orders", cell=1)
    page.wait_for("optimizer 37.0 MB", cell=1)
    for theme in ("light", "dark"):
        page.theme(theme)
        page.screenshot(pictures / f"panel-{app}-{theme}.png")
    page.theme("light")


def test_save_asks_for_a_folder_and_delete_asks_back(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(SET_UP, PANEL, "print(session.commands)")
    page.run_all()
    page.click("Save", cell=1)
    field = page.output(1).get_by_label("Save to folder")
    expect(field).to_have_value("adapters/orders")
    field.fill("kept/orders")
    page.screenshot(pictures / f"panel-save-{app}.png")
    page.click("Save", cell=1, nth=1)
    page.wait_for("saved 'orders' to kept/orders", cell=1)
    row = page.output(1).locator(".nbpeft-row").filter(has_text="pirate")
    delete = row.get_by_title("Delete pirate, after a confirmation")
    delete.dblclick()
    page.run_cell(2)  # the kernel has answered both clicks once it has run a cell
    expect(row.get_by_text("Delete pirate?")).to_have_count(0)
    delete.click()
    confirm = row.locator(".nbpeft-danger")
    expect(confirm).to_be_visible()
    asked, first = confirm.bounding_box(), delete.bounding_box()
    assert asked is not None and first is not None
    assert asked["y"] >= first["y"] + first["height"] or asked["x"] + asked["width"] <= first["x"]
    page.screenshot(pictures / f"panel-delete-{app}.png")
    row.get_by_role("button", name="Keep").click()
    expect(confirm).to_have_count(0)
    delete.click()
    confirm.click()
    page.wait_for("deleted 'pirate'", cell=1)
    expect(page.button("pirate", cell=1)).to_have_count(0)
    page.run_cell(2)
    assert "[('save', 'orders', 'kept/orders'), ('delete', 'pirate')]" in page.output_text(2)


def test_errors_stay_in_the_panel_until_dismissed(open_notebook: Opener) -> None:
    page = open_notebook(SET_UP, PANEL, "session.error = RuntimeError('no room <b>left</b>')")
    page.run_all()
    page.click("sql", cell=1)
    page.wait_for("RuntimeError: no room <b>left</b>", cell=1)
    page.click("✕", cell=1)
    expect(page.output(1).get_by_text("RuntimeError")).to_have_count(0)


@pytest.mark.slice
def test_stop_ends_the_run_and_not_the_next(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(SET_UP, RUN, SHORT_RUN)
    page.run_cell(0)
    page.start_all()
    page.wait_for("smoothed", cell=1)
    page.wait_for(re.compile(r"^[1-9]\d / 600$"), cell=1)
    page.screenshot(pictures / f"run-live-{app}.png")
    page.click("Stop", cell=1)
    page.wait_for(re.compile(r"ended at \d+ stopped"), cell=1, timeout=30)
    page.wait_idle()
    page.check()
    assert "ended at 40 finished" in page.output_text(2)
    expect(page.button("Stop")).to_have_count(0)


def test_pause_waits_and_resume_goes_on(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(SET_UP, RUN)
    page.run_cell(0)
    page.start_cell(1)
    page.wait_for(re.compile(r"^[1-9]\d? / 600$"), cell=1)
    page.click("Pause", cell=1)
    page.wait_for(re.compile("^paused$"), cell=1, timeout=30)
    expect(page.button("Resume", cell=1)).to_be_visible()
    before = step_shown(page, 1)
    page.page.wait_for_timeout(600)
    assert step_shown(page, 1) == before
    page.screenshot(pictures / f"run-paused-{app}.png")
    page.click("Resume", cell=1)
    page.wait_for(re.compile("^running$"), cell=1, timeout=30)
    page.wait_for(re.compile(rf"^(?!{before} )\d+ / 600$"), cell=1)
    assert step_shown(page, 1) > before
    page.click("Stop", cell=1)
    page.wait_for("ended at", cell=1, timeout=30)
    page.wait_idle()


def test_interrupting_the_kernel_ends_the_run_gracefully(open_notebook: Opener) -> None:
    page = open_notebook(SET_UP, RUN)
    page.run_cell(0)
    page.start_cell(1)
    page.wait_for(re.compile(r"^[1-9]\d? / 600$"), cell=1)
    page.interrupt()
    page.wait_for(re.compile(r"^\s*stopped at step \d+\s*$"), cell=1, timeout=30)
    page.wait_idle()
    text = page.output_text(1)
    assert "ended at" not in text and "Traceback" not in text  # the cell goes no further, in one quiet line


def test_a_saved_notebook_shows_the_last_picture(open_notebook: Opener, pictures: Path, app: str) -> None:
    page = open_notebook(SET_UP, SHORT_RUN)
    page.run_all()
    saved = page.save()
    assert "widget-view" not in str(saved)
    page.reopen()
    image = page.output(1).locator("img[src^='data:image/svg+xml']")
    expect(image).to_be_visible()
    assert image.evaluate("image => image.naturalWidth") > 0
    page.check()
    assert "finished" in page.output_text(1)
    for theme in ("light", "dark"):
        page.theme(theme)
        page.screenshot(pictures / f"run-reopened-{app}-{theme}.png")
    page.theme("light")


def test_a_notebook_that_is_not_trusted_shows_the_snapshots(open_notebook: Opener, pictures: Path, app: str) -> None:
    final = train_state(40, status="stopped", message="stopped at step 40", remaining=None)
    cards = (to_html(training_card(final, model_name="model")), to_html(model_card(model(memory=MEMORY), hint=AGAIN)))
    page = open_notebook(shown=[{"text/html": card, "text/plain": "hidden"} for card in cards])
    page.wait_for("stopped at step 40", cell=0)
    image = page.output(0).locator("img")
    expect(image).to_be_visible()
    assert image.evaluate("image => image.naturalWidth") > 0
    page.wait_for("optimizer 37.0 MB", cell=1)
    assert "hidden" not in page.output_text(0) + page.output_text(1)
    coloured = (
        page.output(0)
        .locator("div[style*='background']")
        .evaluate_all("parts => parts.map(part => getComputedStyle(part).backgroundColor)")
    )
    assert "rgb(25, 118, 210)" in coloured
    page.screenshot(pictures / f"not-trusted-{app}.png")


LONG = ["experiment-2026-11-26-learning-rate-3e-4", "experiment-2026-11-26-learning-rate-1e-4"]
MANY = f"""\
from tests.widgets.fakes import adapter, model
session = FakeSession(model('model', [adapter(name) for name in {LONG!r} + [f'run-{{n:03}}' for n in range(198)]]))
"""
NAMES = "print('acts:', session.state.model('model').active)"


@pytest.mark.parametrize("width", [1280, 800, 600])
def test_nothing_is_cut_at_any_width(open_notebook: Opener, pictures: Path, app: str, width: int) -> None:
    page = open_notebook(f"{SET_UP}\n{MANY}", PANEL, "AdaptersPanel(session, 'model', ui='html')")
    page.page.set_viewport_size({"width": width, "height": 900})
    if app == "lab" and width < 1280:  # at 600 pixels the file browser leaves 210 for the notebook
        page.page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
    page.run_all()
    expect(page.button("run-000", cell=1)).to_be_visible()
    page.output(1).get_by_role("button", name="Delete", exact=True).first.click()
    wide = page.output(1).locator(".nbpeft-panel, .nbpeft-row, .nbpeft-choices, .nbpeft-settings, .nbpeft-foot")
    assert wide.evaluate_all("parts => parts.every(part => part.scrollWidth <= part.clientWidth + 1)")
    heads = page.output(1).locator(".nbpeft-head .nbpeft-grid > div").filter(visible=True)
    assert heads.evaluate_all("parts => parts.every(part => part.scrollWidth <= part.clientWidth)")
    edge = "panel => panel.getBoundingClientRect().right"
    right = page.output(1).locator(".nbpeft-panel").evaluate(edge)
    controls = page.output(1).locator("button, input").filter(visible=True)
    assert controls.evaluate_all(f"(parts) => parts.every(part => ({edge})(part) <= {right})")
    table = page.output(2).locator("table").first
    assert table.evaluate("table => table.scrollWidth <= table.parentElement.clientWidth + 1")
    for name in LONG:  # both ends are seen, and what differs
        shown = page.output(1).locator(f".nbpeft-row [title='{name}'] span").last
        expect(shown).to_have_text(name[-8:])
        assert shown.evaluate("part => part.scrollWidth <= part.offsetWidth")
    page.screenshot(pictures / f"panel-many-{app}-{width}.png")


def test_a_filter_finds_one_of_two_hundred(open_notebook: Opener) -> None:
    page = open_notebook(f"{SET_UP}\n{MANY}", PANEL, NAMES)
    page.run_all()
    expect(page.output(1).locator(".nbpeft-row")).to_have_count(12)
    page.output(1).get_by_label("Filter").fill("run-19")
    expect(page.output(1).locator(".nbpeft-row")).to_have_count(8)
    page.click("run-197", cell=1)
    expect(page.output(1).locator(".nbpeft-row.nbpeft-on")).to_have_count(1)
    page.run_cell(2)
    assert "acts: ('run-197',)" in page.output_text(2)


def test_every_control_has_a_name_and_is_reached_by_the_keyboard(open_notebook: Opener) -> None:
    page = open_notebook(f"{SET_UP}\n{MANY}", PANEL, NAMES)
    page.run_all()
    panel = page.output(1)
    for control in panel.locator("input, select, textarea").filter(visible=True).all():
        assert control.evaluate("part => part.labels.length && part.labels[0].innerText.trim()")
    buttons = panel.locator("button").filter(visible=True)
    assert buttons.evaluate_all("parts => parts.every(part => part.innerText.trim() && part.title)")
    page.button("base", cell=1).focus()
    for _ in range(3):
        page.page.keyboard.press("Tab")
    focused = "() => document.activeElement.innerText"
    assert page.page.evaluate(focused) == "run-000"
    assert page.page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.page.keyboard.press("Enter")
    expect(panel.locator(".nbpeft-row.nbpeft-on")).to_have_count(1)
    page.run_cell(2)
    assert "acts: ('run-000',)" in page.output_text(2)
