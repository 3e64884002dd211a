"""Results about the runs on disk: a table of all runs, and comparisons of some."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from nbpeft._util.optional import needs
from nbpeft._util.paths import from_here
from nbpeft.display.blocks import Block, Card, Cell, CurveChart, Spark, Stack, Table, Text, card, dim, line, notes
from nbpeft.display.next_steps import kept_steps, next_steps
from nbpeft.display.numbers import NONE, clock, loss, metric, plural, setting
from nbpeft.display.training import training_card, training_text
from nbpeft.errors import ConfigError, cut, did_you_mean, few
from nbpeft.runs.record import BASE, METHOD, ROWS, UNREADABLE, RunRecord, differing
from nbpeft.session.results.base import ModelResult, Result
from nbpeft.state import Curve, SessionState, TrainState
from nbpeft.training.monitor.result import TrainResult

_KEYS: Mapping[str, Callable[[RunRecord], Any]] = {
    "time": lambda record: -record.started,
    "name": lambda record: record.name,
    "status": lambda record: record.status,
    "steps": lambda record: -record.step,
    "result": lambda record: _last_if_none(_judged(record)),
    "eval": lambda record: _last_if_none(record.eval_loss),
    "best": lambda record: _last_if_none(record.best_loss),
    "seconds": lambda record: record.seconds,
}
SORTS = tuple(_KEYS)
_MAIN = (BASE, METHOD, "objective", ROWS)
"""Settings that are listed first if they differ between runs, and named above the runs if they do not."""
_MOST_COLUMNS = 5
"""Number of differing settings with columns of their own."""
_MOST_SETTINGS = 4
_MOST_METRICS = 2
_LONGEST_VALUE = 40
_TONES: Mapping[str, Any] = {
    "failed": "error",
    UNREADABLE: "error",
    "crashed": "warning",
    "stopped": "warning",
    "running": "accent",
}


def sorted_records(records: tuple[RunRecord, ...], sort: str) -> tuple[RunRecord, ...]:
    """Sorts runs by time (newest first), or by another column or a setting in ascending order.

    Raises:
        ConfigError: there is no such column.
    """
    if sort in SORTS:
        return tuple(sorted(records, key=_KEYS[sort]))
    settings = dict.fromkeys(chain(*(record.settings for record in records)))
    if sort not in settings:
        raise ConfigError(
            f"runs cannot be sorted by {sort!r:.60}.{did_you_mean(sort, (*SORTS, *settings))}", field="sort"
        )
    return tuple(sorted(records, key=lambda record: _order(record.settings.get(sort))))


def _order(value: Any) -> tuple[int, float, str]:
    """Returns the place of a setting in a sorted column: numbers, then text, then runs without it."""
    if isinstance(value, int | float):
        return 0, value, ""
    return 2 if value is None else 1, 0, str(value)


@dataclass(frozen=True)
class Column:
    """A column of the list of runs.

    Attributes:
        title: its title.
        sort: the order of the runs by it; empty if it has none.
        cell: the content for a run.
        width: its CSS width in a panel.
    """

    title: str
    sort: str
    cell: Callable[[RunRecord], Cell]
    width: str = "minmax(64px, 1fr)"


@dataclass(frozen=True, repr=False)
class RunsResult(Result):
    """The saved runs.

    Attributes:
        place: the folder of the runs, relative to the working directory if it is inside.
        records: the runs, in display order.
        curves: the first curve of each one's headline; empty if they were not read.
        search: the words that were searched; empty if all runs are listed.
    """

    place: str
    records: tuple[RunRecord, ...]
    curves: tuple[Curve, ...] = ()
    search: str = ""

    def matching(self, search: str) -> RunsResult:
        """Returns the runs that have each of some words in their name, adapter, model, status, note or settings."""
        found = [place for place, record in enumerate(self.records) if record.matches(search)]
        curves = tuple(self.curves[place] for place in found) if self.curves else ()
        return replace(self, records=tuple(self.records[place] for place in found), curves=curves, search=search)

    def sorted(self, sort: str) -> RunsResult:
        """Returns the runs in another order; see ``sorted_records``."""
        order = {record.name: place for place, record in enumerate(self.records)}
        records = sorted_records(self.records, sort)
        curves = tuple(self.curves[order[record.name]] for record in records) if self.curves else ()
        return replace(self, records=records, curves=curves)

    def __str__(self) -> str:
        from nbpeft.display.text import columns

        if not self.records:
            none = f"there is no run in {self.place} yet"
            return f"no run in {self.place} matches {self.search!r}" if self.search else none
        rows = [tuple(_flat(cell) for cell in row) for row in (self._titles(), *self.rows())]
        listed = f"{plural(len(self.records), 'run')} in {self.about}\n{columns(rows)}"
        return "\n".join((listed, *why_unreadable(self.records)))

    def view(self) -> Card:
        if not self.records:
            none = f"No run matches {self.search}." if self.search else "There is no run yet: every training adds one."
            return card("Runs", line(dim(none)), aside=self.place)
        why = [line(dim(words)) for words in why_unreadable(self.records)]
        table = Table(self._titles(), tuple(self.rows()))
        return Card(plural(len(self.records), "run"), (table, *why), self.about, wide=True)

    @property
    def about(self) -> str:
        """The folder, and the main settings that all runs have in common."""
        if not self.records:
            return self.place
        first, *_ = readable = [record for record in self.records if record.status != UNREADABLE] or self.records
        common = [name for name in _MAIN if name in first.settings and name not in differing(readable)]
        words = [f"{_setting(first, name)}{' rows' * (name == ROWS)}" for name in common]
        return f"{self.place} · all: {', '.join(words)}" if words else self.place

    def _titles(self) -> tuple[str, ...]:
        return tuple(column.title for column in self.columns())

    def to_dataframe(self) -> Any:
        """Returns the runs as a pandas DataFrame with a column for each setting.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        with needs("pandas", "to_dataframe()"):
            import pandas
        return pandas.DataFrame([_fields(record) for record in self.records])

    def rows(self) -> list[tuple[Cell, ...]]:
        """Returns the cells of each run."""
        columns = self.columns()
        return [tuple(column.cell(record) for column in columns) for record in self.records]

    def columns(self) -> tuple[Column, ...]:
        """Returns the columns: the results first, then the settings that differ."""
        curves = dict(zip((record.name for record in self.records), self.curves, strict=False))
        settings = differing([record for record in self.records if record.status != UNREADABLE])
        names = [name for name in dict.fromkeys((*_MAIN, *settings)) if name in settings and name != "peft_type"]
        shown, others = names[:_MOST_COLUMNS], names[_MOST_COLUMNS:]
        more = Column("Other settings", "", partial(_other_settings, names=others), "minmax(110px, 1.5fr)")
        return (
            Column("Run", "name", _name, "minmax(88px, 1.4fr)"),
            Column("Result", "result", _result, "minmax(96px, 1.2fr)"),
            Column("Best evaluation", "best", _best, "minmax(96px, 1.2fr)"),
            Column("Curve", "", lambda record: _spark(record, curves.get(record.name, ())), "100px"),
            *(Column(name, name, partial(_setting, name=name)) for name in shown),
            *([more] if others else []),
            Column("Steps", "steps", _steps, "72px"),
            Column("Status", "status", _status, "80px"),
        )


@dataclass(frozen=True, repr=False)
class RunCard(Result):
    """The final state of a training, or the last one seen if another process runs it.

    Attributes:
        train: its last state.
        model_name: name of its model.
        state: state of the session that trained it; None if only the run's folder is left.
        record: the record of its folder, in that case.
    """

    train: TrainState
    model_name: str
    state: SessionState | None = None
    record: RunRecord | None = None

    def __str__(self) -> str:
        return training_text(self.train, seen=_now())

    def view(self) -> Card:
        following = None
        if self.state is not None:
            following = next_steps(self.train, self.state, self.model_name)
        elif self.record is not None:
            saved = {name: str(from_here(Path(place))) for name, place in self.record.saved.items()}
            following = kept_steps(self.train, saved, has_checkpoint=bool(self.record.kept_steps))
        return training_card(self.train, model_name=self.model_name, seen=_now(), next_steps=following)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")


@dataclass(frozen=True, repr=False)
class RunsComparison(Result):
    """Some runs side by side.

    Attributes:
        records: the runs; a run that cannot be read has only the reason.
        curves: name of a curve or a metric -> its curve in training and in evaluations, for each run.
    """

    records: tuple[RunRecord, ...]
    curves: Mapping[str, tuple[tuple[Curve, Curve], ...]] = field(default_factory=dict, hash=False)

    @property
    def differing(self) -> dict[str, tuple[Any, ...]]:
        """Setting -> its value in each run, for settings that differ; None for a run that cannot be read."""
        readable = [record for record in self.records if record.status != UNREADABLE]
        values_of = {name: iter(values) for name, values in differing(readable).items()}
        return {
            name: tuple(None if record.status == UNREADABLE else next(values) for record in self.records)
            for name, values in values_of.items()
        }

    def __str__(self) -> str:
        from nbpeft.display.text import columns

        table = columns([("", *self._names()), *self._rows()])
        about_losses = [self._about_losses] if self._about_losses else []
        return "\n".join((" · ".join(self._names()), table, *about_losses, *why_unreadable(self.records)))

    @property
    def _about_losses(self) -> str:
        return "different objectives: their losses cannot be compared" if "objective" in self.differing else ""

    def view(self) -> Card:
        names = self._names()
        width = range(1, 1 + len(names))
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (name, *(Text(value, wrap="words") for value in values)) for name, *values in self._rows()
        )
        table = Table(("", *names), rows, right=tuple(width))
        same = None if self.differing else line(dim("Their settings are the same."))
        other = line(Text(self._about_losses, "warning")) if self._about_losses else None
        why = (line(dim(words)) for words in why_unreadable(self.records))
        charts = [
            CurveChart(tuple(drawn), legend=not place, metric="" if name == "loss" else name)
            for place, (name, curves) in enumerate(self.curves.items())
            if (drawn := [(run, *_drawn(*pair)) for run, pair in zip(names, curves, strict=True)])
            if name == "loss" or any(len(curve) > 1 for _, curve, _ in drawn)
        ]
        return card(plural(len(names), "run"), other, *charts, table, same, *why)

    def _names(self) -> tuple[str, ...]:
        return tuple(record.name for record in self.records)

    def _rows(self) -> list[tuple[str, ...]]:
        cells: list[tuple[str, Callable[[RunRecord], str]]] = [
            ("status", lambda record: record.status),
            *(
                (name, partial(_setting, name=name))
                for name in _MAIN
                if any(name in one.settings for one in self.records)
            ),
            ("steps", lambda record: f"{record.step:,}"),
            *((name, partial(_figure, name=name)) for name in _headlines(self.records)),
            ("eval loss", lambda record: loss(record.eval_loss if _tells(record) else None)),
            ("best eval loss", lambda record: loss(record.best_loss if _tells(record) else None)),
            ("best step", lambda record: NONE if record.best_step is None else f"{record.best_step:,}"),
            *((f"{name} at best step", partial(_metric, name=name)) for name in metric_names(self.records)),
            ("time", lambda record: clock(record.seconds)),
            *([("note", lambda record: record.note or NONE)] if any(record.note for record in self.records) else []),
        ]
        results = [(name, *map(cell, self.records)) for name, cell in cells]
        others = {name: values for name, values in self.differing.items() if name not in (*_MAIN, "peft_type")}
        return results + [(name, *map(_value_words, values)) for name, values in others.items()]


@dataclass(frozen=True, repr=False)
class ResumeResult(ModelResult):
    """An interrupted run was resumed, or the adapter of a finished run was restored.

    Attributes:
        run: name of the run.
        step: step of the checkpoint from which it was resumed.
        adapters: the adapters in the checkpoint.
        training: the result of the training; None if nothing was left to train.
        notes: which of its arguments could not be restored, or were given and are not used.
    """

    run: str
    step: int
    adapters: tuple[str, ...]
    training: TrainResult | None = None

    def __str__(self) -> str:
        if self.training is None:
            adapters = ", ".join(self.adapters)
            told = f"run {self.run} had finished: {adapters} is restored as it was after step {self.step:,}"
        else:
            told = f"resumed {self.run} at step {self.step:,}: {self.training}"
        return " · ".join((told, *self.notes))

    def view(self) -> Block:
        if self.training is None:
            return Card(str(self))
        resumed = line(dim(f"resumed {self.run} at step {self.step:,}"))
        return Stack((resumed, self.training.view(), *notes(self.notes)))


def why_unreadable(records: Iterable[RunRecord]) -> list[str]:
    """Returns a line for each run that cannot be read."""
    return [f"run {record.name} cannot be read: {record.message}" for record in records if record.status == UNREADABLE]


def _last_if_none(number: float | None) -> float:
    return float("inf") if number is None else number


def _origin(record: RunRecord) -> str:
    """Returns the start time and, unless the run's name includes it, the adapter."""
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.started))
    several = record.adapter.count(", ") + 1
    adapter = record.adapter if several < 3 else f"{several} adapters"
    return started if record.name.startswith(f"{record.adapter}-") else f"{adapter}, {started}"


def curve_names(records: Iterable[RunRecord]) -> tuple[str, ...]:
    """Returns the names of the curves that show how some runs learned: those of their headlines, then their metrics."""
    found = [*records]
    return tuple(_headlines(found) | dict.fromkeys(name.removeprefix("eval_") for name in metric_names(found)))


def _headlines(records: Iterable[RunRecord]) -> dict[str, None]:
    """Returns the names of the curves by which some runs are judged."""
    return dict.fromkeys(chain(*(record.headline for record in records)))


def metric_names(records: Iterable[RunRecord]) -> tuple[str, ...]:
    """Returns the names of the metrics that any of some runs has."""
    return tuple(dict.fromkeys(name for record in records for name in record.metrics))


def _metric(record: RunRecord, name: str) -> str:
    return metric(record.metrics[name]) if name in record.metrics else NONE


def _tells(record: RunRecord) -> bool:
    """Returns whether the loss of a run says how well it learned."""
    return "loss" in record.headline


def _figure(record: RunRecord, name: str) -> str:
    """Returns the last value of a curve of a run's headline, as text."""
    return _number(name, record.headline.get(name))


def _number(name: str, value: float | None) -> str:
    return NONE if value is None else (loss if name == "loss" else metric)(value)


def _judged(record: RunRecord) -> float | None:
    """Returns the first figure of a run's headline, of which the lowest is the best."""
    name, value = next(iter(record.headline.items()), ("loss", None))
    return value if name == "loss" or value is None else -value


def _name(record: RunRecord) -> Cell:
    name = Text(record.name, "bold", tooltip=str(from_here(Path(record.path))), wrap="names")
    about = () if record.status == UNREADABLE else (dim(_origin(record)),)
    return (name, *about, *([Text(record.note, wrap="words")] if record.note else []))


def _status(record: RunRecord) -> Cell:
    return Text(record.status, _TONES.get(record.status, ""), tooltip=record.message)


def _steps(record: RunRecord) -> Cell:
    if record.status == UNREADABLE:
        return NONE
    total = f" / {record.total_steps:,}" if record.total_steps else ""
    return f"{record.step:,}{total}", dim(f"in {clock(record.seconds)}")


def _result(record: RunRecord) -> Cell:
    """Returns the figures by which a run is judged, e.g. ``loss 0.412``, a line for each."""
    return _lines([f"{name} {_number(name, value)}" for name, value in record.headline.items()])


def _best(record: RunRecord) -> Cell:
    """Returns the evaluation loss and the scores of a run at its best step, e.g. ``exact 0.812``, a line for each."""
    losses = [f"loss {loss(record.best_loss)}"] if _tells(record) and record.best_loss is not None else []
    losses += [where] if losses and (where := _where_best(record)) else []
    words = [f"{name.removeprefix('eval_')} {_metric(record, name)}" for name in record.metrics]
    more = len(words) - _MOST_METRICS
    shown = [*words[:_MOST_METRICS], *([f"and {more} more"] if more > 0 else [])]
    shown += [f"at step {record.best_step:,}"] if words and record.best_step and len(losses) < 2 else []
    return _lines([*losses, *shown])


def _lines(words: list[str]) -> Cell:
    return tuple(Text(each, wrap="words") for each in words) or NONE


def _other_settings(record: RunRecord, names: list[str]) -> Cell:
    words = [f"{name} {_setting(record, name)}" for name in names if record.settings.get(name) is not None]
    return Text(few(words, _MOST_SETTINGS, quoted=False), "dim", tooltip=", ".join(words))


def _drawn(learned: Curve, measured: Curve) -> tuple[Curve, Curve]:
    """Returns the curves of a chart: that of a metric, which only evaluations have, is a line, too."""
    return (learned, measured) if learned else (measured, ())


def _setting(record: RunRecord, name: str) -> str:
    """Returns a setting as text; of a base model in a folder the name of the folder; a dash for a run without it."""
    value = record.settings.get(name)
    if name == BASE and PurePath(str(value)).is_absolute():
        return PurePath(str(value)).name
    return f"{value:,}" if name == ROWS and isinstance(value, int) else _value_words(value)


def _where_best(record: RunRecord) -> str:
    """Returns the step of the lowest evaluation loss; empty if there is none, or another metric determines the best."""
    metric = record.settings.get("metric_for_best_model") not in (None, "loss", "eval_loss")
    return "" if metric or record.best_loss is None or record.best_step is None else f"at step {record.best_step:,}"


def adapters_with_rows(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the adapters of a run that were trained on rows of their own; empty if there are none."""
    rows = facts.get("data")
    names = rows.get("adapters") if isinstance(rows, Mapping) else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def source_of_base(record: RunRecord) -> str:
    """Returns the Hub id or the folder from which a run's base model was loaded; empty if it is unknown."""
    name = str(record.settings.get(BASE) or "")
    return name if "/" in name or "\\" in name else ""


def _spark(record: RunRecord, curve: Curve) -> Spark:
    """Returns the first curve of the headline, as large as a word."""
    ends = [_number(next(iter(record.headline)), curve[place][1]) for place in (0, -1)] if curve else []
    return Spark(" → ".join(ends), points=curve)


def _value_words(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return setting(value)
    if isinstance(value, Mapping):
        return cut(", ".join(f"{name}={item}" for name, item in value.items()), _LONGEST_VALUE)
    return cut(", ".join(map(str, value)) if isinstance(value, list) else str(value), _LONGEST_VALUE)


def _flat(cell: Any) -> str:
    spans = cell if isinstance(cell, tuple) else (cell,)
    return " ".join(text for text in (span if isinstance(span, str) else span.text for span in spans) if text)


def _fields(record: RunRecord) -> dict[str, Any]:
    left_out = ("id", "adapters", "settings", "kept_steps", "saved", "saved_files", "metrics")
    own = dict(record.metrics) | {name: value for name, value in vars(record).items() if name not in left_out}
    return {**own, **{name: value for name, value in record.settings.items() if name not in own}}
