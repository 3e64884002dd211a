"""What screen readers need and the widgets of ipywidgets lack: names and values of sliders, and pressed toggles.

ipywidgets has no traits for them, so a short script in the output next to the widgets sets them in the page. It also
keeps the arrow keys of a slider from Notebook 7, which would take them for shortcuts. Where scripts are not allowed,
the labels beside the sliders and the check marks of the toggles remain.
"""

from __future__ import annotations

SLIDER, TOGGLES = "nbpeft-slider", "nbpeft-toggles"
"""CSS classes of a row with a label and a slider, and of a row of toggle buttons."""

SCRIPT = f"""\
<script>
(() => {{
  if (window.nbpeftAria) return;
  const set = (node, name, value) => {{ if (node.getAttribute(name) !== value) node.setAttribute(name, value); }};
  const describe = () => {{
    for (const button of document.querySelectorAll('.{TOGGLES} button'))
      set(button, 'aria-pressed', String(button.classList.contains('nbpeft-on')));
    for (const row of document.querySelectorAll('.{SLIDER}')) {{
      const handle = row.querySelector('[role=slider]'), label = row.querySelector('.nbpeft-label');
      const value = row.querySelector('.widget-readout');
      if (!handle || !label || !value) continue;
      set(handle, 'aria-label', label.textContent.trim());
      set(handle, 'aria-valuetext', value.textContent.trim());
      set(handle, 'data-lm-suppress-shortcuts', 'true');
      set(value, 'role', 'textbox');
      set(value, 'aria-label', label.textContent.trim());
    }}
  }};
  let due = false;
  const soon = () => {{
    if (due) return;
    due = true;
    requestAnimationFrame(() => {{ due = false; describe(); }});
  }};
  window.nbpeftAria = new MutationObserver(soon);
  const watched = ['class', 'aria-valuetext'];
  window.nbpeftAria.observe(document.body, {{ subtree: true, childList: true, attributeFilter: watched }});
  soon();
}})();
</script>"""
"""Sets the attributes, and sets them again after every change of the page."""
