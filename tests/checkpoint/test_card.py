"""The README: made when there is none, brought up to date when there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard

from nbpeft.checkpoint import card_text, write_checkpoint
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
