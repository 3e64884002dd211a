"""``%lora plan`` in a real kernel: the peak comes at once, suggestions take its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

manager = pytest.importorskip("jupyter_client.manager")


@pytest.fixture
def client(tmp_path: Path) -> Any:
    """A client of a kernel of its own."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "base")
    kernel, client = manager.start_new_kernel(cwd=str(tmp_path), env={**os.environ, "HF_HUB_OFFLINE": "1"})
    yield client
    client.stop_channels()
    kernel.shutdown_kernel(now=True)


def outputs(client: Any, code: str) -> list[tuple[str, Any]]:
    """What a cell sends, in order."""
    found: list[tuple[str, Any]] = []
    client.execute_interactive(
        code, timeout=180, output_hook=lambda message: found.append((message["msg_type"], message["content"]))
    )
    return found


@pytest.mark.slow
def test_the_peak_first_then_the_suggestions_in_its_place_and_tooltips(client: Any) -> None:
    outputs(client, "%load_ext nbpeft")
    sent = outputs(client, "plan = %lora plan ./base --max-length 256 --device 3MB\nplan")
    cards = [(kind, content) for kind, content in sent if kind in ("display_data", "update_display_data")]
    assert [kind for kind, _ in cards] == ["display_data", "update_display_data"], sent
    first, second = (content["data"]["text/html"] for _, content in cards)
    assert "peak " in first and "Saves" not in first and "Saves" in second
    assert not [kind for kind, _ in sent if kind == "execute_result"]
    assert not [
        kind for kind, _ in outputs(client, "%lora plan ./base --max-length 256 --device 3MB;") if "display" in kind
    ]
    reply = client.inspect("%%lora model\nlora_alpha", 20, reply=True, timeout=60)["content"]
    assert reply["found"] and reply["data"]["text/plain"].startswith("lora_alpha: float = 8")
    outputs(client, "%unload_ext nbpeft")
    assert not client.inspect("%%lora model\nlora_alpha", 20, reply=True, timeout=60)["content"]["found"]
