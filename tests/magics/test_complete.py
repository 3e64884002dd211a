from __future__ import annotations

from pathlib import Path

import pytest

from nbpeft.magics.complete import CompletionSources, complete_body, complete_line, paths
from nbpeft.magics.lora import CELLS, SUBCOMMANDS
from nbpeft.magics.matcher import Completion

SOURCES = CompletionSources(
    models=lambda: ["model", "other"],
    adapters=lambda: ["sql", "chat", "support"],
    variables=lambda: ["model", "train_ds", "tok"],
    combinations=lambda adapters: ["exact", "mean"] if "chat" in adapters else ["exact"],
    fields={"config": lambda method: ["r", "rank_pattern", "target_modules"], "training": lambda method: ["max_steps"]},
)
COMPLETION = Completion(SUBCOMMANDS, CELLS, SOURCES)


def words(before: str) -> tuple[str, ...]:
    return complete_line(before, SUBCOMMANDS, SOURCES).words


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("u", ("undo", "unfreeze", "unmerge", "unload", "use")),
        ("use ", ("sql", "chat", "support")),
        ("use s", ("sql", "support")),
        ("use sql ", ("chat", "support")),
        ("use sql --m", ("--model",)),
        ("use sql --model ", ("model", "other")),
        ("combine sql=1 chat --as c --type ", ("exact", "mean")),
        ("combine sql=1 --as c --type ", ("exact",)),
        ("delete sql ", ()),
        ("add ", ("model", "other")),
        ("add model r", ("r=", "rank_pattern=")),
        ("add model --name sql t", ("target_modules=",)),
        ("add model r=", ()),
        ("save --name s", ("sql", "support")),
        ("nonsense ", ()),
        ("off ", ()),
    ],
)
def test_what_may_come_next(before: str, expected: tuple[str, ...]) -> None:
    assert set(words(before)) == set(expected)
    assert len(words(before)) == len(expected)


def test_an_empty_line_offers_all_verbs() -> None:
    assert set(words("")) == set(SUBCOMMANDS)


def test_paths_come_with_folders_first(tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "b_folder").mkdir()
    (tmp_path / "with space").mkdir()
    (tmp_path / "[odd]").mkdir()
    found = paths(f"{tmp_path}/").words
    assert found == (f"{tmp_path}/[odd]/", f"{tmp_path}/b_folder/", f'"{tmp_path}/with space/"', f"{tmp_path}/a_file")
    assert paths(f"{tmp_path}/[").words == (f"{tmp_path}/[odd]/",)
    assert words(f"load {tmp_path}/b") == (f"{tmp_path}/b_folder/",)


def fields() -> list[str]:
    return ["r", "lora_alpha", "lora_bias", "target_modules"]


def test_fields_in_a_body_that_are_not_set_yet() -> None:
    found = complete_body("lora_alpha = 3\nlora_", 1, 5, fields)
    assert found is not None
    assert found.words == ("lora_bias = ",)
    assert found.closed


@pytest.mark.parametrize(
    ("source", "line"), [("r = lora", 0), ("  lora", 0), ("target_modules = [\nlora", 1), ('x = """\nlora', 1)]
)
def test_where_python_may_stand_nothing_is_offered(source: str, line: int) -> None:
    assert complete_body(source, line, len(source.split("\n")[line]), fields) is None


def test_the_lines_of_a_cell() -> None:
    cell = "%%lora model --n\nr"
    first = COMPLETION.suggest(cell, 0, 16)
    assert first is not None
    assert first.words == ("--name",)
    second = COMPLETION.suggest(cell, 1, 1)
    assert second is not None
    assert second.words == ("r = ", "rank_pattern = ")
    training = COMPLETION.suggest("%%lora_train model --data tr", 0, 28)
    assert training is not None
    assert training.words == ("train_ds",)


@pytest.mark.parametrize("cell", ["x = 1", "%timeit lora", "%%time\nuse ", "%lora", "%%lor", "", "lora use "])
def test_other_cells_are_left_alone(cell: str) -> None:
    lines = cell.split("\n")
    assert COMPLETION.suggest(cell, len(lines) - 1, len(lines[-1])) is None


def test_a_line_magic_further_down_a_cell() -> None:
    found = COMPLETION.suggest("x = 1\n  %lora use c", 1, 13)
    assert found is not None
    assert found.words == ("chat",)
