"""What counts as secret, and what only sounds like it."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import TrainingArguments

from nbpeft.confidential import is_secret, masked, without_secrets
from nbpeft.errors import ConfigError
from nbpeft.model.swapping.host_cache import AdapterSource

TOKEN = "hf_" + "aB3d" * 8


@pytest.mark.parametrize(
    "name", ["token", "hub_token", "push_to_hub_token", "HF_TOKEN", "password", "api_key", "WANDB_API_KEY", "secret"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name, "abc")
    assert not any(is_secret(name, value) for value in (None, "", True, False))


@pytest.mark.parametrize("value", [TOKEN, f"https://hub/{TOKEN}", "https://me:pw@hub.co/x", "ghp_" + "a1" * 18])
def test_values_that_are_secrets_under_any_name(value: str) -> None:
    assert is_secret("run_name", value)
    assert masked(value) != value and TOKEN not in masked(value) and "pw" not in masked(value)


def test_what_only_sounds_like_one() -> None:
    for name, value in {
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "max_tokens": "3",
        "tokenizer": "x",
        "key": "q",
    }.items():
        assert not is_secret(name, value)
    usual = {field.name: "x" for field in dataclasses.fields(TrainingArguments)}
    assert without_secrets(usual)[1] == ("hub_token",)
    for text in ("hf_hub_download", "meta-llama/Llama-3", "https://host:8080/a@b", "sk-learn", "a" * 40):
        assert masked(text) == text


def test_secrets_inside_of_values() -> None:
    given = {"lr": 1, "kwargs": {"token": "t", "deep": {"password": "p", "n": 1}}, "urls": ["a", [{"token": "t"}]]}
    kept, left_out = without_secrets(given)
    assert kept == {"lr": 1, "kwargs": {"deep": {"n": 1}}}
    assert left_out == ("kwargs.token", "kwargs.deep.password", "urls")


def test_neither_messages_nor_places_show_one() -> None:
    error = ConfigError(f"report_to must be a list, not {TOKEN!r}")
    assert TOKEN not in str(error) + repr(error) + error.message
    assert TOKEN not in repr(AdapterSource("org/name", {"token": TOKEN}))
