"""A click while the model generates: every answer is one adapter's, never a blend of two.

``NBPEFT_THREADS_SECONDS`` sets how long the threads run in the slow test (10, in ``--long`` 600).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nbpeft.model import PeftModel, hotswap_adapter
from tests.closeness import assert_close, is_close
from tests.effort import effort
from tests.model.pool_support import save
from tests.tiny_models import adapted, llama, tokens
from tests.waiting import PATIENCE

SECONDS = float(os.environ.get("NBPEFT_THREADS_SECONDS", effort(quick=10, full=10, long=600)))
NAMES = ("left", "right", "middle")


def answer(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Scores of every generated token, (tokens, rows, vocabulary): unlike the tokens they show any blend."""
    made = model.generate(
        input_ids=ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True, **options
    )
    return torch.stack(made.scores)


def alone(folder: Path, ids: Tensor, scale: float = 1.0) -> Tensor:
    model = PeftModel.from_pretrained(llama(), folder)
    model.manager.set_scale("default", scale)
    return answer(model, ids)


def run_against(
    work: Callable[[int], None],
    generate: Callable[[int], None],
    seconds: float,
    *,
    times: int = 5,
    turns: int = 3,
    enough: Callable[[], bool] = lambda: True,
) -> None:
    """``work`` in a second thread while ``generate`` runs in this one.

    For so many seconds, and on a slow machine until both were done more than so many times and
    have met often ``enough``.
    """
    stop = threading.Event()
    problems: list[BaseException] = []
    done = 0

    def loop() -> None:
        nonlocal done
        try:
            while not stop.is_set():
                work(done)
                done += 1
                time.sleep(0.002)
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    end, turn = time.monotonic() + seconds, 0
    try:
        while not problems and (time.monotonic() < end or done <= times or turn <= turns or not enough()):
            assert time.monotonic() < end + PATIENCE, f"worked {done} times beside {turn} generations"
            generate(turn)
            turn += 1
    finally:
        stop.set()
        thread.join(PATIENCE)
    assert not problems and not thread.is_alive(), problems


def which(found: Tensor, known: dict[str, Tensor]) -> str:
    """The one adapter that an answer is of."""
    matching = [name for name, scores in known.items() if is_close(found, scores)]
    assert len(matching) == 1, f"the answer is that of {matching or 'no single adapter'}"
    return matching[0]


def switching_and_swapping(root: Path, seconds: float) -> None:
    ids = tokens(rows=2, length=5)
    model = adapted(name="left")
    folders = {name: save(root / name, seed, r=4) for seed, name in enumerate(NAMES)}
    sources = [save(root / f"new{seed}", seed, r=rank) for seed, rank in ((10, 4), (11, 2), (12, 7))]
    hotswap_adapter(model, folders["left"], "left")
    for name in NAMES[1:]:
        model.load_adapter(folders[name], name)
    known = {name: alone(folder, ids) for name, folder in folders.items()}
    known |= {source.name: alone(source, ids) for source in sources}
    known["base"] = answer(llama(), ids)
    known["left at a half"] = alone(folders["left"], ids, scale=0.5)
    seen: set[str] = set()

    def work(turn: int) -> None:
        if turn % 5 == 0:
            hotswap_adapter(model, sources[turn // 5 % 3], "middle")
        elif turn % 5 == 1:
            # Not while it is active: two commands in a row may have an answer between them.
            model.manager.activate("right")
            model.manager.set_scale("left", 0.5 if turn % 2 else 1.0)
        elif turn % 5 == 2:
            (model.manager.disable if turn % 3 else model.manager.enable)()
        else:
            model.manager.activate(NAMES[turn % 3])

    def generate(turn: int) -> None:
        seen.add(which(answer(model, ids), known))

    run_against(work, generate, seconds, times=50, turns=12, enough=lambda: len(seen) >= 4)


@pytest.mark.slow
def test_every_generation_is_one_adapter(tmp_path: Path) -> None:
    switching_and_swapping(tmp_path, 3)


@pytest.mark.slow
def test_every_generation_is_one_adapter_for_longer(tmp_path: Path) -> None:
    switching_and_swapping(tmp_path, SECONDS)


def test_rows_of_a_mixed_batch_keep_their_adapters(tmp_path: Path) -> None:
    """Adapters are taken out and put back, renamed and swapped meanwhile: a row gets its own or an error."""
    ids = tokens(rows=2, length=5)
    folders = {name: save(tmp_path / name, seed) for seed, name in enumerate(NAMES)}
    known = {name: alone(folder, ids) for name, folder in folders.items()}
    model = adapted(name="own")
    for name, folder in folders.items():
        model.load_adapter(folder, name)
    refused = 0

    def work(turn: int) -> None:
        if turn % 2:
            model.delete_adapter("right")
            time.sleep(0.001)
            model.load_adapter(folders["right"], "right")
        else:
            model.manager.rename("middle", "elsewhere")
            hotswap_adapter(model, folders["middle"], "elsewhere")
            model.manager.rename("elsewhere", "middle")

    def generate(turn: int) -> None:
        nonlocal refused
        names = [NAMES[turn % 3], NAMES[(turn + 1) % 3]]
        try:
            found = answer(model, ids, adapter_names=names)
        except ValueError as error:
            assert "not found" in str(error)
            refused += 1
            return
        for row, name in enumerate(names):
            assert_close(found[:, row], known[name][:, row])

    run_against(work, generate, 2)


@pytest.mark.slow
def test_merging_while_generating(tmp_path: Path) -> None:
    ids = tokens(rows=1, length=4)
    folders = {name: save(tmp_path / name, seed) for seed, name in enumerate(NAMES)}
    known = {name: alone(folder, ids) for name, folder in folders.items()} | {"base": answer(llama(), ids)}
    model = PeftModel.from_pretrained(llama(), folders["left"], "left")
    for name in NAMES[1:]:
        model.load_adapter(folders[name], name)
    seen: set[str] = set()

    def work(turn: int) -> None:
        if model.manager.merged:
            model.unmerge_adapter()
        else:
            model.set_adapter(NAMES[turn % 3])
            model.merge_adapter()

    run_against(work, lambda turn: seen.add(which(answer(model, ids), known)), 2, enough=lambda: len(seen) >= 2)
