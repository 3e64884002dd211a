"""The rooms of the package: small folders, each with a docstring that says what other rooms import from it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import nbpeft

PACKAGE = Path(nbpeft.__file__).parent
MOST_FILES = 25
DOOR, INSIDE = "Door, what other rooms import:", "Inside:"


def name_of(file: Path) -> str:
    """Full name of the module in a file of the package."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imported() -> dict[str, set[str]]:
    """Module -> the modules of the package it imports, inside functions and for type checkers too."""
    names = {name_of(file) for file in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        asked = {(str(node.module), alias.name) for node in nodes for alias in node.names}
        found[name_of(file)] = {both if (both := f"{home}.{name}") in names else home for home, name in asked} & names
    return found


def listed(docstring: str, title: str) -> list[str]:
    """The files under a title of a room's docstring."""
    _, _, rest = docstring.partition(title)
    return re.findall(r"^    (\w+)\.py ", rest.partition(INSIDE if title == DOOR else DOOR)[0], re.MULTILINE)


ROOMS = {
    name_of(file): docstring
    for file in sorted(PACKAGE.rglob("__init__.py"))
    if (docstring := ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "")
    and (DOOR in docstring or INSIDE in docstring)
}


def test_no_folder_is_crowded() -> None:
    counts = {folder: len(list(folder.glob("*.py"))) for folder in PACKAGE.rglob("*") if folder.is_dir()}
    assert {str(folder.relative_to(PACKAGE)) for folder, count in counts.items() if count > MOST_FILES} == set()


def test_engine_model_and_training_are_rooms() -> None:
    floors = [PACKAGE / name for name in ("engine", "model", "training")]
    assert [file.name for floor in floors[:2] for file in floor.glob("*.py") if file.name != "__init__.py"] == []
    assert len(ROOMS) >= 20


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_names_its_files_and_its_door(room: str) -> None:
    """Each file is named once, and other rooms import those of the door and no other."""
    folder = PACKAGE.parent / room.replace(".", "/")
    door, inside = listed(ROOMS[room], DOOR), listed(ROOMS[room], INSIDE)
    assert sorted(door + inside) == sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
    outside = {module: names for module, names in imported().items() if not f"{module}.".startswith(f"{room}.")}
    used = {
        name.removeprefix(f"{room}.") for names in outside.values() for name in names if name.startswith(f"{room}.")
    }
    assert {name for name in used if "." not in name} == set(door)
