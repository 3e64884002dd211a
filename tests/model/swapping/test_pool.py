"""A pool of more adapters than fit: outputs as alone, bounds to the byte, nothing taken from a running call."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import nbpeft
from nbpeft import checkpoint
from nbpeft.engine.hotswap import swap
from nbpeft.engine.runtime.manager import AdapterManager
from nbpeft.errors import (
    AdapterError,
    AdapterExistsError,
    CheckpointError,
    CheckpointNotFoundError,
    MergeError,
    StaleModelError,
    UnknownAdapterError,
)
from nbpeft.model import PeftModel, get_peft_model, get_peft_model_state_dict
from nbpeft.model.swapping.pool import AdapterPool
from tests.model.pool_support import BYTES, MB, device_bytes, make_alone, make_folders, near, pool_of, save
from tests.tiny_models import adapted, classifier, gpt2, llama, logits, randomize, same_state, state, tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, Tensor]:
    return make_alone(folders)


def test_every_adapter_answers_as_alone_within_the_bound(folders: dict[str, Path], alone: dict[str, Tensor]) -> None:
    pool = pool_of(folders)
    near(logits(pool.model), alone["__base__"])
    for name in "abcdefafbecd":
        pool.set_adapter(name)
        near(logits(pool.model), alone[name])
        assert pool.manager.active == (name,)
        assert device_bytes(pool) == pool.statistics.device_bytes <= 2 * BYTES
    statistics = pool.statistics
    assert (statistics.hits, statistics.misses, statistics.evictions) == (1, 11, 9)
    assert (statistics.reads, statistics.host_hits, statistics.read_bytes) == (6, 5, 6 * BYTES)
    assert statistics.swaps == statistics.evictions, "adapters of equal structure take over each other's tensors"
    assert pool.resident == ("c", "d") and set(pool.on_host) == set("abef")
    assert statistics.host_bytes == 4 * BYTES
    assert "2 of 6 adapters resident (0.0 of 0.0 MB)" in str(statistics) and str(statistics) in repr(pool)


def test_the_handle_alone_will_do(folders: dict[str, Path], alone: dict[str, Tensor]) -> None:
    model = adapted(name="own")
    own = logits(model)
    pool = AdapterPool(model, BYTES / MB, adapters=folders)
    assert pool.model is model
    model.set_adapter("c", inference_mode=True)
    near(logits(model), alone["c"])
    with model.use("d"):
        near(logits(model), alone["d"])
    near(logits(model), alone["c"])
    model.set_adapter("own")
    near(logits(model), own)
    assert "own" in model.peft_config, "what was there before is never pushed out"


def test_mixed_batches(folders: dict[str, Path], alone: dict[str, Tensor]) -> None:
    pool = pool_of(folders, room=3)
    ids = tokens(rows=2)
    for names in (["a", "b"], ["c", "__base__"], ["d", "e"], ["a", "a"]):
        found = pool.model(input_ids=ids, adapter_names=names).logits
        for row, name in enumerate(names):
            near(found[row], alone[name][row])
        assert pool.manager.active == (), "naming rows selects nothing"
        near(logits(pool.model), alone["__base__"])
    text = pool.model.generate(input_ids=ids, adapter_names=["f", "b"], max_new_tokens=4, do_sample=False)
    for row, name in enumerate("fb"):
        single = PeftModel.from_pretrained(llama(), folders[name])
        assert torch.equal(text[row], single.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[row])


def test_inference_mode_leaves_tensors_that_can_be_overwritten(
    folders: dict[str, Path], alone: dict[str, Tensor]
) -> None:
    pool = pool_of(folders, room=1)
    with torch.inference_mode():
        for name in "ab":
            near(pool.model(input_ids=tokens(), adapter_names=[name] * 2).logits, alone[name])
    for name in "ca":
        pool.set_adapter(name)
        near(logits(pool.model), alone[name])


def test_what_cannot_fit_together_changes_nothing(folders: dict[str, Path]) -> None:
    pool = pool_of(folders)
    pool.load(["a", "b"])
    before, resident, revision = state(pool.manager.model), pool.resident, pool.manager.revision
    message = r"'c', 'd', 'e' take 0\.011 MB and do not fit into the pool's 0\.007 MB"
    with pytest.raises(AdapterError, match=message):
        pool.load(["c", "d", "e"])
    with pytest.raises(AdapterError, match=message):
        pool.model(input_ids=tokens(rows=3), adapter_names=["c", "d", "e"])
    pool.pin("a")
    with pytest.raises(AdapterError, match=r"'c', 'd' take .* in addition to 'a' \(pinned\)"):
        pool.set_adapter(["c", "d"])
    assert same_state(before, state(pool.manager.model))
    assert (pool.resident, pool.manager.revision) == (("b", "a"), revision) and set(resident) == {"a", "b"}


def test_pinned_and_active_adapters_stay(folders: dict[str, Path]) -> None:
    pool = pool_of({name: folders[name] for name in "abcd"}, room=3)
    pool.register("e", folders["e"], pinned=True)
    pool.set_adapter("a")
    for name in "bcdbcd":
        pool.load(name)
        assert {"e", "a"} <= set(pool.resident)
    assert pool.pinned == ("e",)
    pool.unpin("e")
    pool.load(["b", "c"])
    assert set(pool.resident) == {"a", "b", "c"}


@pytest.mark.parametrize("fused", [False, True])  # the fused one leaves no trace in a tensor's version
def test_an_adapter_that_was_trained_stays(folders: dict[str, Path], fused: bool) -> None:
    pool = pool_of(folders, room=1)
    pool.model.set_adapter("a")
    pool.model(input_ids=tokens(), labels=tokens()).loss.backward()
    pool.model.set_adapter("b")
    assert all(parameter.grad is None for parameter in pool.manager.parameters("b"))
    assert pool.manager.frozen == set()
    pool.model(input_ids=tokens(), labels=tokens()).loss.backward()
    torch.optim.AdamW(pool.manager.parameters("b"), fused=fused).step()
    with pytest.raises(AdapterError, match=r"in addition to 'b' \(changed since it was loaded\)"):
        pool.set_adapter("c")


def test_scales_and_freezing_survive_being_pushed_out(folders: dict[str, Path], alone: dict[str, Tensor]) -> None:
    pool = pool_of(folders, room=1)
    pool.set_adapter("a")
    pool.manager.set_scale("a", 0.0)
    pool.set_adapter("b")
    near(logits(pool.model), alone["b"])
    pool.set_adapter("a")
    near(logits(pool.model), alone["__base__"])
    assert pool.manager.frozen == {"a"} and not any(p.requires_grad for p in pool.manager.parameters("a"))


STRUCTURES: dict[str, dict[str, Any]] = {
    "rank": {"r": 8, "use_rslora": True},
    "targets": {"target_modules": ["down_proj", "embed_tokens"]},
    "dora": {"use_dora": True, "lora_alpha": 3},
    "bias": {"lora_bias": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    "plain": {},
}


def test_different_structures_share_a_pool(tmp_path: Path) -> None:
    for seed, (name, changes) in enumerate(STRUCTURES.items()):
        save(tmp_path / name, seed, **changes)
    pool = AdapterPool(llama(), 0.02, adapters={name: tmp_path / name for name in STRUCTURES})
    for name in [*STRUCTURES, *reversed(STRUCTURES)]:
        pool.set_adapter(name)
        near(logits(pool.model), logits(PeftModel.from_pretrained(llama(), tmp_path / name)))
        assert device_bytes(pool) == pool.statistics.device_bytes <= pool.statistics.device_limit
        assert set(pool.manager.configs) == set(pool.resident)


def test_trained_heads_and_half_precision(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        save(tmp_path / name, seed, classifier, task_type="SEQ_CLS")
    pool = AdapterPool(classifier().bfloat16(), 0.005, adapters={name: tmp_path / name for name in "abc"})
    small = AdapterPool(
        classifier().bfloat16(),
        0.005,
        adapters={name: tmp_path / name for name in "abc"},
        autocast_adapter_dtype=False,
    )
    head = 3 * 32 * 2
    for name in "abca":
        for one, size in ((pool, BYTES + head), (small, BYTES // 2 + head)):
            one.set_adapter(name)
            half = one is small
            expected = PeftModel.from_pretrained(
                classifier().bfloat16(), tmp_path / name, autocast_adapter_dtype=not half
            )
            assert torch.equal(logits(one.model), logits(expected))
            assert one.statistics.device_bytes == device_bytes(one) == size * len(one.resident)


def test_host_memory_has_its_own_bound(folders: dict[str, Path], alone: dict[str, Tensor]) -> None:
    pool = pool_of(folders, room=1, host=2)
    for name in "abcdef":
        pool.load(name)
        assert pool.statistics.host_bytes <= 2 * BYTES
    assert pool.on_host == ("d", "e")
    none = pool_of(folders, room=1, host=0)
    for name in "abab":
        none.set_adapter(name)
        near(logits(none.model), alone[name])
    assert (none.on_host, none.statistics.reads) == ((), 4)


def test_a_miss_that_fails_half_way_puts_everything_back(
    folders: dict[str, Path], alone: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save(tmp_path, 9, target_modules=["o_proj"])
    pool = pool_of(folders, room=2.4, host=0)
    pool.register("other", other)
    pool.set_adapter(["a", "b"])
    both = logits(pool.model)
    add = AdapterManager.add

    def failing(manager: AdapterManager, name: str, *args: Any, **options: Any) -> Any:
        if name == "other":
            raise MemoryError("no more")
        return add(manager, name, *args, **options)

    monkeypatch.setattr(AdapterManager, "add", failing)
    with pytest.raises(MemoryError):
        pool.set_adapter(["c", "other"])
    assert set(pool.resident) == set(pool.manager.names) == {"a", "b"} and pool.manager.active == ("a", "b")
    near(logits(pool.model), both)
    monkeypatch.undo()
    pool.set_adapter(["c", "other"])
    assert pool.resident == ("c", "other")
    pool.set_adapter("a")
    near(logits(pool.model), alone["a"])


def test_files_that_do_not_fit_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    pool = pool_of(folders)
    pool.load("a")
    before = state(pool.manager.model)
    pool.register("wide", save(tmp_path / "wide", 1, lambda: llama(hidden_size=64)))
    pool.register("gpt", save(tmp_path / "gpt", 1, gpt2, target_modules=["c_attn"]))
    pool.register("biases", save(tmp_path / "biases", 1, bias="all"))
    broken = save(tmp_path / "broken", 1)
    saved = checkpoint.read_checkpoint(broken)
    first = next(iter(saved.tensors))
    tensors = {key: tensor for key, tensor in saved.tensors.items() if key != first}
    checkpoint.write_checkpoint(broken, saved.config, tensors)
    pool.register("broken", broken)
    with pytest.raises(CheckpointError, match="64"):
        pool.load(["b", "wide"])
    with pytest.raises(ValueError, match="c_attn"):
        pool.load("gpt")
    with pytest.raises(AdapterError, match=r"'biases' trained the base model's biases \(bias='all'\)"):
        pool.load("biases")
    with pytest.raises(CheckpointError, match=r"'broken' in .* lacks .*_proj\.lora_"):
        pool.load("broken")
    assert same_state(before, state(pool.manager.model)) and pool.resident == ("a",)


def test_an_adapter_of_another_base_is_told_of(folders: dict[str, Path], tmp_path: Path) -> None:
    stranger = save(tmp_path, 1, lambda: llama(seed=7))
    pool = pool_of(folders)
    pool.register("stranger", stranger)
    with pytest.warns(UserWarning, match="stranger: the adapter was trained on other weights"):
        pool.load("stranger")


def test_names(folders: dict[str, Path]) -> None:
    pool = AdapterPool(adapted(name="own"), BYTES / MB, adapters=folders)
    assert pool.names == tuple("abcdef") and len(pool) == 6 and "a" in pool and "own" not in pool
    for name, where in (("a", "pool"), ("own", "model")):
        with pytest.raises(AdapterExistsError, match=f"the {where} has an adapter '{name}' already"):
            pool.register(name, folders["a"])
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        pool.register("__base__", folders["a"])
    with pytest.raises(AdapterError, match=r"unknown option 'revison'\. Did you mean 'revision'"):
        pool.register("new", folders["a"], revison="main")
    for command in (pool.load, pool.pin, pool.unpin, pool.prefetch, pool.unregister):
        with pytest.raises(UnknownAdapterError, match="the pool has no adapter 'x'"):
            command("x")
    with pytest.raises(UnknownAdapterError, match="'x' not found"):
        pool.set_adapter("x")
    with pytest.raises(CheckpointNotFoundError):
        pool.register("pinned", "./nowhere", pinned=True)
    assert "pinned" not in pool
    pool.load("a")
    pool.unregister("a")
    assert pool.manager.names == ("own",) and "a" not in pool
    with pytest.raises(AdapterError, match="limit_mb > 0"):
        AdapterPool(llama(), 0)


def test_what_others_do_to_the_model_is_noticed(folders: dict[str, Path], alone: dict[str, Tensor]) -> None:
    pool = pool_of(folders, room=3)
    pool.load(["a", "b", "c"])
    pool.manager.remove("a")
    pool.manager.rename("b", "mine")
    weights = pool.manager.weights("mine")
    swap(pool.manager, "c", pool.manager.configs["c"], weights)
    assert pool.resident == () and pool.statistics.device_bytes == 0
    pool.set_adapter(["a", "b"])
    near(logits(pool.model.base_model), logits(pool.model))
    with pytest.raises(AdapterExistsError, match="an adapter 'c' that is not from the pool"):
        pool.load("c")
    pool.set_adapter("b")
    near(logits(pool.model), alone["b"])


@pytest.mark.parametrize("limits", [(0, 1), (1, -1), ("1", 1), (math.nan, 1), (1, math.inf), (None, 1)])
def test_impossible_limits_are_refused(limits: Any) -> None:
    with pytest.raises(AdapterError, match="a pool needs limit_mb > 0 and host_limit_mb >= 0"):
        AdapterPool(llama(), limits[0], host_limit_mb=limits[1])


def test_a_pool_that_cannot_be_made_leaves_room_for_another(folders: dict[str, Path]) -> None:
    model = adapted(name="own")
    for adapters in ({"a": folders["a"], "no.name": folders["b"]}, {"a": folders["a"], "b": None}):
        with pytest.raises(AdapterError, match=r"cannot name an adapter|'b' needs a folder or a hub id, not None"):
            AdapterPool(model, 1, adapters=adapters)  # type: ignore[arg-type]
    with AdapterPool(model, 1, adapters={"a": folders["a"]}) as pool:
        pool.set_adapter("a")


def test_what_is_merged_gives_way_to_a_switch_alone(folders: dict[str, Path], alone: dict[str, Tensor]) -> None:
    pool = pool_of(folders)
    for name in "ab":
        pool.set_adapter(name)
    pool.model.merge_adapter()
    for refused in (lambda: pool.load("c"), lambda: pool.model(input_ids=tokens(), adapter_names=["b", "c"])):
        with pytest.raises(MergeError, match="'b' merged: unmerge before loading 'c' onto the model"):
            refused()
        assert pool.resident == pool.manager.names == ("a", "b") and pool.manager.merged == ("b",)
    with pytest.warns(UserWarning, match="unmerged before another is activated"):
        pool.set_adapter("c")
    near(logits(pool.model), alone["c"])
    assert pool.resident == ("b", "c") and not pool.manager.merged


def test_the_ends_of_a_pool(folders: dict[str, Path], alone: dict[str, Tensor]) -> None:
    model = adapted(name="own")
    with AdapterPool(model, BYTES / MB, adapters=folders) as pool:
        pool.set_adapter("a")
        pool.prefetch("b", wait=True)
        with pytest.raises(AdapterError, match="has an adapter pool already"):
            AdapterPool(model, 1)
        twin = copy.deepcopy(model)
    with pytest.raises(UnknownAdapterError):
        twin.set_adapter("b")
    near(logits(twin), alone["a"])
    assert pool.on_host == ()
    near(logits(model), alone["a"])
    with pytest.raises(AdapterError, match="pool is closed"):
        pool.load("b")
    again = AdapterPool(model, BYTES / MB)
    again.register("b", folders["b"])
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge"):
        again.load("b")
    model.unmerge_adapter()
    model.unload()
    with pytest.raises(StaleModelError):
        again.load("b")


@pytest.mark.slow
def test_a_thousand_adapters(tmp_path: Path) -> None:
    """A thousand folders, room for twenty: requests with favourites, each answered as alone."""
    donor = adapted()
    donor.save_pretrained(tmp_path)
    settings = (tmp_path / "adapter_config.json").read_bytes()
    expected, sample = {}, {0, 7, 333, 999}
    folders = {}
    for number in range(1000):
        with torch.no_grad():
            for parameter in donor.manager.parameters("default"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
        folder = folders[f"user{number}"] = tmp_path / str(number)
        folder.mkdir()
        safetensors.torch.save_file(get_peft_model_state_dict(donor), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_bytes(settings)
        if number in sample:
            expected[f"user{number}"] = logits(donor)
    pool = pool_of(folders, room=20, host=50)
    generator = torch.Generator().manual_seed(0)
    favourites = (torch.rand(400, generator=generator) ** 4 * 1000).long().tolist()
    for first, second in zip(favourites[::2], favourites[1::2], strict=True):
        with pool.hold([f"user{first}", f"user{second}"]):
            assert len(pool.resident) <= 20
    for name, output in expected.items():
        near(pool.model(input_ids=tokens(), adapter_names=[name] * 2).logits, output)
    statistics = pool.statistics
    assert statistics.registered == 1000 and statistics.resident == 20 and statistics.on_host == 50
    assert device_bytes(pool) == statistics.device_bytes == 20 * BYTES
    assert 0.1 < statistics.hit_rate < 1 and statistics.reads < statistics.misses
    assert statistics.evictions == statistics.swaps == statistics.misses - 20


SHARING: dict[str, Any] = {
    "bank": lambda seed: nbpeft.VBLoRAConfig(num_vectors=8, vector_length=4, target_modules=["q_proj", "down_proj"]),
    "projections": lambda seed: nbpeft.VeraConfig(r=4, projection_prng_key=seed, target_modules=["q_proj"]),
    "drawn": lambda seed: nbpeft.VeraConfig(
        r=4, projection_prng_key=seed, save_projection=False, target_modules=["q_proj"]
    ),
}


@pytest.mark.parametrize("kind", SHARING)
def test_what_the_layers_of_an_adapter_share_comes_with_it(kind: str, tmp_path: Path) -> None:
    expected = {}
    for seed in (1, 2):
        model = get_peft_model(llama(), SHARING[kind](seed))
        randomize(model, seed=seed, scale=0.5)
        model.save_pretrained(tmp_path / str(seed))
        expected[str(seed)] = logits(model.eval())
    room = sum(tensor.nbytes for tensor in get_peft_model_state_dict(model).values())
    pool = AdapterPool(llama(), room / MB, adapters={name: tmp_path / name for name in expected})
    for name in ("1", "2", "1", "2"):
        pool.set_adapter(name)
        near(logits(pool.model.eval()), expected[name])
    statistics = pool.statistics
    assert (statistics.resident, statistics.evictions) == (1, 3)
    assert statistics.device_bytes == room
