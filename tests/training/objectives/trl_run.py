"""Trains a tiny model with a preference Trainer of TRL and PEFT, and writes down its losses and norms of gradients.

    python trl_run.py RESULTS.json CASE...

``cases`` and ``filled`` are used by the tests of nbpeft, too, so that both train the same adapter on the same rows.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tests.training.trl_run import tiny_base, tiny_tokenizer

STEPS = 10
ROWS = [
    {
        "prompt": f"w{number} w{number + 7} w3 ",
        "chosen": " ".join(f"w{(5 * number + place) % 80}" for place in range(2 + number % 3)),
        "rejected": " ".join(f"w{(3 * number + 40 + place) % 80}" for place in range(1 + number % 4)),
    }
    for number in range(12)
]
FIELDS: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "train_sampling_strategy": "sequential",
    "report_to": "none",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}
CASES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "dpo-base": {"reference": "base", "beta": 0.5},
    "dpo-hinge": {"loss_type": "hinge", "beta": 0.5},
    "dpo-ipo": {"loss_type": "ipo"},
    "dpo-robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "dpo-accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "cpo": {"beta": 0.5},
    "cpo-hinge": {"loss_type": "hinge", "cpo_alpha": 0.3},
    "cpo-ipo": {"loss_type": "ipo", "cpo_alpha": 0.0},
    "cpo-smoothed": {"label_smoothing": 0.2},
    "simpo": {"beta": 2.0, "simpo_gamma": 0.7},
    "orpo": {"beta": 0.3},
    "kto": {},
    "kto-base": {"reference": "base", "beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7},
    "kto-accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "beta": 0.5},
    "reward": {},
    "reward-margin": {"center_rewards_coefficient": 0.1, "margin": True},
}
"""Objective and variant -> its fields."""


_OURS = {"kl": "objective/kl"}
"""Curve of TRL -> that of nbpeft, where the names differ."""


def base_and_rows(case: str) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    """The base model of a case, its rows, and the fields of its training."""
    fields = {**FIELDS, **CASES[case]}
    rows: list[dict[str, Any]] = ROWS
    if case.startswith("kto"):
        labels = [number % 3 != 0 for number in range(len(ROWS))]
        rows = [
            {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
            for row, good in zip(ROWS, labels, strict=True)
        ]
    if fields.pop("margin", False):
        rows = [{**row, "margin": 0.1 * number} for number, row in enumerate(ROWS)]
    return tiny_base(LlamaForSequenceClassification if case.startswith("reward") else LlamaForCausalLM), rows, fields


def filled(model: Any) -> Any:
    """Draws all weights of a model's LoRA adapter anew, the same for nbpeft and PEFT."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted((name, part) for name, part in model.named_parameters() if "lora_" in name):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(case: str, folder: str) -> Any:
    """The log of a training by TRL."""
    import peft
    import trl
    from datasets import Dataset

    model, rows, fields = base_and_rows(case)
    base = fields.pop("reference", "start") == "base"
    task = "SEQ_CLS" if case.startswith("reward") else "CAUSAL_LM"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type=task)
    model = filled(peft.get_peft_model(model, config))
    name, more = case.partition("-")[0], {}
    if name == "dpo":
        config_class, trainer_class, more = trl.DPOConfig, trl.DPOTrainer, {"ref_model": tiny_base() if base else None}
    elif name == "kto":
        config_class, trainer_class, more = trl.KTOConfig, trl.KTOTrainer, {"ref_model": tiny_base() if base else None}
    elif name == "reward":
        config_class, trainer_class = trl.RewardConfig, trl.RewardTrainer
    elif name == "orpo":
        from trl.experimental import orpo

        config_class, trainer_class = orpo.ORPOConfig, orpo.ORPOTrainer
    else:
        from trl.experimental import cpo

        config_class, trainer_class = cpo.CPOConfig, cpo.CPOTrainer
        fields |= {"loss_type": "simpo", "cpo_alpha": 0.0} if name == "simpo" else {}
    settings = config_class(output_dir=folder, bf16=False, gradient_checkpointing=False, save_strategy="no", **fields)
    trainer = trainer_class(
        model,
        **more,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main(results: Path, cases: list[str]) -> None:
    """Trains the cases."""
    found = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            log = trained(case, folder)
        names = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "kl")
        found[case] = {_OURS.get(name, name): [entry[name] for entry in log] for name in names if name in log[0]}
    results.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
