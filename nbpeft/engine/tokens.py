"""Which rows of which embeddings a config trains (``trainable_token_indices``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nbpeft.engine.model_tree import embedding_of
from nbpeft.engine.registry import resolve_backend, resolve_host
from nbpeft.engine.targets import matches_segment_names, no_match
from nbpeft.errors import ConfigError, TargetError, shown

_FIELD = "trainable_token_indices"
_USUAL_NAME = "embed_tokens"


@dataclass(frozen=True)
class Rows:
    """Trained rows of one module.

    Attributes:
        indices: which rows.
        tied_to: path of the embedding whose weight the module shares and whose rows it follows; else empty.
    """

    indices: tuple[int, ...]
    tied_to: str = ""


def token_rows(model: nn.Module, config: Any, modules: Sequence[tuple[str, nn.Module]]) -> dict[str, Rows]:
    """Path -> rows, for each module whose rows are trained and each that shares such a module's weight.

    Args:
        model: the base model.
        config: any config; without ``trainable_token_indices`` it trains none.
        modules: path and module of everything in the model; a module may come several times.

    Raises:
        TargetError: a module is not there, or has no rows that could be trained.
        ConfigError: indices are impossible.
    """
    wanted = getattr(config, _FIELD, None)
    if not wanted:
        return {}
    named = wanted if isinstance(wanted, Mapping) else {_input_embedding(model, modules): wanted}
    found: dict[str, Rows] = {}
    seen: dict[int, str] = {}
    for name, indices in named.items():
        matching = [(path, module) for path, module in modules if matches_segment_names(path, [name])]
        if not matching:
            raise no_match([name], [path for path, _ in modules], what=_FIELD)
        for path, module in matching:
            if seen.setdefault(id(module), path) == path:
                found[path] = Rows(_checked(path, module, indices))
    return _with_tied(found, modules)


def _input_embedding(model: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> str:
    embedding = embedding_of(model)
    inside = set() if embedding is None else {id(module) for module in embedding.modules()}
    return next(
        (path for path, module in modules if id(module) in inside and resolve_host(module) is not None), _USUAL_NAME
    )


def _checked(path: str, module: nn.Module, indices: Any) -> tuple[int, ...]:
    host, backend = resolve_host(module), resolve_backend(module)
    if host is None or backend is None or host.name not in ("embedding", "linear"):
        raise TargetError(f"{path} is a {type(module).__name__}: only rows of embeddings and heads can be trained")
    if backend.name != "dense":
        raise TargetError(f"{path} is quantized ({backend.name}): its rows cannot be trained")
    if not isinstance(indices, Sequence) or not indices or not all(type(index) is int for index in indices):
        raise ConfigError(f"{_FIELD} for {path} must be a list of token ids, not {shown(indices)}")
    rows = host.features(module)[0 if host.name == "embedding" else 1]
    wrong = next((index for index in indices if not 0 <= index < rows), None)
    if wrong is not None:
        raise ConfigError(
            f"{_FIELD}: {path} has {rows} rows and no row {wrong}; resize_token_embeddings() comes first", index=wrong
        )
    if len(set(indices)) < len(indices):
        raise ConfigError(f"{_FIELD} for {path} names a token more than once")
    return tuple(indices)


def _with_tied(found: dict[str, Rows], modules: Sequence[tuple[str, nn.Module]]) -> dict[str, Rows]:
    """Adds modules that share the weight of one whose rows are trained."""
    owners: dict[int, str] = {}
    placed: set[int] = set()
    result: dict[str, Rows] = {}
    for path, module in modules:
        weight = module._parameters.get("weight")
        if path in found and weight is not None:
            owner = owners.setdefault(id(weight), path)
            if found[owner].indices != found[path].indices:
                raise ConfigError(f"{owner} and {path} share one weight: {_FIELD} must name the same tokens for both")
            result[path] = Rows(found[path].indices, owner if owner != path else "")
            placed.add(id(module))
    for path, module in modules:
        weight = module._parameters.get("weight")
        owner_path = owners.get(id(weight)) if weight is not None else None
        if owner_path is not None and id(module) not in placed and resolve_host(module) is not None:
            placed.add(id(module))
            result[path] = Rows(found[owner_path].indices, owner_path)
    return result
