"""Writes ``reference.md`` from signatures and docstrings: ``python notebooks/reference.py``.

griffe reads the sources, nothing is imported; griffe2md renders each public name of ``nbpeft/__init__.pyi``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import griffe
import griffe2md

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "notebooks" / "reference.md"
COMMAND = "python notebooks/reference.py"

_HEAD = f"""\
# Reference

Every public name of `nbpeft`, written from the docstrings by `{COMMAND}`.
`%lora help` in a notebook explains cells and commands.
"""
_SETTINGS: dict[str, object] = {
    "filters": [],
    "heading_level": 3,
    "inherited_members": False,
    "members_order": "source",
    "show_category_heading": False,
    "show_root_full_path": False,
    "show_root_members_full_path": False,
    "show_object_full_path": False,
    "show_signature_annotations": True,
    "summary": False,
}
_ORDER = {griffe.Kind.CLASS: "Classes", griffe.Kind.FUNCTION: "Functions"}
_LINK = re.compile(r"\[([^\[\]]*)\]\(#[^()]*\)")
_SIGNATURE = re.compile(r"```python\n(\w+\(.*\).*)\n```")
_MARK = "# next signature"


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description="Writes all public names with their signatures and docstrings.")
    parser.add_argument("--to", type=Path, default=PAGE, metavar="FILE", help=f"the page (default: {PAGE.name} here)")
    parser.parse_args().to.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    package = griffe.load("nbpeft", search_paths=[ROOT], docstring_parser="google", allow_inspection=False)
    assert isinstance(package, griffe.Module)
    stub = griffe.visit("stub", PAGE, (ROOT / "nbpeft" / "__init__.pyi").read_text(encoding="utf-8"))
    found = {name: _object(package, name) for name, member in stub.members.items() if _is_public(member)}
    parts = [_HEAD]
    for kind, title in _ORDER.items():
        named = {name: item for name, item in sorted(found.items()) if item.kind is kind}
        parts.append(f"## {title}\n\n" + ", ".join(f"[{name}](#{name.lower()})" for name in named) + "\n")
        parts += [_rendered(name, item) for name, item in named.items()]
    return _with_signatures_in_lines("\n".join(parts))


def _is_public(member: griffe.Object | griffe.Alias) -> bool:
    return member.is_alias and member.name != "Any"


def _object(package: griffe.Module, name: str) -> griffe.Object:
    """The class or function behind a public name."""
    found = package.members[name]
    while True:
        if isinstance(found, griffe.Alias):
            found = found.final_target
        elif isinstance(found, griffe.Module):  # of the same name as the function in it
            found = found.members[name]
        elif isinstance(found, griffe.Attribute) and isinstance(found.value, griffe.ExprName):  # Name = AnotherName
            found = package.modules_collection[found.value.canonical_path]
        else:
            return found


def _rendered(name: str, item: griffe.Object) -> str:
    """A class or a function under its public name, with those methods of it that are public and say what they do."""
    item.name = name
    for key, member in list(item.members.items()):
        if key != "__init__" and (key.startswith("_") or not member.has_docstring or not member.is_function):
            del item.members[key]
    text = griffe2md.render_object_docs(item, dict(_SETTINGS), format_md=False)
    text = re.sub("</?code>|(?<!`)``(?!`)", "`", _LINK.sub(r"\1", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _with_signatures_in_lines(text: str) -> str:
    """The page with long signatures broken by ruff, which breaks them in the project's sources too."""
    code = "".join(f"def {signature}: ...\n{_MARK}\n" for signature in _SIGNATURE.findall(text))
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "100", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, check=True)
    signatures: Sequence[str] = [part.strip() for part in done.stdout.split(_MARK)]
    broken = (signature.removeprefix("def ").removesuffix(": ...") for signature in signatures)
    return _SIGNATURE.sub(lambda _: f"```python\n{next(broken)}\n```", text)


if __name__ == "__main__":
    main()
