"""Pools and threads: reading ahead, running calls, many at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nbpeft import checkpoint
from nbpeft.errors import (
    AdapterError,
    BusyError,
    CheckpointNotFoundError,
)
from tests.model.pool_support import BYTES, device_bytes, make_alone, make_folders, near, pool_of
from tests.tiny_models import logits, tokens
from tests.waiting import PATIENCE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, Tensor]:
    return make_alone(folders)


def test_prefetch_reads_in_the_background(
    folders: dict[str, Path], alone: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of(folders)
    revision = pool.manager.revision
    readers: list[str] = []
    read = checkpoint.read_checkpoint

    def spy(*args: Any, **options: Any) -> Any:
        readers.append(threading.current_thread().name)
        return read(*args, **options)

    monkeypatch.setattr(checkpoint, "read_checkpoint", spy)
    pool.prefetch(["a", "b", "a"], wait=True)
    assert pool.manager.revision == revision and pool.resident == () and pool.on_host == ("b", "a")
    assert len(readers) == 2 and all(name.startswith("adapter-pool") for name in readers)
    pool.set_adapter("b")
    near(logits(pool.model), alone["b"])
    assert pool.statistics.reads == 2 and pool.statistics.host_hits == 1
    pool.register("lost", folders["a"].parent / "nowhere")
    pool.prefetch("lost")
    with pytest.raises(CheckpointNotFoundError, match="there is no folder"):
        pool.prefetch("lost", wait=True)
    with pytest.raises(CheckpointNotFoundError, match="there is no folder"):
        pool.set_adapter("lost")
    assert pool.manager.active == ("b",)


def test_an_adapter_two_threads_ask_for_is_read_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(folders)
    read, started = checkpoint.read_checkpoint, threading.Event()

    def slow(*args: Any, **options: Any) -> Any:
        started.set()
        time.sleep(0.1)
        return read(*args, **options)

    monkeypatch.setattr(checkpoint, "read_checkpoint", slow)
    pool.prefetch("a")
    assert started.wait(PATIENCE)
    pool.load("a")
    assert pool.statistics.reads == 1 and pool.resident == ("a",) and pool.on_host == ()


def test_a_running_call_keeps_its_adapters(folders: dict[str, Path], alone: dict[str, Tensor]) -> None:
    """Neither the active adapter of a call nor those of its rows are touched before it ends."""
    pool = pool_of(folders, room=1)
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        inside.set()
        assert go_on.wait(PATIENCE)

    layer: Any = pool.manager.model
    handle = layer.model.layers[0].register_forward_pre_hook(pause)
    for options in ({"adapter_names": ["a", "a"]}, {}):
        if not options:
            pool.set_adapter("a")
        found: list[Tensor] = []
        inside.clear()
        go_on.clear()

        def call(options: dict[str, Any] = options, found: list[Tensor] = found) -> None:
            with torch.no_grad():
                found.append(pool.model(input_ids=tokens(), **options).logits)

        first = threading.Thread(target=call)
        first.start()
        assert inside.wait(PATIENCE)
        second = threading.Thread(target=pool.set_adapter, args=("b",))
        second.start()
        second.join(0.2)
        assert second.is_alive() and pool.resident == ("a",)
        go_on.set()
        first.join(PATIENCE)
        second.join(PATIENCE)
        near(found[0], alone["a"])
        assert pool.resident == ("b",) and pool.manager.active == ("b",)
        pool.load("b")
    handle.remove()


def test_a_thread_that_holds_what_is_in_its_own_way_is_told(folders: dict[str, Path]) -> None:
    pool = pool_of(folders, room=1)
    with pool.hold("a"):
        with pytest.raises(AdapterError, match=r"'b' take .* in addition to 'a' \(in use\)"):
            pool.load("b")
        with pytest.raises(BusyError, match="in use by a running call"):
            pool.unregister("a")
    pool.load("b")
    with pool.manager.active_state.call(), pytest.raises(BusyError, match="inside a call"):
        pool.load("a")


def test_many_threads_at_once(folders: dict[str, Path], alone: dict[str, Tensor]) -> None:
    pool = pool_of(folders, room=3, host=2)
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            with torch.no_grad():
                for _ in range(30):
                    names = ["abcdef"[int(torch.randint(6, (), generator=generator))] for _ in range(2)]
                    if seed == 0:
                        pool.set_adapter(names[0])
                        pool.prefetch(names[1])
                        continue
                    found = pool.model(input_ids=tokens(), adapter_names=names).logits
                    for row, name in enumerate(names):
                        near(found[row], alone[name][row])
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not problems and not any(thread.is_alive() for thread in threads)
    assert device_bytes(pool) == pool.statistics.device_bytes <= 3 * BYTES
    assert pool.statistics.host_bytes <= 2 * BYTES
    pool.close()
