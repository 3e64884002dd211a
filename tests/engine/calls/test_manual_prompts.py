"""Who puts a prompt into a call: the engine, or the script that has asked for it."""

from __future__ import annotations

import contextvars
from types import SimpleNamespace
from typing import Any

import torch

from nbpeft.engine.calls.manual_prompts import inserting_prompts, is_put_in, note_requested


def test_a_call_of_the_handle_leaves_what_a_script_has_asked_for() -> None:
    layer: Any = SimpleNamespace(_shared_state=lambda: None)
    embedded = {"inputs_embeds": torch.zeros(1, 1, 1)}

    def script() -> None:
        note_requested()
        with inserting_prompts():
            assert not is_put_in(layer, embedded, None)
        assert is_put_in(layer, embedded, None)

    contextvars.copy_context().run(script)
