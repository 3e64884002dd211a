"""Shared code of the tutorials: a small language model, tasks that it learns in minutes, and charts of scores.

    small_model, small_model_path     SmolLM2-135M-Instruct, from a package or the Hub
    order_codes, dates, filters, records     tasks: (training rows, held-out rows)
    code_table          all codes of order_codes as a text
    prompted            the same rows with solved examples, or a text, before each prompt
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
from nbpeft.examples.scores import Scores
from nbpeft.examples.tasks import Row, code_table, dates, filters, order_codes, prompted, records
from nbpeft.examples.times import Times

__all__ = [
    "HUB_NAME",
    "Costs",
    "Row",
    "Scores",
    "Times",
    "Trained",
    "code_table",
    "dates",
    "filters",
    "order_codes",
    "prompted",
    "records",
    "small_model",
    "small_model_path",
]
