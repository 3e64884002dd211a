"""``score(model, data)``: rows are read, answered and compared with their references."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from nbpeft._util.former_names import refusing_former_names
from nbpeft.checkpoint import PromptFormat, common_format, prompt_format
from nbpeft.display.numbers import plural
from nbpeft.engine.tree.model_tree import check_has_data, manager_of
from nbpeft.errors import CheckpointError, ConfigError, TrainingError, check_bool, few
from nbpeft.model.from_data.observing import progress as progress_bar
from nbpeft.scoring.answers import GivenAnswer, answer_rows, default_limit, only_the_start_counts
from nbpeft.scoring.folders import folder_columns, groups_of, loaded
from nbpeft.scoring.items import MetricFacts, ScoreItem
from nbpeft.scoring.likelihoods import Outputs, classes, token_losses
from nbpeft.scoring.metrics import AnswerSettings, Metric, generates, metrics_of, value_of
from nbpeft.scoring.result import ScoreResult, Status
from nbpeft.scoring.rows import ScoredRow, ScoredRows, read_rows, usual_metric
from nbpeft.scoring.settings import Column, ScoreSettings, columns_of
from nbpeft.training.data import HeldOut, separator_for
from nbpeft.training.data.answers import few_answers, odd_answers
from nbpeft.training.watching.generation import INTERVAL, evaluating

Report = Callable[[ScoreResult], object]
_DIFFERENT_VARIABLES = (
    "the adapters were trained with different variables of the chat template, so none is set: pass chat_template_kwargs"
)
_DIFFERENT_REASONING = (
    "some adapters were trained on reasoning and others were not: references are compared with their reasoning"
)
_ROWS_TOGETHER = (
    "its method mixes the rows of a batch, so that its scores depend on batch_size and on what is beside it"
)
_GENERAL = Path(__file__).with_name("general_text.txt")


@refusing_former_names
def score(
    model: nn.Module,
    data: Any = None,
    *,
    metric: Any = None,
    tokenizer: Any = None,
    adapters: str | Sequence[str] | None = None,
    include_base: bool = True,
    held_out: Sequence[int] | HeldOut | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    strip: bool = False,
    casefold: bool = False,
    pattern: str | None = None,
    tolerance: float = 1e-6,
    temperature: float | None = None,
    top_p: float | None = None,
    columns: Mapping[str, str] | None = None,
    separator: str | None = None,
    skip_bad: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    long: str | None = None,
    also: Any = None,
    general: bool = False,
    folders: Any = None,
    progress: bool = True,
    on_progress: Report | None = None,
    should_stop: Callable[[], bool] | None = None,
    name: str = "",
) -> ScoreResult:
    """Scores the base model and its adapters on rows with references, item by item.

    All of them answer in the same batches. The model does not change. After an interruption the result has the
    status ``stopped``, and the items that were scored until then::

        result = nbpeft.score(model, held_out, metric="exact", tokenizer=tokenizer)
        print(result)
        result.flips("base", "sql").broken

    Metrics of answers are ``exact``, ``contains``, ``startswith``, ``regex``, ``number`` (the last one of the answer),
    ``json`` (the share of right fields), ``json_valid`` and ``f1`` (of words). ``choice`` takes the option of the row
    with the greatest likelihood, ``choice_norm`` divides its logarithm by the option's length in characters, without
    white space at its ends, as ``acc_norm`` of lm-eval does; ``loss`` and
    ``perplexity`` are those of the tokens that a training would learn, ``accuracy`` is for classifiers. A function
    ``(answer, row) -> bool | float`` is a metric of answers, too, and so is an object with the ``compute`` of Hugging
    Face's ``evaluate``, which is called for each item on its own.

    Args:
        model: a model of transformers, with or without adapters.
        data: rows in every form that ``train`` takes, or where they are. The reference is the completion, or the last
            turn of the assistant. ``choice`` needs ``choices``, and ``answer`` or a completion; ``regex`` takes a
            ``pattern`` of each row. With ``general`` they may be left out: the loss on the general text is then the
            score.
        metric: a metric, or several in a list; by default ``exact``, and ``accuracy`` for a classifier of texts.
        tokenizer: the tokenizer of the model; not needed for rows that are tokenized.
        adapters: names of the adapters to score, ``a+b`` for the sum of two; None for all.
        include_base: whether to score the base model, too.
        held_out: numbers of the rows to score, 0 for the first: the ``held_out`` of a training's result; None for all.
        max_new_tokens: limit of an answer; by default 8 tokens more than the longest reference (16 with ``strip``), or
            256 for metrics for which the reference may come later in the answer.
        batch_size: rows that are answered together by the base and all adapters; at least 8 by default.
        seed: seed of the bootstrap, of permutations and of sampled answers.
        strip: whether white space at both ends of answers and references is ignored.
        casefold: whether upper and lower case are ignored.
        pattern: regular expression for ``regex``; None takes that of each row.
        tolerance: relative tolerance of ``number``.
        temperature: sampling temperature; 0, the default, is greedy. A row is sampled with random numbers of its own,
            which are the same for the base and each adapter and do not depend on the batch.
        top_p: sample from the most likely tokens whose probabilities sum up to this value; the temperature is then 1
            by default.
        columns: names of the columns, e.g. ``{"prompt": "question", "completion": "answer"}``.
        separator: what separates the cells of a ``.csv`` or ``.tsv`` file; by default it is detected.
        skip_bad: leave out rows that cannot be read, and say which; by default they are refused.
        chat_template_kwargs: variables for the chat template, e.g. ``{"enable_thinking": False}``; by default those
            with which the scored adapters were trained.
        max_length: number of tokens to which rows are cut for ``loss``, ``perplexity`` and ``accuracy``; by default
            the tokenizer's limit, at most 1024.
        long: ``cut`` longer rows, ``drop`` them, or ``split`` texts for ``loss`` and ``perplexity``. By default as in
            the training of the adapters; where that dropped or split rows, also with its ``max_length``.
        also: further rows, of which the loss is measured, to see what an adapter forgot.
        general: the same with a general text of 20 kB that the package has: 23 short paragraphs in English of many
            kinds, written for this purpose, so that no model has learned them; and passages in the public domain that
            most models know, from the Declaration of Independence, the Constitution of the United States with the
            Bill of Rights, and two speeches of Lincoln.
        folders: further adapters to score that are not on the model: name -> folder or hub id, or several folders in a
            list. At most four of them are on the model at a time, and none afterwards.
        progress: whether to show a progress bar.
        on_progress: called with the result so far, several times per second.
        should_stop: called after each token; True ends the scoring early.
        name: name of the model, for display.

    Returns:
        The scores with intervals, and the items.

    Raises:
        ConfigError: an argument is invalid, or a metric does not fit the model.
        TrainingError: the rows cannot be read, or a metric fails on all rows of the first batch.
        AdapterError: there is no such adapter, nothing to score, or the model has no data.
    """
    for argument, value in (("include_base", include_base), ("general", general), ("progress", progress)):
        check_bool(argument, value)
    if data is None:
        if not general or held_out is not None:
            raise ConfigError("data is missing: pass rows with references, or general=True for a general text")
        data, general, metric = _general_rows(), False, "loss" if metric in (None, "exact", ["exact"]) else metric
    check_has_data(model)
    compared = AnswerSettings(strip, casefold, pattern, tolerance)
    settings = ScoreSettings(max_new_tokens, batch_size, seed, temperature, top_p)
    metrics = metrics_of(usual_metric(model) if metric is None else metric, compared)
    settings.check_for(metrics)
    found, column_notes = columns_of(model, adapters, include_base, others=bool(folders))
    found += folder_columns(folders, [column.title for column in found])
    reading: dict[str, Any] = {"separator": separator, "skip_bad": skip_bad, "max_length": max_length}
    form, form_notes = _trained_form(model, found, given_variables=bool(chat_template_kwargs))
    reading["usual_variables"] = chat_template_kwargs or form.variables
    reading["reasoning"] = "keep" if form.learns_reasoning else "drop"
    own: dict[str, Any] = {"held_out": held_out, "columns": columns, "chat_template_kwargs": chat_template_kwargs}
    own |= {"long": long, "usual_long": form.long}
    if max_length is None and long in (None, form.long):
        own["max_length"] = form.max_length
    read = read_rows(model, data, metrics, tokenizer, **{**reading, **own})
    odd = odd_answers(few_answers(row.reference for row in read.rows))
    state = Scoring(name, found, metrics, read, settings, [*column_notes, *form_notes, *read.notes, *odd])
    further = _elsewhere(model, state, also, general, tokenizer, reading)
    state.limit = limit = max_new_tokens or default_limit(read.rows, metrics, stripped=strip)
    parts = [state] if further is None else [state, further]
    steps = sum(part.steps for part in parts)
    with progress_bar(steps, "scoring", show=progress and on_progress is None) as bar:
        reported = -INTERVAL

        def advanced() -> None:
            nonlocal reported
            done, now = sum(part.done for part in parts), time.perf_counter()
            bar(done)
            if on_progress is not None and now - reported >= INTERVAL:
                reported = now
                on_progress(replace(state.result("running"), done=done / steps))

        try:
            with evaluating(model):
                advanced()
                for part in parts:
                    if state.is_complete or part is state:
                        part.run(model, tokenizer, limit, should_stop, advanced)
        except KeyboardInterrupt:
            pass
    result = state.result("finished" if all(part.is_complete for part in parts) else "stopped")
    if further is None or not further.is_complete:
        return result
    return replace(result, elsewhere=further.result("finished"))


def _trained_form(
    model: nn.Module, columns: Sequence[Column], *, given_variables: bool
) -> tuple[PromptFormat, tuple[str, ...]]:
    """What the rows have in common on which the adapters were trained; and notes on what differs.

    The rows' variables for the chat template do not count if such variables are given.
    """
    manager, usual = manager_of(model), PromptFormat(chat=True)
    if manager is None:
        return usual, ()
    names = dict.fromkeys(name for column in columns if not column.folder for name in column.names)
    configs = {name: manager.configs.get(name) for name in names}
    if manager.provider is not None:  # adapters that are loaded when they are used
        configs |= {name: manager.provider.config_of(name) for name, config in configs.items() if config is None}
    used = [config for config in configs.values() if config is not None] or list(manager.configs.values())
    forms = [form for config in used if (form := prompt_format(config)) is not None and form.chat]
    notes = tuple(
        f"{name}: {_ROWS_TOGETHER}" for name, config in configs.items() if config is not None and config.mixes_rows
    )
    variables, reasoning = {form.template for form in forms}, {form.learns_reasoning for form in forms}
    notes += (_DIFFERENT_VARIABLES,) if len(variables) > 1 and not given_variables else ()
    notes += (_DIFFERENT_REASONING,) if len(reasoning) > 1 else ()
    return common_format(used) or usual, notes


def _elsewhere(
    model: nn.Module, state: Scoring, also: Any, general: bool, tokenizer: Any, reading: Mapping[str, Any]
) -> Scoring | None:
    """The scoring of the loss on further rows; None if there are none."""
    if also is not None and general:
        raise ConfigError("also and general exclude each other: both are rows of which the loss is measured")
    if also is None and not general:
        return None
    metrics = metrics_of("loss", AnswerSettings())
    rows = _general_rows() if general else also
    separator = separator_for(rows, reading["separator"])
    read = read_rows(model, rows, metrics, tokenizer, **{**reading, "separator": separator})
    title = "general text" if general else "the further rows"
    return Scoring(title, state.columns, metrics, read, state.settings, list(read.notes))


def _general_rows() -> list[str]:
    return _GENERAL.read_text(encoding="utf-8").strip().split("\n\n")


@dataclass
class Scoring:
    """What was computed so far.

    Attributes:
        name: name of the model.
        columns: what is scored.
        metrics: the metrics.
        read: the rows.
        settings: how rows are answered.
        notes: messages about rows and columns.
        done: number of (row, column) pairs that are computed, for each kind of computation.
        limit: the greatest number of tokens of an answer.
    """

    name: str
    columns: tuple[Column, ...]
    metrics: tuple[Metric, ...]
    read: ScoredRows
    settings: ScoreSettings
    notes: list[str]
    done: int = 0
    limit: int = 0
    _answers: list[dict[str, str]] = field(init=False)
    _values: list[dict[str, dict[str, float | bool]]] = field(init=False)
    _weights: list[float] = field(init=False)
    _cut: list[set[str]] = field(init=False)
    _failed: dict[str, list[str]] = field(default_factory=dict)
    _not_finite: dict[str, list[int]] = field(default_factory=dict)
    _started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        count = len(self.read.rows)
        self._answers, self._cut = [{} for _ in range(count)], [set() for _ in range(count)]
        self._values = [{metric.name: {} for metric in self.metrics} for _ in range(count)]
        self._weights = [1.0] * count

    @property
    def steps(self) -> int:
        """The value of ``done`` at the end."""
        kinds = {metric.needs for metric in self.metrics}
        return len(kinds) * len(self.read.rows) * len(self.columns)

    @property
    def is_complete(self) -> bool:
        """Whether everything is computed."""
        return self.done >= self.steps

    def run(
        self,
        model: nn.Module,
        tokenizer: Any,
        limit: int,
        should_stop: Callable[[], bool] | None,
        advanced: Callable[[], None],
    ) -> None:
        """Computes everything, one kind of computation after the other, until one of them is stopped.

        ``advanced`` is called after each batch.
        """
        self.limit = limit
        given: dict[str, Any] = {"tokenizer": tokenizer, "should_stop": should_stop}
        expected, groups = 0, groups_of(self.columns)
        while groups:
            group = groups.pop(0)
            steps = len({metric.needs for metric in self.metrics}) * len(self.read.rows) * len(group)
            try:
                with loaded(model, [self.columns[number] for number in group]) as serving:
                    self._run_group(serving, group, given, advanced)
            except CheckpointError as error:
                if len(group) > 1:  # the others may be fine
                    groups = [*([number] for number in group), *groups]
                    continue
                self.notes.append(f"not scored: {self.columns[group[0]].title}: {error}")
                self.done = expected + steps
            expected += steps
            if self.done < expected:
                return

    def _run_group(
        self, model: nn.Module, group: Sequence[int], given: Mapping[str, Any], advanced: Callable[[], None]
    ) -> None:
        """Computes everything for the columns with these indices, until it is stopped."""
        rows, columns = self.read.rows, [self.columns[number] for number in group]
        size = self.settings.rows_together(len(columns))
        kinds = {metric.needs for metric in self.metrics}
        for kind in sorted(kinds, key=lambda kind: (kind != "answers", kind)):  # a metric that fails is noticed at once
            before = self.done
            if kind == "answers":
                batches: Iterable[Any] = answer_rows(
                    model, rows, columns, self.settings, limit=self.limit, ends=self.read.ends, **given
                )
                take: Callable[[Any], None] = self._take_answers
            elif kind == "tokens":
                batches = self._losses(model, columns, size, given)
                take = self._take_losses
            elif kind == "classes":
                batches = classes(model, [row.coded for row in rows], columns, size=size, **given)
                take = self._take_classes
            else:
                batches, take = self._choices(model, columns, size, given), self._take_choices
            for batch in batches:
                take([(place, group[column], value) for place, column, value in batch])
                self.done += len(batch)
                advanced()
            if self.done < before + len(rows) * len(columns):
                return

    def _losses(
        self, model: nn.Module, columns: Sequence[Column], size: int, given: Mapping[str, Any]
    ) -> Iterable[Outputs]:
        """The sums of losses and of weights of each row, of one that was split those of all its parts."""
        parts = [(place, part) for place, row in enumerate(self.read.rows) for part in (row.coded, *row.other_parts)]
        found: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for batch in token_losses(model, [part for _, part in parts], columns, size=size, **given):
            whole: Outputs = []
            for number, column, sums in batch:
                place = parts[number][0]
                of_row = found.setdefault((place, column), [])
                of_row.append(sums)
                if len(of_row) == 1 + len(self.read.rows[place].other_parts):
                    whole.append((place, column, tuple(map(sum, zip(*of_row, strict=True)))))
            yield whole

    def _choices(
        self, model: nn.Module, columns: Sequence[Column], size: int, given: Mapping[str, Any]
    ) -> Iterable[Outputs]:
        """The losses of the options of each row, of all options of a batch of rows together."""
        rows = self.read.rows
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            places = [(start + place, number) for place, row in enumerate(some) for number in range(len(row.options))]
            coded = [rows[place].options[number][1] for place, number in places]
            losses: dict[tuple[int, int], dict[int, tuple[float, float]]] = {}
            for batch in token_losses(model, coded, columns, size=size, **given):
                for option, column, loss in batch:
                    place, number = places[option]
                    losses.setdefault((place, column), {})[number] = loss
            whole = {key: found for key, found in losses.items() if len(found) == len(rows[key[0]].options)}
            yield [(place, column, found) for (place, column), found in whole.items()]
            if len(whole) < len(some) * len(columns):
                return

    # What was computed for a batch

    def _take_answers(self, batch: Sequence[tuple[int, int, GivenAnswer]]) -> None:
        for place, column, answer in batch:
            title, row = self.columns[column].title, self.read.rows[place]
            text = self._answers[place][title] = row.answer(answer.text)
            if answer.cut:
                self._cut[place].add(title)
            if not answer.finite:
                self._not_finite.setdefault(title, []).append(row.number)
            for metric in self.metrics:
                if metric.needs == "answers":
                    self._take_value(metric, place, title, text)
        for metric in self.metrics:
            failed = len(self._failed.get(metric.name, ()))
            if metric.needs == "answers" and not self.done and failed == len(batch):
                raise TrainingError(f"{self._failed[metric.name][0]}; it fails on all rows of the first batch")

    def _take_value(self, metric: Metric, place: int, title: str, answer: str) -> None:
        row = self.read.rows[place]
        try:
            self._values[place][metric.name][title] = value_of(metric, answer, row.reference, row.given, row.number)
        except TrainingError as error:
            self._failed.setdefault(metric.name, []).append(f"{error} (answer of {title})")

    def _take_losses(self, batch: Outputs) -> None:
        for place, column, (total, weight) in batch:
            title, mean = self.columns[column].title, total / weight if weight else math.nan
            self._weights[place] = weight
            if math.isnan(mean):
                self._not_finite.setdefault(title, []).append(self.read.rows[place].number)
            for metric in self.metrics:
                if metric.needs == "tokens":
                    value = math.exp(min(mean, 700.0)) if metric.is_perplexity else mean
                    self._values[place][metric.name][title] = value

    def _take_classes(self, batch: Outputs) -> None:
        for place, column, number in batch:
            title, row = self.columns[column].title, self.read.rows[place]
            if number is None:
                self._not_finite.setdefault(title, []).append(row.number)
            known = self.read.inputs.classes
            names = {} if known is None else {value: text for text, value in known.names.items()}
            self._answers[place][title] = "" if number is None else names.get(number, str(number))
            for metric in self.metrics:
                self._values[place][metric.name][title] = number == row.coded["labels"]

    def _take_choices(self, batch: Outputs) -> None:
        for place, column, losses in batch:
            title, row = self.columns[column].title, self.read.rows[place]
            if any(math.isnan(total) for total, _ in losses.values()):
                self._not_finite.setdefault(title, []).append(row.number)
            for metric in self.metrics:
                if metric.needs != "options":
                    continue
                # As in lm-eval, the space between prompt and option is no part of the option's length.
                lengths = [len(text.strip()) or 1 if metric.name == "choice_norm" else 1 for text, _ in row.options]
                chosen = min(losses, key=lambda number: losses[number][0] / lengths[number])
                self._answers[place].setdefault(title, row.options[chosen][0])
                self._values[place][metric.name][title] = chosen == row.right

    # The result

    def result(self, status: Status) -> ScoreResult:
        """The result so far."""
        rows = enumerate(self.read.rows)
        items = tuple(self._item(place, row) for place, row in rows if any(self._values[place].values()))
        settings = {"temperature": self.settings.temperature, "top-p": self.settings.top_p, "seed": self.settings.seed}
        given = {name: float(value) for name, value in settings.items() if value is not None}
        return ScoreResult(
            self.name,
            tuple(column.title for column in self.columns),
            tuple(map(self._facts, self.metrics)),
            self.metrics[0].name,
            items,
            len(self.read.rows),
            time.perf_counter() - self._started,
            status,
            () if status == "running" else (*self.notes, *self._problems()),
            self.settings.seed,
            given if self.settings.draws else {},
            self.done / self.steps if self.steps else 1.0,
            limit=self.limit if generates(self.metrics) else None,
        )

    def _item(self, place: int, row: ScoredRow) -> ScoreItem:
        values = {
            metric: {title: float(value) for title, value in by_title.items()}
            for metric, by_title in self._values[place].items()
        }
        return ScoreItem(
            row.number,
            row.prompt,
            row.reference,
            dict(self._answers[place]),
            values,
            frozenset(self._cut[place]),
            self._weights[place],
        )

    def _facts(self, metric: Metric) -> MetricFacts:
        share = metric.is_share
        if share is None:  # a function of the user
            share = all(type(value) is bool for values in self._values for value in values[metric.name].values())
        weighted = metric.needs == "tokens"
        return MetricFacts(metric.name, metric.greater_is_better, share, metric.is_perplexity, weighted)

    def _problems(self) -> list[str]:
        """What users should know about the answers, one line for each problem."""
        titles = [title for place in range(len(self._cut)) for title in self._cut_early(place)]
        cut = {column.title: titles.count(column.title) for column in self.columns}
        if any(cut.values()):
            each = ", ".join(f"{title} {count}" for title, count in cut.items() if count)
            return [f"answers cut at {plural(self.limit, 'token')} (max_new_tokens): {each}", *self.failures()]
        return self.failures()

    def _cut_early(self, place: int) -> list[str]:
        """The columns whose answer to a row might have become right, or was cut at a limit that was given."""
        reference = self.read.rows[place].reference.strip()
        all_count = self.settings.max_new_tokens is not None or not only_the_start_counts(self.metrics)
        return [
            title
            for title in self._cut[place]
            if all_count or reference.startswith(self._answers[place].get(title, "").strip())
        ]

    def failures(self) -> list[str]:
        """Which outputs are not numbers, and which answers are not counted because the metric failed."""
        found = []
        for title, numbers in self._not_finite.items():
            rows = f"{'row' if len(numbers) == 1 else 'rows'} {few(sorted(set(numbers)), 5, quoted=False)}"
            found.append(f"{title}: its outputs are not numbers (NaN) at {rows}")
        for messages in self._failed.values():
            more = f"; {plural(len(messages), 'answer')} not counted" if len(messages) > 1 else "; it is not counted"
            found.append(messages[0] + more)
        return found
