"""Trainers of TRL on models of ours learn what they learn on PEFT's, from the same starting adapter.

TRL is not one of the environment's packages: each version is installed without dependencies into a
folder of its own, a few MB, that is put before the environment's packages in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.packages import installed
from tests.closeness import assert_close
from tests.training.trl_run import STEPS, write_adapters

ROOT = Path(__file__).parents[2]
NEWEST, OLDER = "1.16.0", "1.6.0"
SFT = ("sft", "sft-nll", "sft-chunked", "sft-completion", "sft-assistant", "sft-packing")
CASES = (*SFT, "dpo", "kto", "reward", "grpo", "orpo")
SUMMANDS: dict[str, dict[str, Any]] = {"grpo": {"scale": 1.0, "terms": 32, "depth": 1}}
"""Of a loss that is less than what it adds up: GRPO's advantages, of size 1 and for 4 answers of 8 tokens, sum to 0."""
TRAINERS = ("sft", "sft-chunked", "dpo", "kto", "reward", "grpo", "orpo")
"""Each Trainer: what differs between the ways to import nbpeft is which models a Trainer recognizes, not the rows."""
SPECIAL = ("sft-config", "sft-head")


def results(version: str, folder: Path, cases: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """What each side learned in its cases; the sides run beside each other."""
    packages = installed(f"trl=={version}")
    write_adapters(folder)
    variables = {"PYTHONPATH": f"{packages}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running = {}
    for side, names in cases.items():
        command = [sys.executable, str(ROOT / "tests/training/trl_run.py"), side, str(folder)]
        with (folder / f"{side}.log").open("w") as log:
            running[side] = subprocess.Popen(
                [*command, str(folder / f"{side}.json"), *names],
                env=os.environ | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    for side, process in running.items():
        assert process.wait(timeout=600) == 0, (folder / f"{side}.log").read_text()[-3000:]
    return {side: json.loads((folder / f"{side}.json").read_text()) for side in cases}


def compare(ours: dict[str, Any], theirs: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        one, other = ours[name], theirs[name]
        assert "error" not in other, f"{name}: PEFT: {other['trace']}"
        assert "error" not in one, f"{name}: {one['trace']}"
        assert (one["library"], other["library"]) == ("nbpeft", "peft")
        assert one["learned"] == other["learned"] and len(one["learned"]) == STEPS, name
        assert_close(one["losses"], other["losses"], message=name, **SUMMANDS.get(name, {}))
        assert len(one["losses"]) == STEPS, name
        assert_close(one["grad_norms"], other["grad_norms"], message=name)
        assert min(one["grad_norms"]) > 0
        assert one["files"] == other["files"] == ["adapter_model.safetensors"], name


def check_counts(found: dict[str, Any]) -> None:
    """The masks of the cases are masks: else equal counts would show nothing."""
    whole, completions, replies = (
        [batch["labels"] for batch in found[name]["learned"]] for name in ("sft", "sft-completion", "sft-assistant")
    )
    assert all(part < all_of_it for part, all_of_it in zip(completions, whole, strict=True))
    masks = [batch["attention_mask"] for batch in found["sft-assistant"]["learned"]]
    assert all(part < all_of_it for part, all_of_it in zip(replies, masks, strict=True))
    assert all(batch["position_ids"] < 4 * 32 * 31 / 2 for batch in found["sft-packing"]["learned"]), "rows are packed"


@pytest.mark.slow
def test_every_trainer_learns_as_with_peft_installed_or_not(tmp_path: Path) -> None:
    alone = tuple(name for name in CASES if name != "sft-nll")
    compared = {"nbpeft": CASES, "alone": alone, "as-peft": TRAINERS, "as-peft-alone": TRAINERS}
    cases = {side: names + SPECIAL for side, names in ({"peft": CASES} | compared).items()}
    found = results(NEWEST, tmp_path, cases | {"late-as-peft-alone": SPECIAL})
    for side, names in compared.items():
        compare(found[side], found["peft"], names)
    check_counts(found["nbpeft"])
    for side in found.keys() - {"peft"}:
        made, theirs = (found[each]["sft-config"] for each in (side, "peft"))
        assert "error" not in made, made["trace"]
        assert made["library"] == "nbpeft"
        assert_close(made["losses"][0], theirs["losses"][0])
        assert "lm_head" in found[side]["sft-head"]["error"], "an adapted head would not be trained"
        assert found[side]["sft-head"]["error"] == found["peft"]["sft-head"]["error"]


@pytest.mark.slow
def test_every_trainer_of_an_older_version_learns_what_it_learns_with_peft(tmp_path: Path) -> None:
    found = results(OLDER, tmp_path, {"nbpeft": CASES, "peft": CASES})
    compare(found["nbpeft"], found["peft"], CASES)
    check_counts(found["nbpeft"])
