"""Runs an adapter's network next to a model: its state passes through the model's blocks with the hidden states.

A hook on the model computes the first state before each call (``prepared_calls``). Hooks on the blocks let the adapter
change a block's input, and update the state with the block's output. A block that gradient checkpointing recomputes
reads the state of its forward. A last hook adds the network's own loss to that of the call.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from nbpeft.engine.calls.model_calls import LayerHook
from nbpeft.engine.calls.model_properties import checkpoints_gradients, parameters_of
from nbpeft.engine.calls.prepared_calls import BeforeCall, PlaceHook, put_at_places, put_before_calls
from nbpeft.engine.changes.active_state import ActiveAdapters
from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.loss_terms import share_of_batch
from nbpeft.engine.contract.model_adapter import HasSideNetwork
from nbpeft.engine.tree.model_tree import walk
from nbpeft.engine.wrappers.block import AdaptedBlock
from nbpeft.engine.wrappers.extension import class_of_wrapper
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import AdapterError

_KEPT = "nbpeft_side_states"
"""Key in the metadata of the autograd node of a block's output, which keeps the states of ``SideState.kept`` alive."""


class _Kept:
    """The state before a block, for recomputing the block."""

    def __init__(self, state: Tensor) -> None:
        self.state = state.detach().requires_grad_(state.requires_grad)


class SideState:
    """The state of a network in one call of the model.

    Attributes:
        start: the network's output, (rows, length, features); None once the call has ended, and where ``is_inside``.
        is_inside: whether the network reads the input of the first block, and not that of the model.
        current: the state before the next block; None before it is computed, and once the call has ended.
        has_ended: whether the call has ended.
        learns: whether gradients are recorded in the call.
        kept: path of a block -> the state before it, as long as backward may recompute the block; None if blocks are
            not checkpointed.
    """

    def __init__(self, start: Tensor | None, *, recomputes: bool) -> None:
        self.start = self.current = start
        self.is_inside, self.has_ended = start is None, False
        self.learns = torch.is_grad_enabled()
        self.kept: WeakValueDictionary[str, _Kept] | None = WeakValueDictionary() if recomputes else None

    def before(self, path: str) -> tuple[Tensor | None, bool]:
        """The state before a block that is being called, and whether the block is recomputed."""
        if self.kept is not None and torch._C._current_graph_task_id() != -1:
            kept = self.kept.get(path)
            if kept is not None:
                return kept.state, True
        return self.current, False

    def keep(self, path: str, output: Tensor) -> None:
        """Keeps the state before a block alive as long as the graph of the block's output, if it may be recomputed."""
        if self.kept is not None and self.current is not None and output.grad_fn is not None:
            self.kept[path] = kept = _Kept(self.current)
            notes: Any = output.grad_fn.metadata
            notes.setdefault(_KEPT, []).append(kept)

    def end(self) -> None:
        """Releases the tensors of the call."""
        self.start = self.current = None
        self.has_ended = True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "start": None, "current": None, "has_ended": True, "learns": False, "kept": None}


class _SideCall(BeforeCall):
    """A hook that computes the first state before each call of a model."""

    def computing(self, active: ActiveAdapters) -> dict[str, HasSideNetwork]:
        """Adapter name -> adapter, for the active adapters with a network."""
        return _networks_in(self.layer, active.call_names)

    def prepare(self, module: nn.Module, call: dict[str, Any], active: ActiveAdapters, found: dict[str, Any]) -> None:
        """Runs the network.

        Raises:
            AdapterError: several networks are active, or the batch is mixed.
        """
        (name, adapter), *more = found.items()
        title = adapter.title
        if active.rows is not None:
            raise AdapterError(f"{title} does not support mixed batches: pass the rows of adapter {name!r} separately")
        if more:
            raise AdapterError(f"{title} requires exactly one active adapter, not {name!r} and {more[0][0]!r}")
        contexts: Any = active.context
        recomputes = torch.is_grad_enabled() and checkpoints_gradients(module)
        adapter.__dict__["last_state"] = None  # before the next one is computed
        adapter.__dict__["last_state"] = state = adapter.first_state(module, call)
        contexts[name] = SideState(state, recomputes=recomputes)

    def end(self) -> None:
        for context in self.layer.active_state.current().context.values():
            if isinstance(context, SideState):
                context.end()
        super().end()


class _OwnLoss(LayerHook):
    """A hook that adds the loss of a network to that of the call."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        active = self.layer.active_state.current()
        networks = _networks_in(self.layer, active.names)
        for name, adapter in networks.items():
            state: Any = active.context.get(name)
            if not isinstance(state, SideState) or state.start is None:
                continue
            adapter.last_loss = None
            labels = kwargs.get("labels")
            in_tuple = isinstance(output, tuple)
            loss = output[0] if in_tuple and labels is not None else getattr(output, "loss", None)
            extra = None if labels is None or loss is None else adapter.own_loss(module, kwargs, state.start)
            if extra is None:
                continue
            adapter.last_loss = extra.detach()
            # A loss without a gradient is an evaluation of the model, and is not changed.
            if torch.is_grad_enabled() and adapter.loss_weight:
                share = share_of_batch(labels, kwargs.get("num_items_in_batch"), shifts=True)
                loss = loss + (extra * (adapter.loss_weight * share)).to(loss)
            if in_tuple:
                output = (loss, *output[1:])
            else:
                output.loss, output.shadow_loss = loss, adapter.last_loss
        return output


class _BlockHook(PlaceHook):
    """A hook before or after a block."""

    def found(self) -> tuple[Any, SideState, float] | None:
        """The active adapter, the state of the call and the factor on the adapter's delta; None if none is active.

        Raises:
            AdapterError: the block is called outside of a call of the whole model.
        """
        active = self.layer.active_state.current()
        for name, scale in zip(active.names, active.scales, strict=True):
            adapter: Any = self.layer.adapters._modules.get(name)
            if not isinstance(adapter, HasSideNetwork) or self.path not in adapter.places:
                continue
            state = active.context.get(name)
            if not isinstance(state, SideState):
                raise AdapterError(
                    f"adapter {name!r} only works in calls of the whole model, but {self.path} is called alone"
                )
            return adapter, state, scale
        return None


class _BeforeBlock(_BlockHook):
    """A hook before a block."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments with the adapter's delta added; see ``nn.Module.register_forward_pre_hook``."""
        active = self.found()
        if active is None:
            return None
        adapter, run, scale = active
        state, again = run.before(self.path)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if run.is_inside and self.path == adapter.places[0] and (again or not run.has_ended):
            named = dict(zip(parameters_of(module), args, strict=False)) | kwargs
            state = adapter.state_of(hidden, named)  # again, too: the network is a part of what backward recomputes
            if not again:
                adapter.__dict__["last_state"] = run.current = state
        if state is None:
            raise AdapterError(f"{self.path} is called after the call of the whole model has ended")
        if run.learns and not again and not torch.is_grad_enabled():
            raise AdapterError(
                f"{adapter.title} does not train with reentrant gradient checkpointing: pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        if hidden.shape[:-1] != state.shape[:-1]:
            raise AdapterError(
                f"{adapter.title} has states for {tuple(state.shape[:-1])} tokens, and {self.path} reads "
                f"{tuple(hidden.shape[:-1])}: do not combine it with an adapter that inserts tokens before the input"
            )
        changed = adapter.injected(self.path, hidden, state.to(hidden.device), scale)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})


class _AfterBlock(_BlockHook):
    """A hook after a block."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Updates the state with the block's output."""
        active = self.found()
        if active is None:
            return
        adapter, run, _ = active
        state, again = run.before(self.path)
        if state is None:
            return
        if run.is_inside and not isinstance(output, Tensor):
            raise AdapterError(
                f"{adapter.title} works with blocks of a diffusion transformer that only return their hidden states, "
                f"but {self.path} returns a {type(output).__name__}"
            )
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if not again:
            run.keep(self.path, hidden)
        if self.path == adapter.places[-1]:  # the state after the last block is not read
            return
        following = adapter.advanced(self.path, hidden, state.to(hidden.device))
        if not again:
            run.current = following


def _networks_in(layer: AdaptedLayer, names: tuple[str, ...]) -> dict[str, Any]:
    adapters = layer.adapters._modules
    return {name: adapters[name] for name in names if isinstance(adapters.get(name), HasSideNetwork)}


def _has_side_network(block: nn.Module) -> bool:
    """Whether a network changes the input of a block."""
    return any(isinstance(hook, _BeforeBlock) for hook in block._forward_pre_hooks.values())


def put_side_network(model: nn.Module, layer: AdaptedLayer, change: Transaction) -> None:
    """Registers the hooks that run the networks of an embedding's model adapters, and wraps the blocks; once for each.

    Args:
        model: the base model.
        layer: its adapted input embedding.
        change: records the hooks of the modules.
    """
    networks = [adapter for adapter in layer.adapters._modules.values() if isinstance(adapter, HasSideNetwork)]
    if not networks:
        return
    wrapper = class_of_wrapper(AdaptedBlock, type(networks[0]))  # type: ignore[arg-type]
    put_before_calls(model, _SideCall(layer), change, _OwnLoss(layer))
    put_at_places(model, layer, HasSideNetwork, change, before=_BeforeBlock, after=_AfterBlock)
    for site in [*walk(model)]:
        is_wrapped = isinstance(site.parent._modules[site.attribute], AdaptedBlock)
        if _has_side_network(site.module) and not is_wrapped:
            change.set_item(site.parent._modules, site.attribute, wrapper(site.module, layer, site.path))
