"""Trains a tiny model with Trainers of TRL, in a process of its own, and writes down what was learned.

    python trl_run.py {peft,nbpeft,alone,as-peft,as-peft-alone,late-as-peft-alone} ADAPTERS RESULTS.json CASE...

``as-peft`` is nbpeft by the name ``peft``, ``alone`` as if PEFT were not installed, and ``late`` with TRL imported
before. ADAPTERS holds the starting adapters (``write_adapters`` makes them with PEFT). For each case the results
hold the losses and, of every batch, the number of tokens learned and the sum of each mask.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from nbpeft import install_as_peft

STEPS = 5
WORDS = [f"w{number}" for number in range(80)]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|> "
    "{% generation %}{{ message['content'] }} <eos> {% endgeneration %}"
    "{% else %}<|user|> {{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tiny_tokenizer() -> Any:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **named)
    fast.chat_template = CHAT
    return fast


def tiny_base(kind: type[Any] = LlamaForCausalLM, labels: int = 1) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(SPECIAL) + len(WORDS),
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        num_labels=labels,
    )
    return kind(config)


def write_adapters(folder: Path) -> None:
    """A starting adapter for each kind of head, written by PEFT, whose B is not zero."""
    import peft

    for name, kind, task in (("lm", LlamaForCausalLM, "CAUSAL_LM"), ("cls", LlamaForSequenceClassification, "SEQ_CLS")):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type=task)
        model = peft.get_peft_model(tiny_base(kind), config)
        torch.manual_seed(1)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(str(folder / name))


def text(count: int, start: int) -> str:
    return " ".join(WORDS[(start * 7 + number * 3) % len(WORDS)] for number in range(count))


def rows(**columns: Callable[[int], Any]) -> Dataset:
    return Dataset.from_list([{name: value(row) for name, value in columns.items()} for row in range(24)])


def prompt(row: int) -> str:
    return "<|user|> " + text(4 + row % 5, row) + " <|assistant|>"


def completion(row: int) -> str:
    return " " + text(2 + row % 4, row + 30)


def worse(row: int) -> str:
    return " " + text(3 + row % 3, row + 50)


def messages(row: int) -> list[dict[str, str]]:
    talk = [("user", text(4, row)), ("assistant", text(3 + row % 3, row + 9)), ("user", text(2, row + 5))]
    return [{"role": role, "content": content} for role, content in [*talk, ("assistant", text(4, row + 11))]]


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(one.split()))) for one in completions]


def classes() -> dict[str, tuple[Any, Any]]:
    """Trainer and arguments class by name; where KTO lives differs between versions."""
    import trl
    from trl.experimental import orpo

    kto: Any = trl
    with contextlib.suppress(ImportError):
        kto = importlib.import_module("trl.experimental.kto")
    if not hasattr(kto, "KTOTrainer"):
        kto = trl
    return {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (kto.KTOTrainer, kto.KTOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig),
    }


def case(name: str) -> tuple[str, Dataset, dict[str, Any]]:
    """Kind of Trainer, rows and settings of a case."""
    pairs = {"prompt": prompt, "chosen": completion, "rejected": worse}
    plain = rows(text=lambda row: prompt(row) + completion(row))
    cases: dict[str, tuple[str, Callable[[], Dataset], dict[str, Any]]] = {
        "sft": ("sft", lambda: plain, {"gradient_checkpointing": True}),
        "sft-nll": ("sft", lambda: plain, {"loss_type": "nll"}),
        "sft-chunked": ("sft", lambda: plain, {"loss_type": "chunked_nll"}),
        "sft-config": ("sft", lambda: plain, {}),
        "sft-head": ("sft", lambda: plain, {}),
        "sft-completion": ("sft", lambda: rows(prompt=prompt, completion=completion), {"completion_only_loss": True}),
        "sft-assistant": ("sft", lambda: rows(messages=messages), {"assistant_only_loss": True}),
        "sft-packing": ("sft", lambda: plain, {"packing": True, "max_length": 32}),
        "dpo": ("dpo", lambda: rows(**pairs), {}),
        "kto": ("kto", lambda: rows(prompt=prompt, completion=completion, label=lambda row: row % 3 != 0), {}),
        "reward": ("reward", lambda: rows(chosen=completion, rejected=worse), {}),
        "grpo": ("grpo", lambda: rows(prompt=prompt), {"beta": 0.1, "num_generations": 4, "max_completion_length": 8}),
        "orpo": ("orpo", lambda: rows(**pairs), {"max_length": 64}),
    }
    kind, data, settings = cases[name]
    return kind, data(), settings


def learned(inputs: Any) -> dict[str, float]:
    """What a batch teaches: its labels that count, and the sum of its masks and positions."""
    if not isinstance(inputs, dict):
        return {"rows": len(inputs)}
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.ndim == 2}
    counts = {name: float(value.sum()) for name, value in tensors.items() if "label" not in name}
    return counts | {name: float((value != -100).sum()) for name, value in tensors.items() if "label" in name}


def starting_model(library: Any, name: str, adapters: Path) -> Any:
    """The model of a case with its starting adapter, or without one where TRL makes it."""
    if name == "sft-config":
        return tiny_base()
    if name == "sft-head":
        return library.get_peft_model(
            tiny_base(), library.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
        )
    head, folder = (LlamaForSequenceClassification, "cls") if name == "reward" else (LlamaForCausalLM, "lm")
    return library.PeftModel.from_pretrained(tiny_base(head), str(adapters / folder), is_trainable=True)


def train(library: Any, adapters: Path, name: str) -> dict[str, Any]:
    """What a case learns in five steps."""
    kind, data, settings = case(name)
    trainer_class, arguments_class = classes()[kind]
    options: dict[str, Any] = {"reward_funcs": reward} if kind == "grpo" else {}
    if name == "sft-config":
        options["peft_config"] = library.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    common: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    model = starting_model(library, name, adapters)
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_class(output_dir=folder, **(common | settings))
        trainer = trainer_class(
            model=model, args=arguments, train_dataset=data, processing_class=tiny_tokenizer(), **options
        )
        seen: list[dict[str, float]] = []
        step = trainer.training_step

        def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(learned(inputs))
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = watched
        trainer.train()
        trainer.save_model(folder + "/out")
        files = sorted(path.name for path in Path(folder, "out").iterdir() if path.suffix == ".safetensors")
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "library": type(trainer.model).__module__.partition(".")[0],
        "losses": [entry["loss"] for entry in history],
        "grad_norms": [entry["grad_norm"] for entry in history],
        "learned": seen,
        "files": files,
    }


def main(side: str, adapters: str, results: str, *names: str) -> None:
    """Runs the cases; what fails is told in its place."""
    torch.set_num_threads(1)
    if side.endswith("alone"):
        sys.modules["peft"] = None  # type: ignore[assignment]
    if side.startswith("late"):
        classes()
    if "as-peft" in side:
        install_as_peft()
    library = __import__("peft" if "peft" in side.split("-") else "nbpeft")
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = train(library, Path(adapters), name)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
