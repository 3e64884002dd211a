"""Names and constants that several packages use. Imports no torch, so that completion is fast."""

from __future__ import annotations

PEFT_VERSION = "0.21.2"
"""The version of PEFT with which names, fields and files are compatible."""

PEFT_TYPES = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "LORA", "ADALORA", "ADAMSS", "BOFT"),
    *("ADAPTION_PROMPT", "BEFT", "IA3", "LILY", "LOHA", "LOKR", "OFT", "POLY", "LN_TUNING", "VERA", "FROD", "PVERA"),
    *("FOURIERFT", "GLORA", "XLORA", "HRA", "VBLORA", "UNILORA", "CPT", "MISS", "RANDLORA", "ROAD", "HIRA"),
    *("TRAINABLE_TOKENS", "SHIRA", "C3A", "WAVEFT", "OSF", "DELORA", "GRALORA", "CARTRIDGE", "TINYLORA", "PSOFT"),
    *("PEANUT", "SHADOW", "SUPERTUNING", "DEFT"),
)
"""PEFT's values of ``peft_type``, known even before the methods are registered."""

ORIGIN_FIELDS = ("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")
"""Fields of a config that record its origin and do not affect the adapter."""

BOOKKEEPING_FIELDS = (*ORIGIN_FIELDS, "task_type")
"""Fields of a config that change no tensor of its adapter; a task's heads are added before layers are planned."""

DEFAULT_ADAPTER = "default"
"""The name of an adapter if none is given. It is saved in the root of a folder, other adapters in subfolders."""

IGNORED_LABEL = -100
"""The label of tokens that the loss ignores, as in PyTorch's cross entropy and in transformers."""

DEFAULT_SEED = 42
"""Default seed of training and of everything drawn for it; equal to that of ``TrainingArguments``."""

DTYPES = ("bfloat16", "float16", "float32")
"""Floating-point dtypes in which models can be loaded, trained and merged."""

SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Abbreviation -> dtype."""

QUANT_TYPES = ("nf4", "fp4")
"""4-bit data types."""

QUANTIZATIONS = (*QUANT_TYPES, "int8")
"""Quantization formats of linear layers."""

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "sgd", "adafactor", "lion", "lion_8bit")
"""Optimizers that memory plans and completion offer; forecasts support more."""

RENAMED = {
    "adapters": ("num_adapters",),
    "as_name": ("name",),
    "base": ("include_base",),
    "batch": ("batch_size",),
    "batches": ("data",),
    "blends": ("blend",),
    "check": ("check_prompt",),
    "eval": ("eval_data",),
    "go_on": ("follow_up",),
    "machines": ("hosts",),
    "name": ("adapter",),
    "only": ("held_out",),
    "overwrite": ("replace",),
    "rank": ("r",),
    "rewards": ("reward",),
    "rows": ("data",),
    "safe": ("safe_merge",),
    "seq": ("max_length",),
    "stop": ("halving",),
    "trainer": ("trainer_class",),
}
"""Former name of an argument or an option -> the names that it has now in one function or another, for messages."""

RENAMED_FUNCTIONS = {
    "go_on": "resume",
    "off": "use",
    "on": "use",
    "plan_memory": "plan",
    "set_scale": "scale",
    "track": "start_run",
    "unfreeze": "freeze",
    "watch": "register",
}
"""Former name of a function or of a method of the session -> its name, for messages."""

BATCH_SIZE = 8
"""Default number of rows per step of a training, and so of a plan and a forecast; that of ``TrainingArguments``."""

MAX_LENGTH = 1024
"""Default number of tokens to which rows are cut, if tokenizer and model allow more; also in plans and forecasts."""

LOSS_CHUNK_SIZE = 128
"""Default number of tokens whose logits are in memory at once for the loss of a language model."""

LOSS_WEIGHTS = "loss_weights"
"""Key in a tokenized row and in a batch: the weight of each label's loss, in the shape of ``labels``."""

PAIRS = "pairs"
"""The kind of rows with a chosen and a rejected completion."""

SCORED_PAIRS = "scored pairs"
"""The kind of such rows with an optional ``margin``: by how much the chosen completion's reward exceeds the other's."""

PROMPTS = "prompts"
"""The kind of rows with a prompt alone, which the model in training answers."""

JUDGED = "judged"
"""The kind of rows with a completion and a ``label`` that says whether it is good."""

DESIRABLE = "desirable"
"""The key of that label in a tokenized row and in a batch: 1 or 0."""

BASE, START = "base", "start"
"""Values of ``reference``: the model without adapters, and the trained weights at the beginning."""

REJECTED = "rejected_"
"""Prefix of the keys of a rejected completion in a tokenized row and in a batch: ``rejected_input_ids``."""

COMBINATION_TYPES = (
    *("exact", "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd"),
    *("dare_ties", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"),
)
"""Combination types of LoRA and DoRA adapters; all but ``exact`` are PEFT's. Other methods declare their own."""

SERVING_ENGINES = ("vllm", "llama.cpp", "ollama", "transformers", "peft", "diffusers", "kohya")
"""Programs for which adapters can be exported."""

STORED_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
"""Storage types of exported weights; those that begin with q only in GGUF files, ``q…_k`` only for whole models."""

ROW_CHOICES = {
    "learn": ("all", "last", "completion"),
    "reasoning": ("keep", "mask", "drop"),
    "long": ("cut", "drop", "split"),
}
"""Option of how texts and conversations are read -> its values, of which the first is the default."""
ROW_OPTIONS = (*ROW_CHOICES, "chat_template_kwargs")
"""All options of how texts and conversations are read."""

METRICS = (
    *("exact", "contains", "startswith", "regex", "number", "json", "json_valid", "f1"),
    *("choice", "choice_norm", "loss", "perplexity", "accuracy"),
)
"""Names of the built-in metrics; a custom metric is a function."""
