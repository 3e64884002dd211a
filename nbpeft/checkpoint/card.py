"""The README of a saved adapter: front matter that the hub reads, then text for people.

A README that is there keeps its text and its front matter; only the entries that the adapter
itself decides are brought up to date. One without any text gets ours.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import yaml

from nbpeft.engine.adapter import AdapterConfig, TaskType
from nbpeft.engine.registry import method_of

_FENCE = "---"
_PIPELINES = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
    TaskType.QUESTION_ANS: "question-answering",
    TaskType.FEATURE_EXTRACTION: "feature-extraction",
}
_SETTINGS_BEGIN = "<!-- settings: kept up to date by nbpeft -->"
_SETTINGS_END = "<!-- end of settings -->"
_HUB_ID = re.compile(r"[\w.-]{1,96}(?:/[\w.-]{1,96})?", re.ASCII)


def card_text(config: AdapterConfig, present: str | None = None, *, tags: Sequence[str] = ()) -> str:
    """The text of a README for an adapter.

    Args:
        config: the adapter's config.
        present: the README that is there, or None.
        tags: tags besides those that follow from the config (``transformers``).
    """
    base = _hub_id(config.base_model_name_or_path)
    own = [*tags, *config.card_tags, *(["transformers"] if config.task_type else [])]
    if base:
        own.append(f"base_model:adapter:{base}")
    newline = "\r\n" if present and "\r\n" in present else "\n"
    front, body = _split((present or "").replace("\r\n", "\n"))
    body = _with_settings(body if body.strip() else _body(config), config)
    entries = _entries(front)
    if base:
        _put(entries, "base_model", _block("base_model", base))
    _put(entries, "library_name", _block("library_name", "peft"))
    pipeline = _PIPELINES.get(TaskType(config.task_type)) if config.task_type else None
    if pipeline and not any(name == "pipeline_tag" for name, _ in entries):
        entries.append(("pipeline_tag", _block("pipeline_tag", pipeline)))
    _put_tags(entries, own)
    lines = [line for _, block in entries for line in block]
    return "\n".join([_FENCE, *lines, _FENCE, body]).replace("\n", newline)


def _hub_id(name: str | None) -> str | None:
    """The base model's id, unless it is a folder of this machine: that is nobody else's business."""
    if not name or os.path.exists(name) or os.path.isabs(name) or name.startswith((".", "~")) or "\\" in name:
        return None
    return name if _HUB_ID.fullmatch(name) else None


def _split(text: str) -> tuple[list[str], str]:
    """Lines of the front matter, and the text behind it."""
    lines = text.split("\n")
    if lines[0].strip() == _FENCE:
        for number, line in enumerate(lines[1:], start=1):
            if line.strip() == _FENCE:
                return lines[1:number], "\n".join(lines[number + 1 :])
    return [], "\n" + text


def _entries(lines: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(name, lines) of each top-level entry; comments and what is nested stay with the entry above."""
    entries: list[tuple[str, list[str]]] = []
    for line in lines:
        match = re.match(r"([A-Za-z_][\w-]*)\s*:", line)
        if match:
            entries.append((match.group(1), [line]))
        elif entries:
            entries[-1][1].append(line)
        else:
            entries.append(("", [line]))
    return entries


def _put(entries: list[tuple[str, list[str]]], name: str, block: list[str]) -> None:
    for position, (present, _) in enumerate(entries):
        if present == name:
            entries[position] = (name, block)
            return
    entries.append((name, block))


def _put_tags(entries: list[tuple[str, list[str]]], own: Sequence[str]) -> None:
    """Adds our tags to those that are there; a tag that names another base model goes."""
    block = next((lines for name, lines in entries if name == "tags"), ["tags: []"])
    try:
        present = yaml.load("\n".join(block), yaml.BaseLoader)["tags"] or []  # all scalars as the text they are
    except (yaml.YAMLError, RecursionError, KeyError, TypeError):
        return
    commented = any(line.lstrip().startswith("#") for line in block)
    if commented or not isinstance(present, list) or not all(isinstance(tag, str) for tag in present):
        return
    if any(tag.startswith("base_model:adapter:") for tag in own):
        present = [tag for tag in present if not tag.startswith("base_model:adapter:")]
    tags = sorted({*present, *own})
    if tags:
        _put(entries, "tags", _block("tags", tags))


def _block(name: str, value: object) -> list[str]:
    """Lines of YAML."""
    text: str = yaml.safe_dump({name: value}, allow_unicode=True, width=math.inf)
    return text.splitlines()


def _body(config: AdapterConfig) -> str:
    base = _hub_id(config.base_model_name_or_path)
    return "\n".join(
        [
            "",
            "# Adapter",
            "",
            f"A {method_of(config).label} adapter" + (f" for `{base}`." if base else "."),
            "",
            "## Settings",
            "",
            _SETTINGS_BEGIN,
            _SETTINGS_END,
            "",
            "## Use",
            "",
            "```python",
            "from nbpeft import PeftModel  # or: from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")',
            "```",
            "",
            "### Framework versions",
            "",
            f"- nbpeft {_version()}",
            "",
        ]
    )


def _with_settings(body: str, config: AdapterConfig) -> str:
    """The text with its table of settings brought up to date, where it has one of ours."""
    before, begin, rest = body.partition(_SETTINGS_BEGIN)
    _, end, after = rest.partition(_SETTINGS_END)
    if not end:
        return body
    fields = config.to_dict()
    rows = [f"| `{name}` | {_code(fields[name])} |" for name in _listed_fields(config)]
    return f"{before}{begin}\n" + "\n".join(["| field | value |", "|---|---|", *rows]) + f"\n{end}{after}"


def _listed_fields(config: AdapterConfig) -> list[str]:
    """Names of the fields that a card lists."""
    if config.card_fields:
        return list(config.card_fields)
    common = {item.name for item in dataclasses.fields(AdapterConfig)}
    own = [item for item in dataclasses.fields(config) if item.name not in common]
    return [item.name for item in own if getattr(config, item.name) != _default_of(item)]


def _default_of(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _code(value: object) -> str:
    """A value in a cell of a Markdown table, which it cannot leave."""
    text = json.dumps(value, default=_listed).replace("<!--", "\\u003c!--").replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _listed(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _version() -> str:
    try:
        return importlib.metadata.version("nbpeft")
    except importlib.metadata.PackageNotFoundError:
        return "from source"
