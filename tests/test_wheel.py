"""The wheel: what is in it, and that it works in an environment that holds only what it asks for."""

from __future__ import annotations

import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

import nbpeft
from tests import engine_alone
from tests.wheels import ROOT, Environment, build_wheel, closure, metadata_of, pip, requirements

pytestmark = pytest.mark.slow

SCRIPT = str(Path(engine_alone.__file__))
ENGINE = {"huggingface-hub", "numpy", "packaging", "psutil", "pyyaml", "safetensors", "torch", "transformers"}
EXTRAS = {
    "train": {"accelerate", "jinja2"},
    "notebook": {"accelerate", "ipykernel", "ipython", "ipywidgets", "jinja2", "rich"},
    "bnb": {"accelerate", "bitsandbytes", "jinja2"},
    "track": {"tensorboard", "trackio", "wandb"},
}
EXTRAS["all"] = EXTRAS["notebook"] | EXTRAS["bnb"] | EXTRAS["track"] | {"datasets", "gguf"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    info = f"nbpeft-{nbpeft.__version__}.dist-info"
    assert {name.partition("/")[0] for name in held} == {"nbpeft", info}
    assert {"nbpeft/py.typed", "nbpeft/__init__.pyi", "nbpeft/AGENTS.md", f"{info}/licenses/LICENSE"} <= held
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "nbpeft").rglob("*.py*") if path.suffix != ".pyc"}
    assert sources <= held
    assert not [name for name in held if "test" in name or name.endswith((".pyc", ".ipynb"))]


def test_its_description_is_the_readme(wheel: Path) -> None:
    described = metadata_of(wheel).metadata
    assert described["Description-Content-Type"] == "text/markdown"
    text = described.get_payload() or described["Description"]
    assert str(text).strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_it_asks_for_the_engine_s_packages_and_its_extras_for_the_rest(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert metadata.version == nbpeft.__version__
    assert {canonicalize_name(asked.name) for asked in requirements(metadata)} == ENGINE
    for extra, packages in EXTRAS.items():
        asked = {extra}
        direct = set()
        while asked:  # an extra may name others
            for requirement in requirements(metadata, [asked.pop()]):
                asked |= requirement.extras
                direct.add(canonicalize_name(requirement.name))
        assert direct - ENGINE - {"nbpeft"} == packages, extra


def environment(folder: Path, wheel: Path, extra: str) -> Environment:
    """An environment with the wheel, and with what it and one of its extras ask for, as it is installed here."""
    made = Environment.make(folder, closure(metadata_of(wheel), filter(None, [extra])).values())
    pip(made.python, "install", "--quiet", "--no-index", f"{wheel}[{extra}]" if extra else str(wheel))
    assert pip(made.python, "check").strip() == "No broken requirements found."
    return made


def test_the_engine_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    bare = environment(tmp_path / "bare", wheel, "")
    for absent in ("accelerate", "bitsandbytes", "IPython", "ipywidgets", "peft"):
        with pytest.raises(RuntimeError, match=f"No module named '{absent}'"):
            bare.run("-c", f"import {absent}")
    assert bare.run(SCRIPT).strip() == "ok"
    where = bare.run("-c", "import nbpeft; print(nbpeft.__version__, nbpeft.__file__)")
    assert where.split() == [nbpeft.__version__, str(bare.packages / "nbpeft" / "__init__.py")]


CELLS = f"""
import os, runpy
from IPython.core.interactiveshell import InteractiveShell

os.environ["NBPEFT_RUNS"] = os.getcwd()
shell = InteractiveShell.instance()
shell.user_ns["model"] = runpy.run_path({SCRIPT!r})["tiny_model"]()
shell.user_ns["train_rows"] = [dict(input_ids=[1, 2, 3, 4], labels=[1, 2, 3, 4])] * 40
cells = [
    "%load_ext nbpeft",
    "%%lora model --name orders\\nr = 8\\ntarget_modules = ['q_proj', 'v_proj']",
    "%%lora_train model --data train_rows --eval-data 0.1\\nmax_steps = 3",
    "saved = %lora save adapters/orders --adapter orders",
    "%lora load adapters/orders --name again",
    "%lora merge again",
]
for cell in cells:
    shell.run_cell(cell).raise_error()
print("page", "describe()" in str(shell.run_cell("%lora help --agent").result))
print("steps", shell.run_cell("%lora watch --wait").result.steps)
"""


def test_the_quickstart_s_cells_work_with_the_notebook_extra(wheel: Path, tmp_path: Path) -> None:
    printed = environment(tmp_path / "notebook", wheel, "notebook").run("-c", CELLS)
    assert printed.splitlines()[-1] == "steps 3" and "page True" in printed.splitlines()


def test_the_lower_bounds_hold(wheel: Path, tmp_path: Path) -> None:
    """The engine and a training with the lowest versions that the wheel allows, but of torch, which is too large."""
    torch = distribution("torch")
    oldest = Environment.make(tmp_path / "oldest", [torch, *closure(torch).values()])
    lowest = {
        asked.name: next(part.version for part in asked.specifier if part.operator == ">=")
        for asked in requirements(metadata_of(wheel), ["train"])
        if asked.name not in ("nbpeft", "torch")
    }
    constraints = tmp_path / "lowest.txt"
    constraints.write_text("\n".join(f"{name}=={version}" for name, version in lowest.items()), encoding="utf-8")
    pip(oldest.python, "install", "--quiet", "--constraint", str(constraints), f"{wheel}[train]")
    versions = f"from importlib.metadata import version; print(*map(version, {list(lowest)}))"
    found = oldest.run("-c", versions).split()
    assert list(map(Version, found)) == list(map(Version, lowest.values()))
    assert oldest.run(SCRIPT).strip() == "ok"
    assert oldest.run("-c", TRAINING).splitlines()[-1] == "steps 3"


TRAINING = f"""
import runpy, nbpeft
model = nbpeft.get_peft_model(runpy.run_path({SCRIPT!r})["tiny_model"](), nbpeft.LoraConfig(task_type="CAUSAL_LM"))
rows = [dict(input_ids=[1, 2, 3, 4], labels=[1, 2, 3, 4])] * 8
print("steps", nbpeft.train(model, rows, max_steps=3).steps)
"""
