"""Any sequence of commands keeps: output = base + sum of the active deltas, and nothing else changes.

The adapters' tensors are made and tracked by the test, the output computed from them in float64.
``NBPEFT_MACHINE_STEPS`` sets the number of steps, ``NBPEFT_MACHINE_SEED`` draws other
sequences than the usual, which are always the same; a failing one is printed as a program.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nbpeft.engine.hotswap import prepare_for_hotswap, swap
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import AdapterError, AdapterExistsError, CheckpointError, HotSwapError, MergeError
from nbpeft.model import PeftModel, hotswap_adapter
from tests.closeness import assert_close
from tests.effort import effort
from tests.faults.harness import FailingAt, traced
from tests.state_machine_model import (
    BASE,
    EQUAL_RANKS,
    IDS,
    ON_DELTAS,
    PATHS,
    Expectation,
    Net,
    Recipe,
    Tracked,
    after_swap,
    base_parameters,
    check_combined,
    check_equal,
    live_tensors,
    read_combined,
    refuses_combining,
)

STEPS = int(os.environ.get("NBPEFT_MACHINE_STEPS", effort(quick=5_000, full=5_000, long=50_000)))
SEED = os.environ.get("NBPEFT_MACHINE_SEED")
LENGTH = 50
NAMES = ("a", "ab", "default", "keys", "lora")
recipes = st.builds(
    Recipe,
    targets=st.sampled_from([PATHS, ("first",), ("embed", "turned"), ("first", "turned")]),
    rank=st.integers(1, 5),
    alpha=st.integers(1, 8),
    dora=st.booleans(),
    rslora=st.booleans(),
    head=st.sampled_from([False, False, True]),
    seed=st.integers(0, 1000),
)
scales = st.sampled_from([1.0, 0.5, -0.75, 2.0, 0.0])
steps_taken = itertools.count()
troubles_met = itertools.count()


@contextmanager
def interrupted(manager: AdapterManager, number: int) -> Iterator[None]:
    """A SIGINT at some line of the package that runs while a command commits.

    Not in the last lines of a transaction: from there on the command has happened.
    """
    left = number

    def visit(file: str, line: int) -> None:
        nonlocal left
        if manager._transaction.is_mine and not file.endswith(("transaction.py", "spill_file.py", "interrupts.py")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGINT)

    with traced(visit):
        yield


ONE_COPY = "only one of them can be active|Only one adapter can be set at a time"
"""Two adapters that each trained a copy of one module are refused with either."""


class AdapterMachine(RuleBasedStateMachine):
    """Commands on one model, and what the test expects of it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = live_tensors()
        self.folder = tempfile.TemporaryDirectory()
        self.saved: dict[Path, Tracked] = {}
        self.numbers = itertools.count()
        model = Net()
        self.handle: Any = PeftModel.over(model, AdapterManager.attach(model))
        self.manager: AdapterManager = self.handle.manager
        self.expected = Expectation()
        self.trouble: AbstractContextManager[object] = nullcontext()

    # Choices

    def pick(self, data: st.DataObject, label: str = "name") -> str:
        return data.draw(st.sampled_from(sorted(self.expected.adapters)), label=label)

    def pick_some(self, data: st.DataObject, names: list[str] | None = None) -> list[str]:
        choice = sorted(self.expected.adapters) if names is None else names
        return data.draw(st.lists(st.sampled_from(choice), min_size=1, max_size=3, unique=True), label="names")

    @property
    def adapters(self) -> dict[str, Tracked]:
        return self.expected.adapters

    def put(self, name: str, tracked: Tracked, *, scale: float = 1.0) -> None:
        """What the engine does with a new adapter, also in the place of another one."""
        tracked.scale = scale
        self.adapters[name] = tracked
        if not self.expected.selected and len(self.adapters) == 1:
            self.expected.selected = (name,)

    # What goes wrong

    @rule(number=st.integers(1, 10), when=st.sampled_from(["before", "behind"]))
    def run_out_of_memory(self, number: int, when: str) -> None:
        """The next command does, once, at an operation on a tensor."""
        self.trouble = FailingAt((number, when))

    @rule(number=st.integers(1, 60))
    def interrupt(self, number: int) -> None:
        """The next command is interrupted while it commits."""
        self.trouble = interrupted(self.manager, number)

    def tried(self, command: Callable[..., Any]) -> Callable[..., Any]:
        """A command that meets the trouble ahead, must then have changed nothing, and is given again."""

        def twice(*args: Any, **kwargs: Any) -> Any:
            trouble, self.trouble = self.trouble, nullcontext()
            revision = self.manager.revision
            try:
                with trouble:
                    return command(*args, **kwargs)
            except KeyboardInterrupt:
                pass
            except Exception:
                if not getattr(trouble, "fired", False):
                    raise
            assert self.manager.revision == revision
            self.output_is_base_and_active_deltas()
            self.nothing_else_changed()
            next(troubles_met)
            return command(*args, **kwargs)

        return twice

    def starts_from_merged(self, tracked: Tracked) -> bool:
        """DoRA's magnitudes are compared with weights that are not the frozen ones now."""
        return tracked.dora and bool(self.merged_paths & set(tracked.parts))

    # Commands

    @initialize(recipe=recipes)
    def start(self, recipe: Recipe) -> None:
        self.tried(self.manager.add)("a", recipe.config(), recipe.tracked().weights())
        self.put("a", recipe.tracked())

    @rule(name=st.sampled_from(NAMES), recipe=recipes, replace=st.booleans())
    def add(self, name: str, recipe: Recipe, replace: bool) -> None:
        tracked = recipe.tracked()
        arguments: Any = (name, recipe.config(), tracked.weights())
        if name in self.adapters and not replace:
            with pytest.raises(AdapterExistsError):
                self.tried(self.manager.add)(*arguments)
        elif name in self.expected.merged or self.starts_from_merged(tracked):
            with pytest.raises(MergeError):
                self.tried(self.manager.add)(*arguments, replace=replace)
        else:
            self.tried(self.manager.add)(*arguments, replace=replace)
            self.put(name, tracked)

    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        names = self.pick_some(data) if self.adapters else []
        if not names or self.expected.several_heads(names):
            with pytest.raises(AdapterError, match=rf"no adapter to activate was named|{ONE_COPY}"):
                self.tried(self.manager.activate)(names)
            return
        self.tried(self.manager.activate)(names)
        if self.expected.merged != tuple(names):
            self.expected.merged = ()
        self.expected.selected = tuple(names)

    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        self.tried(self.manager.enable if enabled else self.manager.disable)()
        self.expected.enabled = enabled
        if not enabled:
            self.expected.merged = ()

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), scale=scales)
    def set_scale(self, data: st.DataObject, scale: float) -> None:
        name = self.pick(data)
        if name in self.expected.merged:
            with pytest.raises(MergeError):
                self.tried(self.manager.set_scale)(name, scale)
        else:
            self.tried(self.manager.set_scale)(name, scale)
            self.adapters[name].scale = scale

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), frozen=st.booleans())
    def freeze(self, data: st.DataObject, frozen: bool) -> None:
        name = self.pick(data)
        self.tried(self.manager.freeze if frozen else self.manager.unfreeze)(name)
        self.adapters[name].frozen = frozen

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), safe=st.booleans())
    def merge(self, data: st.DataObject, safe: bool) -> None:
        names = self.pick_some(data)
        merged = self.expected.merged
        together = tuple(dict.fromkeys((*merged, *names)))
        if together != merged and self.expected.several_heads(together):
            with pytest.raises(AdapterError, match=ONE_COPY):
                self.tried(self.manager.merge)(names, safe=safe)
            return
        self.tried(self.manager.merge)(names, safe=safe)
        self.expected.merged, self.expected.enabled = together, True

    @rule()
    def unmerge(self) -> None:
        self.tried(self.manager.unmerge)()
        self.expected.merged = ()

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), new=st.sampled_from(NAMES), copied=st.booleans())
    def rename_or_copy(self, data: st.DataObject, new: str, copied: bool) -> None:
        old = self.pick(data)
        command = self.tried(self.manager.copy if copied else self.manager.rename)
        if new in self.adapters:
            with pytest.raises(AdapterExistsError):
                command(old, new)
        elif self.starts_from_merged(self.adapters[old]) if copied else old in self.expected.merged:
            with pytest.raises(MergeError):
                command(old, new)
        elif copied:
            command(old, new)
            self.put(new, self.adapters[old].clone(), scale=self.adapters[old].scale)
        else:
            command(old, new)
            self.expected.adapters = {new if name == old else name: it for name, it in self.adapters.items()}
            self.expected.selected = tuple(new if name == old else name for name in self.expected.selected)

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = self.pick(data)
        if name in self.expected.merged:
            with pytest.raises(MergeError):
                self.tried(self.manager.remove)(name)
            return
        self.tried(self.manager.remove)(name)
        del self.adapters[name]
        left = tuple(other for other in self.expected.selected if other != name)
        fell_back = name in self.expected.selected and not left
        self.expected.selected = tuple(self.adapters)[:1] if fell_back else left

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        name = self.pick(data)
        folder = Path(self.folder.name) / str(next(self.numbers))
        self.handle.save_pretrained(folder, selected_adapters=[name])
        self.saved[folder if name == "default" else folder / name] = self.adapters[name].clone(scale=1.0, frozen=True)

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def load(self, data: st.DataObject, name: str) -> None:
        folder = data.draw(st.sampled_from(sorted(self.saved)), label="folder")
        if name in self.expected.merged or self.starts_from_merged(self.saved[folder]):
            with pytest.raises(MergeError):
                self.tried(self.handle.load_adapter)(folder, name)
            return
        self.tried(self.handle.load_adapter)(folder, name)
        self.put(name, self.saved[folder].clone())

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), recipe=recipes)
    def swap(self, data: st.DataObject, recipe: Recipe) -> None:
        """From tensors; often the new adapter lacks layers of the slot."""
        name = self.pick(data)
        new = recipe.tracked()
        if self.refuses_swap(name, new):
            with pytest.raises(HotSwapError):
                self.tried(swap)(self.manager, name, recipe.config(), new.weights(), grow=True)
        else:
            self.tried(swap)(self.manager, name, recipe.config(), new.weights(), grow=True)
            self.swapped(name, new)

    @precondition(lambda self: self.adapters and self.saved)
    @rule(data=st.data())
    def swap_from_file(self, data: st.DataObject) -> None:
        name = self.pick(data)
        folder = data.draw(st.sampled_from(sorted(self.saved)), label="folder")
        new = self.saved[folder].clone()
        if self.refuses_swap(name, new):
            # A file of which no layer fits is refused as such.
            with pytest.raises((HotSwapError, CheckpointError)):
                self.tried(hotswap_adapter)(self.handle, folder, name)
        else:
            self.tried(hotswap_adapter)(self.handle, folder, name)
            self.swapped(name, new)

    def refuses_swap(self, name: str, new: Tracked) -> bool:
        slot = self.adapters[name]
        return (
            name in self.expected.merged
            or new.dora != slot.dora
            or not set(new.parts) <= set(slot.parts)
            or (new.head is not None and slot.head is None)
            or (slot.dora and bool(self.merged_paths & (set(slot.parts) - set(new.parts))))
        )

    @property
    def merged_paths(self) -> set[str]:
        return {path for merged in self.expected.merged for path in self.adapters[merged].parts}

    def swapped(self, name: str, new: Tracked) -> None:
        self.adapters[name] = after_swap(self.adapters[name], new, self.manager.weights(name))

    @precondition(lambda self: self.adapters)
    @rule(room=st.integers(1, 9))
    def prepare(self, room: int) -> None:
        """Pads every slot, which changes nothing that can be seen."""
        ranks = [part.lora_A.shape[0] for it in self.adapters.values() for part in it.parts.values()]
        if room >= max(ranks):
            try:
                self.tried(prepare_for_hotswap)(self.manager, room)
            except HotSwapError as error:
                # A slot may have more room than its adapter uses.
                assert "more than target_rank" in str(error)

    @precondition(lambda self: any(not it.dora for it in self.adapters.values()))
    @rule(
        data=st.data(),
        kind=st.sampled_from(["exact", "cat", *EQUAL_RANKS, *ON_DELTAS]),
        weights=st.lists(st.sampled_from([1.0, 0.5, -0.5, 1.5]), min_size=3, max_size=3),
        new=st.sampled_from(NAMES),
    )
    def combine(self, data: st.DataObject, kind: str, weights: list[float], new: str) -> None:
        names = self.pick_some(data, sorted(name for name, it in self.adapters.items() if not it.dora))
        weights = weights[: len(names)]
        arguments: Any = {
            "adapters": names,
            "weights": weights,
            "adapter_name": new,
            "combination_type": kind,
            "density": None if kind in ("exact", "cat", "linear", "svd") else 0.7,
        }
        heads = [name for name in names if self.adapters[name].head is not None]
        refusal = refuses_combining(self.expected, names, kind, new)
        if refusal is not None:
            with pytest.raises(refusal):
                self.tried(self.handle.base_model.add_weighted_adapter)(**arguments)
            return
        made = self.tried(self.handle.base_model.add_weighted_adapter)(**arguments)
        tracked = read_combined(self.manager, new, made)
        if heads:
            tracked.head = self.adapters[heads[0]].clone().head
        check_combined(
            [(self.adapters[name], weight) for name, weight in zip(names, weights, strict=True)], kind, tracked, made
        )
        self.put(new, tracked)

    # What always holds

    @invariant()
    def output_is_base_and_active_deltas(self) -> None:
        next(steps_taken)
        model = self.manager.model
        if len(self.expected.heads) > 1:
            with pytest.raises(AdapterError, match=ONE_COPY):
                self.handle(IDS)
            return
        with torch.no_grad():
            found = self.handle(IDS)
            assert_close(found, self.expected.output(), dtype=torch.float32)  # which combinations are computed in
            with self.manager.active_state.call():
                assert torch.equal(model(IDS), found)

    @invariant()
    def nothing_else_changed(self) -> None:
        manager, expected = self.manager, self.expected
        assert manager.names == tuple(expected.adapters)
        assert (manager.active, manager.enabled, manager.merged) == (
            expected.selected,
            expected.enabled,
            expected.merged,
        )
        for name, tracked in expected.adapters.items():
            assert manager.scale(name) == tracked.scale
            check_equal(manager.weights(name).adapters, tracked.weights().adapters)
            check_equal(manager.weights(name).copies, tracked.weights().copies)
            trains = expected.enabled and name in expected.selected and not tracked.frozen
            assert {parameter.requires_grad for parameter in manager.parameters(name)} == {trains}
        self.base_is_frozen()

    def base_is_frozen(self) -> None:
        parameters = base_parameters(self.manager.model)
        assert parameters.keys() == BASE.keys()
        for name, parameter in parameters.items():
            assert not parameter.requires_grad
            if name.removesuffix(".weight") not in self.merged_paths:
                assert torch.equal(parameter.detach(), BASE[name]), name

    def teardown(self) -> None:
        model = self.manager.unload(merge=False)
        state = model.state_dict()
        assert state.keys() == BASE.keys() and all(torch.equal(state[name], BASE[name]) for name in BASE)
        assert all(parameter.requires_grad for parameter in model.parameters())
        self.folder.cleanup()
        del model, state
        self.handle = self.manager = self.expected = None  # type: ignore[assignment]
        self.trouble = nullcontext()  # one that was not met knows the manager
        self.saved = {}
        if sys.exc_info()[0] is None:
            # A failure keeps its frames and the tensors in them.
            # Fewer than before is what another test left and the collector found meanwhile.
            left = [now - then for now, then in zip(live_tensors(), self.before, strict=True)]
            assert max(left) <= 0, f"{left[0]} tensors with {left[1]} bytes are left behind"


@pytest.mark.parametrize("steps", [200, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_any_sequence_of_commands(steps: int) -> None:
    before, met = next(steps_taken), next(troubles_met)
    chosen = settings(
        max_examples=max(1, steps // LENGTH),
        stateful_step_count=LENGTH,
        deadline=None,
        derandomize=SEED is None,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    machine: Any = AdapterMachine if SEED is None else seed(int(SEED))(AdapterMachine)
    gc.collect()
    gc.freeze()  # what is there by now is not gone over, and not counted, with each example
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="adapters are merged|Already unmerged|All adapters are already")
        run_state_machine_as_test(machine, settings=chosen)
    assert next(steps_taken) - before >= steps // 2
    assert next(troubles_met) - met >= steps // 200  # most commands have no such place, or not behind so many others
