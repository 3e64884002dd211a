"""Methods of other packages in the registry: broken ones, and ones derived from built-in methods."""

from __future__ import annotations

import importlib.metadata
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import pytest

from nbpeft.engine.contract import registry
from nbpeft.engine.contract.adapter import Adapter, AdapterConfig
from nbpeft.engine.methods.lora.lora import LoRA
from tests.waiting import PATIENCE


@dataclass
class EntryPoint:
    """An entry point whose module is a function."""

    name: str
    load: Any
    value: str = "somewhere.methods"
    dist: Any = None


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Takes the entry points that are installed, none of which is loaded yet."""
    monkeypatch.setattr(registry, "_methods", [*registry.methods()])

    def installed(*entry_points: EntryPoint) -> None:
        monkeypatch.setattr(registry, "_entry_points_loaded", False)
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entry_points)

    return installed


def register_toy() -> None:
    class ToyConfig(AdapterConfig):
        pass

    class ToyAdapter(Adapter):
        pass

    assert registry.methods(), "a package may ask the registry while it is imported"
    registry.register(ToyConfig, peft_type="TOY", label="Toy")(ToyAdapter)


def fail() -> None:
    raise ImportError("no module named\n'gone'")


def test_a_broken_package_hides_no_other(install: Any) -> None:
    install(EntryPoint("broken", fail), EntryPoint("toy", register_toy))
    with pytest.warns(UserWarning) as caught:
        found = registry.methods()
    assert "Toy" in [method.label for method in found]
    assert [str(warning.message) for warning in caught] == [
        "the method 'broken' of the package somewhere.methods cannot be loaded and is left out: "
        "ImportError: no module named 'gone'"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.methods() == found


def test_another_thread_waits_until_all_packages_are_loaded(install: Any) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        loading.set()
        go_on.wait(PATIENCE)
        register_toy()

    found: list[list[str]] = []
    install(EntryPoint("toy", slow))
    threads = [
        threading.Thread(target=lambda: found.append([method.label for method in registry.methods()])) for _ in range(2)
    ]
    threads[0].start()
    assert loading.wait(PATIENCE)
    threads[1].start()
    threads[1].join(0.2)
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert [("Toy" in labels) for labels in found] == [True, True]


def test_an_interrupted_load_is_done_again(install: Any) -> None:
    attempts: list[None] = []

    def interrupted() -> None:
        attempts.append(None)
        if len(attempts) == 1:
            raise KeyboardInterrupt
        register_toy()

    install(EntryPoint("toy", interrupted))
    with pytest.raises(KeyboardInterrupt):
        registry.methods()
    assert "Toy" in [method.label for method in registry.methods()]


def test_an_adapter_belongs_to_the_nearest_registered_class(install: Any) -> None:
    class DerivedConfig(AdapterConfig):
        pass

    class Derived(LoRA):
        pass

    class Unregistered(Derived):
        pass

    registry.register(DerivedConfig, peft_type="DERIVED", label="Derived")(Derived)
    for cls, label in ((LoRA, "LoRA"), (Derived, "Derived"), (Unregistered, "Derived")):
        method = registry.method_of_adapter(cls.__new__(cls))
        assert method is not None and method.label == label
    assert registry.method_of_adapter(Adapter()) is None
