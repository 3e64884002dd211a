"""Sweeps: several values for a field, whose combinations are trained side by side as separate adapters.

::

    learning_rate = sweep(1e-4, 3e-4)      two adapters: …-lr1e-4 and …-lr3e-4
    r = sweep(8, 64)                       together with the line above: all four combinations
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from nbpeft.errors import ConfigError, check_bool
from nbpeft.names import BOOKKEEPING_FIELDS

MOST = 16
"""Most adapters in one sweep."""
TOKENS_TOGETHER = 128
"""Most input tokens of a forward pass that serves several adapters on a CPU; larger passes need more memory and are
not faster."""
TOKENS_ON_DEVICE = 16_384
"""Most input tokens of such a pass on an accelerator."""
OWN_FIELDS = (
    "learning_rate",
    "weight_decay",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
"""Fields of ``TrainingArguments`` that can differ between the adapters of a sweep."""
_SHORT = {
    "learning_rate": "lr",
    "weight_decay": "wd",
    "warmup_steps": "warmup",
    "max_grad_norm": "clip",
    "lr_scheduler_type": "",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "",
    "init_lora_weights": "init",
    "use_dora": "dora",
    "use_rslora": "rslora",
}
"""Abbreviations of fields in adapter names; empty if the value is clear without the field."""
_LONGEST = 24
_SEPARATOR = re.compile(r"(?<!\de)-")
"""Separates the parts of an adapter's name; the minus of an exponent, as in ``lr1e-4``, does not."""


@dataclass(frozen=True)
class Sweep:
    """Several values of one field, and whether adapters are halved in training; created by ``sweep``."""

    values: tuple[Any, ...]
    halving: bool = False

    def __repr__(self) -> str:
        return f"sweep({', '.join((*map(repr, self.values), *(['halving=True'] if self.halving else [])))})"


def sweep(*values: Any, halving: bool = False) -> Sweep:
    """Returns several values for a field of a training or of an adapter's config, to be trained side by side.

    Args:
        *values: two or more distinct values. Several fields with a sweep give every combination.
        halving: successive halving in a training, as its argument ``halving``.

    Raises:
        ConfigError: there are fewer than two values, two are equal, or ``halving`` is no truth value.
    """
    check_bool("halving", halving)
    if len(values) == 1 and isinstance(values[0], list | tuple | range):
        shown = ", ".join(map(repr, values[0][:3]))
        raise ConfigError(f"sweep takes the values one by one: sweep({shown}), not {values[0]!r:.60}")
    if len(values) < 2:
        raise ConfigError(f"a sweep has at least two values, e.g. sweep(1e-4, 3e-4), not {len(values)}")
    for first, second in itertools.combinations(values, 2):
        if type(first) is type(second) and first == second:
            raise ConfigError(f"the sweep has {first!r:.60} twice")
    return Sweep(values, halving)


def halvings(count: int) -> int:
    """Returns how often adapters have to be halved, rounded up, until one remains.

    Args:
        count: number of adapters.
    """
    return (count - 1).bit_length()


def remaining(count: int, step: int, total: int) -> int:
    """Returns the number of adapters that remain after a step by successive halving.

    The number is halved, rounded up, each time the number of steps has doubled, the last time after half of the steps
    (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943).

    Args:
        count: number of adapters at the beginning.
        step: number of completed steps.
        total: number of steps of the training.
    """
    rungs = (total / (1 << number) for number in range(1, halvings(count) + 1))
    return math.ceil(count / (1 << sum(step >= rung for rung in rungs)))


def swept(fields: Mapping[str, Any]) -> dict[str, Sweep]:
    """Returns the fields whose value is a sweep."""
    return {name: value for name, value in fields.items() if isinstance(value, Sweep)}


def of_config(config: Any, fields: Iterable[str]) -> list[str]:
    """Returns the fields that are those of an adapter's config, and so need adapters with new weights.

    Args:
        config: config of the adapter from which the sweep starts.
        fields: names of the fields with a sweep.
    """
    known = {item.name for item in dataclasses.fields(config) if item.init and item.name not in BOOKKEEPING_FIELDS}
    return [name for name in fields if name in known]


def not_swept(name: str) -> ConfigError:
    """Returns the error for a field that cannot differ between the adapters of a sweep."""
    return ConfigError(
        f"{name} cannot be a sweep: adapters that learn side by side share rows, batches and steps. A field of the "
        f"adapter's config can, beta and other fields of the objective, and {', '.join(OWN_FIELDS[:5])}, …",
        field=name,
    )


def check_own(fields: Iterable[str], more: Collection[str] = ()) -> None:
    """Refuses fields that cannot differ between the adapters of a sweep.

    Args:
        fields: names of fields.
        more: fields in addition to ``OWN_FIELDS`` that can: those of the objective.

    Raises:
        ConfigError: a field cannot differ.
    """
    for name in fields:
        if name not in OWN_FIELDS and name not in more:
            raise not_swept(name)


def combinations(fields: Mapping[str, Sweep]) -> Iterator[dict[str, Any]]:
    """Yields every combination of the values; the last field changes fastest.

    Raises:
        ConfigError: there are more than ``MOST`` combinations.
    """
    count = math.prod(len(sweep.values) for sweep in fields.values())
    if count > MOST:
        factors = " × ".join(f"{len(sweep.values)} {name}" for name, sweep in fields.items())
        raise ConfigError(
            f"the sweep has {count} combinations ({factors}); at most {MOST} are trained side by side",
            field=list(fields)[-1],
        )
    for values in itertools.product(*(sweep.values for sweep in fields.values())):
        yield dict(zip(fields, values, strict=True))


def largest_of(fields: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Returns the fields of the presumably largest combination, for an estimate of memory.

    Args:
        fields: field -> value or sweep.

    Returns:
        The fields with one value each (of a sweep the largest number, or the first value), and the number of
        combinations.
    """
    single = dict(fields)
    for name, values in swept(fields).items():
        numbers = all(isinstance(value, int | float) for value in values.values)
        single[name] = max(values.values) if numbers else values.values[0]
    return single, math.prod(len(values.values) for values in swept(fields).values())


def members_together(count: int, tokens: int, *, on_cpu: bool) -> int:
    """Returns the number of adapters per forward pass, such that passes are as equal as possible.

    Args:
        count: number of adapters that train.
        tokens: number of tokens in the batch of one adapter.
        on_cpu: whether the pass runs on a CPU.
    """
    most = max(1, (TOKENS_TOGETHER if on_cpu else TOKENS_ON_DEVICE) // max(1, tokens))
    return math.ceil(count / math.ceil(count / most)) if count else 1


def names_of(stem: str, combined: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the names of a sweep's adapters: ``codes-lr1e-4``; equal names are numbered.

    Args:
        stem: the beginning of each name.
        combined: the combinations of values, field -> value.
    """
    labels = ["-".join([stem, *(_label(*item) for item in values.items())]) for values in combined]
    return [label if labels.count(label) == 1 else f"{label}-{number}" for number, label in enumerate(labels, 1)]


def stem_of(names: Iterable[str]) -> str:
    """Returns the common stem of a sweep's names: ``codes`` for ``codes-lr1e-4`` and ``codes-lr3e-4``."""
    parts = zip(*(_SEPARATOR.split(name) for name in names), strict=False)
    return "-".join(part for part, *_ in itertools.takewhile(lambda same: len(set(same)) == 1, parts))


def _label(name: str, value: Any) -> str:
    short = _SHORT.get(name, name.replace("_", ""))
    if isinstance(value, bool):
        return (short or name) if value else f"no{short or name}"
    if isinstance(value, int | float):
        return f"{short}{number_text(value)}"
    plain = value.value if isinstance(value, Enum) else value
    parts = sorted(map(str, plain)) if isinstance(plain, set | frozenset) else plain
    text = "+".join(map(str, parts)) if isinstance(parts, list | tuple | set) else str(plain)
    return re.sub(r"[^\w+-]+", "_", f"{short}{text}")[:_LONGEST] or "value"


def number_text(value: float) -> str:
    """Returns a number as text without a dot, which adapter names cannot contain: ``1e-4``, ``25e-5``, ``8``."""
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return str(int(value))
    mantissa, _, exponent = f"{value:.12e}".partition("e")
    digits = mantissa.replace(".", "").rstrip("0")
    return f"{digits}e{int(exponent) - len(digits.lstrip('-')) + 1}"
