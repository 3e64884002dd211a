"""The magics: they parse, call the session and return the result to IPython."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from IPython.core import magic
from IPython.core.error import UsageError
from IPython.display import display
from traitlets import Enum, Unicode, observe

from nbpeft.errors import CellError, Interrupted, NbpeftError, TrainingInterrupted, in_one_line
from nbpeft.magics.body import excerpt, parse_body, with_fields
from nbpeft.magics.cell_spelling import in_cell_spelling, option_names
from nbpeft.magics.complete import CompletionSources, Values
from nbpeft.magics.help import FOR_AGENTS, agent_guide, command_help, main_help
from nbpeft.magics.inspecting import describe
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import parse_arguments, parse_line
from nbpeft.magics.registry import registered
from nbpeft.magics.tokenize import tokenize, without_comment
from nbpeft.session import Session, StatusReport, get_session
from nbpeft.session.fields import module_names
from nbpeft.session.handles import is_module
from nbpeft.session.results import Notice

# Typed Any: IPython's annotations of these decorators fit plain functions only, not methods.
_as_typed: Any = magic.no_var_expand
_line_or_cell: Any = magic.line_cell_magic

SUBCOMMANDS, CELLS = registered()
_MAIN_HELP = main_help(CELLS, SUBCOMMANDS)
_LONGEST = 400
"""The greatest length of a message, in characters."""


@magic.magics_class
class NbpeftMagics(magic.Magics):
    """``%lora``, ``%%lora``, ``%%qlora`` and ``%%lora_train``."""

    ui: Any = Enum(
        ["auto", "widgets", "html", "text"],
        "auto",
        help="How panels are shown: widgets, html, text, or whatever works (auto).",
    ).tag(config=True)

    runs_folder: Any = Unicode(
        None,
        allow_none=True,
        help="Folder for training runs; '' stores none. By default nbpeft_runs, or the folder that NBPEFT_RUNS names.",
    ).tag(config=True)

    shell: Any

    def __init__(self, shell: Any, **options: Any) -> None:
        super().__init__(shell, **options)
        self.session: Session = get_session()
        if self.runs_folder is not None:  # else it may have been set in Python
            self.session.context.chosen_runs_folder = self.runs_folder
        self._trained: dict[str, Any] = {}
        self._options: dict[str, str] = {}
        self._unsubscribe: Callable[[], None] = self.session.on_run(self._run_starts)

    def close(self) -> None:
        """End background trainings while their views still exist, and detach the magics from the session."""
        self.session.end_trainings()
        self._unsubscribe()

    @observe("runs_folder")
    def _move_runs(self, change: Any) -> None:
        if hasattr(self, "session"):
            self.session.context.chosen_runs_folder = change["new"]

    @property
    def notebook(self) -> NotebookContext:
        """The notebook in its current state."""
        return NotebookContext(self.shell.user_ns, self.session, ui=self.ui, shell=self.shell, trained=self._trained)

    @_as_typed
    @_line_or_cell("lora")
    def lora(self, line: str, cell: str | None = None) -> object:
        """Adapters."""
        return self._answer("lora", line, cell)

    @_as_typed
    @_line_or_cell("lora_train")
    def lora_train(self, line: str, cell: str | None = None) -> object:
        """Training."""
        return self._answer("lora_train", line, cell)

    @_as_typed
    @_line_or_cell("qlora")
    def qlora(self, line: str, cell: str | None = None) -> object:
        """Quantized models."""
        return self._answer("qlora", line, cell)

    lora.__doc__ = f"{_MAIN_HELP}\n\n{command_help(CELLS['lora'], '%%lora')}"
    qlora.__doc__ = str(command_help(CELLS["qlora"], "%%qlora"))
    lora_train.__doc__ = str(command_help(CELLS["lora_train"], "%%lora_train"))

    def describe(self, text: str, cursor: int) -> str | None:
        """Describe the field, command or option at a position in a cell, for a tooltip.

        Args:
            text: the whole cell.
            cursor: offset in the cell, in characters.

        Returns:
            The description, or None if the position does not belong to these magics.
        """
        return describe(text, cursor, SUBCOMMANDS, CELLS, self.session.fields)

    def _parsed(self, name: str, line: str, cell: str | None, *, silent: bool) -> Callable[[], object]:
        """Return what runs a magic; its fields are in the line, in the body, or in both."""
        notebook = self.notebook
        notebook.line, notebook.cell = line, cell
        notebook.silent = silent
        if name == "lora" and cell is None:
            word, _, rest = line.strip().partition(" ")
            if word in ("help", "?", "-h", "--help"):
                name = rest.strip().lstrip("%")
                if name == FOR_AGENTS:
                    return agent_guide
                if f"lora_{name}" in CELLS and name not in SUBCOMMANDS:
                    name = f"lora_{name}"
                if not name or name == "lora":
                    return partial(command_help, CELLS["lora"], "%%lora") if name else lambda: _MAIN_HELP
                if name in CELLS:
                    return partial(command_help, CELLS[name], f"%%{name}")
                line = f"{name} --help"
            request = parse_line(line, SUBCOMMANDS, notebook.namespace, cells=CELLS)
            if request is None:
                return partial(StatusReport, self.session.state)
            prog = f"%lora {request.command.name}"
        else:
            prog = f"%%{name}"
            request = parse_arguments(CELLS[name], prog, tokenize(line), notebook.namespace)
        if request.help:
            return partial(command_help, request.command, prog)
        self._options = option_names(request.command, (*SUBCOMMANDS.values(), *CELLS.values()))
        self.session.context.spelled = partial(in_cell_spelling, names=self._options)
        return partial(request.command.run, with_fields(request.options, cell, notebook.namespace), notebook)

    def _answer(self, name: str, line: str, cell: str | None) -> object:
        """Run a command; a user's mistake becomes a one-line error, anything else keeps its traceback.

        A semicolon at the end hides the result, as for Python in a notebook. IPython's own decorator for that
        (``output_can_be_silenced``) does not fit: it parses the line as Python, after the command has run.

        The new error is raised outside the ``except`` block, so that the command's error is not its ``__context__``:
        the frames of that error reference the model and would keep it alive.
        """
        line = without_comment(line)
        silent = (line if cell is None else cell.rstrip()).endswith(";")
        if silent and cell is None:
            line = line.rstrip(";")
        interrupted: Interrupted | None = None
        self._options = {}
        self.session.adopt(self.shell.user_ns)
        self._show_notices()
        try:
            result = self._parsed(name, line, cell, silent=silent)()
            self._show_notices()
            return None if silent else in_cell_spelling(result, self._options)
        except NbpeftError as error:
            self._show_notices()
            if name == "lora_train" and "running" in error.details:
                self._show_running()
            message = _message(error, cell, self._options)
            self._keep_traceback(error)
        except TrainingInterrupted as error:
            interrupted = TrainingInterrupted(str(error), error.result)
        except KeyboardInterrupt as error:
            interrupted = Interrupted(f"{'%' if cell is None else '%%'}{name} was interrupted")
            self._keep_traceback(error)
        except Exception as error:
            if name != "lora_train":  # in any other command an unexpected exception is a bug of nbpeft
                raise
            message = f"training failed: {type(error).__name__}: {in_one_line(error):.300} (%lora doctor --traceback)"
            self._keep_traceback(error)
        finally:
            self.session.context.spelled = str
        # Raised outside the except blocks: as its context, the caught error would keep its frames and their tensors.
        if interrupted is not None:
            raise interrupted
        raise UsageError(message)

    def _show_notices(self) -> None:
        """Shows pending notices of the session, each on a line of its own."""
        for words in self.session.notices():
            display(Notice(in_cell_spelling(words, self._options)))

    def _keep_traceback(self, error: BaseException) -> None:
        """Stores the traceback as text, and clears its frames so that they keep no tensors alive."""
        self.session.note_failure(error)
        traceback.clear_frames(error.__traceback__)

    def _show_running(self) -> None:
        """Shows the card of the background training that refuses another: a cell run again has replaced it."""
        found = self.session.find_run()
        if isinstance(found, tuple):
            self._run_starts(*found)

    def _run_starts(self, run: Any, model_name: str) -> None:
        """Show a run live."""
        from nbpeft.widgets import show_run

        show_run(run, self.session, model_name, ui=self.ui)


def completion_sources(magics: NbpeftMagics) -> CompletionSources:
    """The sources of names for completion; each is called only when it is needed."""

    def variables() -> list[str]:
        hidden = magics.shell.user_ns_hidden
        return [name for name in magics.shell.user_ns if not name.startswith("_") and name not in hidden]

    def models() -> list[str]:
        names = [*magics.notebook.model_names(), *magics.session.names, *magics.session.past_names]
        return [f'"{name}"' if " " in name else name for name in dict.fromkeys(names)]

    def adapters() -> list[str]:
        magics.session.adopt(magics.shell.user_ns)
        return magics.notebook.adapter_names()

    def modules(model: str) -> tuple[str, ...]:
        value = magics.shell.user_ns.get(model)
        return module_names(value) if is_module(value) else ()

    def values(kind: str, name: str, method: str, model: str) -> Values:
        field = magics.session.fields(kind, method).get(name)
        if field is None:
            return Values()
        names = modules(model) if field.modules else ()
        return Values((*field.choices, *names), (*field.listed, *names))

    return CompletionSources(
        models=models,
        adapters=adapters,
        variables=variables,
        runs=magics.session.run_names,
        methods=magics.session.method_names,
        combinations=magics.session.combination_types,
        fields={kind: partial(magics.session.fields, kind) for kind in ("config", "training", "qlora", "plan")},
        values=values,
        modules=modules,
    )


def _message(error: NbpeftError, cell: str | None, options: Mapping[str, str]) -> str:
    """The message of an error; for an error in a cell body, also the line it occurs in, with a caret."""
    located = error if isinstance(error, CellError) else _locate(error, cell)
    text = in_one_line(error)
    if not isinstance(error, CellError):  # the magics' own errors are in cell notation already
        text = in_cell_spelling(text, options)
    if len(text) > _LONGEST:  # cut in the middle: the beginning says what is wrong, the end what to do
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 3 :]}"
    if cell is None or located is None or located.line is None:
        return text
    return f"line {located.line}: {text}\n{excerpt(cell, located)}"


def _locate(error: NbpeftError, cell: str | None) -> CellError | None:
    """The position in a body of the field that an error is about."""
    name = error.details.get("field", error.details.get("name"))
    if cell is None or not isinstance(name, str):
        return None
    try:
        assignment = next((item for item in parse_body(cell) if item.name == name), None)
    except CellError:
        return None
    return None if assignment is None else CellError(str(error), line=assignment.line, column=assignment.column)
