"""One server an application and one browser for all tests; a page and a kernel for each.

With ``--all`` a test runs in one of the applications, each file's tests by turns; with ``--long``, and where tests
are named without a tier, in both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.browser.harness import Browser, NotebookPage
from tests.browser.server import JupyterServer
from tests.effort import TIER

ROOT = Path(__file__).resolve().parent.parent.parent

FAILED = pytest.StashKey[bool]()

Opener = Callable[..., NotebookPage]
APPS = ("lab", "notebook")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves every second pair of application and test to the long run."""
    if TIER != "all":
        return
    turns: dict[Path, dict[object, int]] = {}
    for item in items:
        values = dict(getattr(getattr(item, "callspec", None), "params", {}))
        app = values.pop("app", None)
        if app is not None:
            known = turns.setdefault(item.path, {})
            turn = known.setdefault((item.name.partition("[")[0], str(values)), len(known))
            if app != APPS[turn % len(APPS)]:
                item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture
def notebook_folder(request: pytest.FixtureRequest, served_folder: Path) -> Path:
    """A folder for the notebooks of one test, so that no test finds the training runs of another."""
    folder = served_folder / f"{request.path.stem}-{_name_of(request)}"
    folder.mkdir(exist_ok=True)
    return folder


def _name_of(request: pytest.FixtureRequest) -> str:
    return re.sub(r"\W+", "-", request.node.name).strip("-")


@pytest.fixture(scope="session")
def server_of(served_folder: Path) -> Iterator[Callable[[Any], JupyterServer]]:
    """Starts a server for an application, once."""
    started: dict[str, JupyterServer] = {}
    with ExitStack() as stack:

        def start(app: Any) -> JupyterServer:
            if app not in started:
                variables = {"PYTHONPATH": str(ROOT)}
                started[app] = stack.enter_context(JupyterServer(served_folder, app, variables=variables))
            return started[app]

        yield start


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    with Browser(chromium) as started:
        yield started


@pytest.fixture(params=APPS)
def app(request: pytest.FixtureRequest) -> str:
    """JupyterLab and Notebook 7."""
    return str(request.param)


@pytest.fixture
def pictures() -> Path:
    """Where screenshots are kept."""
    folder = Path(os.environ.get("NBPEFT_ARTIFACTS", ROOT / "artifacts")) / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def open_notebook(
    request: pytest.FixtureRequest,
    app: str,
    server_of: Callable[[Any], JupyterServer],
    browser: Browser,
    notebook_folder: Path,
    pictures: Path,
) -> Iterator[Opener]:
    """Opens a notebook made of the given cells and of outputs already in the file, or a copy of a file."""
    pages: list[NotebookPage] = []
    name = _name_of(request)

    def open_cells(*cells: str, source: Path | None = None, shown: Sequence[dict[str, str]] = ()) -> NotebookPage:
        path = notebook_folder / f"{name}-{len(pages)}.ipynb"
        if source is not None:
            path.write_text(source.read_text())
        else:
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
            notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
            for bundle in shown:
                output = nbformat.v4.new_output("display_data", data=bundle)
                notebook.cells.append(nbformat.v4.new_code_cell("pass", execution_count=1, outputs=[output]))
            nbformat.write(notebook, path)
        pages.append(browser.open(server_of(app), f"{notebook_folder.name}/{path.name}"))
        return pages[-1]

    yield open_cells
    failed = request.node.stash.get(FAILED, False)
    for number, page in enumerate(pages):
        if failed:
            print("screenshot:", page.screenshot(pictures / f"FAILED-{name}-{number}.png"))
        page.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report
