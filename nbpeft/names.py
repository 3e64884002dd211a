"""Names that several packages offer or check, each written once. Imports no torch, so that completion is fast."""

from __future__ import annotations

PEFT_VERSION = "0.21.2"
"""The version of PEFT whose names, fields and files these are."""

PEFT_TYPES = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "LORA", "ADALORA", "ADAMSS", "BOFT"),
    *("ADAPTION_PROMPT", "BEFT", "IA3", "LILY", "LOHA", "LOKR", "OFT", "POLY", "LN_TUNING", "VERA", "FROD", "PVERA"),
    *("FOURIERFT", "GLORA", "XLORA", "HRA", "VBLORA", "UNILORA", "CPT", "MISS", "RANDLORA", "ROAD", "HIRA"),
    *("TRAINABLE_TOKENS", "SHIRA", "C3A", "WAVEFT", "OSF", "DELORA", "GRALORA", "CARTRIDGE", "TINYLORA", "PSOFT"),
    *("PEANUT", "SHADOW", "SUPERTUNING", "DEFT"),
)
"""PEFT's values of ``peft_type``: code compares with them, also before a method is registered."""

ORIGIN_FIELDS = ("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")
"""Fields of a config that say where it comes from, and not what it does."""

BOOKKEEPING_FIELDS = (*ORIGIN_FIELDS, "task_type")
"""Fields of a config that change no tensor of its adapter: the task adds heads before the config is planned."""

DEFAULT_ADAPTER = "default"
"""The name of an adapter that nobody has named. Its files are in the root of a folder, other ones' in subfolders."""

IGNORED_LABEL = -100
"""The label of tokens of which no loss is taken, as PyTorch's cross entropy and transformers have it."""

DEFAULT_SEED = 42
"""The seed of a training, and of what is drawn for it, where none is given: that of ``TrainingArguments``."""

DTYPES = ("bfloat16", "float16", "float32")
"""Floating dtypes that models are loaded, computed and merged in."""

SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Abbreviations of them."""

QUANT_TYPES = ("nf4", "fp4")
"""Data types of 4-bit weights."""

QUANTIZATIONS = (*QUANT_TYPES, "int8")
"""Ways in which linear layers are quantized."""

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "sgd", "adafactor", "lion", "lion_8bit")
"""Optimizers that a memory plan offers; it knows the state of others too."""

LOSS_CHUNK_SIZE = 128
"""Tokens of which the logits are in memory at once for the loss of a language model, by default."""

LOSS_WEIGHTS = "loss_weights"
"""In a tokenised row and in a batch: how much the loss on each label counts, beside ``labels`` and in their shape."""

COMBINATION_TYPES = (
    *("exact", "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd"),
    *("dare_ties", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"),
)
"""Ways to combine LoRA and DoRA adapters; all but ``exact`` are PEFT's. Other methods name their own."""

SERVING_ENGINES = ("vllm", "llama.cpp", "ollama", "transformers", "peft", "diffusers", "kohya")
"""Programs that adapters can be shipped for."""

STORED_TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types in which shipped weights can be stored; ``q8_0`` in GGUF files alone."""
