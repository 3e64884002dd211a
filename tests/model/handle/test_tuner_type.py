"""Scripts that replace functions of PEFT's tuners are told that nothing would call them."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from torch import nn

import nbpeft


@pytest.mark.parametrize("name", ["_create_and_replace", "_create_new_module", "_replace_module"])
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
