from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbpeft.errors import CellError
from nbpeft.magics.lora import CELLS, SUBCOMMANDS
from nbpeft.magics.parse import Request, Subcommand, parse_arguments, parse_line
from nbpeft.magics.tokenize import quoted, tokenize


def parsed(line: str, **namespace: Any) -> Request:
    request = parse_line(line, SUBCOMMANDS, namespace)
    assert request is not None
    return request


def test_the_verbs_of_the_design_are_there() -> None:
    wanted = ["add", "use", "load", "save", "delete", "merge", "unmerge", "unload", "panel", "doctor"]
    assert set(wanted) <= set(SUBCOMMANDS)


def test_every_verb_tells_what_it_does() -> None:
    for verb in SUBCOMMANDS.values():
        assert verb.summary.endswith(".")
        assert "\n" not in verb.summary
        assert all(item.options.get("help") for item in verb.arguments)


def test_no_line_is_no_request() -> None:
    assert parse_line("   ", SUBCOMMANDS, {}) is None


def test_a_verb_and_its_arguments() -> None:
    request = parsed("use sql chat --model m")
    assert request.command.name == "use"
    assert (request.options.names, request.options.model) == (["sql", "chat"], "m")


def test_field_words_may_stand_anywhere() -> None:
    request = parsed("add r=8 model --name sql target_modules=q_proj --dry-run")
    assert (request.options.target, request.options.name, request.options.dry_run) == ("model", "sql", True)
    assert [word.text for word in request.options.fields] == ["r=8", "target_modules=q_proj"]


def test_a_path_with_an_equals_sign_is_a_path() -> None:
    assert parsed("load runs/lr=2 --name x").options.path == "runs/lr=2"


def test_variables_stand_for_whole_words() -> None:
    request = parsed("load {folder} --name=$name", folder=Path("a/b"), name="sql")
    assert (request.options.path, request.options.name) == (str(Path("a/b")), "sql")


def test_a_path_may_begin_with_a_variable() -> None:
    assert parsed("load $folder/sql --name x", folder=Path("a/b")).options.path == f"{Path('a/b')}/sql"
    assert parsed("load {folder}/sql --name x", folder="a").options.path == "a/sql"
    assert parsed("load '$folder/sql' --name x", folder="a").options.path == "$folder/sql"
    with pytest.raises(CellError, match=r"name 'foldr' is not defined\. Did you mean 'folder'"):
        parsed("load $foldr/sql --name x", folder="a")


def test_a_variable_in_braces_may_be_a_part_of_a_word() -> None:
    request = parsed("load runs/seed-{i}/{kind}.d --name a-{i}", i=3, kind="sql")
    assert (request.options.path, request.options.name) == ("runs/seed-3/sql.d", "a-3")
    assert parsed("ask 'say {i}-{kind}'", i=3, kind="sql").options.prompt == "say {i}-{kind}"


def test_a_weight_may_be_a_variable() -> None:
    line = "combine orders={weight} dates=$weight sql=1 --name both"
    assert parsed(line, weight=0.7).options.weights == ["orders=0.7", "dates=0.7", "sql=1"]
    assert parsed("ask a={b", b=1).options.prompt == "a={b"
    with pytest.raises(CellError, match=r"name 'wieght' is not defined\. Did you mean 'weight'"):
        parsed("combine orders={wieght} --name both", weight=0.7)


def test_line_breaks_of_a_prompt_in_quotes_and_in_a_variable() -> None:
    assert parsed(r'compare "one\n\ttwo \\n"').options.prompt == "one\n\ttwo \\n"
    assert parsed(r'swap a --check-prompt "one\ntwo"').options.check_prompt == "one\ntwo"
    assert parsed("compare $text", text=r"print('\n')").options.prompt == r"print('\n')"
    assert parsed(r"load C:\new --name x").options.path == r"C:\new"


@pytest.mark.parametrize("command", [command for command in SUBCOMMANDS.values() if command.example])
def test_a_comment_ends_every_line(command: Subcommand) -> None:
    line = command.example.partition("\n")[0].removeprefix("%lora ")
    request = parsed(f"{line}  # what it's for, 'chat' --none")
    assert request.command is command and request.options == parsed(line).options


def test_a_number_sign_in_a_word_or_in_quotes_begins_no_comment() -> None:
    assert parsed("load runs/#3/a#b --name 'a #1'").options.path == "runs/#3/a#b"
    assert parsed("load runs/a --name 'a #1' # it is here").options.name == "a #1"
    assert parsed("data rows.csv --separator '#'").options.separator == "#"
    assert parsed("data [row['#'] for row in rows]").options.data == "[row['#'] for row in rows]"
    assert quoted("#1") == '"#1"'
    assert parse_line("# the state", SUBCOMMANDS, {}) is None


def test_a_negative_factor_is_a_number() -> None:
    assert parsed("scale sql -0.5").options.factor == -0.5


def test_help_can_be_asked_for_without_arguments() -> None:
    assert parsed("load --help").help
    assert parsed("load -h").help


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("uze sql", "%lora has no command 'uze'. Did you mean 'use'"),
        ("xyzzy", "%lora has no command 'xyzzy'. %lora help lists the commands"),
        ("trian", "%lora has no command 'trian'. Did you mean '%%lora_train'?"),
        ("lora_train", "%lora has no command 'lora_train'. Did you mean '%%lora_train'?"),
        ("remove sql", "%lora has no command 'remove'. Did you mean '%lora delete'?"),
        ("list", "%lora has no command 'list'. Did you mean '%lora'?"),
        ("use", "%lora use needs NAME, e.g. %lora use sql"),
        ("use a --modle m", "%lora use has no option --modle. Did you mean '--model'?"),
        ("use a --mod m", "%lora use has no option --mod. Did you mean '--model'?"),
        ("rename a b c", "%lora rename: unexpected argument 'c'. Example: %lora rename"),
        (
            "copy a --as b",
            "%lora copy has no option --as. Example: %lora copy sql sql_backup (%lora copy --help",
        ),
        ("load runs/seed-{sed}", "name 'sed' is not defined"),
        ("load runs/seed-{model}", "{model} is an object, not text, a number or a path"),
        ("scale a much", "%lora scale: FACTOR: expected a number, not 'much'"),
        ("load {fodler}", "name 'fodler' is not defined. Did you mean 'folder'"),
        ("load {folder} --name {model}", "{model} is an object, not text, a number or a path"),
        ("load {runs[0]}/x", "{runs[0]}/x is an expression; only a variable, as in {name}, is replaced"),
        ("load 'a", "a quote is not closed"),
        ("undo now", "unexpected argument 'now'"),
        ("score --adapters a b", "has no option --adapters. NAME is given without an option: %lora score NAME"),
        ("memory --device cpu", "%lora memory has no option --device. %lora memory --help explains it"),
        ("use a --model", "%lora use: --model: expected one argument"),
    ],
)
def test_a_mistake_is_one_line(line: str, message: str) -> None:
    with pytest.raises(CellError) as caught:
        parse_line(line, SUBCOMMANDS, {"folder": "x", "model": object()}, cells=CELLS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name, command in SUBCOMMANDS.items() if command.arguments])
def test_a_value_that_is_given_with_an_option_is_answered_with_the_line_that_takes_it(name: str) -> None:
    """Under its name in Python, the kind of its values, and either in the plural."""
    command = SUBCOMMANDS[name]
    flags = {flag for item in command.arguments for flag in item.flags}
    for item in (item for item in command.arguments if item.positional):
        spellings = {item.dest, item.dest.removesuffix("s") + "s", item.completes} - {""}
        for option in {f"--{word}" for word in spellings} - flags:
            needed = " ".join(
                f"{flag} 1" for other in command.arguments if other.options.get("required") for flag in other.flags[:1]
            )
            bare = " ".join(
                "1" for other in command.arguments if other.positional and other.options.get("nargs") != "?"
            )
            with pytest.raises(CellError) as caught:
                parse_line(f"{name} {bare} {needed} {option} 1", SUBCOMMANDS, {})
            value = item.options["metavar"]
            assert str(caught.value).endswith(f" {value} is given without an option: %lora {name} {value}"), option


def test_nothing_is_printed_for_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CellError):
        parse_line("use", SUBCOMMANDS, {})
    assert capsys.readouterr() == ("", "")


def test_the_line_of_a_training_cell() -> None:
    line = 'model --data ds["train"] --eval-data ds["test"] --tokenizer tok num_train_epochs=1'
    options = parse_arguments(CELLS["lora_train"], "%%lora_train", tokenize(line), {}).options
    assert (options.target, options.data, options.eval_data) == ("model", 'ds["train"]', 'ds["test"]')
    assert [word.text for word in options.fields] == ["num_train_epochs=1"]
    with pytest.raises(CellError, match=r"^%%lora_train has no option --\. Example: %%lora_train model"):
        parse_arguments(CELLS["lora_train"], "%%lora_train", tokenize("model --data rows -- one epoch"), {})


@pytest.mark.parametrize("name", ["save", "score", "train"])
def test_an_option_is_given_once(name: str) -> None:
    command = CELLS["lora_train"] if name == "train" else SUBCOMMANDS[name]
    for item in command.arguments:
        flag = next((flag for flag in item.flags if flag.startswith("--")), None)
        if flag is None or item.options.get("action") or item.options.get("nargs"):
            continue
        value = "0.5" if item.options.get("type") is float else "3"
        if choices := item.options.get("choices"):
            value = str(next(iter(choices)))
        with pytest.raises(CellError, match=f"^{flag} is given twice: "):
            parse_arguments(command, name, tokenize(f"m {flag} {value} {flag} {value}"), {})


def test_text_in_quotes_is_a_value_even_if_it_begins_with_a_dash() -> None:
    assert parsed("runs --note sql-1 '-10%'").options.note == ["sql-1", "-10%"]
    assert parsed("runs --note sql-1 '--sort'").options.note == ["sql-1", "--sort"]
    assert parsed("ask '-x'").options.prompt == "-x"
    note = parsed("runs --note sql-1 '-x'").options.note
    assert [type(word) for word in note] == [str, str]
    options = parsed('runs --search="-a b" --sort name').options
    assert (options.search, options.sort) == ("-a b", "name")
    with pytest.raises(
        CellError, match=r'expected 2 arguments\. A value that begins with a dash is put in quotes: "-x"$'
    ):
        parsed("runs --note sql-1 -x")


def test_a_column_is_named_once() -> None:
    line = "rows --columns prompt=q prompt=r"
    with pytest.raises(CellError, match=r"^--columns: prompt is given twice: q and r$"):
        parse_line(f"data {line}", SUBCOMMANDS, {})
