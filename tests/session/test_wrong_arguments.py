"""Arguments of a wrong kind: one clear line, and everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from nbpeft.errors import NbpeftError
from nbpeft.session import Session
from tests.char_tokenizer import CharTokenizer
from tests.session.support import everything
from tests.tiny_models import same_state

MISTAKES: dict[str, tuple[Callable[[Session], object], str]] = {
    "add-model": (lambda s: s.add(3, {"r": 4}), "expected a model, or the name of one, not 3"),  # type: ignore[arg-type]
    "add-config": (lambda s: s.add(None, "r=4"), "a config such as LoraConfig, or its fields"),  # type: ignore[arg-type]
    "use": (lambda s: s.use(3), "expected the name of an adapter or a list of names, not 3"),  # type: ignore[arg-type]
    "load": (lambda s: s.load(None), "load needs a folder, not None"),  # type: ignore[arg-type]
    "load-empty": (lambda s: s.load(""), "load needs a folder, not ''"),
    "push": (lambda s: s.push(3), "push needs a repository as user/name, not 3"),  # type: ignore[arg-type]
    "save": (lambda s: s.save(3), "save needs a folder, not 3"),  # type: ignore[arg-type]
    "save-empty": (lambda s: s.save(""), "save needs a folder, not ''"),
    "delete": (lambda s: s.delete(3), "expected the name of an adapter or a list of names, not 3"),  # type: ignore[arg-type]
    "delete-none": (lambda s: s.delete([]), "nothing to delete: no adapter is named"),
    "merge": (lambda s: s.merge(3), "expected the name of an adapter or a list"),  # type: ignore[arg-type]
    "merge-none": (lambda s: s.merge([]), "nothing to merge into .*: no adapter is named"),
    "merge-to": (lambda s: s.merge("orders", to=3), "merge needs a folder, not 3"),  # type: ignore[arg-type]
    "combine": (lambda s: s.combine(["orders"], name="c"), "weights must map adapters to numbers"),  # type: ignore[arg-type]
    "combine-type": (lambda s: s.combine({"orders": 1}, name="c", type=None), "type None is unknown"),  # type: ignore[arg-type]
    "combine-seed": (lambda s: s.combine({"orders": 1}, name="c", seed="x"), "seed is 'x'"),  # type: ignore[arg-type]
    "swap": (lambda s: s.swap(None), "swap needs a folder, not None"),  # type: ignore[arg-type]
    "compare": (lambda s: s.compare(3, tokenizer=CharTokenizer()), "expected a prompt, which is a text or"),  # type: ignore[arg-type]
    "compare-option": (
        lambda s: s.compare("Hi", tokenizer=CharTokenizer(), tempratur=1),
        "generate does not accept tempratur",
    ),
    "compare-blend": (
        lambda s: s.compare("Hi", blend=3, tokenizer=CharTokenizer()),  # type: ignore[arg-type]
        "blend must be a list of weights, each by adapter, not 3",
    ),
    "compare-after": (
        lambda s: s.compare("Hi", after=3, tokenizer=CharTokenizer()),  # type: ignore[arg-type]
        "after must be the result of a comparison, not 3",
    ),
    "use-bytes": (lambda s: s.use(b"x"), "expected the name of an adapter or a list of names, not b'x'"),  # type: ignore[arg-type]
    "convert-adapter": (lambda s: s.convert(["a"], 4), r"adapter must be a text, not \['a'\]"),  # type: ignore[arg-type]
    "inspect": (lambda s: s.inspect({}), r"name must be a text, not \{\}"),  # type: ignore[arg-type]
    "load-subfolder": (lambda s: s.load("x", subfolder=3), "subfolder must be a text, not 3"),  # type: ignore[arg-type]
    "methods-sort": (lambda s: s.methods(sort=3), "sort must be a text, not 3"),  # type: ignore[arg-type]
    "methods-fields": (lambda s: s.methods(None, 3), "fields must map fields of a config to values"),  # type: ignore[arg-type]
    "runs": (lambda s: s.runs(3), "the name of a run must be a text, not 3"),  # type: ignore[arg-type]
    "runs-sort": (lambda s: s.runs(sort=3), "sort must be a text, not 3"),  # type: ignore[arg-type]
    "runs-search": (lambda s: s.runs(search=3), "search must be a text, not 3"),  # type: ignore[arg-type]
    "rename-run": (lambda s: s.rename_run(None, "x"), "name must be a text, not None"),  # type: ignore[arg-type]
    "rename-run-new": (lambda s: s.rename_run("x", 3), "new must be a text, not 3"),  # type: ignore[arg-type]
    "note-run": (lambda s: s.note_run([], "x"), r"name must be a text, not \[\]"),  # type: ignore[arg-type]
    "note-run-note": (lambda s: s.note_run("x", None), "note must be a text, not None"),  # type: ignore[arg-type]
    "delete-run": (lambda s: s.delete_run({}), r"name must be a text, not \{\}"),  # type: ignore[arg-type]
    "find-run": (lambda s: s.find_run(["x"]), r"run must be a text, not \['x'\]"),  # type: ignore[arg-type]
    "kept-run": (lambda s: s.kept_run(3), "run must be a text, not 3"),  # type: ignore[arg-type]
    "resume": (lambda s: s.resume(3), "run must be a text, not 3"),  # type: ignore[arg-type]
    "stop": (lambda s: s.stop(["model"]), r"model must be a text, not \['model'\]"),  # type: ignore[arg-type]
    "pause": (lambda s: s.pause({}), r"model must be a text, not \{\}"),  # type: ignore[arg-type]
    "clone": (lambda s: s.clone("orders", model=[], beta=1), r"model must be a text, not \[\]"),  # type: ignore[arg-type]
    "control": (lambda s: s.control([]), r"model must be a text, not \[\]"),  # type: ignore[arg-type]
    "control-model": (lambda s: s.control(nn.Sequential(nn.ReLU())), r"not Sequential\( \(0\): ReLU\(\) \)"),  # type: ignore[arg-type]
    "plan": (lambda s: s.plan(batch_sise=2), "has no setting 'batch_sise'. Did you mean 'batch_size'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_wrong_kinds_are_told_in_one_line(
    case: str, session: Session, two_adapters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = two_adapters
    before, (command, message) = everything(model), MISTAKES[case]
    with pytest.raises(NbpeftError, match=message) as caught:
        command(session)
    assert "\n" not in str(caught.value)
    assert same_state(everything(model), before)
    assert list(tmp_path.iterdir()) == [] and session.state.busy == ""


def test_an_error_of_the_model_is_not_taken_for_one_of_the_options(session: Session, two_adapters: Any) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("the layer failed")

    next(m for m in two_adapters.modules() if isinstance(m, nn.Embedding)).register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match=r"^the layer failed$"):
        session.compare("Hi", tokenizer=CharTokenizer(), temperature=0.5)


@pytest.mark.parametrize(("former", "name"), [("plan_memory", "plan"), ("set_scale", "scale")])
def test_a_former_method_names_the_new_one(former: str, name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{former}'; it is called '{name}' now"):
        getattr(Session(), former)
    assert callable(getattr(Session(), name))
