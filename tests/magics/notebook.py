"""A real IPython shell that a test writes cells into, and a tiny model for it."""

from __future__ import annotations

import atexit
from dataclasses import dataclass
from typing import Any

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

from nbpeft.session import Session, get_session


@dataclass
class Outcome:
    """What running a cell gave."""

    value: Any
    error: BaseException | None
    printed: str
    complained: str
    shown: tuple[str, ...] = ()
    """What was displayed besides the value, as plain text."""

    @property
    def everything(self) -> str:
        """All that a person sees, in one text."""
        return "\n".join((*self.shown, self.printed, self.complained, str(self.error or "")))

    @property
    def line(self) -> str:
        """The one line a person sees for a mistake; fails the test unless it was one."""
        assert type(self.error) is UsageError, f"expected a UsageError, got {self.error!r}"
        assert "Traceback" not in self.printed + self.complained
        return str(self.error)


class Notebook:
    """A shell with the extension loaded."""

    def __init__(self, **settings: Any) -> None:
        InteractiveShell.clear_instance()
        config = Config({"HistoryManager": {"enabled": False}, **settings})
        self.shell = InteractiveShell.instance(config=config)
        self.run("%load_ext nbpeft")

    def run(self, cell: str) -> Outcome:
        with capture_output() as captured:
            result = self.shell.run_cell(cell, store_history=True)
        error = result.error_in_exec or result.error_before_exec
        shown = tuple(str(output.data.get("text/plain", "")) for output in captured.outputs)
        return Outcome(result.result, error, captured.stdout, captured.stderr, shown)

    def do(self, cell: str) -> Any:
        """Runs a cell that must work, and gives its value."""
        outcome = self.run(cell)
        assert outcome.error is None, outcome.error
        return outcome.value

    def __getitem__(self, name: str) -> Any:
        return self.shell.user_ns[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.shell.user_ns[name] = value

    @property
    def session(self) -> Session:
        return get_session()

    def complete(self, text: str, cursor: int | None = None) -> list[str]:
        """What the kernel would offer at the cursor, in order."""
        from IPython.core.completer import provisionalcompleter

        with provisionalcompleter():
            return [
                item.text for item in self.shell.Completer.completions(text, len(text) if cursor is None else cursor)
            ]

    def close(self) -> None:
        self.run("%unload_ext nbpeft")
        self.shell.displayhook.do_full_cache = False  # or reset collects garbage, which takes longer than most tests
        self.shell.reset(new_session=False)
        atexit.unregister(self.shell.atexit_operations)  # or all shells of a run are kept, and reset again at its end
        InteractiveShell.clear_instance()
