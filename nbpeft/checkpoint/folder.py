"""Reads and writes a saved adapter: the config, tensors and model card of one folder."""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nbpeft.checkpoint import card as model_card
from nbpeft.checkpoint import inside
from nbpeft.checkpoint.atomic import NewFile, disk_errors, replace_files
from nbpeft.checkpoint.config_format import LARGEST_CONFIG, config_of, config_text, parse_config
from nbpeft.checkpoint.identity import Fingerprint
from nbpeft.checkpoint.key_conversion import key_conversion_of
from nbpeft.checkpoint.present import NAME_KEY
from nbpeft.checkpoint.prompt_format import PromptFormat, prompt_format, set_prompt_format
from nbpeft.checkpoint.source import CONFIG_NAME, Source, download_options, push
from nbpeft.checkpoint.staging import scratch_folder, staged, sweep
from nbpeft.checkpoint.tensor_file import (
    LEGACY_WEIGHTS_NAME,
    WEIGHTS_NAME,
    UnreadTensors,
    read_metadata,
    read_tensors,
    storable,
    write_pickled,
    write_tensors,
)
from nbpeft.checkpoint.weights_format import Expected, from_file
from nbpeft.engine.contract.adapter import AdapterConfig, ReadsTensors
from nbpeft.engine.contract.registry import method_of
from nbpeft.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, PeftWarning, few

CARD_NAME = "README.md"
_READS = 3
"""How often config and tensors are read again when another process replaces them in between."""
_CONFIG_DIGEST = "nbpeft.config_sha256"


@dataclass(frozen=True)
class Checkpoint:
    """A saved adapter whose tensors are not read yet.

    Attributes:
        config: the adapter's config.
        unread: the tensors by key in the file, for the requested device.
        metadata: metadata of the tensor file, including the base model's fingerprint.
        folder: the folder of the files; for the hub, a folder of its local cache.
    """

    config: AdapterConfig
    unread: UnreadTensors
    metadata: dict[str, str]
    folder: Path

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, read on first access.

        Raises:
            CorruptCheckpointError: the file was truncated after its header was read.
        """
        return dict(self.unread.read())

    def reconciled(self, config: AdapterConfig) -> tuple[AdapterConfig, UnreadTensors]:
        """Returns the config and the tensors as ``AdapterConfig.reconciled`` adjusts them to each other."""
        return config.reconciled(self.unread.header)[0], self.unread.changed(
            lambda tensors: config.reconciled(tensors)[1]
        )


@dataclass(frozen=True)
class WrittenFiles:
    """The files of one saved adapter.

    Attributes:
        paths: the files, tensors first; an unchanged README is not listed.
        byte_count: their total size in bytes.
    """

    paths: tuple[Path, ...]
    byte_count: int


def read_config(
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **hub: Any,
) -> AdapterConfig:
    """Reads the config of a saved adapter.

    Args:
        source: a folder, or the id of a repository on the hub.
        subfolder: subfolder of the source that contains the adapter.
        revision: branch, tag or commit on the hub.
        cache_dir: folder of the download cache.
        token: access token for the hub.
        local_files_only: use the local cache without contacting the hub.
        **hub: further arguments of ``huggingface_hub.hf_hub_download``.

    Raises:
        CheckpointNotFoundError: there is no ``adapter_config.json``.
        CorruptCheckpointError: it cannot be read.
        UnknownMethodError: it names a method that is not registered.
    """
    options = dict(
        revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only or None, **hub
    )
    place = Source.of(source, subfolder, options)
    path = place.config_file()
    config, unknown = parse_config(_config_text_of(path, None), str(path))
    _warn_of_unknown(unknown, path)
    return config


def read_checkpoint(
    source: str | os.PathLike[str], *, subfolder: str | None = None, device: str | torch.device = "cpu", **hub: Any
) -> Checkpoint:
    """Reads the config of a saved adapter and the header of its tensor file, from a folder or the hub.

    Args:
        source: a folder, or the id of a repository on the hub.
        subfolder: subfolder of the source that contains the adapter.
        device: device on which the tensors are created when they are read.
        **hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only`` and further arguments of
            ``huggingface_hub.hf_hub_download``.

    Returns:
        The checkpoint; its tensors are read later.

    Raises:
        CheckpointNotFoundError: files are missing.
        CorruptCheckpointError: a file is truncated, altered or of another format.
        UnknownMethodError: the config names a method that is not registered.
    """
    options = {name: value for name, value in hub.items() if not (name == "local_files_only" and not value)}
    place = Source.of(source, subfolder, options)
    path = place.config_file()
    for _ in range(_READS):
        file = place.tensor_file(path)
        text = _config_text_of(path, file.metadata)
        if file.is_current:
            break
    config, unknown = parse_config(text, str(path))
    set_prompt_format(config, PromptFormat.from_metadata(file.metadata))
    _warn_of_unknown(unknown, path)
    unread = UnreadTensors(file, device).changed(functools.partial(method_of(config).files.unpack, config))
    return Checkpoint(config, unread, file.metadata, file.path.parent)


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    *,
    fingerprint: Fingerprint | None = None,
    card: str | None = None,
    write_card: bool = True,
    tags: Sequence[str] = (),
) -> WrittenFiles:
    """Saves an adapter atomically in PEFT's format; never uses the network.

    Args:
        folder: the target, created if needed; its other files are not touched.
        config: the adapter's config (see ``config_to_save``).
        tensors: key in the file -> tensor.
        fingerprint: fingerprint of the base model, saved in the tensor file's metadata.
        card: text of the README; None generates one, or updates an existing one.
        write_card: whether to write a README at all.
        tags: additional tags of the README.

    Returns:
        The written files.

    Raises:
        CheckpointError: the files cannot be written; nothing was changed.
        ConfigError: a field of the config cannot be saved.
    """
    readme = card if card is not None or not write_card else config
    return write_checkpoints(folder, {"": (config, tensors)}, fingerprint=fingerprint, card=readme, tags=tags)[""]


def write_checkpoints(
    folder: str | os.PathLike[str],
    adapters: Mapping[str, tuple[AdapterConfig, Mapping[str, Tensor]]],
    *,
    fingerprint: Fingerprint | None = None,
    notes: Mapping[str, Mapping[str, str]] | None = None,
    card: AdapterConfig | str | None = None,
    tags: Sequence[str] = (),
    facts: model_card.CardFacts | None = None,
    pickled: bool = False,
    names: Mapping[str, str] | None = None,
) -> dict[str, WrittenFiles]:
    """Saves several adapters of a model into a folder and its subfolders, atomically; never uses the network.

    Args:
        folder: the target, created if needed; its other files are not touched.
        adapters: subfolder, or ``""`` for the folder itself -> config and tensors, as for ``write_checkpoint``.
        fingerprint: fingerprint of the base model, saved in the tensor files' metadata.
        notes: subfolder -> further metadata entries of that adapter's tensor file.
        card: config of the adapter that the folder's README describes, or the README's text; None writes no README.
        tags: additional tags of the README.
        facts: further facts for the README; their loss curve is saved as a file next to it.
        pickled: write the tensors as PEFT's old ``.bin``, which has no metadata about the base model.
        names: subfolder -> name of the adapter, saved in the tensor file's metadata.

    Returns:
        Subfolder -> the written files; the README is listed under ``""``.

    Raises:
        CheckpointError: the files cannot be written; nothing was changed.
        ConfigError: a field of a config cannot be saved.
    """
    target = Path(inside.expanded(folder))
    files: list[NewFile] = []
    paths: dict[str, list[str]] = {}
    byte_count = 0
    with disk_errors(target):
        sweep(target)  # finishes an interrupted write before the existing files are compared
        for subfolder, (config, tensors) in adapters.items():
            if not tensors and method_of(config).files.has_tensors:
                raise CheckpointError(f"there are no tensors to save to {target / subfolder}")
            text, ready = config_text(config, inference_mode=True), storable(tensors)
            metadata = {_CONFIG_DIGEST: _digest(text), **(fingerprint.to_metadata() if fingerprint else {})}
            form = prompt_format(config)
            metadata |= {**(form.to_metadata() if form else {}), **(notes or {}).get(subfolder, {})}
            metadata |= {NAME_KEY: names[subfolder]} if names else {}
            weights = LEGACY_WEIGHTS_NAME if pickled else WEIGHTS_NAME
            paths[subfolder] = [os.path.join(subfolder, name) for name in (weights, CONFIG_NAME)]
            write: Any = functools.partial(write_tensors, tensors=ready, metadata=metadata)
            if pickled:
                _check_read_first(target / subfolder)
                write = functools.partial(write_pickled, tensors=ready)
            files.append(NewFile(paths[subfolder][0], write))
            if _text_or_none(target / subfolder / CONFIG_NAME) != text:
                files.append(NewFile.of_text(paths[subfolder][1], text))
            byte_count += sum(tensor.numel() * tensor.element_size() for tensor in ready.values()) + len(text)
        files += _card_file(target / CARD_NAME, card, tags, facts=facts)
        if facts is not None and facts.curve:
            files.append(NewFile.of_text(model_card.CURVE_NAME, facts.curve))
            paths.setdefault("", []).append(model_card.CURVE_NAME)
        sizes = replace_files(target, files, byte_count=byte_count)
        if target / CARD_NAME in sizes:
            paths.setdefault("", []).append(CARD_NAME)
        return {subfolder: _written([target / name for name in found], sizes) for subfolder, found in paths.items()}


def write_card(folder: str | os.PathLike[str], config: AdapterConfig, *, tags: Sequence[str] = ()) -> None:
    """Writes the README of a saved adapter, or updates the existing one.

    Args:
        folder: the adapter's folder.
        config: the adapter's config.
        tags: additional tags.

    Raises:
        CheckpointError: the README cannot be written; nothing was changed.
    """
    target = Path(inside.expanded(folder))
    with disk_errors(target):
        sweep(target)
        files = _card_file(target / CARD_NAME, config, tags, needed=True)
        if files:
            replace_files(target, files)


def write_config(config: AdapterConfig, folder: str | os.PathLike[str]) -> Path:
    """Writes only ``adapter_config.json``, atomically.

    Args:
        config: the config.
        folder: the target, created if needed.

    Returns:
        Path of the written file.

    Raises:
        CheckpointError: the file cannot be written; nothing was changed.
    """
    target = Path(inside.expanded(folder))
    return next(iter(replace_files(target, [NewFile.of_text(CONFIG_NAME, config_text(config))])))


class FolderStore:
    """The ``ConfigStore`` behind ``AdapterConfig.from_pretrained`` and ``save_pretrained``."""

    def read(self, source: str, **options: Any) -> AdapterConfig:
        """See ``read_config``; keywords that are not download options are ignored, as in PEFT."""
        return read_config(source, **download_options(options))

    def tensors(self, path: str) -> dict[str, Tensor]:
        """See ``ConfigStore``."""
        if not inside.leads_to_file(Path(path)):
            raise CheckpointNotFoundError(f"there is no file {path!r}")
        return read_tensors(Path(path))[0]

    def adapter(self, source: str, model: nn.Module) -> tuple[AdapterConfig, ReadsTensors]:
        """See ``ConfigStore``."""
        config, conversion = read_config(source), key_conversion_of(model)

        def read(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Mapping[str, Mapping[str, Tensor]]:
            _, tensors = read_checkpoint(source).reconciled(config)
            peft_type = method_of(config).peft_type
            loaded = from_file(tensors, Expected(adapters=shapes), peft_type=peft_type, conversion=conversion)
            if loaded.missing:
                raise CheckpointError(f"{source} has no {few(loaded.missing)}")
            return loaded.weights.adapters

        return config, read

    def make(self, fields: dict[str, Any]) -> AdapterConfig:
        """See ``config_of``; warns about unknown fields."""
        config, unknown = config_of(fields, "the config")
        _warn_of_unknown(unknown, "the config")
        return config

    def write(self, config: AdapterConfig, folder: str, **options: Any) -> None:
        """See ``write_config``; ``auto_mapping_dict`` replaces the config's ``auto_mapping``."""
        auto_mapping = options.pop("auto_mapping_dict", None)
        if options:
            raise CheckpointError(f"unknown option {next(iter(options))!r} for saving a config")
        write_config(config.copy(auto_mapping=auto_mapping) if auto_mapping is not None else config, folder)

    def push(self, config: AdapterConfig, repo_id: str, *, tags: Sequence[str], **options: Any) -> str:
        """See ``source.push``."""
        with scratch_folder() as folder:
            write_config(config, folder)
            if tags:
                write_card(folder, config, tags=tags)
            return push(folder, repo_id, **options)


def _check_read_first(folder: Path) -> None:
    """Refuses to save a ``.bin`` next to a safetensors file: the latter would be loaded instead."""
    if inside.leads_to_file(folder / WEIGHTS_NAME):
        raise CheckpointError(
            f"{folder} has {WEIGHTS_NAME}, which is read before {LEGACY_WEIGHTS_NAME}: remove it or take another folder"
        )


def _written(paths: Sequence[Path], sizes: Mapping[Path, int]) -> WrittenFiles:
    """Returns the written files; an unchanged config counts with its size on disk."""
    return WrittenFiles(tuple(paths), sum(sizes[path] if path in sizes else _size(path) for path in paths))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _card_file(
    path: Path,
    card: AdapterConfig | str | None,
    tags: Sequence[str],
    *,
    needed: bool = False,
    facts: model_card.CardFacts | None = None,
) -> list[NewFile]:
    """Returns the README to write, if any.

    The list is empty if the README would not change, if the existing one is not UTF-8 text, or, unless ``needed``,
    if it cannot be read.
    """
    if card is None:
        return []
    present = None
    try:
        present = inside.read_file(path, LARGEST_CONFIG).decode("utf-8")
    except FileNotFoundError:
        pass
    except (UnicodeDecodeError, CheckpointError):
        return []
    except OSError:
        if needed:
            raise
        return []
    try:
        text = card if isinstance(card, str) else model_card.card_text(card, present, tags=tags, facts=facts)
    except Exception as error:  # a card must not prevent an adapter from being saved
        if needed:
            raise
        warnings.warn(f"{path.name} is not written: {type(error).__name__}: {error}", PeftWarning, stacklevel=4)
        return []
    return [] if text == present else [NewFile.of_text(path.name, text)]


def _config_text_of(path: Path, metadata: Mapping[str, str] | None) -> str:
    """Returns the text of the config that belongs to the tensors in the same folder.

    If a process died when it had replaced one of the two, the config of the tensors is in its staging folder.
    """
    text = _text(path)
    if metadata is not None and metadata.get(_CONFIG_DIGEST) in (None, _digest(text)):
        return text
    below = os.path.join(path.parent.name, CONFIG_NAME)
    waiting = [*staged(path.parent, CONFIG_NAME), *staged(path.parent.parent, below)]
    if not waiting:
        return text
    if metadata is None:
        weights = path.parent / WEIGHTS_NAME
        metadata = read_metadata(weights) if inside.leads_to_file(weights) else {}
    wanted = metadata.get(_CONFIG_DIGEST)
    if wanted is None or wanted == _digest(text):
        return text
    return next((staged_text for staged_text in map(_text, waiting) if _digest(staged_text) == wanted), text)


def _text(path: Path) -> str:
    try:
        return inside.read_file(path, LARGEST_CONFIG).decode("utf-8")
    except CheckpointError as error:
        raise CorruptCheckpointError(f"not the config of an adapter: {error.message}", path=str(path)) from None
    except UnicodeDecodeError:
        raise CorruptCheckpointError(f"{path} is not a text file", path=str(path)) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", path=str(path)) from None


def _text_or_none(path: Path) -> str | None:
    try:
        return inside.read_file(path, LARGEST_CONFIG).decode("utf-8")
    except (OSError, UnicodeDecodeError, CheckpointError):
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _warn_of_unknown(unknown: Mapping[str, Any], path: Path | str) -> None:
    """Warns about unknown fields that are ignored, unless their value is None, False or empty."""
    ignored = sorted(name for name, value in unknown.items() if value)
    if ignored:
        names = few(ignored, 10, quoted=False)
        warnings.warn(f"{path}: ignored the fields {names}, which this version does not know", stacklevel=3)
