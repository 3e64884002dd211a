"""The model card (README.md) of a saved adapter: YAML front matter for the hub, then Markdown.

An existing README keeps its text and front matter; only the entries that follow from the adapter
are updated. A README without text gets the default text.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from nbpeft.checkpoint.prompt_format import prompt_format
from nbpeft.confidential import masked, without_secrets
from nbpeft.engine.contract.adapter import AdapterConfig, TaskType
from nbpeft.engine.contract.registry import method_of
from nbpeft.errors import visible

_FENCE = "---"
_PIPELINES = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
    TaskType.QUESTION_ANS: "question-answering",
    TaskType.FEATURE_EXTRACTION: "feature-extraction",
}
_LOADERS = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
}
_SETTINGS_BEGIN = "<!-- settings: kept up to date by nbpeft -->"
_SETTINGS_END = "<!-- end of settings -->"
_TRAINING_BEGIN = "<!-- training: kept up to date by nbpeft -->"
_TRAINING_END = "<!-- end of training -->"
CURVE_NAME = "loss_curve.svg"
_HUB_ID = re.compile(r"[\w.-]{1,96}(?:/[\w.-]{1,96})?", re.ASCII)


@dataclass(frozen=True)
class CardFacts:
    """Facts for a model card that the adapter's config does not contain.

    Attributes:
        source: the argument of ``from_pretrained`` that loads the adapter.
        title: the heading.
        base: description of a base model that has no hub id.
        training: (name, value) pairs about the training data and its result.
        arguments: training arguments; secrets are removed before they are written.
        curve: the loss curve as SVG, saved next to the card; empty for none.
    """

    source: str = "path/to/this/folder"
    title: str = "Adapter"
    base: str = ""
    training: tuple[tuple[str, str], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    curve: str = ""


def card_text(
    config: AdapterConfig, present: str | None = None, *, tags: Sequence[str] = (), facts: CardFacts | None = None
) -> str:
    """Returns the README text for an adapter.

    Args:
        config: the adapter's config.
        present: text of the existing README, or None.
        tags: additional tags; those that follow from the config are added anyway.
        facts: facts for the title and the training section; None leaves an existing training section unchanged.
    """
    base = _hub_id(config.base_model_name_or_path)
    own = [*tags, *config.card_tags, *(["transformers"] if config.task_type else [])]
    if base:
        own.append(f"base_model:adapter:{base}")
    newline = "\r\n" if present and "\r\n" in present else "\n"
    front, body = _split((present or "").replace("\r\n", "\n"))
    body = _with_settings(body if body.strip() else _body(config, facts or CardFacts()), config)
    body = _with_training(body, facts) if facts is not None else body
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
    """Returns the base model's hub id, or None for a local folder, whose path must not be published."""
    if not name or os.path.exists(name) or os.path.isabs(name) or name.startswith((".", "~")) or "\\" in name:
        return None
    return name if _HUB_ID.fullmatch(name) else None


def _split(text: str) -> tuple[list[str], str]:
    """Returns the lines of the front matter, and the text after it."""
    lines = text.split("\n")
    if lines[0].strip() == _FENCE:
        for number, line in enumerate(lines[1:], start=1):
            if line.strip() == _FENCE:
                return lines[1:number], "\n".join(lines[number + 1 :])
    return [], "\n" + text


def _entries(lines: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Returns (name, lines) of each top-level entry; comments and nested lines belong to the entry above."""
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
    """Adds tags to the existing ones and drops a tag that names another base model."""
    block = next((lines for name, lines in entries if name == "tags"), ["tags: []"])
    try:
        present = yaml.load("\n".join(block), yaml.BaseLoader)["tags"] or []  # BaseLoader keeps scalars as text
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
    """Returns an entry as lines of YAML."""
    text: str = yaml.safe_dump({name: value}, allow_unicode=True, width=math.inf)
    return text.splitlines()


def _body(config: AdapterConfig, facts: CardFacts) -> str:
    base = _hub_id(config.base_model_name_or_path)
    base_label = f"`{base}`" if base else _plain(facts.base)
    return "\n".join(
        [
            "",
            f"# {_plain(facts.title)}",
            "",
            f"A {method_of(config).label} adapter" + (f" for {base_label}." if base_label else "."),
            "",
            "## Settings",
            "",
            _SETTINGS_BEGIN,
            _SETTINGS_END,
            "",
            "## Use",
            "",
            "```python",
            *_loading_base(base, config.task_type),
            "from nbpeft import PeftModel  # or: from peft import PeftModel",
            "",
            f"model = PeftModel.from_pretrained(base_model, {json.dumps(facts.source, ensure_ascii=False)})",
            "```",
            "",
            "### Framework versions",
            "",
            f"- nbpeft {_version()}",
            "",
        ]
    )


def _loading_base(base: str | None, task_type: object) -> list[str]:
    """Returns the code lines that load the base model; empty if it has no hub id or no known auto class."""
    loader = _LOADERS.get(TaskType(task_type)) if task_type else None
    if base is None or loader is None:
        return []
    return [f"from transformers import {loader}", "", f'base_model = {loader}.from_pretrained("{base}")', ""]


def _with_training(body: str, facts: CardFacts) -> str:
    """Returns the text with its training section updated, or inserted before ``## Use`` if it has none."""
    section = _training_section(facts)
    before, begin, rest = body.partition(_TRAINING_BEGIN)
    _, end, after = rest.partition(_TRAINING_END)
    if end:
        return f"{before}{section}{after}"
    if begin or not (facts.training or facts.arguments or facts.curve):
        return body
    before, use, after = body.partition("\n## Use\n")
    return f"{before.rstrip()}\n\n## Training\n\n{section}\n{use}{after}"


def _training_section(facts: CardFacts) -> str:
    lines: list[str] = []
    if facts.training:
        lines += [
            "| | |",
            "|---|---|",
            *(f"| {_plain(name)} | {_plain(value)} |" for name, value in facts.training),
            "",
        ]
    if facts.curve:
        lines += [f"![Training loss by step]({CURVE_NAME})", ""]
    arguments, _ = without_secrets(facts.arguments)
    if arguments:
        rows = (f"| `{name}` | {_code(masked(v) if isinstance(v, str) else v)} |" for name, v in arguments.items())
        lines += ["| argument | value |", "|---|---|", *rows, ""]
    return "\n".join([_TRAINING_BEGIN, *(lines[:-1] if lines else lines), _TRAINING_END])


def _plain(text: str) -> str:
    """Returns text escaped for a cell of a Markdown table."""
    words = visible(" ".join(masked(text).split()))
    return re.sub(r"([\\`*_|<>\[\]$&~])", r"\\\1", words)


def _with_settings(body: str, config: AdapterConfig) -> str:
    """Returns the text with its generated table of settings updated, if it has one."""
    before, begin, rest = body.partition(_SETTINGS_BEGIN)
    _, end, after = rest.partition(_SETTINGS_END)
    if not end:
        return body
    fields = config.to_dict()
    rows = [f"| `{name}` | {_code(fields[name])} |" for name in _listed_fields(config)]
    lines = ["| field | value |", "|---|---|", *rows, *_prompt_lines(config)]
    return f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}"


def _prompt_lines(config: AdapterConfig) -> list[str]:
    """Returns lines that say how to prompt the adapter; empty if the format of its training rows is unknown."""
    form = prompt_format(config)
    if form is None:
        return []
    if form.classes:
        names = ", ".join(f"{number} = {_code(masked(name))}" for number, name in enumerate(form.classes))
        return ["", f"Classes: {names}."]
    if not form.chat:
        return ["", "Trained on text without a chat template: prompt it with plain text."]
    system = f" and the system prompt {_code(masked(form.system))}" if form.system else ""
    given = {name: masked(value) if isinstance(value, str) else value for name, value in form.variables.items()}
    variables = f" with {_code(given)}" if given else ""
    return ["", f"Trained with the chat template{variables}{system}: use the same template for prompts."]


def _listed_fields(config: AdapterConfig) -> list[str]:
    """Returns the names of the config fields that the card lists."""
    if config.card_fields:
        return list(config.card_fields)
    common = {item.name for item in dataclasses.fields(AdapterConfig)}
    own = [item for item in dataclasses.fields(config) if item.name not in common]
    return [item.name for item in own if getattr(config, item.name) != _default_of(item)]


def _default_of(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _code(value: object) -> str:
    """Returns a value as inline code, escaped for a cell of a Markdown table."""
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
