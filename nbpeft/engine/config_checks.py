"""Checks of the config fields that several methods have: which modules they target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nbpeft.engine.module_paths import PLAIN_PATTERN
from nbpeft.engine.patterns import ENDING, LAYER_INDEX, WHOLE, check_patterns
from nbpeft.errors import ConfigError


def check_target_fields(config: Any, *, name_fields: Sequence[str] = (), pattern_fields: Sequence[str] = ()) -> None:
    """Checks the fields that say what is adapted, as far as a config has them; lists of names become sets, as in PEFT.

    Args:
        config: has some of ``target_modules``, ``exclude_modules``, ``modules_to_save``,
            ``layers_to_transform`` and ``layers_pattern``.
        name_fields: further fields that hold names or a pattern, as ``target_modules`` does.
        pattern_fields: fields that map patterns over paths to values.

    Raises:
        ConfigError: a value is impossible, or a pattern could take for ever to match.
    """
    fields = [name for name in ("target_modules", "exclude_modules", *name_fields) if hasattr(config, name)]
    for name in fields:
        names = _names(name, getattr(config, name))
        setattr(config, name, set(names) if isinstance(names, list) else names)
    if hasattr(config, "modules_to_save"):
        saved = _names("modules_to_save", config.modules_to_save)
        config.modules_to_save = [saved] if isinstance(saved, str) else saved
    if hasattr(config, "layers_pattern"):
        _check_layer_fields(config)
    check_patterns(_patterns(config, fields, pattern_fields))


def _check_layer_fields(config: Any) -> None:
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise ConfigError(f"{name} needs target_modules to be a list of names, not a pattern", field=name)
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError("layers_pattern needs layers_to_transform", field="layers_pattern")
    _names("layers_pattern", config.layers_pattern)


def _patterns(config: Any, fields: Sequence[str], pattern_fields: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """All regular expressions among the values, as ``check_patterns`` takes them."""
    for name in fields:
        value = getattr(config, name)
        if isinstance(value, str) and value != "all-linear":
            yield name, value, WHOLE
    for name in pattern_fields:
        patterns = (pattern for pattern in getattr(config, name) if not PLAIN_PATTERN.fullmatch(pattern))
        yield from ((name, pattern, ENDING) for pattern in patterns)
    names = getattr(config, "layers_pattern", None) or ()
    yield from (("layers_pattern", name, LAYER_INDEX) for name in ([names] if isinstance(names, str) else names))


def _names(name: str, value: Any) -> Any:
    """A pattern as it is, any other collection of names as a list without repeats."""
    if value is None or isinstance(value, str):
        return value
    names = list(value) if isinstance(value, Iterable) and not isinstance(value, bytes | Mapping) else [None]
    if not all(isinstance(item, str) for item in names):
        raise ConfigError(f"{name} must be a name pattern or a list of names, not {value!r:.60}", field=name)
    return list(dict.fromkeys(names))
