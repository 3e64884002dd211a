"""The magics: parse, call the session, hand the result to IPython. No other decision is taken here."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from IPython.core import magic
from IPython.core.error import UsageError
from traitlets import Enum

from nbpeft.errors import CellError, NbpeftError, in_one_line
from nbpeft.magics.adapting import ADAPT_OPTIONS, adapt
from nbpeft.magics.body import evaluate, excerpt, parse_body, parse_fields
from nbpeft.magics.complete import Vocabulary
from nbpeft.magics.desk import Desk
from nbpeft.magics.help import HelpText, main_help, verb_help
from nbpeft.magics.panels import show_run, status_of
from nbpeft.magics.parse import Request, Verb, argument, parse_line, parse_verb
from nbpeft.magics.quantizing import OWN_FIELDS, QLORA_OPTIONS, qlora
from nbpeft.magics.registry import verbs
from nbpeft.magics.scan import scan
from nbpeft.magics.training import TRAIN_OPTIONS, train
from nbpeft.session import Session, session

# Typed Any: their own types fit plain functions, not methods.
_as_typed: Any = magic.no_var_expand
_line_or_cell: Any = magic.line_cell_magic

_MODEL = argument("target", metavar="MODEL", completes="model", help="variable that holds the model")

LORA_CELL = Verb(
    "lora",
    "Configure an adapter and apply it to a model. The cell's lines are fields of the config, name = value.",
    lambda options, desk: None,
    (_MODEL, *ADAPT_OPTIONS),
    fields="config",
    example="%%lora model --name sql\n  r = 16\n  target_modules = 'all-linear'",
)
TRAIN_CELL = Verb(
    "lora_train",
    "Train the active adapters of a model. The cell's lines are fields of TrainingArguments, name = value.",
    train,
    (_MODEL, *TRAIN_OPTIONS),
    fields="training",
    example="%%lora_train model --data train_ds --eval eval_ds --tokenizer tok\n  num_train_epochs = 1",
)
QLORA_CELL = Verb(
    "qlora",
    "Load a model quantized (or quantize one in memory), prepare it for training, and put an adapter on it. "
    "The cell's lines are fields of the quantization and of the config, name = value.",
    qlora,
    QLORA_OPTIONS,
    fields="qlora",
    example="%%qlora HuggingFaceTB/SmolLM2-135M-Instruct --as model --name sql\n  bits = 4\n  r = 16",
)
CELLS = {"lora": LORA_CELL, "lora_train": TRAIN_CELL, "qlora": QLORA_CELL}
VERBS = verbs()
_LONGEST = 400
"""Characters of a message."""


@magic.magics_class
class NbpeftMagics(magic.Magics):
    """``%lora``, ``%%lora``, ``%%qlora`` and ``%%lora_train``."""

    ui: Any = Enum(
        ["auto", "widgets", "html", "text"],
        "auto",
        help="How panels are shown: widgets, html, text, or whatever works (auto).",
    ).tag(config=True)

    shell: Any

    def __init__(self, shell: Any, **options: Any) -> None:
        super().__init__(shell, **options)
        self.session: Session = session()
        self._trained: dict[str, Any] = {}
        self._unsubscribe: Callable[[], None] = self.session.on_run(self._run_starts)

    def close(self) -> None:
        """Takes the magics off the session."""
        self._unsubscribe()

    @property
    def desk(self) -> Desk:
        """The notebook as it is now."""
        return Desk(self.shell.user_ns, self.session, ui=self.ui, shell=self.shell, trained=self._trained)

    @_as_typed
    @_line_or_cell("lora")
    def lora(self, line: str, cell: str | None = None) -> object:
        """Adapters."""
        return self._answer(line, cell, self._lora)

    @_as_typed
    @_line_or_cell("lora_train")
    def lora_train(self, line: str, cell: str | None = None) -> object:
        """Training."""
        return self._answer(line, cell, functools.partial(self._with_fields, TRAIN_CELL))

    @_as_typed
    @_line_or_cell("qlora")
    def qlora(self, line: str, cell: str | None = None) -> object:
        """Quantized models."""
        return self._answer(line, cell, functools.partial(self._with_fields, QLORA_CELL))

    lora.__doc__ = main_help(LORA_CELL, VERBS, (TRAIN_CELL, QLORA_CELL))
    qlora.__doc__ = verb_help(QLORA_CELL, "%%qlora")
    lora_train.__doc__ = verb_help(TRAIN_CELL, "%%lora_train")

    def _lora(self, line: str, cell: str | None) -> object:
        desk = self.desk
        if cell is not None:
            request = self._cell_request(LORA_CELL, line)
            return HelpText(self.lora.__doc__) if request.help else adapt(desk, request.options, _body(cell, desk))
        word, _, rest = line.strip().partition(" ")
        if word in ("help", "-h", "--help"):
            if not rest:
                return HelpText(self.lora.__doc__)
            line = f"{rest} --help"
        request_or_none = parse_line(line, VERBS, desk.namespace)
        if request_or_none is None:
            self.session.adopt(desk.namespace)
            return status_of(self.session)
        if request_or_none.help:
            return HelpText(verb_help(request_or_none.verb, f"%lora {request_or_none.verb.name}"))
        return request_or_none.verb.run(request_or_none.options, desk)

    def _with_fields(self, verb: Verb, line: str, cell: str | None) -> object:
        """Runs a cell magic whose fields stand in its body, or in its line, or in both."""
        desk = self.desk
        request = self._cell_request(verb, line)
        if request.help:
            return HelpText(verb_help(verb, f"%%{verb.name}"))
        fields = parse_fields(request.options.fields, desk.namespace)
        request.options.fields = fields if cell is None else {**fields, **_body(cell, desk)}
        return verb.run(request.options, desk)

    def _cell_request(self, verb: Verb, line: str) -> Request:
        return parse_verb(verb, f"%%{verb.name}", scan(line), self.shell.user_ns)

    def _answer(self, line: str, cell: str | None, act: Callable[[str, str | None], object]) -> object:
        """Runs a command; a person's mistake becomes one line, anything else keeps its traceback.

        A semicolon at the end means, as for Python in a notebook, that the result is not shown.
        IPython's own decorator for that reads the line as Python, after the command was carried out.

        The error of the command is left behind before the new one is raised, because its frames
        hold the model.

        Raises:
            UsageError: the mistake, in one line (and the line of the cell it is in).
        """
        silent = (line if cell is None else cell).rstrip().endswith(";")
        if silent and cell is None:
            line = line.rstrip().rstrip(";")
        try:
            result = act(line, cell)
            return None if silent else result
        except NbpeftError as error:
            message = _message(error, cell)
            traceback.clear_frames(error.__traceback__)
        raise UsageError(message)

    def _run_starts(self, run: Any, model_name: str) -> None:
        show_run(self.desk, run, model_name)


def vocabulary(magics: NbpeftMagics) -> Vocabulary:
    """Where completion finds names. Asks nothing before it is needed."""

    def variables() -> list[str]:
        hidden = magics.shell.user_ns_hidden
        return [name for name in magics.shell.user_ns if not name.startswith("_") and name not in hidden]

    def adapters() -> list[str]:
        magics.session.adopt(magics.shell.user_ns)
        return [item.name for model in magics.session.state.models for item in model.adapters]

    return Vocabulary(
        models=lambda: magics.desk.model_names(),
        adapters=adapters,
        variables=variables,
        fields={
            "config": magics.session.config_fields,
            "training": magics.session.training_fields,
            "qlora": lambda: [*OWN_FIELDS, *magics.session.config_fields()],
        },
    )


def _body(cell: str, desk: Desk) -> Mapping[str, Any]:
    return evaluate(parse_body(cell), desk.namespace)


def _message(error: NbpeftError, cell: str | None) -> str:
    """One line, and for an error in a cell body the line it is in with a caret."""
    located = error if isinstance(error, CellError) else _locate(error, cell)
    text = in_one_line(error)
    if len(text) > _LONGEST:  # cut in the middle: what is wrong stands at the beginning, what to do at the end
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 3 :]}"
    if cell is None or located is None or located.line is None:
        return text
    return f"line {located.line}: {text}\n{excerpt(cell, located)}"


def _locate(error: NbpeftError, cell: str | None) -> CellError | None:
    """Where in a body the field is set that an error is about."""
    name = error.details.get("field", error.details.get("name"))
    if cell is None or not isinstance(name, str):
        return None
    try:
        found = next((item for item in parse_body(cell) if item.name == name), None)
    except CellError:
        return None
    return None if found is None else CellError(str(error), line=found.line, column=found.column)
