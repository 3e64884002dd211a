"""The engines themselves load what is shipped; they are installed beside the test's own environment."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbpeft.model import LoraConfig, PeftModel, get_peft_model
from nbpeft.shipping import ship
from tests.clients.packages import DIFFUSERS, LLAMA_CPP, installed
from tests.closeness import assert_close
from tests.shipping.support import FAMILIES, adapted, base_model, ids, tokenizer
from tests.tiny_models import logits, randomize

pytestmark = pytest.mark.slow

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNEVEN: dict[str, Any] = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 3}, "use_rslora": True}


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Imports a package from a folder of its own, until the test ends."""

    def imported(name: str, *requirements: str) -> Any:
        monkeypatch.syspath_prepend(installed(*requirements))
        return importlib.import_module(name)

    return imported


def llama_cpp(library: Any, model: Path, prompt: list[int] | str, adapter: Path | None = None) -> dict[int, float]:
    """Token -> log-probability of the likeliest that follow a prompt in llama.cpp."""
    params = library.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = str(model), 64, 0, False
    if adapter is not None:
        params.lora_adapters = [library.CommonAdapterLoraInfo(str(adapter), 1.0)]
    request = {"prompt": prompt, "n_predict": 8, "temperature": 0.0, "n_probs": 5, "ignore_eos": True}
    answer = library.Server(params).handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    return {item["id"]: item["logprob"] for item in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_answers_as_the_model(family: str, beside: Callable[..., Any], tmp_path: Path) -> None:
    library = beside("xllamacpp", *LLAMA_CPP)
    base = base_model(family)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    model = adapted(base, target_modules=ALL, **UNEVEN)
    randomize(model, "sql", scale=0.0)
    how: dict[str, Any] = {"engine": "llama.cpp", "quantize": "f32"}
    ship(model, merged=True, tokenizer=tokenizer(), to=tmp_path / "base", **how)
    randomize(model, "sql", scale=0.15)
    ship(model, merged=True, tokenizer=tokenizer(), to=tmp_path / "merged", **how)
    ship(model, to=tmp_path / "adapter", **how)
    prompt = ids()[:1]
    expected = logits(model, prompt)[0, -1].log_softmax(-1)
    pair = tmp_path / "base" / "model.gguf", tmp_path / "adapter" / "adapter.gguf"
    whole = llama_cpp(library, tmp_path / "merged" / "model.gguf", prompt[0].tolist())
    for found in (whole, llama_cpp(library, pair[0], prompt[0].tolist(), pair[1])):
        assert len(found) == 5
        assert all(abs(value - float(expected[token])) < 0.01 for token, value in found.items())  # its cache is f16


def test_llama_cpp_reads_text_as_the_tokenizer(beside: Callable[..., Any], tmp_path: Path) -> None:
    library = beside("xllamacpp", *LLAMA_CPP)
    made = tokenizer()
    ship(adapted(), engine="llama.cpp", merged=True, quantize="f32", tokenizer=made, to=tmp_path / "merged")
    text = "select 24 orders, ¿sí? I've 3333."
    file = tmp_path / "merged" / "model.gguf"
    assert llama_cpp(library, file, text) == llama_cpp(library, file, made(text)["input_ids"])


@pytest.mark.parametrize("engine", ["diffusers", "kohya"])
def test_diffusers_draws_as_the_model(engine: str, beside: Callable[..., Any], tmp_path: Path) -> None:
    library = beside("diffusers", *DIFFUSERS)

    def unet() -> Any:
        torch.manual_seed(0)
        blocks = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        sizes = {"block_out_channels": (32, 64), "cross_attention_dim": 32, "attention_head_dim": 4}
        made = library.UNet2DConditionModel(**blocks, **sizes, layers_per_block=1, sample_size=8, norm_num_groups=8)
        return made.eval()

    @torch.no_grad()
    def drawn(model: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        picture, words = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 5, 32)))
        sample: torch.Tensor = model(picture, 3, encoder_hidden_states=words).sample
        return sample

    config = LoraConfig(
        r=4,
        target_modules=["to_q", "to_k", "to_out.0", "conv_in"],
        rank_pattern={"to_k": 2},
        alpha_pattern={"conv_in": 3},
    )
    model = get_peft_model(unet(), config, "style")
    randomize(model, "style", scale=0.1)
    done = ship(model.eval(), engine=engine, to=tmp_path / "served")
    loader, plain = library.loaders.StableDiffusionLoraLoaderMixin, unet()
    tensors, alphas, *_ = loader.lora_state_dict(str(done.folder / done.files[0][0]), unet_config=plain.config)
    loader.load_lora_into_unet(tensors, alphas, plain, adapter_name="style")
    assert_close(drawn(plain), drawn(model))
    plain.save_lora_adapter(str(tmp_path / "theirs"), adapter_name="style")
    assert_close(drawn(PeftModel.from_pretrained(unet(), tmp_path / "theirs").eval()), drawn(model))
