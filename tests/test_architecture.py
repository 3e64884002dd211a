"""What the import contracts in pyproject.toml cannot say, and a proof that both bite."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

from tests.published import MACHINE_PATHS, TEXT_SUFFIXES

# --- The data of the rules below ---------------------------------------------------------------------

MOST_FILE_LINES = 800
MOST_BODY_LINES = 60

# Private words, and what PEFT, torchtune, transformers or Jupyter people would say. As a part of any name:
BANNED_WORDS = {
    "acting": "active",
    "acts": "is_active",
    "afresh": "again, new",
    "arrivals": "to_load",
    "asked": "request, requested",
    "besides": "additional",
    "book": "registry",
    "desk": "context",
    "drawer": "panel",
    "face": "api",
    "foreseen": "estimate",
    "glance": "try_lock",
    "holder": "manager, ref",
    "obedient": "respect",
    "parted": "untied",
    "picks": "toggles",
    "reachable": "available",
    "remark": "warning",
    "remarks": "warnings",
    "resident": "cached",
    "residents": "cache",
    "reviver": "rehandle",
    "saw": "count",
    "shortage": "out_of_memory",
    "strangers": "unexpected",
    "supplied": "loaded",
    "supplier": "provider",
    "supply": "provide",
    "survey": "fit",
    "tell": "report, warn",
    "told": "reported",
    "turned": "transposed",
    "victims": "to_evict",
}
# As a whole name:
BANNED_NAMES = {
    "Base": "BaseLayer",
    "CopiedModule": "ModulesToSaveWrapper",
    "Done": "CommandResult",
    "Entry": "TrackedModel",
    "FEW": "SAMPLED_LAYERS",
    "Host": "LayerKind",
    "Place": "AdapterSource",
    "Ready": "HostAdapter",
    "StandIn": "FakeQuantizedLinear",
    "Steps": "LogSlider",
    "Surface": "PeakModel",
    "Switch": "ActiveAdapters",
    "Verb": "Subcommand",
    "Vocabulary": "CompletionSources",
    "adds_itself": "supports_fused_add",
    "check_together": "check_compatible",
    "chosen_copy": "module_to_keep",
    "distinct_storages": "unique_storages",
    "follow": "tie_to",
    "foreign": "trainer_patch",
    "forget_gguf": "clear_gguf_flags",
    "further": "extrapolate",
    "gain": "dora_scale",
    "host": "kind",
    "host_named": "layer_kind",
    "hosts": "layer_kinds",
    "layers_to_part": "layers_to_untie",
    "let_checkpointing_learn": "enable_input_grads_for_checkpointing",
    "let_go": "release",
    "lossy_note": "warn_requantization",
    "merge_refusal": "merge_unsupported_reason",
    "merged_elsewhere": "merged_through_tied_layer",
    "multiplies": "is_linear",
    "part_for_good": "untie_embeddings_",
    "part_of_base": "weight_component",
    "product_refusal": "merge_unsupported_reason",
    "renames": "key_conversion",
    "shares_rows": "is_tied",
    "spelling": "peft_keys",
    "standin": "fake_quantized",
    "starts_in_base": "initialised_from_weight",
    "waiting_count": "num_offloaded",
    "weight_free": "delta_needs_weight",
    "zero_factor": "zero_init_factor",
}

# What breaks a rule today. These only shrink: one that is gone has to go here too.
STANDING_PARTS: set[str] = set()
STANDING_NAMES: set[str] = {
    "host",
    "hosts",  # the machines of a training, as torchrun and DeepSpeed call them
    "resident",
}

# --- Rules over the sources --------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nbpeft"
FOLDERS = ("nbpeft", "notebooks", "tests")


@dataclass(frozen=True)
class Rule:
    """A search through the sources.

    Attributes:
        find: what breaks the rule in one file, given its path below the root and its text.
        example: a path and a text that break it.
        found: what `find` finds there.
        where: the folders it is for.
        standing: what breaks it today; nothing else may, and what no longer does is taken out.
    """

    find: Callable[[str, str], Iterator[str]]
    example: tuple[str, str]
    found: set[str]
    where: tuple[str, ...] = FOLDERS
    standing: frozenset[str] | set[str] = frozenset()


def long_files(path: str, text: str) -> Iterator[str]:
    if len(text.splitlines()) >= MOST_FILE_LINES:
        yield path


def long_functions(path: str, text: str) -> Iterator[str]:
    """Functions whose body, without the docstring, is long."""
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            if body and (body[-1].end_lineno or 0) - body[0].lineno + 1 >= MOST_BODY_LINES:
                yield f"{path}: {node.name}"


def parts_files(path: str, text: str) -> Iterator[str]:
    """Files that were cut off others because those were long, and are not an idea of their own."""
    if path.endswith("_parts.py"):
        yield path


def private_words(path: str, text: str) -> Iterator[str]:
    """Public names that are banned or hold a banned word, wherever a file defines them."""
    for name in {*public_names(text), *Path(path).with_suffix("").parts}:
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
        if name in BANNED_NAMES or not BANNED_WORDS.keys().isdisjoint(word.lower() for word in words):
            yield name


def public_names(text: str) -> Iterator[str]:
    """Classes, functions, parameters, attributes and the variables of modules and classes."""
    for node in ast.walk(parsed(text)):
        names: list[str] = []
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                given = node.args
                names = [node.name, *(each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs))]
            case ast.Attribute(ctx=ast.Store()):
                names = [node.attr]
            case ast.Module() | ast.ClassDef():
                assigned = [target for part in node.body for target in targets(part)]
                names = [
                    getattr(node, "name", "_"),
                    *(target.id for target in assigned if isinstance(target, ast.Name)),
                ]
        yield from (name for name in names if not name.startswith("_"))


def targets(statement: ast.stmt) -> list[ast.expr]:
    match statement:
        case ast.Assign():
            return statement.targets
        case ast.AnnAssign():
            return [statement.target]
    return []


@lru_cache(maxsize=1)
def parsed(text: str) -> ast.Module:
    """The tree of a file, for all rules; the trees of all files would slow every garbage collection after."""
    return ast.parse(text)


LONG_FUNCTION = 'def f():\n    """Two.\n\n    Lines.\n    """\n' + "    x = 1\n" * MOST_BODY_LINES
SHORT_FUNCTION = 'def g():\n    """Two.\n\n    Lines.\n    """\n' + "    x = 1\n" * (MOST_BODY_LINES - 1)
PRIVATE = (
    "HOLDERS = TOLD = 1\nclass ModelBook:\n    asked: int\n    def _told(self, remark, /, *, host=None):\n"
    "        self.survey = self._saw = booked = 2\n"
)


# A further search is a function like those above and an entry here, with a text that it must object to.
def html(path: str, text: str) -> Iterator[str]:
    """Marks of HTML in a layer that a script uses too."""
    yield from (f"{path}: {found[0]}" for found in HTML.finditer(text) if path.startswith(HEADLESS))


def cell_spelling(path: str, text: str) -> Iterator[str]:
    """How a cell says it, in a layer that a script uses too."""
    yield from (f"{path}: {found[0]}" for found in MAGIC.finditer(text) if path.startswith(HEADLESS))


def method_tensors(path: str, text: str) -> Iterator[str]:
    """A method's tensors named, or an adapter asked for an attribute, outside of the methods."""
    if "/methods/" not in path:
        yield from (f"{path}: {found[0]}" for found in METHOD_TENSOR.finditer(text))


HEADLESS = tuple(
    f"nbpeft/{layer}/"
    for layer in ("checkpoint", "engine", "memory", "model", "scoring", "session", "shipping", "training")
)
HTML = re.compile(r"<div|<table|_html\b|var\(--jp")
MAGIC = re.compile(r"%%?q?lora|[(,] ?--(?!jp-)[a-z]")
METHOD_TENSOR = re.compile(
    r"lora_[AB]\b|lora_magnitude|lora_embedding|\bia3_l\b|\brow_norm\b|(?:has|get)attr\(\s*adapter\b"
)

RULES = {
    "headless layers hold no HTML": Rule(
        html, ("nbpeft/session/x.py", "'<div>'"), {"nbpeft/session/x.py: <div"}, where=("nbpeft",)
    ),
    "headless layers spell no magic": Rule(
        cell_spelling, ("nbpeft/model/x.py", "'%lora use base'"), {"nbpeft/model/x.py: %lora"}, where=("nbpeft",)
    ),
    "a method's tensors are named in methods alone": Rule(
        method_tensors,
        ("nbpeft/model/x.py", "hasattr(adapter, 'r') or layer.lora_A"),
        {"nbpeft/model/x.py: lora_A", "nbpeft/model/x.py: hasattr(adapter"},
        where=("nbpeft",),
    ),
    "files are short": Rule(long_files, ("nbpeft/x.py", "\n" * MOST_FILE_LINES), {"nbpeft/x.py"}),
    "functions are short": Rule(
        long_functions, ("nbpeft/x.py", f"{LONG_FUNCTION}\n{SHORT_FUNCTION}"), {"nbpeft/x.py: f"}
    ),
    "files are ideas, not parts": Rule(
        parts_files, ("nbpeft/x_parts.py", ""), {"nbpeft/x_parts.py"}, standing=STANDING_PARTS
    ),
    "names are the field's": Rule(
        private_words,
        ("nbpeft/hosts/layer_face.py", PRIVATE),
        {"hosts", "layer_face", "TOLD", "ModelBook", "asked", "remark", "host", "survey"},
        where=("nbpeft",),
        standing=STANDING_NAMES,
    ),
}


def test_the_rules_hold() -> None:
    found: dict[str, set[str]] = {name: set() for name in RULES}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            place, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
            for name, rule in RULES.items():
                if folder in rule.where:
                    found[name] |= set(rule.find(place, text))
    for name, rule in RULES.items():
        new, gone = sorted(found[name] - rule.standing), sorted(rule.standing - found[name])
        assert not new, f"{name}: the rule's data is at the top of this file"
        assert not gone, f"{name}: what no longer stands goes out of the list at the top of this file, too"


@pytest.mark.parametrize("name", RULES)
def test_a_rule_bites(name: str) -> None:
    rule = RULES[name]
    assert set(rule.find(*rule.example)) == rule.found


# --- What a fresh interpreter imports ----------------------------------------------------------------

HEAVY = {"torch", "transformers", "bitsandbytes", "ipywidgets", "safetensors", "accelerate", "matplotlib", "peft"}
HEAVY |= {"datasets", "huggingface_hub", "anywidget"}
COMPLETE = (
    "from IPython.core.interactiveshell import InteractiveShell\n"
    "shell = InteractiveShell.instance()\n"
    "shell.run_line_magic('load_ext', 'nbpeft')\n"
    "assert {'lora', 'lora_train'} <= set(shell.magics_manager.magics['cell'])\n"
    "for text in ('%lora use ', '%%lora ', '%%lora model\\nr', '%%lora_train model --data '):\n"
    "    shell.complete('', text, len(text))\n"
    "shell.run_line_magic('lora', '')\n"
    "shell.run_line_magic('lora', 'doctor')"
)
MATCH = (
    "import torch\n"
    "from nbpeft.engine.contract.registry import backends\n"
    "assert sum(backend.matches(torch.nn.Linear(2, 2)) for backend in backends()) == 1 < len(backends())"
)
# Two interpreters, each of which goes on from what it has imported: what a step runs, and what may be there then.
STEPS: tuple[dict[str, tuple[str, set[str]]], ...] = (
    {
        "the package": ("import nbpeft\ndir(nbpeft)", set()),
        "the examples": ("import nbpeft.examples as e\ne.prompted(e.records(4, 4)[1], e.dates()[0])", set()),
        "the session": ("import nbpeft.session\nnbpeft.get_session().state\nnbpeft.NbpeftError", set()),
        "the extension and its completion": (COMPLETE, {"IPython", "numpy"}),
    },
    {
        "the engine": ("import nbpeft.engine.runtime.manager", {"torch", "numpy"}),
        "the backends, asked about a layer": (MATCH, {"torch", "numpy"}),
        "tracking a loop": ("from nbpeft.training import RunControl, start_run", {"torch", "numpy", "safetensors"}),
        "a model's handle": ("from nbpeft import PeftModel, get_peft_model", {"torch", "numpy", "safetensors"}),
    },
)


def loaded_after_each_step() -> dict[str, set[str]]:
    """Which of the heavy packages each step of `STEPS` leaves imported."""
    report = "\nimport json, sys\nprint('LOADED', json.dumps([%r, [name for name in %r if name in sys.modules]]))\n"
    watched = sorted(HEAVY | {"IPython", "numpy", "torch._dynamo"})
    loaded: dict[str, set[str]] = {}
    for steps in STEPS:
        code = "".join(statements + report % (title, watched) for title, (statements, _) in steps.items())
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        reports = (json.loads(line) for line in re.findall(r"^LOADED (.*)$", done.stdout, re.MULTILINE))
        loaded |= {title: set(packages) for title, packages in reports}
    return loaded


def test_importing_is_light() -> None:
    loaded = loaded_after_each_step()
    for title, (_, allowed) in {**STEPS[0], **STEPS[1]}.items():
        assert loaded[title] <= allowed, title


# --- The import contracts ----------------------------------------------------------------------------

VIOLATIONS = {
    "layers": ("engine/contract/adapter.py", "import nbpeft.model", "nbpeft.engine.contract.adapter -> nbpeft.model"),
    "headless": ("engine/contract/adapter.py", "def f(): import IPython", "nbpeft.engine.contract.adapter -> IPython"),
    "described": ("session/__init__.py", "import nbpeft.display.html", "nbpeft.session -> nbpeft.display.html"),
    "through-session": (
        "widgets/__init__.py",
        "import nbpeft.engine.injection.plan",
        "nbpeft.widgets -> nbpeft.engine.injection.plan",
    ),
    "engine-layers": (
        "engine/config/targets.py",
        "import nbpeft.engine.injection.plan",
        "nbpeft.engine.config.targets -> nbpeft.engine.injection.plan",
    ),
    "methods-independent": (
        "engine/methods/vectors/trainable_tokens.py",
        "import nbpeft.engine.methods.lora",
        "nbpeft.engine.methods.vectors.trainable_tokens -> nbpeft.engine.methods.lora",
    ),
    "backends-independent": (
        "engine/backends/dense.py",
        "import nbpeft.engine.backends.bnb4bit",
        "nbpeft.engine.backends.dense -> nbpeft.engine.backends.bnb4bit",
    ),
    "files": ("engine/contract/adapter.py", "import safetensors", "nbpeft.engine.contract.adapter -> safetensors"),
    "no-cycles": ("engine/contract/adapter.py", "import nbpeft.engine.injection.plan", "nbpeft.engine"),
    "no-root": (
        "engine/contract/adapter.py",
        "from nbpeft import __version__",
        "nbpeft.engine.contract.adapter -> nbpeft",
    ),
    "no-peft": ("checkpoint/__init__.py", "def f(): import peft", "nbpeft.checkpoint -> peft"),
}
WITHOUT_A_LAYER = {"layers": "helpers.py", "engine-layers": "engine/utils.py"}


@pytest.fixture(scope="module")
def contracts() -> dict[str, str]:
    """The name of each import contract, by its id."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {contract["id"]: contract["name"] for contract in tables["tool"]["importlinter"]["contracts"]}


def lint_imports(root: Path) -> str:
    """What the contracts say of the package below a folder, with their exit status last."""
    code = "import sys; from importlinter.cli import lint_imports; print(lint_imports(no_cache=True))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "400"},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory, contracts: dict[str, str]) -> dict[str, str]:
    """What each contract says of one copy of the package that breaks them all."""
    copy = tmp_path_factory.mktemp("violated")
    shutil.copy(ROOT / "pyproject.toml", copy)
    shutil.copytree(PACKAGE, copy / "nbpeft", ignore=shutil.ignore_patterns("__pycache__"))
    for file, statement, _ in VIOLATIONS.values():
        with (copy / "nbpeft" / file).open("a", encoding="utf-8") as source:
            source.write(f"\n{statement}\n")
    for file in WITHOUT_A_LAYER.values():
        (copy / "nbpeft" / file).write_text('"""Odds and ends."""\n', encoding="utf-8")
    broken = lint_imports(copy).partition("Broken contracts")[2]
    headings = "|".join(re.escape(name) for name in contracts.values())
    parts = re.split(rf"^({headings})\n-+$", broken, flags=re.MULTILINE)[1:]
    return {name: re.sub(r"\s+", " ", text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.slow
def test_the_contracts_are_kept(contracts: dict[str, str]) -> None:
    output = lint_imports(ROOT)
    assert f"Contracts: {len(contracts)} kept, 0 broken." in output, output


@pytest.mark.slow
@pytest.mark.parametrize("contract", VIOLATIONS)
def test_a_violated_contract_is_caught(contract: str, complaints: dict[str, str], contracts: dict[str, str]) -> None:
    assert VIOLATIONS[contract][2] in complaints[contracts[contract]]


@pytest.mark.slow
@pytest.mark.parametrize("contract", WITHOUT_A_LAYER)
def test_a_module_without_a_layer_is_caught(
    contract: str, complaints: dict[str, str], contracts: dict[str, str]
) -> None:
    module = "nbpeft." + WITHOUT_A_LAYER[contract].removesuffix(".py").replace("/", ".")
    assert f"not listed as layers: - {module}" in complaints[contracts[contract]]


def test_every_contract_has_a_violation_here(contracts: dict[str, str]) -> None:
    assert contracts.keys() == VIOLATIONS.keys()


# --- The house ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["methods", "layer_kinds", "backends"])
def test_everything_registered_has_a_room_and_every_room_registers(folder: str) -> None:
    from nbpeft.engine.contract import registry

    registered: dict[str, list[type]] = {
        "methods": [method.adapter_class for method in registry.methods()],
        "layer_kinds": [type(kind) for kind in registry.layer_kinds()],
        "backends": [type(backend) for backend in registry.backends()],
    }
    prefix = f"nbpeft.engine.{folder}."
    names = [cls.__module__.removeprefix(prefix) for cls in registered[folder] if cls.__module__.startswith(prefix)]
    rooms = {path.stem for path in (PACKAGE / "engine" / folder).iterdir() if not path.name.startswith("__")}
    assert {name.partition(".")[0] for name in names} == rooms
    if folder == "backends":
        assert len(names) == len(rooms)


def test_a_method_that_overrides_nothing_has_a_docstring() -> None:
    """An override in the engine or of a result is described by what it overrides, except for what is special."""
    files = [file for room in ("engine", "session/results", "display") for file in (PACKAGE / room).rglob("*.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    classes: dict[str, list[ast.ClassDef]] = defaultdict(list)
    for node in itertools.chain.from_iterable(map(ast.walk, trees.values())):
        if isinstance(node, ast.ClassDef):
            classes[node.name].append(node)

    def overrides(cls: ast.ClassDef, name: str) -> bool:
        bases = [base for written in cls.bases for base in classes.get(ast.unparse(written), ())]
        return any(name in (getattr(part, "name", "") for part in base.body) or overrides(base, name) for base in bases)

    own_contract = {PACKAGE / "engine" / "backends", PACKAGE / "engine" / "layer_kinds"}
    bare = [
        f"{path.stem}: {cls.name}.{part.name}"
        for path, tree in trees.items()
        for cls in ast.walk(tree)
        if path.parent not in own_contract and isinstance(cls, ast.ClassDef) and not cls.name.startswith("_")
        if "Protocol" not in map(ast.unparse, cls.bases)
        for part in cls.body
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_") and not ast.get_docstring(part)
        if not any("setter" in ast.unparse(mark) or "overload" in ast.unparse(mark) for mark in part.decorator_list)
        if not overrides(cls, part.name)
    ]
    assert not bare


def project_files() -> list[Path]:
    """The files that belong to the project, as git sees them where it is there."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in project_files()
        if path.suffix in TEXT_SUFFIXES
        for match in MACHINE_PATHS.finditer(path.read_text(encoding="utf-8", errors="replace"))
    }
    assert not found


def test_the_top_level_is_fixed() -> None:
    allowed = {"LICENSE", "README.md", "nbpeft", "notebooks", "pyproject.toml", "tests"}
    tops = {path.relative_to(ROOT).parts[0] for path in project_files()}
    assert {top for top in tops if not top.startswith(".")} == allowed
