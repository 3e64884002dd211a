"""What a verb works with: the notebook's variables, the session, and the way to show panels."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nbpeft.errors import CellError, near, with_article
from nbpeft.magics.body import evaluate_expression, expression_of, look_up
from nbpeft.magics.scan import reference
from nbpeft.session import Session


@dataclass(frozen=True)
class TrainingCell:
    """What a training cell said, kept without the objects of the notebook.

    Attributes:
        data: expression of the rows.
        eval_data: expression of the rows to evaluate on.
        tokenizer: expression, where one was given.
        max_length: tokens a row is cut to.
        arguments: fields whose values can be written down.
        left_out: the other fields.
    """

    data: str
    eval_data: str | None
    tokenizer: str | None
    max_length: int | None
    arguments: dict[str, Any] = field(repr=False)  # a token may be among them
    left_out: tuple[str, ...]


@dataclass
class Desk:
    """The notebook as verbs see it.

    Attributes:
        namespace: variables of the notebook.
        session: where commands go.
        ui: how panels are shown: ``auto``, ``widgets``, ``html`` or ``text``.
        shell: the IPython shell, or None outside one.
        trained: model variable -> the last cell that trained it.
    """

    namespace: MutableMapping[str, Any]
    session: Session
    ui: Literal["auto", "widgets", "html", "text"] = "auto"
    shell: Any = None
    trained: dict[str, TrainingCell] = field(default_factory=dict)

    def model_names(self) -> list[str]:
        """Variables that hold a torch module, adapted ones first. Imports nothing."""
        known = [name for name in self.session.names if name in self.namespace]
        return known + [
            name
            for name, value in list(self.namespace.items())
            if not name.startswith("_") and is_module(value) and name not in known
        ]

    def module(self, name: str) -> Any:
        """The model in a variable, bare or adapted.

        Raises:
            CellError: the variable is not there, or holds no model; names those that do.
        """
        text = reference(name) or name
        if text not in self.namespace:
            raise CellError(f"no variable is called {text!r:.60}.{self._models_instead(text)}")
        value = self.namespace[text]
        if not is_module(value):
            raise CellError(f"{text!r:.60} is {with_article(value)}, not a model.{self._models_instead(text)}")
        return value

    def only_model(self, what: str) -> str:
        """The variable a command without a model means.

        Raises:
            CellError: there is no model, or more than one.
        """
        names = self.model_names()
        if len(names) == 1:
            return names[0]
        if not names:
            raise CellError(f"{what} needs a model, and no variable holds one")
        raise CellError(f"{what}: say which model: {', '.join(names)}")

    def chosen(self, name: str | None) -> Any:
        """What a command on adapters gets as its model: a module, a session name, or None for the current one.

        What a variable holds now goes before a model that was in it once.

        Raises:
            CellError: no model is called that.
        """
        self.session.adopt(self.namespace)
        if name is None or (name in self.session.names and not is_module(self.namespace.get(name))):
            return name
        return self.module(name)

    def bind(self, name: str, model: Any) -> None:
        """Lets a variable of the notebook hold the adapted model."""
        self.namespace[name] = model

    def replace(self, old: object, new: object) -> list[str]:
        """Lets every variable that holds one object hold another; returns their names."""
        names = [name for name, value in self.namespace.items() if value is old and not name.startswith("_")]
        for name in names:
            self.namespace[name] = new
        return names

    def value(self, text: str, option: str) -> Any:
        """A variable or an expression given to an option, e.g. ``train_ds`` or ``ds["train"]``.

        Raises:
            CellError: it is not there or cannot be evaluated.
        """
        name = reference(text) or text
        if name.isidentifier():
            return look_up(name, self.namespace)
        return evaluate_expression(expression_of(text, option), dict(self.namespace))

    def forget(self, thing: object) -> None:
        """Takes an object, and stored tracebacks, out of what the notebook remembers of outputs."""
        for name, value in list(self.namespace.items()):
            if value is thing and name.startswith("_"):
                self.namespace[name] = None
        history = self.namespace.get("Out")
        if isinstance(history, dict):
            for number in [number for number, value in history.items() if value is thing]:
                del history[number]
        displayhook = getattr(self.shell, "displayhook", None)
        for attribute in ("_", "__", "___"):
            if getattr(displayhook, attribute, None) is thing:
                setattr(displayhook, attribute, None)
        forget_tracebacks(self.shell)

    def _models_instead(self, name: str) -> str:
        models = self.model_names()
        close = near(name, models)
        if close:
            return f" Did you mean {' or '.join(map(repr, close))}?"
        return f" Models here: {', '.join(models)}." if models else " No variable holds a model yet."


def is_module(value: object) -> bool:
    """Whether a value is a torch module. Imports nothing."""
    torch = sys.modules.get("torch")
    nn = getattr(torch, "nn", None)
    module = getattr(nn, "Module", None)
    return module is not None and isinstance(value, module)


def forget_tracebacks(shell: Any) -> None:
    """Drops the last traceback, whose frames may hold tensors."""
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            setattr(sys, name, None)
    for name in ("InteractiveTB", "SyntaxTB"):
        handler: Any = getattr(shell, name, None)
        if getattr(handler, "tb", None) is not None:
            handler.tb = None
