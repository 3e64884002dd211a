"""ShadowPEFT: a small network next to a decoder, with a state that the decoder's blocks read and update.

    s_0 = P network(x)                                          before the blocks
    h   = h + a W_up dropout(W_down (h - s))                    what a block reads in place of h
    s   = (1 - g) s + g T(h'),   g = sigmoid(G(h'))             after it, from its output h'

The model is frozen. W_up starts at zero, so training starts at the base model. The network is also trained with a loss
of its own, the loss of the model's head on s_0, and can be extracted as a small model (``unload_shadow``). In a
diffusion transformer x is the input of the first adapted block, and the network has no loss.

PEFT computes the network in the dtype of the model; here the dtype is the adapter's. PEFT also updates the state after
the last block, which is not read, and adds the network's loss even in calls without gradient.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.model_properties import cache_argument, fills_cache, take_cache
from nbpeft.engine.contract.adapter import AdapterSite
from nbpeft.engine.contract.base import BaseLayer, LayerKind
from nbpeft.engine.contract.method_records import CallInputs, FileFormat, Listing
from nbpeft.engine.contract.model_adapter import HasSideNetwork, ModelAdapter
from nbpeft.engine.contract.peft_names import PeftNames
from nbpeft.engine.contract.registry import register
from nbpeft.engine.methods.shadow.config import ShadowConfig
from nbpeft.engine.methods.shadow.losses import class_loss, in_dtype_of, language_loss, last_tokens
from nbpeft.engine.methods.shadow.recipe import Recipe
from nbpeft.engine.tree.model_tree import embedding_of
from nbpeft.errors import AdapterError, NotSupportedError, UnknownAdapterError

_PARTS = ("shadow_backbone", "shadow_projection", "shadow_head")
_OF_BLOCK = "shadow_down|shadow_up|shadow_update_transform|shadow_update_gate"
_BLOCK_HERE = re.compile(rf"(.+)\.({_OF_BLOCK})\.(.+)")
_BLOCK_IN_PEFT = re.compile(rf"base_model\.model\.(.+)\.({_OF_BLOCK})(?:\.default)?(?:\.(.+))?")
"""A tensor of a block in a file; where its adapter is called ``default``, a state dict is read without that name."""


def _packed(config: ShadowConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the keys of PEFT's files."""
    return {_key_in_peft(key): tensor for key, tensor in tensors.items()}


def _key_in_peft(key: str) -> str:
    part, _, rest = key.partition(".")
    if part in _PARTS:
        return f"base_model.{part}.default.{rest}"
    if _BLOCK_HERE.fullmatch(key):
        return _BLOCK_HERE.sub(r"base_model.model.\1.\2.default.\3", key)
    return f"base_model.model.{key.removeprefix('base_model.')}"


def _unpacked(config: ShadowConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the paths of the parameters."""
    return {_key_here(key): tensor for key, tensor in tensors.items()}


def _key_here(key: str) -> str:
    _, _, rest = key.partition(".")
    part, _, own = rest.partition(".default.")
    if part in _PARTS:
        return f"{part}.{own}"
    found = _BLOCK_IN_PEFT.fullmatch(key)
    return key if found is None else f"{found[1]}.{found[2]}.{found[3] or 'weight'}"


def _networks(manager: Any) -> dict[str, ShadowNetwork]:
    """Adapter name -> adapter, of all on a model."""
    adapters = ((name, one) for layer in manager.layers.values() for name, one in layer.adapters._modules.items())
    return {name: one for name, one in adapters if isinstance(one, ShadowNetwork)}


def _active(manager: Any) -> ShadowNetwork | None:
    """The active adapter with a network; None if there is none."""
    return next((one for name, one in _networks(manager).items() if name in manager.active), None)


def _last_loss(tuner: Any) -> Tensor | None:
    """The loss of the network in the last call with labels, detached."""
    active = _active(tuner.manager)
    return None if active is None else active.last_loss


def _last_state(tuner: Any) -> Tensor | None:
    """The state before the first block in the last call."""
    active = _active(tuner.manager)
    return None if active is None else active.last_state


def _set_last_state(tuner: Any, state: Tensor | None) -> None:
    active = _active(tuner.manager)
    if active is not None:
        active.bind(last_state=state)


def own_loss(manager: Any, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
    """Returns the loss of the active adapter's network in the last call, without its weight.

    Args:
        manager: manager of the model.
        labels: labels of the task: of tokens, (rows, length), or of rows.
        attention_mask: attention mask of the call, (rows, length), which shows the last token of each row.

    Returns:
        A scalar with gradient; None if there was no call, or the network has no head.
    """
    active = _active(manager)
    if active is None or active.last_state is None:
        return None
    return active.own_loss(manager.model, {"labels": labels, "attention_mask": attention_mask}, active.last_state)


def unload_shadow(manager: Any, adapter_name: str | None = None, copy: bool = False) -> Any:
    """Returns the network of an adapter as a separate model, with the head of the base model.

    Args:
        manager: manager of the model.
        adapter_name: name of the adapter; None for the active one.
        copy: copy all tensors, including the input embedding, so that the whole model can be saved.

    Raises:
        UnknownAdapterError: there is no such adapter.
        NotSupportedError: the model is a diffusion transformer.
    """
    from nbpeft.engine.methods.shadow.detached import detached

    found = _networks(manager)
    name = next((one for one in manager.active if one in found), None) if adapter_name is None else adapter_name
    if name is None or name not in found:
        raise UnknownAdapterError(f"there is no ShadowPEFT adapter {name or 'active'!r}", adapter=name)
    if found[name].recipe.reads_states:
        raise NotSupportedError("unload_shadow() is not supported for Diffusers models: their network makes no image")
    return detached(found[name], manager.model, owned=copy)


def _head(manager: Any, adapter_name: str) -> nn.Module | None:
    """The head that the loss of a network is computed with."""
    network = _networks(manager)[adapter_name]
    return embedding_of(manager.model, output=True) if network.recipe.is_lm else network._modules.get("shadow_head")


def _sharing(tuner: Any) -> dict[str, bool]:
    """Adapter name -> whether its network reads the embeddings of the model."""
    return {name: one.recipe.shares for name, one in _networks(tuner.manager).items()}


@register(
    ShadowConfig,
    peft_type="SHADOW",
    label="ShadowPEFT",
    listing=Listing(
        when="if a small model is wanted as well: it steers the large one and can be detached",
        paper="arXiv:2604.19254",
        summary=lambda config: {"r": str(config.r), "network": shown_network(config)},
        smaller=lambda config: config.copy(r=max(1, config.r // 2)) if config.r > 1 else None,
    ),
    sample_configs={"one-layer": {"shadow_num_hidden_layers": 1, "shadow_alpha": 1.0}},
    calls=CallInputs(context=lambda config, args, kwargs: None),
    files=FileFormat(pack=_packed, unpack=_unpacked),
)
class ShadowNetwork(ModelAdapter, HasSideNetwork):
    """The network, its projection and head, and for each block the modules that compute its delta and the next state.

    The modules of a block are below the block's path in the model.
    """

    peft: ClassVar[PeftNames] = PeftNames(
        f"{_OF_BLOCK.replace('|', ' ')} shadow_dropout",
        "shadow_r shadow_alpha",
        layer="shadow.ShadowLayer",
        model_functions={
            "unload_shadow": unload_shadow,
            "shadow_auxiliary_loss": own_loss,
            "_resolve_shadow_head": _head,
        },
        model_attributes={
            "last_shadow_loss": _last_loss,
            "_seed_shadow_state": property(_last_state, _set_last_state),
            "_shadow_share_embeddings": _sharing,
        },
        attributes={"shadow_r": "rank", "shadow_alpha": "alpha"},
        shown_as="shadow_networks",
        on_model=_PARTS,
    )
    from_config: ClassVar[Mapping[str, str]] = {
        "rank": "r",
        "alpha": "shadow_alpha",
        "loss_weight": "auxiliary_loss_weight",
    }
    needs_embedding: ClassVar[bool] = False
    title: str = "ShadowPEFT"

    def __init__(self, config: ShadowConfig) -> None:
        super().__init__(config)
        recipe = config.recipe
        assert recipe is not None, "the config is not completed for a model"
        self.bind(recipe=recipe, places=config.places, **self._config_values(config, ""))
        self._modules["shadow_backbone"] = network = recipe.network()
        self._modules["shadow_projection"] = recipe.projection()
        if recipe.head is not None:
            self._modules["shadow_head"] = copy.deepcopy(recipe.head)
        for path in config.places:
            *parents, last = path.split(".")
            holder: nn.Module = self
            for name in parents:
                holder = holder._modules.setdefault(name, nn.Module())  # type: ignore[assignment]
            holder._modules[last] = ShadowBlock(config, recipe.width)
        kept = {id(one) for module in recipe.frozen_modules(network) for one in module.parameters()}
        if kept:
            frozen = tuple(name for name, parameter in self.named_parameters() if id(parameter) in kept)
            self.bind(frozen_parameters=frozen)

    recipe: Recipe
    alpha: float
    rank: int

    @property
    def training(self) -> bool:
        """The mode of its network: handles list the network, and not the adapter itself."""
        network = self.__dict__.get("_modules", {}).get("shadow_backbone")
        return network is None or network.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Does nothing: ``train()`` also sets the mode of the network."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "last_state": None}  # which belongs to a call

    @classmethod
    def create(cls, config: Any, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Binds loaded tensors or draws new ones as PEFT does; see ``Adapter``."""
        without_data = site.device.type == "meta"
        with torch.device("meta") if without_data else nullcontext():
            if tensors is None:
                made = cls(config)
            else:
                with torch.random.fork_rng(devices=()):
                    made = cls(config)
        given = dict(tensors or made.start(config))
        for name, parameter in list(made.named_parameters()):
            value = given.get(name, parameter).detach()
            if tensors is None and value.dtype != site.base.dtype:
                value = value.to(site.base.dtype)
            owner, _, own = name.rpartition(".")
            bound = nn.Parameter(value.to(site.device, site.dtype), name not in made.frozen_parameters)
            setattr(made.get_submodule(owner), own, bound)
        for module in made.modules():
            for own, buffer in module._buffers.items():
                module._buffers[own] = None if buffer is None else buffer.to(site.device)
        return made

    def start(self, config: ShadowConfig) -> dict[str, Tensor]:
        """The tensors of a new adapter that are not drawn, by name."""
        found = {f"shadow_head.{name}": value.clone() for name, value in self.recipe.head_tensors().items()}
        network: Any = self._modules["shadow_backbone"]
        if self.recipe.starts_from_tensors and not next(network.parameters()).is_meta:
            own, projection = self.recipe.weights(network, config.stored_tensors)
            found |= {f"shadow_backbone.{name}": value for name, value in own.items()}
            if projection is not None:
                found["shadow_projection.weight"] = projection
        return found

    def first_state(self, model: nn.Module, call: dict[str, Any]) -> Tensor | None:
        """The projected output of the network; see ``HasSideNetwork``."""
        if self.recipe.reads_states:
            return None
        network: Any = self._modules["shadow_backbone"]
        ids: Tensor | None = call.get("input_ids")
        embeds: Tensor | None = call.get("inputs_embeds")
        if embeds is None and self.recipe.shares and ids is not None:
            embeds = model.get_input_embeddings()(ids)  # type: ignore[operator]
        if not self.recipe.shares and ids is None:
            raise AdapterError("the network of the active ShadowPEFT adapter has its own embedding: pass input_ids")
        if ids is None and embeds is None:
            raise AdapterError("pass input_ids or inputs_embeds, which the network of the active adapter reads")
        options: dict[str, Any] = {name: call.get(name) for name in ("attention_mask", "position_ids") if name in call}
        name = cache_argument(model)
        given = take_cache(call, name) if name else None
        options["use_cache"] = bool(name) and (given is not None or fills_cache(model, call))
        if options["use_cache"]:
            from nbpeft.engine.calls.two_pass_cache import with_first_pass
            from nbpeft.engine.methods.shadow.cache import ShadowCache

            call[name] = with_first_pass(given, model, network, ShadowCache)
            options[cache_argument(network)] = call[name].first_pass
        if embeds is not None and self.recipe.shares:
            options["inputs_embeds"] = embeds.to(next(network.parameters()).dtype)
        else:
            options["input_ids"] = ids
        output = network(return_dict=True, **options)
        state: Tensor = self._modules["shadow_projection"](output.last_hidden_state)  # type: ignore[misc]
        return state

    def state_of(self, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
        """The projected output of the network for a diffusion transformer; see ``HasSideNetwork``."""
        network: Any = self._modules["shadow_backbone"]
        state: Tensor = self._modules["shadow_projection"](network(hidden, call))  # type: ignore[misc]
        return state

    def injected(self, path: str, hidden: Tensor, state: Tensor, scale: float) -> Tensor:
        """The hidden states and a low-rank map of how they differ from the state; see ``HasSideNetwork``."""
        block: Any = self.get_submodule(path)
        dtype = block.shadow_down.weight.dtype
        differing = block.shadow_dropout(hidden.to(dtype) - state.to(dtype))
        added = block.shadow_up(block.shadow_down(differing))
        changed: Tensor = hidden + (self.alpha * scale * added).to(hidden.dtype)
        return changed

    def advanced(self, path: str, hidden: Tensor, state: Tensor) -> Tensor:
        """A mean of the state and of a map of the block's output, with a gate; see ``HasSideNetwork``."""
        block: Any = self.get_submodule(path)
        hidden = hidden.to(block.shadow_down.weight.dtype)
        candidate = block.shadow_update_transform(hidden)
        gate = torch.sigmoid(block.shadow_update_gate(hidden))
        following: Tensor = (1.0 - gate) * state.to(hidden.dtype) + gate * candidate
        return following

    def own_loss(self, model: nn.Module, call: Mapping[str, Any], state: Tensor) -> Tensor | None:
        """The loss of the head on the network's output; see ``HasSideNetwork``."""
        labels: Tensor = call["labels"]
        if self.recipe.is_lm:
            head: Any = embedding_of(model, output=True)
            return None if head is None else language_loss(head(in_dtype_of(head, state)[:, :-1]), labels[:, 1:])
        own = self._modules.get("shadow_head")
        return None if own is None else class_loss(own(last_tokens(state, call.get("attention_mask"))), labels)

    def unmergeable_reason(self, base: BaseLayer) -> str:
        """Why it cannot be merged; see ``Adapter``."""
        return "the weights: its changes of a block's input depend on the text; unload_shadow() returns its network"

    @classmethod
    def config_warnings(
        cls, config: ShadowConfig, modules: Sequence[tuple[str, nn.Module, LayerKind]]
    ) -> Iterable[str]:
        """Warns about ``layers_to_transform``, which has no effect."""
        if config.layers_to_transform is not None:
            yield "layers_to_transform has no effect on ShadowPEFT, as in PEFT: name the blocks in target_modules"

    def swap_refusal(self) -> str:
        """Why the adapter cannot be hot-swapped; see ``Adapter``."""
        return "is a second network; load the other one under another name and switch with set_adapter()"

    def reset_(self, base: BaseLayer) -> None:
        """Sets W_up to zero, so that nothing is added; see ``Adapter``."""
        for path in self.places:
            block: Any = self.get_submodule(path)
            block.shadow_up.weight.detach().zero_()


class ShadowBlock(nn.Module):
    """The parts of an adapter for one block.

    Attributes:
        shadow_down: from the features to the rank.
        shadow_up: from the rank to the features; initialized with zeros.
        shadow_dropout: dropout of the input of ``shadow_down``.
        shadow_update_transform: computes a candidate for the next state.
        shadow_update_gate: computes the weight of the candidate.
    """

    def __init__(self, config: ShadowConfig, width: int) -> None:
        super().__init__()
        inside = config.update_hidden_size or config.r
        self.shadow_down = nn.Linear(width, config.r, bias=False)
        self.shadow_up = nn.Linear(config.r, width, bias=False)
        if config.init_weights:
            nn.init.zeros_(self.shadow_up.weight)
        self.shadow_dropout = nn.Dropout(config.shadow_dropout) if config.shadow_dropout else nn.Identity()
        self.shadow_update_transform, self.shadow_update_gate = (
            nn.Sequential(nn.Linear(width, inside), nn.GELU(), nn.Linear(inside, width)) for _ in range(2)
        )


def shown_network(config: ShadowConfig) -> str:
    """A description of the network: its number of layers, or its source."""
    return f"{config.shadow_num_hidden_layers or 1} layers" if config.shadow_model == "mirror" else config.shadow_model
