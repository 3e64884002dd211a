"""``%lora plan`` and the forecast of a dry run in a real shell."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import pytest
from transformers import LlamaConfig, Trainer

from nbpeft.memory import forecast
from nbpeft.session.results.planning import PlanResult
from nbpeft.widgets import PlanPanel
from tests.magics.notebook import Notebook
from tests.pretend_cpu import pretend_cpu


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A folder with nothing but a config of seven billion parameters."""
    LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(tmp_path)  # fmt: skip
    return str(tmp_path)


def test_a_folder_with_a_config_is_enough(bare: Notebook, folder: str) -> None:
    plan = bare.do(
        f"%lora plan {folder} --batch-size 2 --max-length 512 --device 16GB r=8 target_modules=q_proj,v_proj"
    )
    assert isinstance(plan, PlanResult)
    assert (plan.settings.batch_size, plan.settings.max_length, plan.settings.rank) == (2, 512, 8)
    assert plan.settings.dtype == "bfloat16" and plan.adapter == "LoRA r=8"
    sizes = {part.name: part.byte_count for part in plan.parts}
    assert 13.4e9 < sizes["base weights"] < 13.6e9
    assert sizes["adapters"] == 32 * 2 * 2 * 4096 * 8 * 4
    assert plan.fits is False and plan.excess == plan.peak_bytes - 16_000_000_000
    assert sum(over for _, over in plan.exceeding) == plan.excess
    assert plan.changes[0].fits
    assert "does not fit 16.0 GB" in str(plan) and "then it fits" in str(plan)
    page = plan._repr_html_()
    assert "no room for" in page and "background:#4c78a8" in page and escape(plan.changes[0].change) in page


@pytest.mark.slow
def test_it_is_the_forecast_of_the_python_form(bare: Notebook, folder: str) -> None:
    plan = bare.do(
        f"%lora plan {folder} --batch-size 3 --max-length 256 --device 24GiB bits=4 gradient_checkpointing=True "
        "--dtype bf16 optim=paged_adamw_8bit r=4"
    )
    from nbpeft import LoraConfig

    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    found = forecast(
        folder, adapter, batch_size=3, max_length=256, dtype="bfloat16", quantization="nf4",
        gradient_checkpointing=True, optim="paged_adamw_8bit", device="24GiB",
    )  # fmt: skip
    assert plan.peak_bytes == found.peak_bytes and plan.parts == found.parts
    assert plan.fits and plan.room.total == 24 * 2**30
    assert plan.verdict.endswith("left") and not plan.exceeding


@pytest.mark.slow
def test_a_plan_for_a_trainer_of_another_library_or_other_chunks(adapted: Notebook) -> None:
    adapted["Other"] = Trainer
    by_class = adapted.do("%lora plan model --max-length 64 --trainer-class Other")
    by_fields = adapted.do("%lora plan model --max-length 64 loss_chunk_size=0 recompute=False")
    assert by_class.parts == by_fields.parts != adapted.do("%lora plan model --max-length 64").parts


def test_a_variable_is_planned_with_its_adapter_on_this_machine(adapted: Notebook) -> None:
    plan = adapted.do("%lora plan model --max-length 32")
    assert (plan.model_name, plan.adapter, plan.settings.batch_size) == ("model", "LoRA r=4", 8)
    assert plan.notes == ("batch 8 is assumed, as in training",)
    assert plan.room.name == "this machine (CPU)" and plan.room.held > 0
    assert plan.fits and plan.fits_now
    assert adapted.do("%lora plan --max-length 32").peak_bytes == plan.peak_bytes
    assert adapted.do("%lora plan --max-length 32 --inference").peak_bytes < plan.peak_bytes
    assert "KV cache" in str(adapted.do("%lora plan --max-length 32 --inference"))


@pytest.mark.slow
def test_a_bare_model_and_a_config_in_a_variable(notebook: Notebook) -> None:
    bare_model = notebook.do("%lora plan model --max-length 32 --batch-size 1")
    notebook["config"] = notebook["model"].config
    assert notebook.do("%lora plan config --max-length 32 --batch-size 1").peak_bytes == bare_model.peak_bytes
    notebook["rows"] = 3
    assert "not a model" in notebook.run("%lora plan rows").line


@pytest.mark.slow
def test_fields_change_the_active_adapter(adapted: Notebook) -> None:
    plan = adapted.do("%lora plan model --max-length 32 target_modules=q_proj,k_proj,v_proj")
    assert (plan.settings.rank, plan.adapter) == (4, "LoRA r=4")
    assert plan.parts != adapted.do("%lora plan model --max-length 32").parts
    again = adapted.do("%lora plan model --max-length 32 r=2")
    assert again.parts == adapted.do("%lora plan model --max-length 32 r=2 target_modules=['q_proj','v_proj']").parts
    panel = adapted.do("%lora plan model --max-length 32 r=2 --panel")
    assert isinstance(panel, PlanPanel)
    panel.close()


@pytest.mark.slow
def test_another_method_is_planned_with_its_own_fields(adapted: Notebook) -> None:
    plan = adapted.do("%lora plan model --max-length 32 peft_type=ia3")
    assert (plan.adapter, plan.settings.rank) == ("(IA)³", None)
    assert adapted.do("%lora plan model --max-length 32 --method ia3").parts == plan.parts
    assert "'r'" in adapted.run("%lora plan model --max-length 32 peft_type=ia3 r=8").line
    adapted.do("%lora delete sql")
    adapted.do("%lora delete chat")
    adapted.do("%lora add model --name scales --method ia3")
    scales = adapted.do("%lora plan model --max-length 32 target_modules=q_proj")
    assert scales.adapter == "(IA)³" and scales.parts != plan.parts
    assert adapted.do("%lora plan model --max-length 32 peft_type=lora").adapter.startswith("LoRA r=16")


@pytest.mark.slow
def test_what_a_repository_says_of_its_weights_counts(bare: Notebook, tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, vocab_size=256, dtype="bfloat16")
    config.save_pretrained(tmp_path / "plain")
    kinds = {
        "nf4": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
        "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "gptq": {"quant_method": "gptq", "bits": 4},
    }
    plain = bare.do(f"%lora plan {tmp_path}/plain --max-length 32 --device 1GB bits=4")
    for name, stored in kinds.items():
        config.quantization_config = stored
        config.save_pretrained(tmp_path / name)
        plan = bare.do(f"%lora plan {tmp_path}/{name} --max-length 32 --device 1GB")
        assert plan.settings.quantization == ("int8" if name == "int8" else "nf4")
        assert (plan.peak_bytes == plain.peak_bytes) == (name != "int8")
        assert ("gptq" in str(plan.notes)) == (name == "gptq")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("modle", "no variable is called 'modle'. Did you mean 'model'?"),
        ("/nowhere/at/all", "there is no folder '/nowhere/at/all'"),
        ("model --batch-size 0", "--batch-size: expected a whole number of at least 1, not '0'"),
        ("model --max-length -1", "--max-length: expected a whole number of at least 1, not '-1'"),
        ("model --device 16", "--device 16 has no unit. Did you mean '16GB'?"),
        ("model quant_type=nf5 bits=4", "Did you mean 'nf4'?"),
        ("model bits=5", "bits is 5; expected 4 or 8"),
        ("model --dtype int8", "--dtype 'int8' is not one of bf16, fp16, fp32"),
        ("model optim=adamv", "Did you mean 'adam'"),
        ("model --device big", "not a size such as '16GB', a device of this machine"),
        ("model target_modules=q_prj", "Did you mean 'q_proj'"),
        ("model r=0", "0"),
        ("model --batch 2", "It is called '--batch-size' now"),
        ("model --seq 2", "It is called '--max-length' now"),
        ("model --quant nf4", "A field is set without dashes: bits=…"),
        ("model --checkpointing", "A field is set without dashes: gradient_checkpointing=…"),
        ("model --rank 4", "A field is set without dashes: r=…"),
        ("model --batch-sizes 2", "Did you mean '--batch-size'"),
        ("model rr=2", "has no field 'rr'"),
    ],
)
def test_mistakes_are_one_line(notebook: Notebook, line: str, words: str) -> None:
    found = notebook.run(f"%lora plan {line}").line
    assert words in found and "\n" not in found


def test_without_a_model(bare: Notebook) -> None:
    assert "needs a model" in bare.run("%lora plan").line


def test_a_dry_run_forecasts(notebook: Notebook) -> None:
    cell = "%%lora model --name sql --dry-run{}\nr = 4\ntarget_modules = 'all-linear'"
    preview = notebook.do(cell.format(""))
    assert isinstance(preview.memory, PlanResult)
    assert re.search(r"forecast: model \(batch 8, length \d+, rank 4, .*are assumed", str(preview))
    assert "are assumed" in preview._repr_html_() and "peak " in preview._repr_html_()
    small = notebook.do(cell.format(" --batch-size 1 --max-length 16 --device 1MB"))
    assert small.memory.peak_bytes < preview.memory.peak_bytes
    assert "assumed" not in str(small)
    assert small.memory.fits is (small.memory.peak_bytes <= 10**6)
    assert notebook["model"].__class__.__name__ == "LlamaForCausalLM"


def test_a_dry_run_says_where_the_processor_is_slow(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpu(monkeypatch)
    told, cell = (
        "no instructions for bfloat16",
        "%%lora model --name sql --dry-run --batch-size 1 --max-length 16 --device cpu\nr = 4",
    )
    assert told not in str(notebook.do(cell))
    notebook.do("import torch\nmodel = model.to(torch.bfloat16)")
    preview = notebook.do(cell)
    assert told in str(preview) and told in preview._repr_html_()


def test_sizes_without_a_dry_run_are_a_mistake(notebook: Notebook) -> None:
    assert "--dry-run" in notebook.run("%lora add model --batch-size 2 r=4 target_modules=q_proj").line


def test_a_dry_run_of_what_cannot_be_forecast_says_why(bare: Notebook) -> None:
    bare.do("import torch\nnet = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))")
    preview = bare.do("%lora add net --dry-run target_modules=['0']")
    assert "no forecast: cannot forecast for a Sequential" in str(preview)
    assert "no forecast of memory" in preview._repr_html_()


def test_the_panel(notebook: Notebook, folder: str) -> None:
    panel = notebook.do("%lora plan model --batch-size 2 --max-length 32 --panel")
    assert isinstance(panel, PlanPanel) and panel.result.settings.max_length == 32
    assert "peak" in repr(panel)


def test_completion(notebook: Notebook) -> None:
    assert "plan" in notebook.complete("%lora pl")
    assert "model" in notebook.complete("%lora plan mo")
    assert "quant_type=nf4" in notebook.complete("%lora plan model quant_type=")


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("typed", "name", "gib"),
    [
        ("T4", "T4", 14.74),
        ("rtx4090", "RTX4090", 23.64),
        ("'NVIDIA GeForce RTX 3060'", "RTX3060", 11.75),
        ("A100-80", "A100-80GB", 79.15),
        ("'M2 16GB'", "M2-16GB", 32 / 3),
        ("M3-36GB", "M3-36GB", 27),
    ],
)
def test_devices_by_name(notebook: Notebook, typed: str, name: str, gib: float) -> None:
    plan = notebook.do(f"%lora plan model --max-length 32 --device {typed}")
    assert plan.room.name == name and plan.room.total == pytest.approx(gib * 2**30, abs=2)
    assert plan.fits and f"of {name}" in str(plan)
    assert any("CUDA" in note for note in plan.notes) is not name.startswith("M")


def test_a_device_that_is_not_known(notebook: Notebook) -> None:
    assert "Did you mean 'A100-40GB' or 'A100-80GB'?" in notebook.run("%lora plan model --device A100").line
    assert "'RTX4090'" in notebook.run("%lora plan model --device RTX4091").line
    assert "T4" in notebook.complete("%lora plan model --device T")
    assert notebook.do("%lora plan model --max-length 32 --device this-machine").room.name == "this machine (CPU)"


@pytest.mark.slow
def test_rows_that_are_given_say_how_long_sequences_are(adapted: Notebook) -> None:
    adapted["rows"] = [{"input_ids": [1] * length} for length in (9, 4, 12, 7)]
    assert adapted.do("%lora plan model --data rows --batch-size 2").settings.max_length == 12
    packed = adapted.do("%lora plan model --data rows --batch-size 2 --max-length 16 --packing")
    assert (packed.settings.max_length, packed.settings.packing) == (16, True)


@pytest.mark.slow
def test_a_plan_for_one_of_several_processes(bare: Notebook, folder: str) -> None:
    alone = bare.do(f"%lora plan {folder} --batch-size 1 --max-length 64")
    one = bare.do(f"%lora plan {folder} --batch-size 1 --max-length 64 --processes 4 fsdp=True")
    sizes = [{part.name: part.byte_count for part in plan.parts} for plan in (alone, one)]
    assert sizes[1]["base weights"] == -(-sizes[0]["base weights"] // 4)
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    outside = sizes[0]["base weights"] - 32 * layer
    assert sizes[1]["gathered weights"] == outside + 2 * layer
    assert "one of 4 sharded processes" in str(one.settings)
