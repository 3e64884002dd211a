"""What several packages share stands once, in ``nbpeft.names``."""

from __future__ import annotations

import ast
from pathlib import Path

from transformers import TrainingArguments

import nbpeft
from nbpeft.errors import few
from nbpeft.names import BOOKKEEPING_FIELDS, DEFAULT_SEED, IGNORED_LABEL, ORIGIN_FIELDS
from nbpeft.session.configs import meaning

PACKAGE = Path(nbpeft.__file__).parent


def test_fields_that_are_bookkeeping_are_listed_in_one_place() -> None:
    places = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                held = {item.value for item in node.elts if isinstance(item, ast.Constant)}
                places |= {file.name} if {"auto_mapping", "revision"} <= held else set()
    assert places == {"names.py"}


def test_a_task_is_part_of_what_a_config_means() -> None:
    one, other = nbpeft.LoraConfig(task_type="CAUSAL_LM"), nbpeft.LoraConfig(task_type="SEQ_CLS")
    assert meaning(one) != meaning(other) and "task_type" in BOOKKEEPING_FIELDS
    assert meaning(one) == meaning(nbpeft.LoraConfig(task_type="CAUSAL_LM", revision="main"))
    assert {*ORIGIN_FIELDS} < {*BOOKKEEPING_FIELDS} <= one.to_dict().keys()


def test_the_seed_is_that_of_a_trainer() -> None:
    assert TrainingArguments(output_dir="unused").seed == DEFAULT_SEED
    assert IGNORED_LABEL == -100


def test_a_list_is_shortened_in_one_way() -> None:
    assert few("abc", 2) == "'a', 'b' and 1 more"
    assert few("abc", 3, quoted=False) == "a, b, c"
    assert few(["a\nb", 2, "x" * 500], 2, quoted=False) == "a b, 2 and 1 more"
    assert len(few(["x" * 500], quoted=False)) <= 120
    assert few([]) == few([], quoted=False) == ""
