"""PEFT's ``push_to_hub``, for objects that are saved in files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PushesToHub:
    """Base class of what can be uploaded to a repository on the hub; a class overrides ``_push``."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: Sequence[str] | None = None,
        **options: Any,
    ) -> str:
        """Uploads what ``save_pretrained`` writes, the adapters or the config, to a repository on the hub.

        Args:
            repo_id: ``user/name``; the repository is created if it does not exist.
            commit_message: message of the commit; None for "Upload adapter".
            commit_description: description of the commit.
            private: whether a new repository is private; None for the account's default.
            token: access token; None or True for the stored login.
            revision: branch to upload to, created if it does not exist.
            create_pr: open a pull request instead of committing.
            max_shard_size: accepted for compatibility with PEFT and ignored: an adapter is one file.
            tags: additional tags for the model card; a config has a card only if there are tags.
            **options: ``endpoint``, and what ``HfApi.upload_folder`` takes.

        Returns:
            The URL of the commit.
        """
        commit = {"commit_message": commit_message, "commit_description": commit_description, "revision": revision}
        options |= {"private": private, "token": token, "create_pr": create_pr, **commit}
        return self._push(repo_id, tags=tags or (), **options)

    def _push(self, repo_id: str, *, tags: Sequence[str], **options: Any) -> str:
        """Uploads the files; returns the URL of the commit."""
        raise NotImplementedError
