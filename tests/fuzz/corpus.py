"""Files that once were read wrongly, took too long, or were refused in many lines: each failed, none may fail again.

A file that fuzzing finds, or that a user reports, is added here in its smallest form. The tests of each reader check
the message; ``test_folders.py`` reads each file in every way in which a folder gets into a process.
"""

from __future__ import annotations

import json
from typing import Any

DEEP = 100_000


def weights(header: Any, count: int = 8, length: int | None = None) -> bytes:
    """A file of tensors with a header that may describe something else."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + b"\1" * count


def entry(**changes: Any) -> dict[str, Any]:
    """What a header says of a tensor of two numbers."""
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


CONFIGS: dict[str, tuple[str, str]] = {
    "cut off": ("{", "not valid JSON"),
    "a list": ("[]", "peft_type"),
    "no method": ('{"r": 8}', "peft_type"),
    "another method": ('{"peft_type": "LORRA"}', "Did you mean 'LORA'"),
    "a negative rank": ('{"peft_type": "LORA", "r": -1}', "r must be"),
    "nested": ('{"peft_type": "LORA", "auto_mapping": ' + "[" * 40 + "]" * 40 + "}", "nested too deeply"),
    "deep": ('{"peft_type": "LORA", "auto_mapping": ' + "[" * DEEP + "]" * DEEP + "}", "nested too deeply"),
    "many digits": ('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "a number of 5,000 digits"),
    "many names": (
        '{"peft_type": "LORA", "target_modules": [' + ",".join(['"a"'] * 200_000) + "]}",
        "more than 150,000 entries",
    ),
    "many lists": ('{"peft_type": "LORA", "x": [' + "[]," * 200_000 + "[]]}", "more than 150,000 entries"),
}
"""``adapter_config.json`` -> what the message says."""

WEIGHTS: dict[str, tuple[bytes, str]] = {
    "no JSON": (weights(b"{"), "cannot be read"),
    "a list": (weights([]), "its header is not a JSON object"),
    "deep": (weights(b"[" * DEEP), "cannot be read"),
    "another dtype": (weights({"a": entry(dtype="F4")}), "its dtype 'F4' is not known here"),
    "no dtype": (weights({"a": {}}), "has no dtype for 'a'"),
    "no entry": (weights({"a": 3}), "has no dtype for 'a'"),
    "no shape": (weights({"a": entry(shape=None)}), "lacks the shape or the offsets of 'a'"),
    "a shape by name": (weights({"a": entry(shape={}, data_offsets=[0, 4])}, 4), "lacks the shape or the offsets of"),
    "negative": (weights({"a": entry(shape=[-2])}), "the shape or the offsets of 'a' are not valid"),
    "truth": (weights({"a": entry(shape=[True, 2])}), "the shape or the offsets of 'a' are not valid"),
    "huge": (weights({"a": entry(shape=[2**40, 2**40])}), "'a' has more or fewer bytes than its shape says"),
    "too many bytes": (weights({"a": entry(shape=[1])}), "'a' has more or fewer bytes than its shape says"),
    "three places": (weights({"a": entry(data_offsets=[0, 4, 8])}), "lacks the shape or the offsets of 'a'"),
    "backwards": (weights({"a": entry(data_offsets=[8, 0])}), "'a' has more or fewer bytes than its shape says"),
    "overlapping": (weights({"a": entry(), "b": entry()}), "its tensors overlap"),
    "a gap": (
        weights({"a": entry(shape=[1], data_offsets=[4, 8])}),
        "its tensors overlap, or there are other bytes between",
    ),
    "cut off": (weights({"a": entry(shape=[4], data_offsets=[0, 16])}), "its tensors end at byte"),
    "something behind": (weights({"a": entry(shape=[1], data_offsets=[0, 4])}), "its tensors end at byte"),
    "metadata": (weights({"a": entry(), "__metadata__": {"x": 1}}), "its metadata is not a mapping of strings"),
}
"""``adapter_model.safetensors`` -> what the message says."""

STATES: dict[str, tuple[str, str]] = {
    "a list": ("[1]", "trainer_state.json contains a list, not an object"),
    "infinite": ('{"global_step": 1e999}', "trainer_state.json: global_step is inf"),
    "half a step": ('{"max_steps": 2.5}', "trainer_state.json: max_steps is 2.5"),
    "negative": ('{"global_step": -1}', "trainer_state.json: global_step is -1"),
    "no number": ('{"epoch": NaN}', "trainer_state.json: epoch is nan"),
    "no log": ('{"log_history": 3}', "trainer_state.json: log_history is 3"),
    "no callbacks": ('{"stateful_callbacks": []}', "trainer_state.json: stateful_callbacks is []"),
    "another version": (
        '{"of_another": 1}',
        "trainer_state.json has a field 'of_another' that this version of transformers does not",
    ),
    "losses that are no numbers": (
        '{"best_metric": NaN, "log_history": [{"loss": NaN}], "global_step": 6, "max_steps": 6}',
        "",
    ),
}
"""``trainer_state.json`` of a checkpoint -> why it cannot be resumed from; empty if it can."""

VALUES = (
    *("1e999", "-1e999", "NaN", "Infinity", "1e300", "-1", "1.5", "1" + "0" * 400, "9" * 5000, str(2**63), "null"),
    *("true", '""', '"x"', '"\\ud800"', '"\\u0000\\u001b[31m\\n"', '"<script>"', f'"{"x" * 100_000}"', "[]", "{}"),
    *('["a"]', '[["x"]]', '{"a": 1}', '{"a": {"b": []}}', '{"": null}', "[" * 5000 + "]" * 5000, "[1e999]", "nothing"),
    *(json.dumps([f"name{number}" for number in range(3000)]), json.dumps(dict.fromkeys(map(str, range(3000)), 1))),
    *('["' + "x" * 100_000 + '"]', '{"' + "x" * 100_000 + '": 1}'),
)
"""Values of a field of ``run.json``, or of a line of a curve, as JSON has them."""

READS: dict[str, tuple[int, ...]] = {"resume": (7, 38, 101, 194, 195, 232, 260, 268, 285, 322, 727, 740)}
"""Calls that read a run which is resumed -> those whose failure once was told as damage, or raised as it is."""
