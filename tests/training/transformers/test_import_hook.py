from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from nbpeft.training.transformers.import_hook import ImportHook


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a module that can be imported and is not."""
    package = tmp_path / "late_example"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "late_example.part"
    for name in ("late_example.part", "late_example"):
        sys.modules.pop(name, None)


def test_it_tells_when_a_module_is_imported_and_then_is_gone(module: str) -> None:
    seen: list[ModuleType] = []
    finder = ImportHook({module: seen.append})
    assert finder in sys.meta_path and not seen
    imported = importlib.import_module(module)
    assert seen == [imported] and imported.VALUE == 7
    assert finder not in sys.meta_path
    assert isinstance(imported.__loader__, importlib.machinery.SourceFileLoader)
    assert imported.__spec__ is not None and imported.__spec__.loader is imported.__loader__
    importlib.reload(imported)
    assert len(seen) == 1


def test_what_is_imported_already_is_told_at_once(module: str) -> None:
    imported = importlib.import_module(module)
    seen: list[ModuleType] = []
    finder = ImportHook({module: seen.append})
    assert seen == [imported] and finder not in sys.meta_path


def test_what_came_in_another_way_is_told_when_it_is_asked(module: str) -> None:
    seen: list[ModuleType] = []
    finder = ImportHook({module: seen.append})
    sys.modules[module] = made = ModuleType(module)
    finder.run_pending()
    assert seen == [made] and finder not in sys.meta_path


def test_a_module_that_does_not_exist_is_missing_as_ever(module: str) -> None:
    finder = ImportHook({"late_example.absent": lambda module: None})
    with pytest.raises(ModuleNotFoundError, match=r"late_example\.absent"):
        importlib.import_module("late_example.absent")
    finder.remove()
    assert finder not in sys.meta_path


def test_a_module_that_fails_is_told_only_when_it_succeeds(module: str, tmp_path: Path) -> None:
    path = tmp_path / "late_example" / "part.py"
    path.write_text("raise ValueError('broken')\n")
    seen: list[ModuleType] = []
    finder = ImportHook({module: seen.append})
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module(module)
    assert not seen and finder in sys.meta_path
    path.write_text("VALUE = 'a longer file, so that no cached one is taken'\n")
    importlib.import_module(module)
    assert len(seen) == 1


def test_stopped_it_tells_nothing(module: str) -> None:
    seen: list[ModuleType] = []
    ImportHook({module: seen.append}).remove()
    importlib.import_module(module)
    assert not seen
