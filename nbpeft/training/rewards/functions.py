"""The reward functions of a training: what they are called with, and what they may return."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.errors import ConfigError, TrainingError, few, in_one_line, with_article
from nbpeft.training.rewards.rollouts import Completion

_GIVEN = ("completions", "prompts", "completion_ids", "trainer_state")
"""What every reward function can take, with the names of TRL; the others are the columns of the rows."""
_GREATEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Rewards:
    """Functions that score completions.

    Attributes:
        functions: called with keywords: ``completions``, ``prompts``, ``completion_ids``, ``trainer_state``, and each
            column of the rows as a list.
        names: their names, which all differ.
        columns: the columns of the rows; of a row that lacks one it is None.
        unused: columns of the rows that no function takes.
    """

    functions: tuple[Callable[..., Any], ...]
    names: tuple[str, ...]
    columns: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """A line about the functions, and the columns that none of them takes."""
        unused = f"; columns not used: {', '.join(map(repr, self.unused))}" if self.unused else ""
        return f"rewards: {', '.join(self.names)}{unused}"

    @classmethod
    def of(cls, given: Any, weights: Sequence[float] | None, columns: Sequence[str]) -> Rewards:
        """Checks reward functions.

        Args:
            given: a function, or several in a list.
            weights: the factor on each; None for 1.
            columns: the other columns of the rows.

        Raises:
            ConfigError: there is none, one cannot be called with these columns, or the weights do not fit.
        """
        functions = tuple(given) if isinstance(given, list | tuple) else () if given is None else (given,)
        if not functions:
            raise ConfigError(
                "grpo needs reward=…: functions f(completions, prompts, **columns) that return a number for each "
                "completion",
                field="reward",
            )
        names: list[str] = []
        for function in functions:
            _check_callable(function)
            name = _name(function)
            same = sum(other == name or other.startswith(f"{name}-") for other in names)
            names.append(f"{name}-{same + 1}" if same else name)
        clash = [name for name in columns if name in _GIVEN]
        if clash:
            raise ConfigError(
                f"the column {clash[0]!r} has the name of what reward functions are given: rename it", field="reward"
            )
        taken: set[str] = set()
        for name, function in zip(names, functions, strict=True):
            taken |= _taken(name, function, columns)
        if weights is not None and len(weights) != len(functions):
            raise ConfigError(
                f"reward_weights has {len(weights)} numbers for {len(functions)} rewards", field="reward_weights"
            )
        unused = tuple(name for name in columns if name not in taken)
        return cls(functions, tuple(names), tuple(columns), unused)

    def of_completions(self, completions: Sequence[Completion], trainer_state: Any) -> Tensor:
        """The rewards of completions, (completions, functions) in float32; NaN where a function returned None.

        Args:
            completions: the completions.
            trainer_state: the state of the Trainer.

        Raises:
            TrainingError: a function failed, or did not return a number for each completion.
        """
        found = [
            self._of_one(name, function, completions, trainer_state)
            for name, function in zip(self.names, self.functions, strict=True)
        ]
        return torch.tensor(found, dtype=torch.float32).T

    def _of_one(
        self, name: str, function: Callable[..., Any], completions: Sequence[Completion], trainer_state: Any
    ) -> list[float]:
        try:
            returned = function(**self._keywords(function, completions, trainer_state))
        except Exception as error:
            raise self._failure(name, function, completions, trainer_state, error) from error
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, list | tuple):
            raise TrainingError(
                f"reward {name!r} returned {with_article(values)}, not a list with a number for each completion"
            )
        if len(values) != len(completions):
            raise TrainingError(f"reward {name!r} returned {len(values)} numbers for {len(completions)} completions")
        return [_number(name, value, row) for value, row in zip(values, completions, strict=True)]

    def _keywords(
        self, function: Callable[..., Any], completions: Sequence[Completion], trainer_state: Any
    ) -> dict[str, Any]:
        """What a function is called with: all of it, or only what it takes."""
        keywords: dict[str, Any] = {
            "completions": [row.shown for row in completions],
            "prompts": [row.prompt for row in completions],
            "completion_ids": [list(row.token_ids) for row in completions],
            "trainer_state": trainer_state,
            **{name: [row.columns.get(name) for row in completions] for name in self.columns},
        }
        accepted = _accepted(_parameters(function), keywords)
        return {name: value for name, value in keywords.items() if name in accepted}

    def _failure(
        self,
        name: str,
        function: Callable[..., Any],
        completions: Sequence[Completion],
        trainer_state: Any,
        error: Exception,
    ) -> TrainingError:
        """The error for a function that failed; it is called again for one completion at a time to find the row."""
        for row in completions:
            try:
                function(**self._keywords(function, [row], trainer_state))
            except Exception as again:
                if type(again) is type(error):
                    what = f"{type(again).__name__}: {in_one_line(again)}"
                    return TrainingError(
                        f"Row {row.number}: reward {name!r} failed on the completion {row.text!r:.60} ({what:.200})",
                        index=row.number,
                    )
        return TrainingError(f"reward {name!r} failed: {type(error).__name__}: {in_one_line(error):.200}")


def _check_callable(function: Any) -> None:
    if isinstance(function, nn.Module):
        raise ConfigError(
            f"a reward is a function, not a {type(function).__name__}: call the model in a function "
            "f(completions, prompts, **columns)",
            field="reward",
        )
    if not callable(function) or isinstance(function, type):
        raise ConfigError(
            f"a reward must be a function f(completions, prompts, **columns), not {function!r:.60}", field="reward"
        )
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise ConfigError(f"reward {_name(function)!r} is asynchronous: pass an ordinary function", field="reward")


def _name(function: Any) -> str:
    inner = getattr(function, "func", function)  # of a functools.partial
    return str(getattr(inner, "__name__", type(inner).__name__))


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a function; None if they are unknown, as of some functions of C."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _accepted(parameters: Mapping[str, inspect.Parameter] | None, keywords: Iterable[str]) -> set[str]:
    """The keywords that a function with these parameters accepts; all if they are unknown."""
    if parameters is None or any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
        return {*keywords}
    return {*keywords} & parameters.keys()


def _taken(name: str, function: Callable[..., Any], columns: Sequence[str]) -> set[str]:
    """The columns that a function takes.

    Raises:
        ConfigError: it needs something that it is not given.
    """
    parameters, given = _parameters(function), (*_GIVEN, *columns)
    for item in (parameters or {}).values():
        if item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD):
            continue
        if item.kind is item.POSITIONAL_ONLY or (item.default is item.empty and item.name not in given):
            raise ConfigError(
                f"reward {name!r} needs {item.name!r}, and is called with the keywords {few(given, 8, quoted=False)}",
                field="reward",
            )
    return _accepted(parameters, columns)


def _number(name: str, value: Any, row: Completion) -> float:
    if value is None:  # it does not judge this completion
        return math.nan
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, bool | int | float) or not abs(value) <= _GREATEST:  # NaN too
        raise TrainingError(
            f"Row {row.number}: reward {name!r} returned {value!r:.40} for the completion {row.text!r:.60}, not a "
            "finite number",
            index=row.number,
        )
    return float(value)
