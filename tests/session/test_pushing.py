"""Uploading an adapter to the hub: a hub on the loopback takes it, and gives it back."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from nbpeft.checkpoint import other_config
from nbpeft.errors import AdapterError, AdapterExistsError, CheckpointError, UnknownAdapterError
from nbpeft.session import PushResult, Session
from nbpeft.session.commands.pushing import card_facts
from tests.char_tokenizer import CharTokenizer
from tests.checkpoint.loopback import COMMIT, TOKEN, Hub
from tests.session.support import everything
from tests.tiny_models import llama

ROWS = [{"prompt": "a:", "completion": " b"}, {"prompt": "c:", "completion": " d"}]


@pytest.fixture
def trained(session: Session) -> Any:
    handle = session.add(llama(), {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}, variable="model")
    model = handle.model
    session.train(
        model,
        ROWS,
        ROWS[:1],
        tokenizer=CharTokenizer(),
        max_steps=2,
        learning_rate=1e-2,
        hub_token=TOKEN,
        report_to=[],
        seed=3,
    )
    return model


def test_the_saved_card_says_whether_it_helped_and_what_to_ask(session: Session, tmp_path: Path) -> None:
    tokenizer: Any = CharTokenizer()
    base = llama()
    base.config._name_or_path = "/models/SmallModel"
    model = session.add(base, {"r": 2, "target_modules": ["q_proj"]}, name="team", variable="model").model
    rows = [{"Frage": f"a | *b* $3 <i> {number}:", "Amt": " b"} for number in range(4)]
    columns = {"prompt": "Frage", "completion": "Amt"}
    session.train(model, rows, tokenizer=tokenizer, columns=columns, max_steps=1, learning_rate=1e-2)
    session.score(rows, metric="exact", columns=columns, tokenizer=tokenizer)
    session.save(tmp_path / "team")
    card = (tmp_path / "team" / "README.md").read_text()
    assert "for SmallModel, a LlamaForCausalLM with" in card and "/models" not in card
    assert re.search(r"\| exact on 4 rows \| team 0(\.0)? % \(.*\), base 0(\.0)? % \(", card)
    assert "| columns | prompt = Frage, completion = Amt |" in card
    assert r"| asked, for example | a \| \*b\* \$3 \<i\> 0: |" in card and "| the right answer | b |" in card
    published = dict(card_facts(session.context.models.get("model"), "team", "me/x", "x").training)
    assert "exact on 4 rows" in published and "asked, for example" not in published
    session.train(model, rows, tokenizer=tokenizer, columns=columns, max_steps=1, learning_rate=1e-2)
    session.save(tmp_path / "later")
    assert "exact on" not in (tmp_path / "later" / "README.md").read_text()  # its weights are others now


def test_push_and_load_back(hub: Hub, session: Session, trained: Any) -> None:
    result = session.push("me/orders", message="First one")
    assert isinstance(result, PushResult)
    assert (result.adapter, result.url, result.commit) == ("default", f"{hub.endpoint}/me/orders", COMMIT)
    assert result.commit_url == f"{hub.endpoint}/me/orders/commit/{COMMIT}"
    assert f'href="{result.commit_url}"' in result._repr_html_()
    assert hub.commits == [("me/orders", "main", "First one")]
    assert hub.tokens == {TOKEN}
    assert not hub.private

    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "loss_curve.svg"}
    assert hub.files["me/orders"].keys() == names
    loaded = session.load("me/orders", model=llama(), variable="other", name="back").model
    before, after = trained.manager.weights("default").adapters, loaded.manager.weights("back").adapters
    assert before.keys() == after.keys()
    assert all(torch.equal(before[path][key], after[path][key]) for path in before for key in before[path])


def test_the_card_tells_what_is_known(hub: Hub, session: Session, trained: Any) -> None:
    session.push("me/orders")
    card = hub.files["me/orders"]["README.md"].decode()
    for words in (
        "A LoRA adapter for a LlamaForCausalLM with",
        "| `r` | `4` |",
        "| data | 2 rows with prompt, completion |",
        "| evaluated on | 1 row with prompt, completion |",
        "| steps | 2 |",
        "| training loss at the end, smoothed |",
        "| evaluation loss at step 2 |",
        "![Training loss by step](loss_curve.svg)",
        "| `learning_rate` | `0.01` |",
        "| `max_steps` | `2` |",
        'from_pretrained(base_model, "me/orders")',
    ):
        assert words in card
    assert card.index("## Settings") < card.index("## Training") < card.index("## Use")
    assert (
        hub.files["me/orders"]["loss_curve.svg"].startswith(b"<?xml")
        and b"<path" in hub.files["me/orders"]["loss_curve.svg"]
    )
    assert all(TOKEN.encode() not in content for content in hub.files["me/orders"].values())
    assert "hub_token" not in card


def test_the_card_has_the_scores_of_the_best_step_too(hub: Hub, session: Session, trained: Any) -> None:
    tracked = session.context.models.get("model")
    assert tracked.training is not None
    curves = {"eval_history": ((1, 0.5), (2, 0.9)), "metric_history": {"exact": ((1, 0.75), (2, 0.25))}}
    last = {"eval_loss": 0.9, "eval_step": 2, "metrics": {"exact": 0.25}}
    for best, expected in ((1, [("evaluation loss", "0.5"), ("exact", "0.75")]), (2, [])):
        tracked.training = replace(tracked.training, best_step=best, **curves, **last)
        rows = dict(card_facts(tracked, tracked.training.adapter, "me/orders", "Orders").training)
        assert rows["exact"] == "0.25" and "evaluation loss at step 2" in rows
        assert [(name, value) for name, value in rows.items() if "best" in name] == [
            (f"{name} at the best step, 1", value) for name, value in expected
        ]


def test_a_card_that_is_there_keeps_its_text(hub: Hub, session: Session, trained: Any) -> None:
    session.push("me/orders")
    files = hub.files["me/orders"]
    files["README.md"] = files["README.md"].replace(b"# orders", b"# Orders of a shop\n\nBy hand.")
    session.train(trained, ROWS, tokenizer=CharTokenizer(), max_steps=3, learning_rate=1e-2, report_to=[])
    session.push("me/orders")
    card = files["README.md"].decode()
    assert "# Orders of a shop\n\nBy hand." in card
    assert card.count("## Training") == 1
    assert "| `max_steps` | `3` |" in card and "| `max_steps` | `2` |" not in card
    assert len(hub.commits) == 2


def test_branch_and_private(hub: Hub, session: Session, trained: Any) -> None:
    session.push("me/secret", private=True, revision="v2")
    assert hub.private == {"me/secret"}
    assert hub.commits == [("me/secret", "v2", "Upload adapter")]


def test_large_files_go_through_lfs(hub: Hub, session: Session, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    hub.large = True
    session.push("me/orders")
    (blob,) = hub.blobs.values()
    assert hub.files["me/orders"]["adapter_model.safetensors"] == blob


def test_an_adapter_that_was_never_trained(hub: Hub, session: Session, two_adapters: Any) -> None:
    with pytest.raises(AdapterError, match=r"several adapters; say which one to push .*: pirate, orders"):
        session.push("me/orders")
    with pytest.raises(UnknownAdapterError):
        session.push("me/orders", adapter="order")
    assert hub.asked == []
    session.push("me/orders", adapter="orders")
    card = hub.files["me/orders"]["README.md"].decode()
    assert "## Training" not in card and "| `r` | `2` |" in card
    assert hub.files["me/orders"].keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.drawn(2)
@pytest.mark.parametrize("repo", ["", "me/not a name!", "a/b/c", "https://me:secret@hub/x", 3])
def test_what_is_no_repository(hub: Hub, session: Session, trained: Any, repo: Any) -> None:
    with pytest.raises(AdapterError, match="push needs a repository as user/name"):
        session.push(repo)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accepted": set()}, "does not accept this access token"),
        ({"read_only": True}, "cannot write to 'me/orders'"),
        ({"broken": True}, "did not serve 'me/orders'"),
    ],
)
def test_a_hub_that_refuses(hub: Hub, session: Session, trained: Any, change: dict[str, Any], words: str) -> None:
    for name, value in change.items():
        setattr(hub, name, value)
    before = everything(trained)
    with pytest.raises(CheckpointError, match=words) as caught:
        session.push("me/orders")
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert "me/orders" not in hub.files
    assert everything(trained)["acts"] == before["acts"] and not os.listdir(tempfile.gettempdir())
    assert not session.state.busy


def test_no_network(hub: Hub, session: Session, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="the hub cannot be reached: nothing was uploaded"):
        session.push("me/orders", endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        session.push("me/orders")


def test_interrupted(hub: Hub, session: Session, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.push("me/orders")
    assert hub.commits == [] and not os.listdir(tempfile.gettempdir()) and not session.state.busy


def test_without_a_token(hub: Hub, session: Session, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="set HF_TOKEN in the environment or as a secret of Colab or Kaggle"):
        session.push("me/orders")
    assert hub.asked == []


def test_the_token_of_a_login(
    hub: Hub, session: Session, trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "no token").write_text(TOKEN)
    session.push("me/orders")
    assert hub.tokens == {TOKEN}


def test_the_secret_of_colab(
    hub: Hub, session: Session, trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_google_colab", lambda: TOKEN)
    result = session.push("me/orders")
    assert hub.tokens == {TOKEN}
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err + repr(result) + result._repr_html_()


def test_the_secret_of_kaggle(hub: Hub, session: Session, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class UserSecretsClient:
        def get_secret(self, label: str) -> str:
            if label != "HF_TOKEN":
                raise LookupError(label)
            return TOKEN

    module: Any = types.ModuleType("kaggle_secrets")
    module.UserSecretsClient = UserSecretsClient
    module.__spec__ = types.SimpleNamespace(name="kaggle_secrets")
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="needs an access token"):
        session.push("me/orders")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    session.push("me/orders")
    assert hub.tokens == {TOKEN}


def test_another_adapter_in_the_repository_is_not_replaced_unasked(hub: Hub, session: Session, trained: Any) -> None:
    session.push("me/orders")
    session.push("me/orders")  # the same one again
    session.add(trained, {"r": 8, "target_modules": ["q_proj"]}, name="wide")
    files, commits = dict(hub.files["me/orders"]), list(hub.commits)
    with pytest.raises(AdapterExistsError, match=r"me/orders holds an adapter with another r: .* \(replace=…\)"):
        session.push("me/orders", adapter="wide")
    assert hub.files["me/orders"] == files and hub.commits == commits
    session.push("me/orders", adapter="wide", replace=True)
    assert b'"r": 8' in hub.files["me/orders"]["adapter_config.json"]


@pytest.mark.parametrize(
    ("present", "told"),
    [
        ({"peft_type": "IA3"}, "an adapter with another peft_type"),
        ({"target_modules": ["v_proj"]}, "an adapter with another target_modules"),
        ({"base_model_name_or_path": "them/other"}, "an adapter of another base model, them/other"),
        ({"base_model_name_or_path": "./base"}, ""),
        ({"target_modules": ["k_proj", "q_proj"]}, ""),
        ("no JSON", "an adapter that cannot be read"),
        ([1], "an adapter that cannot be read"),
        ("", ""),
    ],
)
def test_what_a_config_in_a_repository_describes(present: Any, told: str) -> None:
    own = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "k_proj"], "base_model_name_or_path": "me/base"}
    text = present if isinstance(present, str) else json.dumps(own | present if isinstance(present, dict) else present)
    assert other_config(text, json.dumps(own)) == told
