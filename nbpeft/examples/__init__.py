"""Shared code of the tutorials: a small language model, tasks that it learns in minutes, and charts of scores.

    small_model, small_model_path     SmolLM2-135M-Instruct, from a package or the Hub
    order_codes, dates, filters, records     tasks: (training rows, held-out rows)
    pronunciations      a task on public data: how English words sound, with the metrics word_right and symbols_right
    prompted            the same rows with solved examples before each prompt
    Scores              a chart of scores of ``nbpeft.score``
    Times               a chart of durations
    Costs, Trained      a chart of the scores and costs of several trainings

::

    model, tokenizer = examples.small_model()
    train, held_out = examples.order_codes()
    result = nbpeft.score(model, held_out, metric="startswith", tokenizer=tokenizer)
    examples.Scores("held-out orders", {"base model": result.scores["base"]})

Importing this imports neither torch nor transformers.
"""

from nbpeft.examples.base_model import HUB_NAME, small_model, small_model_path
from nbpeft.examples.costs import Costs, Trained
from nbpeft.examples.pronunciations import pronunciations, symbols_right, word_right
from nbpeft.examples.scores import Scores
from nbpeft.examples.tasks import Row, dates, filters, order_codes, prompted, records
from nbpeft.examples.times import Times

__all__ = [
    "HUB_NAME",
    "Costs",
    "Row",
    "Scores",
    "Times",
    "Trained",
    "dates",
    "filters",
    "order_codes",
    "prompted",
    "pronunciations",
    "records",
    "small_model",
    "small_model_path",
    "symbols_right",
    "word_right",
]
