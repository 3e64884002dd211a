"""Small tasks that a language model of 135 million parameters learns in minutes on a CPU.

Each returns training rows and held-out rows: dictionaries with a ``prompt`` and the expected ``completion``. No
held-out row can be answered from memory; each task describes what is held out. The same arguments give the same
rows.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from nbpeft.errors import ConfigError

Row = dict[str, str]
"""``prompt`` and ``completion``; the completion begins with a space."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ITEMS = {
    "lamps": "NP35",
    "chairs": "KX72",
    "desks": "TB19",
    "mugs": "QF84",
    "pens": "LZ06",
    "books": "HR51",
    "bottles": "WD23",
    "mirrors": "GC97",
    "candles": "VM48",
    "plates": "SJ60",
    "baskets": "BY15",
    "ladders": "XK39",
    "ropes": "DT82",
    "tents": "FQ27",
    "clocks": "RL74",
    "carpets": "JW56",
}
_CITIES = {
    "Oslo": "N1",
    "Lima": "P7",
    "Rome": "C4",
    "Cairo": "H9",
    "Paris": "T2",
    "Tokyo": "D8",
    "Berlin": "L3",
    "Dublin": "V6",
}
_ORDERS = (
    "{city} needs {count} {item}.",
    "{count} {item} for {city}.",
    "Please send {count} {item} to {city}.",
    "Ship to {city}: {count} {item}.",
)

_DATES = (
    "The meeting is on the {nth} of {month} {year}.",
    "It opened on {month} {day}, {year}.",
    "We met on {day} {month} {year}.",
    "Please pay before {month} {nth}, {year}.",
    "Born {day} {month} {year} in Oslo.",
    "Her visit was {number}/{day}/{year}.",
    "From {year}, {month} {day}, the shop is closed.",
    "The {nth} of {month} {year} was a Monday.",
    "On the {nth} of {month}, {year}, we flew to Rome.",
    "On {month} the {nth}, {year}, she was late.",
    "Please come {month} {day}, {year}, at noon.",
    "He moved out {day} {month} {year}.",
)
_HELD_OUT_DATES = (
    "The {nth} of {month} {year} is a holiday.",
    "Delivery was promised for {month} {day}, {year}.",
    "They signed it {day} {month} {year} in Lima.",
    "{month} the {nth}, {year}, it snowed.",
    "School begins {number}/{day}/{year}.",
)
_MONTHS = _words("January February March April May June July August September October November December")

_PEOPLE = {
    False: {
        "kind": _words("customers students patients drivers members teachers workers players guests owners"),
        "name": _words("""
            Ana Ben Carla David Elena Farid Grace Hugo Ines Jonas Kira Liam Maria Noah Olga Pablo Rosa Sven Tara Viktor
            Wei Yara Zoe Amir Bruno Celia Dario Edith Fiona Goran Helga Isaac Julia Karim Lucia Mateo Nadia Oscar Petra
            Quentin Ruth Samuel Teresa Ursula Vera Walter Ximena Yusuf Bianca Cedric Diana Emil Frida Gustav Hannah Igor
            Judith Kevin Laura Miguel
        """),
        "city": _words("""
            Lima Oslo Rome Cairo Paris Tokyo Madrid Berlin Dublin Prague Athens Lisbon Boston Delhi Vienna Quito Seoul
            Geneva Havana Nairobi Lagos Hanoi Kyoto Turin Munich Bremen Lyon Porto Seville Krakow Riga Tallinn Vilnius
            Sofia Ankara Tunis Dakar Accra Kampala Lusaka Jakarta Manila Osaka Perth Auckland Montreal Ottawa Chicago
            Dallas Houston Seattle Phoenix Austin Portland Memphis Santiago Caracas Montevideo Brasilia
        """),
        "item": _words("""
            chairs desks lamps tables shelves mugs pens books bottles pillows carpets mirrors candles plates forks
            baskets ladders umbrellas notebooks blankets hammers buckets brushes bicycles cameras phones radios printers
            keyboards jackets gloves scarves boots hats ropes tents bowls kettles knives apples carrots lemons melons
            tomatoes flowers trees bricks tiles doors windows envelopes stamps folders paintings guitars violins drums
            balls kites puzzles
        """),
    },
    True: {
        "kind": _words("doctors users pilots tenants singers"),
        "name": _words("""
            Nina Omar Lena Marco Milena Tom Ivan Clara Emma Felix Simon Alice Peter Sara Daniel Martin
        """),
        "city": _words("""
            Milan Denver London Warsaw Sydney Bogota Toronto Zurich Hamburg Naples Valencia Detroit Glasgow Bristol
            Helsinki Budapest
        """),
        "item": _words("""
            sofas clocks vases spoons towels benches curtains boxes pencils helmets oranges onions screws speakers
            statues posters
        """),
    },
}
_QUESTIONS = (
    ("Which {kind} in {city} are older than {age}?", "{kind} | city = {city} | age > {age}"),
    ("Show me the {kind} from {city} younger than {age}.", "{kind} | city = {city} | age < {age}"),
    ("Find all {kind} called {name} in {city}.", "{kind} | name = {name} | city = {city}"),
    ("List {kind} named {name} who are {age} years old.", "{kind} | name = {name} | age = {age}"),
    ("How many {kind} live in {city}?", "count {kind} | city = {city}"),
    ("Count the {kind} over {age} in {city}.", "count {kind} | city = {city} | age > {age}"),
    ("How many {kind} are called {name}?", "count {kind} | name = {name}"),
    ("Give me {kind} under {age} who live in {city}.", "{kind} | city = {city} | age < {age}"),
)
_HELD_OUT_QUESTIONS = (
    ("Find the {kind} over {age} who live in {city}.", "{kind} | city = {city} | age > {age}"),
    ("How many {kind} from {city} are under {age}?", "count {kind} | city = {city} | age < {age}"),
    ("Which {kind} are called {name} and {age} years old?", "{kind} | name = {name} | age = {age}"),
    ("Count all {kind} named {name}.", "count {kind} | name = {name}"),
)
_RECORDS = (
    "{name} from {city} needs {count} {item}.",
    "Please send {count} {item} to {name} in {city}.",
    "{count} {item} for {name}, {city}.",
    "Hello, this is {name} in {city}. I would like to buy {count} {item}.",
    "Ship to {city}: {count} {item}, attention of {name}.",
    "{name} ({city}) orders {count} {item}.",
    "Could you deliver {count} {item} to {city}? My name is {name}.",
    "We need {count} {item} in {city}, says {name}.",
)
_HELD_OUT_RECORDS = (
    "Hi, {name} here, I want {count} {item} delivered to {city}.",
    "To {name} in {city}, send {count} {item} please.",
    "A customer called {name} from {city} asked for {count} {item}.",
    "{city}: {name} wants {count} {item}.",
)
_ONES = _words("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
""")
_TENS = _words("twenty thirty forty fifty sixty")


class Task(Protocol):
    """A function that makes training rows and held-out rows."""

    def __call__(self, train: int = 384, held_out: int = 48, *, seed: int = 0) -> tuple[list[Row], list[Row]]:
        """Makes the rows, without duplicates."""


_ARGUMENTS = """

Args:
    train: number of training rows.
    held_out: number of held-out rows.
    seed: seed of the random choices.

Returns:
    The training rows and the held-out rows.
"""


def _task(make: Callable[[random.Random, bool], Row]) -> Task:
    """Turn a function that makes one row, a training row or a ``new`` one, into a task."""

    def task(train: int = 384, held_out: int = 48, *, seed: int = 0) -> tuple[list[Row], list[Row]]:
        return _distinct(make, train, False, seed), _distinct(make, held_out, True, seed)

    task.__module__, task.__name__, task.__qualname__ = make.__module__, make.__name__, make.__qualname__
    task.__doc__ = inspect.cleandoc(str(make.__doc__)) + _ARGUMENTS
    return task


@_task
def order_codes(rng: random.Random, new: bool) -> Row:
    """Orders and a shop's codes for them: ``Oslo needs 31 lamps.`` becomes ``NP35-31-N1``.

    Sixteen items and eight cities have arbitrary codes, which neither a base model nor a prompt
    with some examples can know. 32 of the 128 pairs of an item and a city are held out: the training rows contain every
    code, but no held-out pair.
    """
    while True:
        item, city = rng.randrange(len(_ITEMS)), rng.randrange(len(_CITIES))
        if ((item + city) % 4 == 0) == new:
            break
    name, place, count = list(_ITEMS)[item], list(_CITIES)[city], rng.randint(2, 99)
    order = rng.choice(_ORDERS).format(item=name, city=place, count=count)
    return _row(f"Order: {order}\nCode:", f"{_ITEMS[name]}-{count}-{_CITIES[place]}")


@_task
def dates(rng: random.Random, new: bool) -> Row:
    """Sentences with a date, and the date in ISO 8601: ``We met on 3 May 1987.`` becomes ``1987-05-03``.

    Every fourth year and five phrasings are held out.
    """
    year = rng.choice([year for year in range(1950, 2031) if (year % 4 == 1) == new])
    month, day = rng.randint(1, 12), rng.randint(1, 28)
    ending = "th" if 10 <= day <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    text = rng.choice(_HELD_OUT_DATES if new else _DATES)
    text = text.format(year=year, month=_MONTHS[month - 1], number=month, day=day, nth=f"{day}{ending}")
    return _row(f"Text: {text}\nWhen:", f"{year}-{month:02d}-{day:02d}")


@_task
def filters(rng: random.Random, new: bool) -> Row:
    """Questions about people, and filters for a table: ``customers | city = Rome | age > 40``.

    The held-out rows have other names, cities, kinds of people and phrasings than the training rows.
    """
    person = {key: rng.choice(_PEOPLE[new][key]) for key in ("kind", "name", "city")}
    question, wanted = rng.choice(_HELD_OUT_QUESTIONS if new else _QUESTIONS)
    age = rng.randint(18, 80)
    return _row(f"Question: {question.format(**person, age=age)}\nFilter:", wanted.format(**person, age=age))


@_task
def records(rng: random.Random, new: bool) -> Row:
    """Customers' orders, and their content as a record: ``name: Ana | city: Lima | item: chairs | count: 12``.

    40 % of the counts are written in words. Three examples in the prompt are enough for most rows, so that this task
    serves for comparison. The held-out rows have other names, cities, items and phrasings than the training rows.
    """
    name, city, item = (rng.choice(_PEOPLE[new][key]) for key in ("name", "city", "item"))
    count = rng.randint(2, 60)
    written = _in_words(count) if rng.random() < 0.4 else count
    text = rng.choice(_HELD_OUT_RECORDS if new else _RECORDS)
    text = text.format(name=name, city=city, item=item, count=written)
    record = f"name: {name} | city: {city} | item: {item} | count: {count}"
    return _row(f"Order: {text[0].upper()}{text[1:]}\nRecord:", record)


def prompted(rows: Sequence[Row], examples: Sequence[Row], shots: int = 3) -> list[Row]:
    """The same rows with solved examples before each prompt.

    Args:
        rows: rows to answer.
        examples: rows from which to take the examples, e.g. the training rows.
        shots: number of examples: the first ones, the same for all rows.

    Raises:
        ConfigError: there are not enough examples.
    """
    if not 0 <= shots <= len(examples):
        raise ConfigError(f"shots={shots}: there are {len(examples)} examples", field="shots")
    before = "".join(f"{row['prompt']}{row['completion']}\n\n" for row in examples[:shots])
    return [{**row, "prompt": before + row["prompt"]} for row in rows]


def _in_words(number: int) -> str:
    """A number below 70 in words."""
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")


def check_number(name: str, number: object, most: int) -> None:
    """Refuses an argument ``name`` that is no number of rows from 0 to ``most``."""
    if not isinstance(number, int) or not 0 <= number <= most:
        raise ConfigError(f"{name} must be a number of rows from 0 to {most:,}, not {number!r:.40}", field=name)


def _row(prompt: str, completion: str) -> Row:
    return {"prompt": prompt, "completion": f" {completion}"}


def _distinct(make: Callable[[random.Random, bool], Row], number: int, new: bool, seed: int) -> list[Row]:
    check_number("held_out" if new else "train", number, 5000)
    rng = random.Random(f"{seed} {new}")
    rows: dict[str, Row] = {}
    while len(rows) < number:
        row = make(rng, new)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())
