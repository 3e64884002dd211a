"""A Jupyter server for tests: on the loopback, with settings of its own and none of the user's."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Literal, Self

App = Literal["lab", "notebook"]

SETTINGS: dict[str, dict[str, Any]] = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}


class HarnessError(AssertionError):
    """The page did not do what the test expected of it."""


class JupyterServer:
    """A server on the loopback with settings of its own, and none of the user's.

    Args:
        folder: Holds the notebooks.
        app: JupyterLab or Notebook 7.
        variables: Environment of the server and its kernels.
        settings: Further JupyterLab settings, by plugin.
    """

    def __init__(
        self,
        folder: Path,
        app: App,
        *,
        variables: dict[str, str] | None = None,
        settings: dict[str, dict[str, Any]] | None = None,
        timeout: float = 90,
    ) -> None:
        self.folder, self.app, self._timeout = folder.resolve(), app, timeout
        self._variables = dict(variables or {})
        self._settings = {**SETTINGS, **(settings or {})}
        self._token = secrets.token_hex(16)

    def __enter__(self) -> Self:
        self._home = Path(tempfile.mkdtemp(prefix="nbpeft-jupyter-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._base = f"http://127.0.0.1:{probe.getsockname()[1]}"
        overrides = self._home / "config" / "labconfig" / "default_setting_overrides.json"
        overrides.parent.mkdir(parents=True)
        overrides.write_text(json.dumps(self._settings))
        self._log = (self._home / "server.log").open("wb")
        self._process = subprocess.Popen(
            self._command(),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._environment(),
            cwd=self.folder,
            start_new_session=True,
        )
        self._wait_until_up()
        return self

    def url(self, notebook: str) -> str:
        """Where a notebook of the folder opens."""
        path = urllib.request.pathname2url(notebook)
        place = f"/lab/tree/{path}?reset&token=" if self.app == "lab" else f"/notebooks/{path}?token="
        return self._base + place + self._token

    def log(self, characters: int = 4000) -> str:
        """The end of what the server and its kernels wrote."""
        self._log.flush()
        return (self._home / "server.log").read_text(errors="replace")[-characters:]

    def __exit__(self, *_: object) -> None:
        # SIGTERM lets the server end its kernels; after that, its own process group.
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(5)
        self._log.close()
        shutil.rmtree(self._home, ignore_errors=True)

    def _command(self) -> list[str]:
        application = {"lab": "LabApp", "notebook": "JupyterNotebookApp"}[self.app]
        command = [
            *(sys.executable, "-m", {"lab": "jupyterlab", "notebook": "notebook"}[self.app]),
            *("--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0"),
            f"--ServerApp.port={self._base.rpartition(':')[2]}",
            f"--ServerApp.root_dir={self.folder}",
            f"--IdentityProvider.token={self._token}",
            "--ServerApp.terminals_enabled=False",
            f"--{application}.expose_app_in_browser=True",
        ]
        if self.app == "lab":
            command += ["--LabApp.news_url=None", "--LabApp.extension_manager=readonly"]
            command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
        return command

    def _environment(self) -> dict[str, str]:
        others = ("JUPYTER_", "JPY_", "NBPEFT_RUNS")  # training runs are stored next to their notebook, as for users
        kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        home = self._home
        return {
            **kept,
            "JUPYTER_CONFIG_DIR": str(home / "config"),
            "JUPYTER_DATA_DIR": str(home / "data"),
            "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
            "JUPYTERLAB_SETTINGS_DIR": str(home / "lab-settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(home / "lab-workspaces"),
            "JUPYTER_PLATFORM_DIRS": "1",
            "IPYTHONDIR": str(home / "ipython"),
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **self._variables,
        }

    def _wait_until_up(self) -> None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + self._timeout
        while True:
            if self._process.poll() is not None:
                raise HarnessError(f"the server ended with {self._process.returncode}:\n{self.log()}")
            try:
                direct.open(f"{self._base}/api/status?token={self._token}", timeout=2).read()
                return
            except (urllib.error.URLError, OSError):
                if time.monotonic() > deadline:
                    log = self.log()
                    self.__exit__()
                    raise HarnessError(f"the server is not up after {self._timeout} s:\n{log}") from None
                time.sleep(0.05)
