"""What to do after a training: whether its adapter is saved, and the commands that follow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from nbpeft.state import ENDED, NamedRows, SessionState, TrainState


@dataclass(frozen=True)
class _Step:
    """What to do with trained adapters, and the command for it, with names of values in braces."""

    label: str
    command: str
    of_answers: bool = False
    for_each: bool = True


_SAVE = _Step("Save", "%lora save adapters/{name} --adapter {name}{model}")
_PANEL = _Step("Compare", "%lora compare --panel{model}", of_answers=True, for_each=False)
_SCORE = "{score}"
_ANY_PROMPT, _LONGEST = '"your prompt"', 200
_LIKE_AN_OPTION = re.compile(r"-\S*(=|$)")
_THEN = (
    _Step(_SCORE, "%lora score {name} --data {rows}{model}"),
    _Step("Ship", "%lora ship {name} --for {engine}{model}"),
)
_STEPS = (_SAVE, _Step("Ask", "%lora ask {prompt} --adapter {name}{model}", of_answers=True), _PANEL, *_THEN)
_EACH_ANSWERS = "%lora compare {prompt} --adapters {names}{model}"
_STEPS_OF_SEVERAL = (_SAVE, _Step("Ask each", _EACH_ANSWERS, of_answers=True, for_each=False), _PANEL, *_THEN)


@dataclass(frozen=True)
class NextSteps:
    """What to do after a training.

    Attributes:
        saved: whether the adapter is saved as it is now; None if it is no longer on the model as this run trained it.
        note: why there is nothing to save, or that nothing was trained.
        commands: (what it does, command).
    """

    saved: bool | None
    note: str = ""
    commands: tuple[tuple[str, str], ...] = ()


def next_steps(train: TrainState, state: SessionState, model_name: str) -> NextSteps | None:
    """Returns what to do with the adapter that a run has trained; None if it still runs, or has no adapter."""
    best = train.best_member
    names = train.names if best is None else (best.name,)
    if train.status not in ENDED or not names:
        return None
    run = PurePath(train.folder).name if train.folder else ""
    resume = f"%lora resume {run}"
    model = state.model(model_name)
    found = [item for item in model.adapters if item.name in names] if model is not None else []
    last = model.training if model is not None else None
    learned = (train.step if train.kept_step is None else train.kept_step) > train.first_step
    if not learned:
        return None
    if len(found) < len(names):
        where = f"{', '.join(names)} is not on the model {model_name}." if model_name else ""
        return NextSteps(None, where, (("Restore", resume),) if run else ())
    if last is not None and last.run_id != train.run_id and {*last.names} & {*names}:
        return NextSteps(None, f"{', '.join(names)} was trained further in a later run.")
    if model is not None and (gone := [name for name in names if name in model.replaced]):
        back = (*(("Restore", f"%lora delete {name}") for name in gone), ("then", resume)) if run else ()
        return NextSteps(None, f"{', '.join(gone)} no longer has the weights of this training.", back)
    alone, generates, scored = len(state.models) == 1, model is None or model.generates, model is None or model.scored
    words = {
        "names": " ".join(names),
        "prompt": _quoted(train.samples[-1].prompt) if train.samples else _ANY_PROMPT,
        "model": "" if alone else f" --model {model_name}",
        "score": _score_label(train.rows),
        "engine": "ollama" if generates else "transformers",
    }
    unsaved = {item.name for item in found if item.unsaved}
    steps = _STEPS if len(names) == 1 else _STEPS_OF_SEVERAL
    commands = tuple(
        (step.label.format_map(words), step.command.format_map({**words, "name": name, "rows": rows}))
        for step in steps
        if generates or not step.of_answers
        if step.label != _SCORE or (scored and "loss" in train.headline)  # rows for reward functions have no references
        for name in (names if step.for_each else names[:1])
        if name in unsaved or step.label != "Save"
        for rows in [_rows_of(name, train.rows)]
    )
    unfinished = train.status != "finished" and bool(run) and train.kept_step is None
    commands += (("Resume", resume),) if unfinished else ()
    return NextSteps(not unsaved, "", commands)


def kept_steps(train: TrainState, saved: Mapping[str, str], *, has_checkpoint: bool) -> NextSteps | None:
    """Returns what to do with the adapter of a run of which only the folder is left.

    Args:
        train: the run.
        saved: adapter -> folder in which it was saved.
        has_checkpoint: whether the run's folder has a checkpoint.
    """
    if train.status not in ENDED:
        return None
    if saved:
        return NextSteps(
            True, "", tuple(("Load", f"%lora load {_word(place)} --name {name}") for name, place in saved.items())
        )
    label = "Restore" if train.status == "finished" else "Resume"
    return NextSteps(False, "", ((label, f"%lora resume {PurePath(train.folder).name}"),)) if has_checkpoint else None


def _score_label(rows: NamedRows) -> str:
    if not rows.learned:
        return "Score"
    if rows.held_out:
        return "Score on its held-out rows" if rows.numbered else "Score on all rows, held-out ones included"
    return "Score on its training rows"


def _rows_of(adapter: str, rows: NamedRows) -> str:
    text = rows.of(adapter)
    return f"{text} --held-out" if text and rows.held_out and rows.numbered else text or "DATA"


def _quoted(prompt: str) -> str:
    """A prompt as one word of a line; a placeholder if that is long, or cannot be written."""
    escapes: dict[str, str | int | None] = {"\\": r"\\", "\n": r"\n", "\t": r"\t"}
    text = prompt.translate(str.maketrans(escapes))
    quote = "'" if '"' in text else '"'
    is_word = not _LIKE_AN_OPTION.match(text)  # quoted or not, a line reads it as one
    fits = len(text) <= _LONGEST and text.isprintable() and quote not in text and is_word
    return f"{quote}{text}{quote}" if fits else _ANY_PROMPT


def _word(text: str) -> str:
    return f'"{text}"' if " " in text else text
