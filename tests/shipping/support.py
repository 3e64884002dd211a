"""Models and tokenizers that are shipped in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from nbpeft.model import LoraConfig, PeftModel, get_peft_model
from tests.tiny_models import randomize

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama3": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 128},  # what transformers takes for granted when it reads a GGUF file
}
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def base_model(family: str = "Llama", **changes: Any) -> Any:
    """A tiny random model of a family."""
    torch.manual_seed(0)
    name = family.rstrip("3") if family == "Llama3" else family
    config = getattr(transformers, f"{name}Config")(**SIZES | FAMILIES[family] | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def adapted(base: Any = None, name: str = "sql", **fields: Any) -> PeftModel:
    """A model with an adapter whose tensors are drawn at random."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base if base is not None else base_model(), LoraConfig(**settings | fields), name)
    randomize(model, name)
    return model.eval()


def tokenizer(chat_template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer that splits digits, as SmolLM2's does."""
    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 5,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["select the orders of 2024 from the table of orders"] * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = chat_template
    return fast


def sentencepiece_like(prefix: bool) -> Any:
    """A BPE tokenizer with byte fallback, as Llama 2's, Mistral's and Gemma's are."""
    merges = [("o", "r"), ("or", "d"), ("e", "r"), ("er", "s"), ("ord", "ers"), ("▁", "orders")]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"orders f".replace(" ", "")]
    texts += ["".join(pair) for pair in merges]
    vocabulary = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def ids() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(3))


def keys(path: Path) -> dict[str, Any]:
    """The keys of a GGUF file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
