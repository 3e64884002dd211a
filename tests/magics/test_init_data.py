"""``%%lora --init-data``: adapters that start from rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbpeft import (
    CordaConfig,
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from nbpeft.model import get_peft_model_state_dict
from nbpeft.training.loop.rows import first_rows
from tests.closeness import assert_close
from tests.magics.notebook import Notebook
from tests.tiny_models import VOCABULARY, llama, same_state, state

TARGETS = ["q_proj", "v_proj", "down_proj"]


def cell(init: str, *words: str, **fields: Any) -> str:
    lines = {"r": 4, "target_modules": TARGETS, "init_lora_weights": init, **fields}
    body = "\n".join(f"{name} = {value!r}" for name, value in lines.items())
    return f"%%lora model --name sql {' '.join(words)}\n{body}"


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": (found := torch.randint(1, VOCABULARY, (9 + start % 5,), generator=generator).tolist()),
            "labels": [-100] * 2 + found[2:],
        }
        for start in range(24)
    ]


@pytest.fixture
def ready(notebook: Notebook) -> Notebook:
    notebook["rows"] = rows()
    return notebook


def directly(init: str) -> Any:
    """The adapter that PEFT's functions start."""
    base = llama()
    batches = first_rows(base, rows(), rows=256).batches()
    own: Any = {"eva": {"eva_config": EvaConfig()}, "corda": {"corda_config": CordaConfig()}}
    own = own.get(init, {"lora_ga_config": LoraGAConfig()})
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init, **own)
    if init == "eva":
        made = get_peft_model(base, config)
        initialize_lora_eva_weights(made, batches, show_progress_bar=False)
        return made
    if init == "corda":
        preprocess_corda(base, config, lambda: [base(**batch) for batch in batches])
    else:
        preprocess_loraga(base, config, lambda: [base(**batch).loss.backward() for batch in batches])
    return get_peft_model(base, config)


@pytest.mark.parametrize(
    ("init", "words"),
    [
        (
            "eva",
            "components of its layers' inputs on up to 24 rows, 262 tokens; ranks redistributed over 6 layers",
        ),
        ("corda", "initialized by CorDA: the most important directions of each weight on 24 rows"),
        ("lora_ga", "initialized by LoRA-GA: the mean gradient of 3 batches (24 rows, 262 tokens)"),
    ],
)
def test_an_adapter_starts_as_if_peft_s_function_was_called(ready: Notebook, init: str, words: str) -> None:
    torch.manual_seed(2)
    outcome = ready.run(cell(init, "--init-data rows"))
    assert outcome.error is None and words in str(outcome.value)
    assert any(word in outcome.complained for word in ("EVA: ", "CorDA: ", "LoRA-GA: "))  # how far it is
    model = ready["model"]
    torch.manual_seed(2)
    wanted = get_peft_model_state_dict(directly(init))
    found = get_peft_model_state_dict(model, adapter_name="sql")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_close(found[key], value, message=key)
    assert model.active_adapters == ["sql"] and not model.get_base_model().training
    assert "already; nothing changed" in str(ready.do(cell(init, "--init-data rows")))
    assert same_state(state(model.unload()), state(llama()))


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_what_is_not_used_of_the_rows_is_named(ready: Notebook, init: str) -> None:
    ready["rows"] = [{**row, "id": 1, "weight": 2} for row in rows()]
    notes = ready.do(cell(init, "--init-data rows")).notes
    assert "columns not used: 'id'" in notes
    assert ("not used: weights of the rows" in notes) is (init == "eva")


def test_what_it_started_from_is_had_again(ready: Notebook) -> None:
    for init in ("eva", "corda", "lora_ga"):
        ready.do(cell(init, "--init-data rows"))
        model = ready["model"]
        started = state(model)
        with torch.no_grad():
            for parameter in model.manager.parameters("sql"):
                parameter.add_(0.5)
        trained = state(model)
        ready.do("%lora reset sql")
        assert same_state(state(model), started), init
        ready.do("%lora undo")
        assert same_state(state(model), trained), init


def test_an_adapter_is_reconfigured_from_rows_and_brought_back(ready: Notebook) -> None:
    ready.do("%%lora model --name sql\nr = 4\ntarget_modules = ['q_proj']")
    ready.do("%lora add model --name chat r=2 target_modules=q_proj")
    model = ready["model"]
    before = state(model)
    assert "initialized by EVA" in str(ready.do(cell("eva", "--init-data rows --init-rows 8")))
    wanted = get_peft_model_state_dict(directly("eva"))
    assert not same_state(dict(get_peft_model_state_dict(model, adapter_name="sql")), dict(wanted))  # of 8 rows
    assert set(model.manager.names) == {"chat", "sql"}
    ready.do("%lora undo")
    assert same_state(state(model), before)


def test_values_of_a_sweep_each_start_from_the_rows(ready: Notebook) -> None:
    made = str(ready.do("%%lora model --name sql --init-data rows\nr = sweep(2, 4)\ninit_lora_weights = 'eva'"))
    assert "sql-r2, sql-r4" in made and made.count("initialized by EVA") >= 1
    for name in ("sql-r2", "sql-r4"):
        tensors = get_peft_model_state_dict(ready["model"], adapter_name=name)
        for key, value in tensors.items():
            if "lora_A" in key:  # directions are at right angles
                assert_close(value @ value.T, torch.eye(len(value)), message=key)


@pytest.mark.drawn(8)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            cell("eva"),
            "init_lora_weights='eva' needs rows of the training data (--init-data)",
        ),
        (cell("corda"), "rows of the training data (--init-data)"),
        (cell("lora_ga"), "rows of the training data (--init-data)"),
        (cell("pissa", "--init-data rows"), "require init_lora_weights='eva' or 'corda' or 'lora_ga', not 'pissa'"),
        (cell("eva", "--init-data nothing"), "The data has no rows"),
        (cell("eva", "--init-data texts"), "need a tokenizer"),
        (cell("eva", "--init-data rowz"), "name 'rowz' is not defined. Did you mean 'rows'"),
        (
            cell("eva", "--init-rows 5"),
            "--init-rows has no effect without rows to initialize from (--init-data)",
        ),
        (cell("eva", "--init-data rows", target_modules=["embed_tokens"]), "EVA needs linear layers"),
        (cell("lora_ga", "--init-data rows", r=40), "takes a rank of at most"),
    ],
)
@pytest.mark.parametrize("present", [False, True])
def test_a_mistake_is_one_line_and_changes_nothing(ready: Notebook, text: str, message: str, present: bool) -> None:
    ready["nothing"], ready["texts"] = [], [{"text": "hello"}]
    if present:
        ready.do("%lora add model --name sql r=2 target_modules=q_proj")
    before, models = state(ready["model"]), ready.session.state.models
    assert message in ready.run(text).line
    assert same_state(state(ready["model"]), before) and ready.session.state.models == models
    assert not any(module._forward_pre_hooks for module in ready["model"].modules())
    assert not any("eigens" in module.__dict__ for module in ready["model"].modules())


@pytest.mark.drawn(2)
@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupt_leaves_all_as_it_was(ready: Notebook, init: str, call: int) -> None:
    model, calls = ready["model"], []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    before = state(model)
    handle = model.register_forward_hook(interrupt)

    assert isinstance(ready.run(cell(init, "--init-data rows")).error, KeyboardInterrupt)
    handle.remove()
    assert ready["model"] is model and same_state(state(model), before) and ready.session.names == ()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any({"eigens", "_peft_loraga_grad"} & module.__dict__.keys() for module in model.modules())
    ready.do(cell(init, "--init-data rows"))


def test_qlora_says_what_to_do(bare: Notebook) -> None:
    assert "load the model quantized first" in bare.run("%%qlora nobody/nothing\ninit_lora_weights = 'eva'").line


def test_completion_and_help_know_it(ready: Notebook) -> None:
    assert "--init-data" in ready.complete("%%lora model --init")
    assert "rows" in ready.complete("%%lora model --init-data ro")
    assert "--init-data DATA" in str(ready.do("%lora help add"))
