"""Checks of config fields that several methods have: targets, ranks, dropouts, patterns."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, ClassVar

from nbpeft._util.numeric import is_finite_number
from nbpeft.engine.config.module_paths import PLAIN_PATTERN, pattern_table
from nbpeft.engine.config.patterns import ENDING, LAYER_INDEX, WHOLE, check_patterns
from nbpeft.engine.contract.base import LayerKind
from nbpeft.engine.contract.field_types import check_types, takes_none
from nbpeft.errors import BiasError, ConfigError, LayerKindError, did_you_mean, few, shown

_LARGEST_COUNT = 2**24
"""Upper bound on a rank or another size; larger values are taken to be typos."""


def check_target_fields(config: Any, *, name_fields: Sequence[str] = (), pattern_fields: Sequence[str] = ()) -> None:
    """Checks the fields that select modules, and turns lists of names into sets, as PEFT does.

    Args:
        config: changed in place; may have any of ``target_modules``, ``exclude_modules``, ``modules_to_save``,
            ``layers_to_transform`` and ``layers_pattern``.
        name_fields: further fields with names or a pattern, like ``target_modules``.
        pattern_fields: fields that map path patterns to values, like ``rank_pattern``.

    Raises:
        ConfigError: a value is invalid, or matching a pattern could take too long.
    """
    fields = [name for name in ("target_modules", "exclude_modules", *name_fields) if hasattr(config, name)]
    for name in fields:
        names = checked_names(name, getattr(config, name))
        setattr(config, name, set(names) if isinstance(names, list) else names)
    if hasattr(config, "modules_to_save"):
        saved = checked_names("modules_to_save", config.modules_to_save)
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
    checked_names("layers_pattern", config.layers_pattern)


def _patterns(config: Any, fields: Sequence[str], pattern_fields: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yields all regular expressions in these fields, in the form that ``check_patterns`` takes."""
    for name in fields:
        value = getattr(config, name)
        if isinstance(value, str) and value != "all-linear":
            yield name, value, WHOLE
    for name in pattern_fields:
        patterns = (pattern for pattern in getattr(config, name) if not PLAIN_PATTERN.fullmatch(pattern))
        yield from ((name, pattern, ENDING) for pattern in patterns)
    names = getattr(config, "layers_pattern", None) or ()
    yield from (("layers_pattern", name, LAYER_INDEX) for name in ([names] if isinstance(names, str) else names))


def checked_names(name: str, value: Any) -> Any:
    """Checks a field that takes a pattern or a collection of names.

    Args:
        name: the field.
        value: its value.

    Returns:
        None or a pattern unchanged; a collection as a list without repeats.

    Raises:
        ConfigError: the value is none of these.
    """
    if value is None or isinstance(value, str):
        return value
    names = list(value) if isinstance(value, Iterable) and not isinstance(value, bytes | Mapping) else [None]
    if not all(isinstance(item, str) for item in names):
        raise ConfigError(f"{name} must be a name pattern or a list of names, not {value!r:.60}", field=name)
    return list(dict.fromkeys(names))


def check_count(name: str, value: object, *, field: str = "") -> None:
    """Checks a rank or another size.

    Args:
        name: how the error names the value.
        value: the value.
        field: name of its field, if that differs from ``name``.

    Raises:
        ConfigError: it is not a whole number from 1 to 2**24.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST_COUNT:
        small = f" of at most {_LARGEST_COUNT:,}" if isinstance(value, int) and value > _LARGEST_COUNT else ""
        raise ConfigError(
            f"{name} must be a positive whole number{small}, not {shown(value)}", field=field or name, value=value
        )


def check_declared(config: Any) -> None:
    """Checks the values of a config as its class declares them, and against its defaults.

    Raises:
        ConfigError: a value is invalid, not finite, or None although the default is not.
    """
    check_filled(config)
    declared: tuple[tuple[Callable[..., None], Iterable[str]], ...] = (
        *((check_count, config.counts), (check_share, config.shares), (check_seed, config.seeds)),
        *((check_positive, config.positive), (check_not_negative, config.not_negative)),
        (check_number, [item.name for item in fields(config) if _must_be_finite(item, getattr(config, item.name))]),
    )
    for check, names in declared:
        for name in names:
            if getattr(config, name) is not None:
                check(name, getattr(config, name))
    for name, values in config.choices.items():
        check_choice(name, getattr(config, name), values)


def _must_be_finite(item: Field[Any], value: object) -> bool:
    """Whether a field must be finite: its value is a number, and its default is not infinite."""
    can_be_infinite = isinstance(value, int | float) and not isinstance(value, bool)
    return can_be_infinite and not (isinstance(item.default, float) and not math.isfinite(item.default))


def check_filled(config: Any) -> None:
    """Raises ConfigError for None in a field whose default is a number, string or bool, unless its class allows None.

    It does so with a choice, or with the annotation of a field for which it declares nothing.
    """
    declared = {*config.counts, *config.shares, *config.seeds, *config.positive, *config.not_negative}
    for item in fields(config):
        name = item.name
        if getattr(config, name) is not None or not isinstance(item.default, bool | int | float | str):
            continue
        is_declared = name in declared or name in config.choices
        is_allowed = None in config.choices.get(name, ()) if is_declared else takes_none(type(config), name)
        if not is_allowed:
            raise ConfigError(f"{name} must have a value, such as {item.default!r}, not None", field=name)


def check_number(name: str, value: object, *, field: str = "") -> None:
    """Raises ConfigError for a value that is not a finite number; the arguments are those of ``check_count``."""
    if not is_finite_number(value):
        raise ConfigError(f"{name} must be a finite number, not {shown(value)}", field=field or name, value=value)


def check_positive(name: str, value: Any, *, field: str = "") -> None:
    """Raises ConfigError for a value that is not a finite number above 0; see ``check_count``."""
    check_number(name, value, field=field)
    if value <= 0:
        raise ConfigError(f"{name} must be above 0, not {value:g}", field=field or name)


def check_not_negative(name: str, value: Any, *, field: str = "") -> None:
    """Raises ConfigError for a value that is not a finite number of at least 0; see ``check_count``."""
    check_number(name, value, field=field)
    if value < 0:
        raise ConfigError(f"{name} must not be negative, as {value} is", field=field or name)


def check_share(name: str, value: float | None) -> None:
    """Raises ConfigError for a dropout, or another fraction, that is not between 0 and 1."""
    if value is None or not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} must be between 0 and 1, not {shown(value)}", field=name)


def check_seed(name: str, value: float) -> None:
    """Raises ConfigError for a number that cannot seed torch's generators."""
    if not 0 <= value < 2**63:
        raise ConfigError(f"{name} must be a whole number from 0 to 2**63 - 1, not {value:.3g}", field=name)


def check_linear(method: str, path: str, kind: LayerKind) -> None:
    """Checks that a layer is linear, for methods and settings that support no other kind.

    Args:
        method: display name of the method, or the setting.
        path: path of the layer.
        kind: kind of the layer.

    Raises:
        LayerKindError: the layer is not linear.
    """
    if not kind.is_linear:
        raise LayerKindError(
            f"{path}: {method} works on linear layers only, not on {kind.peft_name}; exclude it", path=path
        )


def check_takes_features(method: str, path: str, kind: LayerKind) -> None:
    """Raises LayerKindError for a layer that takes ids; the arguments are those of ``check_linear``."""
    if kind.takes_ids:
        raise LayerKindError(f"{path}: {method} does not work on an {kind.name}; exclude it", path=path)


def check_ungrouped(method: str, path: str, module: Any) -> None:
    """Checks that a layer is not a convolution in groups.

    Args:
        method: display name of the method.
        path: path of the layer.
        module: the layer.

    Raises:
        LayerKindError: it is one.
    """
    if int(getattr(module, "groups", 1)) > 1:
        raise LayerKindError(f"{path}: {method} does not work on a convolution in groups; exclude it", path=path)


def check_linear_or_conv2d(method: str, path: str, module: Any, kind: LayerKind) -> None:
    """Raises LayerKindError for a layer that is neither linear nor a Conv2d without groups; see ``check_ungrouped``."""
    if not kind.is_linear and kind.peft_name != "Conv2d":
        raise LayerKindError(
            f"{path}: {method} works on linear layers and Conv2d, not on {kind.peft_name}; exclude it", path=path
        )
    check_ungrouped(method, path, module)


def check_divides(name: str, size: int, path: str, features: tuple[int, int]) -> None:
    """Checks that a number of blocks, or the size of a block, divides both sizes of a layer.

    Args:
        name: name of the field, for the message.
        size: its value.
        path: path of the layer.
        features: (in, out) of the layer.

    Raises:
        ConfigError: it does not divide one of them; ``details["valid"]`` is the next smaller number that does.
    """
    inputs, outputs = features
    if inputs % size or outputs % size:
        common = math.gcd(inputs, outputs)
        valid = next(smaller for smaller in range(min(size, common), 0, -1) if common % smaller == 0)
        raise ConfigError(
            f"{path}: {name} = {size} must divide its {inputs} inputs and {outputs} outputs, as {valid} does",
            path=path,
            field=name,
            valid=valid,
        )


def check_choice(name: str, value: object, choices: Sequence[Any]) -> None:
    """Checks a field that takes one of several values.

    Args:
        name: the field.
        value: its value; a member of an enumeration counts as its ``value``.
        choices: the allowed values.

    Raises:
        ConfigError: the value is not allowed; a BiasError for ``bias``.
    """
    plain, known = getattr(value, "value", value), [getattr(choice, "value", choice) for choice in choices]
    # Compared by type too: True is not 1.
    if any(plain is choice or (type(plain) is type(choice) and plain == choice) for choice in known):
        return
    error = BiasError if name == "bias" else ConfigError
    near = did_you_mean(str(plain), [choice for choice in known if isinstance(choice, str)])
    raise error(f"{name} must be one of {', '.join(map(repr, known))}, not {shown(value)}.{near}", field=name)


def warn_of_unused(config: Any, needed: Mapping[str, object], *fields: str) -> None:
    """Warns about fields that were set, but have no effect because of the value of another field.

    Args:
        config: a config.
        needed: the other field -> the value with which the fields are used.
        *fields: names of the fields.
    """
    ((switch, value),) = needed.items()
    if getattr(config, switch) == value:
        return
    for name in fields:
        if getattr(config, name) != type(config).__dataclass_fields__[name].default:
            warnings.warn(f"`{name}` is only used when `{switch}={value!r}`.", stacklevel=4)


def checked_pattern(name: str, patterns: Mapping[str, Any] | None, check: Callable[..., None]) -> dict[str, Any]:
    """Checks the values of a field that maps path patterns to values.

    Args:
        name: the field.
        patterns: its value.
        check: called as ``check(name_of_entry, value, field=name)`` for each entry.

    Returns:
        The entries as a new dictionary; empty for None.

    Raises:
        ConfigError: ``check`` refuses a value.
    """
    for pattern, value in (patterns or {}).items():
        check(f"{name}[{shown(pattern)}]", value, field=name)
    return dict(patterns or {})


def unused_patterns(config: Any, names: Sequence[str], paths: Sequence[str]) -> str:
    """Describes patterns that match none of the adapted modules.

    Args:
        config: a config.
        names: its fields that map path patterns to values.
        paths: paths of the adapted modules.

    Returns:
        Sentences for a warning; empty if every pattern matches.
    """
    last_names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    parts = []
    for name in names:
        unused = pattern_table(config, name).unused(paths) if getattr(config, name) else ()
        if unused:
            hint = did_you_mean(unused[0], last_names) if len(unused) == 1 else ""
            parts.append(
                f"{name} [{few(unused)}] did not match any targeted module and "
                f"{'has' if len(unused) == 1 else 'have'} no effect.{hint}"
            )
    return " ".join(parts)


class Settings:
    """Base class of dataclasses with the settings of one variant or init, which are checked as those of a config."""

    counts: ClassVar[tuple[str, ...]] = ()
    shares: ClassVar[tuple[str, ...]] = ()
    positive: ClassVar[tuple[str, ...]] = ()
    not_negative: ClassVar[tuple[str, ...]] = ()
    seeds: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __post_init__(self) -> None:
        check_types(self)
        check_declared(self)
