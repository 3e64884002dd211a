"""``%lora score``: the base model and its adapters on rows with references."""

from __future__ import annotations

import argparse
import glob
import os
from contextlib import closing
from dataclasses import replace
from typing import Any

from nbpeft.errors import CellError, did_you_mean
from nbpeft.magics.notebook_context import NotebookContext
from nbpeft.magics.parse import argument, positive
from nbpeft.magics.registry import (
    COLUMNS,
    DATA,
    LONG,
    MAX_LENGTH,
    ON_MODEL,
    SEPARATOR,
    SKIP_BAD,
    TEMPLATE,
    TOKENIZER,
    answer_limit,
    separator_of,
    subcommand,
)
from nbpeft.magics.subcommands.asking import SAMPLING, sampling_of
from nbpeft.names import METRICS


@subcommand(
    "score",
    "Score the base model and all adapters on rows with references, item by item, with intervals and paired tests. "
    "Stop, or interrupting the kernel, keeps what is scored.",
    argument(
        "names",
        nargs="*",
        metavar="NAME",
        completes="adapter",
        help="the adapters, a+b for the sum of two (default: all)",
    ),
    replace(
        DATA,
        options={**DATA.options, "required": False, "help": str(DATA.options["help"]).replace("training rows", "rows")},
    ),
    argument(
        "--held-out",
        action="store_true",
        help="only the rows of --data that %%lora_train --eval-data held out, which the adapters have not learned",
    ),
    argument(
        "--metric",
        nargs="+",
        metavar="METRIC",
        words=METRICS,
        completes="variable",
        help=f"{', '.join(METRICS)}, or a variable with a function (answer, row) (default: exact; accuracy for a "
        "classifier)",
    ),
    argument("--pattern", metavar="REGEX", help="regular expression for the metric regex"),
    argument("--strip", action="store_true", help="ignore white space at both ends of answers and references"),
    argument("--casefold", action="store_true", help="ignore upper and lower case"),
    argument("--tolerance", type=float, metavar="SHARE", help="relative tolerance of the metric number"),
    argument(
        "--folders",
        nargs="+",
        metavar="DIR",
        completes="path",
        help="folders of saved adapters to score too; adapters/* matches several. They do not stay on the model",
    ),
    argument("--no-base", dest="include_base", action="store_false", help="leave the base model out"),
    argument("--batch-size", type=positive, metavar="N", help="rows that are answered together by all adapters"),
    answer_limit(
        None,
        "maximum length of an answer in tokens (default: for exact and startswith the longest reference plus 8, or 16 "
        "with --strip; else 256)",
    ),
    *SAMPLING,
    argument(
        "--also",
        metavar="DATA",
        completes="data",
        help="rows to measure the loss on as well, to see what an adapter forgot",
    ),
    argument(
        "--general",
        action="store_true",
        help="the same on a general text that comes with the package; --data may then be left out",
    ),
    MAX_LENGTH,
    replace(LONG, options={**LONG.options, "help": "rows longer than --max-length (default: as in the training)"}),
    COLUMNS,
    SEPARATOR,
    SKIP_BAD,
    TEMPLATE,
    TOKENIZER,
    ON_MODEL,
    example="%lora score --data held_out --metric exact --strip",
)
def score(options: argparse.Namespace, notebook: NotebookContext) -> object:
    """Score adapters, and show the scores so far."""
    given: dict[str, Any] = {name: value for name, value in sampling_of(options).items() if value is not None}
    for name in ("pattern", "tolerance", "batch_size", "max_new_tokens", "max_length", "long", "chat_template_kwargs"):
        if (value := getattr(options, name)) is not None:
            given[name] = value
    if options.data is None and not options.general:
        raise CellError("%lora score needs --data DATA, or --general for the loss on a general text")
    if options.data is None and options.held_out:
        raise CellError("--held-out chooses among the rows of --data DATA: give those of the training")
    rows = None if options.data is None else notebook.data(options.data, "--data")
    model = notebook.chosen(options.model)
    metrics = None if options.metric is None else [metric_of(word, notebook) for word in options.metric]
    from nbpeft.widgets import LiveAnswers, ScorePanel

    with closing(LiveAnswers(ui=notebook.ui)) as live:
        result = notebook.session.score(
            rows,
            metric=metrics,
            adapters=options.names or None,
            include_base=options.include_base,
            held_out=options.held_out,
            strip=options.strip,
            casefold=options.casefold,
            also=None if options.also is None else notebook.data(options.also, "--also"),
            general=options.general,
            folders=None if options.folders is None else _folders(options.folders),
            columns=options.columns,
            separator=separator_of(options),
            skip_bad=options.skip_bad,
            tokenizer=notebook.tokenizer(options.tokenizer),
            on_progress=live.draw,
            on_control=live.stop_with,
            model=model,
            **given,
        )
    if not result.items:
        return result
    from nbpeft.session.results.paged_scores import PagedScores

    return PagedScores.of(result, lambda paged: ScorePanel(paged, ui=notebook.ui)._ipython_display_())


def metric_of(word: str, notebook: NotebookContext) -> Any:
    """The name of a metric, or the value of a variable or an expression.

    Raises:
        CellError: it is neither.
    """
    if word in METRICS:
        return word
    if word.isidentifier() and word not in notebook.namespace:
        hint = did_you_mean(word, METRICS) or f" Expected one of {', '.join(METRICS)}, or a function."
        raise CellError(f"--metric: no metric is called {word!r:.40}.{hint}")
    return notebook.value(word, "--metric")


def _folders(words: list[str]) -> list[str]:
    """The folders, with patterns expanded."""
    found: list[str] = []
    for word in words:
        text = os.path.expanduser(word)
        matches = sorted(glob.glob(text)) if glob.has_magic(text) else [text]
        if not matches:
            raise CellError(f"--folders: no folder matches {word!r:.100}")
        found += matches
    return found
