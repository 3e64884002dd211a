"""The notebook's commands: ``%load_ext nbpeft`` registers them, ``%unload_ext nbpeft`` leaves nothing behind.

A mistake in a line or in a cell is a ``CellError`` of the function that reads it: one line that names the nearest valid
word. The functions ``install`` change a shell, and return a function that restores it.
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

    from nbpeft.magics import cell_logs, empty_bodies, inspecting
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
        cell_logs.install(shell),
        empty_bodies.install(shell, CELLS),
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
