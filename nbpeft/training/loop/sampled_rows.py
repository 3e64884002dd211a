"""The prompts to answer during a run: given by the user, or taken from the rows with their wanted answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nbpeft._util.conversations import is_conversation
from nbpeft.checkpoint import PromptFormat
from nbpeft.errors import ConfigError
from nbpeft.training.adapters.adapted_model import base_of
from nbpeft.training.data import is_amount
from nbpeft.training.data.forms import VERDICT, Chat, Compared, Pair, Prompted, row_of
from nbpeft.training.data.reading import reading
from nbpeft.training.data.row import is_nothing
from nbpeft.training.loop.rows import TrainingRows, inputs_of
from nbpeft.training.request import TrainRequest
from nbpeft.training.watching.generation import Prompt, PromptBatch
from nbpeft.training.watching.prompts import MOST_PROMPTS, SamplePrompts
from nbpeft.training.watching.scoring import check_every


def sample_prompts(request: TrainRequest, rows: TrainingRows) -> SamplePrompts:
    """Tokenizes the prompts to sample, in the form of the training rows.

    Raises:
        ConfigError: an argument is invalid, the model or tokenizer cannot generate answers, or the rows have no
            prompts.
        AdapterError: the prompts cannot be tokenized.
    """
    given, every, tokenizer = request.sample, request.every, request.tokenizer
    is_count = isinstance(given, int) and not isinstance(given, bool)
    prompts: Any = [given] if isinstance(given, str) or is_conversation(given) else given
    fits = isinstance(prompts, list | tuple) and all(isinstance(text, str) or is_conversation(text) for text in prompts)
    if not is_count and not (fits and prompts):
        raise ConfigError(
            "sample must be a prompt (a text or a conversation), a list of prompts, or a number of rows, "
            f"not {given!r:.60}",
            field="sample",
        )
    number: int = given if is_count else len(prompts)  # type: ignore[assignment]
    if not 1 <= number <= MOST_PROMPTS:
        raise ConfigError(f"sample takes 1 to {MOST_PROMPTS} prompts, not {number}", field="sample")
    check_every(every)
    if tokenizer is None or not hasattr(tokenizer, "decode"):
        raise ConfigError("sample needs a tokenizer: pass tokenizer=…", field="sample")
    base: Any = base_of(request.model)
    if not hasattr(base, "generate"):
        raise ConfigError(f"sample needs a model that generates text, and a {type(base).__name__} has no generate()")
    if is_count:
        return _of_rows(request, rows, number, base)
    form = rows.format or PromptFormat(chat=True)
    asked = [(text, "") if isinstance(text, str) else _last_answer(text) for text in prompts]
    options: dict[str, Any] = {"chat": None if form.chat else False, "system": form.system or ""}
    options["template"] = form.variables
    batch = PromptBatch.of([text for text, _ in asked], tokenizer, base, **options)
    return SamplePrompts(batch, given, tuple(answer for _, answer in asked))  # type: ignore[arg-type]


def _of_rows(request: TrainRequest, rows: TrainingRows, count: int, base: Any) -> SamplePrompts:
    """Returns the prompts and answers of the first evaluation rows, or of training rows if there are none."""
    evaluates = rows.evaluation is not None
    asked = list(itertools.islice(_asked(request, rows), count))
    if not asked:
        where = "evaluation rows" if evaluates else "training rows"
        raise ConfigError(
            f"sample={count} needs rows with a prompt and an answer, and none of the {where} has both: pass the "
            "prompts instead",
            field="sample",
        )
    prompts, wanted = zip(*asked, strict=True)
    options: dict[str, Any] = {"chat": None if not isinstance(prompts[0], str) else False}
    options["template"] = request.chat_template_kwargs or {}
    batch = PromptBatch.of(prompts, request.tokenizer, base, **options)
    source = "" if evaluates else "the sampled prompts are training rows: no rows are held out for evaluation"
    return SamplePrompts(batch, count, tuple(wanted), source)


def _asked(request: TrainRequest, rows: TrainingRows) -> Iterator[tuple[Prompt, str]]:
    """Yields the prompt and the wanted answer (the chosen one of two; empty without a completion) of each row.

    Rows whose label marks the completion as bad are skipped.
    """
    apart = rows.evaluation is not None and not is_amount(request.eval_data)
    source = request.eval_data if apart else request.data
    numbers = getattr(rows.train if rows.evaluation is None else rows.evaluation, "numbers", None)
    if numbers is None:  # given as tokens, or read from a stream
        return
    reader = reading(source, request.tokenizer, inputs=inputs_of(request), **request.reading)
    if reader.form is None:
        return
    for number in dict.fromkeys(numbers):
        example = reader.example(source[number], number)
        if reader.form is VERDICT and reader.is_bad(row_of(source[number], number, reader.columns)):
            continue
        if isinstance(example, Compared):
            example = example.chosen
        if isinstance(example, Prompted):
            prompted = example.prompt
            if not is_nothing(prompted):
                yield (prompted if isinstance(prompted, str) else prompted.messages), ""
        elif isinstance(example, Pair):
            if not is_nothing(example.prompt):
                yield example.prompt, example.completion.strip()
        elif isinstance(example, Chat) and example.tools is None:
            roles = [message["role"] for message in example.messages]
            end = len(roles) - roles[::-1].index("assistant") if "assistant" in roles[1:] else 0
            prompt, wanted = _last_answer(example.messages[:end])
            if wanted:
                yield prompt, wanted


def _last_answer(messages: Sequence[Mapping[str, Any]]) -> tuple[Prompt, str]:
    """Returns a conversation without the answer at its end, and this answer; empty if it ends with another message."""
    if len(messages) < 2 or messages[-1].get("role") != "assistant" or not isinstance(messages[-1].get("content"), str):
        return messages, ""
    return messages[:-1], messages[-1]["content"].strip()
