"""Models, tokenizers and rows that are scored, and answers one by one with transformers' ``generate``."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.model import LoraConfig, get_peft_model
from tests.char_tokenizer import END, PAD, CharTokenizer
from tests.tiny_models import llama, randomize, state

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS = [
    {"prompt": f"{number} is" + "x" * (number % 5), "completion": " abcd"[: 2 + number % 4]} for number in range(12)
]


def adapted(**changes: Any) -> Any:
    """A model with the LoRA adapters ``sql`` and ``chat``."""
    model = get_peft_model(llama(**changes), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "sql")
    model.add_adapter("chat", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for seed, name in enumerate(("sql", "chat")):
        randomize(model, name, seed, 0.8)
    return model.eval()


def byte_tokenizer() -> Any:
    """A fast tokenizer whose tokens are bytes, with a chat template that ends a turn by a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|eos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|eos|>", chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    return tokenizer


def alone(model: Any, row: dict[str, str], limit: int, **options: Any) -> str:
    """The answer of a model as it is to one prompt, by ``generate``."""
    tokenizer = CharTokenizer()
    ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
    ends = [model.generation_config.eos_token_id, END]
    given = {"do_sample": False, "max_new_tokens": limit, "pad_token_id": PAD, "eos_token_id": ends}
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given | options)
    answer = itertools.takewhile(lambda token: token not in ends, tokens[0, ids.shape[1] :].tolist())
    return tokenizer.decode(list(answer), skip_special_tokens=True)


def everything(model: Any) -> Any:
    """What scoring must leave as it is: weights, modes, and which adapters are active."""
    modes = [module.training for module in called_modules(model)]
    return state(model), modes, model.manager.active, model.manager.enabled, torch.get_rng_state().tolist()
