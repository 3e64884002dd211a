"""Training through the session: runs, their controls, and who is told when one starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nbpeft.session.base import SessionBase
from nbpeft.session.book import Entry
from nbpeft.session.checks import place_of
from nbpeft.session.lock import Subscribers
from nbpeft.session.results import ExportResult
from nbpeft.state import MemoryState, TrainState

if TYPE_CHECKING:
    from torch import nn

    from nbpeft.training import Run, RunControl, TrainResult

_ENDED = ("finished", "stopped", "failed")


class Runs(SessionBase):
    """The commands that train."""

    def __init__(self) -> None:
        super().__init__()
        self._run_watchers = Subscribers()
        self._running: dict[str, Run] = {}

    def track(self, model: nn.Module | str | None = None, total_steps: int | None = None, **options: Any) -> Run:
        """A run for a training loop of one's own, shown live where a front end listens.

        ::

            with session.track(model, total_steps=100) as run:
                for batch in loader:
                    ...
                    run.step(loss)

        Args:
            model: the model in training; one without adapters can be tracked too.
            total_steps: optimizer steps planned, or None where that is not known.
            **options: further arguments of ``Run``.
        """
        from nbpeft.training import track

        entry = self._entry_of(model)
        watched: Any = model if entry is None else entry.model
        options.setdefault("memory", _measuring(watched))
        run = track(watched, total_steps, publish=lambda state: self._run_published(run, entry, state), **options)
        return run

    def train(
        self,
        model: nn.Module | str | None,
        data: Any,
        eval_data: Any = None,
        *,
        tokenizer: Any = None,
        adapter: str | None = None,
        **arguments: Any,
    ) -> TrainResult:
        """Trains the active adapters with transformers' Trainer; shown live where a front end listens.

        Stop and KeyboardInterrupt end it gracefully: the result says so and the model keeps what
        it learned.

        Args:
            model: an adapted model.
            data: a dataset or a list of dictionaries; see ``nbpeft.training.train``.
            eval_data: the same, for evaluation.
            tokenizer: for data that is text.
            adapter: switch to this one first; it stays active when a step was done.
            **arguments: fields of ``TrainingArguments`` and further arguments of ``nbpeft.training.train``.

        Raises:
            TrainingError: the run cannot start, e.g. because no adapter can train.
        """
        from nbpeft.training import Run, is_plain, train

        entry = self._adapted("train", model)
        trained = entry.model
        with self._command(f"training {adapter or ', '.join(entry.manager.active)}", slow=True, gather=False):
            made: list[Run] = []

            def make(watched: nn.Module, total_steps: int | None, **options: Any) -> Run:
                options["publish"] = lambda state: self._run_published(made[0], entry, state)
                made.append(Run(watched, total_steps, memory=_measuring(trained), **options))
                return made[0]

            arguments |= {"tokenizer": tokenizer, "adapter": adapter, "run_factory": make}
            result = train(trained, data, eval_data, **arguments)
            plain = is_plain(data)
            entry.plain = entry.plain if plain is None else plain
            self._book.enter(entry.name, trained)
            return result

    def export(
        self,
        path: str,
        data: Any,
        eval_data: Any = None,
        *,
        tokenizer: Any = None,
        base: str | None = None,
        model: nn.Module | str | None = None,
        **arguments: Any,
    ) -> ExportResult:
        """Writes a script that trains an adapter like the active one on the same rows, for ``accelerate launch``.

        Args:
            path: of the script; the tokenised rows go beside it.
            data: as for ``train``.
            eval_data: as for ``train``.
            tokenizer: as for ``train``.
            base: where the script finds the base model; by default where this one came from.
            model: an adapted model.
            **arguments: as for ``train``.

        Raises:
            ConfigError: an argument cannot be written into a script.
            TrainingError: it is not known how to load the base model, or the data cannot be read.
        """
        from nbpeft.training import export_script

        entry, place = self._book.get(model), place_of(path, "export")
        with self._command(f"exporting to {place}", slow=True) as notes:
            files = export_script(entry.model, place, data, eval_data, tokenizer=tokenizer, base=base, **arguments)
            data_files = tuple(zip(map(str, files.data), files.row_counts, strict=True))
            return ExportResult(str(files.script), files.adapter, data_files, tuple(notes))

    def unwritable(self, arguments: Mapping[str, Any]) -> list[str]:
        """Names of training arguments that ``export`` cannot write into a script."""
        from nbpeft.training.script import unwritable

        return unwritable(arguments)

    def control(self, model: str | None = None) -> RunControl | None:
        """Stop and Pause of the run on a model, or None while none runs."""
        name = model if model is not None else next(reversed(self._running), None)
        run = self._running.get(name) if name is not None else None
        return run.control if run is not None else None

    def on_run(self, callback: Callable[[Run, str], object]) -> Callable[[], None]:
        """Calls back with each run that starts and its model's name; returns how to stop that."""
        return self._run_watchers.add(callback)

    def close(self) -> None:
        """Forgets models and subscribers; the adapters stay in their models."""
        super().close()
        self._run_watchers.clear()

    def _run_published(self, run: Run, entry: Entry | None, state: TrainState) -> None:
        name = entry.name if entry is not None else "model"
        if entry is not None:
            entry.training = state
        if state.status in _ENDED:
            self._running.pop(name, None)
            self.lock.release(run.run_id)
        elif self._running.get(name) is not run:
            self._running[name] = run
            self.lock.claim(run.run_id, f"training {state.adapter or name}", run)
            self._notes.extend(self._run_watchers.tell(run, name))
        self._publish()


def _measuring(model: Any) -> Callable[[], MemoryState | None]:
    """A function that measures a model's memory and holds it weakly."""
    import weakref

    from nbpeft.memory import measure

    reference = weakref.ref(model)

    def look() -> MemoryState | None:
        found = reference()
        return None if found is None else measure(found)

    return look
