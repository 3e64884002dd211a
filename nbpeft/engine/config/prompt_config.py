"""Base classes of configs for methods that learn a prompt: the number of tokens, and sizes of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_declared, check_target_fields
from nbpeft.engine.contract.adapter import AdapterConfig, PeftType, TaskType
from nbpeft.engine.contract.method_records import Listing
from nbpeft.errors import ConfigError

PROMPT_KEY = "prompt_embeddings"
"""Key in a file under which PEFT expects the computed prompt."""
ENCODER_KEY = "input.weight"
"""Key that only files with the prompt's encoder have; PEFT does not save the encoder."""

_SIZES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}
"""Field -> its possible names in configs of models."""
WIDTHS = ("hidden_size", "n_embd", "d_model")
"""The possible names of the number of features of a token in configs of models."""


@dataclass
class PromptLearningConfig(AdapterConfig):
    """Config of a learned prompt. Field names and defaults are PEFT's.

    Attributes:
        num_virtual_tokens: number of trained tokens in front of the input.
        token_dim: features of each token; by default those of the model.
        num_transformer_submodules: 2 if encoder and decoder have separate tokens; else 1.
        num_attention_heads: attention heads of the model; by default read from its config.
        num_layers: layers of the model; by default read from its config.
        modules_to_save: names of modules that are copied, trained as a whole and saved.

    Raises:
        ConfigError: a value is invalid.
    """

    num_virtual_tokens: int | None = field(default=None)
    token_dim: int | None = field(default=None)
    num_transformer_submodules: int | None = field(default=None)
    num_attention_heads: int | None = field(default=None)
    num_layers: int | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    checked_apart: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    method_type: ClassVar[str] = ""
    """The ``peft_type``."""
    counts: ClassVar[tuple[str, ...]] = (
        *("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
    )
    inserts_embeddings: ClassVar[bool] = True
    """Whether its tokens are joined to the model's embeddings, so that they need the same number of features."""
    learns_prompt: ClassVar[bool] = True
    encoded: ClassVar[bool] = True
    """Whether the network that computes the tokens is present; False in a copy for a file with only the tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method_type)
        check_declared(self)
        check_target_fields(self)

    @property
    def has_encoder(self) -> bool:
        """Whether a network computes the tokens; it is trained, and saved together with them."""
        return False

    @property
    def total_tokens(self) -> int:
        """Number of tokens of all submodules together."""
        return int(self.num_virtual_tokens or 0) * int(self.num_transformer_submodules or 1)

    def reconciled(self, tensors: Mapping[str, Tensor]) -> tuple[Self, Mapping[str, Tensor]]:
        if not self.has_encoder:
            return self, tensors
        encoded = ENCODER_KEY in tensors
        kept = {key: value for key, value in tensors.items() if not (encoded and key == PROMPT_KEY)}
        return self.copy(encoded=encoded), kept

    def fill_in_sizes(self, model: nn.Module, width: int) -> None:
        """Fills in the sizes that are None.

        Raises:
            ConfigError: the model's config lacks a size, or ``token_dim`` does not fit the model.
        """
        if self.num_virtual_tokens is None:
            raise ConfigError(
                "num_virtual_tokens must be a whole number of at least 1, such as 20, not None",
                field="num_virtual_tokens",
            )
        config: Any = getattr(model, "config", None)
        if self.num_transformer_submodules is None:
            both = self.task_type == TaskType.SEQ_2_SEQ_LM or getattr(config, "is_encoder_decoder", False)
            self.num_transformer_submodules = 2 if both else 1
        self.token_dim = self.token_dim or width or size_in(config, "token_dim", WIDTHS)
        if self.inserts_embeddings and self.token_dim != width:
            raise ConfigError(
                f"token_dim is {self.token_dim}, but the tokens of the model have {width} features", field="token_dim"
            )
        for name, names in _SIZES.items():
            if getattr(self, name) is None:
                setattr(self, name, size_in(config, name, names))


def size_in(config: Any, field: str, names: Sequence[str]) -> int:
    """Reads a size from the config of a model, or of its language model if it consists of several.

    Args:
        config: config of the model.
        field: field of the adapter's config, for the error.
        names: possible names of the size in the model's config.

    Returns:
        The value of the first name that the config has.

    Raises:
        ConfigError: the config has none of these names.
    """
    text = getattr(config, "text_config", None) or config
    for name in names:
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    raise ConfigError(f"Please specify `{field}`: the model's config does not have it", field=field)


def prompt_listing(
    when: str, paper: str, more: Callable[[Any], Mapping[str, str]] = lambda config: {}, **fields: Any
) -> Listing:
    """The listing of a method that learns a prompt of some tokens.

    Args:
        when: as in ``Listing``.
        paper: likewise.
        more: config -> settings to show after the number of tokens.
        **fields: other fields of ``Listing``.
    """
    halved: dict[str, Any] = {
        "smaller": lambda config: config.copy(num_virtual_tokens=max(1, config.num_virtual_tokens // 2)),
        "listed_with": {"num_virtual_tokens": 20},
    }
    return Listing(
        when=when,
        paper=paper,
        summary=lambda config: {"tokens": str(config.num_virtual_tokens), **more(config)},
        **(halved | fields),
    )


@dataclass
class InitialisedPromptConfig(PromptLearningConfig):
    """Config of a prompt that can be initialized from a text. Field names and defaults are PEFT's.

    Attributes:
        prompt_tuning_init: how the tokens are initialized.
        prompt_tuning_init_text: the text for ``TEXT``; it is repeated or cut to the number of tokens.
        tokenizer_name_or_path: tokenizer for the text.
        tokenizer_kwargs: further arguments of ``AutoTokenizer.from_pretrained``.

    Raises:
        ConfigError: a value is invalid.
    """

    prompt_tuning_init: Any = field(default="RANDOM")
    prompt_tuning_init_text: str | None = field(default=None)
    tokenizer_name_or_path: str | None = field(default=None)
    tokenizer_kwargs: dict[str, Any] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        of_text = self.starts_as("TEXT")
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if of_text and not getattr(self, name):
                raise ConfigError(
                    f"{name} can't be {getattr(self, name)!r} when prompt_tuning_init='TEXT'",
                    field=name,
                )
        if self.tokenizer_kwargs and not of_text:
            raise ConfigError(
                "tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.", field="tokenizer_kwargs"
            )

    def starts_as(self, *inits: str) -> bool:
        """Whether ``prompt_tuning_init`` is one of these."""
        return str(getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)) in inits
