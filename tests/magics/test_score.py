"""``%lora score`` in a real shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbpeft.scoring.result import ScoreResult
from tests.char_tokenizer import CharTokenizer
from tests.magics.notebook import Notebook
from tests.scoring.support import ROWS
from tests.tiny_models import randomize


class Printable(CharTokenizer):
    """Takes every text: characters that it does not know are spaces."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return super().__call__("".join(sign if " " <= sign <= "~" else " " for sign in text), add_special_tokens)


@pytest.fixture
def ready(adapted: Notebook) -> Notebook:
    for seed, name in enumerate(("sql", "chat")):
        randomize(adapted["model"], name, seed)
    adapted["rows"], adapted["tokenizer"] = ROWS, CharTokenizer()
    return adapted


def test_the_base_and_all_adapters_are_scored_or_some(ready: Notebook) -> None:
    result = ready.do("%lora score --data rows --max-new-tokens 3")
    assert isinstance(result, ScoreResult)
    assert (result.columns, result.metric, len(result.items)) == (("base", "chat", "sql"), "exact", len(ROWS))
    result = ready.do("%lora score sql sql+chat --data rows --metric f1 loss --strip --no-base --max-new-tokens 3")
    assert (result.columns, [facts.name for facts in result.metrics]) == (("sql", "sql+chat"), ["f1", "loss"])
    assert ready["model"].active_adapters == ["sql"]


def test_options_reach_the_scores(ready: Notebook, tmp_path: Path) -> None:
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps({"q": row["prompt"], "a": row["completion"]}) + "\n" for row in ROWS))
    ready["file"] = str(file)
    line = "%lora score sql --data {file} --metric regex --pattern . --columns prompt=q completion=a --max-new-tokens 2"
    assert ready.do(line).scores["sql"].value > 0.5
    sampled = ready.do("%lora score sql --data rows --temperature 0.7 --top-p 0.9 --seed 4 --max-new-tokens 2")
    assert dict(sampled.settings) == {"temperature": 0.7, "top-p": 0.9, "seed": 4}


def test_a_metric_may_be_a_function_of_the_notebook(ready: Notebook) -> None:
    def short(answer: str, row: Any) -> bool:
        return len(answer) < 2

    ready["short"] = short
    assert ready.do("%lora score sql --data rows --metric short exact --max-new-tokens 2").metric == "short"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "needs --data"),
        ("--data rows --metric exakt", "--metric: no metric is called 'exakt'. Did you mean 'exact'"),
        ("--data rows --metric loss --strip", "strip is used by exact"),
        ("--data rows --metric number --tolerance x", "expected a number"),
        ("--data rowz", "name 'rowz' is not defined"),
        ("sqll --data rows", "sqll"),
    ],
)
def test_mistakes_are_one_line(ready: Notebook, line: str, message: str) -> None:
    assert message in ready.run(f"%lora score {line}").line


def test_the_loss_on_a_general_text_needs_no_rows(ready: Notebook) -> None:
    ready["tokenizer"] = Printable()
    shown = str(ready.do("%lora inspect sql"))
    assert "Loss on general text: %lora score sql --general" in shown
    result = ready.do("%lora score sql --general --max-length 24")
    assert (result.columns, result.metric, len(result.items)) == (("base", "sql"), "loss", 38)


def test_names_metrics_and_data_are_completed(ready: Notebook) -> None:
    assert {"sql", "chat"} <= set(ready.complete("%lora score "))
    assert {"exact", "perplexity"} <= set(ready.complete("%lora score --data rows --metric "))
    assert "rows" in ready.complete("%lora score --data ")
    assert "--casefold" in ready.complete("%lora score --data rows --ca")
    assert "intervals and paired tests" in str(ready.run("%lora help score").everything)


def test_a_training_is_scored_and_stops_by_it(ready: Notebook) -> None:
    ready["train_rows"] = ROWS
    cell = "%%lora_train model --data train_rows --score rows --metric f1 exact --every 2 --patience 5 --no-keep"
    result = ready.do(f"{cell}\nmax_steps = 4\nper_device_train_batch_size = 2")
    assert [step for step, _ in result.state.metric_history["f1"]] == [2, 4]
    assert {"f1", "exact"} <= result.state.metrics.keys()
    assert (
        "--metric: no metric is called 'exakt'" in ready.run(f"{cell.replace('f1 exact', 'exakt')}\nmax_steps = 1").line
    )
    assert (
        "--metric has no effect without --score"
        in ready.run("%%lora_train model --data rows --metric f1\nmax_steps = 1").line
    )
    assert {"exact", "f1"} <= set(ready.complete("%%lora_train model --data rows --score rows --metric "))


def test_folders_are_found_by_a_pattern(ready: Notebook, tmp_path: Path) -> None:
    for name in ("one", "two"):
        ready["model"].save_pretrained(tmp_path / name / "adapter", selected_adapters=["sql"])
    ready["runs"] = str(tmp_path)
    line = "%lora score --data rows --max-new-tokens 1 --folders"
    assert ready.do(f"{line} {{runs}}/*/adapter/sql").columns == ("base", "chat", "sql", "one", "two")
    assert "no folder matches" in ready.run(f"{line} {{runs}}/x*/adapter").line


def test_separator_and_bad_rows_are_as_in_training(ready: Notebook, tmp_path: Path) -> None:
    table, lines = tmp_path / "held_out.csv", tmp_path / "bad.jsonl"
    table.write_text("prompt@completion\n" + "".join(f"{row['prompt']}@{row['completion']}\n" for row in ROWS))
    lines.write_text(
        "no JSON\n" + "".join(json.dumps(row) + "\n" for row in ROWS) + '{"prompt": "a", "completion": 3}\n'
    )
    ready["table"], ready["lines"] = str(table), str(lines)
    reading = "--separator @ --skip-bad"
    result = ready.do(f"%lora score --data {{table}} --also {{lines}} {reading} --max-new-tokens 2")
    assert len(result.items) == len(result.elsewhere.items) == len(ROWS)
    assert "2 rows left out: row 0: bad.jsonl, line 1 is not JSON" in str(result)
    assert "(--skip-bad)" in ready.run("%lora score --data {lines}").line
    assert len(ready.do("%lora score --data {lines} --skip-bad --max-new-tokens 2").items) == len(ROWS)
    line = f"%%lora_train model --data {{table}} --score {{lines}} --eval-data {{lines}} {reading} --no-keep"
    result = ready.do(f"{line}\nmax_steps = 1")
    assert "rows to score: 2 rows left out" in result.message and "evaluation rows: 2" in result.message


def test_the_held_out_rows_of_a_training_are_scored_from_its_card(ready: Notebook) -> None:
    result = ready.do("%lora_train model --data rows --eval-data 0.25 --tokenizer tokenizer max_steps=1 --no-keep")
    found = ready.do("%lora score sql --data rows --tokenizer tokenizer --held-out --max-new-tokens 1")
    assert tuple(item.number for item in found.items) == result.held_out and len(found.items) == 3
    assert "--held-out chooses among the rows of --data DATA" in ready.run("%lora score sql --general --held-out").line
