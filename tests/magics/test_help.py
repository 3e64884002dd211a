"""The help texts of all commands: every command once, in a group, with options as they are written."""

from __future__ import annotations

import re

import pytest

from nbpeft.magics.help import GROUPS, command_help, main_help
from nbpeft.magics.lora import CELLS, SUBCOMMANDS
from nbpeft.magics.parse import Subcommand
from tests.magics.notebook import Notebook

COMMANDS = [*((f"%%{name}", command) for name, command in CELLS.items())]
COMMANDS += [(f"%lora {name}", command) for name, command in SUBCOMMANDS.items()]


def test_every_command_is_in_one_group_and_no_other_name_is() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(SUBCOMMANDS)
    text = str(main_help(CELLS, SUBCOMMANDS))
    assert not [name for name in SUBCOMMANDS if f"%lora {name}" not in text]


@pytest.mark.parametrize(("prog", "command"), COMMANDS, ids=[prog for prog, _ in COMMANDS])
def test_commands_are_named_as_they_are_typed(prog: str, command: Subcommand) -> None:
    text = str(command_help(command, prog))
    for percents, name in re.findall(r"(%+)(\w+)", text):
        assert (percents == "%%" and name in CELLS) or (percents == "%" and name == "lora"), (percents, name)
    for name in re.findall(r"(?<!%)%lora (\w+)", text):
        assert name in SUBCOMMANDS, name


@pytest.mark.parametrize("word", ["eval", "evaluate"])
def test_other_words_for_scoring_are_answered_with_it(bare: Notebook, word: str) -> None:
    assert "Did you mean '%lora score'?" in bare.run(f"%lora {word}").line
