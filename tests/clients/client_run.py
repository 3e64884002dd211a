"""Uses libraries that call PEFT, in a process of its own, and writes down what they give.

    python client_run.py {peft,as-peft,nbpeft} RESULTS.json CASE...

``as-peft`` is nbpeft by the name ``peft``, ``nbpeft`` its configs by their own name. A result is a list of numbers
and names.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.clients import diffusers_pipelines as diffusers_pipelines  # registers its cases
from tests.clients.cases import CASES, case, config, refused

# transformers


def llama() -> Any:
    from tests import tiny_models

    return tiny_models.llama().eval()


def logits(model: Any) -> list[float]:
    """A few numbers of the output."""
    with torch.no_grad():
        values: list[float] = model(torch.arange(6)[None] + 3).logits[0, -1, :5].tolist()
    return values


@case
def transformers_adapters(peft: Any, folder: str) -> list[Any]:
    """Adapters added, switched off, switched and taken out."""
    model = llama()
    found = [logits(model)]
    model.add_adapter(config(peft), adapter_name="one")
    found.append(logits(model))
    model.disable_adapters()
    found.append(logits(model))
    model.enable_adapters()
    model.add_adapter(config(peft, 8, 1), adapter_name="two")
    model.set_adapter("two")
    found += [logits(model), model.active_adapters(), sorted(model.peft_config)]
    model.set_adapter(["one", "two"])
    found += [logits(model), sorted(model.get_adapter_state_dict("one"))]
    model.delete_adapter("two")
    model.set_adapter("one")
    return [*found, logits(model), sorted(model.peft_config)]


@case
def transformers_files(peft: Any, folder: str) -> list[Any]:
    """An adapter saved, and read by another model and from its folder alone."""
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(f"{folder}/base")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/base").eval()
    model.add_adapter(config(peft), adapter_name="one")
    model.save_pretrained(f"{folder}/adapter")
    files = sorted(path.name for path in Path(folder, "adapter").iterdir() if path.suffix != ".md")
    other = llama()
    other.load_adapter(f"{folder}/adapter", adapter_name="read")
    whole = AutoModelForCausalLM.from_pretrained(f"{folder}/adapter").eval()
    assert logits(other) == logits(whole) == logits(model) != logits(llama())
    return [logits(model), files, other.active_adapters(), type(whole).__name__]


@case
def transformers_whole_modules(peft: Any, folder: str) -> list[Any]:
    """A head trained as a whole and trained token rows, saved and read by another model."""
    found: list[Any] = []
    for rows in (None, [3, 5]):
        model = llama()
        fields = {"modules_to_save": ["lm_head"], "trainable_token_indices": rows}
        model.add_adapter(config(peft, target_modules=["q_proj"], **fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name or "trainable_tokens_delta" in name:
                    parameter.mul_(1.5)
        model.save_pretrained(folder)
        other = llama()
        loaded = other.load_adapter(folder, is_trainable=True)
        assert logits(other) == logits(model) != logits(llama())
        found += [logits(other), sorted(loaded.missing_keys), sorted(loaded.unexpected_keys)]
        found.append(sorted(name for name, parameter in other.named_parameters() if parameter.requires_grad))
    return found


@case
def transformers_experts(peft: Any, folder: str) -> list[Any]:
    """An adapter of a mixture that was saved when its experts were linear layers."""
    from tests.former_adapters import file_of_then
    from tests.tiny_models import mixture

    file_of_then(Path(folder), "mixtral")
    model = mixture("mixtral")
    found = [logits(model)]
    model.load_adapter(folder, adapter_name="one")
    return [*found, logits(model)]


@case
def transformers_hotswap(peft: Any, folder: str) -> list[Any]:
    """An adapter read into the place of another."""
    for seed in (0, 1):
        model = llama()
        model.add_adapter(config(peft, seed=seed))
        model.save_pretrained(f"{folder}/{seed}")
    model = llama()
    model.load_adapter(f"{folder}/0", adapter_name="only")
    first = logits(model)
    model.load_adapter(f"{folder}/1", adapter_name="only", hotswap=True)
    return [first, logits(model)]


@case
def transformers_trainer(peft: Any, folder: str) -> list[Any]:
    """A model with an added adapter, trained by the Trainer."""
    from transformers import Trainer, TrainingArguments

    model = llama()
    model.add_adapter(config(peft, lora_dropout=0.0))
    rows = [{"input_ids": [3 + row, 4, 5, 6], "labels": [3 + row, 4, 5, 6]} for row in range(8)]
    arguments = TrainingArguments(
        output_dir=folder, max_steps=4, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, seed=0
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model(f"{folder}/out")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [losses, sorted(path.name for path in Path(folder, "out").glob("*.safetensors"))]


@case
def transformers_pipeline(peft: Any, folder: str) -> list[Any]:
    """Text generated by a pipeline on the folder of an adapter."""
    from transformers import AutoModelForCausalLM, pipeline

    from tests.training.trl_run import tiny_base, tiny_tokenizer

    tiny_base().save_pretrained(f"{folder}/base")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    adapted = peft.get_peft_model(model, config(peft, task_type="CAUSAL_LM"))
    adapted.save_pretrained(f"{folder}/adapter")
    write = pipeline("text-generation", model=f"{folder}/adapter", tokenizer=tiny_tokenizer(), device="cpu")
    return [write("w1 w2 w3", max_new_tokens=5, do_sample=False)[0]["generated_text"]]


# diffusers


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    sizes = {"block_out_channels": (4, 8), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": 8}
    return UNet2DConditionModel(**blocks, **sizes, norm_num_groups=2, attention_head_dim=2).eval()


def noise(model: Any) -> list[float]:
    """A few numbers of the output."""
    with torch.no_grad():
        values: list[float] = model(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 3, 8)).sample[0, :, 3, 3].tolist()
    return values


def attention(peft: Any, rank: int = 4, seed: int = 0) -> Any:
    return config(peft, rank, seed, target_modules=["to_q", "to_k"])


@case
def diffusers_adapters(peft: Any, folder: str) -> list[Any]:
    """Adapters of a UNet added, switched off, weighted and taken out."""
    model = unet()
    found = [noise(model)]
    model.add_adapter(attention(peft), "one")
    found.append(noise(model))
    model.disable_lora()
    found.append(noise(model))
    model.enable_lora()
    model.add_adapter(attention(peft, 2, 1), "two")
    model.set_adapters(["one", "two"], [0.5, 2.0])
    found += [noise(model), model.active_adapters()]
    model.delete_adapters("two")
    return [*found, noise(model)]


@case
def diffusers_fused(peft: Any, folder: str) -> list[Any]:
    """An adapter fused at half its strength and taken out again."""
    model = unet()
    model.add_adapter(attention(peft), "one")
    model.fuse_lora(lora_scale=0.5, safe_fusing=True)
    fused = noise(model)
    model.unfuse_lora()
    return [fused, noise(model)]


@case
def diffusers_hotswap(peft: Any, folder: str) -> list[Any]:
    """An adapter read, and one of another rank read into its place."""
    file = {"weight_name": "pytorch_lora_weights.safetensors", "prefix": None, "adapter_name": "only"}
    for name, rank in (("four", 4), ("eight", 8)):
        model = unet()
        model.add_adapter(attention(peft, rank, rank), "only")
        model.save_lora_adapter(f"{folder}/{name}", adapter_name="only")
    model = unet()
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(f"{folder}/four", **file)
    first = noise(model)
    model.load_lora_adapter(f"{folder}/eight", hotswap=True, **file)
    return [first, noise(model)]


def stable_diffusion() -> Any:
    """A pipeline of a UNet and a text encoder with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 50, "max_position_embeddings": 8}
    text = CLIPTextModel(CLIPTextConfig(num_attention_heads=2, num_hidden_layers=2, **size)).eval()
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2)
    absent = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor"))
    parts = {"vae": vae, "text_encoder": text, "unet": unet(), "scheduler": DDIMScheduler()}
    return StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)


def outputs(pipeline: Any) -> list[list[float]]:
    """A few numbers of the outputs of its UNet and its text encoder."""
    with torch.no_grad():
        text = pipeline.text_encoder(torch.arange(6)[None])[0][0, -1, :4].tolist()
    return [noise(pipeline.unet), text]


def trained_lora(peft: Any, folder: str) -> dict[str, str]:
    """Saves LoRA weights of both, and returns what else loading them takes."""
    from diffusers.utils import convert_state_dict_to_diffusers

    trained = stable_diffusion()
    trained.unet.add_adapter(attention(peft), "default")
    trained.text_encoder.add_adapter(config(peft, target_modules=["q_proj"]))
    layers = [
        convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(part))
        for part in (trained.unet, trained.text_encoder)
    ]
    trained.save_lora_weights(folder, unet_lora_layers=layers[0], text_encoder_lora_layers=layers[1])
    return {"weight_name": "pytorch_lora_weights.safetensors"}


@case
def diffusers_pipeline(peft: Any, folder: str) -> list[Any]:
    """LoRA weights of a UNet and a text encoder saved, read, fused, weighted and unloaded by a pipeline."""
    file, read = trained_lora(peft, folder), stable_diffusion()
    found = [outputs(read)]
    read.load_lora_weights(folder, adapter_name="read", **file)
    found.append(outputs(read))
    read.fuse_lora()
    found.append(outputs(read))
    read.unfuse_lora()
    read.set_adapters("read", 0.5)
    found.append(outputs(read))
    read.unload_lora_weights()
    return [*found, outputs(read)]


@case
def diffusers_loaded_again(peft: Any, folder: str) -> list[Any]:
    """LoRA weights unloaded and read again by a pipeline, also while they are fused."""
    file, pipeline = trained_lora(peft, folder), stable_diffusion()
    found: list[Any] = []
    for name in (None, None, "named"):
        pipeline.load_lora_weights(folder, adapter_name=name, **file)
        found += [outputs(pipeline), pipeline.get_list_adapters()]
        pipeline.unload_lora_weights()
        found += [outputs(pipeline), pipeline.get_list_adapters()]
    pipeline.load_lora_weights(folder, **file)
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.unload_lora_weights()
    found.append(outputs(pipeline))
    pipeline.load_lora_weights(folder, adapter_name="hot", **file)
    pipeline.unet.load_lora_adapter(folder, prefix="unet", adapter_name="hot", hotswap=True, **file)
    return [*found, outputs(pipeline)]


@case
def diffusers_deleted(peft: Any, folder: str) -> list[Any]:
    """Adapters deleted by a pipeline, and others read in their place."""
    file, pipeline = trained_lora(peft, folder), stable_diffusion()
    found: list[Any] = []
    for name in ("one", "one", None, None):
        pipeline.load_lora_weights(folder, adapter_name=name, **file)
        found += [outputs(pipeline), pipeline.get_list_adapters()]
        if name is not None:
            pipeline.delete_adapters(name)
            found += [outputs(pipeline), pipeline.get_list_adapters()]
    pipeline.set_adapters(["default_0", "default_1"], [0.5, 0.7])
    found.append(outputs(pipeline))
    pipeline.delete_adapters("default_0")
    found += [outputs(pipeline), pipeline.get_active_adapters()]
    pipeline.disable_lora()
    return [*found, outputs(pipeline)]


@case
def diffusers_unloaded_model(peft: Any, folder: str) -> list[Any]:
    """Adapters of models of several pipelines added, saved, unloaded and read again."""
    found: list[Any] = []
    for model, inputs in (sd3(), flux(), sdxl()):
        model.add_adapter(attention(peft), "one")
        model.save_lora_adapter(f"{folder}/{type(model).__name__}", adapter_name="one")
        found.append(first_of(model, inputs))
        model.unload_lora()
        found.append(first_of(model, inputs))
        for name in ("one", "two"):
            model.load_lora_adapter(
                f"{folder}/{type(model).__name__}", prefix=None, adapter_name=name,
                weight_name="pytorch_lora_weights.safetensors",
            )  # fmt: skip
        model.set_adapters(["one", "two"], [0.5, 0.25])
        found.append(first_of(model, inputs))
        model.fuse_lora()
        found.append(first_of(model, inputs))
        model.unfuse_lora()
        model.delete_adapters(["one", "two"])
        model.add_adapter(attention(peft, 2, 1), "one")
        found.append(first_of(model, inputs))
    return found


def first_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[float]:
    """A few numbers of the output."""
    with torch.no_grad():
        values: list[float] = model(**inputs, return_dict=False)[0].flatten()[:5].tolist()
    return values


def sd3() -> tuple[Any, dict[str, torch.Tensor]]:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    texts = {"encoder_hidden_states": torch.ones(1, 3, 8), "pooled_projections": torch.ones(1, 8)}
    return model.eval(), {"hidden_states": torch.ones(1, 4, 8, 8), "timestep": torch.ones(1), **texts}


def flux() -> tuple[Any, dict[str, torch.Tensor]]:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    texts = {"encoder_hidden_states": torch.ones(1, 3, 8), "pooled_projections": torch.ones(1, 8)}
    places = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    return model.eval(), {"hidden_states": torch.ones(1, 4, 4), "timestep": torch.ones(1), **texts, **places}


def sdxl() -> tuple[Any, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    sizes = {"block_out_channels": (4, 8), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": 8}
    model = UNet2DConditionModel(
        **sizes, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=2, attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=32, transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    added = {"text_embeds": torch.ones(1, 8), "time_ids": torch.ones(1, 6)}
    inputs = {"sample": torch.ones(1, 4, 8, 8), "timestep": 1, "encoder_hidden_states": torch.ones(1, 3, 8)}
    return model.eval(), {**inputs, "added_cond_kwargs": added}


@case
def diffusers_offloaded(peft: Any, folder: str) -> list[Any]:
    """Hooks of accelerate and diffusers that keep weights elsewhere, on a model with adapters."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module
    from diffusers.hooks import apply_group_offloading

    model, cpu = unet(), torch.device("cpu")
    model.add_adapter(attention(peft), "one")
    found = [noise(model)]
    cpu_offload(model, cpu, offload_buffers=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    found.append(noise(model))
    remove_hook_from_module(model, recurse=True)
    found.append(noise(model))
    for kind in ("leaf_level", "block_level"):
        model = unet()
        model.add_adapter(attention(peft), "one")
        apply_group_offloading(model, cpu, offload_device=cpu, offload_type=kind, num_blocks_per_group=1)
        found.append(noise(model))
        model.delete_adapters("one")
        model.add_adapter(attention(peft, 2, 1), "one")
        found.append(noise(model))
    return found


@case
def diffusers_casts(peft: Any, folder: str) -> list[Any]:
    """Weights kept in 8 bits between calls, those of adapters with them."""
    from diffusers.hooks import apply_layerwise_casting

    found: list[Any] = []
    eight = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    for adapters in (0, 1):
        model = unet()
        for name in ["one"][:adapters]:
            model.add_adapter(attention(peft), name)
        model.enable_layerwise_casting(**eight)
        found += [noise(model), sorted({str(parameter.dtype) for parameter in model.parameters()})]
    model = unet()
    model.add_adapter(attention(peft), "one")
    apply_layerwise_casting(model, **eight, skip_modules_pattern=("norm",))
    kept = {str(parameter.dtype) for name, parameter in model.named_parameters() if "lora" in name}
    return [*found, noise(model), sorted(kept)]


@case
def diffusers_configs(peft: Any, folder: str) -> list[Any]:
    """The config of an adapter that was read, whose metadata has one, and what is drawn after reading it."""
    fields = {"target_modules": ["to_q", "to_v"], "exclude_modules": ["attn2.to_v"], "lora_alpha": 7}
    model = unet()
    model.add_adapter(config(peft, 3, **fields), "one")
    model.save_lora_adapter(folder, adapter_name="one")
    found: list[Any] = [noise(model)]
    for low in (True, False):
        model = unet()
        model.load_lora_adapter(
            folder, prefix=None, adapter_name="read", low_cpu_mem_usage=low,
            weight_name="pytorch_lora_weights.safetensors",
        )  # fmt: skip
        read = model.peft_config["read"].to_dict()
        found += [{key: sorted(value) if isinstance(value, set) else value for key, value in read.items()}]
        found += [noise(model), torch.rand(1).item()]
    return found


@case
def diffusers_refusals(peft: Any, folder: str) -> list[Any]:
    """Adapters that do not fit, or whose name is taken: the kinds of the errors, and the model afterwards."""
    model = unet()
    model.add_adapter(attention(peft), "one")
    tensors = peft.get_peft_model_state_dict(model, adapter_name="one")
    found: list[Any] = [refused(ValueError, model.add_adapter, attention(peft), "one")]
    narrow = {key: value[:, :3] if "lora_A" in key else value for key, value in tensors.items()}
    for given, name, kind in ((tensors, "one", ValueError), (narrow, "two", RuntimeError), (tensors, "two", None)):
        found.append(refused(kind, model.load_lora_adapter, given, prefix=None, adapter_name=name))
        found.append(sorted(model.peft_config))
    return [*found, noise(model)]


@case
def diffusers_lokr(peft: Any, folder: str) -> list[Any]:
    """Factors of LoKr as LyCORIS saves them, read, fused and unloaded."""
    from peft.tuners.lokr.layer import LoKrLayer, factorization

    model, tensors = unet(), {}
    for path, module in model.named_modules():
        if path.endswith(("to_q", "to_v")):
            (out, more), (inputs, rest) = (factorization(size, 2) for size in module.weight.shape)
            tensors[f"{path}.lokr_w1"], tensors[f"{path}.lokr_w2"] = torch.randn(out, inputs), torch.randn(more, rest)
    found: list[Any] = [noise(model)]
    model.load_lora_adapter(tensors, prefix=None, adapter_name="one")
    found += [noise(model), sum(isinstance(module, LoKrLayer) for module in model.modules())]
    model.fuse_lora()
    found.append(noise(model))
    model.unload_lora()
    return [*found, noise(model)]


# sentence-transformers


@case
def sentence_transformers(peft: Any, folder: str) -> list[Any]:
    """An adapter on a sentence encoder, saved and read by another."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel

    from tests.training.trl_run import tiny_tokenizer

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=100, **size)).save_pretrained(f"{folder}/base")
    tiny_tokenizer().save_pretrained(f"{folder}/base")

    def made() -> Any:
        return SentenceTransformer(modules=[models.Transformer(f"{folder}/base"), models.Pooling(16)], device="cpu")

    def encoded(model: Any) -> list[float]:
        values: list[float] = model.encode(["w1 w2"])[0][:5].tolist()
        return values

    model = made()
    found = [encoded(model)]
    model.add_adapter(config(peft, target_modules=["query"], task_type="FEATURE_EXTRACTION"))
    model.eval()
    found.append(encoded(model))
    if peft.__name__ == "nbpeft":  # what reads an adapter's folder looks for PEFT
        return [*found, found[-1], found[-1], model.active_adapters()]
    model.save_pretrained(f"{folder}/adapter")
    read = made()
    read.load_adapter(f"{folder}/adapter")
    return [
        *found,
        encoded(read),
        encoded(SentenceTransformer(f"{folder}/adapter", device="cpu")),
        model.active_adapters(),
    ]


# lm-eval


@case
def lm_eval_harness(peft: Any, folder: str) -> list[Any]:
    """Log-likelihoods of a model with an adapter: from its folder, and as an object."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tests.training.trl_run import tiny_base, tiny_tokenizer

    base, tokenizer = tiny_base(), tiny_tokenizer()
    base.save_pretrained(f"{folder}/base")
    tokenizer.save_pretrained(f"{folder}/base")
    adapted = peft.get_peft_model(tiny_base(), config(peft, task_type="CAUSAL_LM"))
    adapted.save_pretrained(f"{folder}/adapter")
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=("w1 w2", f" w{number} w5"), idx=number)
        for number in range(3)
    ]

    def found(model: Any) -> list[float]:
        return [value for value, _ in model.loglikelihood(asked, disable_tqdm=True)]

    shared = {"tokenizer": tokenizer, "device": "cpu", "batch_size": 2}
    read = found(HFLM(pretrained=f"{folder}/base", peft=f"{folder}/adapter", dtype="float32", **shared))
    return [read, found(HFLM(pretrained=adapted, **shared)), found(HFLM(pretrained=base, **shared))]


# torch, accelerate and bitsandbytes, which know nothing of PEFT and meet its models


@case
def torch_export(peft: Any, folder: str) -> list[Any]:
    """A model with an adapter, exported, and the program run."""
    model = peft.get_peft_model(llama(), config(peft)).eval()
    tokens = torch.arange(6)[None] + 3
    program = torch.export.export(model, (), {"input_ids": tokens, "use_cache": False}, strict=False)
    values: list[float] = program.module()(input_ids=tokens, use_cache=False).logits[0, -1, :5].tolist()
    return [values, logits(model)]


def batch() -> dict[str, torch.Tensor]:
    rows = torch.arange(12).reshape(2, 6) + 3
    return {"input_ids": rows, "labels": rows}


@case
def torch_accelerate(peft: Any, folder: str) -> list[Any]:
    """A loop of one's own, its state saved and read again."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = peft.get_peft_model(llama(), config(peft))
    optimizer = torch.optim.AdamW((part for part in model.parameters() if part.requires_grad), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(5):
        if step == 3:
            accelerator.save_state(f"{folder}/state")
        loss = model(**batch()).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.load_state(f"{folder}/state")
    again = model(**batch()).loss.item()
    accelerator.unwrap_model(model).save_pretrained(f"{folder}/adapter")
    return [losses, again, sorted(path.name for path in Path(folder, "adapter").glob("adapter_*"))]


@case
def torch_bitsandbytes(peft: Any, folder: str) -> list[Any]:
    """Steps of its 8-bit and paged optimizers, which run on the CPU in full precision or 8 bits."""
    import bitsandbytes

    found: list[Any] = []
    for kind in (bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.Lion8bit):
        model = peft.get_peft_model(llama(), config(peft))
        optimizer = kind([part for part in model.parameters() if part.requires_grad], lr=1e-2)
        losses = []
        for _ in range(3):
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    return found


@case
def transformers_seq2seq(peft: Any, folder: str) -> list[Any]:
    """T5 trained by Seq2SeqTrainer, evaluated by what it generates, and gone on with from a checkpoint."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

    def trained(steps: int, **more: Any) -> tuple[Any, list[float]]:
        torch.manual_seed(0)
        size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
        base = T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0, dropout_rate=0.0))
        fields = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
        model = peft.get_peft_model(base, config(peft, **fields))
        rows = [{"input_ids": [3 + row, 4, 5], "labels": [6, 7 + row, 1]} for row in range(4)]
        arguments = Seq2SeqTrainingArguments(
            output_dir=f"{folder}/out", max_steps=steps, save_steps=2, logging_steps=1, report_to="none", use_cpu=True,
            disable_tqdm=True, seed=0, predict_with_generate=True, generation_max_length=5, learning_rate=1e-2,
        )  # fmt: skip
        trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
        trainer.train(**more)
        return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    trainer, losses = trained(4)
    predicted = trainer.predict(trainer.eval_dataset).predictions.tolist()
    _, again = trained(4, resume_from_checkpoint=f"{folder}/out/checkpoint-2")
    assert again == losses
    return [losses, predicted, sorted(path.name for path in Path(folder, "out/checkpoint-2").glob("*.safetensors"))]


def main(library: str, results: str, *names: str) -> None:
    """Runs the cases; what fails is written in its place."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if library == "as-peft":
        from nbpeft import install_as_peft

        install_as_peft()
    peft = __import__("nbpeft" if library == "nbpeft" else "peft")
    if library == "peft":  # transformers 5.24 asks for a PEFT that is not released
        __import__("transformers.integrations.peft").integrations.peft.MIN_PEFT_VERSION = peft.__version__
    found: dict[str, Any] = {"library": peft.LoraConfig.__module__.partition(".")[0]}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = CASES[name](peft, folder)
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
