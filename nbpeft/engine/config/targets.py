"""Resolves target names and patterns to module paths; works on paths alone, without a model.

A list entry matches a module whose path is the entry or ends with ``.entry``. A string is a
regular expression for the whole path. Names match whole path segments only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbpeft.engine.config.module_paths import suffixes
from nbpeft.engine.config.patterns import LAYER_INDEX
from nbpeft.errors import TargetError, did_you_mean, few, near, shown

ALL_LINEAR = "all-linear"
CONDENSE_FROM = 20
"""Number of target names from which they are condensed to suffixes, as in PEFT."""
_MOST_HINTS = 5
"""Number of unmatched names for which an error suggests similar ones."""

_USUAL_TARGETS: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): (
        "bart gemma gemma2 gemma3 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 "
        "smollm3 stablelm"
    ),
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("q", "v"): "mt5 t5",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query", "value"): "bert dinov2 electra layoutlm roberta vit xlm-roberta",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("query_key_value",): "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox",
    ("qkv_proj",): "codegen",
    ("Wqkv",): "mpt",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("c_proj", "c_attn"): "btlm",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}

_WIDE_TARGETS = {
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}

_DEFAULT_PATTERNS = {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}


def is_all_linear(targets: object) -> bool:
    """Whether targets are "all-linear", in upper or lower case."""
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def usual_targets(model_type: str | None) -> list[str] | str | None:
    """The default targets of an architecture (``config.model_type``), attention projections; None if unknown."""
    if model_type in _DEFAULT_PATTERNS:
        return _DEFAULT_PATTERNS[model_type]
    for targets, model_types in _USUAL_TARGETS.items():
        if model_type in model_types.split():
            return list(targets)
    return None


def usual_unfused_targets(model_type: str | None) -> list[str] | str | None:
    """``usual_targets``, except the down projection for GPT-2, where query, key and value are one weight."""
    return ["mlp.c_proj"] if model_type in ("gpt2", "gpt_bigcode") else usual_targets(model_type)


def usual_wide_targets(model_type: str | None) -> list[str] | str | None:
    """``usual_targets``, except all projections for some older architectures."""
    return _WIDE_TARGETS.get(model_type or "") or usual_targets(model_type)


def usual_model_types() -> list[str]:
    """The architectures (``config.model_type``) that have default targets."""
    return [*_DEFAULT_PATTERNS, *(name for model_types in _USUAL_TARGETS.values() for name in model_types.split())]


def with_target(targets: Collection[str] | str | None, path: str) -> Collection[str] | str:
    """Adds a module to targets.

    Args:
        targets: names, a pattern or None.
        path: path of the module.

    Returns:
        A set, or a pattern if ``targets`` was one.
    """
    return f"(?:{targets})|{re.escape(path)}" if isinstance(targets, str) else {*(targets or ()), path}


def condensed_if_many(targets: Any, module_names: Iterable[str]) -> Any:
    """Condenses targets if PEFT would, and if that makes them fewer.

    Args:
        targets: names, a pattern or None.
        module_names: all module names of the model.

    Returns:
        Suffixes from ``condense_targets``, or ``targets`` unchanged.
    """
    if not isinstance(targets, list | set | tuple) or len(targets) < CONDENSE_FROM:
        return targets
    condensed = condense_targets(targets, module_names)
    return condensed if len(condensed) < len(targets) else targets


def condense_targets(targets: Iterable[str], module_names: Iterable[str]) -> set[str]:
    """Finds shorter suffixes that match the same modules.

    Args:
        targets: names or suffixes of names.
        module_names: all module names of the model, including those that the targets match.

    Returns:
        The suffixes.

    Raises:
        TargetError: a target is empty.
    """
    wanted = set(targets)
    if "" in wanted:
        raise TargetError("target_modules has an empty name")
    endings = tuple(f".{name}" for name in wanted)
    others = (name for name in module_names if name not in wanted and not name.endswith(endings))
    taken = {suffix for name in others for suffix in suffixes(name)}
    chosen: set[str] = set()
    for shortest_first in sorted(list(suffixes(name))[::-1] for name in wanted):
        if not chosen.isdisjoint(shortest_first):
            continue
        shortest = next((suffix for suffix in shortest_first if suffix not in taken), None)
        if shortest is not None:
            chosen.add(shortest)
    return chosen or wanted


@dataclass
class Matcher:
    """Decides whether a config targets a module path, and records which targets matched.

    Attributes:
        targets: names or a regular expression.
        exclude: names, a regular expression, or None.
        layers: indices of the layers to adapt, or None for all.
        layers_pattern: names of the module list that contains the layers; None for any.
        seen: targets that matched a path so far.
    """

    targets: Collection[str] | str
    exclude: Collection[str] | str | None = None
    layers: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._target_names = _as_set(self.targets)
        self._target_pattern = _as_pattern(self.targets)
        self._exclude_names = _as_set(self.exclude)
        self._exclude_pattern = _as_pattern(self.exclude)
        self._indices = {self.layers} if isinstance(self.layers, int) else set(self.layers or ())
        lists = self.layers_pattern or ()
        names = [lists] if isinstance(lists, str) else lists
        sources = [LAYER_INDEX.format(name) for name in names] or [r".*?\.[^.]*\.(\d+)\."]
        self._index_patterns = [re.compile(source) for source in sources]

    def excluded(self, path: str) -> bool:
        """Whether ``exclude`` matches the path."""
        if self._exclude_pattern is not None:
            return self._exclude_pattern.fullmatch(path) is not None
        return any(suffix in self._exclude_names for suffix in suffixes(path))

    def excludes_none_of(self, paths: Iterable[str]) -> bool:
        """Whether ``exclude`` is set but matches none of the paths."""
        return bool(self.exclude) and not any(self.excluded(path) for path in paths)

    def matches(self, path: str) -> bool:
        """Whether the targets match the path; ``exclude`` is not considered."""
        if self._target_pattern is not None:
            found = self._target_pattern.fullmatch(path) is not None
            if found:
                self.seen.add(str(self.targets))
            return found
        hits = [suffix for suffix in suffixes(path) if suffix in self._target_names]
        if not hits:
            return False
        self.seen.update(hits)
        return path in self._target_names or not self._indices or self._layer_index(path) in self._indices

    def _layer_index(self, path: str) -> int | None:
        for pattern in self._index_patterns:
            match = pattern.match(path)
            if match:
                return int(match.group(1))
        return None

    def missing(self) -> tuple[str, ...]:
        """Targets that matched no path so far, sorted."""
        wanted = [self.targets] if isinstance(self.targets, str) else self.targets
        return tuple(sorted(name for name in wanted if name not in self.seen))


def matches_segment_names(path: str, names: Iterable[str]) -> bool:
    """Whether a path is one of the names or ends with one, in whole segments."""
    wanted = names if isinstance(names, set | frozenset) else set(names)
    return any(suffix in wanted for suffix in suffixes(path))


def names_part(name: str, path: str) -> bool:
    """Whether a name consists of whole segments anywhere in a path."""
    return f".{name}." in f".{path}."


def nothing_matches(matcher: Matcher, excluded: Sequence[str], available: Sequence[str]) -> TargetError:
    """Creates the error for a config that targets no module at all.

    Args:
        matcher: after it was called with all paths.
        excluded: paths that the targets match and ``exclude_modules`` removes.
        available: paths that could be adapted.

    Returns:
        The error, for the caller to raise.
    """
    missing = matcher.missing()
    if missing and isinstance(matcher.targets, str):
        return no_pattern_match(matcher.targets, available)
    if missing and not excluded:
        return no_match(missing, available)
    if excluded:
        outcome = "No modules were targeted for adaptation" if missing else "All modules were excluded"
        others = f"; {few(missing)} not found in the base model" if missing else ""
        return TargetError(
            f"{outcome}: exclude_modules takes out all {len(excluded)} modules that target_modules names, e.g. "
            f"{excluded[0]}{others}"
        )
    if not matcher.targets:
        return TargetError('target_modules is empty: name the modules to adapt, or "all-linear"')
    return TargetError("target_modules match modules, but none in the layers of layers_to_transform")


def no_match(missing: Sequence[str], available: Iterable[str], *, what: str = "target_modules") -> TargetError:
    """Creates the error for names that match nothing.

    Args:
        missing: the names.
        available: paths in the model, from which similar names are suggested.
        what: the field.

    Returns:
        The error, for the caller to raise.
    """
    last_names = sorted({path.rsplit(".", 1)[-1] for path in available})
    hints = {name: near(name, last_names) for name in missing[:_MOST_HINTS]}
    hint = did_you_mean(missing[0], last_names) if len(missing) == 1 else _hints(hints)
    if what == "target_modules":
        problem = f"Target modules {few(missing)} not found in the base model."  # PEFT's wording, which users search
    else:
        problem = f"{what} {few(missing)} {'matches' if len(missing) == 1 else 'match'} no module of the model."
    return TargetError(
        f"{problem}{hint} {_has(last_names)}",
        missing=tuple(missing),
        near=hints,
        available=tuple(last_names),
    )


def no_pattern_match(pattern: str, available: Iterable[str]) -> TargetError:
    """Creates the error for a pattern that matches no path; most often the user meant a name.

    Args:
        pattern: the regular expression.
        available: paths in the model, from which similar names are suggested.

    Returns:
        The error, for the caller to raise.
    """
    last_names = sorted({path.rsplit(".", 1)[-1] for path in available})
    if pattern in last_names:
        hint = f"for every module of that name use target_modules=[{shown(pattern)}]."
    else:
        hint = f"for names use a list.{did_you_mean(pattern, last_names)}"
    return TargetError(
        f"Target modules {shown(pattern)} not found in the base model: it is a pattern for whole paths; {hint} "
        f"{_has(last_names)}",
        missing=(pattern,),
        near={pattern: near(pattern, last_names)},
        available=tuple(last_names),
    )


def _has(last_names: Sequence[str]) -> str:
    return f"The model has: {few(last_names, 12, quoted=False) or 'no layer that can be adapted'}"


def _hints(hints: dict[str, list[str]]) -> str:
    found = [f"{shown(name)} is near {', '.join(map(repr, names))}" for name, names in hints.items() if names]
    return f" ({'; '.join(found)})." if found else ""


def _as_set(names: Collection[str] | str | None) -> set[str]:
    return set() if names is None or isinstance(names, str) else set(names)


def _as_pattern(names: Any) -> re.Pattern[str] | None:
    return re.compile(names) if isinstance(names, str) else None
