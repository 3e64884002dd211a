"""Runs unmodified scripts and notebooks that ``import peft`` on nbpeft.

    python -m nbpeft.as_peft script.py --its arguments
    python -m nbpeft.as_peft -m package.module --its arguments
    accelerate launch -m nbpeft.as_peft script.py --its arguments
    %load_ext nbpeft.as_peft            in a notebook: %load_ext nbpeft, and ``import peft`` gives nbpeft

Importing this module changes nothing.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from nbpeft.peft_api.install import install_as_peft, uninstall_as_peft

_USAGE = "usage: python -m nbpeft.as_peft (script.py | -m module) [arguments]"


def main(arguments: Sequence[str]) -> None:
    """Runs a script or a module as ``python`` would, with nbpeft installed under the name ``peft``.

    Args:
        arguments: the script and its arguments; or "-m", the module and its arguments.

    Raises:
        SystemExit: no script is given, or help is requested; the message is the usage.
    """
    as_module = arguments[:1] == ["-m"]
    command = list(arguments[1:] if as_module else arguments)
    if not command or command[0] in ("-h", "--help"):
        raise SystemExit(_USAGE)
    with install_as_peft():
        sys.argv = command
        if as_module:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
            runpy.run_path(command[0], run_name="__main__")


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext nbpeft.as_peft``: loads nbpeft's magics and installs nbpeft under the name ``peft``."""
    from nbpeft.magics import load

    install_as_peft()
    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """``%unload_ext nbpeft.as_peft``: removes the magics and the name ``peft``."""
    from nbpeft.magics import unload

    unload(shell)
    uninstall_as_peft()


if __name__ == "__main__":
    main(sys.argv[1:])
