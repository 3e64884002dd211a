"""Colours and style strings of the panels.

Everything is inline: JupyterLab drops style sheets from notebooks it does not trust. A value
that its sanitizer does not know (``var(…)``) is dropped too, so what must survive is written
before it in plain CSS, and the theme's value after it.
"""

from __future__ import annotations

ACCENT = "var(--jp-brand-color1, #1976d2)"
ON_ACCENT = "var(--jp-layout-color0, #fff)"
BORDER = "var(--jp-border-color2, rgba(128,128,128,.35))"
DIM = "var(--jp-ui-font-color2, #757575)"
ERROR = "var(--jp-error-color1, #d32f2f)"
FILL = "var(--jp-layout-color2, rgba(128,128,128,.2))"
STRONG = "var(--jp-ui-font-color0, inherit)"
TEXT = "var(--jp-ui-font-color1, inherit)"
WARN = "var(--jp-warn-color0, #b26a00)"

SERIES = ("#4c78a8", "#f58518", "#e45756", "#72b7b2", "#b279a2", "#54a24b", "#9d755d", "#bab0ac")
"""Colours of parts of a whole, readable on light and dark."""

ELSEWHERE = "rgba(128,128,128,.55)"
"""Colour of memory that others use."""

EVAL = SERIES[1]
"""Colour of evaluation losses."""

FONT = "font:13px/1.45 var(--jp-ui-font-family, system-ui, sans-serif);font-variant-numeric:tabular-nums"

PANEL_CSS = f"""
.nbpeft-panel {{ border: 1px solid {BORDER}; border-radius: 6px; padding: 10px 14px; width: 100%; max-width: 930px;
  box-sizing: border-box; overflow: visible; container-type: inline-size; }}
.nbpeft-panel .widget-html-content, .nbpeft-panel .jupyter-widgets {{ {FONT}; color: {TEXT}; }}
.nbpeft-panel .widget-html-content {{ line-height: 1.45; align-self: stretch; overflow: visible; }}
.nbpeft-panel .jupyter-button {{ font-size: 12px; box-shadow: none; outline-offset: -2px; }}
.nbpeft-choices {{ flex-wrap: wrap; overflow: visible; padding-left: 1px; max-width: 100%; }}
.nbpeft-choices .jupyter-button {{ width: auto; height: 28px; line-height: 26px; margin: 0 0 4px -1px; padding: 0 14px;
  border: 1px solid {BORDER}; background: transparent; color: {TEXT}; font-size: 13px; }}
.nbpeft-choices .jupyter-button:first-child {{ border-radius: 4px 0 0 4px; }}
.nbpeft-choices .jupyter-button:last-child {{ border-radius: 0 4px 4px 0; }}
.nbpeft-choices .jupyter-button:hover:enabled {{ background: {FILL}; box-shadow: none; }}
.nbpeft-choices .jupyter-button.nbpeft-on, .nbpeft-choices .jupyter-button.nbpeft-on:hover:enabled {{
  background: {ACCENT}; border-color: {ACCENT}; color: {ON_ACCENT}; text-shadow: 0 0 .6px currentColor; }}
.nbpeft-choices .nbpeft-on + .jupyter-button.nbpeft-on {{ border-left-color: {ON_ACCENT}; }}
.nbpeft-row {{ border-bottom: 1px solid {BORDER}; align-items: center; min-height: 30px; overflow: visible; }}
.nbpeft-row.nbpeft-on {{ background: color-mix(in srgb, {ACCENT} 9%, transparent); box-shadow: inset 3px 0 {ACCENT}; }}
.nbpeft-grid {{ display: grid; align-items: center; grid-template-columns: minmax(0, 1.5fr) minmax(0, .8fr)
  minmax(0, .9fr) minmax(0, 1.6fr) minmax(0, 1.2fr) minmax(0, .9fr) minmax(0, 1.4fr); }}
.nbpeft-grid > div {{ padding: 4px 8px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }}
.nbpeft-grid > .nbpeft-number {{ text-align: right; }}
@container (max-width: 660px) {{
  .nbpeft-grid {{ grid-template-columns: minmax(0, 1.5fr) minmax(0, .9fr) minmax(0, 1.2fr) minmax(0, 1.5fr); }}
  .nbpeft-grid > .nbpeft-extra {{ display: none; }}
}}
@container (max-width: 460px) {{
  .nbpeft-grid {{ grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }}
  .nbpeft-grid > div:nth-child(3), .nbpeft-grid > div:nth-child(7) {{ display: none; }}
}}
.nbpeft-panel .nbpeft-small {{ height: 20px; line-height: 18px; padding: 0 3px; margin: 0 0 0 4px; flex: 0 0 auto;
  border: 1px solid {BORDER}; border-radius: 3px; background: {FILL}; color: {TEXT}; }}
.nbpeft-panel .jupyter-button.nbpeft-small.nbpeft-on {{ border-color: {ACCENT}; color: {ACCENT}; }}
.nbpeft-panel .nbpeft-danger {{ background: {ERROR}; border-color: {ERROR}; color: #fff; }}
.nbpeft-panel .nbpeft-bare {{ border-color: transparent; background: transparent; color: {DIM}; text-overflow: clip; }}
"""
"""Style sheet of the interactive panel, whose widgets never reach a notebook that is not trusted."""
