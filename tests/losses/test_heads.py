from __future__ import annotations

import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
import torch.nn.functional as F

import nbpeft
from nbpeft.errors import ConfigError, TrainingError
from nbpeft.losses import LazyLogits, chunked_head, chunked_loss, without_logits
from nbpeft.model import LoraConfig, get_peft_model
from tests.closeness import assert_close
from tests.losses.models import batch_of, check_chunked, loss_and_gradients, model_of
from tests.tiny_models import adapted, classifier, gpt2, llama, tokens


def batch(rows=3, length=12):
    ids = tokens(rows, length)
    labels = ids.clone()
    labels[0, : length // 2] = -100
    labels[-1] = -100
    return {"input_ids": ids, "labels": labels}


HEADS = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "copy": {"modules_to_save": ["lm_head"]},
    "bias": {"target_modules": ["q_proj", "lm_head"], "lora_bias": True},
    "one pair": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [5, 9, 11]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_with_an_adapter_is_trained_as_with_whole_logits(kind, tied):
    model = adapted(llama(tie_word_embeddings=tied), **HEADS[kind]).train()
    for chunk_size in (1, 4, 64):
        check_chunked(model, batch(), chunk_size)


def test_models_of_peft_are_served_as_well():
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    check_chunked(peft.get_peft_model(llama(), config).train(), batch(), 4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpointing(reentrant):
    model = adapted(llama()).train()
    with warnings.catch_warnings(action="ignore"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    check_chunked(model, batch(), 4)


def test_rows_with_adapters_of_their_own_and_switched_off_adapters():
    model = adapted(llama(), target_modules=["q_proj", "lm_head"], lora_dropout=0.0).eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    given = batch() | {"adapter_names": ["default", "other", "__base__"]}
    with torch.no_grad():
        assert_close(chunked_loss(model, loss_chunk_size=4, **given), model(**given).loss)
        with model.disable_adapter():
            assert_close(chunked_loss(model, loss_chunk_size=4, **batch()), model(**batch()).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_head_computes_as_it_would(dtype):
    model = adapted(llama(dtype=dtype)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, expected = loss_and_gradients(model, lambda: model(**batch()).loss)
        loss, found = loss_and_gradients(model, lambda: chunked_loss(model, loss_chunk_size=5, **batch()))
    assert_close(loss, whole)
    assert found.keys() == expected.keys()
    assert_close(found, expected, dtype=torch.bfloat16)


def test_logits_have_data_once_they_are_needed():
    model = adapted(gpt2(), target_modules=["c_attn"])
    whole = model(**batch()).logits
    with chunked_head(model, 4) as head:
        logits = model(**batch()).logits
        assert isinstance(logits, LazyLogits)
        assert (logits.shape, logits.dtype, logits.device) == (whole.shape, whole.dtype, whole.device)
        assert head.chunked
        assert not head.needed_by
        assert torch.equal(logits.argmax(-1), whole.argmax(-1))
    assert vars(head) == {"chunk_size": 4, "divisor": None, "sampled": False, "chunked": True, "needed_by": "argmax"}
    assert torch.equal(torch.cat([logits, logits]), torch.cat([whole, whole]))
    assert not isinstance(model(**batch()).logits, LazyLogits)


@pytest.mark.parametrize(
    "use",
    [
        lambda logits: logits[:, -3:].float().softmax(-1),
        lambda logits: (logits[..., :-1, :].contiguous().view(-1, logits.size(-1)) / 3).tanh() * 2,
        lambda logits: (torch.ones(1) * logits).flatten(0, 1)[3],
        lambda logits: logits[..., 3:7] + logits[:, :, :4],
        lambda logits: logits.transpose(1, 2).reshape(-1),
        lambda logits: F.cross_entropy(logits.transpose(1, 2), batch()["labels"].clamp(min=0)),
        lambda logits: F.cross_entropy(logits[0], logits[1].softmax(-1)),
        lambda logits: F.cross_entropy(logits[0], batch()["input_ids"][0], reduction="none"),
        lambda logits: F.cross_entropy(logits[0], batch()["input_ids"][0], weight=torch.arange(97.0)),
        lambda logits: F.cross_entropy(input=logits[1].mul_(0.5), target=batch()["input_ids"][1], label_smoothing=0.2),
    ],
    ids=range(10),
)  # fmt: skip
def test_whatever_is_done_with_logits_gives_what_it_would(use):
    model = llama()
    ids = batch()["input_ids"]
    _, expected = loss_and_gradients(model, lambda: use(model(input_ids=ids).logits).square().sum())
    result = use(model(input_ids=ids).logits)
    with chunked_head(model, 4):
        assert_close(use(model(input_ids=ids).logits) * 1, result)
        _, found = loss_and_gradients(model, lambda: (use(model(input_ids=ids).logits) * 1).square().sum())
    assert_close(found, expected)


def test_a_loss_of_ones_own_in_the_forward_is_chunked_too():
    model = llama()
    own = torch.nn.CrossEntropyLoss()

    def shifted(logits, labels, vocab_size, **unused):
        return own(logits[..., :-1, :].contiguous().view(-1, vocab_size), labels[..., 1:].contiguous().view(-1))

    model.loss_function = shifted
    check_chunked(model, batch(), 4)


def test_a_loss_that_is_no_cross_entropy_is_computed_from_whole_logits():
    model = llama()
    model.loss_function = lambda logits, labels, **unused: logits.logsumexp(-1).mean()
    with chunked_head(model, 4) as head:
        loss = model(**batch()).loss
    assert torch.equal(loss, model(**batch()).loss)
    assert head.needed_by == "logsumexp"
    assert not head.chunked


def test_a_compiled_model_and_one_without_a_head_are_left_alone():
    model = llama()
    for other in (torch.compile(model, backend="eager"), classifier()):
        with chunked_head(other, 4) as head:
            assert "forward" not in vars(model.lm_head)
        assert not head.chunked
    with pytest.raises(TrainingError, match="LlamaForCausalLM returned no loss"):
        chunked_loss(model, input_ids=tokens())


def test_the_head_is_as_before_after_an_error():
    model = llama()
    with pytest.raises(ZeroDivisionError), chunked_head(model, 4), without_logits(model):
        assert isinstance(model(**batch()).get("logits"), type(None))
        raise ZeroDivisionError
    assert "forward" not in vars(model.lm_head)
    assert model(**batch()).logits.shape == (3, 12, 97)


def test_threads_that_only_call_the_model_get_logits_with_data():
    model = adapted(llama()).eval()
    expected = model(**batch()).logits
    with ThreadPoolExecutor(1) as other, chunked_head(model, 4):
        found = other.submit(lambda: model(**batch()).logits).result()
        assert isinstance(model(**batch()).logits, LazyLogits)
    assert type(found) is torch.Tensor
    assert_close(found, expected)


def test_blocks_of_two_threads_may_end_in_any_order():
    model = llama()
    first, second = chunked_head(model, 4), chunked_head(model, 4)
    first.__enter__()
    with ThreadPoolExecutor(1) as other:
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert type(model(**batch()).logits) is torch.Tensor
        assert isinstance(other.submit(lambda: model(**batch()).logits).result(), LazyLogits)
        other.submit(second.__exit__, None, None, None).result()
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("size", [-1, 2.5, True, "many", None])
def test_a_chunk_is_a_number_of_tokens(size):
    with pytest.raises(ConfigError, match="loss_chunk_size must be a whole number of tokens"):
        chunked_loss(llama(), loss_chunk_size=size, **batch())


def test_the_public_function_adds_up_over_batches():
    model = get_peft_model(model_of("mixtral"), LoraConfig(r=2, target_modules=["q_proj"]))
    draw = random.Random(3)
    batches = [batch_of(draw) for _ in range(2)]
    count = sum((part["labels"][:, 1:] != -100).sum() for part in batches)

    def total(compute):
        return sum(compute(**part, num_items_in_batch=count) for part in batches)

    whole, expected = loss_and_gradients(model, lambda: total(lambda **part: model(**part).loss))
    loss, found = loss_and_gradients(model, lambda: total(lambda **part: nbpeft.chunked_loss(model, **part)))
    assert_close(loss, whole)
    assert_close(found, expected)


def test_tokens_without_a_batch_are_computed_in_chunks_too():
    model, hidden = llama(), torch.randn(5, 32)
    with chunked_head(model, chunk_size=2):
        found, alone = model.lm_head(hidden), model.lm_head(hidden[0])
    assert isinstance(found, LazyLogits) and not isinstance(alone, LazyLogits)
    assert_close(torch.stack([alone, found[1]]), model.lm_head(hidden[:2]))
