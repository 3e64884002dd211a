"""Log-probabilities of completions, without the logits of all tokens in memory at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbpeft.engine.tree.model_tree import base_model_of
from nbpeft.losses import chunked_head
from nbpeft.names import IGNORED_LABEL, LOSS_CHUNK_SIZE


def log_probs(model: nn.Module, batch: Mapping[str, Tensor], *, chunk_size: int = LOSS_CHUNK_SIZE) -> Tensor:
    """The sum of the log-probabilities of the labels of each row, (rows,), in float32.

    Args:
        model: a causal language model, with or without adapters and wrappers.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each of shape (rows, tokens).
        chunk_size: number of tokens whose logits are in memory at once; 0 for all.
    """
    return log_probs_of(model, batch, [batch["labels"]], chunk_size=chunk_size)[0]


def log_probs_of(
    model: nn.Module, batch: Mapping[str, Tensor], labels: Sequence[Tensor], *, chunk_size: int = LOSS_CHUNK_SIZE
) -> list[Tensor]:
    """As :func:`log_probs`, of several labels of the same tokens.

    Args:
        model: see :func:`log_probs`.
        batch: see :func:`log_probs`.
        labels: of shape (rows, tokens), each of the first rows of the batch.
        chunk_size: see :func:`log_probs`.
    """

    def compute(logits: Tensor) -> Tensor:
        return torch.cat([_of_tokens(logits, part[:, 1:]).sum(1) for part in labels])

    return list(torch.split(_computed(model, batch, compute, chunk_size), [len(part) for part in labels]))


def _of_tokens(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probability of each target of the first rows, of the shape of the targets; 0 where there is none."""
    # A learned prompt precedes the tokens, so positions are counted from the end.
    logits = logits[: len(targets), -targets.shape[1] - 1 : -1].float()
    scaled = logits if temperature == 1 else torch.div(logits, temperature)
    losses = F.cross_entropy(
        scaled.reshape(-1, scaled.shape[-1]),
        targets.reshape(-1).to(logits.device),
        reduction="none",
        ignore_index=IGNORED_LABEL,
    )
    return -losses.view(targets.shape)


def token_log_probs(
    model: nn.Module, batch: Mapping[str, Tensor], *, temperature: float = 1.0, chunk_size: int = LOSS_CHUNK_SIZE
) -> Tensor:
    """The log-probability of each label of a batch, (rows, tokens - 1), in float32; 0 where there is no label.

    Args:
        model: see :func:`log_probs`.
        batch: see :func:`log_probs`.
        temperature: what the logits are divided by.
        chunk_size: see :func:`log_probs`.
    """
    targets = batch["labels"][:, 1:]
    return _computed(model, batch, lambda logits: _of_tokens(logits, targets, temperature), chunk_size)


def _computed(
    model: nn.Module, batch: Mapping[str, Tensor], compute: Callable[[Tensor], Tensor], chunk_size: int
) -> Tensor:
    """The result of a function of the logits.

    It is computed inside the model's forward: DistributedDataParallel, around the model, traverses the tensors that
    it returns, and cannot handle logits without data.
    """
    inputs: dict[str, Any] = {name: values for name, values in batch.items() if name != "labels"}
    base = base_model_of(model)
    if "use_cache" in inspect.signature(base.forward).parameters:
        inputs["use_cache"] = False

    def replace_logits(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, dict):
            return (compute(output[0]), *output[1:])
        return type(output)(logits=compute(output["logits"]))

    hook = base.register_forward_hook(replace_logits)
    try:
        with chunked_head(model, chunk_size):
            output: Any = model(**inputs)
    finally:
        hook.remove()
    found: Tensor = output["logits"] if isinstance(output, dict) else output[0]
    return found


def token_counts(labels: Tensor) -> Tensor:
    """The number of labels of each row that a decoder predicts, (rows,).

    Args:
        labels: (rows, tokens).
    """
    return (labels[:, 1:] != IGNORED_LABEL).sum(1)
