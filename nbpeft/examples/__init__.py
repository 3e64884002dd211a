"""What the tutorials share: a small language model, tasks that it learns in minutes, and scores as a picture.

    small_model, small_model_path     SmolLM2-135M-Instruct, from a package or the hub
    order_codes, dates, filters, records     tasks: (training rows, held-out rows)
    prompted            the same rows with solved examples in each prompt
    score, answers      what a model answers, and how much of it is right
    Score, Scores       one score, and several as a picture
    Times               how long things take, as a picture
    Costs, Trained      what several trainings learned and cost, as a picture

::

    model, tokenizer = examples.small_model()
    train, held_out = examples.order_codes()
    base = examples.score(model, tokenizer, held_out, label="base model")

Importing this imports neither torch nor transformers.
"""

from nbpeft.examples.base_model import HUB_NAME, small_model, small_model_path
from nbpeft.examples.costs import Costs, Trained
from nbpeft.examples.scoring import Score, Scores, answers, score
from nbpeft.examples.tasks import Row, dates, filters, order_codes, prompted, records
from nbpeft.examples.times import Times

__all__ = [
    "HUB_NAME",
    "Costs",
    "Row",
    "Score",
    "Scores",
    "Times",
    "Trained",
    "answers",
    "dates",
    "filters",
    "order_codes",
    "prompted",
    "records",
    "score",
    "small_model",
    "small_model_path",
]
