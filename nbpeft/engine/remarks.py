"""What is odd about a config on a model, though it can be carried out; and models nothing can be done with yet."""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Set
from typing import Any

from torch import nn

from nbpeft.engine.adapter import TASK_HEADS, AdapterConfig, TaskType
from nbpeft.engine.lora_config import PatternTable
from nbpeft.engine.model_tree import embedding_of
from nbpeft.engine.registry import resolve_host
from nbpeft.errors import PeftWarning, TargetError, did_you_mean, few, shown

_PATTERNS = ("rank_pattern", "alpha_pattern")


def guessed_heads(config: AdapterConfig) -> tuple[str, ...]:
    """Names that a task adds to ``modules_to_save``, though a model need not have them."""
    return TASK_HEADS.get(TaskType(config.task_type), ()) if config.task_type else ()


def without_head(missing: Sequence[str]) -> str:
    """Says that a model has none of the heads that its task lets expect."""
    return (
        f"the model has no module {' or '.join(missing)}: its head, under whatever name, is neither trained nor "
        "saved unless modules_to_save names it"
    )


def unmatched_patterns(config: Any, paths: Sequence[str]) -> str:
    """Names the keys of ``rank_pattern`` and ``alpha_pattern`` that match none of the adapted modules; else empty."""
    last_names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    parts = []
    for name in _PATTERNS:
        unused = PatternTable(getattr(config, name, None) or {}).unused(paths)
        if unused:
            hint = did_you_mean(unused[0], last_names) if len(unused) == 1 else ""
            parts.append(
                f"{name} {few(unused)} did not match any targeted module and "
                f"{'is' if len(unused) == 1 else 'are'} ignored.{hint}"
            )
    return " ".join(parts)


def without_bias(config: Any, modules: Sequence[tuple[str, nn.Module]]) -> str:
    """Says where ``lora_bias`` finds no bias that merging could add to; else empty."""
    if not getattr(config, "lora_bias", False):
        return ""
    bare = [path for path, module in modules if getattr(module, "bias", None) is None]
    if not bare:
        return ""
    subject = f"{bare[0]} and {len(bare) - 1} more have" if len(bare) > 1 else f"{bare[0]} has"
    return f"lora_bias=True, but {subject} no bias in the base: the adapter cannot be merged there"


def unmergeable(modules: Sequence[tuple[str, nn.Module]]) -> str:
    """Says which layers' adapters are no change of a weight, so that they cannot be merged; else empty."""
    for path, module in modules:
        host = resolve_host(module)
        refusal = "" if host is None else host.product_refusal(module)
        if refusal:
            return f"{path} cannot be merged: it is {refusal}"
    return ""


def warn_of_tied(model: nn.Module, modules: Sequence[tuple[str, nn.Module]], changed: Set[str]) -> None:
    """Says where an adapter changes an embedding or head that shares its weight with another module.

    Args:
        model: the base model.
        modules: path and module of everything in it.
        changed: paths that get factors or are trained as a whole.
    """
    weight = getattr(embedding_of(model), "weight", None)
    users: dict[int, str] = {}
    for path, module in modules if isinstance(weight, nn.Parameter) else ():
        if module._parameters.get("weight") is weight and (id(module) not in users or path in changed):
            users[id(module)] = path
    paths = list(users.values())
    own = [path for path in paths if path in changed]
    if not own or len(paths) < 2:
        return
    which = f"{' and '.join(own)} alone" if len(own) < len(paths) else "each on its own"
    warnings.warn(
        f"{' and '.join(paths)} share one weight (tie_word_embeddings) and the adapter changes {which}: they differ "
        "while it acts, and merging makes separate weights of them",
        stacklevel=5,
    )


def warn_of_experts(model: nn.Module) -> None:
    """Says which stacked weights, those of a mixture of experts, ``"all-linear"`` does not reach."""
    stacked = {name: p.numel() for name, p in model.named_parameters() if _is_stacked(model, name, p)}
    if not stacked:
        return
    share = sum(stacked.values()) / sum(parameter.numel() for parameter in model.parameters())
    which = next(iter(stacked)) + (f" and {len(stacked) - 1} more" if len(stacked) > 1 else "")
    warnings.warn(
        f"target_modules='all-linear' reaches linear layers only: the experts ({which}, {share:.0%} of the parameters) "
        "are tensors of several weights and stay as they are",
        stacklevel=5,
    )


def _is_stacked(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter holds the weights of several linear maps, and belongs to no layer torch knows."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return parameter.ndim == 3 and parameter.shape[0] > 1 and not type(owner).__module__.startswith("torch.nn.")


def remark(
    config: Any, modules: Sequence[tuple[str, nn.Module]], *, strict: bool, idle_exclusion: bool = False
) -> None:
    """Warns of what is odd.

    Args:
        config: the config.
        modules: path and module of everything it adapts.
        strict: refuse patterns that match nothing instead.
        idle_exclusion: whether ``exclude_modules`` names nothing in the model.

    Raises:
        TargetError: a pattern matches nothing, if strict.
    """
    unmatched = unmatched_patterns(config, [path for path, _ in modules])
    excluded = getattr(config, "exclude_modules", None)
    excluded_text = shown(excluded if excluded is None or isinstance(excluded, str) else sorted(excluded), 200)
    idle = f"exclude_modules={excluded_text} names no module of the model" if idle_exclusion else ""
    for note, category in ((unmatched, RuntimeWarning), (idle, UserWarning)):
        if note and strict:
            raise TargetError(note)
        if note:
            warnings.warn(note, category, stacklevel=4)
    for note in (without_bias(config, modules), unmergeable(modules)):
        if note:
            warnings.warn(note, PeftWarning, stacklevel=4)
