"""``%%lora`` and ``%lora add`` in a real shell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nbpeft.model import PeftModel
from tests.magics.notebook import Notebook

CELL = "%%lora model --name sql\nr = 4\nlora_alpha = 8\ntarget_modules = ['q_proj', 'v_proj']"


def fingerprint(model: nn.Module) -> dict[str, tuple[int, bool, float]]:
    """Everything a failed command must leave alone."""
    return {
        name: (id(parameter), parameter.requires_grad, float(parameter.detach().double().sum()))
        for name, parameter in model.named_parameters()
    }


def test_a_cell_adapts_the_model_in_its_variable(notebook: Notebook) -> None:
    base = notebook["model"]
    result = notebook.do(CELL)
    model = notebook["model"]
    assert isinstance(model, PeftModel)
    assert model.get_base_model() is base
    assert model.active_adapters == ["sql"]
    config: Any = model.peft_config["sql"]
    assert (config.r, config.lora_alpha) == (4, 8)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert str(result) == (
        "added 'sql' on model: LoRA r=4 α=8 on 4 modules (q_proj, v_proj), 896 parameters; "
        f"896 trainable of {total:,} ({100 * 896 / total:.2f} %)"
    )
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".sql." in name
    }


def test_a_body_uses_variables_of_the_notebook(notebook: Notebook) -> None:
    notebook["rank"] = 2
    notebook.do("%%lora model\nr = rank\nlora_alpha = 2 * r\ntarget_modules = 'all-linear'")
    config = notebook["model"].peft_config["default"]
    assert (config.r, config.lora_alpha) == (2, 4)


def test_a_body_of_comments_takes_the_defaults(notebook: Notebook) -> None:
    notebook.do("%%lora model\n# as usual")
    assert notebook["model"].peft_config["default"].r == 8


def test_the_same_cell_again_changes_nothing(notebook: Notebook) -> None:
    notebook.do(CELL)
    model, before = notebook["model"], fingerprint(notebook["model"])
    result = notebook.do(CELL)
    assert result.unchanged
    assert "nothing changed" in str(result)
    assert notebook["model"] is model
    assert fingerprint(model) == before


def test_another_cell_reconfigures_and_never_wraps_twice(notebook: Notebook) -> None:
    notebook.do(CELL)
    model = notebook["model"]
    result = notebook.do(CELL.replace("r = 4", "r = 2").replace("'v_proj'", "'k_proj'"))
    assert result.reconfigured
    assert notebook["model"] is model
    assert model.peft_config["sql"].r == 2
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert {name.split(".lora_A.")[0].rpartition(".")[2] for name in adapted} == {"q_proj", "k_proj"}
    assert not any("base_layer.base_layer" in name for name, _ in model.named_parameters())
    shapes = {tuple(p.shape) for name, p in model.named_parameters() if "lora_A" in name}
    assert shapes == {(2, 32)}


def test_all_linear_again_is_the_same_spec(notebook: Notebook) -> None:
    cell = "%%lora model\ntarget_modules = 'all-linear'"
    notebook.do(cell)
    assert notebook.do(cell).unchanged


def test_a_second_adapter_is_active_and_the_first_stays(notebook: Notebook) -> None:
    notebook.do(CELL)
    notebook.do("%lora add model --name chat r=2 target_modules=q_proj")
    model = notebook["model"]
    assert list(model.peft_config) == ["sql", "chat"]
    assert model.active_adapters == ["chat"]


def test_a_dry_run_touches_nothing(notebook: Notebook) -> None:
    base, before = notebook["model"], fingerprint(notebook["model"])
    preview = notebook.do("%%lora model --name sql --dry-run\nr = 4\ntarget_modules = 'all-linear'")
    assert notebook["model"] is base
    assert fingerprint(base) == before
    assert notebook.session.state.models == ()
    assert (preview.module_count, preview.name) == (14, "sql")
    notebook.do("%%lora model --name sql\nr = 4\ntarget_modules = 'all-linear'")
    trained = sum(p.numel() for p in notebook["model"].parameters() if p.requires_grad)
    assert preview.parameter_count == trained
    assert preview.byte_count == 4 * trained
    assert "q_<wbr>proj" in preview._repr_html_()


def test_a_dry_run_shows_what_is_missing(notebook: Notebook) -> None:
    preview = notebook.do("%lora add model --dry-run target_modules=q_proj,v_prj")
    assert preview.missing == ("v_prj",)
    assert "nothing matches 'v_prj'" in str(preview)


def test_a_missing_target_stops_the_cell(notebook: Notebook) -> None:
    base, before = notebook["model"], fingerprint(notebook["model"])
    line = notebook.run("%%lora model\ntarget_modules = ['q_proj', 'v_prj']").line
    assert "'v_prj' not found in the base model" in line
    assert "Did you mean 'v_proj'" in line
    assert notebook["model"] is base
    assert fingerprint(base) == before
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear
    assert notebook.session.state.models == ()


def test_a_missing_target_can_be_allowed(notebook: Notebook) -> None:
    result = notebook.do("%%lora model --allow-missing\ntarget_modules = ['q_proj', 'v_prj']")
    assert len(result.notes) == 1
    assert "v_prj" in result.notes[0]
    assert result.adapter.targets == ("q_proj",)


def test_a_frozen_adapter_acts_and_does_not_train(notebook: Notebook) -> None:
    notebook.do("%lora add model --no-trainable target_modules=q_proj")
    assert notebook["model"].active_adapters == ["default"]
    assert not any(p.requires_grad for p in notebook["model"].parameters())


def test_a_model_adapted_in_python_is_known(notebook: Notebook) -> None:
    notebook.do(
        "from nbpeft import LoraConfig, get_peft_model\n"
        "model = get_peft_model(model, LoraConfig(r=2, target_modules=['q_proj']), 'mine')"
    )
    assert "mine" in str(notebook.do("%lora"))
    notebook.do("%lora use base --model model")
    assert not notebook["model"].manager.enabled


def test_the_base_in_another_variable_is_not_adapted_twice(notebook: Notebook) -> None:
    notebook["base"] = notebook["model"]
    notebook.do(CELL)
    notebook.do("%lora add base --name chat target_modules=q_proj")
    assert notebook["base"] is notebook["model"]
    assert list(notebook["model"].peft_config) == ["sql", "chat"]


def test_two_models_are_told_apart(notebook: Notebook) -> None:
    from tests.tiny_models import llama

    notebook["second"] = llama(seed=1)
    notebook.do("%lora add model --name a target_modules=q_proj")
    notebook.do("%lora add second --name b target_modules=q_proj")
    assert notebook.session.names == ("model", "second")
    notebook.do("%lora use a --model model")
    notebook.do("%lora use base --model model")
    assert not notebook["model"].manager.enabled
    assert notebook["second"].manager.enabled
    assert "'a' not found" in notebook.run("%lora use a --model second").line


def test_a_variable_that_gets_a_new_model_starts_anew(notebook: Notebook) -> None:
    from tests.tiny_models import llama

    notebook.do(CELL)
    notebook["kept"] = notebook["model"]
    notebook["model"] = llama(seed=1)
    notebook.do(CELL)
    assert notebook["model"] is not notebook["kept"]
    assert notebook["kept"].active_adapters == ["sql"]
    assert set(notebook.session.names) == {"model", "kept"}


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("%%lora modle\nr = 4", "no variable is called 'modle'. Did you mean 'model'?"),
        ("%%lora xyz\nr = 4", "no variable is called 'xyz'. Models here: model."),
        ("%%lora number\nr = 4", "'number' is an int, not a model. Models here: model."),
        ("%%lora LlamaForCausalLM\nr = 4", "is a type, not a model"),
        ("%%lora\nr = 4", "%%lora needs MODEL, e.g. %%lora model --name sql"),
        ("%%lora model --nmae x\nr = 4", "%%lora has no option --nmae. Did you mean '--name'?"),
        ("%%lora model --name a.b\nr = 4", "a.b"),
        (
            "%%lora model\nr = 4\nlora_alfa = 3",
            "line 2: LoraConfig has no field 'lora_alfa'. Did you mean 'lora_alpha'",
        ),
        ("%%lora model\nr = 4\nlora_alpha = = 3", "line 2: invalid syntax"),
        ("%%lora model\nr = rnk", "line 1: name 'rnk' is not defined"),
        (
            "%%lora model\nlearning_rate = 4",
            "no field 'learning_rate'. It is a field of TrainingArguments: give it to the training",
        ),
        ("%%lora model\nrank = 4", "LoraConfig has no field 'rank'. Did you mean 'r'?"),
        ("%%lora model\ntarget_modules = q_proj", "name 'q_proj' is not defined. Text is written in quotes: 'q_proj'"),
        ("%%lora model\nr = -1", "line 1: r must be a positive"),
        ("%%lora model\nr = 'four'", "line 1: r must be a positive"),
        ("%%lora model\nbias = 'some'", "bias must be one of"),
        ("%%lora model\npeft_type = 'LORRA'", "peft_type 'LORRA' is not a known method"),
        ("%%lora model\ntarget_modules = ['q']", "'q' not found in the base model"),
        ("%%lora model\ntarget_modules = 'q_proj('", "target_modules is not a regular expression"),
        ("%%lora model\ntarget_modules = ['act_fn']", "act_fn"),
        ("%%lora model\nmodules_to_save = ['nothing']", "nothing"),
        ("%%lora model\nimport os", "line 1: only lines like 'field = value' are allowed here, not an import"),
        ("%lora add model r", "unexpected argument 'r'"),
        ("%lora add model lora_alfa=3", "LoraConfig has no field 'lora_alfa'"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(notebook: Notebook, cell: str, message: str) -> None:
    notebook["number"] = 3
    notebook["LlamaForCausalLM"] = type(notebook["model"])
    base, before = notebook["model"], fingerprint(notebook["model"])
    classes = [type(module) for module in base.modules()]
    outcome = notebook.run(cell)
    assert message in outcome.line.split("\n")[0]
    assert outcome.complained.startswith("UsageError: ") or outcome.printed.startswith("UsageError: ")
    assert notebook["model"] is base
    assert [type(module) for module in base.modules()] == classes
    assert fingerprint(base) == before
    assert notebook.session.state.models == ()


def test_a_mistake_in_a_body_is_pointed_at(notebook: Notebook) -> None:
    line = notebook.run("%%lora model\nr = 4\nlora_alpha = = 3").line
    assert line.split("\n")[1:] == ["    lora_alpha = = 3", "                 ^"]


@pytest.mark.parametrize(
    "cell", ["%%lora model --name sql\nr = 2\ntarget_modules = ['q_proj', 'nope']", CELL + "\nbias = 3"]
)
def test_a_failed_reconfiguration_leaves_the_adapter(adapted: Notebook, cell: str) -> None:
    model, before = adapted["model"], fingerprint(adapted["model"])
    state = adapted.session.state.models
    assert adapted.run(cell).line
    assert adapted["model"] is model
    assert fingerprint(model) == before
    assert adapted.session.state.models == state


def test_an_error_that_is_a_bug_keeps_its_traceback(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(notebook.session, "add", fail)
    outcome = notebook.run(CELL)
    assert type(outcome.error) is RuntimeError
    assert "fail" in outcome.printed + outcome.complained


def test_a_mistake_holds_no_model(notebook: Notebook) -> None:
    outcome = notebook.run("%%lora model\ntarget_modules = ['nope']")
    assert outcome.line
    assert outcome.error is not None
    assert outcome.error.__context__ is None
    assert outcome.error.__cause__ is None
    step = outcome.error.__traceback__
    while step is not None:
        if step.tb_frame.f_locals is notebook.shell.user_ns:
            step = step.tb_next
            continue
        held = [value for value in step.tb_frame.f_locals.values() if isinstance(value, torch.nn.Module)]
        assert held == []
        step = step.tb_next


def test_without_torch_there_is_no_model(bare: Notebook) -> None:
    told = "No variable holds a model yet. Load one: model = AutoModelForCausalLM.from_pretrained("
    assert told in bare.run("%%lora model\nr = 4").line


def test_help_of_a_cell(notebook: Notebook) -> None:
    text = repr(notebook.do("%%lora --help\n#"))
    assert "--dry-run" in text and "target_modules = 'all-linear'" in text
    assert "%lora use" in repr(notebook.do("%lora help"))


@pytest.mark.parametrize("cell", ["%%lora model", "%%lora model\n", "%%lora model\n\n"])
def test_a_cell_without_a_body_takes_the_defaults_and_says_so(notebook: Notebook, cell: str) -> None:
    result = notebook.do(cell)
    config = notebook["model"].peft_config["default"]
    assert config.r == 8 and set(config.target_modules) == {"q_proj", "v_proj"}
    assert "r=8" in str(result) and "PEFT's defaults" in str(result) and "PEFT&#x27;s defaults" in result._repr_html_()
    assert "PEFT's defaults" not in str(notebook.do("%%lora model --name other\nr = 4"))


@pytest.mark.parametrize("name", ["lora", "qlora", "lora_train"])
def test_help_of_a_cell_without_a_body(bare: Notebook, name: str) -> None:
    assert repr(bare.do(f"%%{name} --help")).startswith(f"%%{name}\n")


def test_cells_of_others_are_still_refused_without_a_body(bare: Notebook) -> None:
    assert "cell body is empty" in bare.run("%%capture found").line
    bare.do("%unload_ext nbpeft")
    assert bare.shell.input_transformers_cleanup and not any(
        "nbpeft" in getattr(item, "__module__", "") for item in bare.shell.input_transformers_cleanup
    )


def test_a_variable_that_is_no_model_is_not_proposed_for_adapting(bare: Notebook) -> None:
    bare["tokenizer"] = object()
    assert "adapt" not in bare.run("%lora tokenizer").line.partition(" It has:")[0]
