"""Blocks of ``use`` and ``disabled``: nested, overlapping, in threads and asyncio tasks."""

from __future__ import annotations

import asyncio
import copy
import random
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from nbpeft import LoraConfig, PeftModel, get_peft_model
from nbpeft.errors import AdapterError, BusyError
from tests.closeness import assert_close
from tests.effort import effort
from tests.waiting import PATIENCE

IDS = torch.arange(6.0).view(2, 3)
LEGAL = ("a", "b", None)


def adapted() -> PeftModel:
    """A model with ``a``, which is active and trains, and ``b``."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), config, adapter_name="a")
    model.add_adapter("b", config)
    return model


def outputs(model: PeftModel) -> dict[str | None, torch.Tensor]:
    """What each choice gives; None is the base alone."""
    found: dict[str | None, torch.Tensor] = {}
    for name in LEGAL:
        with chosen(model, name):
            found[name] = output(model)
    return found


def output(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS)
    return result


def chosen(model: PeftModel, name: str | None) -> Any:
    return model.disable_adapter() if name is None else model.use(name)


@contextmanager
def elsewhere(model: PeftModel, name: str | None) -> Iterator[None]:
    """Another thread is inside a block while this one runs."""
    inside, leave = threading.Event(), threading.Event()

    def block() -> None:
        with chosen(model, name):
            inside.set()
            leave.wait(PATIENCE)

    thread = threading.Thread(target=block)
    thread.start()
    inside.wait(PATIENCE)
    yield
    leave.set()
    thread.join(PATIENCE)


def flags(model: PeftModel) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def test_a_block_holds_for_its_own_thread() -> None:
    model = adapted()
    legal, before = outputs(model), flags(model)
    for name in (None, "b"):
        with elsewhere(model, name):
            assert torch.equal(output(model), legal["a"])
            assert (model.active_adapter, model.manager.enabled) == ("a", True)
            with chosen(model, "b"):
                assert torch.equal(output(model), legal["b"])
    assert torch.equal(output(model), legal["a"])
    assert (model.active_adapter, model.manager.enabled, flags(model)) == ("a", True, before)


def test_blocks_nest_and_overlap() -> None:
    model = adapted()
    legal = outputs(model)
    with model.use("b"):
        with model.disable_adapter():
            assert torch.equal(output(model), legal[None])
            with model.use("a"):
                assert torch.equal(output(model), legal["a"])
            assert torch.equal(output(model), legal[None])
        assert torch.equal(output(model), legal["b"])
    first, second = model.use("b"), model.disable_adapter()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(output(model), legal[None])
    second.__exit__(None, None, None)
    assert torch.equal(output(model), legal["a"])
    assert model.manager.active_state.scopes == ()


def test_an_error_in_a_block_ends_it_and_one_at_its_start_opens_none() -> None:
    model = adapted()
    legal = outputs(model)
    with pytest.raises(ZeroDivisionError), model.use("b"):
        raise ZeroDivisionError
    with pytest.raises(Exception, match="nowhere"), model.use("nowhere"):
        raise AssertionError
    assert torch.equal(output(model), legal["a"])
    assert model.manager.active_state.scopes == ()


def test_a_choice_made_in_a_block_ends_with_it() -> None:
    model = adapted()
    legal = outputs(model)
    with model.use("a"):
        model.set_adapter("b")
        assert torch.equal(output(model), legal["b"])
    assert torch.equal(output(model), legal["a"])
    with model.disable_adapter():
        model.base_model.enable_adapter_layers()
        assert torch.equal(output(model), legal["a"])
    assert torch.equal(output(model), legal["a"])
    with model.disable_adapter():  # as in PEFT
        model.set_adapter("b")
        assert torch.equal(output(model), legal[None])
    assert torch.equal(output(model), legal["b"]) and model.active_adapter == "b"


def test_an_adapter_trains_where_it_is_used() -> None:
    model = adapted()
    before = flags(model)
    with model.use("b"):
        model(IDS).sum().backward()
        assert all(parameter.grad is not None for parameter in model.manager.parameters("b"))
    assert flags(model) == before


def test_it_can_be_a_decorator() -> None:
    model = adapted()
    legal = outputs(model)
    assert torch.equal(model.disable_adapter()(lambda: output(model))(), legal[None])


def test_merged_adapters_stay_active_outside_of_a_block() -> None:
    model = adapted()
    legal = outputs(model)
    model.merge_adapter()
    merged = output(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with elsewhere(model, None):
            assert torch.equal(output(model), legal["a"])
            with model.use("b"):
                assert torch.equal(output(model), legal["b"])
            assert not model.manager.merged
            with pytest.raises(BusyError, match="block is open"):
                model.merge_adapter()
            with pytest.raises(BusyError, match="block is open"):
                model.unload()
    assert model.manager.merged == ("a",)
    assert torch.equal(output(model), merged)


def test_recomputing_in_autograds_threads_uses_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    seen: list[tuple[str, ...]] = []
    with model.use("b"):
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
        thread = threading.Thread(target=lambda: seen.append(model.manager.active_state.current().names))
        thread.start()
        thread.join(PATIENCE)
    assert seen == [("b",)]


def test_compiled_code_sees_the_block() -> None:
    model = adapted()
    legal = outputs(model)
    compiled = torch.compile(model, backend="eager")
    for name in ("a", None, "b", "a"):
        with chosen(model, name), torch.no_grad():
            assert_close(compiled(IDS), legal[name])
    with torch.no_grad():
        assert_close(compiled(IDS), legal["a"])


def test_tasks_have_blocks_of_their_own() -> None:
    model = adapted()
    legal = outputs(model)

    async def task(name: str | None) -> None:
        for _ in range(3):
            with chosen(model, name):
                await asyncio.sleep(0)
                assert torch.equal(output(model), legal[name])
            await asyncio.sleep(0)
            assert torch.equal(output(model), legal["a"])

    async def main() -> None:
        await asyncio.gather(*(task(name) for name in LEGAL))

    asyncio.run(main())
    assert torch.equal(output(model), legal["a"])


def test_threads_and_tasks_with_nested_blocks_see_their_own_state_only() -> None:
    model = adapted()
    legal, before = outputs(model), flags(model)
    rounds = range(effort(quick=30, full=600, long=2_000))
    errors: list[str] = []

    def look(name: str | None) -> None:
        if not torch.equal(output(model), legal[name]):
            errors.append(f"not the output of {name!r}")

    def thread(seed: int) -> None:
        draw = random.Random(seed)
        for _ in rounds:
            with ExitStack() as stack:
                look("a")
                for name in draw.choices(LEGAL, k=draw.randint(1, 4)):
                    stack.enter_context(chosen(model, name))
                    look(name)
            look("a")

    async def task(seed: int) -> None:
        draw = random.Random(seed)
        for _ in rounds:
            with chosen(model, first := draw.choice(LEGAL)):
                await asyncio.sleep(0)
                look(first)
                with chosen(model, second := draw.choice(LEGAL)):
                    await asyncio.sleep(0)
                    look(second)
                await asyncio.sleep(0)
                look(first)
            await asyncio.sleep(0)
            look("a")

    async def main() -> None:
        await asyncio.gather(*(task(seed) for seed in range(4)))

    threads = [threading.Thread(target=thread, args=(seed,)) for seed in range(4)]
    threads.append(threading.Thread(target=lambda: asyncio.run(main())))
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert errors == []
    assert (model.active_adapter, model.manager.enabled, flags(model)) == ("a", True, before)
    assert model.manager.active_state.scopes == ()
    assert torch.equal(output(model), legal["a"])


def test_replicas_of_data_parallel_act_as_the_thread_that_makes_them_says() -> None:
    model = adapted()
    layer: Any = model.get_base_model()[0]
    for name, names in (("b", ("b",)), (None, ()), ("a", ("a",))):
        with chosen(model, name):
            replica = layer._replicate_for_data_parallel()
        seen: list[tuple[str, ...]] = []
        thread = threading.Thread(target=lambda: seen.append(replica.active_state.current().names))  # noqa: B023
        thread.start()
        thread.join(PATIENCE)
        assert seen == [names]


def test_a_block_is_open_once() -> None:
    model = adapted()
    block = model.use("b")
    with block, pytest.raises(AdapterError, match="open already"), block:
        raise AssertionError
    assert model.manager.active_state.scopes == () and model.active_adapter == "a"


def test_a_task_that_outlives_a_block_goes_on_without_it() -> None:
    model = adapted()
    legal = outputs(model)

    async def late(go: asyncio.Event) -> torch.Tensor:
        await go.wait()
        model.set_adapter("b")
        return output(model)

    async def main() -> torch.Tensor:
        go = asyncio.Event()
        with model.disable_adapter():
            task = asyncio.create_task(late(go))
            await asyncio.sleep(0)
        go.set()
        return await task

    assert torch.equal(asyncio.run(main()), legal["b"])
    assert model.active_adapter == "b"


def test_what_trains_is_afterwards_as_before() -> None:
    model = adapted()
    model.set_requires_grad("b", True)
    before = flags(model)
    revision = model.manager.revision
    with model.use("b"):
        pass
    with model.disable_adapter():
        pass
    assert flags(model) == before and model.manager.revision == revision


def test_a_block_without_adapters_leaves_their_gradients_to_other_threads() -> None:
    """PEFT freezes them inside the block: a thread in the middle of its step would lose gradients without a word."""
    model = adapted()
    before = flags(model)
    loss = model(IDS).sum()
    with elsewhere(model, None):
        assert flags(model) == before
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.manager.parameters("a"))


def test_a_copy_made_inside_a_block_is_of_the_model_outside() -> None:
    model = adapted()
    legal = outputs(model)
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with model.disable_adapter():
            twin = copy.deepcopy(model)
    assert twin.manager.merged == () and torch.equal(output(twin), legal["a"])
    twin.manager.set_scale("a", 2.0)


def test_compiled_models_serve_rows_by_their_adapters() -> None:
    model = adapted().eval()
    legal = outputs(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for names in (["a", "b"], ["b", "__base__"], ["__base__", "a"]):
            rows = compiled(IDS, adapter_names=names)
            for place, name in enumerate(names):
                assert_close(rows[place], legal[None if name == "__base__" else name][place])


def test_what_a_block_freezes_trains_afterwards() -> None:
    model = adapted()
    model.set_requires_grad("b", True)
    before = flags(model)
    with model.use("b"):
        for parameter in model.manager.parameters("b"):
            parameter.requires_grad_(False)
    assert flags(model) == before


def test_a_block_that_cannot_open_was_never_open(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    manager, trains, expected = model.manager, flags(model), outputs(model)
    block, errors = model.use("b"), iter([MemoryError("at the start"), MemoryError("at the end")])

    def fail(*_: Any) -> None:
        raise next(errors)

    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="at the start"):
        patch.setattr(type(manager), "refresh", fail)
        block.__enter__()
    assert [str(error) for error in errors] == ["at the end"]  # nothing was closed
    assert manager.active_state.scopes == () and flags(model) == trains
    assert torch.equal(output(model), expected["a"])
    with block:
        assert torch.equal(output(model), expected["b"])
