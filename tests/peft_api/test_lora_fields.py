"""Every field of PEFT's LoraConfig: the same here, more, or refused with what to use. The guide's table is made here.

``python -m tests.peft_api.test_lora_fields`` prints the table.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.lora import config as peft_lora

import nbpeft
from nbpeft.errors import ConfigError

PAGE = Path(__file__).parents[2] / "notebooks" / "guide" / "methods.md"
COMMON = {field.name for field in dataclasses.fields(peft.PeftConfig)}
"""Fields of every method."""

MORE: dict[str, tuple[Any, str]] = {
    "alora_invocation_tokens": ([1, 2], "beam search works with it"),
    "alpha_pattern": ({"q_proj": 3}, "hundreds of patterns take one pass over the model"),
    "arrow_config": (
        peft_lora.ArrowConfig(top_k=2),
        "exact prototypes, computed again when weights change; adapters stay as they are; reads its own files",
    ),
    "corda_config": (
        peft_lora.CordaConfig(),
        "batches of any size; the base model stays as it is; saved as plain LoRA",
    ),
    "eva_config": (peft_lora.EvaConfig(), "where layers share an input, the directions of each are whitened once"),
    "init_lora_weights": ("pissa", "OLoRA, PiSSA, CorDA and LoRA-GA leave the base model as it is"),
    "kasa_config": (peft_lora.KasaConfig(), "the base model stays as it is; each loss has its terms once"),
    "layer_replication": (
        [[0, 2], [1, 3]],
        "can be merged; `unload()` restores the layers; several adapters share the replicas",
    ),
    "layers_pattern": ("layers", "patterns that could run forever are refused"),
    "loftq_config": (
        peft_lora.LoftQConfig(),
        "also 2 bits, embeddings and Conv1D; the scaling counts; needs no accelerator",
    ),
    "lora_bias": (True, "can be merged in 4 and 8 bits"),
    "lora_ga_config": (
        peft_lora.LoraGAConfig(),
        "initial values that can be reproduced; base model and file as with CorDA",
    ),
    "modules_to_save": (
        ["score"],
        "whole path segments: `score` does not match `underscore`, but in PEFT's files and for the head of a task",
    ),
    "monteclora_config": (
        peft_lora.MontecloraConfig(num_samples=2),
        "also on quantized layers; nothing is drawn in advance; a correct divergence, once in each loss",
    ),
    "rank_pattern": ({"q_proj": 2}, "hundreds of patterns take one pass over the model"),
    "target_modules": (["q_proj"], "a name that matches nothing is reported, with similar names"),
    "use_bdlora": (
        peft_lora.BdLoraConfig(target_modules_bd_a=["o_proj"], nblocks=2),
        "can be served as plain LoRA, combined and converted; also on quantized layers and Conv1D",
    ),
    "use_dora": (True, "norms computed from the factors; several can be active in any order"),
    "use_qalora": (
        True,
        "on every linear layer, where it merges; PEFT has it on GPTQ layers, and plain LoRA elsewhere",
    ),
    "velora_config": (peft_lora.VeloraConfig(num_groups=32), "also on quantized layers; inputs are not reconstructed"),
    "use_rslora": (True, "combining does not scale twice"),
}
"""Field -> a value, and what is more than PEFT's."""
SAME: dict[str, Any] = {
    "bias": "all",
    "exclude_modules": ["k_proj"],
    "fan_in_fan_out": True,
    "layers_to_transform": [0],
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "r": 4,
    "target_parameters": ["experts.down_proj"],
    "trainable_token_indices": [0, 1],
}
ACCEPTED: dict[str, tuple[Any, str]] = {
    "ensure_weight_tying": (
        True,
        "an embedding and what is tied to it share rows, copies or factors, and stay one weight when merged",
    ),
    "runtime_config": (
        nbpeft.LoraRuntimeConfig(ephemeral_gpu_offload=True),
        "nothing to do: DoRA's norms are computed where the layer computes, offloaded or not",
    ),
}
REFUSED: dict[str, Any] = {
    "megatron_config": {"tensor_model_parallel_size": 2},
}
BESIDE: dict[str, dict[str, Any]] = {
    "layers_pattern": {"layers_to_transform": [0]},
    "layers_to_transform": {"target_modules": ["q_proj"]},
    "alora_invocation_tokens": {"task_type": "CAUSAL_LM"},
    "corda_config": {"init_lora_weights": "corda"},
    "eva_config": {"init_lora_weights": "eva"},
    "loftq_config": {"init_lora_weights": "loftq"},
    "lora_ga_config": {"init_lora_weights": "lora_ga"},
}
"""Field -> what it needs beside it."""
VALUES = SAME | {name: value for name, (value, _) in (MORE | ACCEPTED).items()}


def test_every_field_has_a_line() -> None:
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)} - COMMON
    assert sorted(theirs) == sorted((*SAME, *MORE, *ACCEPTED, *REFUSED))
    assert theirs <= {field.name for field in dataclasses.fields(nbpeft.LoraConfig)}


@pytest.mark.parametrize("name", sorted(VALUES))
def test_a_field_is_taken_as_peft_takes_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)  # PEFT asks for scipy before it takes LoftQ
    if name in nbpeft.LoraConfig.not_implemented:
        pytest.skip("it is refused")
    given = {name: VALUES[name], **BESIDE.get(name, {})}
    ours, theirs = nbpeft.LoraConfig(**given), peft.LoraConfig(**given)
    found, expected = getattr(ours, name), getattr(theirs, name)
    if dataclasses.is_dataclass(expected):
        found, expected = dataclasses.asdict(found), dataclasses.asdict(expected)
    assert found == expected
    assert type(nbpeft.LoraConfig(**ours.to_dict())) is nbpeft.LoraConfig


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_field_is_refused_in_one_line_that_says_what_to_do(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not implemented; ") as failure:
        nbpeft.LoraConfig(**{name: REFUSED[name]})
    assert nbpeft.LoraConfig.instead[name] in str(failure.value) and "\n" not in str(failure.value)
    assert failure.value.details["field"] == name
    off = next(field for field in dataclasses.fields(nbpeft.LoraConfig) if field.name == name).default
    nbpeft.LoraConfig(**{name: off})


def table() -> str:
    """The guide's table of the fields."""
    lines = ["| field | here |", "|---|---|"]
    lines.append(f"| {', '.join(f'`{name}`' for name in sorted(SAME))} | as in PEFT |")
    lines += [f"| `{name}` | as in PEFT, and: {text} |" for name, (_, text) in sorted(MORE.items())]
    lines += [f"| `{name}` | taken; {text} |" for name, (_, text) in sorted(ACCEPTED.items())]
    lines += [f"| `{name}` | refused: {nbpeft.LoraConfig.instead[name]} |" for name in sorted(REFUSED)]
    return "\n".join(lines)


def test_the_guide_has_the_table() -> None:
    found = re.search(r"\| field \| here \|\n(\|.*\n)+", PAGE.read_text(encoding="utf-8"))
    assert found is not None and found[0].strip() == table()


if __name__ == "__main__":
    print(table())
