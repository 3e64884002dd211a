"""Where a checkpoint lies: a folder on this machine, or a repository on the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbpeft.checkpoint import hub
from nbpeft.checkpoint.tensor_file import LEGACY_WEIGHTS_NAME, WEIGHTS_NAME
from nbpeft.errors import CheckpointError, CheckpointNotFoundError, did_you_mean, few, shown

CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """A checkpoint's place, before anything is read.

    Attributes:
        name: a folder, a file in it, or a hub id.
        subfolder: a folder inside it, or None.
        options: what the hub's download takes (``revision``, ``cache_dir``, ``token``, …).
    """

    name: str
    subfolder: str | None
    options: Mapping[str, Any] = field(repr=False)  # a token may be among them

    @classmethod
    def of(cls, source: str | os.PathLike[str], subfolder: str | None, options: Mapping[str, Any]) -> Source:
        """Checks the options and lets a file stand for its folder."""
        name = os.path.expanduser(os.fspath(source))
        if any("\ud800" <= letter <= "\udbff" or letter == "\0" for letter in name):
            raise CheckpointNotFoundError(f"{shown(name)} cannot be the name of a folder")
        if os.path.isfile(name) and os.path.basename(name) in (CONFIG_NAME, WEIGHTS_NAME, LEGACY_WEIGHTS_NAME):
            name = os.path.dirname(name) or "."
        return cls(name, subfolder or None, hub.checked_options(options))

    @property
    def folder(self) -> Path:
        """The folder, if the source is local."""
        return Path(self.name, self.subfolder) if self.subfolder else Path(self.name)

    def config_file(self) -> Path:
        """Path of ``adapter_config.json``, downloaded if it lies on the hub.

        Raises:
            CheckpointNotFoundError: there is none.
        """
        if _is_file(self.folder / CONFIG_NAME):
            return self.folder / CONFIG_NAME
        if self._is_local():
            raise self._absent(CONFIG_NAME)
        return hub.download(self.name, CONFIG_NAME, self.subfolder, self.options)

    def weights_file(self, config_file: Path) -> Path:
        """Path of the tensors that belong to a config: safetensors, or else PEFT's old ``.bin``.

        Args:
            config_file: what ``config_file`` returned; on the hub it pins the commit.

        Raises:
            CheckpointNotFoundError: there is neither.
        """
        local = config_file.parent == self.folder
        for name in (WEIGHTS_NAME, LEGACY_WEIGHTS_NAME):
            if (local or not self.options.get("force_download")) and _is_file(config_file.parent / name):
                return config_file.parent / name
        if local:
            raise self._absent(f"{WEIGHTS_NAME} or {LEGACY_WEIGHTS_NAME}")
        options = {**self.options, **hub.commit_of(config_file)}
        try:
            return hub.download(self.name, WEIGHTS_NAME, self.subfolder, options)
        except CheckpointNotFoundError as absent:
            try:
                return hub.download(self.name, LEGACY_WEIGHTS_NAME, self.subfolder, options)
            except CheckpointNotFoundError:
                raise absent from None

    def _is_local(self) -> bool:
        """Whether the name can only mean a folder (an id reads ``user/name``): then the network is left alone."""
        return (
            os.path.exists(self.name)
            or os.path.isabs(self.name)
            or self.name.startswith((".", "~"))
            or "\\" in self.name
            or self.name.count("/") != 1
        )

    def _absent(self, what: str) -> CheckpointError:
        try:
            return self._not_found(what)
        except OSError as error:
            return _unreadable(self.folder, error)

    def _not_found(self, what: str) -> CheckpointNotFoundError:
        folder = self.folder
        if not folder.exists():
            siblings = os.listdir(folder.parent) if folder.parent.is_dir() else []
            hint = did_you_mean(folder.name, siblings)
            bare = ", and an id on the hub reads user/name" if os.sep not in self.name and "/" not in self.name else ""
            return CheckpointNotFoundError(f"there is no folder {folder}{bare}.{hint}", path=str(folder))
        if not folder.is_dir():
            return CheckpointNotFoundError(f"{folder} is a file, not a folder with {what}", path=str(folder))
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f" There are adapters in its subfolders {few(inside)}." if inside else ""
        return CheckpointNotFoundError(f"there is no {what} in {folder}.{hint}", path=str(folder), subfolders=inside)


def _is_file(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        CheckpointError: that cannot be told, because a folder may not be read or the name is too long.
    """
    try:
        return path.is_file()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{shown(str(path), 200)} cannot be read: {error.strerror}", path=str(path))
