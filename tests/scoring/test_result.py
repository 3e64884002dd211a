"""Scores, flips and how they are shown, of results that are written by hand."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest

from nbpeft.errors import ConfigError
from nbpeft.scoring.items import MetricFacts, ScoreItem
from nbpeft.scoring.result import ScoreResult

FIXED, BROKEN = range(10, 22), range(22, 25)


def item(number: int, right: dict[str, bool], **more: Any) -> ScoreItem:
    answers = {name: "blue" if is_right else f"<b>red</b> {number}" for name, is_right in right.items()}
    values = {"exact": {name: float(is_right) for name, is_right in right.items()}}
    return ScoreItem(number, f"colour {number}?", "blue", answers, values, **more)


def result(**changes: Any) -> ScoreResult:
    """48 items: ``sql`` fixes 12 and breaks 3, ``chat`` fixes 1."""
    items = []
    for number in range(48):
        base = number < 10 or number in BROKEN
        sql = number < 10 or number in FIXED
        items.append(item(number, {"base": base, "sql": sql, "chat": base or number == 40}))
    given: dict[str, Any] = {"model_name": "model", "columns": ("base", "sql", "chat"), "metric": "exact"}
    given |= {"metrics": (MetricFacts("exact"),), "items": tuple(items), "total": 48, "seconds": 2.0}
    return ScoreResult(**given | changes)


def test_scores_are_shares_with_wilson_intervals() -> None:
    score = result().scores["sql"]
    assert (score.value, score.count, score.interval) == (22 / 48, 48, "Wilson")
    assert (score.low, score.high) == pytest.approx((0.3258, 0.5970), abs=1e-3)
    assert float(score) == score.value


def test_flips_name_what_was_fixed_and_broken() -> None:
    flips = result().flips("base", "sql")
    assert [item.number for item in flips.fixed] == list(FIXED)
    assert [item.number for item in flips.broken] == list(BROKEN)
    assert (flips.count, flips.test, flips.is_significant) == (48, "exact McNemar test", True)
    assert str(flips) == "fixed 12, broke 3 (p = 0.035)"
    assert not result().flips("base", "chat").is_significant
    assert [item.number for item in result().disagreeing] == [*FIXED, *BROKEN, 40]


def test_a_smaller_loss_is_better_and_tokens_count() -> None:
    items = []
    for number in range(30):
        values = {"loss": {"base": 2.0 + number % 3, "sql": 1.5 + number % 3 - (number == 0)}}
        items.append(ScoreItem(number, "", "", {}, values, weight=1.0 + number % 2))
    facts = MetricFacts("loss", greater_is_better=False, is_share=False, is_weighted=True)
    found = result(columns=("base", "sql"), metrics=(facts,), metric="loss", items=tuple(items), total=30)
    flips = found.flips("base", "sql")
    assert (len(flips.fixed), len(flips.broken), flips.test) == (30, 0, "sign-flip permutation test")
    assert str(flips) == "better on 30, worse on 0 (p < 0.001)"
    weights = [item.weight for item in items]
    expected = sum(item.values["loss"]["base"] * item.weight for item in items) / sum(weights)
    assert found.scores["base"].value == pytest.approx(expected)
    assert found.scores["base"].low < expected < found.scores["base"].high
    assert found.scores["base"].interval == "bootstrap"


def test_items_that_one_column_lacks_are_left_out_of_its_test() -> None:
    partial = item(48, {"sql": True})
    found = result(items=(*result().items, partial), total=49)
    assert found.flips("base", "sql").count == 48
    assert (found.scores["sql"].count, found.scores["base"].count) == (49, 48)


def test_the_text_has_scores_tests_and_verdicts() -> None:
    text = str(result(notes=("answers cut",)))
    assert text.startswith("exact · 48 items · 2.0 s\n  base  27.1 %")
    assert "sql against base: fixed 12, broke 3 (p = 0.035)\n" in text
    assert "chat against base: fixed 1, broke 0 (p = 1); 48 items cannot tell these two apart" in text
    assert "sql against chat: fixed 12, broke 4 (p = 0.077); 48 items cannot" in text
    assert "95 % Wilson intervals; p-values of the exact McNemar test" in text
    assert "answers cut" in text


def labelled(references: list[str], **changes: Any) -> ScoreResult:
    """Items with these references, of which ``sql`` answers ``a`` to all but the last one, with a space before."""
    answers = [*[" a"] * (len(references) - 1), "<?>"]
    items = tuple(
        ScoreItem(n, "q", reference, {"sql": answer}, {"exact": {"sql": float(reference == answer.strip())}})
        for n, (reference, answer) in enumerate(zip(references, answers, strict=True))
    )
    return result(columns=("base", "sql"), items=items, total=len(items), **changes)


def test_labels_are_counted_by_answer() -> None:
    found = labelled(["a", "a", "b", "a", "b", "c"])
    assert found.confusion("sql") == {"a": {"a": 3}, "b": {"a": 2}, "c": {"<?>": 1}}
    assert found.confusion("base") == {}
    html = found._repr_html_()
    assert "<summary>answers of sql by reference</summary>" in html and "answers of base" not in html
    table = html.partition("answers of sql by reference")[2].partition("</table>")[0]
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", table)
    texts = [re.sub(r"<[^>]+>", "", cell) for cell in cells]
    assert texts[:5] == ["reference", "a", "b", "c", "another answer"]
    assert texts[5:] == [*"a3000", *"b2000", *"c0001"]
    with pytest.raises(ConfigError, match="Did you mean 'sql'"):
        found.confusion("sqk")


@pytest.mark.parametrize(
    "references", [["a"] * 9, ["a", "b", "c"], ["a", "b", "", "a", "b"], [str(n % 11) for n in range(40)]]
)
def test_other_references_are_not_counted_as_labels(references: list[str]) -> None:
    assert "by reference" not in labelled(references)._repr_html_()


def test_the_card_has_bars_tests_and_filters() -> None:
    html = result()._repr_html_()
    assert 'alt="base 27.1 %, sql 45.8 %, chat 29.2 %"' in html
    for words in ("fixed by sql: 12", "broken by sql: 3", "fixed by chat: 1", "wrong with sql: 26", "all items: 48"):
        assert f"<summary>{words}</summary>" in html
    assert "broken by chat" not in html
    assert len(set(re.findall(r'<details name="([^"]+)"', html))) == 1
    assert "&lt;b&gt;red&lt;/b&gt;" in html and "<b>red" not in html
    assert ">right</span>" in html and ">wrong</span>" in html
    assert "and 43 more" in html
    assert len(html) < 150_000


def test_a_running_result_shows_its_progress() -> None:
    html = result(status="running", items=result().items[:12], done=0.25)._repr_html_()
    assert "width:25.0%" in html
    assert "12 of 48 items" in html
    assert "an interruption keeps what is scored" in html
    assert "<details" not in html


def test_what_was_not_scored_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nothing called 'sqll' was scored\. Did you mean 'sql'"):
        result().flips("base", "sqll")
    with pytest.raises(ConfigError, match=r"the result has no metric 'f1'\. There are: exact"):
        result().by("f1")


def test_items_are_a_table() -> None:
    frame = result().to_dataframe()
    assert len(frame) == 48 * 3
    assert frame.groupby("adapter").exact.mean()["sql"] == pytest.approx(22 / 48)
    assert list(frame.columns) == ["row", "prompt", "reference", "adapter", "answer", "cut", "exact"]


def test_pandas_is_needed_for_the_table_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from nbpeft.errors import MissingPackageError

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match="to_dataframe needs pandas"):
        result().to_dataframe()


def test_a_stopped_scoring_takes_means_over_the_rows_that_all_columns_have() -> None:
    """Groups of folders are computed one after the other, the longest rows first."""
    whole = [item(number, {"base": number < 30, "sql": True, "chat": True}) for number in range(40, 48)]
    alone = [item(number, {"base": True}) for number in range(40)]
    found = result(columns=("base", "sql", "chat", "late"), items=(*alone, *whole), status="stopped")
    assert {name: score.count for name, score in found.scores.items()} == {"base": 8, "sql": 8, "chat": 8, "late": 0}
    assert (found.scores["base"].value, found.scores["sql"].value) == (0.0, 1.0)
    assert "stopped after 8 of 48 items" in str(found)
    late = next(line for line in str(found).splitlines() if "late" in line)
    assert "not scored" in late and "NaN" not in str(found)


@pytest.mark.parametrize("order", list(itertools.permutations(("a", "b", "c", "lost"))))
def test_the_best_two_are_compared_whichever_adapter_has_no_loss(order: tuple[str, ...]) -> None:
    means = {"base": 3.0, "a": 1.0, "b": 2.0, "c": 2.5, "lost": math.nan}
    rows = [
        ScoreItem(number, "", "", {}, {"loss": {name: mean + number % 3 for name, mean in means.items()}})
        for number in range(12)
    ]
    facts = MetricFacts("loss", greater_is_better=False, is_share=False)
    found = result(columns=("base", *order), metrics=(facts,), metric="loss", items=tuple(rows), total=12)
    assert "a against b" in str(found)


def test_one_or_two_items_have_no_interval() -> None:
    rows = [ScoreItem(number, "", "", {}, {"loss": {"base": 2.0, "sql": 1.0}}) for number in range(2)]
    facts = MetricFacts("loss", greater_is_better=False, is_share=False)
    found = result(columns=("base", "sql"), metrics=(facts,), metric="loss", items=tuple(rows), total=2)
    assert math.isnan(found.scores["sql"].low) and not found.scores["sql"].interval
    assert "too few for an interval" in str(found) and "nan" not in str(found).lower()
    assert "nan" not in found._repr_html_().lower()
