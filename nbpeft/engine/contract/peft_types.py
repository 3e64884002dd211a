"""The values of ``task_type`` and ``peft_type`` in configs and files."""

from __future__ import annotations

import enum
from typing import Any

from nbpeft.names import PEFT_TYPES


class TaskType(str, enum.Enum):
    """What the adapted model is for. Values as in PEFT's files."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


TASK_HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""Task -> names of heads, which are randomly initialized; a model need not have a module of that name."""


class _Extensible(enum.EnumMeta):
    """An enum to which methods add their own member."""

    def add(cls, value: str) -> None:
        """Adds a member whose name is its value; does nothing if it exists."""
        if value in cls._value2member_map_:
            return
        member: Any = str.__new__(cls, value)  # type: ignore[arg-type]
        member._name_, member._value_, member._sort_order_ = value, value, len(cls._member_names_)
        cls._member_map_[value] = cls._value2member_map_[value] = member
        cls._member_names_.append(value)

    def __getattr__(cls, name: str) -> Any:
        found = cls.__dict__.get("_member_map_", {}).get(name)
        if found is None:
            raise AttributeError(name)
        return found


class PeftType(str, enum.Enum, metaclass=_Extensible):
    """Values of ``peft_type`` in config files: those of PEFT and those of registered methods."""


for _name in PEFT_TYPES:
    PeftType.add(_name)
