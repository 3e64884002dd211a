"""aLoRA: acts from the last invocation in each row onward, in every way a model is called."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from nbpeft.engine.calls.model_properties import cache_argument
from nbpeft.engine.methods.lora.variants.alora import invocation_starts
from nbpeft.engine.runtime.method_hooks import in_call
from nbpeft.errors import AdapterError, ConfigError, MergeError
from nbpeft.model import LoraConfig, PeftModel, get_peft_model
from nbpeft.model.handle.serving import blended
from tests.closeness import DEPTH, assert_close, differ, is_close
from tests.tiny_models import adapted, llama, logits, same_state, state

INVOCATION = [7, 8]
IDS = torch.tensor([[3, 7, 8, 4, 5, 6], [7, 8, 2, 7, 8, 3], [1, 2, 3, 4, 5, 6]])
FIRST = (1, 3, 6)
"""Where the adapter begins to act in each row."""
SETTINGS: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

pytestmark = pytest.mark.filterwarnings("ignore:.*use_cache", "ignore:.*gradient_checkpointing")


def invoked(base: nn.Module | None = None, **changes: Any) -> PeftModel:
    return adapted(base, **{**SETTINGS, "alora_invocation_tokens": INVOCATION, **changes})


def theirs_and_ours(folder: Path, **changes: Any) -> tuple[Any, PeftModel]:
    """PEFT's model and ours with one adapter that PEFT has saved, both to be trained."""
    settings = {**SETTINGS, "alora_invocation_tokens": INVOCATION, "init_lora_weights": False, **changes}
    config = peft.LoraConfig(**settings)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(folder)
    return theirs, PeftModel.from_pretrained(llama(), folder, is_trainable=True).eval()


def gradients(model: Any, *batches: Tensor) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    torch.stack([model(input_ids=ids, labels=ids).loss for ids in batches]).sum().backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def generated(model: Any, ids: Tensor = IDS, **settings: Any) -> Tensor:
    given: Tensor = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **settings)
    return given


@pytest.mark.parametrize(
    ("rows", "sought", "expected"),
    [
        (IDS.tolist(), INVOCATION, [1, 3, -1]),
        ([[1, 1, 1, 1]], [1, 1], [2]),
        ([[5, 7]], [7, 8], [-1]),
        ([[7]], [7, 8], [-1]),
        ([7, 8], [7, 8], [0]),
    ],
)
def test_finds_the_last_invocation_of_each_row(rows: Any, sought: list[int], expected: list[int]) -> None:
    assert invocation_starts(torch.tensor(rows), sought).tolist() == expected


def test_tokens_before_the_invocation_are_the_base_models() -> None:
    base = llama()
    expected = logits(base, IDS)
    changed = (logits(invoked(base), IDS) != expected).any(-1)
    assert changed.tolist() == [[place >= first for place in range(6)] for first in FIRST]


def test_equal_to_peft_in_calls_training_and_files(tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours(tmp_path / "theirs")
    assert_close(logits(ours, IDS), logits(theirs, IDS))
    assert torch.equal(generated(ours), generated(theirs))
    assert_close(gradients(ours, IDS), gradients(theirs, IDS), depth=3 * DEPTH)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert back.peft_config["default"].alora_invocation_tokens == INVOCATION
    assert_close(logits(back, IDS), logits(ours.eval(), IDS))


def test_equal_to_peft_in_mixed_batches(tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours(tmp_path)
    theirs.add_adapter("plain", peft.LoraConfig(**SETTINGS, init_lora_weights=False))
    theirs.save_pretrained(tmp_path, selected_adapters=["plain"])
    ours.load_adapter(str(tmp_path / "plain"), "plain")
    for names in (["default", "plain", "__base__"], ["plain", "default", "default"]):
        with torch.no_grad():
            found, expected = (model(input_ids=IDS, adapter_names=names).logits for model in (ours, theirs))
        assert_close(found, expected)
        assert torch.equal(generated(ours, adapter_names=names), generated(theirs, adapter_names=names))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"adapter_names": ["default", "__base__", "default"]}])
def test_a_cache_changes_nothing(settings: dict[str, Any]) -> None:
    model = invoked()
    assert torch.equal(generated(model, **settings), generated(model, use_cache=False, **settings))


def test_several_new_tokens_at_once_change_nothing() -> None:
    model, ids = invoked(), torch.tensor([[3, 4, 5, 3, 4, 7, 8]])
    assert torch.equal(generated(model, ids, prompt_lookup_num_tokens=4), generated(model, ids))


def test_what_the_base_has_cached_of_a_prompt_serves_the_adapter() -> None:
    base, ids = llama(), IDS[:1]
    model = invoked(base)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 1:]
        name = cache_argument(base)
        with model.disable_adapter():
            cache = model(input_ids=ids[:, :1], use_cache=True)[name]
        assert_close(model(input_ids=ids[:, 1:], **{name: cache}).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_each_call_as_it_was(reentrant: bool) -> None:
    model = invoked()
    other = IDS[[1, 1, 0]]  # rows in another order alone have the same gradients
    expected = gradients(model, IDS, other)
    assert any(differ(expected[key], value) for key, value in gradients(model, IDS, IDS).items())
    model.enable_input_require_grads()
    base: Any = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_close(gradients(model, IDS, other), expected, depth=3 * DEPTH)


def test_dropout_and_a_bias_reach_active_tokens_only() -> None:
    base = llama()
    model = invoked(base, lora_dropout=0.5, lora_bias=True)
    expected = logits(base, IDS)
    model.train()
    with torch.no_grad():
        changed = (model(input_ids=IDS).logits != expected).any(-1)
    assert changed.tolist() == [[place >= first for place in range(6)] for first in FIRST]


def test_rows_without_invocation_give_gradients_of_zero() -> None:
    found = gradients(invoked(), IDS[2:])
    assert found and all(not gradient.any() for gradient in found.values())


def test_weighted_sums_act_from_the_invocation_on() -> None:
    model = invoked()
    model.add_adapter("plain", LoraConfig(**SETTINGS))
    model.set_adapter("plain")
    expected = logits(llama(), IDS)
    with blended(model.manager, {"default": 0.5}):
        changed = (logits(model, IDS) != expected).any(-1)
    assert changed.tolist() == [[place >= first for place in range(6)] for first in FIRST]


def test_merging_is_refused_and_leaves_the_weights() -> None:
    base = llama()
    model = invoked(base)
    before = state(base)
    with pytest.raises(MergeError, match="aLoRA does not support merging"):
        model.merge_adapter()
    assert same_state(state(base), before)


def test_combines_with_the_same_invocation_only() -> None:
    model = invoked()
    for name, sought in (("same", INVOCATION), ("other", [9]), ("plain", None)):
        model.add_adapter(name, LoraConfig(**SETTINGS, alora_invocation_tokens=sought, init_lora_weights=False))
    model.add_weighted_adapter(["default", "same"], [0.5, 0.5], "both", "linear")
    assert model.peft_config["both"].alora_invocation_tokens == INVOCATION
    for name in ("other", "plain"):
        with pytest.raises((AdapterError, ConfigError)):
            model.add_weighted_adapter(["default", name], [0.5, 0.5], "refused", "linear")


def test_survives_deepcopy_and_pickle() -> None:
    model = invoked()
    expected = logits(model, IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, IDS), expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"alora_invocation_tokens": []}, "token ids"),
        ({"alora_invocation_tokens": [-1]}, "token ids"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LoraConfig(**{"alora_invocation_tokens": INVOCATION, **changes})


def test_layers_that_are_not_linear_are_refused() -> None:
    with pytest.raises(ConfigError, match="linear layers only"):
        invoked(target_modules=["embed_tokens"])


def test_another_task_or_embeddings_alone_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="will not act unless a call passes alora_offsets"):
        get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=INVOCATION))
    model = invoked()
    base: Any = model.get_base_model()
    with torch.no_grad():
        embedded = base.get_input_embeddings()(IDS)
        with pytest.warns(UserWarning, match="pass input_ids"):
            found = model(inputs_embeds=embedded).logits
        with model.disable_adapter():
            assert torch.equal(found, model(inputs_embeds=embedded).logits)


def test_inputs_without_the_rows_in_front_are_refused() -> None:
    manager = invoked(target_modules=["q_proj"]).manager
    layer = next(iter(manager.layers.values()))
    active = in_call(manager.configs, manager.active_state.current(), (), {"input_ids": IDS})
    with manager.active_state.call(active), pytest.raises(AdapterError, match="rows in front"):
        layer(torch.zeros(1, IDS.numel(), 32))


def test_checkpointing_in_two_threads_keeps_their_calls_apart() -> None:
    model = invoked()
    other = IDS[[1, 1, 0]]  # rows in another order alone have the same gradients
    model.train()
    expected = {rows: gradients_of(model, rows) for rows in (IDS, other)}
    model.enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    meet, found = threading.Barrier(2), {}

    def train(rows: Tensor) -> None:
        loss = model(input_ids=rows, labels=rows).loss
        meet.wait()
        found[rows] = torch.autograd.grad(loss, model.manager.parameters("default"))

    threads = [threading.Thread(target=train, args=(rows,)) for rows in (IDS, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows, mine in found.items():
        assert all(is_close(one, two) for one, two in zip(mine, expected[rows], strict=True))
    assert len(found) == 2


def gradients_of(model: Any, rows: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(model(input_ids=rows, labels=rows).loss, model.manager.parameters("default"))


@pytest.mark.filterwarnings("ignore:.*CAUSAL_LM")
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_a_call_says_where_it_begins_as_with_peft(tmp_path: Path, task: str | None) -> None:
    theirs, ours = theirs_and_ours(tmp_path, **({} if task else {"task_type": task}))
    ours.eval()
    offsets, embedded = [2, None, 9], theirs.get_input_embeddings()(IDS).detach()
    with torch.no_grad():
        for given in ({"input_ids": IDS}, {"inputs_embeds": embedded}):
            found, expected = (model(**given, alora_offsets=offsets).logits for model in (ours, theirs))
            assert_close(found, expected)
            with ours.disable_adapter():
                plain = ours(**given).logits
            assert torch.equal(found[0, :4], plain[0, :4]) and torch.equal(found[1], plain[1])
            assert differ(found[0, 4:], plain[0, 4:]) and differ(found[2, 0], plain[2, 0])
