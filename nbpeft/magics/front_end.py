"""The front end of the notebook: the part of ``%lora doctor`` that needs IPython, and the choice of display."""

from __future__ import annotations

import os
import sys
from typing import Any

from nbpeft.session.doctor import install, older, version_of
from nbpeft.session.results import Check


def has_widgets() -> bool:
    """Whether ipywidgets is installed; it is not imported."""
    return bool(version_of("ipywidgets"))


def front_end_name(shell: Any) -> str:
    """A name of the front end, as far as the kernel can detect it; for display only."""
    if "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ:
        return "Google Colab"
    if any(name in os.environ for name in ("VSCODE_PID", "VSCODE_CWD", "VSCODE_IPC_HOOK_CLI")):
        return "VS Code (from the environment variables)"
    if hasattr(shell, "kernel"):
        return "a Jupyter kernel (JupyterLab, Notebook or another client)"
    return "a terminal" if shell is not None else "no IPython shell"


def front_end_checks(shell: Any) -> tuple[Check, ...]:
    """Checks of the shell, its kernel and its widgets."""
    checks = [Check("front end", front_end_name(shell))]
    if not hasattr(shell, "kernel"):
        checks.append(Check("panels", "text", optional=True))
        return tuple(checks)
    if not has_widgets():
        checks.append(
            Check("panels", "HTML without buttons", "ipywidgets is missing", install("ipywidgets"), optional=True)
        )
        return tuple(checks)
    widgets = version_of("ipywidgets")
    checks.append(Check("panels", f"widgets ({widgets})"))
    front = version_of("jupyterlab_widgets")
    if front and older(widgets, "8") != older(front, "3"):
        checks.append(
            Check(
                "jupyterlab_widgets",
                front,
                f"is incompatible with ipywidgets {widgets}: panels show 'javascript error'",
                f"{install('ipywidgets jupyterlab_widgets')}, then reload the page",
            )
        )
    return tuple(checks)
