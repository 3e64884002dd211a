"""Session: the one shared state of a notebook or a script. Commands in, ``SessionState`` out."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from nbpeft.session.acting import ActingCommands
from nbpeft.session.comparing import ComparingCommands
from nbpeft.session.configs import field_names
from nbpeft.session.inspecting import InspectingCommands
from nbpeft.session.planning import PlanningCommands
from nbpeft.session.quantizing import QuantizingCommands
from nbpeft.session.runs import Runs

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.model import PeftModel
    from nbpeft.session.results import DoctorReport
    from nbpeft.state import MemoryState

    ModelLike = nn.Module | str | None


class Session(QuantizingCommands, ActingCommands, ComparingCommands, InspectingCommands, PlanningCommands, Runs):
    """Commands on the adapted models of a notebook or a script.

    A model is known by the name of its variable and held weakly. Every command that takes
    ``model`` accepts that name, the model itself, or None for the current model: the one that was
    adapted, loaded into, trained or switched last. When that one is unloaded or gone, no other takes its place
    until a command names one. Commands that take something away (``merge``, ``unmerge``, ``unload``,
    ``delete``, ``rename``, ``combine``, ``swap``, ``train``) refuse None where several models carry
    adapters. A command that fails leaves model, session and disk as they were; one that another
    thread runs meanwhile makes it raise ``BusyError`` at once.
    """

    def model(self, name: ModelLike = None, *, command: str = "") -> PeftModel:
        """The adapted model of that name (or behind a model), the current one for None.

        Args:
            name: a name or a model.
            command: what takes something away from it, e.g. ``unload``; None is refused then where
                several models carry adapters.

        Raises:
            AdapterError: there is none; the message names those there are.
        """
        return (self._book.get_for(command, name) if command else self._book.get(name)).model

    def base(self, model: ModelLike = None) -> nn.Module:
        """The base model under the adapters."""
        base: nn.Module = self._book.get(model).manager.model
        return base

    def memory(self, model: ModelLike = None) -> MemoryState:
        """Measures what a model uses; the state of the session carries it from then on."""
        from nbpeft.memory import measure

        entry = self._book.get(model)
        entry.memory = measure(entry.model)
        self._publish()
        return entry.memory

    def config_fields(self, peft_type: str = "LORA") -> tuple[str, ...]:
        """Fields of a method's config, for completion; none while torch is not imported, so that asking is cheap."""
        return field_names(peft_type) if "torch" in sys.modules else ()

    def training_fields(self) -> tuple[str, ...]:
        """Fields of ``TrainingArguments``, for completion; none while transformers is not imported."""
        transformers = sys.modules.get("transformers.training_args")
        return tuple(transformers.TrainingArguments.__dataclass_fields__) if transformers is not None else ()

    def doctor(self) -> DoctorReport:
        """What is installed, what is wrong with it, and what to install."""
        from nbpeft.session.doctor import examine

        return examine()
