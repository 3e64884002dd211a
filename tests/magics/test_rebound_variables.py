"""When a variable holds another model, the next command says so, and nothing that was trained is lost."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from nbpeft.engine.contract.trained import mark_unsaved
from nbpeft.session import history
from nbpeft.session.handles import is_module
from tests.magics.notebook import Notebook
from tests.tiny_models import gpt2, llama, randomize

TRAIN = "%%lora_train {} --data rows --adapter sql\nmax_steps = 2\nlearning_rate = 0.1"
ADD = "%lora add {} --name {} r=2 target_modules=q_proj"
LOST = "'model' holds another model now; 'sql'{} on it was trained and not saved: %lora undo restores it"


@pytest.fixture
def trained(notebook: Notebook) -> Notebook:
    """``sql`` on ``model`` is as after a training that is not saved, of which no run is kept."""
    notebook.do(ADD.format("model", "sql"))
    learn(notebook)
    notebook.do("%lora")
    return notebook


def learn(notebook: Notebook, variable: str = "model", name: str = "sql", seed: int = 0) -> None:
    randomize(notebook[variable], name, seed)
    mark_unsaved(notebook[variable].manager, name)


def weights(notebook: Notebook, variable: str = "model", name: str = "sql") -> list[torch.Tensor]:
    return [one.detach().clone() for one in notebook[variable].manager.parameters(name)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


COMMANDS = (
    "%lora",
    "%lora use sql",
    "%lora memory",
    "%lora methods",
    "%lora panel",
    '%lora ask "a" --tokenizer None',
    "%lora unload",
    "%lora add model --name new --dry-run r=2 target_modules=q_proj",
    "%%lora model --name new\nr = 2\ntarget_modules = ['q_proj']",
    "%lora runs",
    "%lora doctor",
)


@pytest.mark.drawn(4)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_it_once(trained: Notebook, command: str) -> None:
    trained["model"] = llama()
    outcome = trained.run(command)
    assert LOST.format("") in outcome.everything.splitlines()
    assert "holds another model" not in trained.run("%lora").everything


@pytest.mark.drawn(1)
@pytest.mark.parametrize("command", ["%lora", "%lora methods", "%lora memory"])
def test_nothing_is_said_while_the_variable_stays(trained: Notebook, command: str) -> None:
    trained.do("again = model\nbase = model.get_base_model()")
    before = trained.session.names
    trained.run(command)
    assert "holds another" not in trained.run(command).everything and trained.session.names == before


def test_what_was_trained_comes_back_onto_the_model_of_now(trained: Notebook) -> None:
    before = weights(trained)
    trained["model"] = llama()
    trained.do("%%lora model --name new\nr = 2\ntarget_modules = ['q_proj']")
    listed = str(trained.do("%lora"))
    assert "model (before): gone; undo restores 'sql', trained and not saved" in listed
    assert "model (before)" in trained.do("%lora")._repr_html_()
    assert str(trained.do("%lora undo")) == "'sql' is on model, as on the model before; its training is not saved"
    assert same(before, weights(trained)) and trained["model"].manager.unsaved == {"sql"}
    assert trained["model"].manager.active == ("new",), "the choice of now stays"
    assert "model (before)" not in str(trained.do("%lora"))
    assert trained.run("%lora undo").line == "nothing to undo on model: no adapter of it was deleted or replaced"


def test_onto_a_bare_model_it_is_active(trained: Notebook, tmp_path: Path) -> None:
    before = weights(trained)
    trained["model"] = llama()
    assert trained.run("%lora use sql").line == "'model' holds another object now, which has no adapters"
    trained.do("%lora undo")
    assert same(before, weights(trained)) and trained["model"].manager.active == ("sql",)
    trained.do(f"%lora save {tmp_path / 'sql'}")
    assert "not saved" not in str(trained.do("%lora"))


def test_the_run_that_has_it_is_named(notebook: Notebook, tmp_path: Path) -> None:
    notebook.session.context.chosen_runs_folder = str(tmp_path)
    notebook.do(ADD.format("model", "sql"))
    notebook["rows"] = [{"input_ids": [1, 2, 3, 4]}] * 4
    notebook.do(TRAIN.format("model"))
    notebook["model"] = llama()
    assert LOST.format(" (in run sql-1)") in notebook.run("%lora").everything


def test_the_next_training_and_the_undo_after_it_lose_nothing(trained: Notebook) -> None:
    first = weights(trained)
    trained["model"] = llama()
    trained.do(ADD.format("model", "sql"))
    learn(trained, seed=1)
    second = weights(trained)
    assert "another adapter 'sql': rename that one first" in trained.run("%lora undo").line
    assert same(second, weights(trained))
    trained.do("%lora rename sql newer")
    trained.do("%lora undo")
    assert same(first, weights(trained)) and same(second, weights(trained, name="newer"))


def test_two_models_before(trained: Notebook) -> None:
    first = weights(trained)
    trained["model"] = llama()
    trained.do("%lora undo")
    trained.do("%lora rename sql first")
    trained.do("%lora add model --name sql r=3 target_modules=q_proj")
    learn(trained)
    second = weights(trained)
    trained["model"] = llama()
    trained.do("%lora undo")
    assert same(first, weights(trained, name="first")) and same(second, weights(trained))


def test_an_adapter_that_was_deleted_on_the_model_of_now_comes_back_first(trained: Notebook) -> None:
    trained["model"] = llama()
    trained.do(ADD.format("model", "new"))
    trained.do("%lora delete new")
    assert "'new' is back" in str(trained.do("%lora undo"))
    assert "'sql' is on model" in str(trained.do("%lora undo"))


def test_another_base_model_gets_nothing(trained: Notebook) -> None:
    before = weights(trained)
    trained["model"] = gpt2()
    again = " once 'model' holds its base model again"
    assert f"{LOST.format('')}{again}" in trained.run("%lora").everything, "what the model of now cannot take"
    assert (
        "%lora undo restores 'sql' of it once 'model' holds its base model again"
        in trained.run('%lora save x --model "model (before)"').line
    )
    line = trained.run("%lora undo").line
    assert line.startswith("'sql' cannot be restored on 'model': ") and is_module(trained["model"])
    assert line.endswith("load the base model again, and name it (--model)")
    trained["other"] = llama(seed=1)
    assert "other weights of the same shapes" in trained.run("%lora undo --model other").line
    assert not hasattr(trained["other"], "peft_config")
    trained["third"] = llama()
    trained.do("%lora undo --model third")
    assert same(before, weights(trained, "third"))


def test_what_is_left_of_a_model_can_be_discarded(trained: Notebook) -> None:
    trained["model"] = llama()
    line = trained.run('%lora save x --model "model (before)"').line
    assert line == "'model (before)' is gone; %lora undo restores 'sql' of it"
    assert str(trained.do('%lora unload --model "model (before)"')) == "discarded 'sql' of 'model (before)'"
    assert trained.session.past_names == () and "model (before)" not in str(trained.do("%lora"))


def test_a_saved_or_untrained_adapter_is_not_kept(trained: Notebook, tmp_path: Path) -> None:
    trained.do(f"%lora save {tmp_path / 'sql'}")
    held = [weakref.ref(one) for one in trained["model"].manager.parameters("sql")]
    trained["model"] = llama()
    assert "'model' holds another model now; the model before, with 'sql', is gone" in trained.run("%lora").everything
    assert all(one() is None for one in held) and trained.session.past_names == ()


def test_the_base_model_is_not_kept(trained: Notebook) -> None:
    base = weakref.ref(trained["model"].get_base_model())
    del trained.shell.user_ns["model"]
    gc.collect()
    assert base() is None
    words = "the model 'model' is gone; 'sql' on it was trained and not saved: %lora undo restores it"
    assert words in trained.run("%lora").everything
    assert "load it again into 'model', or name a model" in trained.run("%lora undo").line
    trained["model"] = llama()
    trained.do("%lora undo")
    assert trained["model"].manager.names == ("sql",)


def test_only_so_much_is_kept(trained: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST_KEPT", 1)
    for _ in range(2):
        trained["model"] = llama()
        shown = trained.run("%lora").everything
        trained.do(ADD.format("model", "sql"))
        learn(trained)
    assert "'sql' of 'model (before)' can no longer be restored: the limit of memory is reached" in shown
    assert trained.session.past_names == ("model (before 2)",)


class TestAModelThatStaysAlive:
    """Something else holds it."""

    def test_another_variable_names_it(self, trained: Notebook) -> None:
        old = weights(trained)
        trained.do("m2 = model")
        trained["model"] = llama()
        assert "'model' holds another model now; the model with 'sql' is 'm2'" in trained.run("%lora").everything
        line = trained.run("%lora use base").line
        assert line == "'model' holds another object now, which has no adapters; say which one is meant: --model m2"
        assert trained["m2"].manager.enabled
        trained.do("%lora use base --model m2")
        assert not trained["m2"].manager.enabled and same(old, weights(trained, "m2"))

    def test_another_adapted_model_is_acted_on(self, trained: Notebook) -> None:
        trained["other"] = llama()
        trained.do(ADD.format("other", "x"))
        trained.do("m2, model = model, other\ndel other")
        trained.do("%lora use base --model model")
        assert trained["m2"].manager.enabled and not trained["model"].manager.enabled

    def test_variables_that_change_places(self, trained: Notebook) -> None:
        trained["other"] = llama()
        trained.do(ADD.format("other", "x"))
        first, second = trained["model"], trained["other"]
        trained.do("model, other = other, model")
        shown = trained.run("%lora").everything
        assert "'model' holds another model now; the model with 'sql' is 'other'" in shown
        assert trained.session.model("model") is second and trained.session.model("other") is first

    def test_undo_is_not_offered_to_another_base_model(self, trained: Notebook) -> None:
        trained.do("kept = [model]")
        trained["model"] = llama(seed=1)
        said = trained.run("%lora").everything
        assert "the model with 'sql' is 'model (before)'; 'sql' on it is not saved" in said and "%lora undo" not in said

    @pytest.mark.drawn(2)
    @pytest.mark.parametrize("holder", ["kept = [model]", "kept = {'a': model}", "model", "class Pipe: model = model"])
    def test_one_without_a_variable_is_called_before(self, trained: Notebook, holder: str, tmp_path: Path) -> None:
        trained.do(holder)
        old = trained["model"]
        trained["model"] = llama()
        words = (
            "'model' holds another model now; the model with 'sql' is 'model (before)'; %lora undo copies 'sql', "
            "trained and not saved, to 'model'"
        )
        assert words in trained.run("%lora").everything
        assert trained.session.names == ("model (before)",)
        assert trained.run("%lora use sql").line == (
            "'model' holds another object now, which has no adapters; say which one is meant: "
            '--model "model (before)"'
        )
        trained.do('%lora use base --model "model (before)"')
        assert not old.manager.enabled
        trained.do("%lora undo")
        assert same(weights(trained), [one.detach() for one in old.manager.parameters("sql")])
        assert trained["model"].manager.configs["sql"] is not old.manager.configs["sql"]
        trained.do(f'%lora save {tmp_path / "old"} --model "model (before)"')
        trained.do('%lora unload --model "model (before)"')
        assert trained.session.names == ("model",)

    def test_a_variable_may_hold_it_again(self, trained: Notebook) -> None:
        trained.do("kept = [model]\nmodel = None")
        assert "'model' holds something else now" in trained.run("%lora").everything
        trained.do("again = kept[0]")
        trained.do("%lora use base --model again")
        assert trained.session.names == ("again",) and not trained["again"].manager.enabled

    def test_a_wrapper_around_it_is_the_model(self, trained: Notebook) -> None:
        trained.do("import torch\nmodel = torch.nn.Sequential(model)")
        assert "holds" not in trained.run("%lora").everything
        assert trained.session.names == ("model",)

    def test_a_deleted_variable_says_nothing(self, trained: Notebook) -> None:
        trained.do("kept = [model]\ndel model")
        assert "gone" not in trained.run("%lora").everything
        assert trained.session.names == ("model",)
        trained.do("%lora use base")
        del trained.shell.user_ns["kept"]
        assert "the model 'model' is gone" in trained.run("%lora").everything

    def test_it_goes_later(self, trained: Notebook) -> None:
        trained.do("kept = [model]")
        trained["model"] = llama()
        trained.do("%lora")
        trained.do("del kept")
        gc.collect()
        assert "the model 'model (before)' is gone; 'sql' on it was trained" in trained.run("%lora").everything
        trained.do("%lora undo")
        assert trained["model"].manager.names == ("sql",)

    def test_training_in_the_background_goes_on_under_its_new_name(self, trained: Notebook) -> None:
        trained["rows"], fresh = [{"input_ids": [1, 2, 3, 4]}] * 4, llama()
        run = trained.do("%%lora_train model --data rows --background --no-keep\nmax_steps = 5000")
        trained.do("kept = [model]")
        trained["model"] = fresh
        assert "'model (before)'" in trained.run("%lora").everything
        trained.do("%lora pause")
        trained.do('%lora stop "model (before)"')
        result = run.wait(60)
        assert result.status == "stopped"
        assert str(trained.do("%lora watch --wait")) == str(result)
        trained.do("%lora undo")
        assert "sql" in trained["model"].manager.unsaved


def test_functions_bind_nothing(notebook: Notebook) -> None:
    notebook["llama"] = llama
    notebook.do(
        "import nbpeft\ndef adapt():\n    inner = llama()\n"
        "    return nbpeft.get_session().add(inner, {'r': 2, 'target_modules': ['q_proj']}).adapter.name"
    )
    notebook.do("adapt()\nadapt()")
    assert "holds" not in notebook.run("%lora").everything and notebook.session.past_names == ()


def test_python_is_told_in_notes(trained: Notebook) -> None:
    trained["other"] = llama()
    trained.do(ADD.format("other", "x"))
    trained["model"] = llama()
    notes = trained.session.use("base", model="other").notes
    assert [note for note in notes if note.startswith("'model' holds another model now; 'sql'")]


def test_a_panel_says_it(trained: Notebook) -> None:
    pytest.importorskip("ipywidgets")
    from nbpeft.widgets import AdaptersPanel

    panel: Any = AdaptersPanel(trained.session, "model", ui="widgets")
    assert panel.widget is not None
    panel._live.join()  # while its thread measures the model, the model exists
    trained["model"] = llama()
    panel._command("use", "sql")
    said = panel._parts.message._text.value
    assert "holds another model now" in said and "no adapters" in said
    panel.close()


def test_a_model_that_takes_the_name_of_another_loses_nothing(trained: Notebook) -> None:
    old, trained["other"] = trained["model"], llama()
    trained.do("kept = [model]")
    trained.do(
        "import nbpeft\nnew = nbpeft.get_session().add(other, {'r': 2, 'target_modules': ['q_proj']}, "
        "variable='model').model\nmodel = new"
    )
    shown = trained.run("%lora").everything
    assert set(trained.session.names) == {"model", "model (before)"} and "sql" in shown
    assert trained.session.model("model (before)") is old


def test_names_of_such_models_are_completed_in_quotes(trained: Notebook) -> None:
    trained.do("kept = [model]")
    trained["model"] = llama()
    trained.do("%lora")
    assert '"model (before)"' in trained.complete("%lora use sql --model ")
    trained.do("del kept")
    gc.collect()
    trained.do("%lora")
    assert '"model (before)"' in trained.complete("%lora unload --model ")


def test_a_model_that_python_gave_no_name_is_called_by_its_variable(notebook: Notebook) -> None:
    notebook["net"] = llama()
    notebook.do(
        "import nbpeft\nnet = nbpeft.get_session().add(net, {'r': 2, 'target_modules': ['q_proj']}, name='sql').model"
    )
    assert "holds" not in notebook.run("%lora").everything and notebook.session.names == ("net",)
    learn(notebook, "net")
    notebook["net"] = llama()
    assert "'net' holds another model now; 'sql' on it" in notebook.run("%lora").everything
