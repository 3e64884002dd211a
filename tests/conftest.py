"""What all tests share: repeatable random numbers, no hub, one thread beside other workers."""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib.util
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import pytest

from tests.effort import drawn

if TYPE_CHECKING:
    from tests.checkpoint.loopback import Hub
    from tests.magics.notebook import Notebook

_ended = itertools.count(1)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Where trainings are saved: a folder for each worker, as a worker inherits the environment of the process above it.
os.environ["NBPEFT_RUNS"] = tempfile.mkdtemp(prefix="nbpeft-runs-")
atexit.register(shutil.rmtree, os.environ["NBPEFT_RUNS"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")


def pytest_configure() -> None:
    """Lets interruptions through where a shell started the tests in the background, which ignores them.

    ``NBPEFT_REPACKING`` is 1 or 0: whether bitsandbytes re-packs 4-bit weights, whatever the processor.
    Garbage is not collected until all is imported: nothing of it is garbage, and each pass goes over everything.
    Nothing is flushed to the disk, which would guard against a loss of power alone: what is looked at is which
    calls are made, in which order, and what a process leaves that is killed.
    """
    gc.disable()
    os.fsync = os.fstat  # type: ignore[assignment]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    repacks = os.environ.get("NBPEFT_REPACKING")
    if repacks:
        import_module("tests.pretend_cpu").pretend_repacking(pytest.MonkeyPatch(), repacks == "1")


def pytest_collection_finish() -> None:
    """Spares collections what was imported by now, which stays: going over it takes half a second each time."""
    if "peft" in sys.modules and importlib.util.find_spec("sklearn") is None:
        import_module("tests.kmeans_for_peft").install()
    _freeze()
    gc.enable()  # not before: it would go over everything at once


def _freeze() -> None:
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown() -> None:
    """Forgets an exception that Python takes for one that is still handled.

    CPython leaves it behind where a signal ends an ``except`` clause at its ``return``, as the tests of
    interruptions do; the errors of all later tests in the process would have it as their context.
    """
    ctypes.pythonapi.PyErr_SetHandledException(ctypes.py_object(None))


def pytest_runtest_logfinish() -> None:
    """Spares collections, now and then, modules that tests import on the way."""
    if next(_ended) % 25 == 0:
        _freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves to the quick run as many cases of a test as ``@pytest.mark.drawn(number)`` says."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("drawn"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out: set[pytest.Item] = set()
    for name, here in cases.items():
        (number,) = here[0].get_closest_marker("drawn").args  # type: ignore[union-attr]
        left_out |= set(here) - set(drawn(here, quick=number, seed=crc32(name.encode())))
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Every test leaves the handler of interruptions as it was: one that holds them back makes a kernel deaf."""
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert after == before, f"interruptions go to {after} now"


@pytest.fixture(autouse=True)
def repeatable() -> None:
    """Seeds what draws random numbers, without importing torch for a test that does not."""
    random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's executable; tests/run.py finds or installs one and sets CHROMIUM."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    found = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if found is None:
        pytest.fail("no browser: run the tests with python3 tests/run.py, or set CHROMIUM to a browser's path")
    return found


@pytest.fixture
def bare() -> Iterator[Notebook]:
    """A notebook without a model."""
    from tests.magics.notebook import Notebook

    made = Notebook()
    yield made
    made.close()


@pytest.fixture
def notebook(bare: Notebook) -> Notebook:
    """A notebook whose variable ``model`` holds a tiny Llama."""
    from tests.tiny_models import llama

    bare["model"] = llama()
    return bare


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine, which the Hub's client takes for the real one."""
    from tests.checkpoint.loopback import be_the_hub, serving

    with serving() as running:
        be_the_hub(running, monkeypatch, tmp_path)
        yield running
