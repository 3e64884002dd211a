"""Commands and options have one name each, which the help shows, and a former name is refused with the present one."""

from __future__ import annotations

from collections import defaultdict

import pytest

from nbpeft.magics.help import command_help
from nbpeft.magics.lora import CELLS, SUBCOMMANDS
from nbpeft.magics.parse import FORMER_COMMANDS, FORMER_OPTIONS, Argument, Subcommand
from tests.magics.notebook import Notebook

COMMANDS: dict[str, Subcommand] = {f"%lora {name}": command for name, command in SUBCOMMANDS.items()}
COMMANDS |= {f"%%{name}": command for name, command in CELLS.items()}
LONG = {
    (prog, item.flags[0]): item
    for prog, command in COMMANDS.items()
    for item in command.arguments
    if not item.positional
}
"""(command, option) -> the option, as the parsers have them."""


def with_option(name: str) -> list[tuple[str, Argument]]:
    return [(prog, item) for (prog, flag), item in LONG.items() if flag == f"--{name}"]


def test_there_are_at_most_36_commands() -> None:
    assert len(SUBCOMMANDS) <= 36


@pytest.mark.parametrize("prog", COMMANDS)
def test_the_help_of_a_command_has_all_its_options(prog: str) -> None:
    text = str(command_help(COMMANDS[prog], prog))
    missing = [item.flags[0] for item in COMMANDS[prog].arguments if not item.positional and item.flags[0] not in text]
    assert not missing


def test_an_option_has_one_name_and_at_most_its_first_letter() -> None:
    others = [flag for (_, name), item in LONG.items() for flag in item.flags[1:] if flag != name[1:3]]
    assert not others


def test_what_python_calls_by_one_name_is_one_option_and_the_other_way_round() -> None:
    names, meanings = defaultdict(set), defaultdict(set)
    for (_, flag), item in LONG.items():
        names[item.dest, item.options.get("action") == "store_false"].add(flag)
        meanings[flag].add((item.dest, item.takes_value))
    assert not {name: flags for name, flags in names.items() if len(flags) > 1}
    assert not {flag: found for flag, found in meanings.items() if len(found) > 1}


@pytest.mark.parametrize("name", FORMER_COMMANDS)
def test_a_former_command_is_refused_with_the_present_one(bare: Notebook, name: str) -> None:
    present = FORMER_COMMANDS[name]
    assert bare.run(f"%lora {name}").line == f"%lora has no command {name!r}. It is called '%lora {present}' now"
    command, *options = present.replace("NAME", "").split()
    known = {flag for item in SUBCOMMANDS[command].arguments for flag in item.flags}
    assert name not in SUBCOMMANDS and {word for word in options if word.startswith("--")} <= known


@pytest.mark.parametrize("name", [name for name, present in FORMER_OPTIONS.items() if with_option(present)])
def test_a_former_option_is_refused_with_the_present_one(bare: Notebook, name: str) -> None:
    present = FORMER_OPTIONS[name]
    for prog, _ in with_option(present):
        if (prog, f"--{name}") in LONG:  # another option of this command
            continue
        line = bare.run(f"{prog} a --{name} 3").line
        assert line == f"{prog} has no option --{name}. It is called '--{present}' now"
