"""``%%qlora`` in a real shell: quantize, prepare, adapt, train, save."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nbpeft.session.results.planning import PlanResult
from nbpeft.session.results.quantizing import QloraPreview, QloraResult
from tests.closeness import assert_approximates, assert_close
from tests.magics.notebook import Notebook
from tests.tiny_models import checkpoints_activations, llama

bnb = pytest.importorskip("bitsandbytes")

CELL = """%%qlora {source} {line}
bits = 4
compute_dtype = "float32"
r = 4
target_modules = "all-linear"
"""


def cell(source: str, line: str = "", body: str = "") -> str:
    return CELL.format(source=source, line=line) + body


def quantized_layers(model: Any) -> int:
    return sum(isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for module in model.modules())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_model_in_memory_is_quantized_prepared_and_adapted(notebook: Notebook) -> None:
    base = notebook["model"]
    result: QloraResult = notebook.do(cell("model", "--name sql"))
    assert isinstance(result, QloraResult) and result.quantized
    model = notebook["model"]
    assert model.get_base_model() is base and model.active_adapters == ["sql"]
    assert quantized_layers(model) == 14 and checkpoints_activations(base)
    parts = {part.name: part for part in result.parts}
    assert parts["quantized layers"].before == 2 * parts["quantized layers"].bfloat16_bytes
    assert parts["embedding"].before == parts["embedding"].byte_count
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".sql." in name for name in trained)
    state = notebook.session.state.models[0]
    assert (state.name, state.quantization) == ("model", "bnb4bit")


def test_a_method_is_chosen_as_for_lora(notebook: Notebook) -> None:
    preview = notebook.do("%%qlora model --dry-run --method ia3\nbits = 4")
    assert "(IA)³" in str(preview)
    line = notebook.run("%%qlora model --method ia3\npeft_type = 'lora'").line
    assert "--method ia3 and peft_type = 'lora' contradict each other" in line


def test_a_folder_is_loaded_quantized_into_a_variable(bare: Notebook, folder: Path) -> None:
    result = bare.do(cell(str(folder), "--as tiny --name sql", "dtype = 'bfloat16'\n"))
    assert quantized_layers(bare["tiny"]) == 14 and "model" not in bare.shell.user_ns
    assert result.parts[0].before is None
    assert "14 layers in nf4 double" in str(result) and "added 'sql' on tiny" in str(result)
    assert "; 4-bit layers compute in float32; " in str(result)
    html = result._repr_html_()
    assert "quantized layers" in html and "embedding" in html and "tensors in float32" in html
    assert "Traceback" not in html


def test_again_it_only_reconfigures(bare: Notebook, folder: Path) -> None:
    bare["place"] = str(folder)
    bare.do(cell("$place", "--name sql"))
    base = bare["model"].get_base_model()
    again = bare.do(cell("$place", "--name sql").replace("r = 4", "r = 2"))
    assert bare["model"].get_base_model() is base
    assert not again.quantized and again.added.reconfigured and again.added.adapter.summary["r"] == "2"
    second = bare.do(cell("model", "--name chat", "gradient_checkpointing = False\n"))
    assert not second.quantized and not checkpoints_activations(base)
    assert set(bare["model"].peft_config) == {"sql", "chat"}
    line = bare.run(cell("$place", "--name sql").replace("bits = 4", "bits = 8")).line
    assert "'model' holds a PeftModel with 'sql', 'chat'; give --as NAME" in line
    assert bare["model"].get_base_model() is base
    other = bare.do(cell("$place", "--as model --name sql").replace("bits = 4", "bits = 8"))
    assert other.quantized and bare["model"].get_base_model() is not base


@pytest.mark.parametrize("word", ["", "--as model"])
def test_training_that_is_not_saved_is_not_rebound(notebook: Notebook, folder: Path, tmp_path: Path, word: str) -> None:
    """As in the trial: a cell for a folder took the variable, and what was trained in it was gone."""
    notebook.do("%lora add model --name tiny r=2 target_modules=q_proj")
    notebook["rows"] = [{"input_ids": [1, 2, 3]}] * 2
    notebook.do("%%lora_train model --data rows\nmax_steps = 1")
    model = notebook["model"]
    text = cell(str(folder), f"{word} --name q", "dtype = 'bfloat16'\n")
    line = notebook.run(text).line
    assert "'model' holds training that is not saved ('tiny'): save it (%lora save DIR --model model)" in line
    assert notebook["model"] is model and notebook.session.names == ("model",)
    if word:
        notebook.do(f"%lora save {tmp_path}/tiny")
        notebook.do(text)
    else:
        notebook.do(text.replace("--name q", "--name q --replace"))
    assert notebook["model"] is not model and notebook["model"].active_adapters == ["q"]


def test_a_cell_that_made_the_model_goes_on_with_what_it_trained(notebook: Notebook, folder: Path) -> None:
    text = cell(str(folder), "--as fresh --name q", "dtype = 'bfloat16'\n")
    notebook.do(text)
    notebook["rows"] = [{"input_ids": [1, 2, 3]}] * 2
    notebook.do("%%lora_train fresh --data rows\nmax_steps = 1")
    model = notebook["fresh"]
    assert notebook.do(text).added.unchanged and notebook["fresh"].manager is model.manager
    assert model.manager.unsaved == {"q"}


@pytest.mark.parametrize("held", ["adapted", "bare", "a text"])
def test_a_variable_that_nobody_named_is_not_taken(notebook: Notebook, folder: Path, held: str) -> None:
    if held == "adapted":
        notebook.do("%lora add model --name trained r=2 target_modules=q_proj")
    if held == "a text":
        notebook["model"] = str(folder)
    before = notebook["model"]
    line = notebook.run(cell(str(folder), "--name q", "dtype = 'bfloat16'\n")).line
    what = {"adapted": "a PeftModel with 'trained'", "bare": "a LlamaForCausalLM", "a text": "a str"}[held]
    assert f"'model' holds {what}; give --as NAME for the new model, or --as model to overwrite it" in line
    assert notebook["model"] is before and notebook.session.names == (("model",) if held == "adapted" else ())
    notebook.do(cell(str(folder), "--as other --name q", "dtype = 'bfloat16'\n"))
    assert notebook["model"] is before and quantized_layers(notebook["other"]) == 14


@pytest.mark.parametrize("name", ["a.b", "__base__"])
def test_a_name_that_cannot_be_is_refused_before_a_weight_is_rounded(notebook: Notebook, name: str) -> None:
    base = notebook["model"]
    before = {key: value.clone() for key, value in base.state_dict().items()}
    assert "cannot name an adapter" in notebook.run(cell("model", f"--name {name}")).line
    assert quantized_layers(base) == 0 and all(parameter.requires_grad for parameter in base.parameters())
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_what_preparing_did_is_taken_back_where_adapting_fails(
    notebook: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook["model"] = base = llama(dtype=torch.bfloat16)
    notebook.do(cell("model", "--name first"))
    notebook.do("%lora unload")

    def state() -> list[Any]:
        hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in base.modules()]
        kinds = [(parameter.dtype, parameter.requires_grad) for parameter in base.parameters()]
        return [hooks, kinds, checkpoints_activations(base)]

    notebook.session.context.qlora_origins.clear()
    before = state()

    def fail(*_: Any, **__: Any) -> None:
        assert state() != before
        raise KeyboardInterrupt

    monkeypatch.setattr("nbpeft.model.handle.peft_model.handle_of_plan", fail)
    outcome = notebook.run(cell("model", "--name sql", "upcast = 'peft'\ngradient_checkpointing = False\n"))
    assert isinstance(outcome.error, KeyboardInterrupt)
    assert state() == before and notebook["model"] is base and notebook.session.names == ()


def test_trains_and_is_saved(bare: Notebook, folder: Path, tmp_path: Path) -> None:
    bare.do(cell(str(folder), "--name sql", "gradient_checkpointing = True\nlora_dropout = 0.1\n"))
    bare["rows"] = [{"input_ids": [1 + (step + start) % 7 for step in range(6)]} for start in range(8)]
    result = bare.do(
        "%%lora_train model --data rows\nmax_steps = 4\nlearning_rate = 0.01\nper_device_train_batch_size = 4"
    )
    assert result.status == "finished" and result.steps == 4
    bare.do(f"%lora save {tmp_path / 'adapter'}")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    bare.do("%lora merge")
    bare.do("%lora unmerge")


def test_flooding_warnings_become_one_line(bare: Notebook, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare.do(cell(str(folder), "--name sql").replace("bits = 4", "bits = 8"))
    bare["rows"] = [{"input_ids": [1, 2, 3, 4]}] * 4
    caplog.clear()
    bare.do("%lora_train model --data rows max_steps=2 per_device_train_batch_size=2")
    lines = [record.getMessage() for record in caplog.records if "MatMul8bitLt" in record.getMessage()]
    assert len(lines) <= 1
    assert all("times)" in line for line in lines)


DRY_RUNS = [
    "dtype = 'bfloat16'\n",
    "dtype = 'bfloat16'\ndouble_quant = False\nquant_type = 'fp4'\n",
    "dtype = 'bfloat16'\nupcast = 'peft'\ngradient_checkpointing = False\n",
    "upcast = 'none'\n",
]


@pytest.mark.drawn(2)
@pytest.mark.parametrize("body", [*DRY_RUNS, "bits = 8\n", "bits = 8\ndtype = 'bfloat16'\n"])
def test_a_dry_run_of_a_folder_foretells_what_is_then_done(bare: Notebook, folder: Path, body: str) -> None:
    text = cell(str(folder), "--name sql{}", body)
    text = text.replace("bits = 4\n", "") if "bits" in body else text
    preview = bare.do(text.format(" --dry-run --batch-size 2 --max-length 16 --device 1GB"))
    assert isinstance(preview, QloraPreview) and preview.action == "load and quantize"
    assert "model" not in bare.shell.user_ns and bare.session.state.models == ()
    result = bare.do(text.format(""))
    assert preview.parts == result.parts and preview.byte_count == result.byte_count
    assert preview.prepared == result.prepared
    assert preview.adapter.parameter_count == result.added.adapter.parameter_count
    assert {row.backend for row in preview.adapter.rows} == {result.added.state.quantization}
    plan = preview.adapter.memory
    assert isinstance(plan, PlanResult) and plan.fits and plan.settings.batch_size == 2
    assert plan.settings.gradient_checkpointing is ("gradient_checkpointing = False" not in body)
    if "upcast" not in body:  # a forecast knows nothing of it
        weights = sum(part.byte_count for part in plan.parts if part.name == "base weights")
        assert_approximates(weights, preview.byte_count, 0.02)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("body", DRY_RUNS[1:])
def test_a_dry_run_of_a_model_in_memory_touches_nothing(notebook: Notebook, body: str) -> None:
    base, body = notebook["model"], body.replace("dtype = 'bfloat16'\n", "")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    preview = notebook.do(cell("model", "--dry-run", body))
    assert notebook["model"] is base and quantized_layers(base) == 0 and notebook.session.state.models == ()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())
    result = notebook.do(cell("model", "", body))
    assert preview.parts == result.parts
    assert "Before" in preview._repr_html_() and "would quantize LlamaForCausalLM" in str(preview)


def test_a_dry_run_of_what_is_quantized_says_so(bare: Notebook, folder: Path) -> None:
    done = bare.do(cell(str(folder), "--name sql"))
    again = bare.do(cell(str(folder), "--name sql --dry-run").replace("r = 4", "r = 2"))
    assert again.action == "" and again.parts == done.parts and again.prepared == ""
    assert "base is quantized already: 14 layers in nf4 double" in str(again)
    assert "would reconfigure" in str(again) and bare["model"].peft_config["sql"].r == 4
    other = bare.do(cell(str(folder), "--dry-run").replace("bits = 4", "bits = 8"))
    assert other.action == "load and quantize" and "int8" in str(other)
    line = bare.run(cell("model", "--dry-run").replace("bits = 4", "bits = 8")).line
    assert "quantized already with bits = 4" in line


def test_a_dry_run_tells_the_memory_and_what_would_fit(bare: Notebook, folder: Path) -> None:
    preview = bare.do(cell(str(folder), "--dry-run --batch-size 8 --max-length 64 --device 300KB"))
    text, page = str(preview), preview._repr_html_()
    assert text.startswith("dry run: would load and quantize base: 14 layers in nf4 double")
    assert "does not fit 300.0 kB" in text and "nf4 + float32" in text
    assert "quantized layers" in page and "embedding" in page and "bnb4bit" in page and "no room for" in page
    assert "--dry-run" in bare.run(cell(str(folder), "--batch-size 2")).line


def test_a_dry_run_of_a_task_model(bare: Notebook, folder: Path) -> None:
    body = "model_class = 'AutoModelForSequenceClassification'\ndtype = 'auto'\ntask_type = 'SEQ_CLS'\n"
    preview = bare.do(cell(str(folder), "--dry-run --max-length 16", body))
    result = bare.do(cell(str(folder), "", body))
    assert preview.parts == result.parts
    assert preview.adapter.module_count == result.added.adapter.module_count == 15


def test_what_is_stored_quantized_stays_so(bare: Notebook, tmp_path: Path) -> None:
    config = llama().config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path / "gptq")
    assert "stay quantized with gptq" in str(bare.do(cell(str(tmp_path / "gptq"), "--dry-run")))


MISTAKES = [
    (cell("model").replace("bits = 4", "bits = 5"), "line 1: bits is 5; expected 4 or 8"),
    (
        cell("model", "", "max_steps = 3\n"),
        "%%qlora has no field 'max_steps'. It is a field of TrainingArguments: give it to",
    ),
    (cell("model", "", "quant_typ = 'nf4'\n"), "%%qlora has no field 'quant_typ'. Did you mean 'quant_type'"),
    (cell("model", "", "lora_alph = 3\n"), "Did you mean 'lora_alpha'"),
    (cell("model", "", "gguf_file = 'x'\n"), "'gguf_file' is an option of loading"),
    (cell("model", "", "upcast = 'all'\n"), "upcast='all' is not one of"),
    (cell("modle"), "no variable and no folder is called 'modle'. Did you mean 'model'?"),
    (cell("place"), "write $place to use its value"),
    (cell("./nowhere", "--as other"), "no model could be loaded from './nowhere'"),
    (cell("model", "--as 'a b'"), "--as takes the name of a variable"),
    (cell("model", "--nam x"), "has no option --nam"),
    (cell("model").replace('"all-linear"', '["nothing"]'), "nothing"),
    ("%%qlora\nr = 4", "%%qlora needs SOURCE, e.g. %%qlora "),
]


@pytest.mark.drawn(10)
@pytest.mark.parametrize("dry", ["", " --dry-run"])
@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(notebook: Notebook, text: str, message: str, dry: str) -> None:
    notebook["place"] = "somewhere"
    base = notebook["model"]
    head, _, body = text.partition("\n")
    assert message in notebook.run(f"{head}{dry}\n{body}").line
    assert notebook["model"] is base and not quantized_layers(base)
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert notebook.session.state.models == ()


def test_other_settings_need_a_new_model(notebook: Notebook) -> None:
    notebook.do(cell("model", "--name sql"))
    line = notebook.run(cell("model", "--name sql").replace("bits = 4", "bits = 8")).line
    assert "quantized already with bits = 4" in line
    assert notebook["model"].active_adapters == ["sql"]


def test_a_cell_of_ones_own_floods_no_more(notebook: Notebook, caplog: pytest.LogCaptureFixture) -> None:
    notebook["log"] = logging.getLogger("bitsandbytes.autograd")
    caplog.clear()
    notebook.do("for _ in range(50): log.warning('inputs will be cast')")
    assert [record.getMessage() for record in caplog.records] == ["inputs will be cast (50 times)"]
    with pytest.raises(AssertionError):
        notebook.do("log.warning('once')\n1 / 0")
    assert [record.getMessage() for record in caplog.records][1:] == ["once"]
    notebook.run("%unload_ext nbpeft")
    notebook.do("for _ in range(3): log.warning('again')")
    assert len(caplog.records) == 5


def test_help_and_completion(notebook: Notebook, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    assert f"{tmp_path}/models/" in notebook.complete(f"%%qlora {tmp_path}/mo")
    assert "--as MODEL" in str(notebook.do("%qlora --help"))
    body = "%%qlora model\nquant"
    assert {"quant_type = ", "quant_storage = "} <= set(notebook.complete(body))
    assert "r = " in notebook.complete("%%qlora model\nr")
    assert notebook.complete("%%qlora mod") == ["model"]
    assert "--as" in notebook.complete("%%qlora model --")


def test_merging_into_a_copy(notebook: Notebook, tmp_path: Path) -> None:
    notebook.do(cell("model", "--name sql"))
    model = notebook["model"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = tmp_path / "merged"
    result = notebook.do(f"%lora merge sql --to {out} --dtype float32")
    assert "quantized again" in str(result) and "float32" in str(result) and str(out) in str(result)
    page = result._repr_html_().replace("<wbr>", "")
    assert "this copy" in page and "_proj" in page
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    from transformers import AutoModelForCausalLM

    copy = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert_close(copy(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert "already contains weights" in notebook.run(f"%lora merge --to {out}").line
    assert "replace it (--replace)" in notebook.run(f"%lora merge --to {out}").line
    (out / "mine.txt").write_text("of an earlier export")
    notebook.do(f"%lora merge --to {out} --replace")
    assert not (out / "mine.txt").exists()
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(out).eval()
        assert torch.equal(again(input_ids=ids).logits, copy(input_ids=ids).logits)
    assert "--replace requires --to DIR" in notebook.run("%lora merge --replace").line
    assert "--dtype requires --to DIR" in notebook.run("%lora merge --dtype float32").line
    assert "--base requires --to DIR" in notebook.run(f"%lora merge --base {out}").line
    assert "dtype is 'int4'" in notebook.run(f"%lora merge --to {tmp_path / 'b'} --dtype int4").line
    merged = notebook.do("%lora merge")
    assert any("quantized again" in note and "--to DIR" in note for note in merged.notes)
    assert "unmerge before merging into a copy" in notebook.run(f"%lora merge --to {tmp_path / 'b'}").line
    notebook.do("%lora unmerge")
