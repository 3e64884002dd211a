"""The first cells of the notebooks, which are the same in all."""

from __future__ import annotations

import json
import re
from glob import glob
from pathlib import Path
from typing import Any

import pytest

from tests.notebooks.support import GALLERY, NOTEBOOKS
from tests.published import LINK
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


@pytest.mark.parametrize("path", headers.notebooks(), ids=lambda path: path.stem)
def test_the_numbers_are_collapsed(path: Path) -> None:
    """Source and outputs of the summary are hidden; its title is what JupyterLab and Colab show of it."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    summaries = [cell for cell in cells if "summary" in cell["metadata"].get("tags", ())]
    assert summaries, "notebooks/execute.py reports it"
    for cell in summaries:
        assert cell["metadata"]["jupyter"] == {"outputs_hidden": True, "source_hidden": True}
        assert cell["metadata"]["collapsed"] and cell["metadata"]["cellView"] == "form"
        assert cell["source"][0] == headers.SUMMARY and cell["outputs"]
    known = [{**hidden, "tags": [tag]} for tag, hidden in headers.COLLAPSED.items()]
    assert all(cell["metadata"] in known for cell in cells if "jupyter" in cell["metadata"])


@pytest.mark.parametrize("path", headers.notebooks(), ids=lambda path: path.stem)
def test_no_notebook_excuses_its_figures(path: Path) -> None:
    text = "".join(line for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] for line in cell["source"])
    assert not re.search(r"other\s+programs|busy\s+machine|(?<!-)quiet|was\s+stored", text, re.I)


def test_all_notebooks_are_found() -> None:
    assert headers.notebooks() == [*sorted(NOTEBOOKS.glob("*.ipynb")), *sorted(GALLERY.glob("*.ipynb"))]


@pytest.mark.parametrize("folder", [NOTEBOOKS, GALLERY], ids=lambda folder: folder.name)
def test_the_installation_finds_the_checkout_around_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cell would install, from where each notebook lies and from elsewhere."""
    text = headers.installation("")
    (start, end) = (text.index(line) for line in ("places =", "needed ="))
    for place, expected in ((folder, NOTEBOOKS.parent), (Path("/"), None)):
        monkeypatch.chdir(place)
        names: dict[str, Any] = {"glob": glob}
        exec(text[start:end], names)
        found = [Path(source.strip('"').removesuffix("[bnb,notebook]")).resolve() for source in names["sources"]]
        assert found == ([expected] if expected else [])


@pytest.mark.parametrize("repository", ["", "some-one/nb.peft"])
def test_no_notebook_asks_an_index_for_nbpeft(repository: str) -> None:
    """The name may be another's there: nbpeft comes from a folder, a file or an address."""
    text = headers.installation(repository)
    compile(text.replace("%pip install --quiet {source}", "pass"), "cell", "exec")
    assert ("nbpeft[bnb,notebook] @ https://github.com/some-one/nb.peft/releases/download/v" in text) == bool(
        repository
    )
    assert not re.search(r"pip install[^@\n]*nbpeft", text)


def _links(notebook: dict[str, Any]) -> list[str]:
    texts = ("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    return [link for text in texts for link in LINK.findall(text) if "colab" not in link]


@pytest.mark.parametrize("path", headers.notebooks(), ids=lambda path: path.stem)
def test_links_are_absolute_with_an_address_and_relative_without(path: Path) -> None:
    there, name = f"https://github.com/a/b/blob/v{headers.version()}/notebooks/", path.relative_to(NOTEBOOKS).as_posix()
    plain = _notebook(name)
    shown = headers.with_header(plain, name, "a/b")
    for before, after in zip(_links(plain), _links(shown), strict=True):
        inside = "://" not in before and not before.startswith("#")
        assert after.startswith(there) if inside else after == before
        assert not inside or (NOTEBOOKS / after.removeprefix(there).partition("#")[0]).is_file()
    assert headers.with_header(shown, name, "c/d") == headers.with_header(plain, name, "c/d")
    assert headers.with_header(shown, name, "") == plain


def test_some_notebooks_have_links_to_others_and_to_the_guide() -> None:
    links = {link for path in headers.notebooks() for link in _links(_notebook(path.relative_to(NOTEBOOKS).as_posix()))}
    assert {"02_your_own_data.ipynb", "guide/preferences.md"} <= links


def test_the_badge_follows_the_address_of_the_repository(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(ADDRESS.format("https://github.com/some-one/nb.peft"), encoding="utf-8")
    name = "03_qlora_training.ipynb"
    bare = headers.with_header(_notebook(name), name, "")
    shown = headers.with_header(bare, name, headers.repository(pyproject))
    *_, last = shown["cells"][0]["source"]
    assert last.endswith(
        "](https://colab.research.google.com/github/some-one/nb.peft/blob/"
        f"v{headers.version()}/notebooks/03_qlora_training.ipynb)"
    )
    assert headers.with_header(shown, name, "some-one/nb.peft") == shown, "written twice, it stands there once"
    assert headers.with_header(shown, name, "") == bare
    shown = headers.with_header(bare, "gallery/x.ipynb", "a/b")
    assert shown["cells"][0]["source"][-1].endswith(f"/a/b/blob/v{headers.version()}/notebooks/gallery/x.ipynb)")


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
