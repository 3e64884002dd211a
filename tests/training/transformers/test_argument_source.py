"""What is read of ``TrainingArguments`` is what it is."""

from __future__ import annotations

import dataclasses
import enum
import subprocess
import sys
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from nbpeft.training.transformers.argument_source import tracker_names, training_arguments

READ = {argument.name: argument for argument in training_arguments()}
FIELDS = {item.name: item for item in dataclasses.fields(TrainingArguments) if item.init}


def test_it_has_every_field_in_order() -> None:
    assert list(READ) == list(FIELDS)
    assert tracker_names() == tuple(INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_read_as_it_is(name: str) -> None:
    item, read = FIELDS[name], READ[name]
    value: Any = item.default_factory() if item.default is dataclasses.MISSING else item.default  # type: ignore[misc]
    assert read.default == repr(value.value if isinstance(value, enum.Enum) else value)
    assert read.help == item.metadata.get("help", "")
    if set(read.choices) - {True, False, None}:
        assert getattr(value, "value", value) in read.choices
    assert "Enum" not in read.kind and not read.kind.endswith("Type")


def test_enums_and_flags_have_choices() -> None:
    assert {"linear", "cosine"} <= set(READ["lr_scheduler_type"].choices)
    assert {"adamw_torch", "sgd"} <= set(READ["optim"].choices)
    assert READ["bf16"].choices == (True, False)
    assert READ["tf32"].choices == (True, False, None)
    assert READ["learning_rate"].choices == ()


def test_nothing_is_imported_for_it() -> None:
    code = """\
import sys
from nbpeft.session.fields import fields
assert "cosine" in fields("training")["lr_scheduler_type"].choices
print([name for name in ("torch", "transformers", "accelerate", "peft") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
