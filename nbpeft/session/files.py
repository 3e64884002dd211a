"""Saving and loading as a person means it: what goes into which folder, and what to say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nbpeft.errors import CheckpointNotFoundError
from nbpeft.session.results import SavedAdapter

if TYPE_CHECKING:
    from nbpeft.model import PeftModel

_CONFIG = "adapter_config.json"


def adapter_name_of(source: str | os.PathLike[str]) -> str:
    """A name for the adapter in a folder or hub repository: its last part, dots as ``_``."""
    last = re.split(r"[/\\]+", os.fspath(source).rstrip("/\\"))[-1]
    return re.sub(r"[^\w-]+", "_", last).strip("_") or "default"


def save_adapters(model: PeftModel, folder: str, names: Sequence[str]) -> tuple[SavedAdapter, ...]:
    """Writes adapters; a single one right into the folder, several as PEFT lays them out.

    Raises:
        CheckpointError: a folder cannot be written; what was in it is as it was.
    """
    from nbpeft.model import files

    written = files.save(model.manager, folder, names=list(names), flat=len(names) == 1)
    return tuple(
        SavedAdapter(
            name,
            str(Path(files_of.paths[0]).parent) if files_of.paths else folder,
            tuple(sorted(Path(path).name for path in files_of.paths)),
            files_of.byte_count,
        )
        for name, files_of in written.items()
    )


@contextmanager
def folder_hint(source: str) -> Iterator[None]:
    """Adds the adapters in sub-folders to the error when a folder itself holds none."""
    try:
        yield
        return
    except CheckpointNotFoundError as error:
        failure = error
    inside = sorted(path.parent.name for path in Path(source).glob(f"*/{_CONFIG}")) if os.path.isdir(source) else []
    if inside:
        examples = " or ".join(os.path.join(source, name) for name in inside[:3])
        raise CheckpointNotFoundError(f"{source} holds no adapter itself; did you mean {examples}?", **failure.details)
    raise failure
