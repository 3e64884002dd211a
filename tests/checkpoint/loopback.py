"""A hub small enough to live in a test: repositories in memory, served on the loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest

COMMIT = "c" * 40
TOKEN = "hf_" + "x" * 30


class Hub:
    """What the hub holds and what it was asked.

    Attributes:
        files: repository -> path -> content.
        asked: method and path of each request.
        gated: repositories that need access.
        accepted: the tokens that may write; None for all.
        read_only: whether tokens may read alone.
        large: whether safetensors go through LFS.
        branches: besides ``main``.
        commits: repository, branch and message of each commit.
        private: repositories that were made private.
        gives_parts: whether it honours ``Range``.
        sent: path of a file -> bytes of it that were sent.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.gated: set[str] = set()
        self.tokens: set[str] = set()
        self.broken = False
        self.accepted: set[str] | None = None
        self.read_only = False
        self.large = False
        self.blobs: dict[str, bytes] = {}
        self.branches: set[str] = set()
        self.commits: list[tuple[str, str, str]] = []
        self.private: set[str] = set()
        self.endpoint = ""
        self.gives_parts = True
        self.sent: dict[str, int] = {}


def listing(name: str, content: bytes) -> dict[str, Any]:
    """A file as the hub lists it."""
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def note(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token.removeprefix("Bearer "))
        return path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.note()
        if self.hub.broken:
            return self.reply(503)
        if path.startswith("/api/datasets/"):
            return self.describe(path.removeprefix("/api/"))
        if "/resolve/" not in path:
            return self.reply(404)
        if self.refused():
            return None
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repo in self.hub.gated:
            return self.reply(403, X_Error_Code="GatedRepo")
        if repo not in self.hub.files:
            return self.reply(404, X_Error_Code="RepoNotFound")
        if revision not in ("main", COMMIT, *self.hub.branches):
            return self.reply(404, X_Error_Code="RevisionNotFound")
        content = self.hub.files[repo].get(name)
        if content is None:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        etag, asked = hashlib.sha1(content).hexdigest(), self.headers.get("Range", "")
        if asked and self.hub.gives_parts:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            content = content[int(first) : int(last) + 1]
        if self.command == "GET":
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(content)
        return self.reply(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    def take_in(self, repo: str, branch: str, body: bytes) -> None:
        """A commit: its message, and each file itself or the blob that it names."""
        files = {}
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.commits.append((repo, branch, value["summary"]))
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        self.hub.files[repo] |= files

    def mode_of(self, path: str) -> str:
        return "lfs" if self.hub.large and path.endswith(".safetensors") else "regular"

    def place_of(self, item: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.hub.endpoint}/upload/{item['oid']}", "header": {}}
        return {"oid": item["oid"], "size": item["size"], "actions": {"upload": upload}}

    def describe(self, path: str) -> None:
        """A dataset, or the list of its files."""
        repo, what = "/".join(path.split("/")[:3]), path.split("/")[3:]
        if repo not in self.hub.files:
            return self.reply(404, X_Error_Code="RepoNotFound")
        files = [listing(name, content) for name, content in self.hub.files[repo].items()]
        if what[:1] == ["tree"]:
            return self.reply_json(files if len(what) == 2 else [])
        name = repo.partition("/")[2]
        siblings = [{"rfilename": file["path"]} for file in files]
        return self.reply_json({"id": name, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_PUT(self) -> None:
        path, body = self.note(), self.body()
        self.hub.blobs[path.rpartition("/")[2]] = body
        return self.reply(200)

    def refused(self) -> bool:
        """Whether the token is not accepted, which is said then."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.hub.accepted is not None and token not in self.hub.accepted:
            self.reply(401, b'{"error": "Invalid username or password."}', Content_Type="application/json")
        elif self.hub.read_only and self.command == "POST":
            self.reply(403, b'{"error": "You have read access only."}', Content_Type="application/json")
        else:
            return False
        return True

    def do_POST(self) -> None:
        path, body = self.note(), self.body()
        if self.hub.broken:
            return self.reply(503)
        if self.refused():
            return None
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = asked["name"] if not asked.get("organization") else f"{asked['organization']}/{asked['name']}"
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            self.hub.files.setdefault(name, {})
            return self.reply_json({"url": f"{self.hub.endpoint}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.reply_json({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self.reply_json({"objects": [self.place_of(item) for item in json.loads(body)["objects"]]})
        if "/branch/" in path:
            self.hub.branches.add(path.rpartition("/branch/")[2])
            return self.reply(200)
        if "/paths-info/" in path:
            content = self.hub.files["/".join(path.split("/")[2:5])]
            names = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            return self.reply_json([listing(name, content[name]) for name in names if name in content])
        return self.upload(path, body)

    def upload(self, path: str, body: bytes) -> None:
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": self.mode_of(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.reply_json({"files": files})
        if "/commit/" in path:
            self.take_in(repo, path.rpartition("/commit/")[2], body)
            return self.reply_json(
                {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{COMMIT}"}
            )
        return self.reply(404)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def be_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Lets the hub's client find this hub, with ``TOKEN`` in the environment, and keep everything below a folder."""
    hub.accepted = {TOKEN}
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    settings = {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_TOKEN_PATH": str(folder / "no token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (folder / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "scratch"))
