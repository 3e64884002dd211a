"""Forecasts for SmolLM2-135M beside what its steps take: a table of ``forecast_table``, one process a row."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.examples import small_model_path
from nbpeft.memory import forecast
from nbpeft.memory.architecture import architecture_of
from nbpeft.memory.devices import device_memory
from nbpeft.model.quantization.quantize import load_quantized
from tests.memory.measured_peak import Step, real_step

CASES: tuple[dict[str, Any], ...] = (
    {"dtype": "float32", "batch_size": 4, "max_length": 128},
    {"dtype": "bfloat16", "batch_size": 4, "max_length": 128},
    {"dtype": "bfloat16", "batch_size": 2, "max_length": 512, "gradient_checkpointing": True},
    {"dtype": "bfloat16", "batch_size": 4, "max_length": 256, "training": False},
    {"dtype": "float32", "batch_size": 4, "max_length": 128, "quantization": "nf4"},
    {"dtype": "bfloat16", "batch_size": 4, "max_length": 128, "quantization": "nf4", "r": 64},
    {"dtype": "bfloat16", "batch_size": 4, "max_length": 256, "quantization": "nf4",
     "gradient_checkpointing": True},
    {"dtype": "bfloat16", "batch_size": 2, "max_length": 128, "quantization": "int8"},
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A forecast and what was measured for it, in bytes."""

    forecast: int
    step: Step

    @property
    def error(self) -> float:
        """By what share of the measured peak the forecast is too high."""
        return self.forecast / self.step.peak - 1


def measured(case: Mapping[str, Any]) -> Row:
    """Loads the model as a case says, forecasts from its config alone, and takes the step."""
    settings = dict(case)
    adapter = LoraConfig(r=settings.pop("r", 16), target_modules="all-linear", task_type="CAUSAL_LM")
    dtype, quantization = getattr(torch, settings.pop("dtype")), settings.pop("quantization", None)
    resident = device_memory(torch.device("cpu")).used
    model = _loaded(dtype, quantization)
    architecture = architecture_of(model.config, adapter)
    settings_there = {"dtype": dtype, "quantization": quantization, "device": "cpu", "gradient_checkpointing": False}
    foreseen = forecast(architecture, adapter, **settings_there | settings).peak_bytes
    return Row(foreseen, real_step(model, architecture, adapter, resident=resident, **settings))


def _loaded(dtype: torch.dtype, quantization: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    if quantization is None:
        return AutoModelForCausalLM.from_pretrained(small_model_path(), dtype=dtype)
    kind = {"bits": 8} if quantization == "int8" else {"quant_type": quantization}
    return load_quantized(small_model_path(), compute_dtype=dtype, **kind)


def in_a_process(case: Mapping[str, Any]) -> Row:
    """The same in a process of its own, so that what it holds is this model's."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(dict(case))], check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return Row(found["forecast"], Step(**found["step"]))


def table(cases: Iterable[Mapping[str, Any]] = CASES, measure: Callable[[Any], Row] = in_a_process) -> str:
    """Forecasts beside measurements, as Markdown."""
    lines = [
        "| Settings | Forecast | Allocated | Error | Saved for backward | Process grew by |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        row = measure(case)
        sizes = [_megabytes(count) for count in (row.forecast, row.step.peak)]
        others = [_megabytes(count) if count else "–" for count in (row.step.saved, row.step.process)]
        lines.append(f"| {' | '.join([words(case), *sizes, f'{100 * row.error:+.1f} %', *others])} |")
    return "\n".join(lines)


def words(case: Mapping[str, Any]) -> str:
    """The settings of a case, for a person."""
    parts = [
        case.get("quantization", ""),
        case["dtype"],
        f"batch {case['batch_size']}",
        f"length {case['max_length']}",
        f"r {case.get('r', 16)}",
        "checkpointing" if case.get("gradient_checkpointing") else "",
        "" if case.get("training", True) else "inference",
    ]
    return ", ".join(part for part in parts if part)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


if __name__ == "__main__":
    print(json.dumps(asdict(measured(json.loads(sys.argv[1])))))
