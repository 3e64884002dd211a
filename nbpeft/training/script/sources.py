"""Sources of base model, tokenizer and rows of a training, in a form that other machines can use."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nbpeft._util.logs import collapsed
from nbpeft.checkpoint.atomic import NewFile
from nbpeft.checkpoint.config_format import config_to_save
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import NbpeftError, TrainingError
from nbpeft.memory.architecture import silenced
from nbpeft.training.data.forms import TAGGED, row_of
from nbpeft.training.data.reading import Reading, default_length
from nbpeft.training.data.row import LABEL, is_empty_cell
from nbpeft.training.data.row_coder import coded_rows
from nbpeft.training.data.sources import place_in

_COMPARED = 500
"""Number of rows on which two tokenizers are compared."""


@dataclass(frozen=True)
class Source:
    """Something that a script loads.

    Attributes:
        text: name on the hub; or a path, relative to the script's folder or absolute.
        local: whether it is a path.
        files: files to write next to the script.
    """

    text: str
    local: bool = False
    files: tuple[NewFile, ...] = field(default=(), repr=False)

    def expression(self, name: str) -> str:
        """Returns the expression for it, if a constant with the given name has the text."""
        return f"str(HERE / {name})" if self.local else name


def source_of_path(text: str, folder: Path) -> Source:
    """Returns a file or folder of this machine relative to the script's folder; anything else unchanged.

    The path is absolute if the two have only the home folder or one above it in common, so that they do not move
    together.

    Args:
        text: a path or a name on the hub, optionally followed by a slice (``rows.jsonl[:100]``).
        folder: folder of the script.
    """
    text = os.path.expanduser(text)
    place = place_in(text)
    if not os.path.exists(place):
        return Source(text)
    there, here = os.path.realpath(place), os.path.realpath(folder)
    common = Path(os.path.commonpath([there, here]))
    home = Path(os.path.realpath(Path.home()))
    apart = common == home or common in home.parents
    path = there if apart else os.path.relpath(there, here)
    return Source(Path(path).as_posix() + text[len(place) :], local=True)


def source_of_base(model: Any, given: str | None, folder: Path) -> tuple[Source, str]:
    """Returns where to load the base model from, for the script and for this process.

    Raises:
        TrainingError: the model has no information about its source.
    """
    found = given or str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not found:
        raise TrainingError(f"the source of this {type(model).__name__} is unknown; give its folder or Hub id (base=…)")
    return source_of_path(found, folder), found


def source_of_tokenizer(tokenizer: Any, readings: Sequence[Reading], name: str, folder: Path) -> Source | None:
    """Returns where a script finds an equivalent tokenizer: its source, or a copy that is saved next to the script.

    Args:
        tokenizer: the notebook's tokenizer, which may have been changed since it was loaded.
        readings: the rows as read with that tokenizer.
        name: name of a folder for it, next to the script.
        folder: folder of the script.

    Returns:
        The source; None if a script cannot load a tokenizer that reads the rows in the same way.
    """
    before = [_first_read(how) for how in readings], default_length(tokenizer)

    def same(place: str) -> bool:
        from transformers import AutoTokenizer

        try:
            with collapsed():
                loaded = AutoTokenizer.from_pretrained(place, local_files_only=True)
                others = [_first_read(replace(how, tokenizer=loaded)) for how in readings], default_length(loaded)
        except Exception:  # loading a tokenizer's files can raise any error; it is not usable then
            return False
        return bool(others == before)

    origin = str(getattr(tokenizer, "name_or_path", "") or "")
    if origin and same(origin):
        return source_of_path(origin, folder)
    if not hasattr(tokenizer, "save_pretrained"):
        return None
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        if not same(scratch):
            return None
        contents = {path.name: path.read_bytes() for path in Path(scratch).iterdir() if path.is_file()}
    files = tuple(_file(f"{name}/{file}", content) for file, content in sorted(contents.items()))
    return Source(name, local=True, files=files)


def _file(name: str, content: bytes) -> NewFile:
    return NewFile(name, lambda path: path.write_bytes(content))


def _first_read(how: Reading) -> list[Any]:
    return [(row.whole, row.label, row.limit, row.missing) for row in itertools.islice(coded_rows(how), _COMPARED)]


def text_rows(how: Reading) -> str:
    """Returns rows as JSON lines, with the columns that training reads; labels that a dataset numbers by their name."""
    return json_lines(_kept(row, number, how) for number, row in enumerate(how.rows))


def _kept(value: Any, number: int, how: Reading) -> dict[str, Any]:
    row = {name: item for name, item in row_of(value, number, {}).values.items() if name in how.used}
    label = how.columns.get(LABEL, LABEL)
    if label in row:
        row[label] = how.named_label(row[label])
    tags = how.columns.get("tags", "tags")
    if how.form is TAGGED and row.get(tags) is not None:
        row[tags] = [how.named_label(tag) for tag in row[tags]]
    return {name: None if is_empty_cell(item) else item for name, item in row.items()}


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns rows as JSON lines; tensors and arrays as lists, other values that JSON lacks as text."""
    return "".join(f"{json.dumps(dict(row), default=_listed, ensure_ascii=False)}\n" for row in rows)


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def short_targets(model: Any, config: Any) -> Any:
    """Returns ``"all-linear"``, or the shortest names, that select the same modules as the targets of a config."""
    targets, manager = getattr(config, "target_modules", None), manager_of(model)
    if isinstance(targets, str) or not targets or manager is None:
        return targets
    try:
        with silenced():
            meant, linear = (set(manager.plan(one).paths) for one in (config, config.copy(target_modules="all-linear")))
    except NbpeftError:
        return targets
    if meant == linear:
        return "all-linear"
    condensed: Any = config_to_save(config, manager.model)
    return condensed.target_modules
