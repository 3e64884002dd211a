"""The files of each export format: their sizes are known before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nbpeft import checkpoint
from nbpeft.checkpoint import GgufTensor, NewFile
from nbpeft.engine.contract.adapter import AdapterConfig, AdapterWeights, LowRankDelta
from nbpeft.engine.methods.lora.conversion import as_uniform_lora
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import AdapterError
from nbpeft.model import merge_to_folder, merged_tensors
from nbpeft.model.saving import files
from nbpeft.shipping.engines.diffusers import component_of
from nbpeft.shipping.facts import AdapterFacts
from nbpeft.shipping.gguf_model import GgufModel, common_alpha
from nbpeft.shipping.gguf_tokenizer import check_tokenizer, describe_tokenizer
from nbpeft.shipping.importance import Rows, mean_squares

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
"""Storage types of a folder of safetensors -> torch dtype."""
GGUF_ADAPTER, GGUF_MODEL = "adapter.gguf", "model.gguf"


@dataclass(frozen=True)
class Package:
    """An export that can be written.

    Attributes:
        files: (name, size in bytes) of each file with weights.
        write: writes the files atomically into a new folder.
    """

    files: tuple[tuple[str, int], ...]
    write: Callable[[Path], object]


def adapter_folder(manager: AdapterManager, facts: AdapterFacts, *, one_rank: bool) -> Package:
    """Returns an adapter in PEFT's format.

    Args:
        manager: the adapters of the model.
        facts: the adapter's properties.
        one_rank: whether the engine needs plain LoRA with one rank and one scaling for all layers; embeddings are
            not saved then.

    Raises:
        AdapterError: the adapter must be rewritten as LoRA, but has layers for which this is not possible.
    """
    other = not facts.is_lora or len(facts.ranks) > 1 or len(facts.scalings) > 1
    rewrites = facts.scale != 1.0 or (bool(facts.deltas) and (facts.starts_in_weight or (one_rank and other)))
    if rewrites and facts.others:
        what = f"its scale of {facts.scale:g}" if facts.scale != 1.0 else "its init"
        raise AdapterError(
            f"{what} cannot be written with {', '.join(facts.others)}: merge it into the base (merged=…)"
            + (", or set the scale back to 1" if facts.scale != 1.0 else "")
        )

    def rewrite(name: str, config: AdapterConfig, weights: AdapterWeights) -> tuple[AdapterConfig, AdapterWeights]:
        base = {"base_model_name_or_path": facts.base_name}
        if rewrites:
            config, weights = as_uniform_lora(config, facts.deltas, weights)
        return config.copy(**base), weights

    def write(folder: Path) -> None:
        embeddings = False if one_rank else "auto"
        files.save(
            manager, folder, names=[facts.name], embeddings=embeddings, rewrite=rewrite, flat=True, mark_saved=False
        )

    return Package((("adapter_model.safetensors", _folder_bytes(facts, rewrites)),), write)


def _folder_bytes(facts: AdapterFacts, rewrites: bool) -> int:
    """Returns the size of the tensors in bytes; rewritten ones are padded to the largest rank."""
    if not rewrites:
        return facts.byte_count
    size = facts.kept_byte_count
    for _, delta in facts.deltas.values():
        elements = (delta.down.numel() + delta.up.numel()) // delta.rank * facts.ranks[-1]
        size += (elements + (0 if delta.bias is None else delta.bias.numel())) * delta.down.element_size()
    return size


def merged_folder(manager: AdapterManager, facts: AdapterFacts, stored_as: str, tokenizer: Any) -> Package:
    """Returns a merged model in the format of transformers.

    Args:
        manager: the adapters of the model.
        facts: properties of the adapter to merge.
        stored_as: storage type, one of ``DTYPES``.
        tokenizer: saved with the model, or None.
    """
    dtype = DTYPES[stored_as]
    specs = merged_tensors(manager.model, facts.name, dtype=dtype).specs

    def write(folder: Path) -> None:
        merge_to_folder(manager.model, [facts.name], folder, dtype=dtype, tokenizer=tokenizer, measure_errors=False)

    return Package((("model.safetensors", sum(spec.byte_count for spec in specs)),), write)


def adapter_gguf(
    manager: AdapterManager, facts: AdapterFacts, stored_as: str, texts: Sequence[NewFile] = ()
) -> Package:
    """Returns a LoRA adapter for llama.cpp.

    A GGUF adapter has one alpha; llama.cpp scales each pair of factors by alpha over the rank of the pair.

    Args:
        manager: the adapters of the model.
        facts: the adapter's properties.
        stored_as: storage type of the tensors.
        texts: further files to write.
    """
    deltas: dict[str, LowRankDelta] = {path: delta for path, (_, delta) in facts.deltas.items()}
    model, alpha = GgufModel(facts.model_class, _config(manager)), common_alpha(deltas)
    tensors = model.adapter_tensors(deltas, alpha, stored_as)
    gguf = checkpoint.gguf_package()
    card = checkpoint.card_text(manager.configs[facts.name].copy(base_model_name_or_path=facts.base_name or None))

    def describe(writer: Any, folder: Path) -> None:
        _name(writer, folder, {"README.md": card}, gguf.GGUFType.ADAPTER)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    return _gguf(GGUF_ADAPTER, model.architecture, describe, tensors, texts)


def merged_gguf(
    manager: AdapterManager,
    facts: AdapterFacts,
    stored_as: str,
    tokenizer: Any,
    texts: Sequence[NewFile] = (),
    calibrate: Rows | None = None,
) -> Package:
    """Returns a merged model for llama.cpp, with its tokenizer.

    Args:
        manager: the adapters of the model.
        facts: properties of the adapter to merge.
        stored_as: storage type of the weights.
        tokenizer: the model's tokenizer.
        texts: further files to write.
        calibrate: rows on which the importance of inputs is measured when the file is written; None for no importance.

    Raises:
        ConfigError: the model or its tokenizer cannot be written as GGUF.
    """
    merged = merged_tensors(manager.model, facts.name, dtype="float32")
    config = _config(manager)
    check_tokenizer(tokenizer, config.vocab_size)
    model = GgufModel(facts.model_class, config)
    importance: dict[str, Tensor] = {}
    tensors = model.model_tensors(merged.specs, merged.read, stored_as, importance.get)
    gguf = checkpoint.gguf_package()

    def describe(writer: Any, folder: Path) -> None:
        with checkpoint.scratch_folder() as scratch:
            tokenizer.save_pretrained(str(scratch))
            ids = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            text = json.dumps({key: value for key, value in ids.items() if value is not None})
            (scratch / "config.json").write_text(text, encoding="utf-8")
            _name(writer, folder, {}, gguf.GGUFType.MODEL)
            model.describe(writer, stored_as)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            describe_tokenizer(writer, tokenizer, config.vocab_size, scratch)

    package = _gguf(GGUF_MODEL, model.architecture, describe, tensors, texts)

    def write(folder: Path) -> None:
        if calibrate is not None:
            importance.update(mean_squares(manager, facts.name, calibrate))
        package.write(folder)

    return Package(package.files, write)


def single_file(facts: AdapterFacts, style: str) -> Package:
    """Returns an adapter in one file with the keys of kohya's programs or of diffusers.

    Args:
        facts: the adapter's properties.
        style: ``kohya`` or ``diffusers``.
    """
    deltas = {path: delta for path, (_, delta) in facts.deltas.items()}
    name = "pytorch_lora_weights.safetensors" if style == "diffusers" else f"{facts.name}.safetensors"
    size = sum(factor.numel() * factor.element_size() for delta in deltas.values() for factor in (delta.down, delta.up))

    def write(path: Path) -> None:
        checkpoint.write_lora_file(path, deltas, component_of(facts.model_class), style)

    return Package(
        ((name, size),), lambda folder: checkpoint.replace_files(folder, [NewFile(name, write)], byte_count=size)
    )


def _gguf(
    name: str,
    architecture: str,
    describe: Callable[[Any, Path], None],
    tensors: Sequence[GgufTensor],
    texts: Sequence[NewFile],
) -> Package:
    size = sum(tensor.byte_count for tensor in tensors)

    def write(folder: Path) -> None:
        def write_file(path: Path) -> None:
            checkpoint.write_gguf(path, architecture, lambda writer: describe(writer, folder), tensors)

        checkpoint.replace_files(folder, [NewFile(name, write_file), *texts], byte_count=size)

    return Package(((name, size),), write)


def _name(writer: Any, folder: Path, texts: dict[str, str], kind: Any) -> None:
    """Adds the general metadata as llama.cpp's converters do: from the folder's name and the model card."""
    gguf = checkpoint.gguf_package()
    total, shared, experts, expert_count = writer.get_total_parameter_count()
    with checkpoint.scratch_folder() as scratch:
        place = scratch / folder.name
        place.mkdir()
        for name, text in texts.items():
            (place / name).write_text(text, encoding="utf-8")
        metadata = gguf.Metadata.load(None, place, None, total)
    metadata.name = metadata.name or folder.name
    if metadata.size_label is None and total > 0:
        metadata.size_label = gguf.size_label(total, shared, experts, expert_count)
    writer.add_type(kind)
    if kind == gguf.GGUFType.ADAPTER:
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    metadata.set_gguf_meta_model(writer)


def _config(manager: AdapterManager) -> Any:
    model: nn.Module = manager.model
    return getattr(model, "config", None)
