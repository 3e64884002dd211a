"""Training in several processes from one that waits: what comes of it is what one process learns."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nbpeft.checkpoint.tensor_file import read_metadata
from nbpeft.errors import TrainingError
from nbpeft.model.quantization.quantize import quantize_model
from nbpeft.runs.folder import RunFolder
from nbpeft.training import RunControl, train
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close
from tests.runs.killed import session_in
from tests.tiny_models import VOCABULARY, llama, same_state
from tests.training.launch.callbacks import BreaksInTheSecond, FailsInTheSecond, HoldsAShareOfTheCodes, of_the_row
from tests.training.support import trainable, weights

ARGUMENTS: dict[str, Any] = {"max_steps": 24, "learning_rate": 0.01}
TWO: dict[str, Any] = {"processes": 2, "per_device_train_batch_size": 2}
ONE: dict[str, Any] = {"per_device_train_batch_size": 4}


def rows(count: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (count, 8), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found[name], tensor)


@pytest.mark.slow
@pytest.mark.slice
def test_two_processes_learn_what_one_does_on_the_same_batches(tmp_path: Path) -> None:
    alone, apart = trainable(lora_dropout=0.0), trainable(lora_dropout=0.0)
    weighted = [{**row, "weight": 1 + place % 3, "id": place} for place, row in enumerate(rows())]
    expected = train(alone, weighted, rows(4), **ONE, **ARGUMENTS)
    vars(apart)["_is_accelerate_prepared"] = True  # as a Trainer of transformers leaves it
    control, seen = RunControl(), []

    def publish(state: Any) -> None:
        seen.append(state.status)
        if state.step and "pausing" not in seen:
            control.pause()
        if state.status == "paused":
            control.request_save()
            control.resume()

    result = train(apart, weighted, rows(4), run_dir=tmp_path, control=control, publish=publish, **TWO, **ARGUMENTS)
    assert (result.status, result.steps, result.token_count) == ("finished", 24, expected.token_count)
    for (step, mine), (other, theirs) in zip(result.state.history, expected.state.history, strict=True):
        assert step == other
        assert_close(mine, theirs)
    assert_close(result.eval_loss, expected.eval_loss)
    close(weights(apart), weights(alone))
    assert seen[-1] == "finished" and "paused" in seen
    (folder,) = tmp_path.glob("default-*")
    facts = RunFolder(folder).facts()
    assert (facts["status"], facts["step"], facts["arguments"]["processes"]) == ("finished", 24, 2)
    assert [entry["step"] for entry in RunFolder(folder).entries() if "loss" in entry] == list(range(1, 25))
    assert all(message.count("columns not used: 'id'") == 1 for message in (result.message, facts["message"]))
    assert "saved in" in result.message and list(folder.glob("default-step-*/adapter_model.safetensors"))
    assert result.state.folder == str(folder) and result.state.memory is not None


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"fsdp": True}], ids=["shared out", "sharded in 4 bits"])
def test_two_processes_score_what_one_does(options: dict[str, Any]) -> None:
    """If sharded, each has half of the 4-bit codes of the base."""
    bases, codes = [llama(), llama()], 0
    if options:
        pytest.importorskip("bitsandbytes")
        bases = [quantize_model(base) for base in bases]
        packed = [part for part in bases[1].parameters() if type(part).__name__ == "Params4bit"]
        codes = sum(part.nbytes for part in packed)
    held_out = [{"prompt": f"{number} is", "completion": "ab"} for number in range(5)]
    scored = {"score": held_out, "metric": [of_the_row, "loss"], "every": 4, "patience": 2}
    given = {"tokenizer": CharTokenizer(), "max_steps": 8, "learning_rate": 0.01, "seed": 7, **scored}
    alone, apart = (trainable(base, lora_dropout=0.0) for base in bases)
    expected = train(alone, rows(), **ONE, **given)
    result = train(apart, rows(), callbacks=[HoldsAShareOfTheCodes(codes)], **TWO, **options, **given)
    losses = [[loss for _, loss in training.state.history] for training in (result, expected)]
    assert_close(losses[0], losses[1])
    close(weights(apart), weights(alone))
    curve = dict(result.state.metric_history["of_the_row"])
    assert list(curve) == [4, 8] and "no scores" not in result.message
    assert curve == pytest.approx(dict(expected.state.metric_history["of_the_row"]))
    assert_close(dict(result.state.eval_history), dict(expected.state.eval_history))
    assert result.best_step == expected.best_step


def test_a_metric_of_the_notebook_cannot_be_sent_to_other_processes() -> None:
    held_out = [{"prompt": "1 is", "completion": "ab"}]
    with pytest.raises(TrainingError, match="put it into a module"):
        train(trainable(), rows(), tokenizer=CharTokenizer(), score=held_out, metric=lambda answer, row: 1.0, **TWO)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Training stopped")
def test_a_loss_that_one_process_loses_ends_all(tmp_path: Path) -> None:
    """The same ones in both; what comes back to the one that waits are those."""
    model = trainable()
    result = train(model, rows(), run_dir=tmp_path, trainer_class=BreaksInTheSecond, **TWO, **ARGUMENTS)
    assert (result.status, result.steps) == ("stopped", 7) and result.kept_step <= 5
    words = f"the weights of step {result.kept_step}" if result.kept_step else "the initial weights"
    assert result.message.endswith(
        "stopped at step 7: the loss is NaN or infinite: try a lower learning rate, or check the labels · "
        f"{words}, the last good ones, were restored"
    )
    assert all(bool(value.isfinite().all()) for value in weights(model).values())
    (folder,) = tmp_path.glob("default-*")
    facts = RunFolder(folder).facts()
    assert (facts["status"], facts["arguments"]["processes"], facts["objects"]) == ("stopped", 2, ["trainer_class"])


def when_shown(run: Any, step: int, act: Callable[[], None]) -> None:
    mirror = run.mirror

    def mirroring(state: Any) -> None:
        mirror(state)
        if state.step >= step:
            act()

    run.mirror = mirroring


def save_and_stop(run: Any) -> None:
    """Requests the one, and the other when it was done."""
    if not vars(run).setdefault("asked", False):
        run.asked = True
        run.control.request_save()
    elif "saved in" in run.state.message:
        run.control.request_stop()


@pytest.mark.slow
def test_a_sharded_run_is_stopped_and_goes_on_with_every_part_of_it(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_steps": 60, "learning_rate": 0.01, "seed": 7}
    found = []
    for place, options in (("one", ONE), ("two", TWO | {"fsdp": True})):
        session, base = session_in(tmp_path / place), llama()
        torch.manual_seed(11)
        model = session.add(base, {"r": 4, "target_modules": ["q_proj", "v_proj"]}, name="sql", variable="model").model
        if options is ONE:
            session.train(model, rows(), **options, **arguments)
            found.append(weights(model, "sql"))
            continue
        end = session.on_run(lambda run, name: when_shown(run, 1, lambda: save_and_stop(run)))
        stopped = session.train(model, rows(), tokenizer=CharTokenizer(), sample="ab", every=1, **options, **arguments)
        end()
        (saved,) = (tmp_path / "two/sql-1").glob("sql-step-*")
        whole = {name.replace(".sql.", "."): tensor for name, tensor in weights(model, "sql").items()}
        held = load_file(saved / "adapter_model.safetensors")
        assert {name: part.shape for name, part in held.items()} == {name: one.shape for name, one in whole.items()}
        assert all(part.any() for part in held.values()), "each of them had learned"
        assert any(key.startswith("nbpeft.base.") for key in read_metadata(saved / "adapter_model.safetensors"))
        assert stopped.status == "stopped" and 2 <= stopped.steps < 60
        assert stopped.state.samples and not any("no samples" in note for note in (stopped.message,))
        state = tmp_path / f"two/sql-1/checkpoint-{stopped.steps}"
        kept = load_file(state / "sql/adapter_model.safetensors")
        assert same_state({name.replace(".sql.", "."): value for name, value in weights(model, "sql").items()}, kept)
        assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {path.name for path in state.iterdir()}
        result = session.resume(model="model", data=rows(), tokenizer=CharTokenizer(), processes=2, fsdp=True)
        assert (result.step, result.training.steps) == (stopped.steps, 60)
        found.append(weights(model, "sql"))
    close(found[1], found[0])


@pytest.mark.slow
def test_two_processes_learn_what_one_does_on_a_base_in_four_bits() -> None:
    """Each has the base in 4 bits, from one file, and gradients of the adapter alone go between them."""
    pytest.importorskip("bitsandbytes")
    found = []
    for options in (ONE, TWO):
        model = trainable(quantize_model(llama()), target_modules="all-linear", lora_dropout=0.0)
        base = {name: part for name, part in model.named_parameters() if not part.requires_grad}
        before = {name: part.detach().clone() for name, part in base.items()}
        assert any(type(part).__name__ == "Params4bit" for part in base.values())
        result = train(model, rows(), max_steps=12, learning_rate=0.01, **options)
        assert all(torch.equal(part, before[name]) for name, part in base.items())
        found.append((weights(model), [loss for _, loss in result.state.history]))
    close(found[1][0], found[0][0])
    assert_close(found[1][1], found[0][1])
    assert found[0][1][-1] < found[0][1][0]


@pytest.mark.slow
def test_an_error_on_another_host_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    model = trainable()
    before = weights(model)
    others: list[subprocess.Popen[str]] = []

    def start_other(state: Any) -> None:
        script = re.search(r"127\.0\.0\.2: sh (\S+\.sh)", state.message)
        if script and not others:
            others.append(subprocess.Popen(["sh", script[1]], stderr=subprocess.PIPE, text=True))

    with pytest.raises(TrainingError) as caught:
        train(
            model,
            rows(),
            processes=1,
            hosts=["127.0.0.1", "127.0.0.2"],
            run_dir=tmp_path,
            publish=start_other,
            callbacks=[FailsInTheSecond()],
            per_device_train_batch_size=2,
            **ARGUMENTS,
        )
    assert str(caught.value) == "process 1 of 2: ValueError: the second of them is out of rows"
    told = others[0].communicate(timeout=60)[1]
    assert others[0].returncode == 1 and told.startswith("process 1 of 2: ")
    assert same_state(weights(model), before)
    (record,) = (RunFolder(folder).record() for folder in tmp_path.glob("default-*"))
    assert record.status == "failed" and record.message == str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".nbpeft")] == []
