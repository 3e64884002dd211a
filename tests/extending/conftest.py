"""Third parties' methods, each registered for one test."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from nbpeft.engine.contract import registry


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of this folder anew, which registers its method; it is forgotten after the test."""

    def imported(name: str) -> ModuleType:
        monkeypatch.setattr(registry, "_methods", [*registry.methods()])
        monkeypatch.delitem(sys.modules, f"tests.extending.{name}", raising=False)
        return importlib.import_module(f"tests.extending.{name}")

    return imported
