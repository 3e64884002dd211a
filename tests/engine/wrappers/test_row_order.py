"""A mixed batch through layers that do not see its rows as the model does: each row as it is alone, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from nbpeft import LoraConfig, PeftModel, get_peft_model
from nbpeft.errors import AdapterError
from tests.closeness import assert_close, differ
from tests.tiny_models import MIXTURES, VOCABULARY, mixture, randomize, tokens

NAMES = ["a", "b"]
REFUSED = r"^adapter_names: \S+ .*; use a separate batch for each adapter$"


def two(base: nn.Module, *targets: str, **more: Any) -> PeftModel:
    """A model with two adapters that change what it gives."""
    config = LoraConfig(**{"r": 2, "target_modules": list(targets), "init_lora_weights": False, **more})
    model = get_peft_model(base, config, "a")
    model.add_adapter("b", config)
    for seed, name in enumerate(NAMES):
        randomize(model, name, seed)
    return model.eval()


def first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


@torch.no_grad()
def served(model: PeftModel, *args: Any, **inputs: Any) -> None:
    """Each row of a mixed batch has what the batch gives with its adapter."""
    mixed = first(model(*args, **inputs, adapter_names=NAMES))
    expected = []
    for name in NAMES:
        with model.use(name):
            expected.append(first(model(*args, **inputs)))
    for row, whole in enumerate(expected):
        assert_close(mixed[row], whole[row])
    assert differ(expected[0], expected[1])


def refused(model: PeftModel, *args: Any, **inputs: Any) -> None:
    with torch.no_grad(), pytest.raises(AdapterError, match=REFUSED) as error:
        model(*args, **inputs, adapter_names=NAMES)
    assert len(str(error.value)) < 250


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Mixture(nn.Module):
    """Experts in a list, to each of which its router sends the tokens for which it is among the two best."""

    def __init__(self, listed: str = "experts", expert: type[nn.Module] = Expert) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.shared_expert = Expert()
        self.listed = listed
        setattr(self, listed, nn.ModuleList(expert() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        result = self.shared_expert(flat)
        for number, expert in enumerate(getattr(self, self.listed)):
            token, slot = torch.where(chosen == number)
            order = slot.argsort(stable=True)
            token, slot = token[order], slot[order]
            result = result.index_add(0, token, expert(flat[token]) * weights[token, slot, None])
        return result.view_as(x)


class Net(nn.Module):
    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.mixture = mixture
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mixture(self.embed(ids)))


@pytest.mark.parametrize("listed", ["experts", "branches"])
@pytest.mark.parametrize("length", range(1, 6))
def test_what_a_router_picks_is_refused_whatever_its_size(listed: str, length: int) -> None:
    model = two(Net(Mixture(listed)), "up")
    for seed in range(4):
        refused(model, tokens(2, length, seed))


def test_one_adapter_for_all_rows_is_served_by_experts() -> None:
    model = two(Net(Mixture()), "up", "head")
    ids = tokens(3, 5)
    with torch.no_grad():
        mixed = model(ids, adapter_names=["b", "b", "b"])
        with model.use("b"):
            assert_close(mixed, model(ids))


def test_what_routes_no_tokens_is_served_beside_experts() -> None:
    served(two(Net(Mixture()), "embed", "router", "shared_expert.up", "shared_expert.down", "head"), tokens(2, 5))


def test_a_module_whose_tokens_are_routed_is_refused_as_a_copy() -> None:
    model = get_peft_model(Net(Mixture()), LoraConfig(target_modules=["head"], modules_to_save=["experts.0"]), "a")
    model.add_adapter("b", LoraConfig(target_modules=["head"]))
    refused(model.eval(), tokens(2, 5))


class Flattened(nn.Module):
    """Layers that see tokens of all rows, one row after another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        for layer in self.layers:
            flat = layer(flat).tanh()
        return flat.view_as(x)


class Unpadded(Flattened):
    """What leaves some tokens out."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1] // 2 * 2
        return x.flatten(0, 1).index_add(0, torch.arange(count), self.layers[0](x.flatten(0, 1)[:count])).view_as(x)


class PositionsFirst(Flattened):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x.transpose(0, 1)).contiguous()).transpose(0, 1)


class Windows(Flattened):
    """Windows of three positions."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x.reshape(-1, 3, 8))).reshape(x.shape)


class Pooled(Flattened):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(1))


@pytest.mark.parametrize("length", [3, 6])
def test_rows_that_keep_their_order_are_served_and_others_refused(length: int) -> None:
    for kind in (Flattened, Windows, Pooled):
        served(two(Net(kind()), "layers.0", "layers.1"), tokens(2, length))
    for layer in ("layers.0", "layers.1"):
        refused(two(Net(PositionsFirst()), layer), tokens(2, length))
    refused(two(Net(Unpadded()), "layers.0"), tokens(2, 5))


def test_rows_without_positions_are_served_by_alike_layers() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).tanh()
            return self.head(x)

    served(two(Stack(), "layers.0", "layers.1", "head"), torch.randn(2, 8))


SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "OPT": ("ForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 4}
            | {"word_embed_proj_dim": 32, "max_position_embeddings": 64}, ["fc1", "fc2", "q_proj"]),
    "GPT2": ("LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}, ["c_attn", "c_fc", "c_proj", "wte", "wpe"]),
    "GPTNeoX": ("ForCausalLM", SIZES, ["query_key_value", "dense_h_to_4h"]),
    "Bloom": ("ForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, ["query_key_value", "dense_4h_to_h"]),
    "Falcon": ("ForCausalLM", SIZES, ["query_key_value", "dense_h_to_4h"]),
    "Bert": ("ForSequenceClassification", SIZES, ["query", "dense", "classifier"]),
    "DebertaV2": ("ForSequenceClassification", SIZES, ["query_proj", "dense"]),
    "Mamba": ("ForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, ["in_proj", "x_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_families_that_keep_rows_are_served(family: str) -> None:
    kind, settings, targets = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, pad_token_id=0, **settings)
    model = two(getattr(transformers, family + kind)(config), *targets)
    for length in (2, 3, 4):
        served(model, input_ids=tokens(2, length))
    if kind != "ForSequenceClassification":
        generated = {"input_ids": tokens(2, 4), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        for more in ({}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}):
            if more and family == "Mamba":
                continue
            assert len(model.generate(**generated, **more, adapter_names=NAMES)) == 2 * more.get(
                "num_return_sequences", 1
            )


def test_encoders_with_decoders_and_vision_are_served() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, **T5, decoder_start_token_id=0)
    )
    model = two(t5, "q", "wi", "k", "v")
    served(model, input_ids=tokens(2, 6), decoder_input_ids=tokens(2, 3))
    assert len(model.generate(input_ids=tokens(2, 6), max_new_tokens=3, num_beams=2, adapter_names=NAMES)) == 2
    images = torch.randn(2, 3, 16, 16)
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=16, patch_size=4))
    served(two(vit, "q_proj", "v_proj", "fc1", "projection", "classifier"), pixel_values=images)
    swin = transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2
        )
    )
    served(two(swin, "q_proj", "v_proj", "fc1", "reduction"), pixel_values=images)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_mixtures_are_served_where_no_expert_is_adapted(model_type: str) -> None:
    served(
        two(mixture(model_type), "q_proj" if model_type != "deepseek_v3" else "q_a_proj", "o_proj"),
        input_ids=tokens(2, 4),
    )


def test_experts_in_a_list_are_refused_where_they_are_adapted() -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY, **T5, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
    )
    torch.manual_seed(0)
    base = transformers.SwitchTransformersForConditionalGeneration(config)
    for length in range(1, 5):
        refused(two(base, "wi"), input_ids=tokens(2, length), decoder_input_ids=tokens(2, 2))
        base = base if length == 4 else transformers.SwitchTransformersForConditionalGeneration(config)
    longformer = transformers.LongformerModel(
        transformers.LongformerConfig(vocab_size=VOCABULARY, **SIZES, attention_window=4, max_position_embeddings=64)
    )
    refused(two(longformer, "query"), input_ids=tokens(2, 8))
    xlnet = transformers.XLNetModel(
        transformers.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48)
    )
    refused(two(xlnet, "layer_1"), input_ids=tokens(2, 8))


def test_what_only_adapters_of_no_row_change_gets_rows_in_any_order() -> None:
    model = two(Net(Mixture()), "head")
    model.add_adapter("c", LoraConfig(r=2, target_modules=["up"]))
    served(model.eval(), tokens(2, 5))


@pytest.mark.parametrize("kinds", [[nn.Linear], [nn.Linear, nn.LayerNorm]])
def test_layers_in_a_list_that_are_no_experts_are_served(kinds: list[Any]) -> None:
    """One alone, or layers of several classes: a matrix with as many rows beside them does not choose between them."""

    class Listed(Flattened):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(kind(8) if kind is nn.LayerNorm else kind(8, 8) for kind in kinds)
            self.weights = nn.Parameter(torch.zeros(len(kinds), 8))

    served(two(Net(Listed()), "layers.0"), tokens(2, 5))
