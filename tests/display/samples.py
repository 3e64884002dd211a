"""One of every result and state that is shown, made of given words. Needs no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nbpeft.display.blocks import Block, TokenSpan
from nbpeft.display.memory import memory_bar
from nbpeft.display.models import model_card
from nbpeft.display.shown import Shown
from nbpeft.display.training import training_card
from nbpeft.engine.hotswap import Swapped
from nbpeft.memory.suggest import Suggestion
from nbpeft.model.combine.combining import Combined
from nbpeft.model.saving.merge_export import LayerError, MergedFolder, MergeErrors
from nbpeft.scoring.items import MetricFacts, ScoreItem
from nbpeft.scoring.result import ScoreResult
from nbpeft.session.results import (
    AddResult,
    Check,
    CombineResult,
    CommandResult,
    CompareResult,
    DataResult,
    DoctorReport,
    ExportResult,
    InspectResult,
    LoadResult,
    MemoryReport,
    MergedCopy,
    ModelRef,
    PlanResult,
    Preview,
    PreviewRow,
    QloraPreview,
    QloraResult,
    SavedAdapter,
    SaveResult,
    StatusReport,
    SwapResult,
    UnloadResult,
)
from nbpeft.session.results.comparing import Answer, Column
from nbpeft.session.results.planning import PlanSettings, Room
from nbpeft.state import AdapterState, LayerChange, LayerLoss, MemoryPart, ModelState, SessionState, StoredPart
from nbpeft.training.data.summary import DataSummary, RowSummary
from nbpeft.training.monitor.result import TrainResult
from tests.widgets.answering import ANSWERS, PROMPT
from tests.widgets.fakes import ADAPTERS, MEMORY, model, train_state


class Thing:
    """Something that can be referred to weakly."""


def plan_result(word: str = "model", room: Room | None = None) -> PlanResult:
    """A plan that does not fit, unless there is room."""
    parts = (
        MemoryPart("base weights", 6_700_000_000, word),
        MemoryPart("adapters", 160_000_000),
        MemoryPart("gradients", 160_000_000),
        MemoryPart("optimizer", 320_000_000),
        MemoryPart("activations", 5_200_000_000, "kept for backward"),
        MemoryPart("temporary", 1_400_000_000, "logits, loss and single layers at the peak"),
    )
    changes = (
        Suggestion("batch_size 8 -> 4", 3_000_000_000, 10_900_000_000, f"{word}: half as many rows a step", True),
        Suggestion("gradient_checkpointing on", 4_800_000_000, 9_100_000_000, "a third more time", True),
        Suggestion("r 16 -> 4", 400_000_000, 13_500_000_000, "", False),
    )
    settings = PlanSettings(8, 1024, 16, "bfloat16", "nf4", False, "adamw")
    there = room or Room("12.0 GB", 12_000_000_000)
    return PlanResult(
        word, "LlamaForCausalLM", "LoRA r=16", settings, parts, there, changes, notes=(f"{word} is assumed",)
    )


def results(word: str = "orders") -> dict[str, Shown]:
    """Every kind of result by name; ``word`` stands for whatever a person may have typed."""
    return {**_of_adapters(word), **_of_answers_and_layers(word), **_of_plans(word)}


def _data(word: str) -> DataResult:
    """Data of which a row is cut and another is left out."""
    spans = (
        TokenSpan("<s>", special=True),
        TokenSpan(word),
        TokenSpan(f"{word}\nyes", learned=True),
        TokenSpan(word, compared=True),
    )
    cut = (*spans, TokenSpan("", skipped=7), TokenSpan(word, learned=True, cut=True))
    rows = (
        RowSummary(0, 12, 4, 0, "", spans),
        RowSummary(1, 16, 4, 9, "", cut, spans),
        RowSummary(2, 3, 0, 0, f"{word} is empty", spans),
    )
    bins = ((0, 8, 1), (9, 16, 1), (17, 24, 0), (25, 32, 1))
    return DataResult(
        word,
        DataSummary(word, 2, 28, 8, 1, 9, f"row 2: {word} is empty", 1, 25, 12, 16, bins, rows, partial=True),
    )


def _scores(word: str) -> ScoreResult:
    """Scores of one item that an adapter fixed, and the loss on further rows."""
    values = {word: {"base": 0.0, word: 1.0}}
    item = ScoreItem(3, word, word, {"base": f"no {word}", word: word}, values, frozenset([word]))
    facts = MetricFacts(word)
    further = ScoreResult(word, ("base", word), (facts,), word, (item,), 1, notes=(word,))
    return ScoreResult(word, ("base", word), (facts,), word, (item,), 1, notes=(word,), elsewhere=further)


def _of_adapters(word: str) -> dict[str, Shown]:
    adapter, state, notes = _adapter(word), _state(word), (f"{word} has a note",)
    idle = dataclasses.replace(adapter, active=False)
    saved = SavedAdapter(word, f"a/folder_of/{word}", ("adapter_config.json", word), 19_537_920)
    train = train_state(40, 40, status="finished", adapter=word, remaining=None)
    return {
        "add": AddResult(ModelRef(Thing()), word, adapter, state, reconfigured=True, notes=notes),
        "done": CommandResult(f"{word} is used", state, notes=notes),
        "load": LoadResult(ModelRef(Thing()), word, f"adapters/{word}", idle, state),
        "save": SaveResult(word, (saved,)),
        "export": ExportResult("train.py", word, (("train.jsonl", 200),), notes=notes),
        "unload": UnloadResult(ModelRef(Thing()), word, (word, "pirate"), (word,), notes=notes),
        "status": StatusReport(SessionState((state, model("second", ADAPTERS[1:], memory=MEMORY)), word)),
        "status of nothing": StatusReport(SessionState()),
        "memory": MemoryReport(dataclasses.replace(MEMORY, device=word, peak=600_000_000)),
        "doctor": DoctorReport((Check("torch", "2.9"), Check(word, "", "needed", f"pip install {word}"))),
        "train": TrainResult("finished", word, 40, 40, 0.084, 0.102, 82.0, 9000, 241.0, f"out/{word}", train, word),
    }


def _of_answers_and_layers(word: str) -> dict[str, Shown]:
    adapter, state, notes = _adapter(word), _state(word), (f"{word} has a note",)
    other = ANSWERS["orders"].replace("12", "13")
    answers = {**ANSWERS, word: ANSWERS["orders"] + word, "orders (1 / 0.5)": other}
    columns = tuple(
        Column(name, (), (Answer(text, 12, True), Answer(word, 1, cut=True)), form="chat template not applied")
        for name, text in answers.items()
    )
    path = "model.layers.{}.self_attn.{}_proj"
    changes = tuple(
        LayerChange(path.format(block, kind), 0.01 * (block + 1) * (1 + place), 1.0, 3, 16)
        for place, kind in enumerate("qkvo")
        for block in range(30)
    )
    lost = tuple(LayerLoss(path.format(block, "q"), 16, 0.02 * block, 1 - 0.01 * block) for block in range(4))
    errors = (LayerError(path.format(0, "q"), 1e-6, 0.09, 1.0, 1.0), LayerError(word, 2e-6, 0.12, 1.0, 1.0))
    return {
        "combine": CombineResult(
            word, ((word, 0.7), ("pirate", -0.3)), adapter, Combined(word, "exact", 16, 0.04, 0.99, lost), state,
            notes=notes,
        ),
        "swap": SwapResult(
            word, f"adapters/{word}", adapter, Swapped(word, 60, ("lm_head",), ()), 0.012, state,
            PROMPT + word, ANSWERS["orders"], other + word, notes=notes,
        ),
        "scores": _scores(word),
        "compare": CompareResult(word, (PROMPT, word), columns, 1.94, 1, notes=notes),
        "data": _data(word),
        "inspect": InspectResult(word, word, changes, notes=notes),
        "merge": MergedCopy(
            word,
            MergedFolder(
                Path("merged", word), (word,), (), 269_000_000, (269_000_000,), "bfloat16",
                MergeErrors(errors, "bfloat16"),
            ),
        ),
    }  # fmt: skip


def _of_plans(word: str) -> dict[str, Shown]:
    rows = tuple(PreviewRow(f"{kind}_proj", 30, ("576 × 576", "192 × 576"), (16,), 829_440, word) for kind in "qv")
    preview = Preview(
        word, word, "LoRA", rows, ("lm_head",), 2, (word,), 1_658_880, 134_515_008, 6_635_520, 19_906_560,
        memory=plan_result(word),
    )  # fmt: skip
    parts = (
        StoredPart("quantized layers", 210, 55_100_000, 212_400_000, ("nf4 double",), 212_400_000),
        StoredPart("embedding", 1, 56_600_000, 56_600_000, ("bfloat16", word), 56_600_000),
        StoredPart("norms and biases", 61, 140_000, 70_000, ("float32",), 70_000),
    )
    added = AddResult(ModelRef(Thing()), word, _adapter(word), _state(word))
    return {
        "plan": plan_result(word),
        "plan that fits": plan_result(word, Room("cuda:0 of this machine", 24_000_000_000, 9_000_000_000)),
        "preview": preview,
        "quantize": QloraResult(ModelRef(Thing()), added, word, True, parts, "61 tensors in float32", 0, 4.2),
        "preview of quantizing": QloraPreview(word, "load and quantize", parts, "61 tensors in float32", preview),
    }


def _adapter(word: str) -> AdapterState:
    return dataclasses.replace(ADAPTERS[0], name=word)


def _state(word: str) -> ModelState:
    return model(word, (_adapter(word), *ADAPTERS[1:]), active=(word,))


def states(word: str = "orders") -> dict[str, Block]:
    """Every state as it is drawn."""
    return {
        "model": model_card(model(word, memory=MEMORY), hint=word),
        "no model": model_card(None, word),
        "memory bar": memory_bar(dataclasses.replace(MEMORY, device=word)),
        "run": training_card(train_state(25, 40, adapter=word), model_name=word, hint=word),
        "failed run": training_card(train_state(7, 40, adapter=word, status="failed", message=word)),
        "finished run": training_card(train_state(40, 40, adapter=word, status="finished", remaining=None)),
    }
