"""The wheel: what is in it, and that it works in an environment that holds only what it asks for."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

import nbpeft
from tests import engine_alone
from tests.wheels import ROOT, Environment, build_wheel, closure, metadata_of, pip, requirements

pytestmark = pytest.mark.slow

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
    assert {"nbpeft/py.typed", "nbpeft/__init__.pyi", f"{info}/licenses/LICENSE"} <= held
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "nbpeft").rglob("*.py*") if path.suffix != ".pyc"}
    assert sources <= held
    assert not [name for name in held if "test" in name or name.endswith((".pyc", ".ipynb"))]


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


def test_the_engine_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    environment = Environment.make(tmp_path / "bare", closure(metadata_of(wheel)).values())
    pip(environment.python, "install", "--quiet", "--no-index", str(wheel))
    assert pip(environment.python, "check").strip() == "No broken requirements found."
    for absent in ("accelerate", "bitsandbytes", "IPython", "ipywidgets", "peft"):
        with pytest.raises(RuntimeError, match=f"No module named '{absent}'"):
            environment.run("-c", f"import {absent}")
    assert environment.run(str(Path(engine_alone.__file__))).strip() == "ok"
    where = environment.run("-c", "import nbpeft; print(nbpeft.__version__, nbpeft.__file__)")
    assert where.split() == [nbpeft.__version__, str(environment.packages / "nbpeft" / "__init__.py")]
