"""Exports a notebook's training as a script, with the files that it needs."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from torch import nn

from nbpeft.checkpoint import inside
from nbpeft.checkpoint.atomic import NewFile, disk_errors, replace_files
from nbpeft.checkpoint.inside import shown
from nbpeft.confidential import LOG_IN, without_secrets
from nbpeft.engine.tree.model_tree import main_dtype
from nbpeft.errors import CheckpointError, ConfigError, TrainingError
from nbpeft.model.quantization.weight_storage import stored_parts
from nbpeft.names import DEFAULT_SEED, JUDGED, ORIGIN_FIELDS, QUANTIZATIONS, ROW_OPTIONS
from nbpeft.training.adapters.adapted_model import base_of, trained_names
from nbpeft.training.data import is_amount, is_stream
from nbpeft.training.data.reading import reading
from nbpeft.training.disk.kept_arguments import plain
from nbpeft.training.loop.objective import with_objective
from nbpeft.training.loop.rows import inputs_of, training_rows
from nbpeft.training.objectives.objective import Objective
from nbpeft.training.objectives.reference import BASE, START
from nbpeft.training.request import TrainRequest
from nbpeft.training.script.python import call, is_literal, source_of
from nbpeft.training.script.sources import (
    Source,
    json_lines,
    short_targets,
    source_of_base,
    source_of_path,
    source_of_tokenizer,
    text_rows,
)

_DIGEST_LENGTH = 12
_LOCAL_BASE = (
    "the base model is a folder of this machine: for another machine, give the base model's Hub id or its folder there "
    "(base=…)"
)
_MARK = "# Exported by nbpeft, and unchanged as long as this is its digest: "
"""Start of the last line of a script."""

_TEMPLATE = '''# /// script
# requires-python = ">=3.11"
# dependencies = [
{dependencies}
# ]
# ///
"""Trains an adapter as a cell of a notebook did.

One process, in an environment of its own:   uv run SCRIPT
One process, in this environment:            python SCRIPT
All GPUs of a machine:                       accelerate launch SCRIPT

The batch size counts for each process. The adapter is saved in the output_dir of ARGUMENTS. States are saved in RUNS,
every ten seconds to once a minute; a script that was killed continues from the last one when it is started again.
"""

import os
from pathlib import Path

import nbpeft
import transformers

HERE = Path(__file__).parent
{constants}


def main():
{body}
    return result


if __name__ == "__main__":
    main()
'''


@dataclasses.dataclass(frozen=True)
class ScriptFiles:
    """The written files.

    Attributes:
        script: the script.
        data: files with rows next to it, evaluation rows last if there are any; empty if the script refers to the data.
        row_counts: number of rows in each of them.
        adapter: name of the adapter that the script trains.
        left_out: omitted arguments, which contain a token, password or key.
        notes: messages for the user.
    """

    script: Path
    data: tuple[Path, ...]
    row_counts: tuple[int, ...]
    adapter: str
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def unwritable(arguments: Mapping[str, Any]) -> list[str]:
    """Returns the names of arguments whose values cannot be written as Python literals."""
    return [name for name, value in arguments.items() if not is_literal(plain(value))]


def export_script(
    model: nn.Module,
    path: str | Path,
    data: Any,
    eval_data: Any = None,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    base: str | None = None,
    replace: bool = False,
    written: Collection[str] = (),
    **arguments: Any,
) -> ScriptFiles:
    """Writes a script that trains a new adapter, configured like the active one, on the same rows.

    Data that was given as a file or the name of a dataset is referred to by the script. Rows of the notebook are
    written next to it, unchanged, to files named by their content, so that a script always finds its own rows. The
    tokenizer is loaded from its source, or saved next to the script if it was changed since; if no script can load it,
    the rows are written tokenized. Paths are relative to the script's folder. Either all files are written or none;
    rows of an earlier script with that name are removed. Tokens and passwords in the arguments are omitted, with a
    warning.

    Args:
        model: a model with adapters.
        path: path of the script, ``name.py``.
        data: training rows, as for ``train``, but no stream; of rows for several adapters, those of the active one.
        eval_data: evaluation rows, or how many to hold out, as for ``train``.
        tokenizer: needed unless the rows are tokenized.
        max_length: number of tokens to which rows are cut.
        columns: as for ``train``.
        base: folder or hub id from which the script loads the base model; by default that of this model.
        replace: overwrite an existing file that was not exported, or was changed since.
        written: fields of the adapter's config to write even if they have their default values.
        **arguments: fields of ``TrainingArguments``, as for ``train``.

    Returns:
        The written files.

    Raises:
        ConfigError: an argument cannot be written as a literal, or the path is not a ``.py`` file.
        CheckpointError: another file exists, or the files cannot be written.
        TrainingError: it is unknown how to load the base model, or rows cannot be read.
    """
    target = Path(os.path.expanduser(os.fspath(path)))
    if target.suffix != ".py":
        raise ConfigError(f"a script's name ends in .py, not {target.name!r:.60}")
    if not replace:
        _refuse_other(target)
    refused = unwritable(arguments)
    if refused:
        raise ConfigError(f"{', '.join(refused)}: objects of the notebook cannot be written into a script")
    arguments, left_out = without_secrets({name: plain(value) for name, value in arguments.items()})
    names = trained_names(model)
    if len(names) != 1:
        raise TrainingError(f"one adapter must be active to be exported, not {len(names)}")
    read = {"tokenizer": tokenizer, "max_length": max_length, "columns": columns}
    request = TrainRequest.of(model, data, eval_data, **read, **arguments)
    if isinstance(data, Mapping) and names[0] in data:  # the rows of several adapters
        request = request.of_adapter(names[0])
    rows = _rows(target, request)
    plain_base: Any = base_of(model)
    source, place = source_of_base(plain_base, base, target.parent)
    config: Any = getattr(model, "peft_config", {})[names[0]]
    own = {
        "max_length": max_length if rows.as_they_are or arguments.get("packing") else None,  # of a sequence as well
        "columns": dict(columns) if rows.as_they_are and columns is not None else None,
    }
    constants = {
        "BASE": source.text,
        "TOKENIZER": None if rows.tokenizer in (None, source) else rows.tokenizer.text,
        "ADAPTER": names[0],
        "DATA": rows.train.text,
        "EVAL_DATA": rows.evaluation.text if isinstance(rows.evaluation, Source) else rows.evaluation,
        "CONFIG": _fields(config, written) | _targets(model, config),
        "RUNS": f"{target.stem}_runs",
        "ARGUMENTS": {
            "output_dir": f"{target.stem}_output",
            **{name: value for name, value in arguments.items() if rows.as_they_are or name not in _READING_OPTIONS},
            **{name: value for name, value in own.items() if value is not None},
        },
    }
    present = {name: value for name, value in constants.items() if value is not None}
    body = _body(present, type(config).__name__, _load(plain_base, source, place), rows)
    text = _script(present, body, _dependencies(plain_base, rows, place))
    parts = [part for part in (rows.tokenizer, rows.train, rows.evaluation) if isinstance(part, Source)]
    files = [file for part in parts for file in part.files]
    replace_files(target.parent, [*files, NewFile.of_text(target.name, text)])
    _sweep_rows(target, [target.parent / file.name for file in files])
    if left_out:
        warnings.warn(
            f"{', '.join(left_out)} left out, because a script must not contain secrets: {LOG_IN}", stacklevel=2
        )
    data_files = tuple(target.parent / name for name in rows.counts)
    notes = (*rows.notes, *([_LOCAL_BASE] if os.path.isabs(source.text) else []))
    return ScriptFiles(target, data_files, tuple(rows.counts.values()), names[0], left_out, notes)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of a script; ``counts`` has the number of rows of each file next to it."""

    train: Source
    evaluation: Source | float | None
    tokenizer: Source | None
    counts: Mapping[str, int]
    as_they_are: bool = True
    notes: tuple[str, ...] = ()


def _rows(target: Path, request: TrainRequest) -> _Rows:
    """Returns the sources of the rows for the script."""
    tokenizer, amount = request.tokenizer, is_amount(request.eval_data)
    opened = with_objective(request.opened())
    if opened.reference not in (None, BASE, START):
        raise ConfigError(
            f"a script trains a new adapter without {opened.reference!r}: set reference='base'", field="reference"
        )
    given, rows = (
        [part for part in (of.data, None if amount else of.eval_data) if part is not None] for of in (request, opened)
    )
    if any(map(is_stream, rows)):
        raise TrainingError("a stream cannot be written next to a script: give the rows to train on")
    found = training_rows(opened)
    readings = [reading(part, tokenizer, inputs=inputs_of(opened), **request.reading) for part in rows]
    loaded = None
    texts = [how for how in readings if how.form is not None]
    if texts:
        loaded = source_of_tokenizer(tokenizer, texts, f"{target.stem}_tokenizer", target.parent)
    if loaded is None and isinstance(opened.objective, Objective) and opened.objective.rows == JUDGED:
        raise TrainingError(
            "no script can load the tokenizer of this notebook, and the rows of kto cannot be given as tokens: use a "
            "tokenizer that AutoTokenizer loads"
        )
    if loaded is None and (texts or not all(isinstance(part, (str, os.PathLike)) for part in given)):
        tokens = [part for part in (found.train, found.evaluation) if part is not None]
        sources = [_written(target, kind, json_lines(part)) for kind, part in zip(_KINDS, tokens, strict=False)]
        counts = {source.text: len(part) for source, part in zip(sources, tokens, strict=True)}
        note = ["the rows are tokenized: no script can load the tokenizer of this notebook"] if texts else []
        evaluation = sources[1] if len(sources) > 1 else None
        return _Rows(sources[0], evaluation, None, counts, False, (*note, *found.notes))
    sources = [
        source_of_path(os.fspath(part), target.parent)
        if isinstance(part, (str, os.PathLike))
        else _written(target, kind, text_rows(how) if how.form is not None else json_lines(how.rows))
        for kind, part, how in zip(_KINDS, given, readings, strict=False)
    ]
    counts = {source.text: len(part) for source, part in zip(sources, rows, strict=True) if source.files}
    held = request.eval_data if amount else None
    return _Rows(sources[0], sources[1] if len(sources) > 1 else held, loaded, counts, notes=found.notes)


_KINDS = ("data", "eval")
_READING_OPTIONS = ("separator", "skip_bad", *ROW_OPTIONS, "eval_by")
"""Arguments without effect on rows that are written in tokenized form."""


def _written(target: Path, kind: str, text: str) -> Source:
    """Returns the source for rows in a file next to the script."""
    name = f"{target.stem}_{kind}-{_digest(text)}.jsonl"
    return Source(name, local=True, files=(NewFile.of_text(name, text),))


def _targets(model: nn.Module, config: Any) -> dict[str, Any]:
    """Returns the targets of a config in short form."""
    targets = plain(short_targets(model, config))
    return {"target_modules": targets} if targets else {}


def _body(constants: Mapping[str, Any], config_class: str, load: str, rows: _Rows) -> str:
    """Returns the body of ``main``."""
    lines = [f"    base = {load}"]
    data = [rows.train.expression("DATA")]
    if "EVAL_DATA" in constants:
        data.append(rows.evaluation.expression("EVAL_DATA") if isinstance(rows.evaluation, Source) else "EVAL_DATA")
    options = ["**nbpeft.training.unfinished_run(RUNS)", "**ARGUMENTS"]
    if rows.tokenizer is not None:
        name = "TOKENIZER" if "TOKENIZER" in constants else "BASE"
        loaded = f"transformers.AutoTokenizer.from_pretrained({rows.tokenizer.expression(name)})"
        lines.append(f"    tokenizer = {loaded}")
        options.insert(0, "tokenizer=tokenizer")
    model = ["base", f"nbpeft.{config_class}(**CONFIG)", "adapter_name=ADAPTER"]
    return "\n".join(
        [
            *lines,
            f'    transformers.set_seed(ARGUMENTS.get("seed", {DEFAULT_SEED}))',
            f"    model = {call('nbpeft.get_peft_model', model, 4)}",
            "    model.train()",
            f"    result = {call('nbpeft.train', ['model', *data, *options], 4)}",
            '    if os.environ.get("RANK", "0") == "0":',
            "        print(result)",
        ]
    )


def _script(constants: Mapping[str, Any], body: str, dependencies: Sequence[str]) -> str:
    """Returns the text of a script."""
    lines = [f"{name} = {source_of(value, used=len(name) + 3)}" for name, value in constants.items()]
    listed = [f'#     "{dependency}",' for dependency in dependencies]
    text = _TEMPLATE.format(constants="\n".join(lines), body=body, dependencies="\n".join(listed))
    try:
        found = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id != "HERE"
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        found = {}
    for name, value in constants.items():
        if name not in found or found[name] != value:
            raise ConfigError(f"{name} cannot be written into a script: {value!r:.60}", name=name)
    return f"{text}{_MARK}{_digest(text)}\n"


def _refuse_other(path: Path) -> None:
    """Refuses to overwrite a file that is not an unchanged exported script."""
    if not inside.is_there(path):
        return
    with disk_errors(path):
        found = path.read_bytes().decode("utf-8", "replace") if inside.leads_to_file(path) else ""
    text, mark, digest = found.rpartition(_MARK)
    if not mark or digest.strip() != _digest(text):
        why = "was edited since its export" if mark else "exists already and is not an exported script"
        raise CheckpointError(f"{shown(path)} {why}: choose another name, or replace it (replace=…)")


def _dependencies(model: Any, rows: _Rows, base: str) -> list[str]:
    """Returns the requirements of a script, in the versions that nbpeft requires."""
    quantized = any(part.name == "quantized layers" for part in stored_parts(model))
    needed = ["nbpeft[bnb]" if quantized else "nbpeft[train]", "torch", "transformers"]
    sources = [part for part in (rows.train, rows.evaluation) if isinstance(part, Source)]
    if any(not part.local or not Path(part.text.partition("[")[0]).suffix for part in sources):
        needed.append("datasets")
    if any(".parquet" in part.text for part in sources):
        needed.append("pyarrow")
    if _gguf_file(Path(base)):
        needed.append("gguf")
    return [f"{name}{_version(name.partition('[')[0])}" for name in needed]


def _version(package: str) -> str:
    """Returns the versions that nbpeft requires of a package; of nbpeft itself at least the installed one."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if package == "nbpeft":
            return f">={importlib.metadata.version(package).partition('+')[0]}"
        found = map(Requirement, importlib.metadata.requires("nbpeft") or ())
        return next((str(needed.specifier) for needed in found if needed.name == package), "")
    return ""


def _sweep_rows(script: Path, kept: Sequence[Path]) -> None:
    """Removes the files with rows of an earlier script with the same name."""
    pattern = re.compile(rf"{re.escape(script.stem)}_(?:data|eval)-[0-9a-f]{{{_DIGEST_LENGTH}}}\.jsonl")
    with contextlib.suppress(OSError):
        for name in os.listdir(script.parent):
            if pattern.fullmatch(name) and script.parent / name not in kept:
                (script.parent / name).unlink()


def _load(model: Any, source: Source, place: str) -> str:
    """Returns the expression that loads the base model in its current form."""
    import transformers

    name = type(model).__name__
    if not isinstance(getattr(transformers, name, None), type):
        raise TrainingError(f"{name} is not a class of transformers, so a script cannot load it")
    dtype = str(main_dtype(model)).removeprefix("torch.")
    where, options = source.expression("BASE"), [f'dtype="{dtype}"']
    file = _gguf_file(Path(place))
    options += [f"gguf_file={source_of(file)}"] if file else []
    kinds = {kind for part in stored_parts(model) if part.name == "quantized layers" for kind in part.kinds}
    if not kinds:
        return call(f"transformers.{name}.from_pretrained", [where, *options], 4)
    kind = next((kind for kind in QUANTIZATIONS if any(found.startswith(kind) for found in kinds)), None)
    if kind is None:
        raise TrainingError(f"a script cannot load layers stored as {', '.join(sorted(kinds))}; only nf4, fp4 and int8")
    how = [f'model_class="{name}"', f"bits={8 if kind == 'int8' else 4}"]
    if kind != "int8":
        how += [f'quant_type="{kind}"', f"double_quant={any('double' in found for found in kinds)}"]
        options[0] = options[0].replace("dtype=", "compute_dtype=")
    loaded = call("nbpeft.load_quantized", [where, *how, *options], 8)
    return call("nbpeft.prepare_model_for_kbit_training", [loaded], 4)


def _gguf_file(folder: Path) -> str | None:
    """Returns the GGUF file of a folder without other weights, or None."""
    if not os.path.isdir(folder) or (folder / "config.json").exists():
        return None
    files = sorted(path.name for path in folder.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _fields(config: Any, written: Collection[str]) -> dict[str, Any]:
    """Returns the fields of a config that differ from their defaults, and those named."""
    usual = type(config)().to_dict()
    fields = {
        name: plain(value) for name, value in config.to_dict().items() if name not in ("peft_type", *ORIGIN_FIELDS)
    }
    return {name: value for name, value in fields.items() if name in written or value != plain(usual.get(name))}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:_DIGEST_LENGTH]
