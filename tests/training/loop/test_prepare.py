from __future__ import annotations

import copy
import inspect
import logging
import pickle

import bitsandbytes
import peft
import pytest
import torch
from torch import nn

from nbpeft.errors import ConfigError
from nbpeft.training import prepare_model_for_kbit_training, train
from nbpeft.training.loop.prepare import is_quantized, prepare_model
from tests.closeness import assert_close
from tests.tiny_models import checkpoints_activations, llama
from tests.training.support import token_rows, trainable


def four_bit(dtype=torch.bfloat16):
    linear_4bit = getattr(bitsandbytes.nn, "Linear4bit")  # noqa: B009 - not exported explicitly
    model = llama(hidden_size=64, intermediate_size=64, dtype=dtype)
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear):
                    quantized = linear_4bit(
                        child.in_features, child.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                    )
                    quantized.load_state_dict({"weight": child.weight.data})
                    setattr(owner, name, quantized.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def dtypes(model):
    return {name: part.dtype for name, part in model.named_parameters()}


def test_signature_begins_as_in_peft():
    ours = list(inspect.signature(prepare_model_for_kbit_training).parameters.values())
    theirs = list(inspect.signature(peft.prepare_model_for_kbit_training).parameters.values())
    assert [(part.name, part.default) for part in ours[:4]] == [(part.name, part.default) for part in theirs]
    assert ours[4].kind is inspect.Parameter.KEYWORD_ONLY


def test_norms_only_by_default(caplog):
    model = four_bit()
    with caplog.at_level(logging.INFO, logger="nbpeft.training"):
        assert prepare_model_for_kbit_training(model) is model
    assert "base frozen, 5 tensors in float32 (+0.0 MB)" in caplog.text
    assert not any(part.requires_grad for part in model.parameters())
    assert {name for name, dtype in dtypes(model).items() if dtype == torch.float32} == {
        name for name in dtypes(model) if "norm" in name
    }
    assert model.get_input_embeddings().weight.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert checkpoints_activations(model)


def test_norms_in_float32_hand_on_the_dtype_they_were_given():
    model, plain = llama(dtype=torch.bfloat16), llama(dtype=torch.bfloat16)
    done = prepare_model(model)
    assert (done.upcast_count, done.extra_bytes, done.gradient_checkpointing) == (5, 5 * 32 * 2, False)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    tokens = torch.tensor([[1, 2, 3, 4]])
    out, reference = model(tokens, output_hidden_states=True), plain(tokens, output_hidden_states=True)
    assert {state.dtype for state in out.hidden_states} == {torch.bfloat16} and out.logits.dtype == torch.bfloat16
    assert_close(out.logits, reference.logits)
    assert torch.equal(twin(tokens).logits, out.logits)


def test_peft_behaviour_is_an_option_and_says_what_it_costs():
    model, oracle = four_bit(), four_bit()
    with pytest.warns(UserWarning, match=r"turned 7 tensors into float32: 0\.0 MB more"):
        prepare_model_for_kbit_training(model, upcast="peft", use_gradient_checkpointing=False)
    peft.prepare_model_for_kbit_training(oracle, use_gradient_checkpointing=False)
    assert dtypes(model) == dtypes(oracle)
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert_close(model(tokens).logits, oracle(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_not_quantized_is_float32_afterwards_as_with_peft(dtype):
    model, oracle = llama(dtype=dtype), llama(dtype=dtype)
    with pytest.warns(UserWarning, match=r"the model is not quantized: preparing it turned \d+ tensors into float32"):
        prepare_model_for_kbit_training(model)
    peft.prepare_model_for_kbit_training(oracle)
    assert dtypes(model) == dtypes(oracle) and set(dtypes(model).values()) == {torch.float32}
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert_close(model(tokens).logits, oracle(tokens).logits)
    kept = prepare_model_for_kbit_training(llama(dtype=dtype), upcast="norms")
    assert set(dtypes(kept).values()) == {dtype, torch.float32}


def test_none_casts_nothing():
    model = four_bit()
    before = dtypes(model)
    done = prepare_model(model, upcast="none")
    assert dtypes(model) == before and done.extra_bytes == 0 and str(done) == "base frozen, gradient checkpointing on"
    with pytest.raises(ConfigError, match="Did you mean 'norms'"):
        prepare_model(model, upcast="norm")  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointing_lets_gradients_through(reentrant):
    model = four_bit(torch.float32)
    options = None if reentrant is None else {"use_reentrant": reentrant}
    done = prepare_model(model, gradient_checkpointing_kwargs=options)
    assert done.gradient_checkpointing and done.inputs_require_grad is bool(reentrant)
    adapted = trainable(model)
    result = train(adapted, token_rows(8), max_steps=2, learning_rate=1e-2)
    assert result.message == "" and result.steps == 2


def test_a_dense_model_is_not_checkpointed_and_gguf_is_dense():
    model = llama()
    assert not prepare_model(model).gradient_checkpointing
    model.quantization_method = "gguf"
    assert not is_quantized(model)
    model.quantization_method = "hqq"
    assert is_quantized(model)


def test_four_bit_base_learns_and_saves_only_the_adapter(tmp_path):
    model = trainable(prepare_model_for_kbit_training(four_bit()))
    result = train(model, token_rows(32), max_steps=30, per_device_train_batch_size=32, learning_rate=3e-2)
    assert result.state.history[-1][1] < result.state.history[0][1] - 0.1
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000


@pytest.mark.filterwarnings("ignore:the model is not quantized")
def test_a_flag_alone_makes_no_model_quantized():
    found = []
    for prepare in (prepare_model_for_kbit_training, peft.prepare_model_for_kbit_training):
        model = llama(dtype=torch.float16)
        model.is_loaded_in_8bit = True
        prepare(model, use_gradient_checkpointing=False)
        found.append(dtypes(model))
    assert found[0] == found[1] and set(found[0].values()) == {torch.float32}
