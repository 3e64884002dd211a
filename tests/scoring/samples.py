"""Results with answers worth a picture: orders as JSON, and letters sorted under labels."""

from __future__ import annotations

import json

from nbpeft.scoring.items import MetricFacts, ScoreItem
from nbpeft.scoring.result import ScoreResult

PEOPLE = (("Ana", "Lima"), ("Bo", "Oslo"), ("Chen", "Xi'an"), ("Dara", "Cork"), ("Emre", "İzmir"), ("Fay", "Hull"))
THINGS = ("chairs", "lamps", "oak tables", "desks <L>")


def order(number: int) -> tuple[str, dict[str, object]]:
    """The prompt of an order, and its fields."""
    (name, city), thing, count = PEOPLE[number % 6], THINGS[number % 4], 3 + number * 7 % 40
    return f"Order: {name} from {city} needs {count} {thing}.", {"name": name, "item": thing, "count": count}


def item(number: int) -> ScoreItem:
    """One order, which ``orders`` reads right more often than the base, and ``pirate`` about as often."""
    prompt, fields = order(number)
    right = json.dumps(fields, ensure_ascii=False)
    wrong = json.dumps(fields | {"count": int(str(fields["count"])) + 1}, ensure_ascii=False)
    good = {"base": number < 12 or 30 <= number < 33, "orders": number < 30, "pirate": number < 14 and number != 3}
    answers = {
        "base": right if good["base"] else f"Sure! {PEOPLE[number % 6][0]} wants some {fields['item']} " * 3,
        "orders": right if good["orders"] else wrong,
        "pirate": right if good["pirate"] else f"Arr, {fields['name']} be wantin' {fields['count']} {fields['item']}!",
    }
    values = {"exact": {name: float(is_right) for name, is_right in good.items()}}
    cut = frozenset() if good["base"] else frozenset(["base"])
    return ScoreItem(number, prompt, right, answers, values, cut)


def orders() -> ScoreResult:
    """48 orders, scored by exact match."""
    return ScoreResult(
        "model",
        ("base", "orders", "pirate"),
        (MetricFacts("exact"),),
        "exact",
        tuple(map(item, range(48))),
        48,
        seconds=12.1,
        notes=("answers cut at 32 tokens (max_new_tokens): base 33",),
    )


LABELS = ("billing", "delivery", "damaged goods", "return")


def tickets() -> ScoreResult:
    """40 letters to be sorted under four labels, by the base model and an adapter."""
    items = []
    for number in range(40):
        right, other = LABELS[number * 7 % 11 % 4], LABELS[(number + 1) % 4]
        given = {"base": "This letter is about a delay.", "tickets": right if number % 6 else other}
        values = {"exact": {name: float(answer == right) for name, answer in given.items()}}
        items.append(ScoreItem(number, f"Letter {number}: where are my lamps?", right, given, values))
    facts = (MetricFacts("exact"),)
    return ScoreResult("model", ("base", "tickets"), facts, "exact", tuple(items), 40, seconds=3.4)
