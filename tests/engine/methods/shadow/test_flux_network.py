"""The network for Flux 2 is PEFT's: which part of the model it begins with, its files, outputs, gradients, and names.

The model is a small one with the names and the arithmetic of diffusers' class, which PEFT knows by its name.
"""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any, Self

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nbpeft
from nbpeft.errors import ConfigError, NotSupportedError
from tests.closeness import assert_close, differ

pytestmark = pytest.mark.filterwarnings("ignore")
FIELDS: dict[str, Any] = {
    **{"in_channels": 4, "out_channels": 4, "joint_attention_dim": 6, "timestep_guidance_channels": 5},
    **{"attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 3, "num_single_layers": 5},
    **{"mlp_ratio": 2.0, "axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": False},
}


class Fields(dict[str, Any]):
    """A config of diffusers: a dictionary whose entries are attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Holder(nn.Module):
    """A module that has others."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class Single(nn.Module):
    def __init__(self, width: int, inner: int, head: int) -> None:
        super().__init__()
        self.sizes = width, inner, head
        fused, out = nn.Linear(width, 3 * width + 2 * inner, bias=False), nn.Linear(width + inner, width, bias=False)
        self.attn = Holder(to_qkv_mlp_proj=fused, norm_q=nn.RMSNorm(head), to_out=out)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb_mod: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
    ) -> Any:
        width, inner, head = self.sizes
        shift, scale, gate = temb_mod.chunk(3, -1)
        attention: Any = self.attn
        query, key, value, first, second = attention.to_qkv_mlp_proj(hidden_states * (1 + scale) + shift).split(
            [width] * 3 + [inner] * 2, -1
        )
        query = attention.norm_q(query.unflatten(-1, (-1, head))).flatten(-2)
        mixed = F.scaled_dot_product_attention(query, key, value)
        hidden: Tensor = hidden_states + gate * attention.to_out(torch.cat([mixed, F.silu(first) * second], -1))
        if split_hidden_states:
            return hidden[:, :1], hidden[:, 1:]
        return hidden


class Flux2Transformer2DModel(nn.Module):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config: Any = Fields(FIELDS | fields)
        width = self.config.num_attention_heads * self.config.attention_head_dim
        inner = int(width * self.config.mlp_ratio)
        self.gradient_checkpointing = False
        self.pos_embed = nn.Module()
        self.time_guidance_embed = nn.Linear(self.config.timestep_guidance_channels, width)
        self.double_stream_modulation_img = Holder(linear=nn.Linear(width, 6 * width, bias=False))
        self.single_stream_modulation = Holder(linear=nn.Linear(width, 3 * width, bias=False))
        self.x_embedder = nn.Linear(self.config.in_channels, width)
        self.context_embedder = nn.Linear(self.config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            Holder(ff=Holder(linear_in=nn.Linear(width, 2 * inner)), to_out=nn.Linear(width, width))
            for _ in range(self.config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            Single(width, inner, self.config.attention_head_dim) for _ in range(self.config.num_single_layers)
        )
        self.norm_out = Holder(linear=nn.Linear(width, 2 * width, bias=False))
        self.proj_out = nn.Linear(width, self.config.out_channels)

    @classmethod
    def from_config(cls, config: Any) -> Self:
        return cls(**config)

    @classmethod
    def load_config(cls, folder: str) -> dict[str, Any]:
        read: dict[str, Any] = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        return read

    @classmethod
    def from_pretrained(cls, folder: str) -> Self:
        made = cls.from_config(cls.load_config(folder))
        made.load_state_dict(load_file(Path(folder, "model.safetensors")))
        return made

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        save_file(self.state_dict(), folder / "model.safetensors")

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def forward(self, hidden_states: Tensor, text: Tensor, time: Tensor) -> Tensor:
        embedded: Any = self.time_guidance_embed(time)
        modulation = self.single_stream_modulation.linear(F.silu(embedded))[:, None]  # type: ignore[operator]
        hidden = torch.cat([self.context_embedder(text), self.x_embedder(hidden_states)], 1)
        for block in self.single_transformer_blocks:
            if self.gradient_checkpointing:
                hidden = checkpoint(block, hidden, None, modulation, None, None, use_reentrant=False)
            else:
                hidden = block(hidden_states=hidden, encoder_hidden_states=None, temb_mod=modulation)
        given: Tensor = self.proj_out(hidden[:, text.shape[1] :])
        return given


def model(**fields: Any) -> Any:
    torch.manual_seed(0)
    return Flux2Transformer2DModel(**fields)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden_states": (2, 4, 4), "text": (2, 3, 6), "time": (2, 5)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def tuned(library: Any, checkpointing: bool = False, **fields: Any) -> Any:
    base = model()
    base.gradient_checkpointing = checkpointing
    torch.manual_seed(1)
    return library.get_peft_model(base, library.ShadowConfig(init_weights=False, shadow_dropout=0.0, **fields))


def result(made: Any) -> Tensor:
    with torch.no_grad():
        given: Tensor = made.eval()(**inputs())
    return given


CASES: dict[str, dict[str, Any]] = {
    "whole-width": {},
    "two": {"shadow_num_hidden_layers": 2},
    "narrow": {"shadow_hidden_size": 8, "shadow_intermediate_size": 8},
    "one-head": {"shadow_num_attention_heads": 1, "share_embeddings": False},
    "own-embeddings": {"share_embeddings": False, "shadow_intermediate_size": 12},
    "some-blocks": {"target_modules": r"single_transformer_blocks\.[123]$"},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_on_flux_2_it_is_that_of_peft(case: str, checkpointing: bool, tmp_path: Path) -> None:
    found = []
    for library in (nbpeft, peft):
        made = tuned(library, checkpointing, **CASES[case])
        drawn = torch.get_rng_state()
        loss = made.train()(**inputs()).square().mean()
        loss.backward()
        gradients = {name: one.grad for name, one in made.named_parameters() if one.grad is not None}
        listed = [*made.named_modules()], [(name, one.requires_grad) for name, one in made.named_parameters()]
        made.save_pretrained(tmp_path / library.__name__)
        found.append((made, drawn, loss, gradients, [name for name, _ in listed[0]], listed[1]))
    (ours, drawn, loss, gradients, modules, parameters), (theirs, *others) = found
    assert torch.equal(drawn, others[0]) and modules == others[3] and parameters == others[4]
    assert_close(loss, others[1])
    assert gradients.keys() == others[2].keys() and any("shadow_backbone" in name for name in gradients)
    for name, value in others[2].items():
        assert_close(gradients[name], value)
    state, other = ours.state_dict(), theirs.state_dict()
    assert [*state] == [*other] and all(torch.equal(value, other[name]) for name, value in state.items())
    assert "base_model.shadow_backbone.default.model.single_transformer_blocks.0.attn.to_out.weight" in state
    saved, those = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("nbpeft", "peft"))
    assert saved.keys() == those.keys() and all(torch.equal(value, those[key]) for key, value in saved.items())
    wanted = result(theirs)
    assert differ(wanted, model()(**inputs()))
    for library, who in ((nbpeft, "peft"), (peft, "nbpeft"), (nbpeft, "nbpeft")):
        assert_close(result(library.PeftModel.from_pretrained(model(), tmp_path / who)), wanted)


@pytest.mark.parametrize("case", ["whole-width", "narrow"])
def test_it_is_copied_pickled_and_taken_off(case: str) -> None:
    made = tuned(nbpeft, **CASES[case])
    wanted, network = result(made), made.base_model.shadow_backbone["default"]
    assert isinstance(network, nbpeft.tuners.shadow.diffusion_models.DetachedFluxShadowModel)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(result(twin), wanted) and [*twin.state_dict()] == [*made.state_dict()]
        own = twin.base_model.shadow_backbone["default"].model.x_embedder
        assert case == "narrow" or own.shared_module is twin.get_base_model().x_embedder
    shared = network.model.x_embedder
    assert (getattr(shared, "weight", None) is made.get_base_model().x_embedder.weight) is (case == "whole-width")
    assert_close(shared(torch.ones(1, 4)).shape[-1], network.config.num_attention_heads * 8)
    with pytest.raises(NotSupportedError, match="not supported for Diffusers models"):
        made.base_model.unload_shadow()
    unloaded = made.unload()
    assert torch.equal(result(unloaded), result(model())) and [*unloaded.state_dict()] == [*model().state_dict()]


def test_a_saved_network_is_read_and_its_embeddings_stay(tmp_path: Path) -> None:
    small = {"num_attention_heads": 1, "num_layers": 1, "num_single_layers": 2}
    torch.manual_seed(4)
    network = Flux2Transformer2DModel(**small)
    network.save_pretrained(tmp_path)
    made = tuned(nbpeft, shadow_model=str(tmp_path))
    own, projection = (getattr(made.base_model, name)["default"] for name in ("shadow_backbone", "shadow_projection"))
    for name, value in network.state_dict().items():
        assert torch.equal(own.model.get_parameter(name), value)
    assert torch.equal(projection.weight, torch.eye(16, 8))
    trained = {name: one.requires_grad for name, one in own.named_parameters()}
    assert not trained["model.x_embedder.weight"] and not trained["model.time_guidance_embed.bias"]
    assert trained["model.norm_out.linear.weight"] and trained["model.transformer_blocks.0.to_out.weight"]
    made(**inputs()).square().mean().backward()
    assert own.model.single_transformer_blocks[0].attn.to_out.weight.grad.any()
    wanted = result(made)
    made.save_pretrained(tmp_path / "adapter")
    again = nbpeft.PeftModel.from_pretrained(model(), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(result(again), wanted)
    assert not again.base_model.shadow_backbone["default"].model.x_embedder.weight.requires_grad


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shadow_hidden_size": 10}, "preserve the base attention head dimension, 8: .* = 10 is not 8 times a number"),
        ({"shadow_hidden_size": 8, "shadow_num_attention_heads": 2}, "= 8 is not 8 times 2 heads"),
        ({"shadow_num_attention_heads": 3}, "shadow_num_attention_heads must be between 1 and 2, .* not 3"),
        ({"shadow_hidden_size": 24}, "shadow_num_attention_heads must be between 1 and 2, .* not 3"),
        ({"shadow_intermediate_size": 33}, "shadow_intermediate_size must be between 1 and 32, .* not 33"),
        ({"shadow_num_hidden_layers": 3}, "= 3 needs 6 single-stream blocks, and the model has 5"),
        ({"shadow_num_hidden_layers": 4}, "= 4 needs 4 double-stream blocks, and the model has 3"),
        ({"shadow_model": "/nowhere"}, "shadow_model '/nowhere' cannot be read"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_in_one_line(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        tuned(nbpeft, **fields)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"out_channels": 8}, "has an incompatible `out_channels`: 8, and the model has 4"),
        ({"axes_dims_rope": (4, 4)}, "an incompatible `axes_dims_rope`"),
        ({"num_attention_heads": 3}, "not be larger than the model: heads is 3, not 1 to 2"),
        ({"num_single_layers": 6}, "not be larger than the model: single is 6, not 1 to 5"),
        ({"mlp_ratio": 5.0}, "not be larger than the model: inner is 80, not 1 to 32"),
    ],
)
def test_a_saved_network_that_does_not_fit_the_model_is_refused(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model(**fields).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=words):
        tuned(nbpeft, shadow_model=str(tmp_path))


def test_a_base_in_half_precision_has_a_network_in_float32() -> None:
    base = model().to(torch.bfloat16)
    made = nbpeft.get_peft_model(base, nbpeft.ShadowConfig(init_weights=False, shadow_hidden_size=8))
    given = made(**{name: one.to(torch.bfloat16) for name, one in inputs().items()})
    given.square().mean().backward()
    network = made.base_model.shadow_backbone["default"]
    assert given.dtype == torch.bfloat16 and {one.dtype for one in network.parameters()} == {torch.float32}
    assert network.model.single_transformer_blocks[1].attn.to_out.weight.grad.isfinite().all()
