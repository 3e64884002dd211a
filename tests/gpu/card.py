"""The card that is measured on, its name and its memory."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shutil
import subprocess

import torch


def card_of(device: torch.device) -> str:
    """Card, memory, driver, CUDA, versions and date, in one line."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        name = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, driver {_driver()}, CUDA {torch.version.cuda}"
    else:
        name = f"{platform.machine()} {device.type.upper()}, {torch.get_num_threads()} threads"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft")]
    return ", ".join([name, *versions, datetime.datetime.now(datetime.UTC).date().isoformat()])


def finish(device: torch.device) -> None:
    """Waits until the card has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    return lines[0] if lines else "unknown"
