"""Nothing that is read from a folder is evaluated: what runs code by a text is listed, and where the text is from."""

from __future__ import annotations

import ast
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nbpeft
from nbpeft.errors import CheckpointError, ConfigError
from nbpeft.model.saving.merge_weights import meta_model
from tests.magics.notebook import Notebook
from tests.tiny_models import llama

PACKAGE = Path(nbpeft.__file__).parent
FROM_A_PERSON = {
    "as_peft.py": "the script that a person runs",
    "magics/body.py": "what a person writes in a cell or a line",
    "session/fields.py": "annotations of classes that are imported",
}
"""Where text or a file is run."""
OWN_PROCESSES = {
    "training/process.py": "a pipe to the process that started this one",
    "training/launch/processes.py": "a pipe from a process that this one started",
    "training/launch/transport.py": "a file in a scratch folder that this user's processes alone can read",
    "peft_api/helpers.py": "PEFT's torch_load, where a person says weights_only=False",
    "model/analysis/method_checks.py": "bytes that the same expression pickled",
}
"""Where pickles are read."""
NAMED_MODULES = {
    "__init__.py": "a table of nbpeft's own names",
    "training/__init__.py": "a table of nbpeft's own names",
    "peft_api/install.py": "statements of nbpeft's own files",
    "peft_api/modules.py": "names that a person imports",
    "peft_api/names.py": "nbpeft's own files",
    "engine/backends/__init__.py": "nbpeft's own files",
    "engine/layer_kinds/__init__.py": "nbpeft's own files",
    "engine/methods/__init__.py": "nbpeft's own files",
    "magics/registry.py": "nbpeft's own files",
    "model/handle/auto.py": "a package of import_allowlist, which a person gives",
    "training/watching/trackers.py": "one of two modules of nbpeft's choice",
}
"""Where a module is imported whose name is not written there."""


@functools.cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """File, name and node of each call in the package."""
    return [
        (path.relative_to(PACKAGE).as_posix(), ast.unparse(node.func), node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def keyword(node: ast.Call, name: str) -> str:
    return next((ast.unparse(item.value) for item in node.keywords if item.arg == name), "")


def test_texts_are_evaluated_where_a_person_writes_them_alone() -> None:
    found = {
        file
        for file, name, _ in calls()
        if name in ("eval", "exec", "__import__", "runpy.run_path", "runpy.run_module")
    }
    assert found == FROM_A_PERSON.keys()


def test_pickles_are_read_from_this_users_own_processes_alone() -> None:
    loads = {(file, name, node) for file, name, node in calls() if name.rpartition(".")[2] in ("load", "loads")}
    pickles = {file for file, name, node in loads if name.startswith(("pickle.", "dill.", "joblib.", "marshal."))}
    tensors = {file for file, name, node in loads if name == "torch.load" and keyword(node, "weights_only") != "True"}
    assert pickles | tensors == OWN_PROCESSES.keys()


def test_yaml_is_read_as_text() -> None:
    yaml = [node for _, name, node in calls() if name in ("yaml.load", "yaml.full_load", "yaml.unsafe_load")]
    assert all("BaseLoader" in ast.unparse(node) for node in yaml)


def test_modules_are_imported_by_names_that_are_written_here() -> None:
    found = {
        file
        for file, name, node in calls()
        if name.endswith("import_module") and not isinstance(node.args[0], ast.Constant)
    }
    assert found == NAMED_MODULES.keys()


def test_code_of_others_is_trusted_where_a_person_says_so_alone() -> None:
    trusted = [keyword(node, "trust_remote_code") for _, _, node in calls()]
    assert set(trusted) <= {"", "False", "trusted"}, "model/handle/auto.py hands on what it is given"


@pytest.mark.parametrize("names", [["pipeline"], ["Trainer"], ["logging"], [["a"]], [{"a": 1}], "LlamaForCausalLM", []])
def test_a_config_names_no_class_but_one_of_a_model(tmp_path: Path, names: Any) -> None:
    config = llama().config.to_dict() | {"architectures": names}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ConfigError, CheckpointError), match=r"names no class|has no model config"):
        meta_model(tmp_path)


# The folder of a run may be a stranger's.

STATE_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin")
EVIL = "[open({path!r}, 'w').write('x'), 4][1]"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NBPEFT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def stopped(notebook: Notebook, place: Path) -> Notebook:
    """A run that was stopped after a step."""
    notebook["rows"] = [{"input_ids": [1, 2, 3, 4]}] * 8
    notebook.do("%lora add model --name sql r=2 target_modules=q_proj")
    end = notebook.session.on_run(lambda run, name: run.control.request_stop())
    notebook.do("%%lora_train model --data rows\nmax_steps = 4")
    end()
    return notebook


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    "where", ["line", "cell", "data", "eval_data", "tokenizer", "trainer", "objects", "arguments", "model", "settings"]
)
def test_code_in_the_folder_of_a_run_does_not_run(stopped: Notebook, place: Path, tmp_path: Path, where: str) -> None:
    mark = tmp_path / "mark"
    code, path = EVIL.format(path=str(mark)), place / "sql-1" / "run.json"
    facts = json.loads(path.read_text())
    source = facts["source"]
    changes: dict[str, dict[str, Any]] = {
        "line": {"source": source | {"line": f"model --data {code.replace(' ', '')} --trainer-class {code}"}},
        "cell": {"source": source | {"cell": f"max_steps = {code}"}},
        "data": {"source": source | {"data": code}},
        "eval_data": {"source": source | {"eval_data": code}},
        "tokenizer": {"source": source | {"tokenizer": code}},
        "trainer": {"source": source | {"trainer": code}},
        "objects": {"objects": [code]},
        "arguments": {"arguments": {"max_steps": 4, "seed": code, "optim": code, "lr_scheduler_kwargs": code}},
        "model": {"model": code},
        "settings": {"settings": {code: code}},
    }
    path.write_text(json.dumps(facts | changes[where]))
    stopped.run("%lora runs")
    outcome = stopped.run("%lora resume")
    assert not mark.exists()
    if where in ("data", "objects", "arguments", "model"):
        assert len(outcome.line) < 1000 and "\n" not in outcome.line


def test_pickled_code_in_the_state_of_a_run_does_not_run(stopped: Notebook, place: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(mark), "w")

    for state, name in itertools.product(place.glob("sql-1/checkpoint-*"), STATE_FILES):
        torch.save(Evil(), state / name)
    stopped.run("%lora resume")
    assert not mark.exists()


def test_a_run_on_another_base_or_of_tomorrow_is_not_taken(stopped: Notebook, place: Path) -> None:
    stopped["rows"] = stopped["rows"][:]
    stopped.do("%%lora_train model --data rows\nmax_steps = 1")
    path = place / "sql-1" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": 4e9}))
    assert stopped.session.kept_run()[0].name == "sql-2"
    for weights in place.glob("sql-1/checkpoint-*/sql/adapter_model.safetensors"):
        save_file(load_file(weights), weights)  # without the mark of its base
    stopped.do("%lora delete sql")
    told = stopped.run("%lora resume sql-1").line
    assert told.startswith("cannot resume sql-1 on this model: the adapter does not say which base model")
    assert stopped["model"].manager.names == ()
