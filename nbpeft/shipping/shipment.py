"""Exports an adapter for a serving engine: checks that the engine can load it, then writes the files."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nbpeft._util.former_names import refusing_former_names
from nbpeft.checkpoint import NewFile, in_place_of
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import AdapterError, ConfigError, did_you_mean
from nbpeft.jsonable import AsDict
from nbpeft.model.saving.saved_places import note_written_over
from nbpeft.shipping import formats
from nbpeft.shipping.engines import ENGINES, Engine, Form
from nbpeft.shipping.facts import AdapterFacts, facts_of
from nbpeft.shipping.formats import GGUF_ADAPTER, GGUF_MODEL, Package
from nbpeft.shipping.gguf_model import MIXTURES
from nbpeft.shipping.importance import Rows
from nbpeft.shipping.modelfile import PROMPT_ALONE, chat_format_of, modelfile, quoted, usual_system
from nbpeft.shipping.verdict import Verdict, verdict_of

_OLLAMA_NAME = re.compile(r"[\w./:-]{1,200}", re.ASCII)
_NO_TEMPLATE = "the chat template is not known to nbpeft: Ollama uses the one that it detects, or set TEMPLATE yourself"
_ITS_TEMPLATE = "the chat template is not known to nbpeft: Ollama uses that of its base model, or set TEMPLATE yourself"
_PLAIN = "trained without the chat template, and the Modelfile applies none: write prompts as in the training rows"
_QUOTES = "the system prompt of the training rows is left out: a Modelfile cannot contain its quotes"


@dataclass(frozen=True)
class Shipment(AsDict):
    """A planned or written export.

    Attributes:
        adapter: name of the adapter.
        engine: name of the engine.
        verdict: whether the engine can load the adapter.
        merged: whether the adapter is merged into its base model.
        stored_as: storage type of the weights; empty if it does not change.
        folder: the target folder.
        files: (name, size in bytes) of each file with weights.
        commands: command lines that start the engine.
        notes: notes for the user.
        written: whether the files were written; False for a dry run.
        texts: names of files without weights that the engine reads, e.g. a Modelfile.
    """

    adapter: str
    engine: str
    verdict: Verdict
    merged: bool
    stored_as: str
    folder: Path
    files: tuple[tuple[str, int], ...]
    commands: tuple[str, ...]
    notes: tuple[str, ...]
    written: bool = False
    texts: tuple[str, ...] = ()

    @property
    def byte_count(self) -> int:
        """Size of all weights in bytes."""
        return sum(size for _, size in self.files)


@refusing_former_names
def ship(
    model: nn.Module,
    adapter: str | None = None,
    *,
    engine: str,
    to: str | os.PathLike[str] | None = None,
    merged: bool = False,
    quantize: str | None = None,
    base: str | None = None,
    tokenizer: Any = None,
    calibrate: Rows | None = None,
    replace: bool = False,
    dry_run: bool = False,
) -> Shipment:
    """Exports an adapter in the format of a serving engine, after checking that the engine can load it.

    The model is not changed.

    Args:
        model: an adapted model.
        adapter: name of the adapter; None if the model has only one.
        engine: ``vllm``, ``llama.cpp``, ``ollama``, ``transformers``, ``peft``, ``diffusers`` or ``kohya``.
        to: the new folder to write; None for ``<adapter>-<engine>``.
        merged: merge the adapter into the base model and export the merged model.
        quantize: storage type of the weights: ``f32``, ``f16`` or ``bf16``, and in GGUF files ``q8_0``, of whole models
            also ``q6_k``, ``q5_k_m`` or ``q4_k_m``; None for the engine's default.
        base: for Ollama: name of its base model, to which the adapter is added; None merges the adapter instead.
        tokenizer: saved with a merged model; required for a merged GGUF file.
        calibrate: tokenized rows for ``q4_k_m``, ``q5_k_m`` or ``q6_k``: the model is run on them, and errors in inputs
            that are large there become smaller.
        replace: replace an existing folder of an earlier export.
        dry_run: return the plan without writing anything.

    Returns:
        The export, with its files, sizes and commands.

    Raises:
        AdapterError: the engine cannot load the adapter; the message says what to change.
        ConfigError: an argument is invalid.
        MissingPackageError: the package ``gguf`` is needed and not installed.
        CheckpointError: the folder exists or cannot be written; nothing was written.
    """
    manager = _manager(model)
    with manager.active_state.hold():  # a background training would change the weights between plan and write
        planned, package = _plan(
            manager,
            adapter,
            engine=engine,
            to=to,
            merged=merged,
            quantize=quantize,
            base=base,
            tokenizer=tokenizer,
            calibrate=calibrate,
        )
        if dry_run:
            return planned
        with in_place_of(planned.folder, allowed=replace) as place:
            package.write(place)
        note_written_over([planned.folder])
    return dataclasses.replace(planned, written=True)


def _plan(
    manager: AdapterManager,
    adapter: str | None,
    *,
    engine: str,
    to: str | os.PathLike[str] | None,
    merged: bool,
    quantize: str | None,
    base: str | None,
    tokenizer: Any,
    calibrate: Rows | None,
) -> tuple[Shipment, Package]:
    """Returns the planned export, and the package that writes it."""
    chosen = _engine(engine)
    facts = facts_of(manager, _adapter(manager, adapter))
    verdict = verdict_of(chosen, facts)
    if base is not None and chosen.name != "ollama":
        raise ConfigError("base requires Ollama: it is the name of the base model there")
    if base is not None and not _OLLAMA_NAME.fullmatch(base):
        raise ConfigError(f"base is the name of a model in Ollama, e.g. 'llama3.2:1b', not {base!r:.60}")
    needs_base = chosen.name == "ollama" and base is None
    merged = merged or (needs_base and verdict.as_merged)
    _check(verdict, merged)
    if needs_base and not merged:
        raise ConfigError(
            "Ollama adds the adapter to one of its own models: give that model's name, e.g. base='gemma2:2b' (base=…)"
        )
    form = chosen.merged if merged else chosen.adapter
    assert form is not None
    stored_as = _type(quantize, form.types, chosen.label)
    if calibrate is not None and stored_as not in MIXTURES:
        raise ConfigError(
            f"calibrate has no effect on weights of type {stored_as or 'unchanged'}: it is for whole models in "
            f"{', '.join(MIXTURES)} (quantize=…)"
        )
    notes = list(verdict.notes)
    texts = _modelfile(base, merged, tokenizer, facts, notes) if chosen.name == "ollama" else []
    package = _package(manager, facts, form, stored_as, tokenizer, texts, calibrate)
    folder = Path(os.path.expanduser(os.fspath(to or f"{facts.name}-{chosen.name}")))
    notes += _format_notes(facts, form)
    planned = Shipment(
        facts.name,
        chosen.name,
        verdict,
        merged,
        stored_as,
        folder,
        package.files,
        chosen.start(facts, merged, str(folder)),
        tuple(notes),
        texts=tuple(file.name for file in texts),
    )
    return planned, package


def _manager(model: nn.Module) -> AdapterManager:
    found = manager_of(model) if isinstance(model, nn.Module) else None
    if found is None or not found.alive or not found.names:
        raise AdapterError(f"{type(model).__name__} has no adapters to ship")
    return found


def _engine(name: str) -> Engine:
    found = ENGINES.get(str(name).lower())
    if found is None:
        hint = did_you_mean(str(name), ENGINES)
        raise ConfigError(f"no engine is called {name!r:.60}; engines: {', '.join(ENGINES)}.{hint}")
    return found


def _adapter(manager: AdapterManager, name: str | None) -> str:
    if name is None and len(manager.names) > 1:
        raise AdapterError(f"the model has several adapters; name the one to ship (name=…): {', '.join(manager.names)}")
    return manager.names[0] if name is None else name


def _check(verdict: Verdict, merged: bool) -> None:
    if merged and not verdict.as_merged:
        why = "; ".join(map(str, verdict.merged_obstacles))
        raise AdapterError(f"{verdict.label} cannot load the merged model: {why}", verdict=verdict)
    if not merged and not verdict.as_adapter:
        raise AdapterError(str(verdict), verdict=verdict)


def _type(wanted: str | None, types: tuple[str, ...], label: str) -> str:
    if wanted is None:
        return types[0] if types else ""
    if wanted not in types:
        known = ", ".join(types) or "none: the adapter's weights are stored unchanged"
        raise ConfigError(
            f"quantize is {wanted!r:.40}; the types for {label} are {known}.{did_you_mean(wanted, types)}"
        )
    return wanted


def _package(
    manager: AdapterManager,
    facts: AdapterFacts,
    form: Form,
    stored_as: str,
    tokenizer: Any,
    texts: list[NewFile],
    calibrate: Rows | None,
) -> Package:
    match form.format:
        case "folder":
            return formats.adapter_folder(manager, facts, one_rank=form.one_rank)
        case "model":
            return formats.merged_folder(manager, facts, stored_as, tokenizer)
        case "gguf" if form.merges:
            if tokenizer is None:
                raise ConfigError("a GGUF file of a whole model includes its tokenizer: give it (tokenizer=…)")
            return formats.merged_gguf(manager, facts, stored_as, tokenizer, texts, calibrate)
        case "gguf":
            return formats.adapter_gguf(manager, facts, stored_as, texts)
    return formats.single_file(facts, form.format)


def _modelfile(base: str | None, merged: bool, tokenizer: Any, facts: AdapterFacts, notes: list[str]) -> list[NewFile]:
    """Returns Ollama's Modelfile, which asks the adapter as it was trained.

    A base model of Ollama has a chat template of its own: one is written only if the training used none, or set
    variables of it.
    """
    system, variables = (facts.form.system or "", facts.form.variables) if facts.form is not None else ("", {})
    own = merged or bool(variables)
    chat = PROMPT_ALONE if facts.is_plain else chat_format_of(tokenizer, variables) if own else None
    if facts.is_plain:
        notes.append(_PLAIN)
    elif own and chat is None:
        notes.append(_NO_TEMPLATE if merged else _ITS_TEMPLATE)
        if variables:
            given = ", ".join(f"{name}={value!r:.40}" for name, value in variables.items())
            notes.append(f"{given} of the training's chat template is not in the Modelfile")
    elif chat is not None and not system:
        system = usual_system(tokenizer, chat, variables)
    if quoted(system) is None:
        notes.append(_QUOTES)
        system = ""
    source, adapter = (f"./{GGUF_MODEL}", None) if merged else (str(base), f"./{GGUF_ADAPTER}")
    return [NewFile.of_text("Modelfile", modelfile(source, adapter, chat, system))]


def _format_notes(facts: AdapterFacts, form: Form) -> list[str]:
    """Returns notes about what the export changes."""
    notes = []
    if form.format == "folder":
        if facts.starts_in_weight and facts.deltas:
            notes.append(f"its init changed the weights: written as plain LoRA of rank {facts.ranks[-1]}")
        elif form.one_rank and not facts.is_lora:
            notes.append(f"{facts.method} is written as equivalent plain LoRA of rank {facts.ranks[-1]}")
        elif form.one_rank and len(facts.ranks) > 1:
            ranks = ", ".join(map(str, facts.ranks))
            notes.append(f"its ranks {ranks} are all padded with zeros to {facts.ranks[-1]}")
        if not facts.base_name:
            source = "from a local folder, whose path is not saved" if facts.base_is_local else "made in memory"
            notes.append(f"the base model is {source}: load the base, then the adapter")
    if facts.scale != 1.0:
        notes.append(f"its scale of {facts.scale:g} is included in the weights")
    return notes
