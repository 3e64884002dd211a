"""All colours as CSS values.

Theme colours are CSS variables with a fallback, so they follow the light or dark theme: those of VS Code, else those of
JupyterLab. VS Code has JupyterLab's, too, once it shows a widget, but always those of the light theme. In a notebook
that is not trusted, the sanitizer drops declarations with ``var(…)``: ``PLAIN`` has fixed colours to write before them.
"""

from __future__ import annotations


def themed(in_vscode: str, in_jupyterlab: str, otherwise: str) -> str:
    """Returns a colour of the theme, by its variable in VS Code and in JupyterLab, or a fixed one."""
    return f"var(--vscode-{in_vscode}, var(--jp-{in_jupyterlab}, {otherwise}))"


ACCENT = themed("textLink-foreground", "brand-color1", "#1976d2")
ON_ACCENT = themed("editor-background", "layout-color0", "#fff")
BORDER = themed("scrollbarSlider-background", "border-color2", "rgba(128,128,128,.35)")
DIM = themed("descriptionForeground", "ui-font-color2", "#757575")
ERROR = themed("errorForeground", "error-color1", "#d32f2f")
DANGER = "var(--jp-error-color1, #d32f2f)"
FILL = themed("toolbar-hoverBackground", "layout-color2", "rgba(128,128,128,.2)")
PAPER = themed("editor-background", "layout-color0", "transparent")
SUCCESS = themed("charts-green", "success-color0", "#2e7d32")
STRONG = themed("editor-foreground", "ui-font-color0", "inherit")
TEXT = themed("editor-foreground", "ui-font-color1", "inherit")
TOOLTIP = themed("editorHoverWidget-background", "layout-color1", "#fff")
WARNING = themed("editorWarning-foreground", "warn-color0", "#b26a00")

ERROR_TEXT, SUCCESS_TEXT, WARNING_TEXT = (
    f"color-mix(in srgb, {colour} {share}%, {themed('editor-foreground', 'ui-font-color0', 'currentColor')})"
    for colour, share in ((ERROR, 70), (SUCCESS, 80), (WARNING, 60))
)
"""Colours of text, mixed with that of plain text: their contrast is at least 4.5:1 in the light and the dark theme."""

PLAIN = {ACCENT: "#1976d2", ERROR: "#d32f2f", FILL: "rgba(128,128,128,.2)"}

PARTS = {
    "base weights": "#4c78a8",
    "adapters": "#f58518",
    "gradients": "#e45756",
    "optimizer": "#72b7b2",
    "activations": "#b279a2",
    "KV cache": "#54a24b",
    "temporary": "#9d755d",
    "other": "#bab0ac",
    "elsewhere": "rgba(128,128,128,.55)",
}
"""Colours of the parts of memory, readable on light and dark."""

EVALUATION = PARTS["adapters"]
"""Colour of evaluation losses in a chart."""

CHANGED = "rgba(114,183,178,.38)"
"""Background of words that differ."""

LEARNED = "rgba(84,162,75,.30)"
"""Background of tokens with labels."""

COMPARED = "rgba(245,133,24,.28)"
"""Background of tokens with labels in a rejected completion."""

CUT = "#e45756"
"""Colour of everything beyond a limit."""

LIMIT = "rgba(128,128,128,.8)"
"""Colour of the mark at the end of a device's memory, if the memory is sufficient."""

WIDTH = 900
"""Maximum width of a card or a panel in pixels, including padding and border."""

FONT = "font:13px/1.45 var(--jp-ui-font-family, system-ui, sans-serif);font-variant-numeric:tabular-nums"
MONOSPACE = "font-family:monospace;font-family:var(--jp-code-font-family, ui-monospace, Menlo, Consolas, monospace)"


def of_part(name: str) -> str:
    """Returns the colour of a part of memory."""
    return PARTS.get(name, PARTS["other"])


def background(colour: str) -> str:
    """Returns a background declaration that also works if a sanitizer drops ``var(…)``."""
    plain = PLAIN.get(colour)
    return f"background:{plain};background:{colour}" if plain else f"background:{colour}"
