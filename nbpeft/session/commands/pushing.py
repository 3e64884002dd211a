"""Uploading an adapter to the hub, with a model card."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from nbpeft.display import numbers
from nbpeft.errors import AdapterError
from nbpeft.session.results import PushResult
from nbpeft.state import ENDED, MemberState, TrainState

if TYPE_CHECKING:
    from nbpeft.checkpoint import CardFacts
    from nbpeft.session.context import ModelLike, SessionContext
    from nbpeft.session.registry import TrackedModel

_REPO = re.compile(r"(?:[\w.-]+/)?[\w.-]{1,96}", re.ASCII)


def push(
    ctx: SessionContext,
    repo: str,
    *,
    adapter: str | None = None,
    model: ModelLike = None,
    private: bool | None = None,
    message: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    replace: bool = False,
) -> PushResult:
    """Upload an adapter to the hub, with a card that describes its training and how to load it.

    An existing repository gets a new commit, and the text of its card is preserved. The access token is that of
    ``HF_TOKEN``, of the hub's login, or of the secrets of Colab or Kaggle.

    Args:
        repo: ``user/name``; created if it does not exist.
        adapter: its name; None if the model has only one.
        model: an adapted model.
        private: whether a new repository is private; None for the account's default, usually public.
        message: commit message.
        revision: a branch, created if it does not exist; None for the main branch.
        token: an access token instead of those above.
        endpoint: URL of the hub; None for ``HF_ENDPOINT``, or the usual one.
        replace: overwrite another adapter in the repository: one of another method, rank, targets or base.

    Raises:
        AdapterExistsError: the repository has another adapter.
        AdapterError: there are several adapters and no name, or ``repo`` is not the name of a repository.
        CheckpointError: there is no token, or the hub refused the upload or cannot be reached.
    """
    from nbpeft.checkpoint import find_token
    from nbpeft.model.saving import files

    if not isinstance(repo, str) or not _REPO.fullmatch(repo):
        raise AdapterError(f"push needs a repository as user/name, not {repo!r:.60}")
    tracked = ctx.models.get(model, command="push", adapters=(adapter,))
    chosen = _adapter(tracked, adapter)
    token = find_token(token)
    options: dict[str, Any] = {"revision": revision, "commit_message": message}
    with ctx.command(f"uploading {chosen!r} to {repo}", slow=True) as notes:
        address = files.push(
            tracked.manager,
            repo,
            name=chosen,
            facts=card_facts(tracked, chosen, repo, repo.rpartition("/")[2]),
            private=private,
            token=token,
            endpoint=endpoint,
            replace=replace,
            **{key: value for key, value in options.items() if value is not None},
        )
        return PushResult(tracked.name, chosen, address, notes=tuple(notes))


def _adapter(tracked: TrackedModel, name: str | None) -> str:
    """Return the name of the adapter to push."""
    names = tuple(tracked.manager.names)
    if name is not None:
        tracked.manager.require(name)
        return name
    if not names:
        raise AdapterError(f"{tracked.name} has no adapter to push")
    if len(names) > 1:
        raise AdapterError(f"{tracked.name} has several adapters; say which one to push (name=…): {', '.join(names)}")
    return names[0]


def card_facts(tracked: TrackedModel, name: str, source: str, title: str, *, example: bool = False) -> CardFacts:
    """Return information for an adapter's card in addition to its config.

    Args:
        tracked: the model.
        name: name of the adapter.
        source: repository or folder from which the card's code loads the adapter.
        title: heading of the card.
        example: whether the card has a row of the data as an example; not for a card that is published.
    """
    from nbpeft.checkpoint import CardFacts
    from nbpeft.display.svg import loss_svg
    from nbpeft.training.monitor.run_checkpointer import name_of_base

    state = tracked.state()
    own = sum(adapter.parameter_count for adapter in state.adapters)
    base = f"a {state.class_name} with {numbers.count(state.parameter_count - own)} parameters"
    known_as = PurePath(name_of_base(tracked.model)).name
    base = base if known_as == state.class_name else f"{known_as}, {base}"
    scores = tracked.score_of(name)[: None if example else 1]
    train, call = tracked.training, tracked.training_call
    if train is None or train.status not in ENDED or name not in re.split(r",\s*", train.adapter):
        return CardFacts(source, title, base, scores)
    known = call if call is not None and call.run_id == train.run_id else None
    rows = [("data", known.data), ("columns", known.columns), ("evaluated on", known.eval_data)] if known else []
    rows += [*_results(train, name), *scores]
    return CardFacts(
        source,
        title,
        base,
        tuple((label, words) for label, words in rows if words),
        known.arguments if known else {},
        loss_svg(train) if train.history else "",
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"


def _results(train: TrainState, name: str) -> list[tuple[str, str]]:
    """Return the results of a training as rows of text; of a sweep those of one adapter."""
    own: TrainState | MemberState = next((member for member in train.members if member.name == name), train)
    total = f" of {train.total_steps:,}" if train.total_steps and train.total_steps != own.step else ""
    rows = [("steps", f"{own.step:,}{total}"), ("time", _duration(train.elapsed))]
    if own.smoothed_loss is not None:
        rows.append(("training loss at the end, smoothed", numbers.loss(own.smoothed_loss)))
    if own.eval_loss is not None:
        rows.append((f"evaluation loss at step {own.eval_step:,}", numbers.loss(own.eval_loss)))
    rows += [(metric, f"{value:.4g}") for metric, value in own.metrics.items()]
    if own.best_step is None or own.best_step == own.eval_step:
        return rows
    curves = {"evaluation loss": own.eval_history, **own.metric_history}
    at_best = ((name, value) for name, curve in curves.items() for step, value in curve if step == own.best_step)
    return rows + [(f"{name} at the best step, {own.best_step:,}", f"{value:.4g}") for name, value in at_best]
