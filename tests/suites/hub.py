"""Tiny models in an on-disk cache under the names that PEFT's tests load from the hub: nothing is fetched.

The classes are those that the names stand for, the weights random. Tests that depend on the published weights
themselves (a stored output, a stored adapter) fail with PEFT as well, and are left out of the comparison.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from tests.clients.packages import DIFFUSERS, installed

REVISION = "0" * 40
VOCABULARY = 1024
TINY: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32"},
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512},
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    **{"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4},
    **{"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "ffn_dim": 64, "word_embed_proj_dim": 32},
    **{"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "rotary_dim": 8,
    **{"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "embedding_size": 8},
}
"""Settings of every configuration that knows them."""

CLASSES = {
    "opt-125m": "OPTForCausalLM",
    "opt-350m": "OPTForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "tiny-random-gpt2": "GPT2LMHeadModel",
    "tiny-random-t5": "T5ForConditionalGeneration",
    "tiny-dummy-qwen2": "Qwen2ForCausalLM",
    "Mixtral-tiny": "MixtralForCausalLM",
    "flan-t5-base": "T5ForConditionalGeneration",
    "flan-t5-small": "T5ForConditionalGeneration",
    "bloomz-560m": "BloomForCausalLM",
}
"""Names that do not hold their class."""
_MOST = 2_000_000
"""Parameters of a tiny model, at most: some classes take their sizes from parts that ``TINY`` does not reach."""
_CLASS = re.compile(r"([A-Z][A-Za-z0-9]*(?:For[A-Z][A-Za-z0-9]*|LMHeadModel|Model))")
_NAME = re.compile(r"""["']([A-Za-z][\w-]+/[\w.-]+)["']""")


def fill(cache: Path, tests: Path) -> list[str]:
    """Puts a model and a tokenizer into the cache for each name in the tests that stands for a class.

    Args:
        cache: the folder that HF_HUB_CACHE names.
        tests: the folder of the tests.

    Returns:
        The names that are there now.
    """
    names = sorted({name for file in tests.glob("*.py") for name in _NAME.findall(file.read_text())})
    return [name for name in names if _is_there(cache, name) or _made(cache, name)]


def _folder(cache: Path, name: str) -> Path:
    return cache / f"models--{name.replace('/', '--')}"


def _is_there(cache: Path, name: str) -> bool:
    return (_folder(cache, name) / "refs" / "main").exists()


def _made(cache: Path, name: str) -> bool:
    import torch
    import transformers

    own = name.partition("/")[2]
    if own == "tiny-sd-pipe":
        return _published(cache, name, _pipeline())
    found = _CLASS.search(own)
    kind = getattr(transformers, CLASSES.get(own) or (found[1] if found else ""), None)
    if kind is None or own.endswith("-lora"):
        return False
    torch.manual_seed(0)
    try:
        defaults = kind.config_class()
        settings = type(defaults)(**{key: value for key, value in TINY.items() if hasattr(defaults, key)})
        if settings.is_encoder_decoder:
            settings.decoder_start_token_id = 0
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(settings).parameters())
        if size > _MOST:
            print(f"{name}: no tiny model ({size:,} parameters)")
            return False
        model = kind(settings)
    except Exception as error:  # a class whose sizes must fit in another way
        print(f"{name}: no tiny model ({error})")
        return False
    return _published(cache, name, model, _tokenizer())


def _published(cache: Path, name: str, *parts: Any) -> bool:
    """Saves what a repository holds under its name in the cache."""
    for part in parts:
        part.save_pretrained(_folder(cache, name) / "snapshots" / REVISION)
    reference = _folder(cache, name) / "refs" / "main"
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(REVISION)
    return True


def _pipeline() -> Any:
    """A Stable Diffusion pipeline."""
    sys.path.append(str(installed(*DIFFUSERS)))
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    attended = {"cross_attention_dim": 32, "attention_head_dim": 4, "layers_per_block": 1, "sample_size": 16}
    tokenizer = _tokenizer()
    tokenizer.model_max_length = 77
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **sizes,
            **attended,
        ),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **sizes
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=VOCABULARY, **text)),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _tokenizer() -> Any:
    """A tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)
