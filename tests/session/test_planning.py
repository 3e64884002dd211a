"""Plans: what fits, what exceeds, and planners that answer at once."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from nbpeft.errors import AdapterError, ConfigError
from nbpeft.memory import forecast
from nbpeft.memory.suggest import Suggestion, suggest
from nbpeft.session import Session
from nbpeft.session.commands.planning import _room
from nbpeft.session.configs import build_config
from nbpeft.session.results.planning import PlanResult, PlanSettings, Room
from nbpeft.state import MemoryPart
from nbpeft.training import Trainer
from nbpeft.training.data.reading import default_length
from nbpeft.training.transformers.arguments import build_arguments
from tests.pretend_cpu import pretend_cpu

CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
FIELDS: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}
SETTINGS = PlanSettings(4, 1024, 16, "bfloat16", "nf4", True, "adamw")


def plan(*sizes: int, room: Room, **more: Any) -> PlanResult:
    names = ("base weights", "adapters", "optimizer", "activations")
    parts = tuple(MemoryPart(name, size) for name, size in zip(names, sizes, strict=False))
    return PlanResult("model", "Llama", "LoRA r=16", SETTINGS, parts, room, **more)


@pytest.mark.parametrize(("named", "held"), [("cuda", 400), ("cuda:1", 400), ("cuda:0", 0), (None, 400)])
def test_what_the_model_holds_on_a_gpu_however_it_is_named(
    named: str | None, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = torch.nn.Module()
    monkeypatch.setattr(
        source, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda:1"), nbytes=400)])
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 450)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 400)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    room = _room(named, source)
    assert (room.total, room.free, room.held) == (1000, 550, held)


@pytest.mark.slow
def test_a_dtype_that_the_processor_is_slow_in_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "this CPU has no instructions for bfloat16; float32 is many times faster"
    pretend_cpu(monkeypatch)
    settings: dict[str, Any] = {"batch_size": 1, "max_length": 16, "suggest": False}
    session = Session()
    slow = session.plan(CONFIG, FIELDS, dtype="bfloat16", device="cpu", **settings)
    assert any(told in note for note in slow.notes) and told in str(slow) and told in slow._repr_html_()
    for found in (
        session.plan(CONFIG, FIELDS, dtype="float32", device="cpu", **settings),
        session.plan(CONFIG, FIELDS, dtype="bfloat16", device="16GB", **settings),
    ):
        assert told not in str(found)
    pretend_cpu(monkeypatch, onednn=[torch.bfloat16])
    assert told not in str(session.plan(CONFIG, FIELDS, dtype="bfloat16", device="cpu", **settings))


def test_changes_are_suggested_only_if_it_does_not_fit() -> None:
    sizes: dict[str, Any] = {"batch_size": 2, "max_length": 32}
    assert not Session().plan(CONFIG, FIELDS, device="1GB", **sizes).changes
    assert Session().plan(CONFIG, FIELDS, device="1kB", **sizes).changes


def test_what_exceeds() -> None:
    found = plan(600, 100, 100, 400, room=Room("1 kB", 1000))
    assert (found.peak_bytes, found.fits, found.excess) == (1200, False, 200)
    assert found.exceeding == (("activations", 200),)
    assert plan(600, 100, 100, 400, room=Room("x", 650)).exceeding == (
        ("adapters", 50), ("optimizer", 100), ("activations", 400),
    )  # fmt: skip
    assert plan(600, 100, 100, 400, room=Room("x", 1200)).exceeding == ()
    assert plan(600, room=Room("nowhere")).fits is None


def test_what_is_free_now_counts_with_what_the_model_holds() -> None:
    sizes = (600, 100, 100, 400)
    assert plan(*sizes, room=Room("cpu", 4000, 700, held=600)).fits_now is True
    scarce = plan(*sizes, room=Room("this machine (CPU)", 4000, 500, held=600))
    assert scarce.fits and scarce.fits_now is False
    assert "would fit 4.0 kB of this machine (CPU), but 500 B are free now and 600 B more are needed" in str(scarce)


def test_words_and_page() -> None:
    changes = (Suggestion("batch_size 4 -> 2", 300, 900, "x < y", True), Suggestion("r 16 -> 4", 50, 1150, "", False))
    found = plan(600, 100, 100, 400, room=Room("1.0 kB", 1000), changes=changes, notes=("<note>",))
    lines = str(found).split("\n")
    assert lines[0] == (
        "model (batch 4, length 1024, rank 16, nf4 + bfloat16, gradient checkpointing, adamw): peak 1.2 kB "
        "(base weights 600 B, adapters 100 B, optimizer 100 B, activations 400 B); does not fit 1.0 kB: 200 B too much "
        "[note: <note>]"
    )
    assert lines[1:] == [
        "  no room for: activations (200 B)",
        "  batch_size 4 -> 2 saves 300 B and x < y; then it fits",
        "  r 16 -> 4 saves 50 B",
    ]
    page = found._repr_html_()
    assert "x &lt; y" in page and "&lt;note&gt;" in page and "<note>" not in page
    assert "too much" in page and "width:83.33%" in page  # the device ends at 1000 of 1200
    hopeless = plan(600, 100, 100, 400, room=Room("x", 1000), changes=changes[1:])
    assert "no change of these settings makes it fit" in str(hopeless)
    fits = plan(600, 100, 100, 400, room=Room("x", 2000), changes=changes)
    assert "then it fits" not in str(fits) and "too much" not in fits._repr_html_()


def test_plans_of_a_session(tmp_path: Any) -> None:
    session = Session()
    model = LlamaForCausalLM(CONFIG)
    sizes: dict[str, Any] = {"max_length": 64, "batch_size": 2, "device": "1GB", "suggest": False}
    with pytest.raises(AdapterError):
        session.plan()
    revision = session.state.revision
    bare = session.plan(model, FIELDS, **sizes)
    assert bare.model_name == "LlamaForCausalLM" and bare.settings.rank == 4 and not bare.notes[1:]
    assert session.state.revision == revision and not session.names
    added = session.add(model, FIELDS, name="sql", variable="model")
    assert session.plan(**sizes).parts == bare.parts
    assert session.plan(added.model, **sizes).parts == bare.parts
    assert session.plan("model", **sizes).model_name == "model"
    CONFIG.save_pretrained(tmp_path)
    assert session.plan(str(tmp_path), FIELDS, **sizes).parts == bare.parts
    with pytest.raises(ConfigError, match="batch_size is 0"):
        session.plan(model, FIELDS, batch_size=0)


@pytest.mark.slow
def test_a_plan_counts_what_the_trainer_computes() -> None:
    session, model = Session(), LlamaForCausalLM(CONFIG)
    sizes: dict[str, Any] = {"max_length": 64, "batch_size": 8}
    usual = session.plan(model, FIELDS, suggest=False, **sizes)
    assert session.plan(model, FIELDS, suggest=False, trainer_class=Trainer, **sizes).parts == usual.parts
    other = session.plan(model, FIELDS, suggest=False, trainer_class=transformers.Trainer, **sizes)
    whole = forecast(model, build_config(FIELDS), loss_chunk_size=0, recompute=False, **sizes)
    assert other.parts == whole.parts and other.peak_bytes > usual.peak_bytes
    assert "complete logits are counted" in str(other.notes) and "logits" not in str(usual.notes)


def test_a_model_is_planned_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpu(monkeypatch, onednn=[torch.bfloat16])
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    found = Session().plan(model, FIELDS, suggest=False)
    assert found.settings.dtype == "bfloat16" and found.settings.gradient_checkpointing
    assert found.settings.max_length == 512
    assert found.notes == ("batch 8 and length 512 are assumed, as in training",)


def test_a_quantized_model_is_planned_as_it_is() -> None:
    pytest.importorskip("bitsandbytes")
    from nbpeft.model.quantization.quantize import quantize_model

    model = LlamaForCausalLM(copy.deepcopy(CONFIG)).to(torch.bfloat16)
    quantize_model(model, bits=4)
    found = Session().plan(model, FIELDS, suggest=False, max_length=64)
    assert found.settings.quantization == "nf4"


@pytest.mark.slow
def test_a_planner_answers_for_other_settings() -> None:
    config = LlamaConfig(**(CONFIG.to_dict() | {"intermediate_size": 144}))
    planner = Session().memory_planner(config, FIELDS, batch_size=2, max_length=48, device="20MB")
    settings = dataclasses.replace(planner.settings, batch_size=3, max_length=80, rank=2)
    found = planner.plan(settings)
    plan = Session().plan(config, FIELDS | {"r": 2}, batch_size=3, max_length=80, device="20MB")
    assert found.parts == plan.parts and found.changes == plan.changes
    assert found.settings == settings and found.adapter == "LoRA r=2"
    assert found.notes == ("allow 0.5 to 1 GB more for the CUDA context and fragmentation",)


def test_a_card_without_bfloat16_is_told() -> None:
    def notes(dtype: str, device: str) -> str:
        return str(Session().plan(CONFIG, FIELDS, dtype=dtype, device=device, suggest=False).notes)

    told = "T4 has no bfloat16: load the model in float16, which takes the same memory"
    assert told in notes("bfloat16", "T4")
    assert "no bfloat16" not in notes("float16", "T4") + notes("float32", "T4") + notes("bfloat16", "L4")


@pytest.mark.slow
def test_such_a_card_is_suggested_float16() -> None:
    for device, half in (("T4", "float16"), ("L4", "bfloat16")):
        planner = Session().memory_planner(CONFIG, FIELDS, max_length=48, dtype="float32", device=device)
        assert any(change.change == f"dtype float32 -> {half}" for change in suggest(planner.setting, 2**20))


@pytest.mark.slow
def test_looking_for_changes_can_be_stopped() -> None:
    planner = Session().memory_planner(CONFIG, FIELDS, batch_size=2, max_length=48, device="1MB")
    asked: list[int] = []
    found = planner.plan(planner.settings, stopped=lambda: bool(asked.append(1)) or len(asked) > 1)
    assert len(found.changes) <= 1 < len(planner.plan(planner.settings).changes)


def test_a_rank_is_varied_where_one_holds_for_all_of_the_adapter() -> None:
    planner = Session().memory_planner(CONFIG, FIELDS | {"rank_pattern": {"q_proj": 2}}, max_length=16)
    assert planner.settings.rank is None
    assert planner.plan(planner.settings, suggest=False).parts == planner.plan(suggest=False).parts


@pytest.mark.slow
def test_rows_say_how_long_sequences_are(session: Session) -> None:
    rows = [{"input_ids": [1] * length} for length in (30, 40, 20, 50)]

    def plan(**settings: Any) -> PlanResult:
        return session.plan(CONFIG, FIELDS, data=rows, suggest=False, **settings)

    def found(**settings: Any) -> PlanSettings:
        return plan(**settings).settings

    assert found().max_length == 50 and not found().packing
    assert "length 50 is the longest of 4 rows, whose median is 30" in plan().notes
    assert "length 140 is the fullest of 1 packed sequence" in plan(packing=True).notes
    packed = found(packing=True, max_length=70)
    assert packed.max_length == 70 and packed.packing and ", packed, " in str(packed)
    assert found(packing=True).max_length == 140
    with pytest.raises(ConfigError, match="packing is 1; expected True or False"):
        session.plan(CONFIG, FIELDS, packing=1)


def test_a_reference_that_no_training_could_have_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(ConfigError, match=r"one of 'base', 'start', not 'strat'\. Did you mean 'start'"):
        Session().plan(CONFIG, FIELDS, reference="strat")


def test_plans_and_forecasts_have_the_defaults_of_a_training() -> None:
    trained = build_arguments({}, TrainingArguments, folder="unused", evaluates=False)
    longest = LlamaConfig(**{**CONFIG.to_dict(), "max_position_embeddings": 4096})
    planned = Session().plan(longest, FIELDS, suggest=False).settings
    foreseen = forecast(longest, build_config(FIELDS)).setting
    for setting in (planned, foreseen):
        assert setting.batch_size == trained.per_device_train_batch_size
        assert setting.max_length == default_length(None)
        assert setting.gradient_checkpointing is trained.gradient_checkpointing
