"""Adapters on the hub: a stand-in on the loopback, and the cache on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import nn

from nbpeft import get_peft_model
from nbpeft.checkpoint import push, read_checkpoint, read_config, write_checkpoint
from nbpeft.checkpoint.source import checked_options, present_file
from nbpeft.checkpoint.staging import STAGING_PREFIX
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.errors import CheckpointError, CheckpointNotFoundError
from tests.checkpoint.loopback import COMMIT, Hub, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving() as running:
        yield running


@pytest.fixture
def options(hub: Hub, tmp_path: Path) -> dict[str, Any]:
    return {"endpoint": hub.endpoint, "cache_dir": str(tmp_path / "cache")}


def saved(folder: Path, rank: int = 2, value: float = 1.0) -> dict[str, bytes]:
    tensors = {"base_model.model.q.lora_A.weight": torch.full((rank, 4), value)}
    write_checkpoint(folder, LoraConfig(r=rank, target_modules=["q"]), tensors)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rank_of(config: object) -> int:
    assert isinstance(config, LoraConfig)
    return config.r


def test_reads_from_the_hub_and_then_from_the_cache(hub: Hub, options: dict[str, Any], tmp_path: Path) -> None:
    hub.files["me/sql"] = saved(tmp_path / "adapter", rank=3)
    checkpoint = read_checkpoint("me/sql", token="hf_secret", **options)
    assert rank_of(checkpoint.config) == 3
    assert checkpoint.folder.name == COMMIT
    assert hub.tokens == {"hf_secret"}
    assert any(f"/resolve/{COMMIT}/adapter_model.safetensors" in asked for asked in hub.asked), "the config's commit"
    assert not any("README" in asked for asked in hub.asked)

    hub.asked.clear()
    again = read_checkpoint("me/sql", local_files_only=True, **options)
    assert torch.equal(*(c.tensors["base_model.model.q.lora_A.weight"] for c in (checkpoint, again)))
    assert rank_of(read_config("me/sql", local_files_only=True, **options)) == 3
    assert hub.asked == []


@pytest.mark.parametrize("parts", [True, False])
def test_of_a_large_file_the_header_comes_first(
    parts: bool, hub: Hub, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a hub that sends it whole, whatever is asked for."""
    monkeypatch.setattr("nbpeft.checkpoint.source.LARGE", 1000)
    monkeypatch.setattr("nbpeft.checkpoint.source.LONGEST_HEADER", 2000)
    hub.gives_parts = parts
    tensors = {"base_model.model.q.lora_A.weight": torch.full((2, 4), 3.0), "extra": torch.ones(2**20)}
    write_checkpoint(tmp_path / "adapter", LoraConfig(r=2, target_modules=["q"]), tensors)
    hub.files["me/large"] = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    checkpoint = read_checkpoint("me/large", **options)
    assert {key: tuple(tensor.shape) for key, tensor in checkpoint.unread.header.items()} == {
        key: tuple(tensor.shape) for key, tensor in tensors.items()
    }
    cached = checkpoint.folder / "adapter_model.safetensors"
    assert not cached.exists() and (not parts or hub.sent["adapter_model.safetensors"] == 2008)
    read = checkpoint.unread.read(["extra"])
    assert read["base_model.model.q.lora_A.weight"].sum() == 24 and read["extra"].is_meta and cached.exists()
    hub.asked.clear()
    assert torch.equal(read_checkpoint("me/large", **options).tensors["extra"], tensors["extra"])
    assert not any("safetensors" in asked for asked in hub.asked)


def test_a_large_file_that_changes_on_its_way_is_refused(
    hub: Hub, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbpeft.checkpoint.source.LARGE", 10)
    hub.files["me/sql"] = saved(tmp_path / "adapter", rank=3)
    checkpoint = read_checkpoint("me/sql", **options)
    hub.files["me/sql"] |= saved(tmp_path / "other", rank=5)
    with pytest.raises(CheckpointError, match="is not the file whose header was read"):
        checkpoint.unread.read()


def test_subfolder_revision_and_legacy_weights(hub: Hub, options: dict[str, Any], tmp_path: Path) -> None:
    files = saved(tmp_path / "adapter", rank=5)
    torch.save({"base_model.model.q.lora_A.weight": torch.ones(5, 4)}, tmp_path / "old.bin")
    hub.files["me/many"] = {
        "sql/adapter_config.json": files["adapter_config.json"],
        "sql/adapter_model.bin": (tmp_path / "old.bin").read_bytes(),
    }
    checkpoint = read_checkpoint("me/many", subfolder="sql", revision=COMMIT, **options)
    assert rank_of(checkpoint.config) == 5
    assert checkpoint.tensors["base_model.model.q.lora_A.weight"].sum() == 20


@pytest.mark.parametrize(
    ("repo", "extra", "words"),
    [
        ("me/nothing", {}, "neither a folder here nor a repository"),
        ("me/sql", {"revision": "v9"}, "has no revision 'v9'"),
        ("me/sql", {"subfolder": "x"}, r"has no x/adapter_config\.json"),
        ("me/only-config", {}, r"has no adapter_model\.safetensors"),
        ("me/not a name!", {}, "cannot be the name of a repository"),
        ("sql", {}, "there is no folder sql, and an id on the hub reads user/name"),
        ("me/other", {"local_files_only": True}, "not cached"),
    ],
)
def test_what_is_not_there(
    repo: str, extra: dict[str, Any], words: str, hub: Hub, options: dict[str, Any], tmp_path: Path
) -> None:
    hub.files["me/sql"] = files = saved(tmp_path / "adapter")
    hub.files["me/only-config"] = {"adapter_config.json": files["adapter_config.json"]}
    with pytest.raises(CheckpointNotFoundError, match=words) as caught:
        read_checkpoint(repo, **extra, **options)
    assert "\n" not in str(caught.value)


def test_gated_unreachable_and_offline(
    hub: Hub, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.gated.add("me/gated")
    with pytest.raises(CheckpointError, match="gated"):
        read_config("me/gated", **options)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointNotFoundError, match="is offline or cannot be reached"):
        read_config("me/sql", **options)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters" / "course").mkdir(parents=True)
    with pytest.raises(CheckpointNotFoundError, match=r"reached\. Did you mean 'adapters/course'\?$"):
        read_config("adapters/corse", **options)
    with pytest.raises(CheckpointNotFoundError, match=r"reached\. Did you mean 'adapters/course'\?$"):
        read_config("adapter/course", **options)


def test_a_hub_that_is_not_there(hub: Hub, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # The client waits between its attempts.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    options["endpoint"] = "http://127.0.0.1:9"
    with pytest.raises(CheckpointNotFoundError, match="is offline or cannot be reached"):
        read_config("me/sql", **options)


def test_a_path_never_asks_the_hub(hub: Hub, options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "absent", "./absent", "a/b/c", "~/absent", "absent"):
        with pytest.raises(CheckpointNotFoundError):
            read_checkpoint(source, **options)
    assert hub.asked == []


def test_saving_never_asks_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    config = LoraConfig(target_modules=["embed_tokens"], base_model_name_or_path="me/base")
    write_checkpoint(tmp_path, config, {"a": torch.zeros(2)})
    assert hub.asked == []


def test_push_and_read_back(hub: Hub, options: dict[str, Any], tmp_path: Path) -> None:
    files = saved(tmp_path / "adapter", rank=7)
    litter = tmp_path / "adapter" / f"{STAGING_PREFIX}dead"
    litter.mkdir()
    (litter / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "optimizer.pt").write_text("x")
    url = push(tmp_path / "adapter", "me/new", token="hf_t", endpoint=hub.endpoint, ignore_patterns="*.pt")
    assert url == f"{hub.endpoint}/me/new/commit/{COMMIT}"
    assert {name: hub.files["me/new"][name] for name in files} == files
    assert hub.files["me/new"].keys() == files.keys()
    assert hub.tokens == {"hf_t"}
    assert rank_of(read_checkpoint("me/new", **options).config) == 7


def test_a_config_is_pushed_by_itself(hub: Hub, options: dict[str, Any]) -> None:
    LoraConfig(r=5, target_modules=["q"]).push_to_hub("me/config", token="hf_t", endpoint=hub.endpoint)
    assert list(hub.files["me/config"]) == ["adapter_config.json"]
    assert LoraConfig.from_pretrained("me/config", **options).to_dict()["r"] == 5


@pytest.mark.parametrize("of_model", [True, False])
def test_it_is_pushed_with_the_keywords_of_transformers(hub: Hub, of_model: bool) -> None:
    config = LoraConfig(r=2, target_modules=["q"])
    pushed: Any = get_peft_model(nn.ModuleDict({"q": nn.Linear(2, 2)}), config) if of_model else config
    kept = {"max_shard_size": "5GB", "private": True, "token": "hf_t"}
    pushed.push_to_hub("me/new", commit_message=None, revision="v2", tags=["sql"], endpoint=hub.endpoint, **kept)
    assert b"- sql\n" in hub.files["me/new"]["README.md"]
    pushed.push_to_hub("me/new", commit_message="Better", commit_description="much", endpoint=hub.endpoint)
    assert hub.private == {"me/new"} and hub.tokens == {"hf_t"}
    assert [commit[1:] for commit in hub.commits] == [("v2", "Upload adapter"), ("main", "Better")]


def test_push_that_cannot_be(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no folder"):
        push(tmp_path / "absent", "me/new", endpoint=hub.endpoint)
    saved(tmp_path / "adapter")
    with pytest.raises(CheckpointNotFoundError, match="cannot be the name"):
        push(tmp_path / "adapter", "me/not a name!", endpoint=hub.endpoint)
    hub.broken = True
    with pytest.raises(CheckpointError, match="the hub did not serve 'me/new'") as caught:
        push(tmp_path / "adapter", "me/new", endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)
    hub.broken = False
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for act in (
        lambda: push(tmp_path / "adapter", "me/new", endpoint=hub.endpoint),
        lambda: present_file("me/new", "README.md", token=None, endpoint=hub.endpoint),
    ):
        with pytest.raises(CheckpointError, match="the hub is switched off by HF_HUB_OFFLINE=1"):
            act()


@pytest.mark.slow
def test_the_environments_endpoint_and_cache(hub: Hub, tmp_path: Path) -> None:
    """In an interpreter of its own, which imports the hub's client only once it is needed."""
    hub.files["me/sql"] = saved(tmp_path / "adapter", rank=6)
    code = (
        "import sys; from nbpeft.checkpoint import read_checkpoint; "
        f"read_checkpoint({str(tmp_path / 'adapter')!r}, local_files_only=True); "
        "print('huggingface_hub' in sys.modules, read_checkpoint('me/sql').config.r)"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False 6", done.stderr
    assert list((tmp_path / "home" / "hub").glob("models--me--sql/snapshots/*/adapter_model.safetensors"))


def test_the_token_of_former_versions_is_a_token() -> None:
    assert checked_options({"use_auth_token": "secret", "revision": None}) == {"token": "secret"}


def cached(cache: Path, files: dict[str, bytes]) -> tuple[Path, Path, Path]:
    """A repository in the hub's cache as huggingface_hub lays it out: its ref, its config and its weights."""
    place = cache / "models--me--sql"
    snapshot, blobs, ref = place / "snapshots" / COMMIT, place / "blobs", place / "refs" / "main"
    for folder in (snapshot, blobs, ref.parent):
        folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (blobs / name).write_bytes(files[name])
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    ref.write_text(COMMIT)
    return ref, snapshot / "adapter_config.json", snapshot / "adapter_model.safetensors"


def shortened(path: Path, size: int) -> None:
    target = path.resolve()
    target.write_bytes(target.read_bytes()[:size])


DAMAGE: dict[str, tuple[Callable[[Path, Path, Path], object], str]] = {
    "whole": (lambda ref, config, weights: None, ""),
    "download beside": (lambda ref, config, weights: (ref.parents[1] / "blobs/b.incomplete").write_bytes(b"x"), ""),
    "no ref": (lambda ref, config, weights: ref.unlink(), "adapter_config.json is not cached"),
    "empty ref": (lambda ref, config, weights: ref.write_text(""), "adapter_config.json is not cached"),
    "ref of another": (lambda ref, config, weights: ref.write_text("b" * 40), "adapter_config.json is not cached"),
    "ref that is no text": (lambda ref, config, weights: ref.write_bytes(b"\xff"), "adapter_config.json"),
    "config gone": (lambda ref, config, weights: config.resolve().unlink(), "adapter_config.json is not cached"),
    "config cut": (lambda ref, config, weights: shortened(config, 40), "is not valid JSON"),
    "weights gone": (lambda ref, config, weights: weights.resolve().unlink(), f"at revision '{COMMIT}' is not cached"),
    "no link to weights": (lambda ref, config, weights: weights.unlink(), f"at revision '{COMMIT}' is not cached"),
    "weights empty": (lambda ref, config, weights: shortened(weights, 0), "is truncated"),
    "header cut": (lambda ref, config, weights: shortened(weights, 20), "its header is longer than the file"),
    "weights cut": (lambda ref, config, weights: shortened(weights, -4), "its tensors end at byte"),
    "link to itself": (
        lambda ref, config, weights: (weights.unlink(), weights.symlink_to(weights.name)),
        f"at revision '{COMMIT}' is not cached",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_told_and_not_changed(damage: str, tmp_path: Path) -> None:
    cache, (change, message) = tmp_path / "cache", DAMAGE[damage]
    change(*cached(cache, saved(tmp_path / "adapter", rank=3)))
    before = {path: path.lstat().st_mtime_ns for path in cache.rglob("*") if ".locks" not in path.parts}
    reading = lambda: read_checkpoint("me/sql", local_files_only=True, cache_dir=str(cache))  # noqa: E731
    if message:
        with pytest.raises(CheckpointError, match=message):
            reading()
    else:
        assert rank_of(reading().config) == 3
    assert {path: path.lstat().st_mtime_ns for path in cache.rglob("*") if ".locks" not in path.parts} == before
