"""Style sheet of the panels, whose widgets never reach a notebook that is not trusted."""

from __future__ import annotations

from nbpeft.display.palette import ACCENT, BORDER, DIM, ERROR, FILL, FONT, ON_ACCENT, TEXT

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
.nbpeft-grid {{ display: grid; align-items: center; grid-template-columns: minmax(0, 1.4fr) minmax(0, .8fr)
  minmax(0, .9fr) minmax(0, 1.9fr) minmax(0, 1.2fr) minmax(0, .9fr) minmax(0, 1.3fr); }}
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
.nbpeft-panel textarea, .nbpeft-panel input, .nbpeft-panel select {{ font-size: 13px; }}
.nbpeft-panel select {{ appearance: auto; background-image: none; }}
.nbpeft-panel textarea {{ line-height: 1.4; padding: 5px 8px; box-sizing: border-box; }}
.nbpeft-panel .nbpeft-action {{ height: 28px; line-height: 26px; padding: 0 10px; margin: 0 0 0 8px; flex: 0 0 auto;
  border: 1px solid {BORDER}; border-radius: 3px; background: {FILL}; color: {TEXT}; }}
.nbpeft-panel .jupyter-button.nbpeft-primary, .nbpeft-panel .jupyter-button.nbpeft-primary:hover:enabled {{
  background: {ACCENT}; border-color: {ACCENT}; color: {ON_ACCENT}; }}
.nbpeft-inner {{ margin-top: 12px; max-width: none; }}
.nbpeft-settings {{ flex-wrap: wrap; align-items: center; gap: 4px 14px; overflow: visible; }}
.nbpeft-settings > * {{ flex: 0 0 auto; }}
"""


def style_sheet(more: str = "") -> str:
    """The style sheet as HTML.

    Args:
        more: Further rules.
    """
    return f"<style>{PANEL_CSS}{more}</style>"
