"""Drives a notebook in a real browser: a Jupyter server, a Chromium, and one page a notebook.

    with JupyterServer(folder, "lab") as server, Browser(chromium) as browser:
        page = browser.open(server, "demo.ipynb")
        page.run_all()
        page.click("Train")
        page.wait_for("finished")
        page.screenshot(Path("demo.png"))

JupyterLab 4 and Notebook 7 both hand their application to the page (``expose_app_in_browser``), so
cells are run by command and not by clicking through menus.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, Self

from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Locator, Page, Playwright, expect, sync_playwright

from tests.browser.server import HarnessError, JupyterServer

CHROMIUM_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    # A page that is not in front must not have its timers slowed, or live output looks late.
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--disable-backgrounding-occluded-windows",
)
WIDGET_ERRORS = (
    "Error displaying widget",
    "Error creating widget",
    "Failed to load model class",
    "Click to show javascript error",
)


class Browser:
    """A Chromium without a window and with an empty profile.

    Args:
        executable: The browser.
    """

    def __init__(self, executable: str, *, width: int = 1280, height: int = 1000) -> None:
        self._executable, self._size = executable, (width, height)
        self._playwright: Playwright | None = None

    def __enter__(self) -> Self:
        self._profile = tempfile.mkdtemp(prefix="nbpeft-chromium-")
        self._playwright = sync_playwright().start()
        self._context = self._playwright.chromium.launch_persistent_context(
            self._profile,
            executable_path=self._executable,
            headless=True,
            args=list(CHROMIUM_ARGUMENTS),
            viewport={"width": self._size[0], "height": self._size[1]},
            locale="en-US",
            timezone_id="UTC",
        )
        return self

    def open(self, server: JupyterServer, notebook: str, timeout: float = 90) -> NotebookPage:
        """Opens a notebook and waits for its kernel."""
        return NotebookPage(self._context.new_page(), server, notebook, timeout)

    def new_page(self) -> Page:
        """Opens an empty page, without a server."""
        return self._context.new_page()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(PlaywrightError):
            self._context.close()
        if self._playwright is not None:
            self._playwright.stop()
        shutil.rmtree(self._profile, ignore_errors=True)


PAGE_HELPERS = r"""
window.nb = {
  panel() {
    const app = window.jupyterapp;
    if (!app) return null;
    for (const widget of app.shell.widgets('main'))
      if (widget.content && widget.content.model && widget.content.model.cells && widget.context) return widget;
    return null;
  },
  kernel() {
    const panel = this.panel();
    return panel && panel.sessionContext.session && panel.sessionContext.session.kernel;
  },
  ready() {
    const panel = this.panel(), kernel = this.kernel();
    return !!(panel && panel.context.isReady && panel.sessionContext.isReady &&
              kernel && kernel.connectionStatus === 'connected');
  },
  code() { return this.panel().content.widgets.filter(cell => cell.model.type === 'code'); },
  outputs() { return this.code().map(cell => cell.model.outputs.toJSON()); },
  busy() {
    const kernel = this.kernel();
    const waits = cell => (cell.node.querySelector('.jp-InputPrompt') || {innerText: ''}).innerText.trim() === '[*]:';
    return !kernel || kernel.status !== 'idle' || this.code().some(waits);
  },
  run(command) {
    window.nbRun = {done: false};
    const end = () => { window.nbRun = {done: true}; };
    window.jupyterapp.commands.execute(command).then(end, end);
  },
  runCell(index) {
    const notebook = this.panel().content;
    notebook.activeCellIndex = notebook.widgets.indexOf(this.code()[index]);
    notebook.deselectAll();
    this.run('notebook:run-cell');
  },
};
"""


class NotebookPage:
    """An open notebook. Made by ``Browser.open``; cells are counted from 0, code cells only."""

    def __init__(self, page: Page, server: JupyterServer, notebook: str, timeout: float) -> None:
        self.page, self._server, self._notebook, self._timeout = page, server, notebook, timeout
        self.console: list[str] = []
        page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.console.append(f"error: {error}"))
        page.set_default_timeout(timeout * 1000)
        self._load()

    def _load(self) -> None:
        self.page.goto(self._server.url(self._notebook), wait_until="domcontentloaded")
        self._wait_js("() => !!window.jupyterapp")
        self.page.evaluate(PAGE_HELPERS)
        self._wait_js("() => window.nb.ready()")
        # Before the kernel has told what it is, a first run can be lost.
        self.page.evaluate("async () => { await window.nb.kernel().info; }")
        self._wait_js("() => window.nb.kernel().status === 'idle'")

    def reopen(self) -> None:
        """Loads the page anew, from the saved file."""
        self.page.on("dialog", lambda dialog: dialog.accept())
        self._load()

    # Running

    def run_all(self, timeout: float = 120) -> None:
        """Runs every cell, waits for all and checks that none failed."""
        self.start_all()
        self.wait_idle(timeout)
        self.check()

    def start_all(self) -> None:
        """Begins to run every cell."""
        self.page.evaluate("() => window.nb.run('notebook:run-all-cells')")

    def run_cell(self, index: int, timeout: float = 120) -> None:
        """Runs one cell and checks that it did not fail."""
        self.start_cell(index)
        self.wait_idle(timeout)
        self.check()

    def start_cell(self, index: int) -> None:
        """Begins to run one cell."""
        self.page.evaluate("index => window.nb.runCell(index)", index)

    def wait_idle(self, timeout: float = 120) -> None:
        """Waits until nothing runs or waits, and outputs are painted."""
        # The kernel alone is not enough: it is idle for a moment between two cells.
        self._wait_js("() => (!window.nbRun || window.nbRun.done) && !window.nb.busy()", timeout)
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def interrupt(self) -> None:
        """The square button."""
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:interrupt-kernel'); }")

    @property
    def file(self) -> Path:
        """Where the notebook is saved."""
        return self._server.folder / self._notebook

    def save(self) -> dict[str, Any]:
        """Saves the notebook; returns what is in the file."""
        self.page.evaluate("async () => { await window.jupyterapp.commands.execute('docmanager:save'); }")
        saved: dict[str, Any] = json.loads(self.file.read_text())
        return saved

    # Reading

    def check(self) -> None:
        """Raises where a cell failed or a widget is not shown."""
        for index, outputs in enumerate(self.page.evaluate("() => window.nb.outputs()")):
            for output in outputs:
                if output["output_type"] == "error":
                    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output["traceback"]))
                    raise HarnessError(f"cell {index}: {output['ename']}: {output['evalue']}\n{trace[-2000:]}")
        for words in WIDGET_ERRORS:
            if self.page.get_by_text(words).filter(visible=True).count():
                raise HarnessError(f"the page shows {words!r}\n" + "\n".join(self.console[-10:]))

    def output(self, index: int) -> Locator:
        """The output area of a cell."""
        return self.page.locator(".jp-CodeCell").nth(index).locator(".jp-Cell-outputArea")

    def output_text(self, index: int) -> str:
        """What a cell's output reads."""
        area = self.output(index)
        return area.inner_text() if area.count() else ""

    def wait_for(self, text: str | re.Pattern[str], *, cell: int | None = None, timeout: float = 30) -> None:
        """Waits until an output shows the text."""
        areas = self.page.locator(".jp-Cell-outputArea") if cell is None else self.output(cell)
        try:
            expect(areas.get_by_text(text).filter(visible=True).first).to_be_visible(timeout=timeout * 1000)
        except AssertionError:
            seen = "\n---\n".join(areas.all_inner_texts())
            console = "\n".join(self.console[-10:])
            raise HarnessError(f"{text!r} is not shown after {timeout} s\n{seen}\n{console}") from None

    # Widgets

    def button(self, label: str, *, cell: int | None = None) -> Locator:
        """The buttons of that label."""
        scope = self.page if cell is None else self.output(cell)
        name = re.compile(rf"^\s*{re.escape(label)}\s*$")
        return scope.locator("button.jupyter-button").filter(has_text=name)

    def click(self, label: str, *, cell: int | None = None, nth: int = 0) -> None:
        """Clicks a button."""
        self.button(label, cell=cell).nth(nth).click()

    # Pictures

    def theme(self, name: Literal["light", "dark"]) -> None:
        """Changes JupyterLab's theme."""
        full = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}[name]
        self.page.evaluate(
            "async theme => { await window.jupyterapp.commands.execute('apputils:change-theme', {theme}); }", full
        )
        self._wait_js(f"() => document.body.dataset.jpThemeLight === '{'true' if name == 'light' else 'false'}'")
        self.page.wait_for_timeout(300)

    def screenshot(self, path: Path) -> Path:
        """A picture of all cells: the window is made as high as they are."""
        size = self.page.viewport_size or {"width": 1280, "height": 1000}
        bottom = self.page.evaluate(
            """() => {
              const outer = document.querySelector('.jp-WindowedPanel-outer');
              if (outer) outer.scrollTop = 0;
              const ends = [...document.querySelectorAll('.jp-Cell')].map(cell => cell.getBoundingClientRect().bottom);
              return Math.max(300, ...ends);
            }"""
        )
        self.page.set_viewport_size({"width": size["width"], "height": int(min(bottom + 60, 12000))})
        self.page.wait_for_timeout(150)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path), animations="disabled", caret="hide")
        self.page.set_viewport_size(size)
        return path

    def close(self) -> None:
        """Ends the kernel and closes the page."""
        with contextlib.suppress(PlaywrightError):
            self.page.evaluate("async () => { await window.nb.panel().sessionContext.shutdown(); }")
        with contextlib.suppress(PlaywrightError):
            self.page.close(run_before_unload=False)

    def _wait_js(self, condition: str, timeout: float | None = None) -> None:
        limit = self._timeout if timeout is None else timeout
        try:
            self.page.wait_for_function(condition, timeout=limit * 1000, polling=50)
        except PlaywrightError as error:
            seen = "\n---\n".join(self.page.locator(".jp-Cell-outputArea").all_inner_texts())
            raise HarnessError(
                f"{condition} is not true after {limit} s ({error})\n{seen}\n{self._server.log()}"
            ) from None
