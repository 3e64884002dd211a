"""Training runs as text and as a card."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from nbpeft.display import numbers
from nbpeft.display.blocks import (
    Block,
    Box,
    Card,
    Columns,
    Commands,
    CurveChart,
    Details,
    Figure,
    Figures,
    LossChart,
    Pill,
    Progress,
    SmallCharts,
    Span,
    Table,
    Text,
    Tone,
    card,
    dim,
    line,
)
from nbpeft.display.charts import smooth
from nbpeft.display.memory import memory_bar
from nbpeft.display.next_steps import NextSteps
from nbpeft.errors import cut
from nbpeft.state import ENDED, Curve, MemberState, Sample, TrainState

_STATUS_TONES: dict[str, Tone] = {
    "failed": "error",
    "finished": "success",
    "stopped": "dim",
    "paused": "warning",
    "pausing": "warning",
    "stopping": "warning",
}
_WORDS = {"pausing": "pausing after this step", "stopping": "stopping after this step"}
_MORE = "%lora doctor --traceback shows where it failed."
_LONGEST_ANSWER = 400
_LONGEST_NAME = 24
_ICONS: dict[Tone, str] = {"error": "✖", "warning": "⚠\ufe0e", "success": "✓"}  # the selector asks for text, not emoji


def training_card(
    train: TrainState,
    *,
    model_name: str = "",
    hint: str = "",
    seen: str = "",
    next_steps: NextSteps | None = None,
    members: bool = True,
) -> Card:
    """Returns a card of a run: figures, progress, messages, curves, samples, memory, and what to do next.

    Args:
        train: the run.
        model_name: name of its model.
        hint: how to stop the run if there are no buttons.
        seen: the current time as text, for a card in a file: it shows when a running run was last seen.
        next_steps: what to do after the run.
        members: whether to include the table of a sweep's adapters.
    """
    begun = train.first_step
    planned = (train.total_steps or 0) - begun
    done = min(1.0, (train.step - begun) / planned) if planned > 0 else float(train.status == "finished")
    return card(
        f"Training {_subject(train)}".strip()
        + (f" on {cut(rows, _LONGEST_NAME)}" if (rows := train.rows.trained_on) else ""),
        _figures(train),
        Progress(done, train.status == "failed"),
        _notes(train),
        _curves(train),
        _scores(train),
        (members_table(train) if members else None) if train.members else SmallCharts(train),
        _samples(train),
        memory_bar(train.memory, thin=True) if train.memory is not None else None,
        _following(next_steps) if next_steps is not None else None,
        line(dim(hint)),
        aside=(dim(model_name), _status(train, seen)),
    )


def _status(train: TrainState, seen: str) -> Text:
    """Returns the status; in a file, for a running run, when it was last seen."""
    if not seen or train.status in ENDED:
        return Pill(status_message(train), _status_tone(train))
    status = "" if train.status in ("starting", "running") else f" ({status_message(train)})"
    return dim(f"last seen {seen}, {_at(train)}{status}")


def _following(steps: NextSteps) -> tuple[Block, ...]:
    """Returns whether the adapter is saved, and the commands that follow a training."""
    tone: Tone = "success" if steps.saved else "warning"
    saved = "" if steps.saved is None else "saved" if steps.saved else "not saved"
    mark = line(Text(f"{_ICONS[tone]} {saved}" if saved else "", tone), dim(steps.note))
    return mark, *([Commands(steps.commands)] if steps.commands else [])


def _at(train: TrainState) -> str:
    return f"step {train.step:,}" + (f" of {train.total_steps:,}" if train.total_steps else "")


def _notes(train: TrainState) -> tuple[Block, ...]:
    """Returns the messages for the user: errors, then warnings, one per line, then facts in one line."""
    if train.status == "failed":
        return line(_problem(train.message, "error")), line(dim(_MORE))
    facts = train.message
    for problem in (*train.errors, *train.warnings):
        facts = facts.replace(problem, "")
    errors = [line(_problem(words, "error")) for words in train.errors]
    warnings = [line(_problem(words, "warning")) for words in train.warnings]
    return *errors, *warnings, line(dim(" · ".join(part.strip() for part in facts.split(" · ") if part.strip())))


def _problem(words: str, tone: Tone) -> Text:
    return Text(f"{_ICONS[tone]} {words}", tone)


def _subject(train: TrainState) -> str:
    """Returns the name of the trained adapter, or the number of adapters."""
    return f"{len(train.members)} adapters side by side" if train.members else train.adapter


def _curves(train: TrainState) -> Block:
    """Returns a chart of the run's loss, of the curve in its place, or of the loss of each adapter of a sweep."""
    live = _is_live(train)
    if (name := _charted(train)) in train.series:
        return CurveChart(((name, train.series[name], ()),), legend=False, live=live, metric=name)
    if not train.members:
        return LossChart(train)
    curves = tuple((member.name, _smoothed(member.history), member.eval_history) for member in train.members)
    return CurveChart(curves, legend=False, live=live)


def _charted(train: TrainState) -> str:
    """Returns the name of the curve that is drawn large."""
    return "loss" if "loss" in train.headline else train.headline[0]


def headline_words(train: TrainState, member: MemberState | None) -> list[str]:
    """Returns the figures by which a run or an adapter of a sweep is judged, other than losses: ``reward 0.412``."""
    return [f"{name} {numbers.metric(value)}" for name, value in train.figures_of(member).items() if name != "loss"]


def _scores(train: TrainState) -> Block | None:
    """Returns a chart of the metric by which the adapters of a sweep are ranked."""
    metric = next((member.metric for member in train.members), "")
    curves = tuple((member.name, member.metric_history.get(metric, ()), ()) for member in train.members)
    if not any(len(curve) > 1 for _, curve, _ in curves):
        return None
    return CurveChart(curves, legend=False, live=_is_live(train), metric=metric)


def _is_live(train: TrainState) -> bool:
    """Returns whether the state changes while it is shown."""
    return train.status not in (*ENDED, "paused")


def _smoothed(curve: Curve) -> Curve:
    """Returns a smoothed curve: noise would hide which of several curves is lower."""
    return tuple(
        (int(step), value) for step, value in smooth([(step, value) for step, value in curve if math.isfinite(value)])
    )


def _figures(train: TrainState) -> Figures:
    total = f" / {train.total_steps:,}" if train.total_steps else ""
    epoch = f"epoch {train.epoch:,.2f}".rstrip("0").rstrip(".") if train.epoch is not None else ""
    begun = f"continues from step {train.first_step:,}" if train.first_step else ""
    elapsed = Figure("time", numbers.clock(train.elapsed), "", 70)
    if train.remaining is not None and train.status not in ENDED:
        elapsed = Figure("time left", numbers.clock(train.remaining), f"after {numbers.clock(train.elapsed)}", 70)
    memory = train.memory
    used = sum(part.byte_count for part in memory.parts) if memory is not None else None
    peak = f"peak {numbers.size(memory.peak)}" if memory is not None and memory.peak is not None else ""
    figures = (
        *_headline(train),
        *_loss(train),
        *_evaluations(train),
        Figure("step", f"{train.step:,}{total}", " · ".join(filter(None, (epoch, begun))), 84),
        Figure("tokens/s", numbers.rate(train.tokens_per_second), "", 64),
        elapsed,
        Figure("memory", numbers.size(used), peak, 76),
    )
    ended = train.status in ENDED  # an ended run will not get the figures that it lacks
    return Figures(tuple(figure for figure in figures if not ended or figure.figure != numbers.NONE))


def _evaluations(train: TrainState) -> Iterator[Figure]:
    """Yields the evaluation loss and the metrics; in a sweep those of the best adapter."""
    measured, loss, title, words = train.eval_step, train.eval_loss, "eval loss", _best_words(train)
    if train.members and train.best_member is None:  # each has its own rows, and its figures in the table
        return
    if (best := train.best_member) is not None:
        title = "lowest eval loss"
        if best.metric:  # the last evaluation is that of the adapters that were trained then
            measured, loss, title = best.eval_step, best.eval_loss, "eval loss of the best"
            words = f"at step {measured:,}" if measured else ""
    if "loss" in train.headline:
        yield Figure(title, numbers.loss(loss), words, 84, _perplexity(loss))
    for name, value in _metrics(train).items():
        where = _value_of_the_best(train, name) or (f"at step {measured:,}" if measured else "")
        yield Figure(f"{name} of the best" if train.members else name, numbers.metric(value), where, 70)


def _metrics(train: TrainState) -> Mapping[str, float]:
    """Returns the last values of the metrics; in a sweep those of the best adapter."""
    best = train.best_member
    if train.members and best is None:
        return {}
    return train.metrics if best is None or not best.metrics else best.metrics


def _loss(train: TrainState) -> Iterator[Figure]:
    """Yields the loss, if it says something; in a sweep that of the best adapter, not a mean over good and bad ones."""
    if (best := train.best_member) is not None:
        name = cut(best.name, _LONGEST_NAME)
        yield Figure("loss of the best", numbers.loss(best.smoothed_loss), name, 84, best.name)
    elif "loss" in train.headline:
        mean = f"mean {numbers.loss(train.mean_loss)}" if train.mean_loss is not None else ""
        yield Figure("loss", numbers.loss(train.loss), mean, 84)


def _best_words(train: TrainState) -> str:
    if train.best_step is None:
        return f"at step {train.eval_step:,}" if train.eval_step is not None else ""
    best = next((value for step, value in train.eval_history if step == train.best_step), None)
    if best is not None and any(value < best for _, value in train.eval_history):  # the best by a metric
        return f"{numbers.loss(best)} at best step {train.best_step:,}"
    if best is None or train.best_step == train.eval_step:
        return f"best, at step {train.best_step:,}"
    return f"best {numbers.loss(best)} at step {train.best_step:,}"


def _value_of_the_best(train: TrainState, name: str) -> str:
    """Returns a metric at the best step, if that is not the last one that was evaluated, and else nothing."""
    if train.members or train.best_step == train.eval_step:
        return ""
    value = next((value for step, value in train.metric_history.get(name, ()) if step == train.best_step), None)
    return "" if value is None else f"{numbers.metric(value)} at best step {train.best_step:,}"


def _perplexity(eval_loss: float | None) -> str:
    if eval_loss is None or not eval_loss < math.log(1e6):
        return ""
    return f"perplexity {math.exp(eval_loss):,.4g}"


def _samples(train: TrainState) -> tuple[Block, ...]:
    """Returns the last answers side by side with the base model's, and earlier answers folded.

    Earlier answers are shown only if the run is paused or has ended, because each update would fold them again.
    """
    answers = [sample for sample in train.samples if sample.reward is None]
    shown: list[Block] = [*_rewarded(train)]
    if not answers:
        return tuple(shown)
    last = max(sample.step for sample in answers)
    newest = [sample for sample in answers if sample.step == last]
    earlier = [sample for sample in reversed(answers) if sample.step != last]
    for sample in newest:
        shown += [line(dim("prompt"), Text(sample.prompt, "bold")), _with_base(sample, train.adapter)]
    if earlier and train.status in (*ENDED, "paused"):
        several = len(newest) > 1
        rows = tuple(
            (f"{sample.step:,}", *((sample.prompt,) if several else ()), Text(_answer(sample), wrap="as is"))
            for sample in earlier
        )
        head = ("Step", *(("Prompt",) if several else ()), "Answer")
        shown.append(Details(f"{numbers.plural(len(earlier), 'earlier answer')}", Table(head, rows, right=(0,))))
    return tuple(shown)


def _rewarded(train: TrainState) -> tuple[Block, ...]:
    """Returns the best and the worst of the last completions, and those of earlier steps folded."""
    scored = [(sample, sample.reward) for sample in train.samples if sample.reward is not None]
    if not scored:
        return ()
    last = max(sample.step for sample, _ in scored)
    newest = sorted((pair for pair in scored if pair[0].step == last), key=lambda pair: -pair[1])
    boxes = [
        Box(title, ((_answer(sample), False),), aside=f"reward {numbers.metric(reward)} · step {last:,}")
        for title, (sample, reward) in zip(("best completion", "worst completion"), newest, strict=False)
    ]
    shown: list[Block] = [line(dim("prompt"), Text(_cut(newest[0][0].prompt), "bold")), Columns(tuple(boxes))]
    earlier = [pair for pair in reversed(scored) if pair[0].step != last]
    if earlier and train.status in (*ENDED, "paused"):
        rows = tuple(
            (f"{sample.step:,}", numbers.metric(reward), _cut(sample.prompt), Text(_answer(sample), wrap="as is"))
            for sample, reward in earlier
        )
        title = numbers.plural(len(earlier), "earlier completion")
        shown.append(Details(title, Table(("Step", "Reward", "Prompt", "Completion"), rows, right=(0, 1))))
    return tuple(shown)


def _headline(train: TrainState) -> Iterator[Figure]:
    """Yields the figures by which the run is judged, other than its losses, with the first ones."""
    best = train.best_member
    for name, last in train.figures.items():
        if name != "loss":
            step, first = train.curve(name, best)[0]
            title = name if best is None else f"{name} of the best"
            yield Figure(title, numbers.metric(last), f"{numbers.metric(first)} at step {step:,}", 84)


def _with_base(sample: Sample, adapter: str) -> Columns:
    mine = Box(adapter or "model", ((_answer(sample), False),), aside=f"step {sample.step:,}")
    texts = (("wanted", _cut(sample.wanted)), ("base", _cut(sample.base) + _ending(sample.base_cut)))
    others = [Box(title, ((text, False),)) for title, text in texts]
    return Columns((*(box for box in others if box.text), mine))


def _answer(sample: Sample) -> str:
    return _cut(sample.answer) + _ending(sample.cut) if sample.answer.strip() else "(nothing)"


def _ending(is_cut: bool) -> str:
    """Returns what follows an answer that reached the limit of tokens."""
    return " …" if is_cut else ""


def _cut(text: str) -> str:
    return cut(text, _LONGEST_ANSWER)


def small_curves(train: TrainState) -> tuple[tuple[str, Curve, str, str, str], ...]:
    """Returns the further curves of a run: (name, curve, last, lowest and highest value as text)."""
    formats = {"learning rate": numbers.learning_rate, "tokens/s": numbers.rate, "memory": _size}
    order = ("learning rate", "gradient norm", "tokens/s", "memory")
    named = {name: train.series[name] for name in order if name in train.series}
    named |= {name: curve for name, curve in train.series.items() if name not in (*named, _charted(train))}
    named |= {name: curve for name, curve in train.metric_history.items() if len(curve) > 1}
    result = []
    for name, curve in named.items():
        values = [value for _, value in curve if math.isfinite(value)]
        if values:
            to_text = formats.get(name, numbers.metric)
            result.append((name, curve, to_text(values[-1]), to_text(min(values)), to_text(max(values))))
    return tuple(result)


def _size(value: float) -> str:
    return numbers.size(int(value))


def member_rows(train: TrainState) -> tuple[tuple[str, ...], list[tuple[str, tuple[Span, ...]]], range]:
    """Returns the adapters of a sweep, the best first if there is one, with curve colours and differing settings.

    Returns:
        The titles of the columns; name and cells of each adapter; the indices of the columns with figures.
    """
    best, ranked = train.best_member, list(enumerate(train.members))
    if best is not None:
        ranked.sort(key=lambda item: item[1].rank)
    fields = tuple(dict.fromkeys(field for member in train.members for field in member.settings))
    evaluated = any(member.eval_loss is not None for member in train.members)
    metrics = tuple(dict.fromkeys(name for member in train.members for name in member.metrics))
    judged = tuple(dict.fromkeys(name for member in train.members for name in train.figures_of(member)))
    judged = tuple(name for name in judged if name != "loss")
    head = ("Adapter", *fields, *judged, "loss", *(("eval loss",) if evaluated else ()), *metrics, "gradient norm", "")
    rows: list[tuple[str, tuple[Span, ...]]] = []
    for place, member in ranked:
        figures = [member.smoothed_loss, *([member.eval_loss] if evaluated else [])]
        name = Text(member.name, "bold" if member is best else "", wrap="names", curve=place)
        ended = "" if member.status == "training" else _member_words(member)
        ended += " · the best, active" if member is best and train.status in ENDED else ""
        cells: tuple[Span, ...] = (
            name,
            *(member.settings.get(field, "") for field in fields),
            *(_metric(train.figures_of(member).get(name)) for name in judged),
            *map(numbers.loss, figures),
            *(_metric(member.metrics.get(metric)) for metric in metrics),
            _metric(member.gradient_norm),
            Text(ended, "error" if member.status == "diverged" else "dim"),
        )
        rows.append((member.name, cells))
    figures_from = 1 + len(fields)
    return head, rows, range(figures_from, figures_from + 2 + evaluated + len(judged) + len(metrics))


def _metric(value: float | None) -> str:
    return numbers.NONE if value is None else numbers.metric(value)


def members_table(train: TrainState) -> Table:
    """Returns a table of the adapters of a sweep; see ``member_rows``."""
    head, rows, figures = member_rows(train)
    return Table(head, tuple(cells for _, cells in rows), right=tuple(figures))


def _member_words(member: MemberState) -> str:
    return member.status if member.status == "finished" else f"{member.status} at step {member.step:,}"


def _status_tone(train: TrainState) -> Tone:
    """Returns the tone of the status; that of the worst note for a run that has ended."""
    if train.status in ("finished", "stopped") and (train.errors or train.warnings):
        return "error" if train.errors else "warning"
    return _STATUS_TONES.get(train.status, "accent")


def status_message(train: TrainState) -> str:
    """Returns the status as text."""
    return _WORDS.get(train.status, train.status)


def training_text(train: TrainState, *, seen: str = "", brief: bool = False) -> str:
    """Returns a run as one line of plain text.

    Args:
        train: the run.
        seen: the current time as text; see ``training_card``.
        brief: whether to leave out the message.
    """
    total = f"/{train.total_steps}" if train.total_steps else ""
    status = f"last seen {seen}" if seen and train.status not in ENDED else status_message(train)
    parts, best = [f"{status}: step {train.step}{total}"], train.best_member
    parts += [] if best is None else [f"best {best.name}"]
    parts += headline_words(train, best)
    loss, evaluated = (train.loss, train.eval_loss) if best is None else (best.smoothed_loss, best.eval_loss)
    losses = (("loss", loss), ("eval loss", evaluated)) if "loss" in train.headline else ()
    parts += [f"{name} {numbers.loss(value)}" for name, value in losses if value is not None]
    parts += [f"{name} {numbers.metric(value)}" for name, value in _metrics(train).items()]
    if train.tokens_per_second is not None:
        parts.append(f"{numbers.rate(train.tokens_per_second)} tokens/s")
    if train.remaining is not None and train.status not in ENDED:
        parts.append(f"{numbers.clock(train.remaining)} left")
    else:
        parts.append(numbers.clock(train.elapsed))
    parts += [train.message] if train.message and not brief else []
    return f"training {f'{_subject(train)} ' if train.adapter else ''}{' · '.join(parts)}"
