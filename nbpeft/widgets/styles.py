"""The style sheet of the panels. Untrusted notebooks show no widgets, so they need no styles for them."""

from __future__ import annotations

from nbpeft.display.html import SCROLLS
from nbpeft.display.palette import ACCENT, BORDER, DANGER, DIM, ERROR, FILL, FONT, ON_ACCENT, TEXT, WIDTH, themed

_ROW_BUTTONS = 164
"""Width of the buttons Save and Delete in a row, in pixels."""

_MEMBER_BUTTONS = 168
"""Width of the buttons Stop and Clone in the row of an adapter of a sweep, in pixels."""

_BUTTON = f"""width: auto; height: 26px; line-height: 24px; margin: 0; padding: 0 10px; flex: 0 0 auto;
  border: 1px solid {BORDER}; border-radius: 4px; background: transparent; color: {TEXT}; font-size: 12px;
  box-shadow: none;"""

_IN_VSCODE = f"""background: var(--vscode-editor-background, transparent);
  --jp-widgets-color: {TEXT}; --jp-widgets-label-color: {TEXT}; --jp-widgets-readout-color: {TEXT};
  --jp-widgets-input-color: {TEXT};
  --jp-widgets-input-background-color: {themed("input-background", "layout-color1", "transparent")};
  --jp-widgets-input-border-color: {themed("scrollbarSlider-background", "border-color1", "#808080")};"""
"""VS Code lays widgets on white in every theme, with the colours of JupyterLab's light one."""

RUN_CSS = f"""
.nbpeft-run {{ overflow: visible; width: calc(100% - 20px); {_IN_VSCODE} }}
.nbpeft-buttons {{ gap: 6px; padding: 6px 0 4px; }}
.nbpeft-run .widget-inline-hbox {{ height: auto; }}
.nbpeft-run .widget-html-content {{ line-height: 1.45; align-self: stretch; overflow: visible; }}
.nbpeft-run .jupyter-button {{ {_BUTTON} min-width: 88px; }}
.nbpeft-run .jupyter-button:hover:enabled {{ background: {FILL}; box-shadow: none; }}
.nbpeft-members {{ width: 100%; max-width: {WIDTH}px; padding-bottom: 4px; {FONT}; color: {TEXT}; {SCROLLS} }}
.nbpeft-members > * {{ min-width: 560px; border-bottom: 1px solid {BORDER}; overflow: visible; }}
.nbpeft-members > .widget-html {{ padding-right: {_MEMBER_BUTTONS}px; box-sizing: border-box; }}
.nbpeft-member {{ align-items: center; gap: 6px; padding: 2px 0; }}
.nbpeft-run .nbpeft-member .jupyter-button {{ min-width: {_MEMBER_BUTTONS // 2 - 6}px; }}
.nbpeft-run .jupyter-button:focus-visible {{ outline: 2px solid {ACCENT}; outline-offset: 1px; }}
"""
"""Style rules of a run's card with its buttons."""

PANEL_CSS = f"""
.nbpeft-panel {{ border: 1px solid {BORDER}; border-radius: 6px; padding: 10px 14px; width: calc(100% - 20px);
  max-width: {WIDTH}px;
  box-sizing: border-box; overflow: visible; container-type: inline-size; {_IN_VSCODE} }}
.nbpeft-panel .widget-html-content, .nbpeft-panel .jupyter-widgets {{ {FONT}; color: {TEXT}; }}
.nbpeft-panel .widget-html-content {{ line-height: 1.45; align-self: stretch; min-width: 0; overflow: visible; }}
.nbpeft-panel .widget-inline-hbox {{ height: auto; }}
.nbpeft-panel .jupyter-button {{ {_BUTTON} }}
.nbpeft-panel .jupyter-button:hover:enabled {{ background: {FILL}; box-shadow: none; }}
.nbpeft-panel .jupyter-button:focus-visible, .nbpeft-panel input:focus-visible, .nbpeft-panel select:focus-visible,
.nbpeft-panel textarea:focus-visible, .nbpeft-panel .noUi-handle:focus-visible {{
  outline: 2px solid {ACCENT}; outline-offset: 1px; }}
.nbpeft-panel .jupyter-button.nbpeft-on {{ border-color: {ACCENT}; color: {ACCENT}; }}
.nbpeft-panel .jupyter-button.nbpeft-primary, .nbpeft-panel .jupyter-button.nbpeft-primary:hover:enabled {{
  background: {ACCENT}; border-color: {ACCENT}; color: {ON_ACCENT}; }}
.nbpeft-panel .jupyter-button.nbpeft-danger, .nbpeft-panel .jupyter-button.nbpeft-danger:hover:enabled {{
  background: {DANGER}; border-color: {DANGER}; color: #fff; }}
.nbpeft-panel .jupyter-button.nbpeft-bare {{ border-color: transparent; color: {DIM}; }}
.nbpeft-panel .jupyter-button.nbpeft-bare:hover:enabled {{ color: {ERROR}; }}
.nbpeft-panel .jupyter-button.nbpeft-apart {{ margin-left: 18px; }}
.nbpeft-row-buttons, .nbpeft-form, .nbpeft-settings, .nbpeft-foot {{ flex-wrap: wrap; gap: 6px;
  overflow: visible; align-items: center; }}
.nbpeft-settings {{ gap: 6px 16px; }}
.nbpeft-settings > * {{ flex: 0 0 auto; max-width: 100%; }}
.nbpeft-form {{ padding: 4px 8px 8px; }}
.nbpeft-choices, .nbpeft-chips {{ flex-wrap: wrap; overflow: visible; max-width: 100%; }}
.nbpeft-choices {{ padding-left: 1px; }}
.nbpeft-choices .jupyter-button {{ height: 28px; line-height: 26px; margin: 0 0 4px -1px; padding: 0 14px;
  border-radius: 0; font-size: 13px; }}
.nbpeft-choices .jupyter-button:first-child {{ border-radius: 4px 0 0 4px; }}
.nbpeft-choices .jupyter-button:last-child {{ border-radius: 0 4px 4px 0; }}
.nbpeft-choices .jupyter-button:focus-visible {{ z-index: 1; }}
.nbpeft-choices .jupyter-button.nbpeft-on, .nbpeft-choices .jupyter-button.nbpeft-on:hover:enabled {{
  background: {ACCENT}; border-color: {ACCENT}; color: {ON_ACCENT}; }}
.nbpeft-choices .nbpeft-on + .jupyter-button.nbpeft-on {{ border-left-color: {ON_ACCENT}; }}
.nbpeft-chips {{ gap: 6px; }}
.nbpeft-chips .jupyter-button {{ border-radius: 13px; color: {DIM}; }}
.nbpeft-toggles .jupyter-button.nbpeft-on::before {{ content: "✓ "; }}
.nbpeft-row, .nbpeft-head {{ border-bottom: 1px solid {BORDER}; align-items: center; overflow: visible; }}
.nbpeft-head .widget-html-content {{ margin-right: {_ROW_BUTTONS}px; }}
.nbpeft-row.nbpeft-on {{ background: color-mix(in srgb, {ACCENT} 9%, transparent); box-shadow: inset 3px 0 {ACCENT};
  --jp-ui-font-color2: var(--jp-ui-font-color1); }}
.nbpeft-row-buttons {{ flex-wrap: nowrap; width: {_ROW_BUTTONS}px; justify-content: flex-end; padding-right: 4px;
  box-sizing: border-box; }}
.nbpeft-foot {{ padding-top: 6px; }}
.nbpeft-runs {{ width: 100%; {SCROLLS} }}
.nbpeft-runs > .nbpeft-row, .nbpeft-runs-grid {{ min-width: min-content; overflow: visible; }}
.nbpeft-runs-grid {{ display: grid; padding-left: 26px; align-items: end; border-bottom: 1px solid {BORDER}; }}
.nbpeft-panel.nbpeft-wide {{ max-width: none; }}
.nbpeft-runs > .nbpeft-row {{ padding-left: 4px; }}
.nbpeft-runs-grid > * {{ margin: 0 !important; }}
.nbpeft-runs-grid .widget-html-content {{ padding: 0 8px; line-height: 26px; }}
.nbpeft-panel .nbpeft-runs-grid .jupyter-button {{ padding: 0 8px; text-align: left; white-space: normal; height: auto;
  min-height: 26px; line-height: 16px; }}
.nbpeft-panel .nbpeft-runs-grid .jupyter-button:hover:enabled {{ color: {TEXT}; }}
.nbpeft-panel .nbpeft-runs-grid .jupyter-button.nbpeft-on::after {{ content: " ↓"; }}
.nbpeft-runs .widget-checkbox {{ min-width: 22px; overflow: hidden; }}
.nbpeft-grid {{ display: grid; align-items: start;
  grid-template-columns: minmax(0, 1.9fr) minmax(0, 1.1fr) minmax(92px, 1fr) minmax(0, 1.1fr); }}
.nbpeft-grid > div {{ padding: 4px 8px; overflow: hidden; overflow-wrap: anywhere; }}
.nbpeft-grid > .nbpeft-number {{ text-align: right; white-space: nowrap; }}
@container (max-width: 520px) {{
  .nbpeft-grid {{ grid-template-columns: minmax(0, 1.6fr) minmax(92px, 1fr) minmax(0, 1fr); }}
  .nbpeft-grid > .nbpeft-extra {{ display: none; }}
  .nbpeft-head .widget-html-content {{ margin-right: 0; }}
  .nbpeft-row-buttons {{ width: 100%; padding-bottom: 4px; }}
}}
@container (max-width: 340px) {{
  .nbpeft-grid {{ grid-template-columns: minmax(0, 1.5fr) minmax(0, 1fr); }}
  .nbpeft-grid > .nbpeft-number {{ display: none; }}
  .nbpeft-choices .jupyter-button, .nbpeft-chips .jupyter-button {{ max-width: 100%; height: auto; min-height: 28px;
    line-height: 20px; white-space: normal; overflow-wrap: anywhere; }}
}}
.nbpeft-panel .nbpeft-label {{ flex: 0 0 24%; min-width: 60px; max-width: 200px; padding-right: 8px;
  box-sizing: border-box; overflow: hidden; }}
.nbpeft-panel .widget-readout {{ min-width: 48px; max-width: 48px; box-sizing: border-box; }}
.nbpeft-panel .noUi-handle {{ background: {ACCENT}; border-color: {ACCENT}; }}
.nbpeft-weight .slider-container {{ position: relative; overflow: visible; }}
.nbpeft-weight .slider-container::before {{ content: ""; position: absolute; left: 40%; top: -7px; width: 1px;
  height: 18px; background: {DIM}; }}
.nbpeft-scale {{ position: relative; height: 16px; margin: 0 58px 0 6px; font-size: 11px; color: {DIM}; }}
.nbpeft-scale > span {{ position: absolute; transform: translateX(-50%); }}
.nbpeft-panel .widget-label {{ color: {DIM}; text-align: left; padding-right: 6px; }}
.nbpeft-unlabelled > .widget-label {{ position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); }}
.nbpeft-panel textarea, .nbpeft-panel input, .nbpeft-panel select {{ font-size: 13px; border-radius: 3px; }}
.nbpeft-panel select {{ appearance: auto; background-image: none; padding-right: 2px; }}
.nbpeft-panel textarea {{ line-height: 1.4; padding: 5px 8px; box-sizing: border-box; }}
.nbpeft-panel .nbpeft-question {{ flex-wrap: wrap; gap: 8px; }}
.nbpeft-question > .widget-textarea {{ min-width: 0; }}
.nbpeft-panel.nbpeft-inner {{ margin-top: 12px; width: 100%; max-width: none; }}
"""


def style_sheet(more: str = "") -> str:
    """The style sheet as HTML."""
    return f"<style>{PANEL_CSS}{more}</style>"
