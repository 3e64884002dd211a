"""``%lora data``, and where a training cell finds its rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from IPython.display import HTML

from nbpeft.display.blocks import Tokens
from nbpeft.display.next_steps import next_steps
from nbpeft.display.training import training_card
from nbpeft.session import DataResult
from tests.char_tokenizer import CharTokenizer
from tests.closeness import assert_close
from tests.magics.notebook import Notebook

PAIRS = [{"prompt": f"{number} and {number} is ", "completion": str(2 * number)} for number in range(8)]


@pytest.fixture
def ready(adapted: Notebook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A notebook in a folder with ``sums.jsonl``, a tokenizer, and the same rows under other names."""
    monkeypatch.chdir(tmp_path)
    Path("sums.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in PAIRS))
    Path("with space.jsonl").write_text(json.dumps(PAIRS[0]))
    adapted["tok"], adapted["rows"] = CharTokenizer(), PAIRS
    adapted["asked"] = [{"question": row["prompt"], "answer": row["completion"]} for row in PAIRS]
    return adapted


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    "data", ["rows", "sums.jsonl", "'sums.jsonl'", "asked --columns prompt=question completion=answer", "rows[:]"]
)
def test_a_cell_takes_rows_from_everywhere(ready: Notebook, data: str) -> None:
    result = ready.do(f"%%lora_train model --data {data} --eval-data 0.25 --tokenizer tok\nmax_steps = 2")
    assert result.steps == 2 and result.eval_loss is not None
    assert "2 of 8 rows held out for evaluation" in result.message
    same = ready.session.train(ready["model"], PAIRS, 0.25, tokenizer=ready["tok"], adapter="chat", max_steps=2)
    assert same.token_count == result.token_count


def test_a_variable_comes_before_a_folder_and_a_file_before_an_attribute(ready: Notebook, tmp_path: Path) -> None:
    Path("rows").mkdir()
    assert ready.do("%lora data rows").summary.row_count == 8
    ready["sums"] = 3
    assert ready.do("%lora data sums.jsonl").summary.row_count == 8
    ready["table"] = type("Table", (), {"csv": PAIRS[:2]})
    assert ready.do("%lora data table.csv").summary.row_count == 2
    Path("rows/train.jsonl").write_text(json.dumps(PAIRS[0]))
    assert ready.do(f"%lora data {tmp_path}/rows/train.jsonl").summary.row_count == 1


def test_fields_and_columns_stand_in_one_line(ready: Notebook) -> None:
    line = "%lora_train model --data asked --tokenizer tok --columns prompt=question completion=answer max_steps=1"
    assert ready.do(line).steps == 1
    assert ready.do(line.replace("--columns", "num_train_epochs=1 --columns")).steps == 1


@pytest.mark.drawn(10)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data.jsonl", "There is no file 'data.jsonl'."),
        ("sum.jsonl", "There is no file 'sum.jsonl'. Did you mean 'sums.jsonl'"),
        ("sums.jsnl", "there is no file 'sums.jsnl', and no variable 'sums'. Did you mean 'sums.jsonl'?"),
        ("notes.txt", "no variable 'notes'. Files with rows end with .jsonl, .ndjson, .json, .csv"),
        ("user/name:train[:10]", "'user/name' is not a folder here, the hub is offline or cannot be reached"),
        ("rows --eval-data 0", "--eval-data 0 is neither data, nor a share of the rows between 0 and 1 (0.1)"),
        ("rows --eval-data 8", "holds out 8 of 8 rows, which leaves nothing to train on"),
        ("rows --tokenizer model", "--tokenizer: 'model' does not hold a tokenizer, but an adapted model."),
        ("rows --tokenizer rows", "does not hold a tokenizer, but a list. Tokenizers here: tok."),
        ("rows --columns prompt", "expected name=column, e.g. prompt=question, not 'prompt'"),
        ("asked --columns promt=question completion=answer", "'promt' is none of"),
        ("asked --columns prompt=question complation=answer", "'complation' is none of"),
        ("asked", "--columns prompt=question completion=answer"),
        ("[{'text': 'a'}, {'text': 3}]", "Row 1: 'text' is an int (3), not text."),
    ],
)
@pytest.mark.parametrize("verb", ["%lora_train model --data", "%lora data"])
def test_a_mistake_is_one_line(ready: Notebook, verb: str, line: str, message: str) -> None:
    if "--eval-data" in line and verb == "%lora data":
        return
    fields = " max_steps=1" if "train" in verb else ""
    told = ready.run(f"{verb} {line}{fields}").line
    assert message in told and "\n" not in told


def test_data_shows_what_a_cell_would_read(ready: Notebook) -> None:
    result = ready.do("%lora data sums.jsonl --rows 2")
    assert isinstance(result, DataResult)
    assert result == ready.session.data(PAIRS, ready["tok"], rows=2, name="sums.jsonl")
    assert [row.number for row in result.summary.rows] == [0, 1]
    assert str(result).startswith("sums.jsonl (prompt and completion): 8 rows, ")
    assert ready.do("%lora data asked --columns prompt=question completion=answer").summary.rows == (
        ready.do("%lora data rows").summary.rows
    )


@pytest.mark.drawn(1)
@pytest.mark.parametrize("rows", [3, 30])
def test_what_is_shown_is_plain_html_of_bounded_size(ready: Notebook, rows: int) -> None:
    ready["rows"] = [{"prompt": "<script>alert(1)</script> & ", "completion": "word " * 600}] * 30
    result = ready.do(f"%lora data rows --rows {rows}")
    html = HTML(result._repr_html_()).data
    assert "<script" not in html and "&lt;script&gt;" in html
    assert len(html) < 50_000
    assert "30 of 30 rows cut to 1,024 tokens" in html
    assert result.__rich__() is not None


def test_a_training_says_where_to_see_what_was_cut(ready: Notebook) -> None:
    cell = "%%lora_train model --data rows --tokenizer tok{}\nmax_steps = 1"
    told = ready.do(cell.format(" --max-length 13")).message
    assert "3 of 8 rows were truncated" in told
    assert told.endswith("(%lora data rows --tokenizer tok --max-length 13 shows them)")
    shown = ready.do("%lora data rows --tokenizer tok --max-length 13").summary
    assert shown.cut_rows == 3
    assert "%lora data" not in ready.do(cell.format("")).message


def test_what_is_not_used_is_named_in_the_spelling_of_cells(ready: Notebook) -> None:
    ready["labelled"] = [{"text": "a b", "label": "yes", "id": 1}] * 4
    shown = ready.do("%lora data labelled --tokenizer tok")
    assert shown.notes[0] == "columns not used: 'id', 'label'" and "columns not used: " in shown._repr_html_()
    assert "--columns prompt=text completion=label trains it to answer with the label" in shown.notes[1]
    told = ready.do("%%lora_train model --data labelled --tokenizer tok\nmax_steps = 1\nlearning_rate = 1e-3").message
    assert told == "columns not used: 'id', 'label' (%lora data labelled --tokenizer tok shows them)"
    ready["odd"] = [{"ID": "a", "Ticket Text": "b"}]
    assert (
        'Say what they are called: --columns prompt="Ticket Text" completion=COLUMN' in ready.run("%lora data odd").line
    )
    ready["pairs"] = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    line = ready.run("%%lora_train model --data pairs --tokenizer tok --objective sft\nmax_steps = 1").line
    assert "--columns completion=chosen takes the chosen ones" in line
    assert "<" in ready.do("%lora data pairs --tokenizer tok")._repr_html_()


def test_preferences_are_shown_as_they_are_trained_on_and_the_cell_says_how(ready: Notebook) -> None:
    ready["pairs"] = [{"prompt": "a b", "chosen": "b a", "rejected": "c"}] * 4
    shown = ready.do("%lora data pairs --tokenizer tok")
    assert shown.summary.form == "chosen and rejected" and "rejected · 2 compared" in shown._repr_html_()
    assert "33.3 % of them learned, 16.7 % compared" in str(shown)
    cell = "%%lora_train model --data pairs --tokenizer tok --objective dpo --reference base\nmax_steps = 1\nbeta = 0.3"
    result = ready.do(cell)
    assert (result.objective, result.reference) == ("dpo", "base")
    assert_close(result.loss, math.log(2))
    assert "objective: dpo (beta=0.3); reference: base" in result.message
    plan = ready.do("%lora plan model --data pairs --tokenizer tok --batch-size 2")
    assert plan.settings.batch_size == 4 and any("counted as two sequences" in note for note in plan.notes)


def test_completions_are_scored_by_functions_of_the_notebook(ready: Notebook) -> None:
    def even(completions: Any, prompts: Any, total: Any) -> list[float]:
        return [sum(map(ord, text)) % 7 + len(wanted) for text, wanted in zip(completions, total, strict=True)]

    def short(completions: Any) -> list[int]:
        return [-len(text) for text in completions]

    ready["even"], ready["short"] = even, short
    ready["sums"] = [{"prompt": row["prompt"], "total": row["completion"]} for row in PAIRS]
    body = "max_steps = 2\nmax_completion_length = 4\nreward_weights = [1.0, 0.1]"
    result = ready.do(f"%%lora_train model --data sums --tokenizer tok --reward even --reward short\n{body}")
    assert result.objective == "grpo" and "rewards: even, short" in result.message
    assert "best completion" in ready.do("%lora watch")._repr_html_()
    assert "reward: objects of the notebook cannot be written into a script" in ready.run("%lora export t.py").line
    for option, told in (
        ("--reward evn", "'evn'"),
        ("--reward len", "reward 'len' needs 'obj'"),
        ("--reward sums", "a reward must be a function"),
        ("--objective grpo", "grpo needs --reward: functions"),
        ("--reward even --objective dpo", "reward requires --objective grpo"),
        ("--reward even --columns prompt=total", "reward 'even' needs 'total'"),
    ):
        assert told in ready.run(f"%%lora_train model --data sums --tokenizer tok {option}\nmax_steps = 1").line
    ready["alone"] = [{"prompt": "a b"}]
    assert ready.do("%lora data alone --tokenizer tok").summary.form == "prompt"


@pytest.mark.parametrize("source", ["sums.jsonl", "asked --columns prompt=question completion=answer"])
def test_a_training_from_a_file_is_exported(ready: Notebook, source: str) -> None:
    ready.do(f"%%lora_train model --data {source} --eval-data 0.25 --tokenizer tok\nmax_steps = 1")
    result = ready.do("%lora export train.py --base somewhere")
    assert [count for _, count in result.data] == [6, 2]
    ready["stream"] = __import__("datasets").Dataset.from_list(PAIRS).to_iterable_dataset()
    ready.do("%%lora_train model --data stream --tokenizer tok\nmax_steps = 1")
    assert "a stream cannot be written next to a script" in ready.run("%lora export train.py --base somewhere").line


def test_a_stream_needs_a_number_of_steps(ready: Notebook) -> None:
    ready["stream"] = __import__("datasets").Dataset.from_list(PAIRS).to_iterable_dataset()
    told = ready.run("%%lora_train model --data stream --tokenizer tok\nlearning_rate = 1e-3").line
    assert "set the number of steps" in told and "max_steps" in told


def test_data_is_completed(ready: Notebook) -> None:
    assert "sums.jsonl" in ready.complete("%lora_train model --data su")
    assert ready.complete("%lora data su") == ["sums.jsonl"]
    assert {"rows", "sums.jsonl", '"with space.jsonl"'} <= {*ready.complete("%lora_train model --data ")}
    assert "model" not in ready.complete("%lora_train model --data ")
    assert "--rename NAME NEW" in ready.run("%lora help runs").everything
    assert "--learn {all,last,completion}" in ready.run("%lora help lora_train").everything
    assert "(default: the notebook's only one)" in " ".join(ready.run("%lora help lora_train").everything.split())
    assert '"with space.jsonl"' in ready.complete("%lora data wi")
    assert "rows" in ready.complete("%lora_train model --data ro")
    assert ready.complete("%lora data rows --columns pro") == ["prompt="]
    assert "completion=" in ready.complete("%lora data rows --columns prompt=question comp")


ODD = [{"ID": f"{n}", "Ticket Text ": f"it's {n}", 'Team "A" (label)': "red"} for n in range(4)]


def test_columns_are_quoted_as_one_likes_and_hints_can_be_pasted(ready: Notebook) -> None:
    ready["odd"] = ODD
    hint = ready.run("%lora data odd").line.partition("Say which is which: ")[2].rstrip(".")
    assert hint == """--columns prompt="Ticket Text " completion='Team "A" (label)'"""
    assert ready.do(f"%lora data odd {hint}").summary.row_count == 4
    for first in ('prompt="Ticket Text "', "prompt='Ticket Text '", '"prompt=Ticket Text "', "'prompt=Ticket Text '"):
        line = f"odd --columns {first} completion=ID"
        assert ready.do(f"%lora data {line}").summary.row_count == 4
    assert ready.do(f"%lora_train model --data {line} max_steps=1 --no-keep").steps == 1
    told = ready.do(f"%lora_train model --data odd {hint} --max-length 15 --skip-bad --no-keep max_steps=1").message
    command = told.partition("(%lora data")[2].rpartition(" shows them)")[0]
    assert ready.do(f"%lora data{command}").summary.row_count == 4 and "--skip-bad --columns" in command
    assert "with spaces: prompt=" in ready.run("%lora data odd --columns prompt=Ticket Text completion=ID").line


@pytest.mark.parametrize(
    ("line", "label", "rows"),
    [
        ("odd COLUMNS", "Score on its training rows", "odd COLUMNS"),
        ("odd COLUMNS --eval-data 0.25", "Score on its held-out rows", "odd COLUMNS --held-out"),
        ("odd COLUMNS --eval-data odd[:3] --skip-bad", "Score", "odd[:3] --skip-bad COLUMNS"),
        (
            "odd COLUMNS --max-length 200 --long drop",
            "Score on its training rows",
            "odd --max-length 200 --long drop COLUMNS",
        ),
        ("sql=odd[:3] chat=odd COLUMNS", "Score on its training rows", "odd[:3] COLUMNS"),
    ],
)
def test_a_finished_card_scores_on_the_rows_that_the_cell_named(
    ready: Notebook, line: str, label: str, rows: str
) -> None:
    columns = """--columns prompt="Ticket Text " completion='Team "A" (label)'"""
    ready["odd"] = ODD
    ready.do("%lora use sql chat" if "sql=" in line else "%lora use sql")
    ready.do(f"%lora_train model --data {line.replace('COLUMNS', columns)} --tokenizer tok max_steps=1 --no-keep")
    state = ready.session.state
    train = state.model("model").training
    command = next(line for name, line in next_steps(train, state, "model").commands if name == label)
    title = "Training 2 adapters side by side" if "sql=" in line else "Training sql on odd"
    assert training_card(train).title == title
    wanted = rows.replace("COLUMNS", columns)
    first, *others = wanted.split(" --", 1)
    assert command == f"%lora score sql --data {first} --tokenizer tok --{others[0]}"
    number = 3 if "[:3]" in rows else 1 if "--held-out" in rows else 4
    assert len(ready.do(f"{command} --metric loss").items) == number


def test_repeated_rows_are_counted_before_a_training_holds_some_out(ready: Notebook) -> None:
    ready["twice"] = [{"question": "q", "answer": "a"}] * 20 + [{"question": "p", "answer": "a"}] * 20
    columns = "--columns prompt=question completion=answer"
    notes = ready.do(f"%lora data twice {columns}").notes
    hint = "--eval-by question keeps equal rows together"
    assert notes[-1] == f"38 of 40 rows are equal to earlier ones: if rows are held out for evaluation, {hint}"
    trained = ready.do(f"%lora_train model --data twice {columns} --eval-data 0.5 max_steps=1 --no-keep").message
    assert "held-out rows are also trained on (38 of 40 rows are repeats): --eval-by question keeps" in trained
    line = f"%lora_train model --data twice {columns} --eval-data 0.5 --eval-by question max_steps=1 --no-keep"
    assert "also trained on" not in ready.do(line).message


def test_a_prompt_and_a_completion_say_that_no_template_is_applied(ready: Notebook) -> None:
    ready["tok"] = CharTokenizer("yes")
    note = ready.do("%lora data rows").notes[0]
    assert note.startswith("no chat template is applied to prompts and completions")
    hint = note.partition("one: ")[2].removesuffix(" applies it")
    assert hint == "--columns instruction=prompt output=completion"
    applied = ready.do(f"%lora data rows {hint}")
    assert applied.summary.form == "instruction and output" and not applied.notes
    mapped = ready.do("%lora data asked --columns prompt=question completion=answer").notes[0]
    assert "--columns instruction=question output=answer applies it" in mapped
    ready["tok"] = CharTokenizer()
    assert not ready.do("%lora data rows").notes


def test_bad_rows_are_counted_and_left_out_on_request(ready: Notebook) -> None:
    ready["bad"] = [*PAIRS, {"prompt": "a", "completion": 3}, {"prompt": "a", "completion": 4}, {"prompt": "b"}]
    line = ready.run("%lora data bad").line
    assert line.startswith("3 of 11 rows cannot be read: rows 8, 9: 'completion' is an int (3), not text; row 10: ")
    assert line.endswith("(--skip-bad).")
    assert ready.run("%lora_train model --data bad --no-keep max_steps=1").line == line
    shown = ready.do("%lora data bad --skip-bad")
    assert shown.summary.row_count == 8 and shown.notes[0].startswith("3 rows left out: row 8: ")
    assert "row 8 · 0 tokens · left out: " in shown._repr_html_()
    assert not [block for block in shown.view().blocks if isinstance(block, Tokens) and not block.spans]  # empty boxes
    assert "3 rows left out" in ready.do("%lora_train model --data bad --skip-bad --no-keep max_steps=1").message


@pytest.mark.parametrize("given", ["';'", '";"', ";"])
def test_a_separator_is_given(ready: Notebook, given: str) -> None:
    Path("odd.csv").write_text("prompt,x;completion\na,b;c\nd,e;f\n")
    hint = "--columns prompt=prompt,x"
    assert ready.do(f"%lora data odd.csv --separator {given} {hint}").summary.row_count == 2
    assert ready.do(f"%lora_train model --data odd.csv --separator {given} {hint} --no-keep max_steps=1").steps == 1
    assert "separator is for .csv and .tsv files" in ready.run(f"%lora data rows --separator {given} --rows 1").line
    Path("tab.tsv").write_text("prompt|completion\na|c\n")
    assert ready.do(r"%lora data tab.tsv --separator '|'").summary.row_count == 1


def test_options_of_conversations_stand_in_the_line_and_in_the_command_that_shows_the_rows(ready: Notebook) -> None:
    class Loud(CharTokenizer):
        def apply_chat_template(self, messages: Any, *, loud: bool = False, tone: str = "", **options: Any) -> str:
            return ("!" if loud else "") + tone + super().apply_chat_template(messages, **options)

    ready["tok"] = Loud("{{ loud }} {{ tone }}")
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"))]
    ready["chats"] = [{"messages": turns * 2, "user": number % 2, "other": 1} for number in range(4)]
    how = "--learn last --reasoning drop --template loud=True --template tone=low --long drop"
    shown = ready.do(f"%lora data chats {how}")
    assert shown.summary.format.variables == {"loud": True, "tone": "low"}
    assert shown.summary.learned_count == 4 * 3 and "no row has reasoning to drop" in shown.notes
    line = ready.run("%lora data chats --learn lst").line
    assert line.startswith("%lora data: --learn: invalid choice: 'lst'") and line.endswith("). Did you mean 'last'?")
    line = f"%lora_train model --data chats --eval-data 0.5 --eval-by user {how} --no-keep max_steps=1"
    message = ready.do(line).message
    assert "2 of 4 rows held out for evaluation, in whole groups by 'user' (2 groups)" in message
    command = message.partition("(%lora data")[2].rpartition(" shows them)")[0]
    again = ready.do(f"%lora data{command}").summary
    assert (again.format, again.learned_count) == (shown.summary.format, shown.summary.learned_count)
    score = "%lora score --data chats --template loud=yes --max-new-tokens 2"
    assert ready.do(score).notes is not None
    assert ready.run("%lora score --data chats --template lowd=yes").line.startswith("--template: the chat")
    ready["texts"] = [{"text": "abcdefgh"}] * 2
    assert (
        "2 rows longer than the maximum length split into 4 parts"
        in ready.do("%lora data texts --long split --max-length 6").notes
    )


def test_data_is_mixed_in_the_line(ready: Notebook) -> None:
    ready["more"] = [{"prompt": f"{number} is ", "completion": "even"} for number in range(4)]
    shown = ready.do("%lora data rows*0.5 more*0.5")
    assert shown.summary.row_count == 8
    assert shown.notes[0] == "mixture: 4 of 8 rows of rows, 4 of 4 rows of more"

    def texts(command: str) -> list[str]:
        return ["".join(span.text for span in row.spans) for row in ready.do(f"{command} --rows 8").summary.rows]

    assert texts("%lora data rows*0.5 more*0.5 --seed 42") == texts("%lora data rows*0.5 more*0.5")
    assert texts("%lora data rows*0.5 more*0.5 --seed 7") != texts("%lora data rows*0.5 more*0.5")
    assert "seed has no effect: only the rows of a mixture are drawn" in ready.run("%lora data rows --seed 7").line
    mixed = "sums.jsonl*2 more[:3]*1"
    message = ready.do(f"%lora_train model --data {mixed} --max-length 12 --no-keep max_steps=1 seed=3").message
    assert "mixture: 6 of 8 rows of sums.jsonl, 3 of 3 rows of more[:3]" in message
    command = message.partition("(%lora data")[2].rpartition(" shows them)")[0]
    assert command.endswith(" --seed 3") and ready.do(f"%lora data{command}").summary.row_count == 9
    assert ready.do("%lora data rows*2").summary.row_count == 16  # an expression
    assert ready.run("%lora data rows*2 rows*1 more*1").line.startswith("data: 'rows' is in the mixture twice")
    assert ready.run("%lora data rows*0.5 missing*0.5").line.startswith("name 'missing' is not defined")


def test_columns_apply_to_the_rows_that_have_them_and_the_card_names_each(ready: Notebook) -> None:
    ready["mails"] = [{"Nachricht": f"n {number} is ", "Kategorie": str(number)} for number in range(4)]
    ready["pairs"] = [{"prompt": f"p {number} is ", "completion": str(number)} for number in range(4)]
    columns = "--columns prompt=Nachricht completion=Kategorie"
    ready.do("%lora use sql chat")
    told = ready.do(f"%lora_train model --data sql=mails chat=pairs {columns} --tokenizer tok max_steps=1 --no-keep")
    assert "chat: columns does not apply to these rows, which have 'prompt', 'completion'" in told.message
    state = ready.session.state
    commands = next_steps(state.model("model").training, state, "model").commands
    lines = [line for label, line in commands if label.startswith("Score")]
    assert lines == [
        f"%lora score sql --data mails --tokenizer tok {columns}",
        "%lora score chat --data pairs --tokenizer tok",
    ]
    for line in lines:
        assert len(ready.do(f"{line} --metric loss").items) == 4
    wrong_columns = columns.replace("Kategorie", "answer")
    wrong = ready.run(f"%lora_train model --data sql=mails chat=pairs {wrong_columns} --tokenizer tok max_steps=1")
    assert wrong.line.startswith("rows of 'sql': columns: the rows have no 'answer', but 'Nachricht', 'Kategorie'.")
    previews = ready.run("%lora data sql=mails chat=pairs").line
    assert previews == "data: rows for each adapter are shown one by one: %lora data mails and %lora data pairs"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("%%lora_train model --data rows --name chat\nmax_steps = 1", "It is called '--adapter' now"),
        ("%%lora_train model --data rows --adapter new\nmax_steps = 1", "added first: %%lora model --name new"),
        ("%lora score --data rows --limit 4", "Part of the rows is written with their name: train.csv[:4]"),
        ("%lora score --data rows --max-rows 4", "Part of the rows is written with their name: train.csv[:4]"),
        ("%lora use --name chat", "NAME is given without an option: %lora use NAME"),
        ("%lora ship --for ollama --adapter chat", "NAME is given without an option: %lora ship NAME"),
        ("%lora data rows --rows 4:5", "a range of rows is written with their name, as in train.csv[4:5]"),
    ],
)
def test_what_another_command_calls_it_is_answered_with_the_name_here(ready: Notebook, line: str, told: str) -> None:
    assert told in ready.run(line).line
