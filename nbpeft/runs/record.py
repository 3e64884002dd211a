"""The record of a run, read and checked from its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nbpeft.errors import CorruptCheckpointError, in_one_line, shortened, shown
from nbpeft.state import Curve, Sample

VERSION = 1
"""Format version of ``run.json``; other versions are not read."""
CRASHED = "crashed"
"""Status of a run whose process ended without recording it."""
BASE, METHOD, ROWS = "base model", "method", "rows"
"""Settings that every run has: name of the base model, name of the method, number of training rows."""
UNREADABLE = "unreadable"
"""Status of a run whose ``run.json`` or curve cannot be read; its message says why."""
STATUSES = ("running", "finished", "stopped", "failed", CRASHED)
"""Valid statuses in ``run.json``."""

_MOST_STEPS = 10**12
_LONGEST_TIME = 10**10
_LAST_TIME = 253_402_300_799
"""Unix time in seconds of the end of the year 9999."""
_LONGEST_TEXT = 10_000
LONGEST_NOTE = 1_000
"""Greatest number of characters of a note on a run."""
_LONGEST_NAME = 200
_MOST_FIELDS = 1_000


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: name of its folder.
        path: path of its folder.
        adapter: names of the trained adapters, as text.
        model: name of the notebook variable of the model, or the empty string.
        status: ``running``, ``finished``, ``stopped``, ``failed``, ``crashed`` (its process is gone) or ``unreadable``.
        step: number of optimizer steps done.
        total_steps: number of planned steps, or None.
        loss: loss of the last step.
        eval_loss: loss of the last evaluation.
        best_loss: the lowest evaluation loss.
        best_step: the step of the lowest evaluation loss.
        seconds: training time in seconds, without pauses.
        started: Unix time of the start in seconds.
        settings: settings of the adapter and of training.
        message: why it ended, a warning, or why it cannot be read.
        saved: adapter -> folder in which it was saved after the run.
        saved_files: adapter -> size and modification time of the weights file in that folder when it was saved.
        kept_steps: steps of the checkpoints in descending order.
        metrics: the last scores and values of ``compute_metrics``, by name; ``with_best_metrics`` has the best step's.
        headline: the last value of each curve by which it is judged, see ``TrainState``; None before the first one.
        note: a remark of the user's on it, on one line.
        adapters: names of the trained adapters.
        id: random text that stays when it is renamed, and that no later run of its name has; empty if unreadable.
    """

    name: str
    path: str
    adapter: str
    model: str
    status: str
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    started: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    message: str = ""
    saved: Mapping[str, str] = field(default_factory=dict, hash=False)
    saved_files: Mapping[str, str] = field(default_factory=dict, hash=False)
    kept_steps: tuple[int, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    headline: Mapping[str, float | None] = field(default_factory=dict, hash=False)
    note: str = ""
    adapters: tuple[str, ...] = ()
    id: str = ""

    @property
    def at(self) -> str:
        """``step 40 of 60``."""
        return f"step {self.step:,}" + (f" of {self.total_steps:,}" if self.total_steps else "")

    @property
    def key(self) -> tuple[str, str]:
        """Its name and id: another run may get its name."""
        return self.name, self.id

    def matches(self, words: str) -> bool:
        """Returns whether each word occurs in its name, adapter, model, status, note or settings, in any case."""
        settings = (f"{name} {value}" for name, value in self.settings.items())
        text = " ".join((self.name, self.adapter, self.model, self.status, self.note, *settings)).casefold()
        return all(word in text for word in words.casefold().split())

    @property
    def is_complete(self) -> bool:
        """Whether it finished and has a checkpoint of its last step, so that nothing is left to train."""
        return self.status == "finished" and self.step <= max(self.kept_steps, default=0)


def record_of(name: str, path: str, facts: Mapping[str, Any], *, running: bool, kept_steps: Iterable[int]) -> RunRecord:
    """Creates a record from checked facts.

    Args:
        name: name of the run.
        path: path of its folder.
        facts: what ``checked_facts`` returned.
        running: whether a process is writing the run.
        kept_steps: steps of the checkpoints in descending order.
    """
    known = {field.name: facts[field.name] for field in fields(RunRecord) if facts.get(field.name) is not None}
    own: dict[str, Any] = {"name": name, "path": path, "model": facts.get("model") or ""}
    own |= {"kept_steps": tuple(kept_steps), "message": one_line(facts.get("message") or "")}
    own |= {"note": one_line(facts.get("note") or ""), "adapters": tuple(facts.get("adapters") or [facts["adapter"]])}
    own |= {"status": CRASHED} if facts["status"] == "running" and not running else {}
    metrics = facts.get("metrics") or {}
    headline = facts.get("headline") or {"loss": facts.get("loss")}
    own["headline"] = {name: float(value) if _is_number(value) else None for name, value in headline.items()}
    own["metrics"] = {name: float(value) for name, value in metrics.items() if _is_number(value)}
    return RunRecord(**(known | own))


def one_line(text: str) -> str:
    """Returns a text on one line, without control characters."""
    return in_one_line("".join(letter if letter.isprintable() else " " for letter in shortened(text, _LONGEST_TEXT)))


def words_of_run(run_id: str, name: str) -> str:
    """Returns a run of a session as text.

    Args:
        run_id: its id; empty if it was not saved.
        name: its present name; empty if it is not in the runs folder.
    """
    if name:
        return f"run {name}"
    return "a run that is no longer in the runs folder" if run_id else "a run that was not saved"


def unreadable(name: str, path: str, why: str) -> RunRecord:
    """Returns the record of a run that cannot be read.

    Args:
        name: name of the run.
        path: path of its folder.
        why: the reason, for the record's message.
    """
    return RunRecord(name, path, "", "", UNREADABLE, message=why)


def checked_facts(content: bytes) -> dict[str, Any]:
    """Parses a ``run.json`` and checks type and range of every known field; unknown fields are kept unchecked.

    Raises:
        CorruptCheckpointError: it is not JSON, has another version, or has an invalid field.
    """
    try:
        facts = json.loads(content)
        json.dumps(facts, ensure_ascii=False).encode()  # JSON can contain unpaired surrogates, which cannot be encoded
    except (ValueError, RecursionError):
        raise CorruptCheckpointError("run.json is not JSON") from None
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        found = shown(facts.get("version"), 20) if isinstance(facts, dict) else "none"
        raise CorruptCheckpointError(f"run.json has version {found}; this nbpeft reads version {VERSION}")
    for field_name in ("adapter", "status"):
        if facts.get(field_name) is None:
            raise CorruptCheckpointError(f"run.json has no {field_name}")
    for field_name, (check, expected) in _FIELDS.items():
        value = facts.get(field_name)
        if value is not None and not check(value):
            raise CorruptCheckpointError(f"{field_name} in run.json is {shown(value)}, not {expected}")
    return facts


def checked_entry(given: Any) -> dict[str, Any] | None:
    """Returns a log entry with only its numbers, booleans and short texts; None if it is not a valid entry."""
    if not isinstance(given, dict) or not _is_step(given.get("step")):
        return None
    if not _is_seconds(given.get("seconds", 0)):
        return None
    return {key: value for key, value in given.items() if value is None or _is_plain(value)}


def last_step(entries: Sequence[Mapping[str, Any]], headline: Iterable[str]) -> dict[str, Any]:
    """Returns step, loss and seconds of the last log entry with a loss, and the last figures of the headline."""
    last: Mapping[str, Any] = next((entry for entry in reversed(entries) if _is_number(entry.get("loss"))), {})
    found = {name: last[name] for name in ("step", "loss", "seconds") if name in last}
    return found | {"headline": {name: next(_logged(entries, name), None) for name in headline}} if last else found


def _logged(entries: Sequence[Mapping[str, Any]], name: str) -> Iterator[Any]:
    """Yields the logged values of a name, the last one first."""
    return (entry[name] for entry in reversed(entries) if _is_number(entry.get(name)))


def checked_points(given: Any, until: int) -> Curve:
    """Returns the valid (step, value) pairs of a list.

    Args:
        given: value read from a file.
        until: the last step to include.
    """
    pairs = given if isinstance(given, list) else []
    return tuple(
        (pair[0], float(pair[1]))
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and _is_step(pair[0]) and pair[0] <= until and _is_number(pair[1])
    )


def checked_sample(given: Any) -> Sample | None:
    """Returns a sample read from a file; None if it is invalid."""
    if not isinstance(given, dict) or not _is_step(given.get("step")):
        return None
    texts = [given.get(name, "") for name in ("prompt", "answer", "base", "wanted")]
    reward = given.get("reward")
    if not all(map(_is_unicode, texts)) or not (reward is None or _is_number(reward)):
        return None
    prompt, answer, base, wanted = texts
    number = None if reward is None else float(reward)
    cut, base_cut = given.get("cut") is True, given.get("base_cut") is True
    return Sample(given["step"], prompt, answer, base, wanted, reward=number, cut=cut, base_cut=base_cut)


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MOST_STEPS


def _is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) < 2**63
    return type(value) is float and math.isfinite(value)


def _is_within(most: float) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and 0 <= value <= most


_is_seconds = _is_within(_LONGEST_TIME)


def _is_name(most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= most and value.isprintable()


def _is_unicode(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_plain(value: object) -> bool:
    return isinstance(value, bool) or _is_number(value) or (_is_unicode(value) and len(str(value)) <= _LONGEST_TEXT)


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict) and len(value) <= _MOST_FIELDS and all(len(name) <= _LONGEST_NAME for name in value)


def _is_list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= _MOST_FIELDS and all(map(check, value))


_STEP = (_is_step, f"a whole number from 0 to {_MOST_STEPS:,}")
_NUMBER = (_is_number, "a finite number")
_TIME = (_is_within(_LAST_TIME), "a time")
_NAMES = (_is_list_of(_is_name(_LONGEST_NAME)), "a list of names")
_MAPPING = (_is_mapping, f"a dictionary of at most {_MOST_FIELDS:,} names")
_TEXTS = (
    lambda value: _is_mapping(value) and all(isinstance(text, str) for text in value.values()),
    "a dictionary of strings",
)
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "status": (lambda value: value in STATUSES, f"one of {', '.join(STATUSES)}"),
    "adapter": (_is_name(_LONGEST_TEXT), "names of adapters"),
    "adapters": (_is_list_of(_is_name(_LONGEST_TEXT)), "a list of names"),
    "id": (_is_name(_LONGEST_NAME), "the id of a run"),
    "model": (_is_name(_LONGEST_NAME), "the name of a variable"),
    **dict.fromkeys(("message", "note"), (lambda value: isinstance(value, str), "a string")),
    "host": (_is_name(_LONGEST_TEXT), "the name of a host"),
    "process": (lambda value: type(value) is int and 0 < value < 2**31, "a process id"),
    **dict.fromkeys(("step", "total_steps", "first_step", "best_step"), _STEP),
    **dict.fromkeys(("loss", "eval_loss", "best_loss"), _NUMBER),
    "seconds": (_is_seconds, "a number of seconds"),
    **dict.fromkeys(("started", "updated"), _TIME),
    **dict.fromkeys(("settings", "arguments", "data", "metrics", "headline"), _MAPPING),
    **dict.fromkeys(("source", "saved", "saved_files"), _TEXTS),
    **dict.fromkeys(("secrets", "objects"), _NAMES),
    "resumed": (_is_list_of(_is_step), "a list of steps"),
}


def differing(records: Sequence[RunRecord]) -> dict[str, tuple[Any, ...]]:
    """Returns setting -> its value in each run (None if unset), for the settings that differ between runs."""
    names = dict.fromkeys(name for record in records for name in record.settings)
    values = {name: tuple(record.settings.get(name) for record in records) for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def curve_of(entries: Iterable[Mapping[str, Any]], key: str) -> Curve:
    """Returns the (step, value) pairs of one value in log entries.

    Args:
        entries: log entries in order.
        key: name of the value, e.g. ``loss``.
    """
    return tuple((entry["step"], float(entry[key])) for entry in entries if _is_number(entry.get(key)))


def with_best_metrics(record: RunRecord, entries: Iterable[Mapping[str, Any]]) -> RunRecord:
    """Returns a record whose metrics are those of the best evaluation, as far as it was logged.

    Args:
        record: the record, with the last metrics.
        entries: the log entries of its run.
    """
    logged = {
        name: value for entry in entries if entry.get("step") == record.best_step for name, value in entry.items()
    }
    best = {name: logged.get(f"eval_{name}", logged.get(name)) for name in record.metrics}
    metrics = {name: float(value) for name, value in best.items() if value is not None and _is_number(value)}
    return replace(record, metrics={**record.metrics, **metrics})
