"""A training of a notebook as a script: for ``accelerate launch`` on several GPUs or machines, or a cluster's queue."""

from __future__ import annotations

import ast
import dataclasses
import enum
import json
import pprint
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbpeft.checkpoint.atomic import NewFile, replace_files
from nbpeft.errors import ConfigError, TrainingError
from nbpeft.model.stored import stored_parts
from nbpeft.training.adapted import base_of, main_dtype, trained_names
from nbpeft.training.data import prepare_data

_OWN = ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")
"""Fields of a config that say where it comes from, not what to make."""

_TEMPLATE = '''"""Trains the adapter {adapter!r} as in the notebook.

One process:             python {script}
All GPUs of a machine:   accelerate launch {script}
Several machines:        accelerate launch --num_machines N --machine_rank I --main_process_ip IP {script}

The batch size counts for each process. The adapter is saved in the output_dir of ARGUMENTS.
"""

import json
import os
from pathlib import Path

import transformers

import nbpeft

HERE = Path(__file__).parent
BASE = {base!r}
CONFIG = {config}
ARGUMENTS = {arguments}


def rows(name):
    """Tokenised rows of a file beside this one."""
    with open(HERE / name, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main():
    base = {load}
    transformers.set_seed(ARGUMENTS.get("seed", 42))
    model = nbpeft.get_peft_model(base, nbpeft.{config_class}(**CONFIG), adapter_name={adapter!r})
    model.train()
    result = nbpeft.train(model, rows({data!r}), {eval_rows}, **ARGUMENTS)
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
    """

    script: Path
    data: tuple[Path, ...]
    row_counts: tuple[int, ...]
    adapter: str


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
    base: str | None = None,
    **arguments: Any,
) -> ScriptFiles:
    """Writes a script that trains a new adapter, configured as the active one, on the same rows.

    The rows are written tokenised beside it, so the script needs no tokenizer. Script and rows are
    written together or not at all.

    Args:
        model: a model with adapters.
        path: of the script, ``name.py``.
        data: rows to learn, as for ``train``.
        eval_data: rows to measure on.
        tokenizer: needed unless the rows are tokenised.
        max_length: tokens a row is cut to.
        base: where the script loads the base model from: a folder or a hub id; by default where
            this one came from.
        **arguments: fields of ``TrainingArguments``, as for ``train``.

    Raises:
        ConfigError: an argument cannot be written down, or the path is no ``.py`` file.
        TrainingError: it is not known how to load the base model, or rows cannot be read.
    """
    target = Path(path)
    if target.suffix != ".py":
        raise ConfigError(f"a script's name ends in .py, not {target.name!r}")
    refused = unwritable(arguments)
    if refused:
        raise ConfigError(f"{', '.join(refused)}: objects of the notebook cannot be written into a script")
    names = trained_names(model)
    if len(names) != 1:
        raise TrainingError(f"one adapter must be active to be exported, not {len(names)}")
    plain_base: Any = base_of(model)
    encoder_decoder = bool(getattr(getattr(plain_base, "config", None), "is_encoder_decoder", False))
    parts = [part for part in (data, eval_data) if part is not None]
    prepared = [
        list(map(_row, prepare_data(part, tokenizer, max_length=max_length, encoder_decoder=encoder_decoder)))
        for part in parts
    ]
    files = [f"{target.stem}_{kind}.jsonl" for kind in ("data", "eval")[: len(parts)]]
    config: Any = getattr(model, "peft_config", {})[names[0]]
    text = _TEMPLATE.format(
        adapter=names[0],
        script=target.name,
        base=str(_source(plain_base, base)),
        config=_block(_changed(config)),
        config_class=type(config).__name__,
        arguments=_block({"output_dir": f"{target.stem}_output", **{k: _plain(v) for k, v in arguments.items()}}),
        load=_load(plain_base, _source(plain_base, base)),
        data=files[0],
        eval_rows=f"rows({files[1]!r})" if len(files) > 1 else "None",
    )
    written = [NewFile.of_text(name, _lines(rows)) for name, rows in zip(files, prepared, strict=True)]
    replace_files(target.parent, [*written, NewFile.of_text(target.name, text)])
    places = tuple(target.parent / name for name in files)
    return ScriptFiles(target, places, tuple(map(len, prepared)), names[0])


def _source(model: Any, given: str | None) -> str:
    """Where to load the base model from.

    Raises:
        TrainingError: it does not say where it came from.
    """
    source = given or str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not source:
        raise TrainingError(
            f"this {type(model).__name__} does not say where it came from: give base=… (--base), a folder or hub id"
        )
    return str(Path(source).resolve()) if Path(source).exists() else source


def _load(model: Any, source: str) -> str:
    """The expression that loads the base model as it is now."""
    import transformers

    name = type(model).__name__
    if not isinstance(getattr(transformers, name, None), type):
        raise TrainingError(f"{name} is no class of transformers, so a script cannot load it")
    options = [f'dtype="{str(main_dtype(model)).removeprefix("torch.")}"']
    file = _gguf_file(Path(source))
    options += [f"gguf_file={file!r}"] if file else []
    kinds = {kind for part in stored_parts(model) if part.name == "quantized layers" for kind in part.kinds}
    if not kinds:
        return f"transformers.{name}.from_pretrained(BASE, {', '.join(options)})"
    kind = next((kind for kind in ("nf4", "fp4", "int8") if any(found.startswith(kind) for found in kinds)), None)
    if kind is None:
        raise TrainingError(f"a script cannot load layers stored as {', '.join(sorted(kinds))}; only nf4, fp4 and int8")
    how = f"model_class={name!r}, bits={8 if kind == 'int8' else 4}"
    if kind != "int8":
        how += f", quant_type={kind!r}, double_quant={any('double' in found for found in kinds)}"
        options[0] = options[0].replace("dtype=", "compute_dtype=")
    return f"nbpeft.prepare_model_for_kbit_training(nbpeft.load_quantized(BASE, {how}, {', '.join(options)}))"


def _gguf_file(folder: Path) -> str | None:
    """The GGUF file of a folder that holds no other weights."""
    if not folder.is_dir() or (folder / "config.json").exists():
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
        return sorted(_plain(item) for item in value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_literal(value: Any) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False


def _block(fields: Mapping[str, Any]) -> str:
    return pprint.pformat(dict(fields), width=100, sort_dicts=False)


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in row.items()}


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)
