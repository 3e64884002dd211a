"""The README and the guide: short pages, links that lead somewhere, and snippets that run."""

from __future__ import annotations

import ast
import importlib.util
import pydoc
import re
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nbpeft
from nbpeft.magics.lora import CELLS, SUBCOMMANDS
from nbpeft.session.fields import _QUANTIZATION, Field
from tests.benchmarks.harness import rows as benchmarks
from tests.published import FENCE, HEADING, LINK, broken_links, prose_of, text_of
from tests.test_readme import SECTIONS as AS_PRINTED

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDE = ROOT / "notebooks" / "guide"
PAGES = [README, *sorted(GUIDE.glob("*.md"))]
NOTEBOOKS = [*sorted(GUIDE.parent.glob("*.ipynb")), *sorted(GUIDE.parent.glob("gallery/*.ipynb"))]
MOST_README_LINES = 200
MOST_PAGE_LINES = 300

FORECASTS = ("quantization", "Memory")
"""The page and the section with a snippet whose output is the table beneath it."""

ABOUT_COMMANDS = ["commands", "data", "hyperparameters", "memory", "preferences", "quantization", "rewards", "scoring"]
ABOUT_COMMANDS += ["serving", "several-cards", "training"]
"""Pages that name the commands whose options they explain, and no options of other programs."""

NOT_RUN = "<!-- not run:"
"""Begins the line above a snippet that is compiled only, and says why."""
_CODE_SPAN = re.compile(r"`([^`\n]+)`")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short(page: Path) -> None:
    assert len(text_of(page).splitlines()) <= (MOST_README_LINES if page == README else MOST_PAGE_LINES)


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(broken_links(page, prose_of(page)))


def test_a_broken_link_is_found() -> None:
    links = "[a](no.md) [b](index.md#no) [c](#no) [d](index.md#guide) [e](https://no.example)"
    assert list(broken_links(GUIDE / "index.md", links)) == ["no.md", "index.md#no", "#no"]


def test_every_page_is_in_the_index() -> None:
    linked = set(LINK.findall(text_of(GUIDE / "index.md")))
    assert {page.name for page in PAGES if page.parent == GUIDE} - {"index.md"} <= linked
    assert {f"../{path.name}" for path in NOTEBOOKS if path.parent == GUIDE.parent} <= linked
    in_gallery = {f"../gallery/{path.name}" for path in NOTEBOOKS if path.parent != GUIDE.parent}
    assert in_gallery <= set(LINK.findall(text_of(GUIDE / "gallery.md")))


@pytest.mark.parametrize(
    "page",
    ["data", "choosing-a-method", "quantization", "preferences", "memory", "serving", "limits", "troubleshooting"],
)
def test_the_table_of_the_readme_leads_to_a_page_in_one_click(page: str) -> None:
    """The questions that a newcomer asks first."""
    table = text_of(README).partition("\n## Where to read on\n")[2].partition("\n## ")[0]
    assert f"](notebooks/guide/{page}.md)" in table


def test_the_readme_links_into_what_the_source_distribution_holds() -> None:
    """It is the description of the package too, and is read there beside these files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["readme"] == README.name
    held = {*project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"], *project["project"]["license-files"]}
    linked = {link.partition("/")[0] for link in LINK.findall(text_of(README)) if "://" not in link}
    assert linked <= held


def wrong_names(text: str) -> Iterator[str]:
    """What stands in backticks and is not there: files of the project, modules to run, public names, commands."""
    for code in _CODE_SPAN.findall(text):
        if re.fullmatch(r"(tests|notebooks|\.ci)/[\w./]+", code) and not (ROOT / code).exists():
            yield code
        elif found := re.match(r"python -m (tests[\w.]*)(?: --only ([\w -]+))?", code):
            rows = (found[2] or "").split()
            if importlib.util.find_spec(found[1]) is None or not all(benchmarks([row]) for row in rows):
                yield code
        elif found := re.match(r"nbpeft(?:\.[a-zA-Z]\w*)+", code):
            if pydoc.locate(found[0]) is None:
                yield code
        elif found := re.match(r"%(%?)(q?lora\w*)(?: ([a-z]+)\b(?!=))?", code):
            known = found[2] in {"lora", *CELLS}
            if not known or (not found[1] and found[3] and found[3] not in {*SUBCOMMANDS, "help"}):
                yield code
            elif command := CELLS.get(found[2]) if found[1] else SUBCOMMANDS.get(found[3] or ""):
                flags = {flag for argument in command.arguments for flag in argument.flags}
                if set(_OPTION.findall(code)) - flags:
                    yield code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page: Path) -> None:
    assert not list(wrong_names(prose_of(page)))


def test_a_wrong_name_is_found() -> None:
    wrong = ["tests/no.py", "python -m tests.no", "python -m tests.benchmarks --only step no", "nbpeft.no(x)"]
    wrong += ["nbpeft.session.no", "%%lora_no model", "%lora no a", "%lora use a --no", "%%lora_train m --no"]
    right = [
        "tests/run.py",
        "python -m tests.gpu",
        "nbpeft.train(model)",
        "%%lora_train model",
        "%lora use a",
        "%lora",
        "%lora merge --to d",
    ]
    assert list(wrong_names(" ".join(f"`{code}`" for code in [*right, *wrong]))) == wrong


def options_of_other_commands(text: str) -> Iterator[str]:
    """Options in backticks that none of the commands has which the text names."""
    lines = [(line[1], line[2], line[3]) for line in re.finditer(r"%(%?)(q?lora\w*)(?: ([a-z]+)\b(?!=))?", text)]
    commands = [CELLS.get(word) if cell else SUBCOMMANDS.get(verb or "") for cell, word, verb in lines]
    known = [{flag for argument in command.arguments for flag in argument.flags} for command in commands if command]
    for code in _CODE_SPAN.findall(text):
        if code.startswith("--") and not any(set(_OPTION.findall(code)) <= flags for flags in known):
            yield code


@pytest.mark.parametrize("page", ABOUT_COMMANDS)
def test_the_options_of_a_page_are_those_of_its_commands(page: str) -> None:
    assert not list(options_of_other_commands(text_of(GUIDE / f"{page}.md")))


def test_an_option_of_another_command_is_found() -> None:
    text = "`%lora plan model` counts a sweep with `--adapters 4` or `--num-adapters 4`, and `%lora ask` an `--off`"
    assert list(options_of_other_commands(text)) == ["--adapters 4", "--off"]


def test_messages_that_troubleshooting_quotes_exist() -> None:
    sources = "".join(text_of(path) for path in (ROOT / "nbpeft").rglob("*.py"))
    written = re.sub(r'"\s*f?"', "", sources)
    text = " ".join(_CODE_SPAN.sub("", text_of(GUIDE / "troubleshooting.md")).split())
    quoted = [message for message in re.findall(r'"([^"|]+)"', text) if " " in message]
    assert len(quoted) >= 6
    assert not [message for message in quoted if message not in written]


def test_every_method_is_in_the_readme_and_in_the_table() -> None:
    from nbpeft.engine.contract.registry import methods

    readme, table = text_of(README), text_of(GUIDE / "methods.md")
    for method in methods():
        names = {method.label, f"{method.label}s", method.peft_type.lower()}
        assert any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", readme) for name in names), method.label
        assert any(f"`{name}`" in table or f"| {name}" in table or f", {name}" in table for name in names), method.label
    assert f"LoRA and {len(methods()) - 1} other" in readme


def test_every_package_is_in_the_table_of_layers() -> None:
    packages = {path.parent.name for path in (ROOT / "nbpeft").glob("*/__init__.py")}
    assert packages <= set(_CODE_SPAN.findall(text_of(GUIDE / "how-it-is-made.md")))


def test_every_command_is_in_the_table() -> None:
    table = text_of(GUIDE / "commands.md")
    assert not [name for name in SUBCOMMANDS if f"%lora {name}" not in table]
    assert not [name for name in CELLS if f"%%{name}" not in table]


def section_of(page: str, heading: str) -> str:
    return text_of(GUIDE / page).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("page", ["commands", "AGENTS"])
def test_the_session_has_a_method_for_each_command(page: str) -> None:
    """The page names the commands whose method is called otherwise; all others have one of their own name."""
    from nbpeft.session import Session

    text = " ".join(text_of(GUIDE / f"{page}.md").split())
    renamed = dict(re.findall(r"`%%?(?:lora )?(\w+)(?: [A-Z]+)?` is `(\w+)`", text))
    assert {"lora": "add", "lora_train": "train"}.items() <= renamed.items()
    assert not [method for method in renamed.values() if not hasattr(Session, method)]
    named = (
        {*SUBCOMMANDS, *CELLS}
        if page == "commands"
        else set(re.findall(r"^\d\. `%lora (\w+)", text_of(GUIDE / f"{page}.md"), re.MULTILINE))
    )
    assert len(named) >= 3
    assert {name for name in named - renamed.keys() if not hasattr(Session, name)} <= {"panel"}


def test_every_default_that_differs_in_a_notebook_is_in_the_table() -> None:
    from nbpeft.training.transformers.argument_source import NOTEBOOK_DEFAULTS

    section = section_of("training.md", "Defaults")
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in _CODE_SPAN.findall(row.split(" | ")[0])}
    assert listed == {"learning_rate", "eval_strategy", *NOTEBOOK_DEFAULTS}


def test_every_field_of_a_quantized_model_is_in_its_table() -> None:
    def row(field: Field) -> str:
        default = f"`{field.default}`" if field.default else ""
        return f"| `{field.name}` | {default} | {', '.join(f'`{value!r}`' for value in field.choices)} | {field.help} |"

    section = section_of("quantization.md", "Fields")
    assert [line for line in section.splitlines() if line.startswith("| `")] == [row(field) for field in _QUANTIZATION]


def test_the_defaults_to_start_with_are_those_of_the_code() -> None:
    from nbpeft.session.fields import fields

    known = {**fields("config"), **fields("training")}
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section_of("hyperparameters.md", "What to start with"), re.M)
    assert len(rows) >= 10
    assert [(name, float_or_text(value)) for name, value in rows] == [
        (name, float_or_text(known[name].default.strip("'"))) for name, _ in rows
    ]


def float_or_text(value: str) -> float | str:
    return float(value) if re.fullmatch(r"[\d.]+", value) else value


def test_the_table_of_learning_rates_follows_the_rule() -> None:
    from torch import nn

    from nbpeft.training.loop.learning_rate import _of_lora

    rows = re.findall(r"^\| ([\d,]+) \| ([\d.e-]+) \|", section_of("hyperparameters.md", "Learning rate"), re.M)
    assert len(rows) >= 7
    for width, rate in rows:
        model: Any = nn.Module()
        model.config = SimpleNamespace(hidden_size=int(width.replace(",", "")))
        assert f"{_of_lora(model)[0]:.1e}" == f"{float(rate):.1e}"


# --- Snippets ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snippet:
    """Python, or a cell, of a page.

    Attributes:
        section: the heading it stands under.
        code: what it says.
        runs: whether it runs here.
    """

    section: str
    code: str
    runs: bool

    @property
    def is_cell(self) -> bool:
        return self.code.startswith("%")


def snippets(page: Path) -> list[Snippet]:
    text = text_of(page)
    found = []
    for fence in FENCE.finditer(text):
        if fence[2] == "python":
            before = text[: fence.start()].rstrip().rsplit("\n", 1)[-1]
            section = HEADING.findall(FENCE.sub("", text[: fence.start()]))[-1]
            found.append(Snippet(section, textwrap.dedent(fence[3]).strip(), not before.startswith(NOT_RUN)))
    return found


WITH_SNIPPETS = [page for page in PAGES if snippets(page)]
SECTIONS = [
    pytest.param(page, section, marks=[pytest.mark.slice] if page == README else [])
    for page in WITH_SNIPPETS
    for section in dict.fromkeys(snippet.section for snippet in snippets(page))
    if (page != README or section not in AS_PRINTED) and (page.stem, section) != FORECASTS
]


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.stem)
def test_snippets_compile(page: Path) -> None:
    for snippet in snippets(page):
        magic, _, body = snippet.code.partition("\n") if snippet.is_cell else ("", "", snippet.code)
        ast.parse(body)
        assert not magic or re.match(r"%load_ext nbpeft|%%?q?lora", magic)


def used_names(page: Path) -> Iterator[str]:
    """Names that the snippets of a page use, import or read from something, if they run."""
    for snippet in snippets(page):
        body = snippet.code.partition("\n")[2] if snippet.is_cell else snippet.code
        for node in ast.walk(ast.parse(body)) if snippet.runs else ():
            if isinstance(node, ast.Name | ast.Attribute | ast.alias):
                yield getattr(node, "id", "") or getattr(node, "attr", "") or getattr(node, "name", "")


def test_every_public_name_has_an_example_that_runs() -> None:
    used = {name for page in PAGES for name in used_names(page)}
    assert not set(nbpeft.__all__) - used


def variables() -> dict[str, Any]:
    """What the pages take for granted: names of nbpeft, a model, a tokenizer, rows and batches."""
    from tests.char_tokenizer import CharTokenizer
    from tests.tiny_models import llama, tokens

    rows = [{"prompt": f"Order {number}. Code:", "completion": f" A{number}"} for number in range(8)]
    return {
        **{name: getattr(nbpeft, name) for name in ("LoraConfig", "PeftModel", "get_peft_model")},
        "nbpeft": nbpeft,
        "model": llama(max_position_embeddings=256),
        "base": llama(max_position_embeddings=256),
        "tokenizer": CharTokenizer(),
        **dict.fromkeys(("train", "held_out", "rows", "train_rows", "eval_rows"), rows),
        "loader": [{"input_ids": tokens(), "labels": tokens()}] * 2,
    }


def made_cheap(code: str) -> str:
    """A snippet with two steps of training, and prompts in the letters that the tiny model knows."""
    return re.sub(r"(max_steps ?= ?)\d+", r"\g<1>2", code).replace(r"\n", " ")


@pytest.mark.slow
@pytest.mark.parametrize(("page", "section"), SECTIONS, ids=lambda value: getattr(value, "stem", value))
def test_snippets_run(page: Path, section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbpeft.engine.contract import registry
    from tests.magics.notebook import Notebook

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_methods", [*registry.methods()])
    notebook = Notebook()
    for name, value in variables().items():
        notebook[name] = value
    try:
        for snippet in snippets(page):
            if snippet.section == section and snippet.runs:
                notebook.do(made_cheap(snippet.code))
    finally:
        notebook.close()


@pytest.mark.slow
def test_the_forecasts_of_quantized_models_are_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page, section = GUIDE / f"{FORECASTS[0]}.md", FORECASTS[1]
    (snippet,) = (snippet for snippet in snippets(page) if snippet.section == section)
    exec(snippet.code, variables())
    printed = [f"| {line} |" for line in capsys.readouterr().out.splitlines()]
    table = section_of(page.name, section)
    assert printed == [line for line in table.splitlines() if line.startswith("| ")][1:]
