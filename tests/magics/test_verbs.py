"""Every verb of ``%lora`` in a real shell, and the mistakes people make with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.model import PeftModel
from nbpeft.session import Result
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close
from tests.magics.notebook import Notebook
from tests.magics.test_cells import fingerprint
from tests.tiny_models import classifier, logits


def train_a_little(model: Any) -> None:
    """Gives every adapter weights that change the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)


@pytest.fixture
def trained(adapted: Notebook) -> Notebook:
    train_a_little(adapted["model"])
    return adapted


def test_use_switches(trained: Notebook) -> None:
    sql = logits(trained["model"])
    assert str(trained.do("%lora use chat")) == "model uses 'chat'"
    assert trained["model"].active_adapters == ["chat"]
    assert not torch.equal(logits(trained["model"]), sql)
    trained.do("%lora use sql")
    assert torch.equal(logits(trained["model"]), sql)


def test_a_classifier_has_no_panel_of_answers(bare: Notebook) -> None:
    bare["clf"] = classifier()
    bare.do("%lora add clf r=2 target_modules=q_proj")
    bare["tokenizer"] = CharTokenizer()
    scored = "it has no generate() (%lora score --data DATA scores a classifier)"
    for command, subject in (("compare --panel", "clf is a"), ('ask "Hi"', "a"), ('compare "Hi"', "a")):
        line = bare.run(f"%lora {command}").line
        assert line.startswith(f"{subject} LlamaForSequenceClassification") and line.endswith(scored)


def test_use_takes_several(trained: Notebook) -> None:
    trained.do("%lora use sql chat")
    assert trained["model"].active_adapters == ["sql", "chat"]


def test_use_ends_off(trained: Notebook) -> None:
    trained.do("%lora use base")
    trained.do("%lora use chat")
    assert trained["model"].manager.enabled


def test_inspect_shows_where_an_adapter_changed_the_model(trained: Notebook) -> None:
    assert str(trained.do("%lora inspect sql")).startswith("sql on model: median weight change ")
    told = trained.run("%lora inspect sqll").line
    assert "'sqll' not found; the model has: 'chat', 'sql'. Did you mean 'sql'?" in told


def test_off_and_on(trained: Notebook) -> None:
    model = trained["model"]
    before = logits(model)
    trained.do("%lora use base")
    assert "off: only the base model is active" in str(trained.do("%lora"))
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(logits(model), base)
    assert not torch.equal(base, before)
    trained.do("%lora use sql")
    assert torch.equal(logits(model), before)


def test_scale(trained: Notebook) -> None:
    trained.do("%lora scale sql 0")
    scaled = logits(trained["model"])
    trained.do("%lora use base")
    assert_close(scaled, logits(trained["model"]))
    assert "×\u00a00" in str(trained.do("%lora use sql")) or "×\u00a00" in str(trained.do("%lora"))


def test_merge_and_unmerge(trained: Notebook) -> None:
    model, before = trained["model"], logits(trained["model"])
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert "merged 'sql'" in str(trained.do("%lora merge"))
    assert_close(logits(model), before)
    assert "merged" in str(trained.do("%lora"))
    trained.do("%lora unmerge")
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert "nothing is merged" in str(trained.do("%lora unmerge"))


def test_delete_rename_copy(trained: Notebook) -> None:
    model, before = trained["model"], logits(trained["model"])
    trained.do("%lora copy sql twin")
    trained.do("%lora use twin")
    assert torch.equal(logits(model), before)
    trained.do("%lora rename twin other")
    assert list(model.peft_config) == ["chat", "sql", "other"]
    trained.do("%lora delete other")
    assert list(model.peft_config) == ["chat", "sql"]


def test_a_renamed_adapter_keeps_its_spec(trained: Notebook) -> None:
    trained.do("%lora rename sql query")
    again = trained.do("%%lora model --name query\nr = 4\ntarget_modules = ['q_proj', 'v_proj']")
    assert again.unchanged


def test_freeze_and_unfreeze(adapted: Notebook) -> None:
    model = adapted["model"]
    adapted.do("%lora freeze sql")
    assert not any(p.requires_grad for p in model.parameters())
    adapted.do("%lora freeze sql --off")
    assert sum(p.requires_grad for p in model.parameters()) == 8


def test_unload_gives_the_base_back(trained: Notebook) -> None:
    model = trained["model"]
    base = model.get_base_model()
    trained.do("%lora use base")
    before = logits(model)
    result = trained.do("%lora unload")
    assert trained["model"] is base
    assert type(base) is LlamaForCausalLM
    assert torch.equal(logits(base), before)
    assert not any("lora_" in name for name, _ in base.named_parameters())
    assert "model is the base model again" in str(result)
    assert "no adapted model yet" in str(trained.do("%lora"))


def test_unloading_a_merged_adapter_keeps_what_was_learned(trained: Notebook) -> None:
    before = logits(trained["model"])
    trained.do("%lora merge")
    said = str(trained.do("%lora unload"))
    assert said.startswith("unloaded: 'chat', 'sql'; model is the base model again, with 'sql' merged into its weights")
    assert_close(logits(trained["model"]), before)


def test_a_round_trip_through_a_folder(trained: Notebook, tmp_path: Path) -> None:
    before = logits(trained["model"])
    saved = trained.do(f"%lora save {tmp_path}/sql --adapter sql")
    assert {path.name for path in (tmp_path / "sql").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert saved.saved[0].byte_count == sum(path.stat().st_size for path in (tmp_path / "sql").iterdir())
    trained.do("%lora unload")
    result = trained.do(f"%lora load {tmp_path}/sql")
    assert isinstance(trained["model"], PeftModel)
    assert result.adapter.name == "sql"
    assert torch.equal(logits(trained["model"]), before)
    assert not any(p.requires_grad for p in trained["model"].parameters())


def test_loading_to_train_on(trained: Notebook, tmp_path: Path) -> None:
    trained.do(f"%lora save {tmp_path}/sql --adapter sql")
    trained.do("%lora unload")
    trained.do(f"%lora load {tmp_path}/sql --name more --trainable")
    assert sum(p.requires_grad for p in trained["model"].parameters()) == 8


def test_all_adapters_are_saved_as_peft_does(trained: Notebook, tmp_path: Path) -> None:
    trained.do(f"%lora save {tmp_path}")
    assert (tmp_path / "sql" / "adapter_config.json").is_file()
    assert (tmp_path / "chat" / "adapter_config.json").is_file()
    line = trained.run(f"%lora load {tmp_path} --name x").line
    assert f"did you mean {tmp_path}/chat or {tmp_path}/sql?" in line


def test_the_state_lists_adapters(trained: Notebook) -> None:
    text = str(trained.do("%lora"))
    assert "model (LlamaForCausalLM): active: sql" in text
    assert "sql   LoRA  r=4 α=8" in text
    html = trained.do("%lora")._repr_html_()
    assert "<table" in html
    assert "chat" in html


def test_the_state_in_a_notebook_is_escaped(notebook: Notebook) -> None:
    notebook.do("%lora add model --name <b>x&y target_modules=q_proj")
    html = notebook.do("%lora")._repr_html_()
    assert "<b>x&y" not in html
    assert "&lt;b&gt;x&amp;y" in html


def test_memory(adapted: Notebook) -> None:
    report = adapted.do("%lora memory")
    model = adapted["model"]
    parts = {part.name: part.byte_count for part in report.memory.parts}
    assert parts["adapters"] == sum(p.numel() * 4 for n, p in model.named_parameters() if "lora_" in n)
    assert "adapters" in report._repr_html_()


def test_doctor_knows_the_shell(bare: Notebook) -> None:
    text = str(bare.do("%lora doctor"))
    assert "ipywidgets" in text
    assert "front end     a terminal" in text
    assert sys.executable in text


def test_a_panel_without_a_front_end_is_text(adapted: Notebook) -> None:
    assert "model (LlamaForCausalLM)" in str(adapted.do("%lora panel"))


@pytest.mark.parametrize("verb", ["use", "load", "scale", "unload"])
def test_help_of_a_verb(bare: Notebook, verb: str) -> None:
    assert repr(bare.do(f"%lora {verb} --help")).startswith(f"%lora {verb}\n")


def test_results_can_be_kept_and_silenced(adapted: Notebook) -> None:
    adapted.do("answer = %lora use chat")
    assert isinstance(adapted["answer"], Result)
    assert "model uses" not in adapted.run("%lora use sql;").printed
    assert adapted.do("%lora use chat;  # it's silent; really") is None
    assert adapted.do("%lora use sql  # it's shown;") is not None
    assert repr(adapted.do("%lora help  # all")) == repr(adapted.do("%lora help"))
    assert repr(adapted.do("%lora  # the state")) == repr(adapted.do("%lora"))
    adapted.do("%%lora model --name other  # a third\nr = 2  # its rank")
    assert "other" in adapted["model"].peft_config


def test_each_result_is_one_line_of_text_and_html(trained: Notebook, tmp_path: Path) -> None:
    lines = [
        "use sql",
        "use base",
        "use sql",
        "scale sql 1",
        "merge",
        "unmerge",
        "copy sql b",
        "rename b c",
        "delete c",
    ]
    lines += ["freeze sql", "freeze sql --off", f"save {tmp_path}/a", "unload"]
    for line in lines:
        result = trained.do(f"%lora {line}")
        assert "\n" not in str(result)
        assert repr(result) == str(result)
        assert result._repr_html_().startswith("<div")


@pytest.mark.drawn(12)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("uze sql", "%lora has no command 'uze'. Did you mean 'use'"),
        ("use sqll", "'sqll' not found; the model has: 'chat', 'sql'. Did you mean 'sql'?"),
        ("use sql sqll", "'sqll' not found"),
        ("use", "%lora use needs NAME, e.g. %lora use sql"),
        ("use sql --model modl", "no variable is called 'modl'. Did you mean 'model'?"),
        ("delete nope", "'nope' not found"),
        ("use sql,chat", ". Write several names separately, without commas."),
        ("use sql,chta", "Adapter 'sql,chta' not found; the model has: "),
        ("rename sql chat", "Adapter with name 'chat' already exists"),
        ("rename sql a.b", "a.b"),
        ("copy sql chat", "Adapter with name 'chat' already exists"),
        ("scale nope 1", "'nope' not found"),
        ("merge nope", "'nope' not found"),
        ("merge sql --columns prompt=a", "--columns requires --calibrate DATA"),
        ("merge sql --tokenizer t", "--tokenizer requires --to DIR or --calibrate DATA"),
        ("merge sql --calibrate rowss", "rowss"),
        ("load /no/such/folder", "/no/such/folder"),
        ("save {folder} --adapter nope", "'nope' not found"),
        ("save ''", "needs a folder"),
        ("load {folder} --name sql", "has an adapter 'sql' already"),
        ("freeze nope", "'nope' not found"),
        (
            "panel nope",
            "no panel 'nope'. It has: adapters, blend",
        ),
        ("model --name sql", "'model', which is a variable; to adapt it: a cell that begins with %%lora model, or"),
        ("add model --name ''", "'' cannot name an adapter"),
        ("load {nope}", "name 'nope' is not defined."),
        ("add model --rank 8", "%lora add has no option --rank. A field is set without dashes: r=…"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(trained: Notebook, tmp_path: Path, line: str, message: str) -> None:
    trained["folder"] = tmp_path / "sql"
    trained.session.save(tmp_path / "sql", adapter="sql")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before, state = fingerprint(trained["model"]), trained.session.state.models
    assert message in trained.run(f"%lora {line}").line
    assert fingerprint(trained["model"]) == before
    assert trained.session.state.models == state
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("line", ["use a", "use base", "merge", "unload", "panel", "save x", "memory"])
def test_without_an_adapted_model(notebook: Notebook, line: str) -> None:
    assert "no model carries adapters yet" in notebook.run(f"%lora {line}").line
    if line != "panel":
        assert "no model carries adapters yet" in notebook.run(f"%lora {line} --model model").line


def test_nothing_to_undo_after_adapters_that_were_not_trained(notebook: Notebook) -> None:
    words = "nothing to undo: no model has adapters, and no unsaved training is kept"
    assert notebook.run("%lora undo").line == words
    notebook.do("%lora add model r=2 target_modules=q_proj")
    notebook.do("%lora unload")
    assert notebook.run("%lora undo").line == words


def test_a_bare_model_beside_an_adapted_one(adapted: Notebook) -> None:
    adapted["second"] = torch.nn.Linear(2, 2)
    line = adapted.run("%lora use base --model second").line
    assert "this model carries no adapters yet; add one with a cell that begins with %%lora" in line


class TestWhichModel:
    """A command takes no model that it was not given."""

    @pytest.fixture
    def two(self, trained: Notebook) -> Notebook:
        """``model`` with ``sql`` and ``chat``, and ``q4`` with ``q``, of which the first was used last."""
        from tests.tiny_models import llama

        trained["q4"] = llama(seed=1)
        trained.do("%lora add q4 --name q r=2 target_modules=q_proj")
        trained.do("%lora use sql --model model")
        return trained

    @pytest.mark.parametrize("line", ["delete q", "rename q x", "use q", "inspect q", "scale q 2"])
    def test_the_only_one_with_the_adapter_is_meant_and_named(self, two: Notebook, line: str) -> None:
        before = fingerprint(two["model"])
        assert "delete needs one of them: --model model or --model q4" in two.run("%lora delete sql q").line
        assert "q4" in str(two.do(f"%lora {line}"))
        assert fingerprint(two["model"]) == before

    def test_after_an_unload_no_other_is_merged(self, two: Notebook) -> None:
        line = two.run("%lora unload").line
        assert line == "several models carry adapters; unload needs one of them: --model model or --model q4"
        two.do("%lora unload --model model")
        before = fingerprint(two["q4"])
        for verb in ("merge", "unload"):
            line = two.run(f"%lora {verb}").line
            assert line == "the model used last is unloaded or gone; say which one is meant: --model q4"
        assert fingerprint(two["q4"]) == before and two["q4"].manager.merged == ()
        assert "q4" in str(two.do("%lora"))
        two.do("%lora merge --model q4")
        assert two["q4"].manager.merged == ("q",)
        two.do("%lora unmerge")

    @pytest.mark.drawn(3)
    @pytest.mark.parametrize("verb", ["use base", "delete q", "use q", "save {}", "memory", "inspect", "panel", "plan"])
    def test_after_an_unload_the_only_one_left_is_meant_and_named(
        self, two: Notebook, verb: str, tmp_path: Path
    ) -> None:
        two.do("%lora unload --model model")
        told = "this is 'q4', the only model with adapters: 'model' has none any more"
        assert told in two.run(f"%lora {verb.format(tmp_path / 'q')}").everything
        assert told not in two.run("%lora use base").everything

    def test_after_an_unload_undo_is_for_the_only_one_left(self, two: Notebook) -> None:
        two.do("%lora delete q --model q4")
        two.do("%lora unload --model model")
        assert "'q' is back" in str(two.do("%lora undo"))

    @pytest.mark.parametrize("line", ["merge", "unmerge", "unload", "use base"])
    def test_of_several_it_is_said(self, two: Notebook, line: str) -> None:
        before = fingerprint(two["model"])
        assert "needs one of them: --model model or --model q4" in two.run(f"%lora {line}").line
        assert fingerprint(two["model"]) == before
        two.do(f"%lora {line} --model model")

    def test_swapping(self, two: Notebook, tmp_path: Path) -> None:
        two.do(f"%lora save {tmp_path} --adapter sql --model model")
        assert "swap needs one of them" in two.run(f"%lora swap {tmp_path}").line
        assert "on model" in str(two.do(f"%lora swap {tmp_path} --into sql"))

    def test_what_a_variable_holds_goes_before_what_it_held(self, two: Notebook) -> None:
        two["kept"], two["model"] = two["model"], two["q4"].get_base_model()
        two["q4"] = None
        old = two["kept"]
        two.do("%lora merge --model model")
        assert old.manager.merged == () and manager_of(two["model"]).merged == ("q",)
        two.do("%lora merge --model kept")
        assert old.manager.merged == ("sql",)

    def test_the_help_says_so(self, bare: Notebook) -> None:
        assert "not needed if only one has adapters" in " ".join(repr(bare.do("%lora merge --help")).split())
        assert "not needed if only one has adapters" in " ".join(repr(bare.do("%lora panel --help")).split())
        assert "must be unused or come from an earlier run of this cell" in " ".join(
            repr(bare.do("%qlora --help")).split()
        )


@pytest.mark.parametrize("line", ["save {place}/run(1", "save {place}/it's", "save '{place}/a[b'", "use sql;"])
def test_a_line_that_is_not_python_is_carried_out_without_a_traceback(
    trained: Notebook, tmp_path: Path, line: str
) -> None:
    outcome = trained.run(f"%lora {line.format(place=tmp_path)}")
    assert outcome.error is None and "Traceback" not in outcome.printed + outcome.complained
    assert (outcome.value is None) == line.endswith(";")


@pytest.mark.drawn(6)
@pytest.mark.parametrize(
    "cell",
    [
        "%lora use " + "x" * 9000,
        "%lora " + "x" * 9000,
        "%lora scale sql " + "9" * 9000,
        "%lora compare hi --max-new-tokens " + "9" * 9000,
        "%lora use sql --" + "x" * 9000,
        "%lora use sql --model " + "x" * 9000,
        "%lora save " + "x" * 9000,
        "%%lora model\nr = " + "9" * 9000,
        "%%lora model\nr = 10**400",
        "%%lora model\nlora_alpha = 10**400",
        "%%lora model\nr = " + "(" * 900 + ")" * 900,
        "%%lora model\n" + "x" * 9000 + " = 1",
        "%%lora model\nr = 1, " + " " * 900 + "2 3",
        "%%lora_train model --data " + "[" * 900,
        "%%lora_train model --data " + "x" * 9000 + "\nmax_steps = 1",
    ],
)
def test_messages_stay_short_whatever_was_given(trained: Notebook, cell: str) -> None:
    lines = trained.run(cell).line.split("\n")
    assert len(lines) <= 3 and all(len(line) < 450 for line in lines)


def test_loading_without_any_model(bare: Notebook, tmp_path: Path) -> None:
    assert "needs a model, and no variable holds one" in bare.run(f"%lora load {tmp_path}").line


def test_loading_with_two_bare_models(notebook: Notebook, tmp_path: Path) -> None:
    notebook["second"] = notebook["model"].model
    assert "say which model: model, second" in notebook.run(f"%lora load {tmp_path}").line


def test_changes_of_what_is_merged_are_refused_and_those_beside_it_are_not(trained: Notebook) -> None:
    trained.do("%lora merge")
    for line in ("delete sql", "rename sql other", "add model --name x target_modules=q_proj use_dora=True"):
        assert "unmerge" in trained.run(f"%lora {line}").line
    for line in ("add model --name x target_modules=q_proj", "rename chat other", "delete other"):
        trained.do(f"%lora {line}")


class TestDamagedCheckpoints:
    """What cannot be loaded, and that nothing changes when it is tried."""

    @pytest.fixture
    def saved(self, trained: Notebook, tmp_path: Path) -> Path:
        trained.do(f"%lora save {tmp_path}/good --adapter sql")
        return tmp_path / "good"

    @staticmethod
    def refused(notebook: Notebook, folder: Path) -> str:
        before, state = fingerprint(notebook["model"]), notebook.session.state.models
        line = notebook.run(f"%lora load {folder} --name loaded").line
        assert "\n" not in line
        assert fingerprint(notebook["model"]) == before
        assert notebook.session.state.models == state
        return line

    def test_truncated(self, trained: Notebook, saved: Path) -> None:
        path = saved / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        assert "adapter_model.safetensors" in self.refused(trained, saved)

    def test_tampered_header(self, trained: Notebook, saved: Path) -> None:
        path = saved / "adapter_model.safetensors"
        content = bytearray(path.read_bytes())
        content[8:24] = b"\xff" * 16
        path.write_bytes(content)
        assert "adapter_model.safetensors" in self.refused(trained, saved)

    def test_empty(self, trained: Notebook, saved: Path) -> None:
        (saved / "adapter_model.safetensors").write_bytes(b"")
        self.refused(trained, saved)

    def test_config_that_is_no_json(self, trained: Notebook, saved: Path) -> None:
        (saved / "adapter_config.json").write_text("{")
        assert "adapter_config.json" in self.refused(trained, saved)

    def test_unknown_method(self, trained: Notebook, saved: Path) -> None:
        path = saved / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "LORRA"}))
        assert "LORRA" in self.refused(trained, saved)

    def test_another_base(self, trained: Notebook, saved: Path) -> None:
        from tests.tiny_models import llama

        trained["model"] = llama(hidden_size=64)
        trained.do("%lora add model --name sql target_modules=q_proj")
        self.refused(trained, saved)

    def test_another_base_that_is_bare(self, trained: Notebook, saved: Path) -> None:
        from tests.tiny_models import llama

        other = llama(hidden_size=64)
        trained["other"] = other
        assert trained.run(f"%lora load {saved} --name loaded --model other").line
        assert trained["other"] is other
        assert type(other.model.layers[0].self_attn.q_proj) is torch.nn.Linear
        assert trained.session.names == ("model",)

    def test_no_files(self, trained: Notebook, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        self.refused(trained, tmp_path / "empty")


def test_a_full_disk(trained: Notebook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    assert "no space left" in trained.run(f"%lora save {tmp_path}/x --adapter sql").line
    assert list(tmp_path.iterdir()) == []
