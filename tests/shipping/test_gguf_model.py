"""GGUF files: the numbers in them are those of the adapter, and transformers loads a merged one with equal logits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from nbpeft.checkpoint import TensorSpec, read_gguf
from nbpeft.errors import AdapterError, ConfigError, MissingPackageError
from nbpeft.model import LoraConfig, get_peft_model
from nbpeft.shipping import ship
from nbpeft.shipping.gguf_model import GgufModel
from tests.closeness import assert_close
from tests.shipping.support import FAMILIES, SIZES, adapted, base_model, ids, keys, tokenizer
from tests.tiny_models import logits

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def merged_weight(model: Any, path: str) -> torch.Tensor:
    delta: torch.Tensor = model.base_model.manager.layers[path].get_delta_weight("sql")
    return delta.detach()


def halves(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in pairs of neighbours, back in halves of each head."""
    size = value.shape[0] // heads
    return torch.cat([part for head in value.split(size) for part in (head[0::2], head[1::2])])


@pytest.mark.drawn(5)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "fields", [{}, {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 3}, "use_rslora": True}]
)
def test_an_adapters_products_are_those_of_the_model(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(base_model(family), target_modules=ALL, **fields)
    done = ship(model, engine="llama.cpp", to=tmp_path / "served")
    path = tmp_path / "served" / "adapter.gguf"
    known, tensors = keys(path), read_gguf(path)
    assert known["general.type"] == "adapter" and known["adapter.type"] == "lora"
    assert known["general.architecture"] == {"Mistral": "llama", "Llama3": "llama"}.get(family, family.lower())
    assert len(tensors) == 2 * 2 * len(ALL) and done.byte_count == sum(t.nbytes for t in tensors.values())
    names = dict(zip(ALL, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), strict=True))
    for target, name in names.items():
        down, up = (tensors[f"blk.1.{name}.weight.lora_{part}"] for part in "ab")
        product = known["adapter.lora.alpha"] / down.shape[0] * up @ down
        if target in ("q_proj", "k_proj") and known["general.architecture"] == "llama":
            product = halves(product, 4 if target == "q_proj" else 2)
        where = next(
            path for path in model.manager.layers if path.startswith("model.layers.1.") and path.endswith(target)
        )
        assert_close(product, merged_weight(model, where))


@pytest.mark.parametrize("stored_as", ["f32", "f16", "bf16", "q8_0"])
def test_types_of_an_adapters_weights(stored_as: str, tmp_path: Path) -> None:
    model = adapted(r=32)
    done = ship(model, engine="llama.cpp", quantize=stored_as, to=tmp_path / "served")
    exact = ship(model, engine="llama.cpp", to=tmp_path / "exact")
    found, wanted = (read_gguf(folder / "adapter.gguf") for folder in (done.folder, exact.folder))
    error = max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
    assert error <= {"f32": 0, "f16": 1e-3, "bf16": 5e-3, "q8_0": 6e-3}[stored_as]
    share = {"f32": 1, "f16": 0.5, "bf16": 0.5, "q8_0": 34 / 128}[stored_as]
    assert done.byte_count == exact.byte_count * share
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(done.folder / "adapter.gguf").tensors}
    assert kinds == {stored_as.upper()}


def test_rows_that_make_no_blocks_are_stored_in_f16(tmp_path: Path) -> None:
    ship(adapted(r=4), engine="llama.cpp", quantize="q8_0", to=tmp_path / "served")
    kinds = {t.name[-6:]: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "served" / "adapter.gguf").tensors}
    assert kinds == {"lora_a": "Q8_0", "lora_b": "F16"}


def test_an_embedding_is_looked_up_by_row(tmp_path: Path) -> None:
    model = adapted(target_modules=["embed_tokens"])
    ship(model, engine="llama.cpp", to=tmp_path / "served")
    tensors = read_gguf(tmp_path / "served" / "adapter.gguf")
    down, up = tensors["token_embd.weight.lora_a"], tensors["token_embd.weight.lora_b"]
    assert down.shape == (300, 4) and up.shape == (64, 4)
    assert_close(8 / 4 * down @ up.T, merged_weight(model, "model.embed_tokens"))


@pytest.mark.drawn(4)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("stored_as", "dtype"), [("f32", torch.float32), ("f16", torch.float16)])
def test_transformers_loads_a_merged_file(family: str, stored_as: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(base_model(family), use_dora=True)
    done = ship(
        model, engine="llama.cpp", merged=True, quantize=stored_as, tokenizer=tokenizer(), to=tmp_path / "served"
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "served", gguf_file="model.gguf").eval()
    if family == "Llama3":  # which transformers does not read from these files; llama.cpp does
        assert_close(read_gguf(tmp_path / "served" / "model.gguf")["rope_freqs.weight"], _factors(model))
        loaded.model.rotary_emb = model.get_base_model().model.rotary_emb
    assert_close(logits(loaded, ids()), logits(model, ids()), dtype=dtype)
    assert done.merged and done.stored_as == stored_as


def _factors(model: Any) -> torch.Tensor:
    """How much slower each frequency of the model turns than without scaling."""
    plain = 1.0 / (10000.0 ** (torch.arange(0, 16, 2) / 16))
    return plain / model.get_base_model().model.rotary_emb.inv_freq


def test_a_merged_file_in_q8_0_is_near(tmp_path: Path) -> None:
    model = adapted()
    done, exact = (
        ship(model, engine="llama.cpp", merged=True, quantize=kind, tokenizer=tokenizer(), to=tmp_path / kind)
        for kind in ("q8_0", "f32")
    )
    found, wanted = (read_gguf(folder / "model.gguf") for folder in (done.folder, exact.folder))
    for name, value in wanted.items():
        blocks = value.reshape(-1, 32) if value.ndim > 1 else value.unsqueeze(1)
        # Half a step of the grid, and the step itself is rounded to f16.
        step = blocks.abs().amax(1, keepdim=True) / 127
        assert bool(((found[name].view_as(blocks) - blocks).abs() <= 0.57 * step + 1e-7).all()), name
    assert done.byte_count < 0.3 * exact.byte_count


ADAPTERS_ONLY = {
    "Gemma2": {"head_dim": 16},
    "Gemma3": {"head_dim": 16},
    "Granite": {},
    "Phi3": {"pad_token_id": 0},
    "SmolLM3": {"pad_token_id": 0},
}


@pytest.mark.parametrize("family", ADAPTERS_ONLY)
def test_of_some_classes_only_adapters_are_written(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    base = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, config)(**SIZES | ADAPTERS_ONLY[family])
    ).eval()
    model = adapted(base, target_modules=["o_proj", "down_proj"])
    ship(model, engine="llama.cpp", to=tmp_path / "served")
    path = tmp_path / "served" / "adapter.gguf"
    assert keys(path)["general.architecture"] == family.lower()
    tensors = read_gguf(path)
    product = 2 * tensors["blk.0.attn_output.weight.lora_b"] @ tensors["blk.0.attn_output.weight.lora_a"]
    assert_close(product, merged_weight(model, "model.layers.0.self_attn.o_proj"))
    with pytest.raises(AdapterError, match=rf"a {family}ForCausalLM \(known: Llama, Mistral, Qwen2, Qwen3"):
        ship(model, engine="llama.cpp", merged=True, tokenizer=tokenizer(), to=tmp_path / "other")


def test_other_classes_and_embeddings_are_refused(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 300}
    gpt2 = get_peft_model(GPT2LMHeadModel(GPT2Config(**sizes)), LoraConfig(target_modules=["c_attn"]), "sql")
    for merged in (False, True):
        with pytest.raises(AdapterError, match=r"a GPT2LMHeadModel \(known: .*Llama, Mis"):
            ship(gpt2, engine="llama.cpp", merged=merged, tokenizer=tokenizer(), to=tmp_path / "served")
    scaled = base_model("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ConfigError, match="rotary embeddings of type 'dynamic'"):
        ship(adapted(scaled), engine="llama.cpp", merged=True, tokenizer=tokenizer(), to=tmp_path / "served")
    assert not list(tmp_path.iterdir())


def test_an_old_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", {})
    with pytest.raises(ConfigError, match="does not support llama: pip install -U gguf"):
        ship(adapted(), engine="llama.cpp", dry_run=True)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = adapted()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackageError, match=r"^Writing a GGUF file needs gguf: pip install gguf$"):
        ship(model, engine="llama.cpp", to=tmp_path / "served")
    assert not list(tmp_path.iterdir())


MORE_BITS = {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23}
"""The layers of 24 that llama.cpp stores more exactly: three at each end, and every third between them."""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("stored_as", "most"), [("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K"), ("q6_k", "Q6_K")])
def test_matrices_whose_errors_count_most_are_stored_more_exactly(
    stored_as: str, most: str, tied: bool, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 24, "num_attention_heads": 2}
    model = adapted(base_model(**sizes, num_key_value_heads=1, tie_word_embeddings=tied))
    done = ship(
        model, engine="llama.cpp", merged=True, quantize=stored_as, tokenizer=tokenizer(), to=tmp_path / "served"
    )
    read = gguf.GGUFReader(done.folder / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in read.tensors}
    assert sum(int(tensor.n_bytes) for tensor in read.tensors) == done.byte_count
    for layer in range(24):
        important = "Q6_K" if layer in MORE_BITS else most
        for name in ("attn_v", "ffn_down"):
            assert types[f"blk.{layer}.{name}.weight"] == important
        for name in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
            assert types[f"blk.{layer}.{name}.weight"] == most
        assert types[f"blk.{layer}.attn_norm.weight"] == "F32"
    assert types["token_embd.weight"] == ("Q6_K" if tied else most)
    assert types.get("output.weight") == (None if tied else "Q6_K")


def test_values_of_a_model_of_80_layers_have_five_bits() -> None:
    config = base_model().config
    config.num_hidden_layers = 80
    specs = [
        TensorSpec(f"model.layers.{layer}.self_attn.{name}.weight", torch.float32, (256, 256))
        for layer in (0, 10)
        for name in ("v_proj", "k_proj")
    ]
    tensors = GgufModel("LlamaForCausalLM", config).model_tensors(specs, lambda key: torch.zeros(1), "q4_k_m")
    assert {tensor.name.removesuffix(".weight"): tensor.stored_as for tensor in tensors} == {
        "blk.0.attn_v": "q6_k",
        "blk.0.attn_k": "q4_k",
        "blk.10.attn_v": "q5_k",
        "blk.10.attn_k": "q4_k",
    }
