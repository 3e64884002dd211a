"""Prompt tuning: trained embeddings in front of the input (Lester et al. 2021, arXiv:2104.08691).

x' = [p_1 … p_n, E(x)]        p: (n, features), trained; the model itself is frozen
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nbpeft.engine.calls.token_prompt import TokenPrompt
from nbpeft.engine.config.prompt_config import PROMPT_KEY, InitialisedPromptConfig, prompt_listing
from nbpeft.engine.contract.method_records import FileFormat
from nbpeft.engine.contract.registry import register


class PromptTuningInit(str, enum.Enum):
    """How the tokens of a prompt are initialized. Values as in PEFT's files."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(InitialisedPromptConfig):
    """Config of prompt tuning. Field names and defaults are PEFT's; see ``InitialisedPromptConfig``."""

    prompt_tuning_init: PromptTuningInit | str = field(default=PromptTuningInit.RANDOM)

    method_type: ClassVar[str] = "PROMPT_TUNING"
    rate_factor: ClassVar[float] = 20
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"prompt_tuning_init": tuple(PromptTuningInit)}


@register(
    PromptTuningConfig,
    label="prompt tuning",
    listing=prompt_listing(
        when="large models with many tasks: a few tokens per task, no layer changes",
        paper="arXiv:2104.08691",
    ),
    sample_configs={
        "random": {"num_virtual_tokens": 4},
        "vocabulary": {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"},
    },
    files=FileFormat(keys={"embedding.weight": PROMPT_KEY}),
)
class PromptEmbedding(TokenPrompt):
    """The trained embeddings of one prompt."""
