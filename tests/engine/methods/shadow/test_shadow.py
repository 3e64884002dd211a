"""ShadowPEFT: start, losses, files and caches are PEFT's; what it cannot do is refused in one line."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel, T5Config, T5ForConditionalGeneration

import nbpeft
from nbpeft.errors import AdapterError, ConfigError, MergeError, NbpeftError
from nbpeft.memory import forecast
from nbpeft.memory.architecture import architecture_of
from tests.closeness import assert_approximates, assert_close
from tests.memory.measured_peak import SHAPES, real_peak
from tests.tiny_models import LLAMA, classifier, gpt2, llama, logits, randomize, same_state, state, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
GENERATE: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
CLASSES = torch.tensor([0, 2])


def wide(**changes: Any) -> Any:
    return llama(**{"initializer_range": 0.3} | changes)


def calm_gpt2() -> Any:
    return gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (llama, {}),
    "smaller": (llama, {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_intermediate_size": 24}),
    "own-embedding": (llama, {"share_embeddings": False, "shadow_num_hidden_layers": 2, "update_hidden_size": 5}),
    "head-too": (llama, {"modules_to_save": ["lm_head"], "auxiliary_loss_weight": 0.5, "init_weights": False}),
    "one-block": (llama, {"layers_to_transform": [0]}),
    "no-loss": (llama, {"auxiliary_loss_weight": 0.0, "shadow_dropout": 0.0}),
    "gpt2": (calm_gpt2, {}),
    "classifier": (classifier, {"task_type": "SEQ_CLS"}),
}
EACH = pytest.mark.parametrize("case", CASES)


def shadowed(base: Any = None, name: str = "default", **changes: Any) -> Any:
    """A model with an adapter that changes what it gives."""
    fields = {"task_type": "CAUSAL_LM", "shadow_alpha": 1.0, "init_weights": False} | changes
    torch.manual_seed(1)
    return nbpeft.get_peft_model(wide() if base is None else base, nbpeft.ShadowConfig(**fields), name).eval()


def pair(case: str) -> tuple[Any, Any]:
    base, changes = CASES[case]
    made = []
    for library in (nbpeft, peft):
        torch.manual_seed(1)
        config = library.ShadowConfig(**{"task_type": "CAUSAL_LM"} | changes)  # type: ignore[attr-defined]
        made.append(library.get_peft_model(base(), config))  # type: ignore[attr-defined]
    return made[0], made[1]


def steps(model: Any, labels: Tensor) -> tuple[list[float], Tensor]:
    torch.manual_seed(5)
    model.train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=5e-3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, torch.get_rng_state()


def gradients(model: Any, call: Callable[[Any], Tensor] | None = None) -> dict[str, Tensor]:
    model.train()
    torch.manual_seed(3)
    loss = model(input_ids=tokens(), labels=tokens()).loss if call is None else call(model)
    loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def refused(call: Callable[[], Any], words: str, error: type[NbpeftError] = NbpeftError) -> None:
    with pytest.raises(error, match=words) as raised:
        call()
    assert "\n" not in str(raised.value)


@EACH
def test_start_training_and_files_are_those_of_peft(case: str, tmp_path: Path) -> None:
    ours, theirs = pair(case)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    base = CASES[case][0]
    assert case == "head-too" or torch.equal(logits(ours), logits(base()))
    labels = CLASSES if case == "classifier" else tokens()
    (found, generator), (wanted, other) = steps(ours, labels), steps(theirs, labels)
    assert_close(found, wanted)
    assert torch.equal(generator, other) and wanted[-1] < wanted[0]
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    saved, those = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert saved.keys() == those.keys() == nbpeft.get_peft_model_state_dict(ours).keys()
    for key, value in those.items():
        assert_close(saved[key], value)
    expected = logits(ours.eval())
    for library, who in ((nbpeft, "theirs"), (peft, "ours"), (nbpeft, "ours")):
        again = library.PeftModel.from_pretrained(base(), tmp_path / who).eval()  # type: ignore[attr-defined]
        assert_close(logits(again), expected)


@pytest.mark.parametrize("case", ["llama", "classifier"])
def test_gradients_and_the_loss_of_the_network_are_those_of_peft(case: str) -> None:
    found, outputs = [], []
    for model in pair(case):
        labels = CLASSES if case == "classifier" else tokens()
        torch.manual_seed(3)
        outputs.append(model.train()(input_ids=tokens(), labels=labels))
        outputs[-1].loss.backward()
        shadow = model.base_model.shadow_backbone["default"]
        found.append({name: one.grad for name, one in shadow.named_parameters()})
    assert found[0].keys() == found[1].keys() and all(one is not None for one in found[0].values())
    for name, gradient in found[1].items():
        assert_close(found[0][name], gradient)
    assert_close(outputs[0].shadow_loss, outputs[1].shadow_loss)
    assert not outputs[0].shadow_loss.requires_grad


def test_the_loss_of_a_call_without_gradient_is_that_of_the_model() -> None:
    model = shadowed(auxiliary_loss_weight=2.0)
    with torch.no_grad():
        measured = model(input_ids=tokens(), labels=tokens())
    learned = model(input_ids=tokens(), labels=tokens())
    own = model.base_model.last_shadow_loss
    assert own is learned.shadow_loss and torch.equal(own, measured.shadow_loss)
    assert_close(learned.loss.detach(), measured.loss + 2.0 * own)
    as_tuple = model(input_ids=tokens(), labels=tokens(), return_dict=False)
    assert_close(as_tuple[0], learned.loss)
    # Of batches whose gradients are accumulated each counts for its share of the tokens.
    half = model(input_ids=tokens(), labels=tokens(), num_items_in_batch=torch.tensor(32))
    assert_close(half.loss, learned.loss / 2)
    model(input_ids=tokens())
    assert model.base_model.last_shadow_loss is None


@pytest.mark.parametrize("changes", [{}, {"shadow_hidden_size": 16}, {"share_embeddings": False}], ids=str)
@torch.no_grad()
def test_generate_with_a_cache_gives_what_it_gives_without(changes: dict[str, Any]) -> None:
    model, ids = shadowed(**changes), tokens()
    for options in ({}, {"num_beams": 3}):
        cached, plain = (model.generate(input_ids=ids, **GENERATE, **options, use_cache=use) for use in (True, False))
        assert torch.equal(cached, plain)
    short = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1, :5]], 1)
    mask = (torch.arange(9) >= torch.tensor([[4], [0]])).long()
    found = model.generate(input_ids=torch.cat([short, ids[1:]]), attention_mask=mask, **GENERATE)
    for row, alone in ((0, ids[:1, :5]), (1, ids[1:])):
        assert torch.equal(found[row, 9:], model.generate(input_ids=alone, **GENERATE)[0, alone.shape[1] :])
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=ids, **GENERATE), plain)


@torch.no_grad()
def test_a_cache_keeps_what_the_network_computes() -> None:
    model, ids = shadowed(), tokens()
    first = model(input_ids=ids[:, :6], use_cache=True).past_key_values
    assert isinstance(first, nbpeft.tuners.shadow.ShadowCache) and not first.is_compileable
    assert first.base.get_seq_length() == first.shadow.get_seq_length() == 6
    again = copy.deepcopy(first)
    whole = logits(model, ids)
    assert_close(model(input_ids=ids[:, 6:], past_key_values=first).logits, whole[:, 6:])
    again.reorder_cache(torch.tensor([1, 0]))
    again.crop(-1)
    assert_close(model(input_ids=ids.flip(0)[:, 5:], past_key_values=again).logits, whole.flip(0)[:, 5:])
    with model.disable_adapter():
        plain = model(input_ids=ids, use_cache=True).past_key_values
    refused(lambda: model(input_ids=ids[:, :1], past_key_values=plain), "tokens that the active adapter has not seen")
    refused(
        lambda: model.generate(input_ids=ids, **GENERATE, cache_implementation="static"),
        "a StaticCache cannot store two caches",
    )


@pytest.mark.parametrize("way", ["blocks", "reentrant", "whole"])
def test_gradient_checkpointing_gives_the_same_gradients(way: str) -> None:
    def call(model: Any) -> Any:
        if way == "whole":
            run = torch.utils.checkpoint.checkpoint
            return run(lambda ids: model(input_ids=ids, labels=ids).loss, tokens(), use_reentrant=False)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": way == "reentrant"})
        return model(input_ids=tokens(), labels=tokens()).loss

    wanted, found = gradients(shadowed()), gradients(shadowed(), call)
    assert wanted.keys() == found.keys() and len(wanted) > 20
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_it_is_switched_copied_pickled_and_taken_off() -> None:
    before, model = state(wide()), shadowed()
    wanted = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), wanted)
    assert torch.equal(model.get_base_model()(input_ids=tokens()).logits, wanted)
    model.add_adapter("other", nbpeft.ShadowConfig(task_type="CAUSAL_LM", init_weights=False, r=3))
    model.set_adapter("other")
    assert not torch.equal(logits(model), wanted)
    assert not any(one.requires_grad for one in model.base_model.shadow_backbone["default"].parameters())
    model.delete_adapter("other")
    assert model.active_adapters == ["default"] and torch.equal(logits(model), wanted)
    for name in ("other", "default"):
        twin = shadowed(name=name)
        randomize(twin, name, seed=9)
        result = nbpeft.set_peft_model_state_dict(twin, nbpeft.get_peft_model_state_dict(model), adapter_name=name)
        assert result.missing_keys == result.unexpected_keys == [] and torch.equal(logits(twin), wanted)
    unloaded = model.unload()
    assert same_state(before, state(unloaded)) and torch.equal(logits(unloaded), logits(wide()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unloaded.modules())


def test_it_acts_beside_lora_and_prompts() -> None:
    model = shadowed()
    alone = logits(model)
    model.add_adapter("soft", nbpeft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "soft"])
    cached, plain = (model.generate(input_ids=tokens(), **GENERATE, use_cache=use) for use in (True, False))
    assert logits(model).shape[1] == 11 and torch.equal(cached, plain)
    model.add_adapter("lora", nbpeft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "lora"])
    assert not torch.equal(logits(model), alone)
    assert all("shadow" not in path for path in model.targeted_module_names)


@pytest.mark.parametrize(
    ("fields", "blocks"),
    [
        ({"exclude_modules": ["layers.0"]}, ["model.layers.1"]),
        ({"layers_to_transform": [0]}, ["model.layers.0", "model.layers.1"]),
        ({"target_modules": ["layers.0"]}, ["model.layers.0"]),
    ],
    ids=str,
)
def test_the_blocks_are_those_of_peft_and_what_names_none_is_told(fields: dict[str, Any], blocks: list[str]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        ours = nbpeft.get_peft_model(llama(), nbpeft.ShadowConfig(**fields))
    theirs = peft.get_peft_model(llama(), peft.ShadowConfig(**fields))
    keys = peft.get_peft_model_state_dict(theirs).keys()
    assert nbpeft.get_peft_model_state_dict(ours).keys() == keys
    assert [path for path in ("model.layers.0", "model.layers.1") if any(path in key for key in keys)] == blocks
    assert any("layers_to_transform has no effect" in str(one.message) for one in told) is (
        "layers_to_transform" in fields
    )


@torch.no_grad()
def test_its_state_can_be_set() -> None:
    model: Any = shadowed(r=3)
    model.base_model._seed_shadow_state = torch.ones(1)
    assert torch.equal(model.base_model._seed_shadow_state, torch.ones(1))


@torch.no_grad()
def test_the_network_is_taken_out_as_a_model() -> None:
    model, ids = shadowed(shadow_hidden_size=16), tokens()
    for copies in (False, True):
        network = model.base_model.unload_shadow(copy=copies)
        assert isinstance(network, nbpeft.tuners.shadow.DetachedShadowModel) and network.can_generate()
        shared = network.backbone is model.base_model.shadow_backbone["default"]
        assert shared is not copies
        output = network(input_ids=ids, labels=ids)
        assert_close(output.loss, model(input_ids=ids, labels=ids).shadow_loss)
        cached, plain = (network.generate(input_ids=ids, **GENERATE, use_cache=use) for use in (True, False))
        assert torch.equal(cached, plain)
    sharing = shadowed()
    key = "backbone.embed_tokens.weight"
    taken, copied = (sharing.base_model.unload_shadow(copy=copies) for copies in (False, True))
    assert key not in taken.state_dict() and key in copied.state_dict()
    assert torch.equal(taken(input_ids=ids).logits, copied(input_ids=ids).logits)
    refused(lambda: sharing.base_model.unload_shadow("none"), "no ShadowPEFT adapter 'none'", AdapterError)
    classes = pair("classifier")
    for one in classes:
        out = one.base_model.unload_shadow().eval()
        assert not out.can_generate() and out(input_ids=ids, labels=CLASSES).logits.shape == (2, 3)
    ours, theirs = (one.base_model.unload_shadow().eval()(input_ids=ids).logits for one in classes)
    assert_close(ours, theirs)


@pytest.mark.parametrize("projected", [False, True])
def test_a_saved_network_is_read_and_its_embedding_stays(projected: bool, tmp_path: Path) -> None:
    torch.manual_seed(4)
    sizes = {key: value for key, value in LLAMA.items() if key != "attention_bias"}
    config = LlamaConfig(**sizes | {"hidden_size": 16, "num_hidden_layers": 1})
    network = LlamaModel(config)
    if projected:
        tensors = {f"shadow_model.{key}": value for key, value in network.state_dict().items()}
        save_file(tensors | {"shadow_hidden_projection.weight": torch.randn(32, 16)}, tmp_path / "model.safetensors")
        fields = {"model_type": "causal_lm_with_hidden_projection", "shadow_model_config": config.to_dict()}
        (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    else:
        network.save_pretrained(tmp_path)
    made = []
    for library in (nbpeft, peft):
        torch.manual_seed(1)
        asked = library.ShadowConfig(  # type: ignore[attr-defined]
            task_type="CAUSAL_LM", shadow_model=str(tmp_path), init_weights=False
        )
        made.append(library.get_peft_model(llama(), asked).eval())  # type: ignore[attr-defined]
    ours, theirs = made
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    loss, wanted = (one(input_ids=tokens(), labels=tokens()).loss for one in made)
    loss.backward()
    assert_close(float(loss), float(wanted))
    own = ours.base_model.shadow_backbone["default"]
    assert torch.equal(own.layers[0].mlp.up_proj.weight, network.layers[0].mlp.up_proj.weight)
    assert own.embed_tokens.weight.grad is None and own.norm.weight.grad is not None
    refused(lambda: ours(inputs_embeds=torch.randn(1, 3, 32)), "has its own embedding: pass input_ids")


def test_a_base_in_half_precision_has_a_network_in_float32() -> None:
    model = shadowed(wide(dtype=torch.bfloat16))
    assert {one.dtype for one in model.base_model.shadow_backbone.parameters()} == {torch.float32}
    found = gradients(model)
    assert found and all(one.dtype == torch.float32 and one.isfinite().all() for one in found.values())


def test_what_it_cannot_do_is_refused_in_one_line() -> None:
    model = shadowed()
    before = logits(model)
    refused(model.merge_and_unload, "cannot be merged into the weights", MergeError)
    model.add_adapter("other", nbpeft.ShadowConfig(task_type="CAUSAL_LM"))
    refused(
        lambda: model.base_model.set_adapter(["default", "other"]), "requires exactly one active adapter", AdapterError
    )
    refused(
        lambda: model(input_ids=tokens(), adapter_names=["default", "other"]),
        "does not support mixed batches",
        AdapterError,
    )
    refused(lambda: model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both"), "cannot be combined")
    refused(model, "pass input_ids or inputs_embeds", AdapterError)
    block = model.get_base_model().model.layers[0]
    refused(lambda: block(torch.randn(1, 3, 32)), "layers.0 is called alone", AdapterError)
    model.add_adapter("prefix", nbpeft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "prefix"])
    refused(lambda: model(input_ids=tokens()), "tokens that the active adapter has not seen", AdapterError)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)


class Sizes:
    """A config as of diffusers: without a hidden size."""

    num_attention_heads, attention_head_dim = 2, 4

    def to_dict(self) -> dict[str, Any]:
        return {}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        changed: Tensor = hidden_states + self.linear(self.norm(hidden_states))
        return changed


class Denoiser(nn.Module):
    """A diffusion transformer: its inputs are latents, which its first layer maps to hidden states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config: Any = Sizes()
        self.embedder, self.last = nn.Linear(3, 8), nn.Linear(8, 3)
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(3))
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = self.embedder(hidden_states)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing:
                hidden = checkpoint(block.__call__, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        given: Tensor = self.last(hidden)
        return given


class TextBlock(Block):
    """A block that changes the hidden states of a text, too, as in Stable Diffusion 3 and Flux."""

    def forward(self, hidden: Tensor) -> Any:
        return hidden, super().forward(hidden)


class TextDenoiser(Denoiser):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block(), TextBlock()])


LATENTS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "fields",
    [{}, {"shadow_hidden_size": 4, "shadow_intermediate_size": 6, "shadow_num_hidden_layers": 2}],
    ids=["plain", "sizes"],
)
def test_on_a_diffusion_transformer_it_is_that_of_peft(fields: dict[str, Any], tmp_path: Path) -> None:
    given = []
    for library in (nbpeft, peft):
        model: Any = Denoiser()
        torch.manual_seed(1)
        config = library.ShadowConfig(init_weights=False, shadow_dropout=0.0, **fields)  # type: ignore[attr-defined]
        tuned = library.get_peft_model(model, config)  # type: ignore[attr-defined]
        loss = tuned(hidden_states=LATENTS).square().mean()
        loss.backward()
        trained = [one.grad for one in tuned.parameters() if one.requires_grad]
        given.append((loss, torch.stack([one.norm() for one in trained if one is not None]).norm()))
        tuned.save_pretrained(tmp_path / library.__name__)
    assert_close(given[0], given[1])
    saved, those = (load_file(tmp_path / who.__name__ / "adapter_model.safetensors") for who in (nbpeft, peft))
    assert saved.keys() == those.keys() and all(torch.equal(value, those[key]) for key, value in saved.items())
    again = nbpeft.PeftModel.from_pretrained(Denoiser(), tmp_path / "peft")
    assert_close(again(hidden_states=LATENTS).square().mean(), given[1][0])


def test_on_a_diffusion_transformer_it_is_trained_with_checkpointing_switched_and_taken_off() -> None:
    latents = LATENTS.clone().requires_grad_()
    found = []
    for checkpointing in (False, True):
        model = shadowed(Denoiser(), task_type=None, shadow_dropout=0.0)
        model.get_base_model().gradient_checkpointing = checkpointing
        found.append(gradients(model, lambda model: model(hidden_states=latents).square().mean()))
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() and all(torch.equal(one, recomputed[key]) for key, one in plain.items())
    assert any("shadow_backbone" in key and bool(one.any()) for key, one in plain.items())
    bare = Denoiser()(LATENTS)
    assert not torch.equal(model(hidden_states=LATENTS), bare)
    with model.disable_adapter():
        assert torch.equal(model(hidden_states=LATENTS), bare)
    block = model.get_base_model().transformer_blocks[0]
    refused(lambda: block(torch.randn(1, 3, 8)), "transformer_blocks.0 is called alone", AdapterError)
    refused(model.base_model.unload_shadow, "not supported for Diffusers models")
    assert torch.equal(model.unload()(LATENTS), bare)


def test_blocks_of_a_diffusion_transformer_with_several_outputs_are_refused() -> None:
    model = shadowed(Denoiser(), task_type=None)
    block = model.get_base_model().transformer_blocks[0].base_layer
    block.forward = lambda hidden_states: (hidden_states, hidden_states)
    refused(lambda: model(hidden_states=LATENTS), "transformer_blocks.0 returns a tuple", AdapterError)


@pytest.mark.parametrize(
    ("base", "fields", "words"),
    [
        (
            "diffusion",
            {"shadow_model": "a/b"},
            "leave out shadow_model: .* is a new MLP",
        ),
        ("diffusion", {"shadow_num_attention_heads": 2}, "leave out shadow_num_attention_heads"),
        ("text", {}, "TextBlock of TextDenoiser returns several tensors"),
        ("encoder", {}, "has an encoder and a decoder"),
        ("plain", {}, "not with Sequential"),
        ("llama", {"target_modules": ["q_proj"]}, "'q_proj' names none of the blocks of LlamaForCausalLM"),
        ("llama", {"target_modules": ["model.layers.0", "model.layers.7"]}, "'model.layers.7' names none"),
        ("llama", {"target_modules": r".*layers\.(0|2)$"}, "must follow each other"),
        ("llama", {"target_modules": "all-linear"}, "blocks of the decoder, not its linear layers"),
        ("llama", {"shadow_model": "/nowhere/at/all"}, "shadow_model '/nowhere/at/all' cannot be read"),
        ("llama", {"shadow_model": "a/b", "shadow_hidden_size": 8}, "mirror-only overrides, shadow_hidden_size"),
        ("llama", {"auxiliary_loss_weight": -1.0}, "auxiliary_loss_weight must not be negative"),
        ("llama", {"update_hidden_size": 0}, "update_hidden_size must be"),
        ("gpt2", {"shadow_hidden_size": 30}, "cannot be made"),
    ],
)
def test_what_fits_no_model_is_refused(base: str, fields: dict[str, Any], words: str) -> None:
    small = T5Config(vocab_size=97, d_model=32, num_layers=2, d_ff=32, num_heads=4, d_kv=8)
    made: dict[str, Callable[[], nn.Module]] = {
        "encoder": lambda: T5ForConditionalGeneration(small),
        "plain": lambda: nn.Sequential(nn.Embedding(5, 6)),
        "diffusion": Denoiser,
        "text": TextDenoiser,
        "llama": lambda: llama(num_hidden_layers=3),
        "gpt2": gpt2,
    }
    model = made[base]()
    refused(lambda: nbpeft.get_peft_model(model, nbpeft.ShadowConfig(**fields)), words, ConfigError)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "config", [nbpeft.ShadowConfig(), nbpeft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1)]
)
def test_it_is_shipped_as_a_folder_of_peft_alone(config: Any, tmp_path: Path) -> None:
    model = nbpeft.get_peft_model(wide(), config)
    for engine in ("transformers", "vllm"):
        with pytest.raises(AdapterError, match="which changes the model's calls"):
            nbpeft.ship(model, engine=engine, to=tmp_path / engine)
        assert not (tmp_path / engine).exists()
    nbpeft.ship(model, engine="peft", to=tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(wide(), tmp_path / "peft").eval()
    assert_close(logits(again), logits(model.eval()))


def test_one_config_serves_several_models() -> None:
    config = nbpeft.ShadowConfig(task_type="CAUSAL_LM")
    for base, count in ((llama(num_hidden_layers=3), 3), (gpt2(), 2), (llama(hidden_size=16), 2)):
        model = nbpeft.get_peft_model(base, config)
        assert len(model.peft_config["default"].target_modules) == count and torch.equal(logits(model), logits(base))


def test_a_forecast_is_what_the_allocator_sees() -> None:
    shape = copy.deepcopy(SHAPES["llama"])
    shape.num_hidden_layers = 2
    adapter = nbpeft.ShadowConfig(task_type="CAUSAL_LM")
    settings: dict[str, Any] = {"batch_size": 2, "max_length": 48, "dtype": torch.float32, "quantization": None}
    foreseen = forecast(shape, adapter, optim="adamw", device="cpu", **settings).peak_bytes
    measured = real_peak(architecture_of(shape, adapter), adapter, optimizer=torch.optim.AdamW, **settings)
    assert_approximates(foreseen, measured, 0.03)
