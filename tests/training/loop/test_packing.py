"""Several rows in one sequence: each learns exactly what it learns alone, or the model is refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from nbpeft import LoraConfig, get_peft_model
from nbpeft.errors import ConfigError
from nbpeft.state import TrainState
from nbpeft.training import Run, train
from nbpeft.training.data import Collator, PackedCollator, PackedRows, prepare_data
from nbpeft.training.data.packing import best_fit
from nbpeft.training.loop.packing import check_packing, pack
from nbpeft.training.monitor.callback import count_tokens
from tests.char_tokenizer import CharTokenizer
from tests.closeness import DEPTH, assert_close
from tests.tiny_models import LLAMA, VOCABULARY, classifier, llama
from tests.training.support import token_rows, trainable, weights

CPU = torch.device("cpu")
SIZES: dict[str, Any] = LLAMA | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 4},
    "Gemma3": {"head_dim": 8, "sliding_window": 4},
    "Mistral": {"sliding_window": 4},
    "Phi": {},
    "GPTNeoX": {},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Falcon": {"alibi": False},
    "StableLm": {},
    "Mixtral": {"num_local_experts": 4},
}
_mask = getattr(masking_utils, "create_bidirectional_mask", lambda: None)
MASKS_BOTH_WAYS = "position_ids" in inspect.signature(_mask).parameters
"""Whether this transformers hides packed rows from each other in models that see both ways, too (5.25)."""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Bloom": ({"n_layer": 2, "n_head": 4}, "accepts no position_ids"),
    "Mamba": ({"state_size": 4}, "accepts no position_ids"),
    "OPT": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, "depended on the row before"),
    "Bamba": (
        {"mamba_n_heads": 8, "mamba_d_state": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "attn_layer_indices": [1]},
        "depended on the row before",
    ),
    "RecurrentGemma": (
        {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 8},
        "depended on the row before",
    ),
    **({} if MASKS_BOTH_WAYS else {"Bert": ({}, "depended on the row before")}),
}


def causal(name: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{'Gemma3Text' if name == 'Gemma3' else name}Config")
    kind = {"GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM"}.get(name, f"{name}ForCausalLM")
    torch.manual_seed(0)
    return getattr(transformers, kind)(config(**SIZES | {"use_cache": False} | changes)).eval()


def rows_of(*lengths: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [-100] * (place % 3) + ids[place % 3 :]} for place, ids in enumerate(drawn)]


def losses(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """(tokens,) losses of the learned tokens of a batch, row by row."""
    labels = batch.pop("labels")[:, 1:].reshape(-1)
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)[labels != -100]


def in_order(rows: PackedRows) -> list[int]:
    return [number for index in range(len(rows)) for number in rows.rows_of(index)]


def assert_learns_the_same(model: nn.Module, rows: PackedRows, collator: PackedCollator) -> None:
    """Losses of each token, and gradients of all parameters, packed and one row at a time."""
    packed = losses(model, collator([rows[index] for index in range(len(rows))]))
    packed.sum().backward()
    gradients = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
    model.zero_grad()
    alone = [losses(model, dict(collator.plain([rows.row(number)]))) for number in in_order(rows)]
    torch.cat(alone).sum().backward()
    assert_close(packed, torch.cat(alone))
    assert gradients
    for name, gradient in gradients.items():
        found = model.get_parameter(name).grad
        assert found is not None
        assert_close(gradient, found)


@pytest.mark.parametrize("limit", [1, 7, 12, 100])
def test_best_fit_uses_every_row_once_and_keeps_to_the_limit(limit: int) -> None:
    lengths = torch.randint(1, 13, (200,), generator=torch.Generator().manual_seed(limit)).tolist()
    packs = best_fit(lengths, limit)
    assert sorted(row for pack in packs for row in pack) == list(range(200))
    assert all(sum(lengths[row] for row in pack) <= limit or len(pack) == 1 for pack in packs)
    fewest = -(-sum(min(length, limit) for length in lengths) // limit)
    assert fewest <= len(packs) <= (200 if limit == 1 else 1.5 * fewest)
    assert packs == best_fit(lengths, limit)


def test_a_row_goes_into_the_fullest_sequence_that_takes_it() -> None:
    assert best_fit([5, 9, 3, 7, 2, 1], 10) == [[1, 5], [3, 2], [0, 4]]


def test_a_row_without_tokens_gets_no_sequence_of_its_own() -> None:
    assert best_fit([12, 0, 10, 0], 10) == [[0], [2, 1, 3]]


def test_a_packed_row_holds_positions_and_learns_nothing_across_its_border() -> None:
    rows = PackedRows([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}], 8)
    assert len(rows) == 1 and (rows.row_count, rows.token_count) == (2, 5)
    assert rows[0] == {
        "input_ids": [5, 6, 7, 8, 9],
        "labels": [-100, 6, 7, -100, 9],
        "position_ids": [0, 1, 2, 0, 1],
    }
    assert str(rows) == "2 rows packed in 1 sequences of 8 tokens (62% full)"


def test_tokens_that_a_mask_leaves_out_are_not_packed() -> None:
    rows = PackedRows([{"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0]}], 8)
    assert rows[0] == {"input_ids": [5, 6], "labels": [-100, 6], "position_ids": [0, 1]}
    assert rows.token_count == 2


def test_batches_are_padded_without_a_mask_and_count_their_tokens() -> None:
    rows = PackedRows(rows_of(4, 3, 6), 7)
    batch = PackedCollator(Collator(pad_token_id=9))([rows[0], rows[1]])
    assert batch["input_ids"].shape == (2, 7) and "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 0, 1, 2]]
    assert batch["input_ids"][0, -1] == 9 and batch["labels"][0, -1] == -100
    assert int(count_tokens(batch) or 0) == 13


@pytest.mark.drawn(10)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_row_learns_what_it_learns_alone(name: str, attention: str) -> None:
    if attention == "sdpa" and name == "Gemma2":
        attention = "eager"
    model = causal(name, **ARCHITECTURES[name], attn_implementation=attention)
    rows, collator = pack(model, rows_of(9, 5, 7, 12, 3, 11), Collator(), max_length=20, tokenizer=None, given={})
    check_packing(model, rows, collator, CPU)
    assert len(rows) < 6 and len({len(rows[index]["input_ids"]) for index in range(len(rows))}) > 1
    assert_learns_the_same(model, rows, collator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_rows_would_see_each_other_is_refused(name: str, dtype: torch.dtype) -> None:
    changes, reason = REFUSED[name]
    model = causal(name, **changes).to(dtype)
    with pytest.raises(ConfigError, match=reason):
        check_packing(
            model, *pack(model, rows_of(9, 5, 7, 12), Collator(), max_length=20, tokenizer=None, given={}), CPU
        )


def test_half_precision_passes_the_check() -> None:
    model = causal("Llama").to(torch.bfloat16)
    check_packing(model, *pack(model, rows_of(9, 5, 7, 12), Collator(), max_length=20, tokenizer=None, given={}), CPU)


def test_what_cannot_be_packed_is_refused_in_one_line() -> None:
    given: dict[str, Any] = {"max_length": 8, "tokenizer": None}
    with pytest.raises(ConfigError, match="packing: it needs a causal language model, and LlamaForSequenceClass"):
        pack(classifier(), rows_of(3), Collator(), **given, given={})
    with pytest.raises(ConfigError, match="the given data_collator"):
        pack(llama(), rows_of(3), Collator(), **given, given={"data_collator": Collator()})
    with pytest.raises(ConfigError, match="the rows have inputs_embeds in addition to tokens and labels"):
        pack(llama(), [{"input_ids": [1], "inputs_embeds": [0.0]}], Collator(), **given, given={})
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[1])
    with pytest.raises(ConfigError, match="adapter 'default' would process each sequence as a single row"):
        pack(get_peft_model(llama(), config), rows_of(3), Collator(), **given, given={})
    with pytest.raises(ConfigError, match="the router loss of MixtralForCausalLM is that of whole sequences"):
        pack(causal("Mixtral", output_router_logits=True), rows_of(3), Collator(), **given, given={})
    encoder_decoder = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=VOCABULARY)
    )
    with pytest.raises(ConfigError, match="a causal language model, and T5ForConditionalGeneration is not one"):
        pack(encoder_decoder, rows_of(3), Collator(), **given, given={})


def by_rows(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
    """Attention over a flat sequence whose borders are given, as a kernel of variable length computes it."""
    assert mask is None and query.shape[0] == 1
    groups = query.shape[1] // key.shape[1]
    parts = []
    for first, last in zip(given["cu_seq_lens_q"], given["cu_seq_lens_q"][1:], strict=False):
        assert last - first <= given["max_length_q"]
        one, other, third = (part[:, :, first:last] for part in (query, key, value))
        other, third = (part.repeat_interleave(groups, 1) for part in (other, third))
        parts.append(torch.nn.functional.scaled_dot_product_attention(one, other, third, is_causal=True))
    return torch.cat(parts, 2).transpose(1, 2), None


@pytest.fixture
def variable_length() -> Iterator[str]:
    name = "by_rows_flash"
    AttentionInterface.register(name, by_rows)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    yield name
    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop(name)


def test_a_kernel_of_variable_length_is_given_the_borders(variable_length: str) -> None:
    model = causal("Llama")
    model.config._attn_implementation = variable_length
    rows, collator = pack(model, rows_of(9, 5, 7, 12, 3, 11), Collator(), max_length=20, tokenizer=None, given={})
    batch = collator([rows[index] for index in range(len(rows))])
    assert batch["input_ids"].shape == (1, 47) and batch["max_length_q"] == 12
    assert batch["cu_seq_lens_k"].tolist()[-1] == 47 and batch["cu_seq_lens_k"].dtype == torch.int32
    check_packing(model, rows, collator, CPU)
    packed = losses(model, batch)
    model.config._attn_implementation = "sdpa"
    alone = torch.cat([losses(model, dict(Collator()([rows.row(number)]))) for number in in_order(rows)])
    assert_close(packed, alone)


def test_chats_are_packed_with_their_masks() -> None:
    tokenizer = CharTokenizer("yes")
    chats = [
        {"messages": [{"role": "user", "content": "ab" * size}, {"role": "assistant", "content": "cd" * size}]}
        for size in (1, 3, 2)
    ]
    plain = prepare_data(chats, tokenizer)
    rows, _ = pack(llama(), plain, Collator(), max_length=None, tokenizer=tokenizer, given={})
    assert len(rows) == 1
    learned = [label for label in rows[0]["labels"] if label != -100]
    expected = [label for number in rows.rows_of(0) for label in plain[number]["labels"][1:] if label != -100]
    assert learned == expected and 0 < len(learned) <= plain.token_count / 2


def test_a_packed_training_ends_where_one_of_all_rows_at_once_ends() -> None:
    rows = token_rows(12)
    given: dict[str, Any] = {"learning_rate": 0.05, "max_steps": 3, "seed": 3}
    packed, whole = trainable(), trainable()
    result = train(packed, rows, packing=True, max_length=24, per_device_train_batch_size=12, **given)
    train(whole, rows, per_device_train_batch_size=12, **given)
    for name, part in weights(whole).items():
        assert_close(weights(packed)[name], part, depth=3 * 3 * DEPTH)  # three steps
    assert "12 rows packed in 4 sequences of 24 tokens" in result.message
    assert result.token_count == 3 * sum(len(row["input_ids"]) for row in rows)


def test_rows_to_evaluate_on_are_not_packed() -> None:
    rows, seen = token_rows(12), []
    model = trainable()
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, given: seen.append((module.training, "position_ids" in given)), with_kwargs=True
    )
    plain = train(trainable(), rows, rows[:5], max_steps=1, learning_rate=1e-7)
    packed = train(model, rows, rows[:5], max_steps=1, learning_rate=1e-7, packing=True)
    assert_close(plain.eval_loss, packed.eval_loss or 0)
    assert (False, False) in seen and (True, True) in seen and (True, False) not in seen


def test_a_model_that_is_refused_is_as_before() -> None:
    model = get_peft_model(causal("OPT", **REFUSED["OPT"][0]), LoraConfig(target_modules=["q_proj"])).train()
    before = weights(model)
    states: list[TrainState] = []
    with pytest.raises(
        ConfigError, match="packing: in a test, the logits of OPTForCausalLM depended on the row before"
    ):
        train(model, token_rows(6), packing=True, max_steps=2, publish=states.append)
    assert all(torch.equal(part, before[name]) for name, part in weights(model).items())
    assert states[-1].status == "failed" and model.training


def test_it_is_shown_and_told_with_the_run() -> None:
    runs: list[Run] = []

    def make(*args: Any, **kwargs: Any) -> Run:
        runs.append(Run(*args, **kwargs))
        return runs[-1]

    train(trainable(), token_rows(6), packing=True, max_length=30, max_steps=1, run_factory=make)
    assert "6 rows packed in 2 sequences of 30 tokens" in runs[0].state.message
