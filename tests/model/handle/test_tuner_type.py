"""Scripts that replace functions of PEFT's tuners are told that nothing would call them."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from torch import nn

import nbpeft
from nbpeft.engine.injection import redirects


@pytest.mark.parametrize("name", ["_create_new_module", "_replace_module"])
def test_a_function_that_would_not_be_called_is_neither_there_nor_put_there(name: str) -> None:
    assert hasattr(peft.LoraModel, name) and not hasattr(nbpeft.LoraModel, name)
    line = rf"LoraModel\.{name} would never be called.*_register_custom_module"
    with pytest.raises(AttributeError, match=line):
        getattr(nbpeft.LoraModel, name)
    with pytest.raises(nbpeft.NotSupportedError, match=line):
        setattr(nbpeft.LoraModel, name, lambda self: None)
    with pytest.raises(AttributeError, match="'LoraModel' has no attribute '_nothing'"):
        _ = nbpeft.LoraModel._nothing
    nbpeft.LoraModel._flag = True
    del nbpeft.LoraModel._flag


def test_a_class_that_overrides_one_is_refused_before_the_model_changes() -> None:
    class Own(nbpeft.LoraModel):  # type: ignore[misc, valid-type]
        @staticmethod
        def _create_new_module(config: Any, name: str, target: nn.Module, **kwargs: Any) -> Any:
            return None

    class Further(Own):
        pass

    base = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(nbpeft.NotSupportedError, match=r"Own\._create_new_module would never be called"):
        Further(base, nbpeft.LoraConfig(target_modules=["0"]), "default")
    assert type(base[0]) is nn.Linear

    class Plain(nbpeft.LoraModel):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.mine = 1

    assert Plain(base, nbpeft.LoraConfig(target_modules=["0"]), "default").mine == 1


class Clipped(nn.Module):
    """A layer around a linear one, which PEFT does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.linear(x).clamp(-1, 1)


class Scanned(nn.Linear):
    """A linear layer that a script leaves out."""


def wrapped(library: Any, called: list[tuple[str, str]]) -> Any:
    """What axolotl and ms-swift put there."""
    original = library.LoraModel._create_and_replace

    def patched(
        self: Any, config: Any, name: str, target: Any, at: str, parent: Any, current_key: Any = None, **kw: Any
    ):
        called.append((name, current_key))
        if isinstance(target, Clipped):
            return original(self, config, name, target.linear, "linear", target, current_key=current_key, **kw)
        if isinstance(target, Scanned):
            return None
        return original(self, config, name, target, at, parent, current_key=current_key, **kw)

    return patched


def test_a_wrapper_is_called_for_each_target_and_may_send_it_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted: dict[str, list[str]] = {}
    calls: dict[str, list[tuple[str, str]]] = {}
    for library in (peft, nbpeft):
        base = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Clipped(), "c": Scanned(4, 4)})
        called = calls[library.__name__] = []
        with monkeypatch.context() as patch:
            patch.setattr(library.LoraModel, "_create_and_replace", wrapped(library, called))
            library.LoraModel._origin = library.LoraModel._create_and_replace
            model = library.get_peft_model(base, library.LoraConfig(target_modules=["a", "b", "c"]), "mine")
            library.get_peft_model(nn.Sequential(nn.Linear(4, 4)), library.VeraConfig(target_modules=["0"]))
        adapted[library.__name__] = [name for name, _ in model.named_parameters() if "lora_A" in name]
        del library.LoraModel._origin
    assert adapted["nbpeft"] == adapted["peft"] and calls["nbpeft"] == calls["peft"] != []
    nbpeft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), nbpeft.LoraConfig(target_modules=["0"]))
    assert len(calls["nbpeft"]) == 3 and not redirects._redirects  # not called once it is restored


def test_a_function_that_replaces_modules_itself_is_refused_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def replaces(self: Any, config: Any, name: str, target: Any, at: str, parent: Any, current_key: Any = None) -> None:
        setattr(parent, at, nn.Identity())

    monkeypatch.setattr(nbpeft.LoraModel, "_create_and_replace", replaces)
    base = nn.Sequential(nn.Linear(4, 4))
    layer = base[0]
    with pytest.raises(nbpeft.NotSupportedError, match="_create_and_replace"):
        nbpeft.get_peft_model(base, nbpeft.LoraConfig(target_modules=["0"]))
    assert base[0] is layer


def test_a_derived_class_with_one_of_its_own_is_refused() -> None:
    class Own(nbpeft.LoraModel):  # type: ignore[misc, valid-type]
        def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
            return None

    with pytest.raises(nbpeft.NotSupportedError, match="_create_and_replace"):
        Own(nn.Sequential(nn.Linear(4, 4)), nbpeft.LoraConfig(target_modules=["0"]), "default")
