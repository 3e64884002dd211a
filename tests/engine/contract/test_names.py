"""How many names the author of a method meets, and that the guide's page says what each is for."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import nbpeft.methods
from nbpeft.engine.contract.registry import Method

PAGE = Path(__file__).parents[3] / "notebooks" / "guide" / "writing-a-method.md"
MOST_NAMES = 60


def names() -> list[str]:
    """Public names of ``nbpeft.methods``, arguments of ``register``, members of ``Adapter`` and of ``MethodConfig``.

    A name that several of these have counts each time.
    """
    config = nbpeft.methods.MethodConfig
    classes = [cls for cls in nbpeft.methods.Adapter.__mro__ if cls.__module__.startswith("nbpeft.")]
    groups: tuple[set[str], ...] = (
        set(nbpeft.methods.__all__),
        {field.name for field in dataclasses.fields(Method)},
        {name for cls in classes for name in vars(cls)},
        {*vars(config), *config.__annotations__},
    )
    return [name for group in groups for name in group if not name.startswith("_")]


def test_the_contract_has_few_names() -> None:
    assert len(names()) <= MOST_NAMES


def test_the_guides_page_names_them_all() -> None:
    text = re.sub(r"```.*?```", "", PAGE.read_text("utf-8"), flags=re.DOTALL)  # examples explain nothing
    code = " ".join(re.findall(r"`([^`]+)`", text))
    missing = set(names()) - set(re.findall(r"\w+", code))
    assert not missing
