"""In a notebook nothing is rebound, replaced or taken from one of several models without being told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.magics.notebook import Notebook
from tests.tiny_models import llama

VERBS = {
    "use": "use sql",
    "use base": "use base",
    "scale": "scale sql 2",
    "freeze": "freeze sql",
    "freeze --off": "freeze sql --off",
    "load": "load {folder}/sql --name new",
    "save": "save {folder}/again",
    "copy": "copy sql new",
    "rename": "rename sql new",
    "delete": "delete sql",
    "reset": "reset sql",
    "undo": "undo",
    "combine": "combine sql=1 --name new",
    "compare": 'compare "a"',
    "swap": "swap {folder}/sql --into sql",
    "inspect": "inspect sql",
    "memory": "memory",
    "merge": "merge",
    "unmerge": "unmerge",
    "unload": "unload",
}
POSITIONAL = {
    "%lora plan": "%lora plan",
    "%lora panel": "%lora panel adapters --model",
    "%lora panel blend": "%lora panel blend --model",
    "%lora plan --panel": "%lora plan",
    "%lora compare --panel": "%lora compare --panel --model",
}


@pytest.fixture
def trained(notebook: Notebook) -> Notebook:
    """The adapter ``sql`` on ``model`` was trained and is not saved."""
    notebook.do("%%lora model --name sql\nr = 2\ntarget_modules = ['q_proj']")
    notebook["rows"] = [{"input_ids": [1, 2, 3, 4]}] * 4
    notebook.do("%%lora_train model --data rows\nmax_steps = 2\nlearning_rate = 0.1")
    return notebook


@pytest.fixture
def two(trained: Notebook) -> Notebook:
    """A second model, ``other``, with an adapter of the same name."""
    trained["other"] = llama()
    trained.do("%lora add other --name sql r=2 target_modules=q_proj")
    return trained


def weights(notebook: Notebook, name: str = "sql") -> list[torch.Tensor]:
    return [one.detach().clone() for one in notebook["model"].manager.parameters(name)]


def revisions(notebook: Notebook) -> list[tuple[Any, ...]]:
    managers = [notebook[name].manager for name in ("model", "other")]
    return [(one.names, one.active, one.enabled, one.merged, one.revision, one.alive) for one in managers]


@pytest.mark.drawn(6)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_asks_which_of_several_models(two: Notebook, verb: str, tmp_path: Path) -> None:
    two.do(f"%lora save {tmp_path}/sql --adapter sql --model other")
    before, files = revisions(two), sorted(tmp_path.rglob("*"))
    outcome = two.run("%lora " + VERBS[verb].format(folder=tmp_path))
    assert (
        outcome.line
        == f"several models carry adapters; {verb.split()[0]} needs one of them: --model model or --model other"
    )
    assert revisions(two) == before and sorted(tmp_path.rglob("*")) == files


@pytest.mark.drawn(2)
@pytest.mark.parametrize("typed", POSITIONAL)
def test_a_panel_and_a_plan_are_for_a_named_model(two: Notebook, typed: str) -> None:
    would_do = POSITIONAL[typed]
    line = two.run(typed).line
    assert line == f"several models: say which one, as in {would_do} model or {would_do} other"
    assert "model" in str(two.do(f"{would_do} model"))


def test_a_script_is_of_a_named_model(two: Notebook, tmp_path: Path) -> None:
    two.do("%%lora_train other --data rows\nmax_steps = 1")
    line = two.run(f"%lora export {tmp_path}/train.py").line
    expected = "%lora export SCRIPT --model model or %lora export SCRIPT --model other"
    assert line == f"several models: say which one, as in {expected}"


def test_the_whole_state_shows_all_models(two: Notebook) -> None:
    assert [model.name for model in two.do("%lora").state.models] == ["model", "other"]


def test_no_other_model_takes_the_place_of_one_that_was_unloaded(two: Notebook) -> None:
    """As in the trial: unload one, then merge, and the weights of another were changed."""
    two.do("%lora unload --model other")
    before = two["model"].manager.revision
    line = two.run("%lora merge").line
    assert line == "the model used last is unloaded or gone; say which one is meant: --model model"
    assert two["model"].manager.merged == () and two["model"].manager.revision == before


def test_unsaved_training_is_marked_where_adapters_are_listed(trained: Notebook, tmp_path: Path) -> None:
    assert "active, trainable, not saved" in str(trained.do("%lora"))
    assert "not saved" in trained.do("%lora")._repr_html_()
    trained.do("%lora add model --name chat r=2 target_modules=q_proj")
    assert "inactive, not saved" in str(trained.do("%lora")), "an adapter that is not active is not called frozen"
    trained.do(f"%lora save {tmp_path} --adapter sql")
    assert "not saved" not in str(trained.do("%lora"))
    trained.do("%lora freeze sql")
    assert "inactive, frozen" in str(trained.do("%lora"))
    trained.do("%lora use sql")
    assert "active, frozen" in str(trained.do("%lora"))


def test_unloaded_adapters_come_back(trained: Notebook, tmp_path: Path) -> None:
    before = weights(trained)
    trained.do("%lora add model --name chat r=2 target_modules=q_proj")  # was never trained
    said = str(trained.do("%lora unload"))
    assert "trained and not saved: 'sql'" in said and "%lora undo restores it" in said
    assert "undo restores 'sql'" in str(trained.do("%lora"))
    restored = str(trained.do("%lora undo"))
    assert restored.startswith("'sql' is on model, as on the model before; its training is not saved")
    assert [torch.equal(*pair) for pair in zip(weights(trained), before, strict=True)] == [True] * len(before)
    trained.do(f"%lora save {tmp_path} --adapter sql")
    assert "not saved" not in str(trained.do("%lora unload"))


def test_adapters_that_are_merged_for_good_are_named(trained: Notebook) -> None:
    trained.do("%lora merge")
    said = str(trained.do("%lora unload"))
    assert "trained and not saved: 'sql'" in said and "undo" not in said


def test_a_deleted_adapter_comes_back(trained: Notebook) -> None:
    before = weights(trained)
    said = str(trained.do("%lora delete sql"))
    assert said == "deleted 'sql' [note: it was trained and not saved; %lora undo restores it]"
    assert trained["model"].manager.names == ()
    assert str(trained.do("%lora undo")) == (
        "'sql' is back, as it was before it was deleted; its training is not saved"
    )
    assert all(map(torch.equal, before, weights(trained))) and trained["model"].manager.active == ("sql",)
    assert trained.run("%lora undo").line == (
        "nothing to undo on model: no adapter of it was deleted or replaced; to undo the training of 'sql', "
        "%lora reset sql restores its initial weights"
    )


def test_a_trained_adapter_is_reconfigured_and_comes_back(trained: Notebook) -> None:
    before = weights(trained)
    said = str(trained.do("%%lora model --name sql\nr = 2\nlora_alpha = 32\ntarget_modules = ['q_proj']"))
    assert "its trained weights stay as they are" in said
    assert all(map(torch.equal, before, weights(trained)))
    cell = "%%lora model --name sql{} \nr = 8\ntarget_modules = ['q_proj']"
    assert "its weights would be initialized again" in str(trained.do(cell.format(" --dry-run")))
    assert "its weights are initialized again; %lora undo restores the trained ones" in str(trained.do(cell.format("")))
    assert weights(trained)[0].shape[0] == 8
    trained.do("%lora undo")
    assert all(map(torch.equal, before, weights(trained)))


def test_an_adapter_starts_anew_and_comes_back(trained: Notebook) -> None:
    before = weights(trained)
    said = str(trained.do("%lora reset sql"))
    assert said == "reset 'sql': its weights are initialized again [note: %lora undo restores the old ones]"
    assert not weights(trained)[1].any()
    trained.do("%lora undo")
    assert all(map(torch.equal, before, weights(trained)))


def test_unsaved_training_is_not_replaced_unless_told(trained: Notebook, tmp_path: Path) -> None:
    trained.do("%lora add model --name chat r=2 target_modules=q_proj")
    trained.do(f"%lora save {tmp_path}/chat --adapter chat")
    before = weights(trained)
    for cell in (f"swap {tmp_path}/chat --into sql", f"load {tmp_path}/chat --name sql", "combine chat=1 --name sql"):
        line = trained.run(f"%lora {cell}").line
        assert "was trained and is not saved" in line and "--replace" in line
        assert all(map(torch.equal, before, weights(trained)))
        trained.do(f"%lora {cell} --replace")
        assert not all(map(torch.equal, before, weights(trained)))
        trained.do("%lora undo")
        assert all(map(torch.equal, before, weights(trained)))


@pytest.mark.parametrize(
    "verb", ["add model --name base", "rename sql base", "copy sql base", "combine sql=1 --name base"]
)
def test_no_adapter_is_called_base(trained: Notebook, verb: str) -> None:
    line = trained.run(f"%lora {verb}").line
    assert line.startswith("'base' cannot name an adapter: it means the base model in panels and results")


def test_loading_into_a_model_of_the_session_rebinds_no_other_variable(trained: Notebook, tmp_path: Path) -> None:
    trained.do(f"%lora save {tmp_path}/sql")
    trained.do("kept = model\nmodel = 'notes that took an hour'")
    line = trained.run(f"%lora load {tmp_path}/sql --name again --model model").line
    assert line == "'model' is a str, not a model. Models here: kept."
    trained.do(f"%lora load {tmp_path}/sql --name again --model kept")
    assert trained["model"] == "notes that took an hour"
    assert trained["kept"].manager.names == ("sql", "again")
