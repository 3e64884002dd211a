"""A training of a notebook as a script: for ``accelerate launch`` on several GPUs or machines, or a cluster's queue."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import enum
import hashlib
import json
import os
import pprint
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbpeft.checkpoint.atomic import NewFile, replace_files
from nbpeft.confidential import LOG_IN, without_secrets
from nbpeft.errors import ConfigError, TrainingError
from nbpeft.model.weight_storage import stored_parts
from nbpeft.names import QUANTIZATIONS
from nbpeft.training.adapted import base_of, main_dtype, trained_names
from nbpeft.training.data import is_stream
from nbpeft.training.rows import training_rows

_OWN = ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")
"""Fields of a config that say where it comes from, not what to make."""

_DIGEST_LENGTH = 12

_TEMPLATE = '''"""Trains an adapter as in the notebook.

One process:             python SCRIPT
All GPUs of a machine:   accelerate launch SCRIPT
Several machines:        accelerate launch --num_machines N --machine_rank I --main_process_ip IP SCRIPT

The batch size counts for each process. The adapter is saved in the output_dir of ARGUMENTS.
"""

import json
import os
from pathlib import Path

import transformers

import nbpeft

HERE = Path(__file__).parent
BASE = {base}
ADAPTER = {adapter}
DATA = {data}
EVAL_DATA = {eval_data}
CONFIG = {config}
ARGUMENTS = {arguments}


def rows(name):
    """Tokenised rows of a file beside this one."""
    with open(HERE / name, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main():
    base = {load}
    transformers.set_seed(ARGUMENTS.get("seed", 42))
    model = nbpeft.get_peft_model(base, nbpeft.{config_class}(**CONFIG), adapter_name=ADAPTER)
    model.train()
    eval_rows = None if EVAL_DATA is None else rows(EVAL_DATA)
    result = nbpeft.train(model, rows(DATA), eval_rows, **ARGUMENTS)
    if int(os.environ.get("RANK", "0")) == 0:
        print(result)


if __name__ == "__main__":
    main()
'''


@dataclasses.dataclass(frozen=True)
class ScriptFiles:
    """What was written.

    Attributes:
        script: the script.
        data: the tokenised rows beside it, evaluation rows last if there are any.
        row_counts: how many each of them has.
        adapter: name of the adapter that the script trains.
        left_out: arguments that hold a token, password or key, which the script does not.
    """

    script: Path
    data: tuple[Path, ...]
    row_counts: tuple[int, ...]
    adapter: str
    left_out: tuple[str, ...] = ()


def unwritable(arguments: Mapping[str, Any]) -> list[str]:
    """Names of arguments whose values have no text that gives them back."""
    return [name for name, value in arguments.items() if not _is_literal(_plain(value))]


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
    **arguments: Any,
) -> ScriptFiles:
    """Writes a script that trains a new adapter, configured as the active one, on the same rows.

    The rows are written tokenised beside it, so the script needs no tokenizer, under names that
    follow from their content: a script always finds the rows it was written with. Script and rows
    are written together or not at all; rows of an earlier script of that name go. Tokens and
    passwords among the arguments are left out, with a warning.

    Args:
        model: a model with adapters.
        path: of the script, ``name.py``.
        data: rows to learn, as for ``train``; no stream.
        eval_data: rows to measure on, or how many to hold out, as for ``train``.
        tokenizer: needed unless the rows are tokenised.
        max_length: tokens a row is cut to.
        columns: as for ``train``.
        base: where the script loads the base model from: a folder or a hub id; by default where
            this one came from.
        **arguments: fields of ``TrainingArguments``, as for ``train``.

    Raises:
        ConfigError: an argument cannot be written down, or the path is not a ``.py`` file.
        TrainingError: it is not known how to load the base model, or rows cannot be read.
    """
    target = Path(os.path.expanduser(os.fspath(path)))
    if target.suffix != ".py":
        raise ConfigError(f"a script's name ends in .py, not {target.name!r:.60}")
    refused = unwritable(arguments)
    if refused:
        raise ConfigError(f"{', '.join(refused)}: objects of the notebook cannot be written into a script")
    arguments, left_out = without_secrets({name: _plain(value) for name, value in arguments.items()})
    names = trained_names(model)
    if len(names) != 1:
        raise TrainingError(f"one adapter must be active to be exported, not {len(names)}")
    plain_base: Any = base_of(model)
    found = training_rows(
        model,
        data,
        eval_data,
        tokenizer=tokenizer,
        max_length=max_length,
        columns=columns,
        seed=arguments.get("seed"),
    )
    parts = [part for part in (found.train, found.evaluation) if part is not None]
    if any(map(is_stream, parts)):
        raise TrainingError("a stream cannot be written beside a script: give as many of its rows as are to be learned")
    prepared = [list(map(_row, part)) for part in parts]
    rows = [
        NewFile.of_text(f"{target.stem}_{kind}-{_digest(text)}.jsonl", text)
        for kind, text in zip(("data", "eval"), map(_lines, prepared), strict=False)
    ]
    config: Any = getattr(model, "peft_config", {})[names[0]]
    source = _source(plain_base, base)
    constants = {
        "BASE": source,
        "ADAPTER": names[0],
        "DATA": rows[0].name,
        "EVAL_DATA": rows[1].name if len(rows) > 1 else None,
        "CONFIG": _changed(config),
        "ARGUMENTS": {"output_dir": f"{target.stem}_output", **arguments},
    }
    text = _script(constants, type(config).__name__, _load(plain_base, source))
    replace_files(target.parent, [*rows, NewFile.of_text(target.name, text)])
    places = tuple(target.parent / file.name for file in rows)
    _sweep_rows(target, places)
    if left_out:
        warnings.warn(
            f"{', '.join(left_out)} left out of the script, which is no place for secrets: {LOG_IN}", stacklevel=2
        )
    return ScriptFiles(target, places, tuple(map(len, prepared)), names[0], left_out)


def _script(constants: Mapping[str, Any], config_class: str, load: str) -> str:
    """The text of a script.

    Raises:
        ConfigError: a value would not come back from the text as it is.
    """
    values = {name.lower(): _block(value) for name, value in constants.items()}
    text = _TEMPLATE.format(**values, config_class=config_class, load=load)
    try:
        body = ast.parse(text).body
        found = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id != "HERE"
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        found = {}
    for name, value in constants.items():
        if name not in found or found[name] != value:
            raise ConfigError(f"{name} cannot be written into a script: {value!r:.60}", name=name)
    return text


def _sweep_rows(script: Path, kept: Sequence[Path]) -> None:
    """Removes rows that an earlier script of that name was written with."""
    pattern = re.compile(rf"{re.escape(script.stem)}_(?:data|eval)-[0-9a-f]{{{_DIGEST_LENGTH}}}\.jsonl")
    with contextlib.suppress(OSError):
        for name in os.listdir(script.parent):
            if pattern.fullmatch(name) and script.parent / name not in kept:
                (script.parent / name).unlink()


def _source(model: Any, given: str | None) -> str:
    """Where to load the base model from.

    Raises:
        TrainingError: it does not say where it came from.
    """
    source = given or str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not source:
        raise TrainingError(
            f"this {type(model).__name__} does not say where it came from; give a folder or hub id (base=…)"
        )
    return str(Path(source).resolve()) if os.path.exists(source) else source


def _load(model: Any, source: str) -> str:
    """The expression that loads the base model as it is now."""
    import transformers

    name = type(model).__name__
    if not isinstance(getattr(transformers, name, None), type):
        raise TrainingError(f"{name} is not a class of transformers, so a script cannot load it")
    options = [f'dtype="{str(main_dtype(model)).removeprefix("torch.")}"']
    file = _gguf_file(Path(source))
    options += [f"gguf_file={file!r}"] if file else []
    kinds = {kind for part in stored_parts(model) if part.name == "quantized layers" for kind in part.kinds}
    if not kinds:
        return f"transformers.{name}.from_pretrained(BASE, {', '.join(options)})"
    kind = next((kind for kind in QUANTIZATIONS if any(found.startswith(kind) for found in kinds)), None)
    if kind is None:
        raise TrainingError(f"a script cannot load layers stored as {', '.join(sorted(kinds))}; only nf4, fp4 and int8")
    how = f"model_class={name!r}, bits={8 if kind == 'int8' else 4}"
    if kind != "int8":
        how += f", quant_type={kind!r}, double_quant={any('double' in found for found in kinds)}"
        options[0] = options[0].replace("dtype=", "compute_dtype=")
    return f"nbpeft.prepare_model_for_kbit_training(nbpeft.load_quantized(BASE, {how}, {', '.join(options)}))"


def _gguf_file(folder: Path) -> str | None:
    """The GGUF file of a folder that holds no other weights."""
    if not os.path.isdir(folder) or (folder / "config.json").exists():
        return None
    files = sorted(path.name for path in folder.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _changed(config: Any) -> dict[str, Any]:
    """Fields of a config that are not as by default."""
    usual = type(config)().to_dict()
    fields = {name: _plain(value) for name, value in config.to_dict().items() if name not in _OWN}
    return {name: value for name, value in fields.items() if value != _plain(usual.get(name))}


def _plain(value: Any) -> Any:
    """A value in types that Python's literals have."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=repr)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_literal(value: Any) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def _block(value: Any) -> str:
    return pprint.pformat(value, width=100, sort_dicts=False) if isinstance(value, dict) else repr(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:_DIGEST_LENGTH]


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in row.items()}


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)
