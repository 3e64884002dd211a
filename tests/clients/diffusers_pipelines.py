"""Cases of diffusers' pipelines: whole tiny pipelines of four architectures, with adapters on denoiser and text.

They take minutes and run by ``python -m tests.clients``, not with the other tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.clients.cases import case, config, refused

FILE = "pytorch_lora_weights.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""Parts of pipelines to which adapters are added."""


def _tokenizer() -> Any:
    from tests.training.trl_run import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    return tokenizer


def _clip(*, projected: bool = False, width: int = 8) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    size = {"hidden_size": width, "intermediate_size": 8, "vocab_size": 100, "max_position_embeddings": 8}
    fields = {"num_attention_heads": 2, "num_hidden_layers": 2, "projection_dim": width, "eos_token_id": 1}
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(CLIPTextConfig(**size, **fields)).eval()


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    return T5EncoderModel(T5Config(d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=100)).eval()


def _vae(channels: int = 4, **fields: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,), latent_channels=channels, norm_num_groups=2, **fields).eval()


def _unet(**fields: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    sizes = {"block_out_channels": (4, 8), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": 8}
    return UNet2DConditionModel(**{**blocks, **sizes, "norm_num_groups": 2, "attention_head_dim": 2, **fields}).eval()


def stable_diffusion() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    parts = {"vae": _vae(), "text_encoder": _clip(), "unet": _unet(), "scheduler": DDIMScheduler()}
    absent = dict.fromkeys(("safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(**parts, **absent, tokenizer=_tokenizer(), requires_safety_checker=False)


def stable_diffusion_xl() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    unet = _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4, cross_attention_dim=16,
        projection_class_embeddings_input_dim=32, transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    texts = {"text_encoder": _clip(), "text_encoder_2": _clip(projected=True)}
    tokenizers = dict.fromkeys(("tokenizer", "tokenizer_2"), _tokenizer())
    return StableDiffusionXLPipeline(vae=_vae(), unet=unet, scheduler=DDIMScheduler(), **texts, **tokenizers)


def stable_diffusion_3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=8, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    texts = {"text_encoder": _clip(projected=True), "text_encoder_2": _clip(projected=True), "text_encoder_3": _t5(16)}
    tokenizers = dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"), _tokenizer())
    scheduler = FlowMatchEulerDiscreteScheduler()
    vae = _vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0)
    return StableDiffusion3Pipeline(transformer=transformer.eval(), scheduler=scheduler, vae=vae, **texts, **tokenizers)


def flux(kind: str = "FluxPipeline", channels: int = 4) -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=channels, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    parts = {"vae": _vae(1, shift_factor=0.0), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    texts = {"text_encoder": _clip(), "text_encoder_2": _t5(8)}
    tokenizers = dict.fromkeys(("tokenizer", "tokenizer_2"), _tokenizer())
    return getattr(diffusers, kind)(transformer=transformer.eval(), **parts, **texts, **tokenizers)


PIPELINES: tuple[Callable[[], Any], ...] = (stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux)


def denoiser(pipeline: Any) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


def image(pipeline: Any, scale: float | None = None, **more: Any) -> list[float]:
    """A few numbers of the latents that a pipeline computes, with all its LoRA weights scaled."""
    import inspect

    given = inspect.signature(pipeline.__call__).parameters
    name = next(name for name in ("cross_attention_kwargs", "joint_attention_kwargs") if name in given)
    pipeline.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 8, "width": 8, "output_type": "latent"}
    if "max_sequence_length" in given:
        steps["max_sequence_length"] = 8
    scaled = {} if scale is None else {name: {"scale": scale}}
    drawn = torch.Generator().manual_seed(0)
    latents = pipeline("w1 w2 w3", generator=drawn, **steps, **scaled, **more).images
    values: list[float] = latents.float().flatten()[:6].tolist()
    return values


def adapted_parts(pipeline: Any) -> dict[str, Any]:
    """The parts of a pipeline that take adapters."""
    loadable = set(type(pipeline)._lora_loadable_modules)
    return {name: part for name in PARTS if name in loadable and (part := getattr(pipeline, name, None)) is not None}


def add(peft: Any, pipeline: Any, name: str = "default", rank: int = 4, seed: int = 0, **fields: Any) -> None:
    """Adds an adapter to the denoiser and the text encoders."""
    for part, module in adapted_parts(pipeline).items():
        targets = ["q_proj", "v_proj", "out_proj"] if part.startswith("text") else ATTENTION
        module.add_adapter(config(peft, rank, seed, **{"target_modules": targets, **fields}), adapter_name=name)


def save(peft: Any, pipeline: Any, folder: str, adapter: str = "default", **more: Any) -> None:
    """Saves the LoRA weights of a pipeline as its users do."""
    layers = {
        f"{part}_lora_layers": peft.utils.get_peft_model_state_dict(module, adapter_name=adapter)
        for part, module in adapted_parts(pipeline).items()
    }
    type(pipeline).save_lora_weights(save_directory=folder, **layers, **more)


def tensors_of(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder, FILE))


def is_adapted(module: torch.nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(part, BaseTunerLayer) for part in module.modules())


@contextlib.contextmanager
def logged(*names: str) -> Iterator[list[str]]:
    """The first words of what loggers of diffusers say, below its root."""
    import logging

    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(f"diffusers.{name}") for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


@case
def pipelines_whole(peft: Any, folder: str) -> list[Any]:
    """Adapters of four pipelines: scaled, saved, unloaded, read, fused, unfused, switched off and on."""
    found: list[Any] = []
    for number, made in enumerate(PIPELINES):
        own, pipeline = f"{folder}/{number}", made()
        found.append(image(pipeline))
        add(peft, pipeline)
        found += [image(pipeline), image(pipeline, 0.5), image(pipeline, 0.0)]
        save(peft, pipeline, own)
        pipeline.unload_lora_weights()
        found += [image(pipeline), [is_adapted(part) for part in adapted_parts(pipeline).values()]]
        pipeline.load_lora_weights(own, weight_name=FILE)
        found += [image(pipeline), pipeline.get_list_adapters(), pipeline.num_fused_loras]
        components = [*adapted_parts(pipeline)]
        pipeline.fuse_lora(components=components, lora_scale=0.7, safe_fusing=True)
        found += [image(pipeline), pipeline.num_fused_loras, sorted(pipeline.fused_loras)]
        pipeline.unfuse_lora(components=components)
        found += [image(pipeline), image(pipeline, 0.7), pipeline.num_fused_loras, sorted(pipeline.fused_loras)]
        pipeline.disable_lora()
        found.append(image(pipeline))
        pipeline.enable_lora()
        found.append(image(pipeline))
        pipeline.fuse_lora(components=components[:1])
        pipeline.unload_lora_weights()
        found += [image(pipeline), [is_adapted(part) for part in adapted_parts(pipeline).values()]]
    return found


@case
def pipelines_several(peft: Any, folder: str) -> list[Any]:
    """Several adapters of four pipelines: weighted, by block, fused by name, deleted, moved."""
    found: list[Any] = []
    for made in PIPELINES:
        pipeline = made()
        add(peft, pipeline, "one")
        add(peft, pipeline, "two", 2, 1)
        found.append(pipeline.get_list_adapters())
        for names, weights in (("one", None), ("two", 0.5), (["one", "two"], None), (["one", "two"], [0.3, 0.8])):
            pipeline.set_adapters(names, weights)
            found += [image(pipeline), image(pipeline, 0.5), pipeline.get_active_adapters()]
        found.append(refused(ValueError, pipeline.set_adapters, "three"))
        found.append(refused(ValueError, pipeline.set_adapters, ["one", "two"], [0.5]))
        components = [*adapted_parts(pipeline)]
        pipeline.set_lora_device(["one"], "cpu")
        pipeline.fuse_lora(components=components, adapter_names=["one"])
        found += [image(pipeline), sorted(pipeline.fused_loras)]
        pipeline.fuse_lora(components=components, adapter_names=["two"])
        found += [image(pipeline), sorted(pipeline.fused_loras)]
        pipeline.unfuse_lora(components=components)
        found += [image(pipeline), sorted(pipeline.fused_loras)]
        pipeline.fuse_lora(components=components, adapter_names=["two", "one"], lora_scale=2.0)
        found.append(image(pipeline))
        pipeline.unfuse_lora(components=components)
        pipeline.set_adapters("one")
        pipeline.delete_adapters("two")
        found += [image(pipeline), pipeline.get_list_adapters()]
        add(peft, pipeline, "two", 2, 1)
        pipeline.delete_adapters(["one", "two"])
        found += [image(pipeline), pipeline.get_list_adapters()]
        add(peft, pipeline, "one", 2, 1)
        found.append(image(pipeline))
    return found


@case
def pipelines_by_block(peft: Any, folder: str) -> list[Any]:
    """Weights of the blocks of a UNet and of single layers."""
    found: list[Any] = []
    for made in PIPELINES[:2]:
        pipeline = made()
        add(peft, pipeline, "one")
        add(peft, pipeline, "two", 2, 1)
        down = next(name for name, _ in pipeline.unet.down_blocks.named_children() if is_adapted(
            pipeline.unet.down_blocks[int(name)]))  # fmt: skip
        blocks = [
            {"unet": {"down": 0.5}},
            {"unet": {"down": {f"block_{down}": [0.3] * (1 if made is stable_diffusion else 2)}}},
            {"text_encoder": 2.0, "unet": {"up": 1.3, "mid": 0.0}},
            {"unet": 0.2},
        ]
        for weights in blocks:
            for given in (["one"], weights), (["one", "two"], [weights, 0.4]):
                with contextlib.suppress(ValueError):
                    pipeline.set_adapters(*given)
                found.append(image(pipeline))
        found.append(refused(ValueError, pipeline.set_adapters, ["one"], [{"unet": {"elsewhere": 1.0}}]))
    return found


@case
def pipelines_metadata(peft: Any, folder: str) -> list[Any]:
    """Configs in the metadata of a file, with ranks and alphas of their own for some layers, DoRA and biases."""
    found: list[Any] = []
    fields: list[dict[str, Any]] = [
        {"lora_alpha": 9},
        {"lora_alpha": 3, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 5}},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
    ]
    for number, (made, given) in enumerate((made, given) for made in PIPELINES for given in fields):
        pipeline = made()
        given = {key: {**value} if isinstance(value, dict) else value for key, value in given.items()}
        add(peft, pipeline, **given)
        parts = adapted_parts(pipeline)
        metadata = {
            f"{part}_lora_adapter_metadata": module.peft_config["default"].to_dict() for part, module in parts.items()
        }
        found.append(image(pipeline))
        for own, more in ((f"{folder}/{number}-with", metadata), (f"{folder}/{number}-without", {})):
            save(peft, pipeline, own, **more)
            for low in (True, False):
                read = made()
                with contextlib.suppress(ValueError, TypeError, RuntimeError):
                    read.load_lora_weights(own, weight_name=FILE, low_cpu_mem_usage=low)
                read_parts = [getattr(module, "peft_config", {}) for module in adapted_parts(read).values()]
                configs = [each.to_dict() for configs in read_parts for each in configs.values()]
                found += [image(read), [_plain(each) for each in configs]]
    return found


def _plain(value: Any) -> Any:
    """A config's dictionary with sets as lists, its keys in order, without what the targets are."""
    if isinstance(value, dict):
        return [[str(key), _plain(value[key])] for key in sorted(value, key=str) if key != "target_modules"]
    if isinstance(value, set | list | tuple):
        return sorted(map(str, value))
    return value if isinstance(value, int | float | str | None) else str(value)


@case
def pipelines_files(peft: Any, folder: str) -> list[Any]:
    """Files that lack tensors, have others, or belong to no part, and what is said about them."""
    found: list[Any] = []
    for number, made in enumerate(PIPELINES):
        pipeline = made()
        own = f"{folder}/{number}"
        add(peft, pipeline)
        save(peft, pipeline, own)
        tensors = tensors_of(own)
        part = "unet" if hasattr(pipeline, "unet") else "transformer"
        first = next(key for key in tensors if key.startswith(part) and "lora_A" in key)
        changed = {
            "whole": tensors,
            "missing": {key: value for key, value in tensors.items() if key != first},
            "more": {**tensors, first.replace("lora_A", "lora_A.more"): torch.ones(1)},
            "denoiser": {key: value for key, value in tensors.items() if key.startswith(part)},
            "texts": {key: value for key, value in tensors.items() if key.startswith("text_encoder.")},
            "alpha": {**tensors, first.replace("lora_A.weight", "alpha"): torch.tensor(2.0)},
            "no prefix": {
                key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(part)
            },
            "narrow": {**tensors, first: tensors[first][:, :3]},
            "half": {key: value.half() for key, value in tensors.items()},
            "nothing": {"elsewhere.weight": torch.ones(1)},
        }
        for kind, given in changed.items():
            pipeline = made()
            try:
                with logged("utils.peft_utils", "loaders.peft", "loaders.lora_pipeline") as said:
                    pipeline.load_lora_weights(dict(given))
                ended = "loaded"
            except Exception as error:
                ended = str(isinstance(error, RuntimeError))
            adapters = {
                name: sorted(getattr(module, "peft_config", {})) for name, module in adapted_parts(pipeline).items()
            }
            found += [
                kind,
                ended,
                [f"{message:.400}" for message in said if "size mismatch" not in message],
                [*map(str, adapters.items())],
                [] if kind == "missing" else image(pipeline),  # PEFT computes with memory that was never written
            ]
            dtypes = {str(value.dtype) for name, value in denoiser(pipeline).named_parameters() if "lora" in name}
            found.append(sorted(dtypes))
    return found


@case
def pipelines_checks(peft: Any, folder: str) -> list[Any]:
    """Values that are not finite when fused; adapters injected without memory; another padding; two names."""
    found: list[Any] = []
    for made in PIPELINES:
        pipeline = made()
        add(peft, pipeline, "broken")
        with torch.no_grad():
            for name, value in denoiser(pipeline).named_parameters():
                if "lora_A" in name:
                    value.fill_(float("inf"))
        found.append(refused(ValueError, pipeline.fuse_lora, components=[*adapted_parts(pipeline)], safe_fusing=True))
        pipeline.fuse_lora(components=[*adapted_parts(pipeline)], safe_fusing=False)
        found.append([value != value for value in image(pipeline)])
        pipeline = made()
        for module in adapted_parts(pipeline).values():
            targets = [*ATTENTION, "q_proj"]
            peft.inject_adapter_in_model(config(peft, target_modules=targets), module, low_cpu_mem_usage=True)
            found.append(sorted({parameter.device.type for parameter in module.parameters()}))
            meta = peft.utils.get_peft_model_state_dict(module)
            made_up = {key: torch.full(value.shape, 0.1) for key, value in meta.items()}
            answer = peft.set_peft_model_state_dict(module, made_up, low_cpu_mem_usage=True)
            found += [sorted({parameter.device.type for parameter in module.parameters()}), len(answer.unexpected_keys)]
        found.append(image(pipeline))
        if hasattr(pipeline, "unet"):
            for target in ([*ATTENTION], [*ATTENTION, "conv_in", "conv1"]):
                pipeline = made()
                pipeline.unet.add_adapter(config(peft, target_modules=target), "one")
                for module in (*pipeline.unet.modules(), *pipeline.vae.modules()):
                    if isinstance(module, torch.nn.Conv2d):
                        module.padding_mode = "circular"
                        if hasattr(module, "lora_layer") and module.lora_layer is None:
                            module.lora_layer = lambda *given: 0
                found.append(image(pipeline))
    return found


def _control_weights(inner: int) -> tuple[dict[str, torch.Tensor], ...]:
    """A LoRA of the wider input, one of the model's own, one of another layer, and weights of norms."""
    wide = {
        "transformer.x_embedder.lora_A.weight": torch.randn(4, 8) / 4,
        "transformer.x_embedder.lora_B.weight": torch.randn(inner, 4) / 4,
    }
    narrow = {
        "transformer.x_embedder.lora_A.weight": torch.randn(4, 4) / 4,
        "transformer.x_embedder.lora_B.weight": torch.randn(inner, 4) / 4,
    }
    elsewhere = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.randn(4, inner) / 4,
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.randn(inner, 4) / 4,
    }
    norms = {
        "transformer.transformer_blocks.0.attn.norm_q.weight": torch.randn(8),
        "transformer.transformer_blocks.0.attn.norm_k.weight": torch.randn(8),
    }
    return wide, narrow, elsewhere, norms


@case
def pipelines_control(peft: Any, folder: str) -> list[Any]:
    """Flux with weights whose inputs are wider than the model's (control), and norms in the file."""
    from PIL import Image

    pipeline = flux("FluxControlPipeline")
    control = {"control_image": Image.new("RGB", (8, 8), "red")}
    inner = pipeline.transformer.inner_dim
    torch.manual_seed(5)
    found: list[Any] = []
    wide, narrow, elsewhere, norms = _control_weights(inner)

    def state() -> list[Any]:
        transformer = pipeline.transformer
        embedder = transformer.x_embedder
        weight = getattr(embedder, "base_layer", embedder).weight
        run = image(pipeline, **control) if transformer.config.in_channels == 8 else []
        return [run, [*weight.shape], weight.flatten()[:3].tolist(), transformer.config.in_channels]

    found += state()
    for first, second in (
        (wide, None),
        (wide, elsewhere),
        (elsewhere, wide),
        (wide, narrow),
        (wide, norms),
    ):
        pipeline = flux("FluxControlPipeline")
        for name, given in (("first", first), ("second", second)):
            if given is not None:
                try:
                    pipeline.load_lora_weights({**given}, adapter_name=name)
                except Exception as error:
                    found.append(type(error).__name__)
                found += state()
        for names, weights in (["first"], None), (["second"], None), (["first", "second"], [0.5, 0.3]):
            with contextlib.suppress(ValueError):
                pipeline.set_adapters(names, weights)
            found += state()
        with contextlib.suppress(ValueError, RuntimeError):
            pipeline.fuse_lora()
            found += state()
        with contextlib.suppress(ValueError, RuntimeError):
            pipeline.unfuse_lora()
        found += state()
        pipeline.unload_lora_weights(reset_to_overwritten_params=second is not elsewhere)
        found += [*state(), is_adapted(pipeline.transformer)]
        with contextlib.suppress(RuntimeError, ValueError):
            pipeline.load_lora_weights({**first}, adapter_name="again")
        found += state()
    return found


@case
def pipelines_hotswap(peft: Any, folder: str) -> list[Any]:
    """Weights of another rank read into the place of others by a pipeline, compiled or not."""
    import torch._dynamo

    found: list[Any] = []
    for number, made in enumerate(PIPELINES):
        for name, rank in (("small", 2), ("large", 6)):
            pipeline = made()
            targets = [*ATTENTION, "proj_out"] if name == "small" else ATTENTION
            part = denoiser(pipeline)
            part.add_adapter(config(peft, rank, rank, lora_alpha=rank, target_modules=targets))
            kind = "unet" if hasattr(pipeline, "unet") else "transformer"
            layers = {f"{kind}_lora_layers": peft.utils.get_peft_model_state_dict(part)}
            type(pipeline).save_lora_weights(save_directory=f"{folder}/{number}/{name}", **layers)
        for compiled in (False, True):
            pipeline = made()
            found.append(
                refused(
                    ValueError,
                    pipeline.load_lora_weights,
                    f"{folder}/{number}/small",
                    weight_name=FILE,
                    hotswap=True,
                    adapter_name="hot",
                )
            )
            pipeline.enable_lora_hotswap(target_rank=6)
            pipeline.load_lora_weights(f"{folder}/{number}/small", weight_name=FILE, adapter_name="hot")
            part = denoiser(pipeline)
            if compiled:
                torch._dynamo.reset()
                part.compile(backend="eager", dynamic=False)
            found.append(image(pipeline))
            with torch._dynamo.config.patch(error_on_recompile=compiled):
                pipeline.load_lora_weights(
                    f"{folder}/{number}/large", weight_name=FILE, adapter_name="hot", hotswap=True
                )
                found.append(image(pipeline))
            found.append(
                refused(
                    RuntimeError,
                    pipeline.load_lora_weights,
                    f"{folder}/{number}/small",
                    weight_name=FILE,
                    adapter_name="hot",
                    hotswap=True,
                )
            )
            found.append(refused(RuntimeError, pipeline.enable_lora_hotswap, target_rank=8))
    return found


@case
def pipelines_hooks(peft: Any, folder: str) -> list[Any]:
    """Casts between calls under autocast, offloading in groups, and adapters added and deleted meanwhile."""
    from diffusers.hooks import apply_group_offloading

    found: list[Any] = []
    cpu = torch.device("cpu")
    for number, made in enumerate(PIPELINES):
        pipeline = made()
        add(peft, pipeline)
        save(peft, pipeline, f"{folder}/{number}")
        for autocast in (False, True):
            for storage in (torch.float8_e4m3fn, torch.bfloat16):
                pipeline = made()
                add(peft, pipeline)
                part = denoiser(pipeline)
                part.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
                found.append(
                    sorted({f"{name.partition('.')[0]} {value.dtype}" for name, value in part.named_parameters()})
                )
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    found.append([round(value, 2) for value in image(pipeline)] if autocast else image(pipeline))
        for kind in ("leaf_level", "block_level"):
            pipeline = made()
            part = denoiser(pipeline)
            pipeline.load_lora_weights(f"{folder}/{number}", weight_name=FILE, adapter_name="one")
            apply_group_offloading(part, cpu, offload_device=cpu, offload_type=kind, num_blocks_per_group=1)
            found.append(image(pipeline))
            pipeline.load_lora_weights(f"{folder}/{number}", weight_name=FILE, adapter_name="two")
            pipeline.set_adapters(["one", "two"], [0.2, 0.5])
            found.append(image(pipeline))
            pipeline.delete_adapters("one")
            found.append(image(pipeline))
            pipeline.unload_lora_weights()
            found.append(image(pipeline))
    return found


@case
def pipelines_trained(peft: Any, folder: str) -> list[Any]:
    """Steps of training as diffusers' examples take them, their weights cast, saved and read."""
    from diffusers.training_utils import _collate_lora_metadata, cast_training_params

    found: list[Any] = []
    for number, made in enumerate(PIPELINES):
        pipeline = made()
        for part in adapted_parts(pipeline).values():
            part.requires_grad_(False)
        torch.manual_seed(0)
        add(peft, pipeline, init_lora_weights="gaussian")
        for part in adapted_parts(pipeline).values():
            part.to(torch.bfloat16)
        cast_training_params([*adapted_parts(pipeline).values()], dtype=torch.float32)
        part = denoiser(pipeline)
        part.enable_gradient_checkpointing()
        part.train()
        learned = [value for value in part.parameters() if value.requires_grad]
        found.append([len(learned), sorted({str(value.dtype) for value in part.parameters()})])
        found.append(sorted(_collate_lora_metadata({"unet": part})))
        part.to(torch.float32)
        optimizer = torch.optim.AdamW(learned, lr=1e-2)
        for _ in range(3):
            loss = loss_of(part)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        save(peft, pipeline, f"{folder}/{number}")
        read = made()
        read.load_lora_weights(f"{folder}/{number}", weight_name=FILE)
        found.append(image(read))
    return found


@case
def pipelines_half(peft: Any, folder: str) -> list[Any]:
    """Pipelines in half precision, with adapters added and read from files of either precision."""
    found: list[Any] = []

    def state(pipeline: Any) -> list[Any]:
        named = [one for part in adapted_parts(pipeline).values() for one in part.named_parameters()]
        dtypes = [{str(value.dtype) for name, value in named if ("lora_" in name) is ours} for ours in (True, False)]
        return [sorted(dtypes[0]), sorted(dtypes[1]), [round(value, 1) for value in image(pipeline)]]

    for number, made in enumerate((stable_diffusion, flux)):
        pipeline = made().to(torch.bfloat16)
        add(peft, pipeline)
        found.append(state(pipeline))
        for dtype in (torch.bfloat16, torch.float32):
            own = f"{folder}/{number}-{dtype}"
            save(peft, pipeline.to(dtype), own)
            for low in (True, False):
                read = made().to(torch.bfloat16)
                read.load_lora_weights(own, weight_name=FILE, low_cpu_mem_usage=low)
                found.append([str(dtype), low, state(read)])
                read.fuse_lora()
                found.append(state(read))
                read.unload_lora_weights()
                found.append(state(read))
                read.to(torch.float32)
                add(peft, read, "after")
                found.append(state(read))
    return found


def loss_of(model: Any) -> torch.Tensor:
    """A loss of a denoiser on fixed inputs."""
    torch.manual_seed(3)
    kind = type(model).__name__
    width = model.config.cross_attention_dim if kind.startswith("UNet") else model.config.joint_attention_dim
    inputs: dict[str, Any] = {"timestep": torch.ones(1), "encoder_hidden_states": torch.randn(1, 3, width)}
    if kind.startswith("UNet"):
        inputs["sample"] = torch.randn(1, 4, 8, 8)
        if model.config.addition_embed_type == "text_time":
            inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 8), "time_ids": torch.ones(1, 6)}
    else:
        flat = kind.startswith("Flux")
        inputs["hidden_states"] = torch.randn(1, 4, 4) if flat else torch.randn(1, 4, 8, 8)
        inputs["pooled_projections"] = torch.randn(1, model.config.pooled_projection_dim)
        if flat:
            inputs |= {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    output: torch.Tensor = model(**inputs, return_dict=False)[0]
    return output.pow(2).mean()
