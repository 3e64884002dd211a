"""The small models that ``check_method`` uses, and a config on one of them."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft._util.optional import needs
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.contract.registry import method_of, resolve_backend
from nbpeft.engine.tree.model_tree import embedding_of, is_quantized, manager_of
from nbpeft.errors import AdapterError, ConfigError, in_one_line, with_article
from nbpeft.model.handle.peft_model import PeftModel
from nbpeft.model.handle.tasks import get_peft_model

TARGET = "target"
"""Name of the adapted layer in the models of one layer."""
_VOCABULARY, _ROWS, _LENGTH = 31, 3, 6
_TOLERANCE = 1e-4


class OneLayer(nn.Module):
    """A model of one layer, under the name ``target``.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.target = layer

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of the layer, through a tanh."""
        return torch.tanh(self.target(x))


@dataclass(frozen=True)
class Trial:
    """A config on a model.

    Attributes:
        name: name of the model, for the report.
        base: the model without adapters; it is copied before each use.
        config: the config.
        args: positional arguments of a call of the model.
        kwargs: keyword arguments of a call.
    """

    name: str
    base: nn.Module = field(repr=False)
    config: AdapterConfig = field(repr=False)
    args: tuple[Any, ...] = field(default=(), repr=False)
    kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def plain(self) -> nn.Module:
        """Returns a new copy of the model without adapters."""
        return copy.deepcopy(self.base).eval()

    def own_config(self) -> AdapterConfig:
        """Returns a copy of the config, which adding an adapter may complete."""
        return self.config.copy()

    def with_fields(self, **fields: Any) -> Trial:
        """Returns this trial with other values of some fields of the config."""
        return dataclasses.replace(self, config=self.config.copy(**fields))

    def fresh(self) -> PeftModel:
        """Returns a copy of the model with a new adapter."""
        return get_peft_model(self.plain(), self.own_config()).eval()

    def randomized(self) -> PeftModel:
        """Returns a copy of the model with an adapter that was moved away from its initial values."""
        model = self.fresh()
        randomize(model, "default")
        return model

    def pair(self) -> PeftModel:
        """Returns a copy of the model with two different adapters, ``default`` and ``other``; the first is active."""
        model = self.randomized()
        model.add_adapter("other", self.own_config())
        randomize(model, "other")
        return model.eval()

    def output(self, model: nn.Module, rows: slice = slice(None), **options: Any) -> Tensor:
        """Calls a model without gradients.

        Args:
            model: the model.
            rows: the rows of the batch.
            **options: further keyword arguments of the call.

        Returns:
            Its output; of an output with several tensors, the first.
        """
        with torch.no_grad():
            return self.call(model, rows, **options)

    def call(self, model: nn.Module, rows: slice = slice(None), **options: Any) -> Tensor:
        """Calls a model with gradients; see ``output``."""
        args = [_cut(value, rows) for value in self.args]
        own = () if isinstance(model, PeftModel) else method_of(self.config).calls.arguments
        kwargs = {name: _cut(value, rows) for name, value in self.kwargs.items() if name not in own}
        return _tensor_in(model(*args, **kwargs, **options))

    @property
    def row_count(self) -> int:
        """Number of rows of the batch."""
        return next((len(value) for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)), 0)

    def tolerance(self, expected: Tensor) -> float:
        """The largest difference from an output at which another one is equal up to rounding."""
        return _TOLERANCE * max(1.0, float(expected.abs().max()))

    def in_dtype(self, dtype: torch.dtype) -> Trial:
        """Returns this trial with the model and its inputs in another dtype."""
        args = tuple(_cast(value, dtype) for value in self.args)
        kwargs = {name: _cast(value, dtype) for name, value in self.kwargs.items()}
        return dataclasses.replace(self, base=copy.deepcopy(self.base).to(dtype), args=args, kwargs=kwargs)

    def in_four_bits(self) -> tuple[nn.Module | None, nn.Module]:
        """Returns a copy of the model with nf4 weights in its linear layers, and one with these weights dequantized.

        The first is None if the model has no linear layer of torch apart from its head.

        Raises:
            MissingPackageError: bitsandbytes is not installed.
        """
        with needs("bitsandbytes", "checking a quantized base"):
            bitsandbytes: Any = importlib.import_module("bitsandbytes")
        quantized, dense = self.plain(), self.plain()
        head = getattr(quantized, "get_output_embeddings", lambda: None)()
        layers = [(path, one) for path, one in quantized.named_modules() if type(one) is nn.Linear and one is not head]
        for path, layer in layers:
            stored = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4"
            )
            stored.load_state_dict(layer.state_dict())
            quantized.set_submodule(path, stored.to(layer.weight.device))  # which quantizes
            backend = resolve_backend(stored)
            assert backend is not None
            dense.get_submodule(path).get_parameter("weight").data.copy_(backend.dequantize(stored))
        return quantized if layers else None, dense


@torch.no_grad()
def randomize(model: PeftModel, name: str) -> None:
    """Moves all parameters of an adapter, so that none has the value at which the adapter changes nothing.

    Args:
        model: the model.
        name: name of the adapter.
    """
    for parameter in model.manager.parameters(name):
        parameter.add_(0.1 * torch.randn_like(parameter))


def trials_on(model: nn.Module, config: AdapterConfig, inputs: Any) -> list[Trial]:
    """Returns the trial of a config on a given model.

    Args:
        model: the model.
        config: the config.
        inputs: a tensor, or the keyword arguments of a call; None for token ids.

    Raises:
        AdapterError: the model has adapters.
        ConfigError: the model is quantized or cannot be called with ``inputs``, ``inputs`` is something else, or it is
            None and the model has no input embedding.
    """
    if manager_of(model) is not None:
        raise AdapterError("check_method needs a model without adapters: unload() returns the base model")
    if is_quantized(model):
        raise ConfigError("check_method needs a model whose weights are not quantized", field="model")
    trial = _trial(model, config, inputs).in_dtype(torch.float32)
    try:
        trial.output(trial.plain())
    except Exception as error:  # whatever the code of the model raises
        reason = f"{type(error).__name__}: {in_one_line(error):.200}"
        raise ConfigError(f"{trial.name} without adapters cannot be called: {reason}", field="inputs") from error
    return [trial]


def _trial(model: nn.Module, config: AdapterConfig, inputs: Any) -> Trial:
    name = type(model).__name__
    if isinstance(inputs, Tensor):
        return Trial(name, model, config, args=(inputs,))
    if isinstance(inputs, Mapping):
        return Trial(name, model, config, kwargs=dict(inputs))
    if inputs is not None:
        message = f"inputs must be a tensor or a dict of keyword arguments, not {with_article(inputs)}"
        raise ConfigError(message, field="inputs")
    embedding = embedding_of(model)
    size = getattr(embedding, "num_embeddings", None)
    if not size:
        raise ConfigError(f"{name} has no input embedding: pass inputs, a tensor or keyword arguments", field="inputs")
    ids = torch.randint(1, int(size), (_ROWS, _LENGTH), device=next(model.parameters()).device)
    return Trial(name, model, config, kwargs={"input_ids": ids})


def small_trials(config: AdapterConfig) -> list[Trial]:
    """Returns the trials of a config on a small LLaMA, and on one layer of each kind if it targets layers.

    Args:
        config: the config.
    """
    trials = trials_on(_llama(), config, None)
    if method_of(config).transforms_calls or "target_modules" not in config.__dataclass_fields__:
        return trials
    defaults = {
        name: declared.default_factory() if declared.default_factory is not dataclasses.MISSING else declared.default
        for name, declared in config.__dataclass_fields__.items()
        if name in config.slot_fields and name != "bias"
    }
    on_target = config.copy(**{**defaults, "target_modules": {TARGET}})
    return [*(Trial(name, OneLayer(make()), on_target, (x(),)) for name, (make, x) in _LAYERS.items()), *trials]


def _floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(_ROWS, *shape)


_LAYERS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(16, 24), _floats(5, 16)),
    "Linear without bias": (lambda: nn.Linear(16, 24, bias=False), _floats(5, 16)),
    "Embedding": (lambda: nn.Embedding(11, 24), lambda: torch.arange(_ROWS * 4).view(_ROWS, 4) % 11),
    "Conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), _floats(6, 9)),
    "Conv2d": (lambda: nn.Conv2d(3, 8, 3, stride=2), _floats(3, 9, 9)),
    "LayerNorm": (lambda: nn.LayerNorm(16), _floats(5, 16)),
}
"""Kind of layer -> functions that make one, and its input."""


def _llama() -> Any:
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=_VOCABULARY,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


def _tensor_in(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values: Sequence[Any] = [*output.values()] if isinstance(output, Mapping) else list(output)
    return next(value for value in values if isinstance(value, Tensor))


def _cut(value: Any, rows: slice) -> Any:
    return value[rows] if isinstance(value, Tensor) else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
