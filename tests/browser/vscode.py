"""What VS Code's notebook renderer gives to outputs, put on pages of the harness.

All outputs of a notebook are in one document (a webview):

- It has the colours of the theme as ``--vscode-*`` and a class of the body (``vscode-dark``), and none of JupyterLab's
  variables, until a widget is shown: the style sheet of ipywidgets brings those of JupyterLab's light theme with it.
- Widgets lie on white in every theme.
- HTML is put into the page, its scripts are run, and a policy allows inline scripts and styles, and images as data.
- What widgets other than the core ones of ipywidgets need is loaded from a CDN, which may be blocked.

Widgets of a kernel are shown by JupyterLab, whose page is repainted as VS Code's; HTML alone is put into a page with
VS Code's policy. VS Code itself is not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from urllib.parse import urlsplit

from playwright.sync_api import Page, Route

from tests.browser.harness import Browser, NotebookPage

Theme = Literal["light", "dark"]

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src https: data:; "
    "font-src data:; connect-src https:"
)
THEMES: dict[Theme, dict[str, str]] = {
    "dark": {
        "editor-background": "#1f1f1f",
        "editor-foreground": "#cccccc",
        "foreground": "#cccccc",
        "descriptionForeground": "#9d9d9d",
        "textLink-foreground": "#4daafc",
        "errorForeground": "#f85149",
        "editorWarning-foreground": "#cca700",
        "charts-green": "#89d185",
        "input-background": "#313131",
        "input-foreground": "#cccccc",
        "focusBorder": "#0078d4",
        "panel-border": "#2b2b2b",
        "scrollbarSlider-background": "rgba(121, 121, 121, 0.4)",
        "toolbar-hoverBackground": "rgba(90, 93, 94, 0.31)",
        "editorHoverWidget-background": "#202020",
    },
    "light": {
        "editor-background": "#ffffff",
        "editor-foreground": "#3b3b3b",
        "foreground": "#3b3b3b",
        "descriptionForeground": "#3b3b3b",
        "textLink-foreground": "#005fb8",
        "errorForeground": "#f85149",
        "editorWarning-foreground": "#bf8803",
        "charts-green": "#388a34",
        "input-background": "#ffffff",
        "input-foreground": "#3b3b3b",
        "focusBorder": "#005fb8",
        "panel-border": "#e5e5e5",
        "scrollbarSlider-background": "rgba(100, 100, 100, 0.4)",
        "toolbar-hoverBackground": "rgba(184, 184, 184, 0.31)",
        "editorHoverWidget-background": "#f8f8f8",
    },
}
"""Colours of its themes Dark Modern and Light Modern."""

_REPAINT = """
theme => {
  document.documentElement.style.cssText = theme.variables;
  document.body.classList.remove('vscode-dark', 'vscode-light');
  document.body.classList.add('vscode-' + theme.name);
  const sheet = document.getElementById('as-vscode') || document.createElement('style');
  sheet.id = 'as-vscode';
  sheet.textContent = `
    .jp-NotebookPanel, .jp-Notebook, .jp-WindowedPanel-outer, .jp-Cell, .jp-OutputArea-output {
      background: var(--vscode-editor-background) !important; color: var(--vscode-editor-foreground); }
    .jp-OutputArea-output:has(> .jupyter-widgets) { background: white !important; }`;
  document.head.append(sheet);
}
"""
_FILL = """
cards => {
  for (const card of cards) {
    const output = document.createElement('div');
    output.className = 'output';
    output.innerHTML = card;
    for (const found of output.querySelectorAll('script')) {
      const script = document.createElement('script');
      script.textContent = found.textContent;
      found.replaceWith(script);
    }
    document.body.append(output);
  }
}
"""


def block_others(page: Page) -> list[str]:
    """Refuses requests to other machines, as where a CDN is blocked; returns the list to which they are added."""
    asked: list[str] = []

    def decide(route: Route) -> None:
        parts = urlsplit(route.request.url)
        if parts.scheme in ("http", "https") and parts.hostname not in ("127.0.0.1", "localhost"):
            asked.append(route.request.url)
            route.abort()
        else:
            route.continue_()

    page.route("**/*", decide)
    return asked


def repaint(page: NotebookPage, theme: Theme) -> None:
    """Gives the outputs of a notebook in JupyterLab the colours that they have in VS Code.

    Args:
        page: the notebook, in JupyterLab's light theme.
        theme: the theme of VS Code.
    """
    page.page.evaluate(_REPAINT, {"name": theme, "variables": _variables(theme)})


def show_html(browser: Browser, cards: Sequence[str], theme: Theme) -> tuple[Page, list[str]]:
    """Shows HTML outputs as VS Code does before any widget was shown.

    Args:
        browser: the browser.
        cards: the HTML of each output.
        theme: the theme of VS Code.

    Returns:
        The page, and the messages of its console, among which are violations of its policy.
    """
    page, console = browser.new_page(), list[str]()
    page.on("console", lambda message: console.append(message.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    page.set_content(
        f'''<!doctype html><html style="{_variables(theme)}"><head>
        <meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>outputs</title><style>
        body {{ background: var(--vscode-editor-background); color: var(--vscode-editor-foreground);
          font: 13px system-ui, sans-serif; margin: 0; }}
        .output {{ padding: 8px; box-sizing: border-box; }}</style></head>
        <body class="vscode-{theme}"></body></html>'''
    )
    page.evaluate(_FILL, list(cards))
    return page, console


def _variables(theme: Theme) -> str:
    return "; ".join(f"--vscode-{name}: {colour}" for name, colour in THEMES[theme].items())
