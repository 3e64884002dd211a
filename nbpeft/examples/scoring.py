"""How many rows a model answers as wanted, to the letter, and how that compares."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbpeft.display.blocks import BarChart, Block, Card, Grid, Table, Text, card, dim, line
from nbpeft.display.numbers import percent
from nbpeft.display.shown import Shown
from nbpeft.errors import ConfigError
from nbpeft.examples.progress import Progress
from nbpeft.examples.tasks import Row

_SHOWN = 5
"""Answers in the card of a score."""
_WORTH_SHARING = 32
"""Tokens."""
Key = str | tuple[str, str]


@dataclass(frozen=True, repr=False)
class Score(Shown):
    """How many rows were answered as wanted.

    Attributes:
        rows: the rows.
        answers: what the model said to each, up to the first line break.
        prompt_tokens: tokens of a prompt, on average.
        seconds: it took.
        label: what was scored, in words.
    """

    rows: tuple[Row, ...]
    answers: tuple[str, ...]
    prompt_tokens: float
    seconds: float
    label: str = ""

    @property
    def correct(self) -> tuple[bool, ...]:
        """Whether each answer is the one that is wanted."""
        return tuple(answer == row["completion"].strip() for row, answer in zip(self.rows, self.answers, strict=True))

    @property
    def share(self) -> float:
        """Share of correct answers, from 0 to 1."""
        return sum(self.correct) / len(self.rows)

    def __float__(self) -> float:
        return self.share

    def __str__(self) -> str:
        name = f"{self.label}: " if self.label else ""
        return f"{name}{sum(self.correct)} of {len(self.rows)} correct ({percent(self.share)}) in {self.seconds:.0f} s"

    def view(self) -> Card:
        """The share, and the first answers, wrong ones first."""
        order = sorted(range(len(self.rows)), key=lambda number: self.correct[number])[:_SHOWN]
        rows = tuple(
            (
                Text(self.rows[number]["prompt"].rpartition("\n\n")[2], wrap="as is"),
                self.rows[number]["completion"].strip(),
                Text(self.answers[number] or "(nothing)", "" if self.correct[number] else "error", wrap="as is"),
            )
            for number in order
        )
        aside = f"{self.prompt_tokens:.0f} tokens a prompt · {self.seconds:.0f} s"
        more = len(self.rows) - len(order)
        return card(
            f"{self.label or 'score'} · {sum(self.correct)} of {len(self.rows)} correct ({percent(self.share)})",
            Table(("prompt", "wanted", "answer"), rows),
            line(dim(f"and {more} more")) if more else None,
            aside=aside,
        )


class Scores(Shown, MutableMapping[Key, Score | float]):
    """Scores by name, shown as one picture: bars, or a grid where the names are pairs (row, column).

    ::

        scores = Scores("held-out orders", {"base model": base, "adapter": trained})
        scores["ten examples"] = score(model, tokenizer, prompted(held_out, train, 10))

    Args:
        title: what was scored.
        scores: name -> score, or a share from 0 to 1.
    """

    def __init__(self, title: str = "correct answers", scores: Mapping[Any, Score | float] | None = None) -> None:
        self.title = title
        self._scores: dict[Key, Score | float] = {}
        self.update(scores or {})

    def __getitem__(self, name: Key) -> Score | float:
        return self._scores[name]

    def __setitem__(self, name: Key, value: Score | float) -> None:
        if not isinstance(value, Score | float | int) or not 0 <= float(value) <= 1:
            raise ConfigError(f"{name!r}: expected a score, or a share from 0 to 1, not {value!r:.60}")
        if any(isinstance(name, tuple) != isinstance(other, tuple) for other in self._scores):
            raise ConfigError("scores have names, or all of them have pairs of names (row, column)")
        self._scores[name] = value

    def __delitem__(self, name: Key) -> None:
        del self._scores[name]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __str__(self) -> str:
        words = (
            f"{' on '.join(name) if isinstance(name, tuple) else name} {percent(float(v))}" for name, v in self.items()
        )
        return f"{self.title}: {', '.join(words)}"

    def view(self) -> Block:
        """The picture."""
        pairs = {name: float(value) for name, value in self.items() if isinstance(name, tuple)}
        if pairs:
            return card(self.title, Grid(tuple(pairs.items())))
        costs = [_cost(value) for value in self.values()]
        bars = tuple((str(name), float(value), cost) for (name, value), cost in zip(self.items(), costs, strict=True))
        return card(self.title, BarChart(bars, "tokens a prompt" if any(costs) else ""))


def score(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    label: str = "",
    batch_size: int = 16,
    progress: bool = True,
    **options: Any,
) -> Score:
    """The share of rows that a model answers as wanted, to the letter, choosing the likeliest token each time.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        rows: with ``prompt`` and ``completion``.
        label: what is scored, in words, for the progress line and the result.
        batch_size: rows answered at once.
        progress: show how far it is.
        **options: further arguments of ``model.generate``, e.g. ``adapter_names`` with one name for each row;
            ``max_new_tokens`` are by default what the longest completion has, and one.

    Raises:
        ConfigError: there are no rows, or ``adapter_names`` are not as many.
    """
    if not rows:
        raise ConfigError("there are no rows to score")
    names = options.pop("adapter_names", None)
    if names is not None and len(names) != len(rows):
        raise ConfigError(f"adapter_names has {len(names)} names for {len(rows)} rows", field="adapter_names")
    given: list[str] = []
    start = time.monotonic()
    with Progress(label or "scoring", len(rows), show=progress) as bar:
        prompts = [row["prompt"] for row in rows]
        shared = shared_beginning(model, tokenizer, prompts) if names is None else None
        longest = max(len(tokenizer(row["completion"]).input_ids) for row in rows) + 1
        options.setdefault("max_new_tokens", longest)
        for place in range(0, len(rows), batch_size):
            batch = prompts[place : place + batch_size]
            chosen = {"adapter_names": names[place : place + batch_size]} if names is not None else {"shared": shared}
            given += answers(model, tokenizer, batch, **chosen, **options)
            bar.advance(len(batch))
        tokens = [len(tokenizer(prompt).input_ids) for prompt in prompts]
        mean = sum(tokens) / len(tokens)
        found = Score(tuple(rows), tuple(given), mean, time.monotonic() - start, label)
        bar.done(str(found))
    return found


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 32, shared: Any = None, **options: Any
) -> list[str]:
    """What a model says to each prompt, up to the first line break, choosing the likeliest token each time.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        prompts: answered in one batch.
        max_new_tokens: most tokens of an answer.
        shared: what ``shared_beginning`` gave for these prompts, which are then read from there on.
        **options: further arguments of ``model.generate``.
    """
    import torch

    from nbpeft.training.watching.generation import evaluating

    with evaluating(model), torch.no_grad():
        batch = _batch(tokenizer, prompts, shared).to(model.device)
        if shared is not None:
            options[_cache_option(model)] = shared.repeated(len(prompts))
        output = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=_ends(tokenizer),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        )
    said = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip().split("\n")[0].strip() for text in said]


@dataclass(frozen=True)
class SharedBeginning:
    """The tokens that all prompts begin with, such as solved examples, and the model's cache of them.

    Attributes:
        tokens: at the beginning of each prompt.
        cache: keys and values of these tokens, for one row.
    """

    tokens: tuple[int, ...]
    cache: Any

    def repeated(self, rows: int) -> Any:
        """A cache of its own for a batch of so many rows."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


def shared_beginning(model: Any, tokenizer: Any, prompts: Sequence[str]) -> SharedBeginning | None:
    """Reads the beginning that all prompts share once, where it is long enough to be worth it."""
    import torch
    from transformers import DynamicCache

    from nbpeft.training.watching.generation import evaluating

    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    first, last = min(encoded), max(encoded)
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    same = min(same, min(map(len, encoded)) - 1)
    if len(prompts) < 2 or same < _WORTH_SHARING or getattr(model.config, "is_encoder_decoder", False):
        return None
    tokens, cache = tuple(first[:same]), DynamicCache(config=model.config)
    options = {_cache_option(model): cache, "use_cache": True, "logits_to_keep": 1}
    with evaluating(model), torch.no_grad():
        model(input_ids=torch.tensor([tokens], device=model.device), **options)
    return SharedBeginning(tokens, cache)


def _cache_option(model: Any) -> str:
    """What the model calls the cache it is given: newer versions of transformers have another name for it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def _batch(tokenizer: Any, prompts: Sequence[str], shared: SharedBeginning | None) -> Any:
    """Prompts padded on the left, or behind the beginning that they share."""
    import torch

    if shared is None:
        return tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    before = len(shared.tokens)
    rests = [tokenizer(prompt).input_ids[before:] for prompt in prompts]
    batch = tokenizer.pad({"input_ids": rests}, return_tensors="pt", padding=True, padding_side="left")
    for name, beginning in (("input_ids", shared.tokens), ("attention_mask", (1,) * before)):
        column = batch[name].new_tensor(beginning).expand(len(rests), before)
        batch[name] = torch.cat([column, batch[name]], dim=1)
    return batch


def _ends(tokenizer: Any) -> list[int]:
    """Tokens at which an answer is over: the end of the text, and line breaks that are a token."""
    ends = {tokenizer.eos_token_id}
    for text in ("\n", "\n\n"):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        ends |= set(encoded if len(encoded) == 1 else ())
    return sorted(ends - {None})


def _cost(value: Score | float) -> str:
    return f"{value.prompt_tokens:.0f}" if isinstance(value, Score) else ""
