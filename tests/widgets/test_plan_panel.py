"""The plan panel: moves are answered at once or by a worker, and nothing is left behind."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from typing import Any

import ipywidgets
import pytest
from transformers import LlamaConfig

from nbpeft.session import Session
from nbpeft.session.commands.planning import MemoryPlanner
from nbpeft.widgets import PlanPanel, close_all
from nbpeft.widgets.environment import WIDGET_VIEW
from tests.widgets.test_adapters_panel import walk

pytestmark = pytest.mark.usefixtures("no_widget_stays")

CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
    architectures=["LlamaForCausalLM"],
)  # fmt: skip


@pytest.fixture(scope="module")
def planner() -> MemoryPlanner:
    fields = {"r": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return Session().memory_planner(CONFIG, fields, batch_size=4, sequence_length=256, device="20MB", variable="model")


@pytest.fixture
def panel(planner: MemoryPlanner) -> Iterator[PlanPanel]:
    made = PlanPanel(planner, ui="widgets", prefetch=False)
    assert made.widget is not None
    assert made.wait()
    yield made
    made.close()
    assert made.wait()


def parts(panel: PlanPanel, kind: type) -> list[Any]:
    return [part for part in walk(panel.widget) if isinstance(part, kind)]


def text(panel: PlanPanel) -> str:
    return "\n".join(part.value for part in parts(panel, ipywidgets.HTML))


def test_it_begins_with_the_settings_asked_for(panel: PlanPanel) -> None:
    assert [slider.value for slider in parts(panel, ipywidgets.SelectionSlider)] == [4, 256, 8]
    assert "memory plan · model" in text(panel) and "LlamaForCausalLM · LoRA r=8" in text(panel)
    assert f"peak {panel.result.peak_bytes / 1e6:.1f} MB" in text(panel)


def test_a_move_is_answered_at_once(panel: PlanPanel, planner: MemoryPlanner) -> None:
    batch, length, rank = parts(panel, ipywidgets.SelectionSlider)
    before = panel.result.peak_bytes
    length.value = 1024
    assert panel.result.settings.sequence_length == 1024 and panel.result.peak_bytes > before
    assert "no room for" in text(panel)
    batch.value = 1
    rank.value = 64
    assert (panel.result.settings.batch_size, panel.result.settings.rank) == (1, 64)
    assert "LoRA r=64" in text(panel)
    exact = planner.exact(panel.result.settings, suggest=False)
    assert abs(exact.peak_bytes - panel.result.peak_bytes) < 0.01 * exact.peak_bytes


def test_the_optimizer_needs_no_preparation(panel: PlanPanel) -> None:
    optimizer = parts(panel, ipywidgets.Dropdown)[2]
    before = panel.result.peak_bytes
    optimizer.value = "sgd"
    assert panel.result.settings.optimizer == "sgd" and panel.result.peak_bytes < before


def test_a_switch_that_is_not_prepared_is_computed_aside(panel: PlanPanel) -> None:
    (again,) = parts(panel, ipywidgets.Checkbox)
    before = panel.result
    again.value = True
    if panel.result is before:
        assert "computing …" in text(panel)
    assert panel.wait()
    assert panel.result.settings.gradient_checkpointing and panel.result.peak_bytes < before.peak_bytes
    assert "computing …" not in text(panel)
    again.value = False
    assert not panel.result.settings.gradient_checkpointing


@pytest.mark.slow
def test_what_is_moved_meanwhile_counts(panel: PlanPanel) -> None:
    kind, dtype = parts(panel, ipywidgets.Dropdown)[1], parts(panel, ipywidgets.Dropdown)[0]
    kind.value = "int8"
    dtype.value = "bfloat16"
    parts(panel, ipywidgets.SelectionSlider)[0].value = 8
    assert panel.wait()
    found = panel.result.settings
    assert (found.quantization, found.dtype, found.batch_size) == ("int8", "bfloat16", 8)
    assert "computing …" not in text(panel)


@pytest.mark.slow
def test_likely_settings_are_prepared(planner: MemoryPlanner) -> None:
    config = LlamaConfig(**(CONFIG.to_dict() | {"intermediate_size": 80}))
    other = Session().memory_planner(config, {"r": 8, "target_modules": ["q_proj"]}, device="1MB", variable="other")
    made = PlanPanel(other, ui="widgets")
    try:
        assert made.widget is not None
        neighbours = other.neighbours(made.result.settings)
        assert other.at_once(neighbours[0]) is None
        deadline = time.monotonic() + 60
        while other.at_once(neighbours[1]) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert other.at_once(neighbours[1]) is not None
    finally:
        made.close()
        assert made.wait()


def test_errors_are_shown_in_the_panel(panel: PlanPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no <such> thing")

    monkeypatch.setattr(MemoryPlanner, "at_once", fail)
    parts(panel, ipywidgets.SelectionSlider)[0].value = 2
    assert "ValueError: no &lt;such&gt; thing" in text(panel)


def test_a_model_that_can_only_be_simulated(panel: PlanPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryPlanner, "prepare", lambda *_: False)
    monkeypatch.setattr(MemoryPlanner, "at_once", lambda *_: None)
    parts(panel, ipywidgets.SelectionSlider)[0].value = 2
    assert panel.wait()
    assert panel.result.settings.batch_size == 2 and "computing …" not in text(panel)


def test_static_forms(planner: MemoryPlanner) -> None:
    page = PlanPanel(planner, ui="html")._repr_mimebundle_()
    assert set(page) == {"text/plain", "text/html"} and "base weights" in page["text/html"]
    words = PlanPanel(planner, ui="text")._repr_mimebundle_()
    assert set(words) == {"text/plain"} and "peak" in words["text/plain"]
    panel = PlanPanel(planner, ui="widgets", prefetch=False)
    bundle = panel._repr_mimebundle_()
    assert WIDGET_VIEW in bundle and "Run the cell again" in bundle["text/html"]
    panel.close()
    assert panel.closed and WIDGET_VIEW not in panel._repr_mimebundle_()
    assert panel.wait()


def test_one_panel_a_model_and_close_all(planner: MemoryPlanner) -> None:
    first, second = (PlanPanel(planner, ui="widgets", prefetch=False) for _ in range(2))
    assert first.widget is not None and second.widget is not None
    assert first.closed and not second.closed
    close_all()
    assert second.closed
    gone = weakref.ref(second)
    assert second.wait()
    del first, second
    gc.collect()
    assert gone() is None


def test_inference_has_no_training_choices() -> None:
    planner = Session().memory_planner(CONFIG, None, training=False, sequence_length=64, variable="reading")
    panel = PlanPanel(planner, ui="widgets", prefetch=False)
    try:
        assert len(parts(panel, ipywidgets.Dropdown)) == 2 and not parts(panel, ipywidgets.Checkbox)
        assert "KV cache" in text(panel)
    finally:
        panel.close()
        assert panel.wait()
