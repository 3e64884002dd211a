"""Experts quantized with the linear layers of their model: read, adapted, merged, saved, counted and forecast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbpeft import LoraConfig, PeftModel, get_peft_model, load_quantized, quantize_model
from nbpeft.engine.kernels.quantized_matrices import QuantizedMatrices
from nbpeft.engine.kernels.storage import storage_of
from nbpeft.errors import ConfigError
from nbpeft.memory import weights_by_kind
from nbpeft.memory.forecast import forecast
from nbpeft.model.quantization.quantized_experts import quantize_experts, remaining_experts
from nbpeft.model.quantization.weight_storage import stored_parts
from nbpeft.model.saving.merge_export import merge_to_folder
from nbpeft.session.core import Session
from tests.closeness import assert_approximates, assert_close
from tests.engine.kernels.test_quantized_matrices import dequantized
from tests.pretend_cpu import pretend_repacking
from tests.tiny_models import MIXTURES, experts_of, logits, mixture, state, tokens

pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")


def fields(model_type: str, **changes: Any) -> dict[str, Any]:
    usual = {"r": 4, "target_modules": [], "target_parameters": experts_of(model_type), "init_lora_weights": False}
    return usual | changes


def adapted(model_type: str, *, way: str = "eager", base: Any = None, **settings: Any) -> Any:
    base = quantize_model(mixture(model_type, way), **settings) if base is None else base
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**fields(model_type))).eval()


def stored(model: nn.Module) -> dict[str, QuantizedMatrices]:
    return {name: one for name, one in model.named_parameters() if isinstance(one, QuantizedMatrices)}


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that the quantized experts are stored in."""
    return {f"{n} {key}": p.clone() for n, one in stored(model).items() for key, p in one.parts.items()}


def trained(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the adapter."""
    output = model(input_ids=tokens(), labels=tokens())
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.drawn(4)
@pytest.mark.parametrize(("model_type", "bits"), [*((name, 4) for name in MIXTURES), ("mixtral", 8), ("gpt_oss", 8)])
def test_experts_are_quantized_as_they_are_read(
    model_type: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_repacking(monkeypatch, False)  # which bitsandbytes cannot do to layers of this size
    model = mixture(model_type)
    model.save_pretrained(tmp_path / "dense")
    left: list[Any] = []

    def quantize_rest(model: nn.Module) -> None:
        left.append(remaining_experts(model))
        quantize_experts(model)

    monkeypatch.setattr("nbpeft.model.quantization.quantize.quantize_experts", quantize_rest)
    read = load_quantized(tmp_path / "dense", bits=bits, dtype="float32")
    assert left == [{}], "transformers quantized them one by one"
    quantize_model(model, bits=bits)
    names = {name for name, parameter in mixture(model_type).named_parameters() if parameter.ndim == 3}
    assert stored(read).keys() == stored(model).keys() == names
    assert torch.equal(logits(read), logits(model)) and not any(one.requires_grad for one in stored(read).values())
    if model_type == "llama4":
        with pytest.raises(ConfigError, match="transformers replaces Llama4TextExperts"):
            read.save_pretrained(tmp_path / "quantized")
        return
    read.save_pretrained(tmp_path / "quantized")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(again), logits(read)) and not stored(again)


@pytest.mark.parametrize(
    ("model_type", "way"), [("qwen3_moe", "eager"), ("gpt_oss", "grouped_mm"), ("llama4", "eager")]
)
def test_lora_acts_as_on_the_dequantized_experts(model_type: str, way: str, tmp_path: Path) -> None:
    for settings in ({"bits": 4}, {"quant_type": "fp4", "double_quant": False}, {"bits": 8}):
        base = quantize_model(mixture(model_type, way), **settings)
        other = adapted(model_type, base=dequantized(base))
        model = adapted(model_type, base=base)
        found, expected = trained(model), trained(other)
        assert_close(found[0], expected[0])
        assert found[1].keys() == expected[1].keys() and found[1]
        for name, gradient in found[1].items():
            assert_close(gradient, expected[1][name])
    model.save_pretrained(str(tmp_path / "on quantized"))
    other.save_pretrained(str(tmp_path / "on dense"))
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("on quantized", "on dense")]
    assert len(files[0]) > 0 and abs(len(files[0]) - len(files[1])) < 200  # the fingerprint of the base differs
    again = PeftModel.from_pretrained(quantize_model(mixture(model_type, way), **settings), str(tmp_path / "on dense"))
    assert_close(logits(again.eval()), logits(model))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_merging_rounds_again_and_unmerging_gives_every_bit_back(model_type: str, bits: int, tmp_path: Path) -> None:
    model = adapted(model_type, bits=bits)
    before, expected = bits_of(model), logits(model)
    with model.disable_adapter():
        plain = logits(model)
    with pytest.warns(UserWarning, match="merging into quantized_experts weights rounds them again"):
        model.merge_adapter()
    merged = logits(model)
    assert (merged - expected).norm() < 0.5 * (plain - expected).norm()
    assert any(not torch.equal(part, before[name]) for name, part in bits_of(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(part, before[name]) for name, part in bits_of(model).items())
    assert torch.equal(logits(model), expected)
    done = merge_to_folder(model, None, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    # Layers in 8 bits round their input, too.
    assert_approximates(logits(again), expected, 1e-4 if bits == 4 else 1 / 127)
    assert done.errors is not None
    assert {layer.path.rpartition(".")[2] for layer in done.errors.layers} == {"gate_up_proj", "down_proj"}
    assert all(0 < (layer.requantized or 0) < 0.2 for layer in done.errors.layers)


@pytest.mark.slow
def test_counts_and_forecasts_are_the_bytes_that_are_stored() -> None:
    config = LoraConfig(**fields("qwen3_moe"))
    for settings in ({"bits": 4}, {"double_quant": False}, {"bits": 8}):
        dense = mixture("qwen3_moe", "grouped_mm")
        kind = "int8" if settings.get("bits") == 8 else "nf4"
        double = settings.get("double_quant", True)
        planned = forecast(dense, config, max_length=32, quantization=kind, double_quant=double)
        model = quantize_model(dense, **settings)
        experts = next(part for part in stored_parts(model) if part.name == "experts")
        sizes = [part.untyped_storage().nbytes() for one in stored(model).values() for part in one.parts.values()]
        assert experts.byte_count == sum(sizes) and experts.module_count == 4
        label = "nf4 double" if kind == "nf4" and double else kind
        assert f"{label} " in planned.parts[0].detail
        assert planned.parts[0].byte_count == sum(weights_by_kind(model).values())
        assert forecast(model, config, max_length=32).parts[0] == planned.parts[0]


def test_a_step_keeps_no_dequantized_expert() -> None:
    def kept(model: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = storage_of(tensor)
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert model(input_ids=tokens()).logits.requires_grad
        held = {storage_of(parameter).data_ptr() for parameter in model.parameters()}
        return sum(size for address, size in sizes.items() if address not in held)

    base = quantize_model(mixture("qwen3_moe", "grouped_mm"))
    dense = adapted("qwen3_moe", base=dequantized(base)).train()
    assert kept(adapted("qwen3_moe", base=base).train()) == kept(dense)


def test_qlora_quantizes_experts_and_says_so() -> None:
    session, base = Session(), mixture("qwen3_moe")
    planned = session.preview_qlora(base, fields("qwen3_moe"))
    before = next(part for part in stored_parts(base) if part.name == "experts")
    done = session.qlora(base, fields("qwen3_moe"))
    experts = next(part for part in done.parts if part.name == "experts")
    assert "4 tensors of experts in nf4 double: " in str(done) and "4 tensors of experts in nf4 double: " in str(
        planned
    )
    assert experts.before == before.byte_count and experts in planned.parts
    assert {row.backend for row in planned.adapter.rows} == {"quantized_experts"}
    assert str(session.qlora(base, fields("qwen3_moe"))).startswith("already quantized")


def test_qlora_quantizes_what_transformers_left(tmp_path: Path) -> None:
    mixture("mixtral").save_pretrained(tmp_path)
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, dtype="bfloat16")
    session, config = Session(), LoraConfig(**fields("mixtral"))
    as_it_is = forecast(base, config, max_length=32).parts[0].byte_count
    assert as_it_is == sum(weights_by_kind(base).values())
    planned = session.preview_qlora(base, fields("mixtral"))
    done = session.qlora(base, fields("mixtral"))
    assert planned.action == "quantize" and planned.parts == done.parts and done.quantized
    assert {one.form.label for one in stored(base).values()} == {"fp4"} and len(stored(base)) == 4
    assert done.byte_count < as_it_is and "already" in str(session.qlora(base, fields("mixtral")))


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"experts cannot be trained as a whole \(modules_to_save\): its .* in nf4 double"
    ):
        get_peft_model(quantize_model(mixture("mixtral")), LoraConfig(r=4, modules_to_save=["experts"]))
    skipped = quantize_model(mixture("mixtral"), skip_modules=["experts"])
    assert not stored(skipped) and state(skipped)
    half = quantize_model(mixture("mixtral"), skip_modules=["experts.down_proj"])
    assert {name.rpartition(".")[2] for name in stored(half)} == {"gate_up_proj"}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_compiled_models_compute_quantized_experts_as_they_are(way: str) -> None:
    base = quantize_model(mixture("qwen3_moe", way))
    expected = logits(base)
    assert_close(logits(torch.compile(base, backend="aot_eager")), expected)
    model = adapted("qwen3_moe", base=base)
    expected = logits(model)
    assert_close(logits(torch.compile(model, backend="eager")), expected)
