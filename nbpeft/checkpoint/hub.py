"""Downloads from the hub and uploads to it. Nothing here runs while an adapter is saved."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nbpeft.checkpoint.staging import STAGING_PREFIX
from nbpeft.errors import CheckpointError, CheckpointNotFoundError, did_you_mean

Result = TypeVar("Result")

_OWN_OPTIONS = frozenset({"repo_id", "filename", "subfolder", "dry_run"})


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a download gets, without those that are None.

    Raises:
        CheckpointError: an option is not one of ``huggingface_hub.hf_hub_download``.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if "use_auth_token" in options:
        options["token"] = options.pop("use_auth_token")
    if options.keys() <= {"revision", "cache_dir", "token", "local_files_only"}:
        return options
    from huggingface_hub import hf_hub_download

    known = set(inspect.signature(hf_hub_download).parameters) - _OWN_OPTIONS
    for name in options:
        if name not in known:
            raise CheckpointError(
                f"unknown option {name!r} for reading a checkpoint; known: {', '.join(sorted(known))}."
                + did_you_mean(name, known),
                option=name,
            )
    return options


def download(repo_id: str, filename: str, subfolder: str | None, options: Mapping[str, Any]) -> Path:
    """Path of a repository's file in the local cache, fetched if need be.

    Raises:
        CheckpointNotFoundError: no such repository, revision or file, or it is not in the cache and
            the hub must not or cannot be reached.
        CheckpointError: the hub refused.
    """
    from huggingface_hub import hf_hub_download

    def fetch() -> Path:
        return Path(hf_hub_download(repo_id, filename, subfolder=subfolder, **{"library_name": "nbpeft", **options}))

    where = f"{subfolder}/{filename}" if subfolder else filename
    return _translating(fetch, repo_id, where, options.get("revision"))


def commit_of(path: Path) -> dict[str, str]:
    """``{"revision": commit}`` of a file in the cache, so that its companion is of the same commit."""
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
    **options: Any,
) -> str:
    """Uploads a saved adapter's folder to a repository, which is made if need be.

    Args:
        folder: what was saved.
        repo_id: ``user/name``.
        token: access token, or None for the one that is logged in.
        private: whether a new repository is private; None leaves it to the account.
        endpoint: address of the hub, or None for the usual one.
        **options: what ``HfApi.upload_folder`` takes: ``revision``, ``commit_message``, ``create_pr``, …

    Returns:
        The address of the commit.

    Raises:
        CheckpointNotFoundError: there is no such folder.
        CheckpointError: the hub refused or cannot be reached.
    """
    if not os.path.isdir(folder):
        raise CheckpointNotFoundError(f"there is no folder {os.fspath(folder)} to upload", path=os.fspath(folder))
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="nbpeft")
    ignored = options.pop("ignore_patterns", None) or []
    ignored = [ignored] if isinstance(ignored, str) else list(ignored)

    def upload() -> str:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        done = api.upload_folder(
            repo_id=name,
            folder_path=os.fspath(folder),
            ignore_patterns=[*ignored, f"{STAGING_PREFIX}*", f"**/{STAGING_PREFIX}*"],
            **{"commit_message": "Upload adapter", **options},
        )
        return str(done.commit_url)

    return _translating(upload, repo_id, "", options.get("revision"))


def _translating(call: Callable[[], Result], repo_id: str, filename: str, revision: str | None) -> Result:
    """The result of a call to the hub, its errors in one line."""
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    what = f" ({filename})" if filename else ""
    try:
        return call()
    except errors.GatedRepoError:
        raise CheckpointError(f"{repo_id!r} is gated: ask for access on its page and log in") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointNotFoundError(
            f"{repo_id!r} is neither a folder here nor a repository on the hub that this login may see{what}",
            repo_id=repo_id,
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointNotFoundError(f"{repo_id!r} has no revision {revision!r}", repo_id=repo_id) from None
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{repo_id!r} is not a folder here, {filename}{at} is not in the cache, and the hub "
            "must not or cannot be reached",
            repo_id=repo_id,
        ) from error
    except errors.EntryNotFoundError:
        raise CheckpointNotFoundError(f"{repo_id!r} on the hub has no {filename}{at}", repo_id=repo_id) from None
    except errors.HFValidationError:
        raise CheckpointNotFoundError(
            f"{repo_id!r} is not a folder here and cannot be the name of a repository on the hub", repo_id=repo_id
        ) from None
    except (OSError, ValueError, getattr(errors, "HTTPError", OSError)) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the hub did not serve {repo_id!r}{what}: {line}", repo_id=repo_id) from error
