"""Adapters of strangers: whatever a folder holds, one short error or a model that can go back."""

from __future__ import annotations

import functools
import os
import random
import resource
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from nbpeft.errors import NbpeftError
from tests.effort import drawn, effort
from tests.fuzz import corpus
from tests.fuzz.entry_points import Ways
from tests.fuzz.mutations import mutated
from tests.fuzz.starts import CONFIG, KINDS, METHODS, WEIGHTS, write_method_starts, write_starts

COUNT = effort(quick=200, full=1_000, long=10_000)
OF_A_METHOD = effort(quick=1, full=6, long=200)
NOT_ALONE: tuple[str, ...] = ()
"""Methods that no folder of an adapter is of."""
FIRST = int(os.environ.get("NBPEFT_FUZZ_FROM", "0"))
"""The first seed; a failure names the one to start from."""
SECONDS = 2.0
MEGABYTES = 600
LONGEST = 520
"""CharTokenizer of a message."""
BLOCKS = 10


class HangError(BaseException):
    """A call takes for ever."""


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Ways:
    starts = tmp_path_factory.mktemp("starts")
    write_starts(starts)
    return Ways(starts)


@pytest.fixture
def stopped_when_it_hangs() -> Iterator[None]:
    """Ends a call by a signal after several times the seconds of processor time it may take."""

    def stop(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGVTALRM, stop)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def outcome(way: Callable[[Path], None], folder: Path) -> str:
    """What is wrong with how a call ended; empty if nothing is."""
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem = ""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        signal.setitimer(signal.ITIMER_VIRTUAL, 4 * SECONDS)
        try:
            way(folder)
        except NbpeftError as error:
            if len(str(error)) > LONGEST or "\n" in str(error):
                problem = f"a message of {len(str(error))} letters: {str(error)[:300]!r}"
        except HangError:
            problem = "hangs"
        except AssertionError as error:
            problem = str(error)
        except BaseException:
            problem = "".join(traceback.format_exc().splitlines(keepends=True)[-7:])
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    seconds = time.process_time() - begun
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if not problem and seconds > SECONDS:
        problem = f"takes {seconds:.1f} s"
    if not problem and grown > MEGABYTES:
        problem = f"takes {grown:.0f} MB"
    long = [str(one.message) for one in told if len(str(one.message)) > 2 * LONGEST and "nbpeft" in one.filename]
    return problem or (f"a warning of {len(long[0])} letters: {long[0][:200]!r}" if long else "")


def refused(way: Callable[[Path], None], folder: Path) -> None:
    """Takes a folder in a way that must refuse it."""
    way(folder)
    raise AssertionError("was not refused")


@pytest.mark.parametrize(
    ("name", "how"), [*((CONFIG, how) for how in corpus.CONFIGS), *((WEIGHTS, how) for how in corpus.WEIGHTS)]
)
def test_a_file_that_once_failed_is_refused_in_every_way(
    ways: Ways, stopped_when_it_hangs: None, tmp_path: Path, name: str, how: str
) -> None:
    shutil.copytree(ways.starts / "lora", tmp_path / "folder")
    content = corpus.CONFIGS[how][0].encode() if name == CONFIG else corpus.WEIGHTS[how][0]
    (tmp_path / "folder" / name).write_bytes(content)
    readers = [way for way in ways.all() if name == CONFIG or way not in ("config", "preview")]
    for way in drawn(readers, quick=2, seed=crc32(how.encode())):
        assert not outcome(functools.partial(refused, ways.all()[way]), tmp_path / "folder"), way


@pytest.mark.drawn(5)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_folder_is_refused_in_one_line_or_can_be_taken_back(
    ways: Ways, stopped_when_it_hangs: None, tmp_path: Path, block: int
) -> None:
    seeds = range(FIRST + block * COUNT // BLOCKS, FIRST + (block + 1) * COUNT // BLOCKS)
    try_folders(ways, [ways.starts / kind for kind in (*KINDS, "legacy")], seeds, tmp_path)


@pytest.mark.drawn(20)
@pytest.mark.parametrize("label", METHODS)
def test_a_folder_of_any_method_is_refused_or_can_be_taken_back(
    ways: Ways, stopped_when_it_hangs: None, tmp_path: Path, label: str
) -> None:
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "base").symlink_to(ways.starts / "base")
    starts = write_method_starts(tmp_path / "starts", label)
    assert starts or label in NOT_ALONE, "no sample config goes on the base"
    if starts:
        try_folders(ways, starts, range(FIRST, FIRST + OF_A_METHOD), tmp_path)


def try_folders(ways: Ways, starts: Sequence[Path], seeds: Iterable[int], tmp_path: Path) -> None:
    """Loads a mutated folder for each seed in some of the ways, all of them in the long run."""
    before = [(name, needed, value.clone()) for name, needed, value in ways.state()]
    for seed in seeds:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        folder = tmp_path / f"f{seed}"
        done = mutated(draw.choice(starts), folder, draw)
        known = ways.all()
        for name in draw.sample(sorted(known), len(known) if COUNT == 10_000 else 2):
            problem = outcome(known[name], folder)
            now = ways.state()
            same = [key for key, _, _ in now] == [key for key, _, _ in before] and all(
                needed == was and torch.equal(value, old)
                for (_, needed, value), (_, was, old) in zip(now, before, strict=True)
            )
            assert not problem and same, (
                f"NBPEFT_FUZZ_FROM={seed}, {name}, {', '.join(done)}: {problem or 'the model is not as it was'}"
            )
        assert not (folder / "executed").exists(), f"seed {seed}: a pickle was executed"
        shutil.rmtree(folder)
