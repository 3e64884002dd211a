"""The first cells of the notebooks, which are the same in all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.notebooks.support import GALLERY, NOTEBOOKS
from tests.test_run_commands import script

headers = script("notebooks", "headers")
ADDRESS = '[project]\nname = "x"\n[project.urls]\nRepository = "{}"\n'


def _notebook(name: str) -> dict[str, Any]:
    return json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", headers.notebooks(), ids=lambda path: path.stem)
def test_every_notebook_begins_with_them(path: Path) -> None:
    name = path.relative_to(NOTEBOOKS).as_posix()
    notebook = _notebook(name)
    assert headers.with_header(notebook, name, headers.repository()) == notebook


def test_all_notebooks_are_found() -> None:
    assert headers.notebooks() == [*sorted(NOTEBOOKS.glob("*.ipynb")), *sorted(GALLERY.glob("*.ipynb"))]


@pytest.mark.parametrize("folder", [NOTEBOOKS, GALLERY], ids=lambda folder: folder.name)
def test_the_installation_finds_the_checkout_around_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cell would install, from where each notebook lies and from elsewhere."""
    (line,) = (line for line in headers.INSTALLATION.splitlines() if line.strip().startswith("source = "))
    for place, expected in ((folder, NOTEBOOKS.parent), (Path("/"), None)):
        monkeypatch.chdir(place)
        names: dict[str, Any] = {"Path": Path}
        exec(line.strip(), names)
        found = names["source"]
        assert Path(found).resolve() == expected if expected else found == "nbpeft"


def test_the_badge_follows_the_address_of_the_repository(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(ADDRESS.format("https://github.com/some-one/nb.peft"), encoding="utf-8")
    name = "03_qlora_training.ipynb"
    bare = headers.with_header(_notebook(name), name, "")
    shown = headers.with_header(bare, name, headers.repository(pyproject))
    *_, last = shown["cells"][0]["source"]
    assert last.endswith(
        "](https://colab.research.google.com/github/some-one/nb.peft/blob/main/notebooks/03_qlora_training.ipynb)"
    )
    assert headers.with_header(shown, name, "some-one/nb.peft") == shown, "written twice, it stands there once"
    assert headers.with_header(shown, name, "") == bare
    shown = headers.with_header(bare, "gallery/x.ipynb", "a/b")
    assert shown["cells"][0]["source"][-1].endswith("/a/b/blob/main/notebooks/gallery/x.ipynb)")


def test_an_address_that_colab_cannot_open_is_refused(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(ADDRESS.format("https://example.org/nbpeft"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"'https://example.org/nbpeft'; expected https://github.com/OWNER/NAME"):
        headers.repository(pyproject)
    pyproject.write_text('[project]\nname = "x"\n', encoding="utf-8")
    assert headers.repository(pyproject) == ""


def test_a_notebook_without_an_installation_is_refused() -> None:
    notebook = _notebook("01_lora_finetuning.ipynb")
    del notebook["cells"][1]
    with pytest.raises(ValueError, match="does not begin with a title and a cell that installs"):
        headers.with_header(notebook, "x.ipynb", "")
