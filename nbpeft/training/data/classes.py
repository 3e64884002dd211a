"""The classes of a classifier of texts or tokens, and the conversion of a row's label to one of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nbpeft.checkpoint.prompt_format import are_unnamed, class_numbers
from nbpeft.errors import did_you_mean, few
from nbpeft.names import IGNORED_LABEL
from nbpeft.training.data.row import is_empty_cell

SINGLE_LABEL = "single_label_classification"


@dataclass(frozen=True)
class Classes:
    """The meaning of a classifier's labels.

    Attributes:
        count: number of its outputs.
        names: name of a class -> its number, as in the model's config.
        problem: ``"single_label_classification"``, ``"multi_label_classification"`` or ``"regression"``.
        per_token: whether each token has a label, not each text.
    """

    count: int
    names: Mapping[str, int] = field(default_factory=dict)
    problem: str = SINGLE_LABEL
    per_token: bool = False

    @classmethod
    def of(cls, config: Any, *, per_token: bool = False) -> Classes:
        """The classes of a model.

        Args:
            config: its config of transformers.
            per_token: whether each token has a label; transformers computes the loss of single labels for them.
        """
        count = int(config.num_labels)
        if per_token:
            return cls(count, class_numbers(config), per_token=True)
        usual = "regression" if count == 1 else SINGLE_LABEL
        return cls(count, class_numbers(config), config.problem_type or usual)

    @property
    def by_number(self) -> tuple[str, ...]:
        """The names of the classes, by number; none if they have only those that transformers gives."""
        if are_unnamed(self.names.items()) or sorted(self.names.values()) != [*range(self.count)]:
            return ()
        return tuple(sorted(self.names, key=self.names.__getitem__))

    def named(self, labels: Iterable[Any], numbered: Sequence[str] = ()) -> Classes:
        """The classes with the names of the labels of rows, in alphabetical order, if they have no names yet.

        Args:
            labels: the labels of all rows.
            numbered: the dataset's names of labels that are numbers.

        Raises:
            ValueError: there are more or fewer names than classes; the message says how to load the model.
        """
        if self.problem != SINGLE_LABEL or not are_unnamed(self.names.items()):
            return self
        names = list(numbered) if len(numbered) == self.count else sorted(self._names_in(labels))
        if names and len(names) != self.count:
            raise ValueError(
                f"the rows have {len(names)} labels ({few(names, 8, quoted=False)}), and the model {self.count} "
                f"classes without names: load it with num_labels={len(names)} or with the label2id of all labels, or "
                "correct the labels"
            )
        return replace(self, names={name: number for number, name in enumerate(names)}) if names else self

    def _names_in(self, labels: Iterable[Any]) -> set[str]:
        """The names in the labels of rows; none if a label is a number, or a name that the model has."""
        found: set[str] = set()
        for value in labels:
            if is_empty_cell(value) or value == "" or (self.per_token and value == IGNORED_LABEL):
                continue
            if not isinstance(value, str) or value in self.names or _is_number(value):
                return set()
            found.add(str(value))
        return found

    def label(self, value: Any) -> int | float | list[float] | None:
        """A label in the form the model takes; None for an empty cell.

        Args:
            value: the number or name of a class; for several labels a list of numbers, one for each class.

        Raises:
            ValueError: it is not a label of this model; the message says what is expected.
        """
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        value = value.tolist() if hasattr(value, "tolist") else value
        if is_empty_cell(value) or value == "":
            return None
        if self.problem == SINGLE_LABEL:
            return self._number(value)
        if self.problem == "regression" and self.count == 1:
            return self._real(value)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != self.count:
            raise ValueError(f"expected a list of {self.count} numbers ({self.problem})")
        return [self._real(item) for item in value]

    def tag(self, value: Any) -> int:
        """The label of a token in the form the model takes; ``IGNORED_LABEL`` stays as it is.

        Args:
            value: the number or name of a class.

        Raises:
            ValueError: it is not a label of this model; the message says what is expected.
        """
        label = IGNORED_LABEL if value == IGNORED_LABEL else self.label(value)
        if label is None:
            raise ValueError(f"expected a class or {IGNORED_LABEL}, which is not learned")
        return int(label)  # type: ignore[arg-type]

    def name(self, label: Any) -> str:
        """A label as text to display."""
        found = next((name for name, number in self.names.items() if number == label), None)
        return str(label) if found in (None, f"LABEL_{label}") else f"{label} ({found})"

    def _number(self, value: Any) -> int:
        if isinstance(value, str) and self.names.get(value, self.count) < self.count:  # label2id may have more names
            return self.names[value]
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if number == number and number.is_integer() and 0 <= number < self.count:
            return int(number)
        hint = did_you_mean(value, self.names) if isinstance(value, str) else ""
        known = few(self.names, 8, quoted=False)
        raise ValueError(
            f"the model knows 0 to {self.count - 1} ({known}).{hint} Load it with the labels of these rows: "
            "num_labels=…, label2id={…}"
        )

    def _real(self, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"expected a number ({self.problem})")
        return number


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def names_of(feature: Any) -> tuple[str, ...]:
    """The names of the numbers in a column of a dataset, also of numbers in lists; empty if there are none.

    Args:
        feature: the dataset's description of the column, or None.
    """
    return tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())
