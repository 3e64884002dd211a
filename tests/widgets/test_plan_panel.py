"""The plan panel: moves are answered by a worker, the newest first, and nothing is left behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import ipywidgets
import pytest
from transformers import LlamaConfig

from nbpeft.session import Session
from nbpeft.session.commands.planning import MemoryPlanner
from nbpeft.widgets import PlanPanel, close_all
from tests.waiting import PATIENCE, wait_until
from tests.widgets.support import parts, text

pytestmark = pytest.mark.usefixtures("no_widget_stays")

CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
    architectures=["LlamaForCausalLM"],
)  # fmt: skip


@pytest.fixture(scope="module")
def planner() -> MemoryPlanner:
    fields = {"r": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return Session().memory_planner(CONFIG, fields, batch_size=4, max_length=256, device="20MB", variable="model")


@pytest.fixture
def panel(planner: MemoryPlanner) -> Iterator[PlanPanel]:
    made = PlanPanel(planner, ui="widgets")
    assert made.widget is not None
    yield made
    made.close()
    assert made.wait(PATIENCE)


def answered(panel: PlanPanel, **settings: Any) -> bool:
    """Waits until the plan of these settings is shown, whether or not changes are still being looked for."""

    def shown() -> bool:
        asked = all(getattr(panel.result.settings, name) == value for name, value in settings.items())
        return asked and "computing …" not in text(panel)

    wait_until(shown)
    return True


def test_it_begins_with_the_settings_asked_for(panel: PlanPanel) -> None:
    assert [slider.value for slider in parts(panel, ipywidgets.SelectionSlider)] == [4, 256, 8]
    assert "Memory plan for model" in text(panel) and "LlamaForCausalLM, LoRA r=8" in text(panel)
    assert f"peak {panel.result.peak_bytes / 1e6:.1f} MB" in text(panel)


def test_a_move_is_answered(panel: PlanPanel, planner: MemoryPlanner) -> None:
    batch, length, rank = parts(panel, ipywidgets.SelectionSlider)
    before = panel.result.peak_bytes
    length.value = 1024
    assert "computing …" in text(panel)
    assert answered(panel, max_length=1024)
    assert panel.result.peak_bytes > before
    assert "no room for" in text(panel)
    batch.value = 1
    rank.value = 64
    assert answered(panel, batch_size=1, rank=64)
    assert "LoRA r=64" in text(panel)
    assert planner.plan(panel.result.settings, suggest=False).parts == panel.result.parts


def test_the_optimizer_counts(panel: PlanPanel) -> None:
    optimizer = parts(panel, ipywidgets.Dropdown)[3]
    before = panel.result.peak_bytes
    optimizer.value = "sgd"
    assert answered(panel, optim="sgd") and panel.result.peak_bytes < before


@pytest.mark.slow
def test_a_switch_counts(panel: PlanPanel) -> None:
    (again,) = parts(panel, ipywidgets.Checkbox)
    before = panel.result
    again.value = True
    assert answered(panel, gradient_checkpointing=True) and panel.result.peak_bytes < before.peak_bytes
    again.value = False
    assert answered(panel, gradient_checkpointing=False) and panel.result.parts == before.parts


@pytest.mark.slow
def test_what_could_be_changed_follows(panel: PlanPanel) -> None:
    parts(panel, ipywidgets.SelectionSlider)[1].value = 1024
    assert panel.wait(PATIENCE)
    assert panel.result.settings.max_length == 1024 and panel.result.changes
    assert "still too much" in text(panel) or "fits" in text(panel)


@pytest.mark.slow
def test_a_move_stops_what_is_computed_for_an_older_one(panel: PlanPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    running, let_go, seen = threading.Event(), threading.Event(), []
    real = MemoryPlanner.plan

    def slow(planner: MemoryPlanner, settings: Any, **options: Any) -> Any:
        if settings.batch_size == 2:
            running.set()
            assert let_go.wait(PATIENCE)
            seen.append(options.get("stopped", lambda: None)())
        return real(planner, settings, suggest=False)

    assert panel.wait(PATIENCE)
    monkeypatch.setattr(MemoryPlanner, "plan", slow)
    batch = parts(panel, ipywidgets.SelectionSlider)[0]
    batch.value = 2
    assert running.wait(PATIENCE)
    batch.value = 3
    let_go.set()
    assert panel.wait(PATIENCE)
    assert panel.result.settings.batch_size == 3 and seen[-1] is True
    assert "computing …" not in text(panel)


@pytest.mark.slow
def test_what_is_moved_meanwhile_counts(panel: PlanPanel) -> None:
    kind, dtype = parts(panel, ipywidgets.Dropdown)[2], parts(panel, ipywidgets.Dropdown)[1]
    kind.value = "int8"
    dtype.value = "bfloat16"
    parts(panel, ipywidgets.SelectionSlider)[0].value = 8
    assert answered(panel, batch_size=8)
    found = panel.result.settings
    assert (found.quantization, found.dtype, found.batch_size) == ("int8", "bfloat16", 8)
    assert "computing …" not in text(panel)


def test_errors_are_shown_in_the_panel(panel: PlanPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no <such> thing")

    assert panel.wait(PATIENCE)
    monkeypatch.setattr(MemoryPlanner, "plan", fail)
    parts(panel, ipywidgets.SelectionSlider)[0].value = 2
    assert panel.wait(PATIENCE)
    assert "computing …" not in text(panel)
    assert "ValueError: no &lt;such&gt; thing" in text(panel)


def test_static_forms(planner: MemoryPlanner) -> None:
    page = PlanPanel(planner, ui="html")._repr_mimebundle_()
    assert set(page) == {"text/plain", "text/html"} and "base weights" in page["text/html"]
    words = PlanPanel(planner, ui="text")._repr_mimebundle_()
    assert set(words) == {"text/plain"} and "peak" in words["text/plain"]
    panel = PlanPanel(planner, ui="widgets")
    bundle = panel._repr_mimebundle_()
    assert "peak" in bundle["text/html"] and "Run the cell again" in bundle["text/html"]
    panel.close()
    assert panel.closed and panel.wait(PATIENCE)


def test_one_panel_a_model_and_close_all(planner: MemoryPlanner) -> None:
    first, second = (PlanPanel(planner, ui="widgets") for _ in range(2))
    assert first.widget is not None and second.widget is not None
    assert first.closed and not second.closed
    close_all()
    assert second.closed
    gone = weakref.ref(second)
    assert second.wait(PATIENCE)
    del first, second
    gc.collect()
    assert gone() is None


def test_inference_has_no_training_choices() -> None:
    planner = Session().memory_planner(CONFIG, None, training=False, max_length=64, variable="reading")
    panel = PlanPanel(planner, ui="widgets")
    try:
        assert len(parts(panel, ipywidgets.Dropdown)) == 3 and not parts(panel, ipywidgets.Checkbox)
        assert "KV cache" in text(panel)
    finally:
        panel.close()
        assert panel.wait(PATIENCE)


def test_the_device_can_be_chosen(panel: PlanPanel) -> None:
    device = parts(panel, ipywidgets.Dropdown)[0]
    assert [label for label, _ in device.options][:2] == ["this machine", "20.0 MB"] and device.value == ""
    device.value = "T4"
    assert panel.wait(PATIENCE) and panel.result.room.name == "T4" and panel.result.fits
    device.value = ""
    assert panel.wait(PATIENCE) and panel.result.room.name == "20.0 MB"
