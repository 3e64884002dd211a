"""The README: made when there is none, brought up to date when there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard

from nbpeft.checkpoint import CardFacts, card_text, write_checkpoint
from nbpeft.engine.methods.lora.config import LoraConfig

CONFIG = LoraConfig(r=4, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="org/tiny")

MINE = """---
# kept
license: mit
base_model: someone/else
tags:
- sql
- "base_model:adapter:someone/else"
datasets: [a, b]
---

# My adapter

Trained with care.
---
not a fence
"""


def front(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    entries = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(entries, dict)
    return entries


def test_a_new_card() -> None:
    text = card_text(CONFIG)
    assert front(text) == {
        "base_model": "org/tiny",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/tiny", "lora", "transformers"],
    }
    assert "A LoRA adapter for `org/tiny`." in text
    assert "| `r` | `4` |" in text
    assert ModelCard(text).data.to_dict()["library_name"] == "peft"


def test_a_folder_of_this_machine_is_not_told(tmp_path: Path) -> None:
    for name in (str(tmp_path), "./models/tiny", "a/b/c", "~/x", "C:\\models", None):
        text = card_text(CONFIG.copy(base_model_name_or_path=name))
        assert "base_model" not in front(text)
        assert str(name) not in text


def test_a_card_that_is_there_keeps_what_is_the_authors() -> None:
    text = card_text(CONFIG, MINE)
    entries = front(text)
    assert entries["license"] == "mit"
    assert entries["datasets"] == ["a", "b"]
    assert entries["base_model"] == "org/tiny"
    assert entries["library_name"] == "peft"
    assert entries["tags"] == ["base_model:adapter:org/tiny", "lora", "sql", "transformers"]
    assert "# kept" in text
    assert text.endswith(MINE.split("---\n", 2)[2])
    assert card_text(CONFIG, text) == text, "a second time changes nothing"


def test_other_notations_of_tags() -> None:
    assert front(card_text(CONFIG, "---\ntags: [x, 'y z']\n---\n"))["tags"][-2:] == ["x", "y z"]
    assert front(card_text(CONFIG, "---\ntags:\n  - deep\n---\n"))["tags"][1] == "deep"
    assert front(card_text(CONFIG, "---\ntags: one\n---\n"))["tags"] == "one", "not understood, not touched"
    commented = "---\ntags:\n- a # why\n# more\n- b\n"
    assert card_text(CONFIG, f"{commented}---\n").startswith(commented), "a comment is not lost"
    for broken in ("tags: [", "tags:x: y", "tags:x", f"tags: {'[' * 2000}"):
        assert card_text(CONFIG, f"---\n{broken}\n---\n").splitlines()[1] == broken


def test_a_card_without_front_matter_and_with_windows_lines() -> None:
    text = card_text(CONFIG, "# Mine\r\n\r\nText.\r\n")
    assert text.replace("\r\n", "") == text.replace("\r\n", "\n").replace("\n", "")
    assert text.endswith("# Mine\r\n\r\nText.\r\n")
    assert front(text.replace("\r\n", "\n"))["library_name"] == "peft"


def test_tags_that_yaml_would_misread() -> None:
    text = card_text(CONFIG, "---\ntags: ['no', '1.5', 'a: b', 'c #d']\n---\n")
    assert {"no", "1.5", "a: b", "c #d"} <= set(front(text)["tags"])


def test_the_settings_table_follows_the_config(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2)}
    write_checkpoint(tmp_path, CONFIG, tensors)
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text().replace("# Adapter", "# SQL adapter"))
    write_checkpoint(tmp_path, CONFIG.copy(r=32), tensors)
    text = readme.read_text()
    assert "| `r` | `32` |" in text
    assert "| `r` | `4` |" not in text
    assert "# SQL adapter" in text


def test_a_given_card_and_one_that_is_no_text(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2)}
    write_checkpoint(tmp_path, CONFIG, tensors, card="# Exactly this\n")
    assert (tmp_path / "README.md").read_text() == "# Exactly this\n"
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    write_checkpoint(tmp_path, CONFIG, tensors)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe"


def test_a_card_without_text_gets_ours() -> None:
    for stump in ("", "\n \n", "---\nlibrary_name: peft\nlicense: mit\n---\n"):
        text = card_text(CONFIG, stump)
        assert "A LoRA adapter for `org/tiny`." in text and "| `r` | `4` |" in text
        assert front(text).get("license") == ("mit" if stump.startswith("---") else None)


def test_no_value_leaves_its_place_in_the_text() -> None:
    for name in ("org/`x`", "org/tiny\n# Mine", "org/a b", "https://me:secret@hub/x", "x" * 200):
        text = card_text(CONFIG.copy(base_model_name_or_path=name))
        assert name not in text and "base_model" not in front(text)
    hostile = CONFIG.copy(target_modules=["a`|b", "``", "<!-- end of settings -->", "c\n# d"])
    text = card_text(hostile)
    assert text.count("<!-- end of settings -->") == 1 and "\n# d" not in text
    assert card_text(CONFIG, text) == card_text(CONFIG)
    row = next(line for line in text.splitlines() if "target_modules" in line)
    assert row.replace("\\|", "").count("|") == 3 and "``` [" in row


FACTS = CardFacts(
    "me/sql",
    "sql",
    training=(("data", "rows | of `mine`"), ("steps", "60")),
    arguments={"learning_rate": 2e-3, "hub_token": "hf_" + "x" * 30, "run_name": "https://me:secret@hub/x"},
    curve="<svg/>",
)


def test_what_else_is_known_stands_before_the_use(tmp_path: Path) -> None:
    text = card_text(CONFIG, facts=FACTS)
    assert "# sql" in text and 'from_pretrained(base_model, "me/sql")' in text
    assert 'base_model = AutoModelForCausalLM.from_pretrained("org/tiny")' in text
    assert "| data | rows \\| of \\`mine\\` |" in text
    assert "| `learning_rate` | `0.002` |" in text and "![Training loss by step](loss_curve.svg)" in text
    assert "hf_" not in text and "secret" not in text
    assert text.index("## Settings") < text.index("## Training") < text.index("## Use")
    assert card_text(CONFIG, text, facts=FACTS) == text, "a second time changes nothing"
    assert card_text(CONFIG, text) == text, "without them what is there stays"


def test_an_authors_card_gets_the_training_once() -> None:
    text = card_text(CONFIG, MINE, facts=FACTS)
    assert text.count("## Training") == 1 and "Trained with care." in text
    again = card_text(CONFIG, text, facts=CardFacts("me/sql", training=(("steps", "90"),)))
    assert again.count("## Training") == 1 and "| steps | 90 |" in again and "| steps | 60 |" not in again
    assert "## Training" not in card_text(CONFIG, MINE, facts=CardFacts("me/sql"))
