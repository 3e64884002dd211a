"""Checks in the first steps whether the adapter learns; reports in one line with the remedy.

A training that cannot learn looks like one that learns slowly. The checks are:

    before the first step    is any parameter trainable; is a new head frozen, and so not saved
    after the first step     did gradients reach the adapted modules, and were they finite
    after ten steps          did any trained weight change
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nbpeft.engine.calls.model_properties import class_names
from nbpeft.engine.tree.model_tree import embedding_of
from nbpeft.errors import few
from nbpeft.training.adapters.adapted_model import base_of, is_adapted, module_path, trainable

PATIENCE = 10
"""The number of steps after which weights must have changed; the first ones may have a learning rate of 0 (warm-up)."""

_SAMPLE = 64
_MOST = 1e4
"""The absolute value above which weights of an adapter count as exploded."""
TOO_HIGH = "the learning rate is too high"
_REMEDY_CHECKPOINTING = (
    "gradient checkpointing with use_reentrant=True detaches the graph because the embeddings are frozen; "
    "call model.enable_input_require_grads(), or use use_reentrant=False"
)


class LearningCheck:
    """Checks the first steps of a run.

    Args:
        model: The model in training; the check has only weak references to it and its parameters.
        adapter: The name of the trained adapters in messages; empty for a model without.
        rewarded: Whether gradients are zero in steps in which all completions of a prompt have the same reward.
    """

    def __init__(self, model: nn.Module, adapter: str, *, rewarded: bool = False) -> None:
        self._rewarded = rewarded
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._subject = f"adapter {adapter!r}" if adapter else "the model"
        named = dict(trainable(model))
        self._paths = {name: module_path(name) for name in named}
        self._parameters = weakref.WeakValueDictionary(named)
        self._before = {name: _sample(parameter) for name, parameter in named.items()}
        self._largest: dict[str, Tensor] = {}
        self._hooks = [self._watch(name, parameter) for name, parameter in named.items()]
        # The hooks are on the parameters, which outlive the run. At exit they need not be removed.
        weakref.finalize(self, _remove, self._hooks).atexit = False
        self._gradients_checked = False
        self._peaks: list[Tensor] = []

    @property
    def has_exploded(self) -> bool:
        """Whether weights had exploded before the run, or did in its first steps and are not just NaN as the loss is.

        Whether a loss computed from such weights is NaN, infinite or a large number depends on roundings.
        """
        return any(float(peak) > _MOST for peak in self._peaks)

    def before(self) -> str:
        """The message before the first step, or the empty string."""
        model = self._model()
        if model is None:
            return ""
        if self._exploded():
            self._peaks.append(torch.tensor(math.inf))
            self.close()
            return (
                f"Weights of {self._subject} had exploded before this run, probably in one with too high a learning "
                "rate: load a saved version, or start with a new adapter."
            )
        if not self._paths:
            self.close()
            return f"Nothing is trainable: {self._subject} is frozen. Unfreeze it, or activate one that is trainable."
        return frozen_head(model)

    def after_step(self, steps: int, *, last: bool = False) -> str:
        """The message after ``steps`` optimizer steps, or the empty string.

        Args:
            steps: The number of steps done in this run.
            last: Whether no further step follows.
        """
        message = ""
        model = self._model()
        if model is None:
            return message
        if self._are_replaced(model):  # by FSDP2, or by loading an adapter of another rank from a checkpoint
            self.close()
            return message
        self._note_peak()
        # A user's loop may report a step before its backward pass: then there are no gradients yet at step 1.
        if not self._gradients_checked and (self._largest or steps > 1 or last):
            if self._was_skipped() and steps < PATIENCE and not last:
                self._largest = {}
                return message
            self._gradients_checked = True
            message = self._judge_gradients(model)
            self._release_hooks()
        if steps >= PATIENCE or last:
            message = message if not self._exploded() else self._explosion(steps)
            message = message or self._judge_weights(steps)
        if message or steps >= PATIENCE or last:
            self.close()
        return message

    def close(self) -> None:
        """Removes all hooks from the model and the reference to it."""
        self._release_hooks()
        self._model = lambda: None
        self._before = {}

    def _watch(self, name: str, parameter: nn.Parameter) -> RemovableHandle:
        weak_self = weakref.ref(
            self
        )  # a strong reference in a C++ hook is a cycle that the garbage collector cannot see

        def note(parameter: Tensor) -> None:
            check = weak_self()
            if check is not None and parameter.grad is not None:  # of all batches of the step so far
                check._largest[name] = _peak(parameter.grad)

        register: Callable[..., RemovableHandle] = parameter.register_post_accumulate_grad_hook
        return register(note)

    def _release_hooks(self) -> None:
        _remove(self._hooks)
        self._largest = {}

    def _was_skipped(self) -> bool:
        """Whether gradients overflowed but all weights are finite, as while a GradScaler searches for its scale."""
        if not self._largest or bool(self._all_largest().isfinite().all()):
            return False
        return all(bool(_sample(parameter).isfinite().all()) for parameter in self._parameters.values())

    def _all_largest(self) -> Tensor:
        """One entry per parameter, on the CPU; fetched in one transfer, since each one waits for the device."""
        values = list(self._largest.values())
        return torch.stack([value.to(values[0].device) for value in values]).to("cpu")

    def _judge_gradients(self, model: nn.Module) -> str:
        # A method may have frozen some of them by now, e.g. pruned ranks.
        modules = {self._paths[name] for name, parameter in self._parameters.items() if parameter.requires_grad}
        reached = {self._paths[name] for name in self._largest}
        missed = sorted(modules - reached)
        if missed:
            why = (
                why_no_gradient(model)
                or "are these modules used in the forward pass, and is the loss computed from it?"
            )
            who = f"none of the {len(modules)}" if not reached else f"{len(missed)} of {len(modules)}"
            verb = "was" if not reached else "were not"
            where = f" ({few(missed, 3, quoted=False)})"
            return f"Of {self._subject}, {who} trained modules {verb} reached by a gradient{where}: {why}."
        largest = self._all_largest()
        if bool(largest.isnan().any()) or bool(largest.isinf().any()):
            return (
                f"The first gradients of {self._subject} are not finite: is there a label that is not -100, "
                "and does bf16 help instead of fp16?"
            )
        if not bool(largest.any()) and not self._rewarded:
            return f"All first gradients of {self._subject} are zero: is there a label that is not -100?"
        return ""

    def _are_replaced(self, model: nn.Module) -> bool:
        """Whether the model has other parameters by now; other objects may still reference the former ones."""
        present = {id(parameter) for parameter in model.parameters()}
        watched = list(self._parameters.values())
        return len(watched) < len(self._paths) or not all(id(parameter) in present for parameter in watched)

    def _note_peak(self) -> None:
        """Notes the largest value of this step, without waiting for the device."""
        peaks = [_peak(_sample(parameter)) for parameter in self._parameters.values()]
        if peaks:
            self._peaks.append(
                torch.stack([peak.to(peaks[0].device) for peak in peaks]).nan_to_num(0.0, math.inf).amax()
            )

    def _exploded(self) -> bool:
        """Whether trained parameters have extreme values or NaN."""
        return have_exploded(self._parameters.values())

    def _explosion(self, steps: int) -> str:
        return f"Weights of {self._subject} have exploded in {steps} step{'' if steps == 1 else 's'}: {TOO_HIGH}."

    def _judge_weights(self, steps: int) -> str:
        # A Trainer may have moved the model to another device since the samples were taken.
        pairs = ((_sample(parameter), self._before[name]) for name, parameter in self._parameters.items())
        if not all(torch.equal(now.to(before.device), before) for now, before in pairs):
            return ""
        why = "is the learning rate zero, or was the optimizer created before the adapter?"
        if self._rewarded:
            why = "had all completions of a prompt the same reward, or is the learning rate zero?"
        return f"No weight of {self._subject} has changed in {steps} step{'' if steps == 1 else 's'}: {why}"


def have_exploded(parameters: Iterable[Tensor]) -> bool:
    """Whether parameters have extreme values or NaN; only up to 64 elements of each parameter are checked."""
    peaks = _peaks(parameters)
    return bool(peaks.numel()) and not float(peaks.amax()) <= _MOST


def _peaks(parameters: Iterable[Tensor]) -> Tensor:
    """The largest absolute value of a sample of each parameter, of shape (parameters,)."""
    peaks = [_peak(_sample(parameter)) for parameter in parameters]
    return torch.stack([peak.to(peaks[0].device) for peak in peaks]) if peaks else torch.empty(0)


def _remove(hooks: list[RemovableHandle]) -> None:
    while hooks:
        hooks.pop().remove()


def _peak(tensor: Tensor) -> Tensor:
    """The largest absolute value as a scalar tensor; 0 for an empty tensor, e.g. of a layer with no ranks left."""
    return tensor.detach().abs().amax().float() if tensor.numel() else tensor.new_zeros((), dtype=torch.float32)


def _sample(parameter: Tensor) -> Tensor:
    """A copy of up to 64 elements spread over a parameter, of shape (n,)."""
    tensor: Any = parameter.detach()
    flat: Tensor = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).reshape(
        -1
    )  # of a sharded parameter the local shard
    return flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].clone()


def why_no_gradient(model: nn.Module) -> str:
    """The reason why gradients do not reach the adapter, if it is a known one; else the empty string."""
    base = base_of(model)
    reentrant = False
    for module in base.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and getattr(module, "gradient_checkpointing", False):
            reentrant = reentrant or bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    if reentrant and not _inputs_require_grad(base):
        return _REMEDY_CHECKPOINTING
    return ""


def _inputs_require_grad(base: Any) -> bool:
    embeddings = embedding_of(base)
    if embeddings is None:
        return False
    hooked = any("require_grad" in getattr(hook, "__name__", "") for hook in embeddings._forward_hooks.values())
    return hooked or any(parameter.requires_grad for parameter in embeddings.parameters())


def frozen_head(model: nn.Module, adapter: str | None = None) -> str:
    """A warning about a newly initialized head that is not trained and not saved, or the empty string.

    A head is new if the checkpoint was written by a model of another class.

    Args:
        model: the adapted model.
        adapter: the adapter to save; None for those in training.
    """
    base: Any = base_of(model)
    written_by = getattr(getattr(base, "config", None), "architectures", None)
    if not is_adapted(model) or not written_by or not {*written_by}.isdisjoint(class_names(base)):
        return ""
    for name in _head_names(base):
        head = getattr(base, name)
        copies, part = (trainable(head), "") if adapter is None else (head.named_parameters(), f"{adapter}.")
        if any(f".modules_to_save.{part}" in f".{path}." for path, _ in copies):
            continue
        return (
            f"The head {name!r} is newly initialized (the checkpoint is of a {written_by[0]}) and is not saved "
            f"with the adapter: set modules_to_save=[{name!r}] in its config."
        )
    return ""


def _head_names(base: Any) -> list[str]:
    """The children of a task model outside its backbone that have weights of their own."""
    backbone = getattr(base, getattr(base, "base_model_prefix", ""), None)
    if backbone is None or backbone is base:
        return []
    inside = {id(parameter) for parameter in backbone.parameters()}
    return [
        name
        for name, child in base.named_children()
        if child is not backbone and any(id(parameter) not in inside for parameter in child.parameters())
    ]
