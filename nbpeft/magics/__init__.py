"""The notebook's commands: ``%load_ext nbpeft`` registers them, ``%unload_ext nbpeft`` leaves nothing behind.

A mistake in a line or in a cell is a ``CellError`` of the function that reads it: one line that names the nearest valid
word. The functions that change a shell return one that restores it.

Files:

    body.py              Cell bodies: Python assignments, one per line, evaluated in the notebook's namespace
    cell_spelling.py     Rewrites the messages of the session in the notation of cells
    cells.py             Cells while the extension is loaded: repeated warnings are collapsed, magics need no body, each
                         result is shown
    complete.py          Completion of magics: the words that may follow at the cursor. Pure functions, without IPython
    front_end.py         The front end of the notebook: the part of ``%lora doctor`` that needs IPython, and the choice
                         of display
    help.py              Help texts, examples first, generated from the declarations of the commands
    inspecting.py        Shift+Tab on a field, a command or an option shows its meaning, type, default and values
    lora.py              The magics: they parse, call the session and return the result to IPython
    matcher.py           Connects completion to IPython: as a v2 matcher, or with the old hook in versions without
                         matchers
    notebook_context.py  The context of a subcommand: the notebook's variables, the session, and how to show panels
    parse.py             Parses the line of a magic into a request. Pure functions, without IPython or a model
    registry.py          The registry of ``%lora`` subcommands and cell magics: every file in ``subcommands/`` registers
                         its own
    tokenize.py          Splits a magic's line into words
"""

from __future__ import annotations

import sys
from typing import Any

_NAMES = ("lora", "lora_train", "qlora")
_CLASS = "NbpeftMagics"

_installed: dict[int, Any] = {}


def load(shell: Any) -> None:
    """Register magics and completion with an IPython shell, after removing an earlier instance."""
    from traitlets import TraitError
    from traitlets.config import Config

    from nbpeft.magics import cells, inspecting
    from nbpeft.magics.lora import CELLS, SUBCOMMANDS, NbpeftMagics, completion_sources
    from nbpeft.magics.matcher import Completion, install

    unload(shell)
    try:
        magics = NbpeftMagics(shell)
    except TraitError as error:  # a bad value in the configuration must not disable the magics
        print(f"nbpeft: the configuration is ignored: {error}", file=sys.stderr)
        _drop_configurables(shell)
        magics = NbpeftMagics(shell, parent=None, config=Config())
    shell.register_magics(magics)
    if magics not in shell.configurables:
        shell.configurables.append(magics)
    removers = (
        install(shell, Completion(SUBCOMMANDS, CELLS, completion_sources(magics))),
        cells.collapse_warnings(shell),
        cells.allow_empty_bodies(shell, CELLS),
        cells.show_every_result(shell, _NAMES),
        inspecting.install(shell, magics.describe),
    )
    _installed[id(shell)] = (magics, removers)


def unload(shell: Any) -> None:
    """Remove everything from a shell; adapters stay in their models."""
    magics, removers = _installed.pop(id(shell), (None, ()))
    for remove in removers:
        remove()
    if magics is not None:
        from nbpeft.session import close_session

        magics.close()
        widgets = sys.modules.get("nbpeft.widgets")
        if widgets is not None:
            widgets.close_all()
        close_session()
    for kind in ("line", "cell"):
        for name in _NAMES:
            shell.magics_manager.magics[kind].pop(name, None)
    shell.magics_manager.registry.pop(_CLASS, None)
    _drop_configurables(shell)


def _drop_configurables(shell: Any) -> None:
    shell.configurables[:] = [item for item in shell.configurables if type(item).__name__ != _CLASS]
