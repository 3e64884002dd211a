"""Location of a checkpoint: a local folder or a repository on the hub; downloads and uploads.

Saving an adapter never contacts the hub.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nbpeft._util.hub_access import hub_options
from nbpeft.checkpoint.hub_token import TOKENS_PAGE
from nbpeft.checkpoint.inside import expanded, is_there, leads_to_file, leads_to_folder
from nbpeft.checkpoint.staging import STAGING_PREFIX
from nbpeft.checkpoint.tensor_file import (
    LEGACY_WEIGHTS_NAME,
    LONGEST_HEADER,
    WEIGHTS_NAME,
    TensorFile,
    TensorFileToFetch,
)
from nbpeft.errors import CheckpointError, CheckpointNotFoundError, did_you_mean, few, near, shown

CONFIG_NAME = "adapter_config.json"

Result = TypeVar("Result")

_MISSPELLED = 0.85
"""Similarity above which an unknown keyword counts as a misspelled option and not as one meant for another library."""
LARGE = 2**28
"""Size in bytes above which the header of a tensor file on the hub is checked before the file is downloaded."""
_OWN_OPTIONS = frozenset({"repo_id", "filename", "subfolder", "dry_run"})


@dataclass(frozen=True)
class Source:
    """Location of a checkpoint, before anything is read.

    Attributes:
        name: a folder, a file in it, or a hub id.
        subfolder: subfolder of the source, or None.
        options: options of ``hf_hub_download`` (``revision``, ``cache_dir``, ``token``, …).
    """

    name: str
    subfolder: str | None
    options: Mapping[str, Any] = field(repr=False)  # a token may be among them

    @classmethod
    def of(cls, source: str | os.PathLike[str], subfolder: str | None, options: Mapping[str, Any]) -> Source:
        """Creates a source; a file of a checkpoint is replaced by its folder.

        Args:
            source: a folder, a file in it, or a hub id.
            subfolder: subfolder of the source, or None.
            options: options of ``hf_hub_download``; None values are dropped.

        Raises:
            CheckpointNotFoundError: the name cannot be a path.
            PathTypeError: it is neither a text nor a path.
            CheckpointError: an option is unknown.
        """
        name = expanded(source)
        if any("\ud800" <= letter <= "\udbff" or letter == "\0" for letter in name):
            raise CheckpointNotFoundError(f"{shown(name)} cannot be the name of a folder")
        if os.path.isfile(name) and os.path.basename(name) in (CONFIG_NAME, WEIGHTS_NAME, LEGACY_WEIGHTS_NAME):
            name = os.path.dirname(name) or "."
        return cls(name, subfolder or None, checked_options(options))

    @property
    def folder(self) -> Path:
        """The local folder; it need not exist."""
        return Path(self.name, self.subfolder) if self.subfolder else Path(self.name)

    def config_file(self) -> Path:
        """Returns the path of ``adapter_config.json``, which is downloaded if the source is on the hub.

        Raises:
            CheckpointNotFoundError: there is no such file.
        """
        if leads_to_file(self.folder / CONFIG_NAME):
            return self.folder / CONFIG_NAME
        if self._is_local():
            raise self._not_found(CONFIG_NAME)
        return download(self.name, CONFIG_NAME, self.subfolder, self.options)

    def tensor_file(self, config_file: Path) -> TensorFile:
        """Opens the tensor file that belongs to a config. Of a large file on the hub only the header is downloaded.

        Args:
            config_file: path returned by ``config_file``; for the hub it determines the commit.

        Raises:
            CheckpointNotFoundError: there is no tensor file.
            CorruptCheckpointError: the file is truncated, altered or of another format.
        """
        path = config_file.parent / WEIGHTS_NAME
        if config_file.parent != self.folder and not leads_to_file(path) and not self.options.get("force_download"):
            options = {**self.options, **commit_of(config_file)}
            found = start_of_large_file(self.name, WEIGHTS_NAME, self.subfolder, options)
            if found is not None:
                return TensorFileToFetch(path, *found, lambda: self.weights_file(config_file))
        return TensorFile(self.weights_file(config_file))

    def weights_file(self, config_file: Path) -> Path:
        """Returns the path of the tensor file that belongs to a config: safetensors, or else PEFT's old ``.bin``.

        Args:
            config_file: path returned by ``config_file``; for the hub it determines the commit.

        Raises:
            CheckpointNotFoundError: neither file exists.
        """
        local = config_file.parent == self.folder
        for name in (WEIGHTS_NAME, LEGACY_WEIGHTS_NAME):
            if (local or not self.options.get("force_download")) and leads_to_file(config_file.parent / name):
                return config_file.parent / name
        if local:
            raise self._not_found(f"{WEIGHTS_NAME} or {LEGACY_WEIGHTS_NAME}")
        options = {**self.options, **commit_of(config_file)}
        try:
            return download(self.name, WEIGHTS_NAME, self.subfolder, options)
        except CheckpointNotFoundError as absent:
            try:
                return download(self.name, LEGACY_WEIGHTS_NAME, self.subfolder, options)
            except CheckpointNotFoundError:
                raise absent from None

    def _is_local(self) -> bool:
        """Returns whether the name can only be a folder and not a hub id (``user/name``), so that no hub is needed."""
        return (
            os.path.exists(self.name)
            or os.path.isabs(self.name)
            or self.name.startswith((".", "~"))
            or "\\" in self.name
            or self.name.count("/") != 1
        )

    def _not_found(self, what: str) -> CheckpointNotFoundError:
        folder = self.folder
        if not is_there(folder):
            bare = ", and an id on the hub reads user/name" if os.sep not in self.name and "/" not in self.name else ""
            return CheckpointNotFoundError(
                f"there is no folder {folder}{bare}.{_near_folder(folder)}", path=str(folder)
            )
        if not leads_to_folder(folder):
            return CheckpointNotFoundError(f"{folder} is a file, not a folder with {what}", path=str(folder))
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f" There are adapters in its subfolders {few(inside)}." if inside else ""
        return CheckpointNotFoundError(f"there is no {what} in {folder}.{hint}", path=str(folder), subfolders=inside)


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Checks download options and drops those that are None.

    Raises:
        CheckpointError: an option is not an argument of ``huggingface_hub.hf_hub_download``.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if "use_auth_token" in options:
        options["token"] = options.pop("use_auth_token")
    if options.keys() <= {"revision", "cache_dir", "token", "local_files_only"}:
        return options
    known = _known_options()
    for name in options:
        if name not in known:
            raise CheckpointError(
                f"unknown option {name!r} for reading a checkpoint; known: {', '.join(sorted(known))}."
                + did_you_mean(name, known),
                option=name,
            )
    return options


def download_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the download options among keywords that a library passes on, such as ``trust_remote_code``.

    Other keywords are dropped, with a warning if one looks like a misspelled option.
    """
    known = {"subfolder", "use_auth_token", *_known_options()} if options else set()
    for name in options.keys() - known:
        for meant in near(name, known, 1, cutoff=_MISSPELLED):
            warnings.warn(f"{name!r} is not a download option and is ignored. Did you mean {meant!r}?", stacklevel=4)
    return {name: value for name, value in options.items() if name in known}


def _known_options() -> set[str]:
    from huggingface_hub import hf_hub_download

    return set(inspect.signature(hf_hub_download).parameters) - _OWN_OPTIONS


def download(repo_id: str, filename: str, subfolder: str | None, options: Mapping[str, Any]) -> Path:
    """Downloads a file of a repository unless it is cached.

    Args:
        repo_id: id of the repository.
        filename: name of the file.
        subfolder: folder of the file in the repository, or None.
        options: options of ``hf_hub_download``.

    Returns:
        Path of the file in the local cache.

    Raises:
        CheckpointNotFoundError: there is no such repository, revision or file, or it is not cached and the hub is
            offline or cannot be reached.
        CheckpointError: the hub refused the request.
    """
    from huggingface_hub import hf_hub_download

    options = {"library_name": "nbpeft", **options, **hub_options(repo_id, options)}

    def fetch() -> Path:
        return Path(hf_hub_download(repo_id, filename, subfolder=subfolder, **options))

    where = f"{subfolder}/{filename}" if subfolder else filename
    return _translating(fetch, repo_id, where, options.get("revision"))


def start_of_large_file(
    repo_id: str, filename: str, subfolder: str | None, options: Mapping[str, Any]
) -> tuple[bytes, int] | None:
    """Downloads the header of a large safetensors file on the hub.

    Args:
        repo_id: id of the repository.
        filename: name of the file.
        subfolder: folder of the file in the repository, or None.
        options: options of ``hf_hub_download``.

    Returns:
        The first bytes up to the end of the header, and the file's size in bytes. None for a file of at most ``LARGE``
        bytes, and if the request fails: the download that follows reports the error.
    """
    if options.get("local_files_only") or hub_options(repo_id, options):
        return None
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    utils: Any = importlib.import_module("huggingface_hub.utils")
    endpoint = options.get("endpoint") or constants.ENDPOINT
    address = hf_hub_url(
        repo_id,
        filename,
        subfolder=subfolder,
        revision=options.get("revision"),
        endpoint=endpoint,
        repo_type=options.get("repo_type"),
    )
    headers = utils.build_hf_headers(token=options.get("token"), library_name="nbpeft")
    with contextlib.suppress(Exception):  # the download that follows reports every error of the network or the hub
        size = get_hf_file_metadata(address, token=options.get("token"), endpoint=endpoint).size
        if constants.HF_HUB_OFFLINE or size is None or size <= LARGE:
            return None
        wanted, start = 8, b""
        headers["Range"] = f"bytes=0-{LONGEST_HEADER + 7}"
        # Streamed, because the header's length is in its first eight bytes: the connection is closed after the header.
        with utils.get_session().stream("GET", address, headers=headers, follow_redirects=True) as response:
            response.raise_for_status()
            for part in response.iter_bytes():
                start += part
                wanted = min(8 + int.from_bytes(start[:8], "little"), 8 + LONGEST_HEADER) if len(start) >= 8 else 8
                if len(start) >= wanted:
                    return start[:wanted], size
    return None


def commit_of(path: Path) -> dict[str, str]:
    """Returns ``{"revision": commit}`` for a file in the hub's cache, to download other files of the same commit."""
    parts = path.parts
    if "snapshots" not in parts:
        return {}
    return {"revision": parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]}


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    endpoint: str | None = None,
    commit_message: str | None = None,
    **options: Any,
) -> str:
    """Uploads a saved adapter's folder to a repository, which is created if needed.

    Args:
        folder: folder of the saved adapter.
        repo_id: ``user/name``.
        token: access token; None for the stored login.
        private: whether a new repository is private; None for the account's default.
        endpoint: URL of the hub; None for the default.
        commit_message: message of the commit; None for "Upload adapter".
        **options: further arguments of ``HfApi.upload_folder``: ``revision``, ``create_pr``, …

    Returns:
        URL of the commit.

    Raises:
        CheckpointNotFoundError: there is no such folder.
        CheckpointError: the hub refused the upload or cannot be reached.
    """
    if not os.path.isdir(folder):
        raise CheckpointNotFoundError(f"there is no folder {os.fspath(folder)} to upload", path=os.fspath(folder))
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="nbpeft")
    ignored = options.pop("ignore_patterns", None) or []
    ignored = [ignored] if isinstance(ignored, str) else list(ignored)
    revision = options.get("revision")

    def upload() -> str:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=name,
            folder_path=os.fspath(folder),
            ignore_patterns=[*ignored, f"{STAGING_PREFIX}*", f"**/{STAGING_PREFIX}*"],
            commit_message=commit_message or "Upload adapter",
            **options,
        )
        return str(done.commit_url)

    return _translating(lambda: _writing(upload, repo_id), repo_id, "", revision)


def present_file(
    repo_id: str, name: str, *, token: str | None, revision: str | None = None, endpoint: str | None = None
) -> str:
    """Downloads a small text file of a repository on the hub, such as its README.

    Args:
        repo_id: id of the repository.
        name: name of the file.
        token: access token, or None.
        revision: branch, tag or commit; None for the default branch.
        endpoint: URL of the hub; None for the default.

    Returns:
        The text; empty if the repository, the revision or the file does not exist.

    Raises:
        CheckpointError: the hub refused the request or cannot be reached.
    """
    from huggingface_hub import constants, errors, hf_hub_url

    utils: Any = importlib.import_module("huggingface_hub.utils")

    def download() -> str:
        address = hf_hub_url(repo_id, name, revision=revision, endpoint=endpoint or constants.ENDPOINT)
        # Not hf_hub_download: without a network it retries for half a minute.
        response = utils.get_session().get(address, headers=utils.build_hf_headers(token=token), follow_redirects=True)
        try:
            utils.hf_raise_for_status(response)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError):
            return ""
        return str(response.content, "utf-8", errors="replace")

    return _translating(lambda: _writing(download, repo_id), repo_id, name, revision)


def _writing(call: Callable[[], Result], repo_id: str) -> Result:
    """Runs a call that needs write access; reports a missing permission, a bad token or a missing network clearly."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.OfflineModeIsEnabled:
        raise CheckpointError(
            "the hub is switched off by HF_HUB_OFFLINE=1: nothing was uploaded", repo_id=repo_id
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
            raise CheckpointError(
                f"the hub does not accept this access token; create one with write access at {TOKENS_PAGE}",
                repo_id=repo_id,
            ) from None
        if status == 403 and not isinstance(error, errors.GatedRepoError):
            raise CheckpointError(
                f"this access token cannot write to {repo_id!r}; it needs write access ({TOKENS_PAGE})", repo_id=repo_id
            ) from None
        raise
    except getattr(errors, "HTTPError", ()):  # no response at all
        raise CheckpointError("the hub cannot be reached: nothing was uploaded", repo_id=repo_id) from None


def _or_near(message: str, name: str) -> str:
    """A message about a name that is no folder, with a hint at a folder with a similar name, if there is one."""
    hint = _near_folder(Path(name))
    return f"{message}.{hint}" if hint else message


def _near_folder(place: Path) -> str:
    """A hint at a folder with a similar name beside a place, or in a folder like its own; empty if there is none."""
    found = _folders_like(place)
    if not found and not os.path.exists(place.parent):
        found = [like for parent in _folders_like(place.parent) for like in _folders_like(parent / place.name)]
    return f" Did you mean {' or '.join(repr(str(folder)) for folder in found)}?" if found else ""


def _folders_like(place: Path) -> list[Path]:
    """The folders beside a place with the same name or a similar one."""
    try:
        siblings = [item.name for item in place.parent.iterdir() if os.path.isdir(item)]
    except OSError:
        return []
    return [place.parent / name for name in near(place.name, siblings)]


def _translating(call: Callable[[], Result], repo_id: str, filename: str, revision: str | None) -> Result:
    """Runs a call to the hub and turns its errors into one clear line."""
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    what = f" ({filename})" if filename else ""
    try:
        return call()
    except CheckpointError:
        raise
    except errors.GatedRepoError:
        raise CheckpointError(f"{repo_id!r} is gated: ask for access on its page and log in") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointNotFoundError(
            _or_near(
                f"{repo_id!r} is neither a folder here nor a repository on the hub that this login can access{what}",
                repo_id,
            ),
            repo_id=repo_id,
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointNotFoundError(f"{repo_id!r} has no revision {revision!r}", repo_id=repo_id) from None
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointNotFoundError(
            _or_near(
                f"{repo_id!r} is not a folder here, {filename}{at} is not cached, and the hub is offline or cannot be "
                "reached",
                repo_id,
            ),
            repo_id=repo_id,
        ) from error
    except errors.EntryNotFoundError:
        raise CheckpointNotFoundError(f"{repo_id!r} on the hub has no {filename}{at}", repo_id=repo_id) from None
    except errors.HFValidationError:
        raise CheckpointNotFoundError(
            _or_near(f"{repo_id!r} is not a folder here and cannot be the name of a repository on the hub", repo_id),
            repo_id=repo_id,
        ) from None
    except (OSError, ValueError, getattr(errors, "HTTPError", OSError)) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the hub did not serve {repo_id!r}{what}: {line}", repo_id=repo_id) from error
