"""Out of memory, with a limit on the allocator: one line, a usable model, and the next setting runs."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import transformers

from nbpeft.errors import TrainingError
from nbpeft.memory import forecast
from nbpeft.model.quantization.quantize import quantize_model
from nbpeft.state import MemoryPart, MemoryState, TrainState
from nbpeft.sweeps import sweep
from nbpeft.training import start_run, train
from nbpeft.training.monitor import failures
from nbpeft.training.monitor.failures import free_memory
from tests.closeness import assert_approximates
from tests.model.allocations import Allocations
from tests.tiny_models import llama
from tests.training.support import trainable, weights

LENGTH = 48
QUICK: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3}


def rows(count: int = 16) -> list[dict[str, Any]]:
    return [{"input_ids": [(start + step) % 90 for step in range(LENGTH)]} for start in range(count)]


def needed(model: Any, batch_size: int, **more: Any) -> int:
    """What a step allocates beyond the weights, by forecast."""
    told = forecast(
        model, model.peft_config["default"], batch_size=batch_size, max_length=LENGTH, dtype="float32", **more
    )
    return sum(part.byte_count for part in told.parts if part.name not in ("base weights", "adapters"))


@pytest.fixture
def model() -> Any:
    return trainable(llama(num_hidden_layers=4), target_modules="all-linear", r=8)


def test_one_line_then_the_next_setting_runs(model: Any) -> None:
    before = weights(model)
    states: list[TrainState] = []
    limit = (needed(model, 16) + needed(model, 8)) // 2
    kept: list[Any] = []

    class Watching(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            held = torch.zeros(1)
            kept.append(weakref.ref(held))
            return super().compute_loss(model, inputs, *args, **kwargs)

    with Allocations(limit) as allocator:
        with pytest.raises(TrainingError) as caught:
            train(
                model,
                rows(),
                trainer_class=Watching,
                publish=states.append,
                per_device_train_batch_size=16,
                **QUICK,
            )
        line = str(caught.value)
        assert line.startswith("Out of memory in ") and "\n" not in line
        assert f"at batch size 16 and {LENGTH} tokens per row" in line
        assert "activations kept for backward need" in line and "base weights" in line
        assert "per_device_train_batch_size 16 -> 8 saves" in line and "gradient_checkpointing=True saves" in line
        assert states[-1].status == "failed" and states[-1].message == line
        assert caught.value.__context__ is None and caught.value.__cause__ is None
        assert kept[0]() is None, "the failed step is let go"
        assert all(parameter.grad is None for parameter in model.parameters())
        assert allocator.now < limit / 10
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
        done = train(model, rows(), per_device_train_batch_size=8, **QUICK)
    assert done.status == "finished" and done.steps == 2
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.slow
def test_what_is_promised_is_true(model: Any) -> None:
    """The bytes that a change saves are what the allocator sees."""
    with Allocations(needed(model, 16) // 2), pytest.raises(TrainingError) as caught:
        train(model, rows(), per_device_train_batch_size=16, **QUICK)
    promised = {one.change: one.saved_bytes for one in caught.value.details["suggestions"]}
    peaks = {}
    for name, changes in {"now": {}, "half": {"per_device_train_batch_size": 8}}.items():
        with Allocations() as counted:
            train(model, rows(), **{"per_device_train_batch_size": 16, **QUICK, **changes})
        peaks[name] = counted.peak
    assert_approximates(peaks["now"] - peaks["half"], promised["batch_size 16 -> 8"], 0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "own"),
    [
        ({"loss_chunk_size": 64, "recompute": False}, {"loss_chunk_size": 64, "recompute": False}),
        ({"trainer_class": transformers.Trainer}, {"loss_chunk_size": 0, "recompute": False}),
        ({"learning_rate": sweep(0.1, 0.2)}, {"num_adapters": 2}),
    ],
    ids=["chunks", "of another library", "sweep"],
)
def test_the_report_counts_what_the_run_computes(model: Any, given: dict[str, Any], own: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"batch_size": 16, "max_length": LENGTH, "dtype": "float32"}
    told = forecast(model, model.peft_config["default"], **sizes, **own)
    with Allocations(needed(model, 16) // 4), pytest.raises(TrainingError) as caught:
        train(model, rows(), per_device_train_batch_size=16, **QUICK | given)
    assert caught.value.details["parts"] == {part.name: part.byte_count for part in told.parts}
    assert told.parts != forecast(model, model.peft_config["default"], **sizes).parts


@pytest.mark.slow
def test_a_quantized_model_and_checkpointing(model: Any) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = trainable(quantize_model(llama(num_hidden_layers=6, hidden_size=64)), target_modules="all-linear", r=4)
    fields = {"per_device_train_batch_size": 16, **QUICK}
    with Allocations() as free:
        train(quantized, rows(), gradient_checkpointing=True, **fields)
    with Allocations(free.peak + 1_000) as limited:
        with pytest.raises(TrainingError, match="gradient_checkpointing=True saves") as caught:
            train(quantized, rows(), **fields)
        assert caught.value.details["parts"]["base weights"] > 0
        assert limited.now == 0, (
            "nothing of the failed run is left while its error is kept, its copy of weights neither"
        )
        assert train(quantized, rows(), gradient_checkpointing=True, **fields).status == "finished"


class HungryOptimizer(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.slow
def test_the_optimizer_can_be_what_grew(model: Any) -> None:
    hungry = HungryOptimizer([p for p in model.parameters() if p.requires_grad])
    hungry.step.__func__.__code__ = hungry.step.__func__.__code__.replace(co_filename="/x/torch/optim/adamw.py")
    with pytest.raises(TrainingError, match="in the optimizer's step") as caught:
        train(model, rows(), optimizers=(hungry, None), per_device_train_batch_size=2, **QUICK)
    assert "the optimizer's state needs" in str(caught.value) and "r 8 -> 4 saves" in str(caught.value)
    assert "per_device_train_batch_size" not in str(caught.value)


@pytest.mark.slow
def test_evaluation(model: Any) -> None:
    class Hungry(transformers.Trainer):
        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            raise MemoryError

    with pytest.raises(TrainingError, match="in evaluation") as caught:
        train(
            model,
            rows(),
            rows(4),
            trainer_class=Hungry,
            per_device_eval_batch_size=4,
            eval_steps=1,
            **QUICK,
        )
    assert "per_device_eval_batch_size 4 -> 2" in str(caught.value)
    assert train(model, rows(), per_device_train_batch_size=2, **QUICK).status == "finished"


def test_a_model_that_cannot_be_foreseen_is_measured() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(8, 8)

        def forward(self, input_ids: Any, labels: Any = None, **rest: Any) -> Any:
            self.proj(torch.nn.functional.one_hot(input_ids % 8, 8).float())
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    model = trainable(Net(), target_modules=["proj"])
    states: list[TrainState] = []
    with pytest.raises(TrainingError, match="lower the batch size") as caught:
        train(model, rows(4), publish=states.append, per_device_train_batch_size=4, **QUICK)
    assert "took" in str(caught.value) and caught.value.details["suggestions"] == ()
    assert states[-1].status == "failed"


def test_a_loop_of_ones_own_is_told_what_had_grown(model: Any) -> None:
    batch = torch.randint(90, (16, LENGTH))
    run = start_run(model, total_steps=2)
    with (
        Allocations((needed(model, 16) + needed(model, 8)) // 2),
        pytest.raises(RuntimeError, match="memory"),
        run,
    ):
        model(input_ids=batch, labels=batch).loss.backward()
    told = run.state.message
    assert run.state.status == "failed" and "\n" not in told
    assert told.startswith("Out of memory in ") and "activations and temporary tensors took" in told
    assert "base weights" in told and "lower the batch size" in told


@pytest.mark.parametrize(
    ("device", "total", "told"),
    [("cuda:0", 8_000, " on a device of 8.0 kB"), ("cuda:0", None, ""), ("cpu", 8_000, "")],
)
def test_what_needs_most_is_told_with_the_memory_of_an_accelerator(device: str, total: int | None, told: str) -> None:
    parts = MemoryPart("base weights", 1_000), MemoryPart("activations", 5_000)
    measured = MemoryState(device, (), total, None)
    assert failures._largest_part(parts, measured, "forward", estimated=True) == (
        f"activations kept for backward need 5.0 kB of 6.0 kB{told} (the rest: base weights 1.0 kB)"
    )


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_cached_memory_is_given_back_on_every_kind_of_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    for name in ("cuda", "xpu", "mps"):
        library = getattr(torch, name)
        monkeypatch.setattr(library, "is_available", lambda name=name: name == device)
        monkeypatch.setattr(library, "empty_cache", lambda name=name: emptied.append(name))
    free_memory()
    assert emptied == [device]
