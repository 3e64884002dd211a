"""Trains a tiny model with Trainers of TRL and PEFT, and writes down its losses and norms of gradients.

    python trl_run.py RESULTS.json CASE...

Classifiers are trained by transformers' Trainer, as TRL has none. ``CASES`` and ``filled`` are used by the tests of
nbpeft, too, so that both train the same adapter on the same rows.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorWithPadding,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

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
    "sft": {},
    "classify": {},
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
    "kto-strong": {"beta": 0.5},
    "reward": {},
    "reward-margin": {"center_rewards_coefficient": 0.1, "margin": True},
    "grpo": {},
    "grpo-grpo": {"loss_type": "grpo", "scale_rewards": "none", "mask_truncated_completions": True},
    "grpo-dr": {"loss_type": "dr_grpo", "scale_rewards": "batch", "temperature": 0.7},
    "grpo-bnpo": {"loss_type": "bnpo", "reward_weights": [0.5, 2.0]},
    "grpo-kl": {"beta": 0.4, "loss_type": "grpo"},
    "grpo-kl-base": {"beta": 0.4, "use_bias_correction_kl": False, "num_iterations": 2, "reference": "base"},
    "grpo-again": {"num_iterations": 3, "epsilon": 0.02, "epsilon_high": 0.05, "beta": 0.2},
    "grpo-sequence": {"num_iterations": 2, "importance_sampling_level": "sequence", "epsilon": 0.01},
    "grpo-accumulated": {"gradient_accumulation_steps": 2, "num_iterations": 2, "loss_type": "grpo"},
}
"""Objective and variant -> its fields."""
COPIES = 4
OF_REWARDS = {"num_generations": COPIES, "max_completion_length": 8}
"""Fields of all trainings with rewards."""


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
    if case in ("sft", "classify"):
        rows = [tokenized(row, number if case == "classify" else None) for number, row in enumerate(ROWS)]
    if case == "classify":
        return tiny_base(LlamaForSequenceClassification, 3), rows, fields
    return tiny_base(LlamaForSequenceClassification if case.startswith("reward") else LlamaForCausalLM), rows, fields


def tokenized(row: dict[str, Any], number: int | None) -> dict[str, Any]:
    """A row of tokens, whose completion is learned, or which has one of three classes by its number."""
    prompt, completion = (tiny_tokenizer()(row[name])["input_ids"] for name in ("prompt", "chosen"))
    if number is not None:
        return {"input_ids": [*prompt, *completion], "labels": number % 3}
    return {"input_ids": [*prompt, *completion, 1], "labels": [*[-100] * len(prompt), *completion, 1]}


def task_of(case: str) -> str:
    """The ``task_type`` of a case's adapter."""
    return "SEQ_CLS" if case.startswith(("reward", "classify")) else "CAUSAL_LM"


def completions_of(prompt: str, count: int) -> list[list[int]]:
    """Token ids of completions of a prompt, of which one has no end."""
    first = int(prompt.split()[0][1:])
    found = [
        [10 + (7 * first + 3 * number + place) % 80 for place in range(1 + (first + number) % 5)]
        for number in range(count)
    ]
    return [[*tokens, 1] if number else tokens for number, tokens in enumerate(found)]


def even(completions: list[str], **columns: Any) -> list[float]:
    """A reward for words with even numbers."""
    return [float(sum(int(word[1:]) % 2 == 0 for word in text.split())) for text in completions]


def short(completions: list[str], **columns: Any) -> list[float | None]:
    """A reward for few words, which does not judge some completions."""
    return [None if "w20" in text else 1.0 / (1 + len(text.split())) for text in completions]


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
    if case.startswith("grpo"):
        return _with_rewards(fields, base, folder)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type=task_of(case))
    model = filled(peft.get_peft_model(model, config))
    name, more = case.partition("-")[0], dict[str, Any]()
    if name == "sft":
        config_class, trainer_class = trl.SFTConfig, trl.SFTTrainer
    elif name == "classify":
        config_class, trainer_class = TrainingArguments, Trainer
        more = {"data_collator": DataCollatorWithPadding(tiny_tokenizer())}
    elif name == "dpo":
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


def _with_rewards(fields: dict[str, Any], base: bool, folder: str) -> Any:
    """The log of a training by TRL that learns given completions."""
    import peft
    import trl
    from datasets import Dataset

    tokenizer = tiny_tokenizer()

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        found, seen = [], dict.fromkeys(prompts, 0)
        for prompt in prompts:
            found.append(completions_of(prompt, COPIES)[seen[prompt]])
            seen[prompt] += 1
        return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": found, "logprobs": None}

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = filled(peft.get_peft_model(tiny_base(), config))
    more = {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "shuffle_dataset": False}
    settings = trl.GRPOConfig(output_dir=folder, **more, **OF_REWARDS, **fields)
    trainer = trl.GRPOTrainer(
        model,
        [even, short],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=tokenizer,
        rollout_func=rollout,
    )
    if base:  # instead of the adapter as it was at the beginning
        trainer.model.delete_adapter("ref")
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main(results: Path, cases: list[str]) -> None:
    """Trains the cases."""
    found = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            log = trained(case, folder)
        names: tuple[str, ...] = ("loss", "grad_norm")
        names += ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
        names += ("reward", "reward_std", "frac_reward_zero_std", "rewards/even/mean", "rewards/short/std")
        names += ("kl", "clip_ratio/region_mean", "completions/mean_length", "completions/clipped_ratio")
        found[case] = {name: [entry[name] for entry in log if name in entry] for name in names if name in log[0]}
    results.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
