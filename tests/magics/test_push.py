"""``%lora push``: one line for what is wrong, and the token nowhere in the notebook."""

from __future__ import annotations

from typing import Any

import pytest

from tests.checkpoint.loopback import TOKEN, Hub


def test_push_and_load(hub: Hub, adapted: Any) -> None:
    outcome = adapted.run("%lora push me/sql --adapter sql --private --message 'By the test'")
    assert outcome.error is None
    assert outcome.value.commit_url.startswith(f"{hub.endpoint}/me/sql/commit/")
    assert hub.commits == [("me/sql", "main", "By the test")] and hub.private == {"me/sql"}
    kept = [repr(value) for value in adapted["Out"].values()]
    assert TOKEN not in outcome.printed + outcome.complained + "".join(kept) + outcome.value._repr_html_()
    adapted.do("%lora load me/sql --name again")
    model = adapted["model"]
    weights = [model.manager.weights(name).adapters for name in ("sql", "again")]
    assert all(
        (weights[0][path][key] == weights[1][path][key]).all() for path in weights[0] for key in weights[0][path]
    )


def test_mistakes_are_one_line(hub: Hub, adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "say which one to push (--name): chat, sql" in adapted.run("%lora push me/sql").line
    assert "push needs a repository as user/name" in adapted.run("%lora push a/b/c --adapter sql").line
    assert "USER/NAME" in adapted.run("%lora push").line
    monkeypatch.delenv("HF_TOKEN")
    assert "needs an access token with write access" in adapted.run("%lora push me/sql --adapter sql").line
    monkeypatch.setenv("HF_TOKEN", "hf_" + "w" * 30)
    line = adapted.run("%lora push me/sql --adapter sql").line
    assert "does not accept this access token" in line and "hf_w" not in line
    assert hub.commits == []
