"""Optional capabilities of adapters: classes to derive from in addition to ``Adapter``.

The engine checks ``isinstance(adapter, Rescales)`` and never which method it has:

    TransformsInput, TransformsOutput   change the input or output of the base call, without a second matrix product
    ReplacesCall                        compute the layer's output without the base call
    AddsTogether                        add several active adapters to an output in one pass
    FusesAdd, MergesInPlace             add to the output or to the weight without a second tensor of that size
    Rescales                            have a scaling that can be changed
    ChangesBase                         change the frozen layer when they are added to it
    Paddable                            fit into larger tensors, so that a compiled model is not compiled again
    ServesRows                          serve a mixed batch in one pass
    ConvertsToLora                      add a product of two thin matrices, so that they can be converted exactly
    IsLowRank                           are saved as such a product, so that any LoRA runtime can serve them
    HasFixedTensors                     have buffers that are saved
    WeightInitialized                   are initialized from a part of the weight
    TiedAdapter                         use the tensors of the adapter on another layer
    HasInnerAdapters                    consist of several adapters
    Untargeted                          do not change the layer's weight as a whole
    NotConvertible                      change the layer in a way that a LoRA cannot
    MeasuresDelta                       can measure their delta without computing it
    HotSwaps                            have a size, settings or limitations that matter for hot-swapping
    QuantizationAware                   may be trained against the rounding that merging causes
    ShowsModules                        have submodules that PEFT's layers have and that can be called
    LearnsWithHooks                     run code in each training step besides backward (``training_hooks.py``)
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter_weights import InitialComponent, LowRankDelta
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.base import Shape as Shape


class TransformsInput:
    """Changes the input of the base call instead of adding to its output, if it is the only active adapter there."""

    def transform_input(self, x: Tensor, base: BaseLayer) -> Tensor:
        """Computes the input to call the frozen layer with.

        Args:
            x: the layer's input, (…, in).
            base: the layer.

        Returns:
            A tensor with the shape and dtype of ``x``.
        """
        raise NotImplementedError


class ReplacesCall:
    """Computes the layer's output without the base call, if it is the only active adapter and there are no hooks."""

    def output(self, x: Tensor, base: BaseLayer) -> Tensor | None:
        """Computes the output of the adapted layer.

        Args:
            x: the layer's input, (…, in).
            base: the layer.

        Returns:
            The output, (…, out), bias included, in the layer's dtype; None if the base layer must be called instead.
        """
        raise NotImplementedError


class TransformsOutput:
    """Changes the output of the base call, if it is the only active adapter there.

    With ``TransformsInput`` in the same class, that is the call with the changed input.
    """

    def transform_output(self, output: Tensor, base: BaseLayer) -> Tensor:
        """Computes the output of the adapted layer.

        Args:
            output: output of the base call, (…, out), bias included.
            base: the layer.

        Returns:
            A tensor with the shape and dtype of ``output``.
        """
        raise NotImplementedError


class FusesAdd:
    """Its ``forward`` takes ``fused=True`` and then returns ``base_output`` plus the delta, which can be cheaper."""


class AddsTogether(ABC):
    """Adds the deltas of several active adapters of this class to an output in one pass."""

    @classmethod
    @abstractmethod
    def added(
        cls, adapters: Sequence[Any], scales: Sequence[float], x: Tensor, output: Tensor, base: BaseLayer
    ) -> Tensor | None:
        """Computes ``output`` plus the scaled deltas.

        Args:
            adapters: at least two adapters of this class.
            scales: factor on the delta of each.
            x: the layer's input.
            output: the base layer's output, on the device of ``x``.
            base: the layer.

        Returns:
            The sum in the dtype of ``output``; None if the deltas have to be computed one after the other.
        """


class MergesInPlace(ABC):
    """Adds its delta to a weight without a second tensor of the weight's size."""

    @abstractmethod
    def add_to_(self, weight: Tensor, base: BaseLayer, scale: float) -> None:
        """Adds ``scale * delta_weight(weight)`` to a canonical weight in place.

        Args:
            weight: the canonical weight to change.
            base: the layer.
            scale: factor on the delta.
        """


class Rescales:
    """Has a factor on its delta, ``scaling``, which can be changed while the adapter is loaded.

    Attributes:
        scaling: the factor; a 0-d tensor after the model was prepared for hot-swapping under ``torch.compile``.
    """

    scaling: float | Tensor
    _trained_scaling: float | None = None

    @property
    def trained_scaling(self) -> float:
        """The factor from its config, even if ``scaling`` was changed."""
        return float(self.scaling) if self._trained_scaling is None else self._trained_scaling

    def rescale(self, scaling: float | Tensor, *, trained: bool = False) -> None:
        """Sets the factor, in place if it is a tensor.

        Args:
            scaling: the new factor.
            trained: also make it the ``trained_scaling``.
        """
        own = vars(self)
        own["_trained_scaling"] = None if trained else self.trained_scaling
        if isinstance(self.scaling, Tensor):
            self.scaling.fill_(float(scaling))
        else:
            own["scaling"] = float(scaling)

    def keep_scaling(self, change: Transaction) -> None:
        """Records the factor, so that a failed change can restore it."""
        change.keep_attributes(self, "scaling", "_trained_scaling")
        if isinstance(self.scaling, Tensor):
            change.keep_values([self.scaling])

    def store_scaling_as_tensor(self, device: torch.device) -> None:
        """Stores the factor as a tensor: ``torch.compile`` specializes on a float, and would recompile on a change."""
        if not isinstance(self.scaling, Tensor):
            vars(self)["scaling"] = torch.tensor(float(self.scaling), device=device)


class ChangesBase(ABC):
    """Changes the frozen layer itself, in addition to what it adds."""

    @abstractmethod
    def change_base(self, base: BaseLayer, change: Transaction) -> None:
        """Changes the layer; called once, when the adapter is added to it.

        Args:
            base: the layer.
            change: records what is written, so that a failure can undo it.
        """


class Paddable:
    """Its tensors can be larger than it needs, so that adapters of another size (rank) fit into them.

    Values of zero along ``rank_axes`` must add nothing.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {}
    """Parameter -> the axis whose length is the size (rank). The other members follow from it."""

    @classmethod
    def size_of(cls, shapes: Mapping[str, Shape]) -> int | None:
        """The size (rank) of an adapter with these parameter shapes; None if the method has no such size."""
        return next((shapes[name][axis] for name, axis in cls.rank_axes.items()), None)

    @property
    def room(self) -> int:
        """The largest size (rank) that fits into its present tensors."""
        return self.size_of({name: getattr(self, name).shape for name in self.rank_axes}) or 0

    def used_part(self, key: str, tensor: Tensor, shape: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Splits a padded parameter.

        Args:
            key: name of the parameter.
            tensor: its padded value.
            shape: shape of the parameter in an unpadded adapter.

        Returns:
            A view of the part with ``shape``, and views of the padding.
        """
        if tensor.shape == tuple(shape) or key not in self.rank_axes:
            return tensor, []
        axis = self.rank_axes[key]
        used = shape[axis]
        return tensor.narrow(axis, 0, used), [tensor.narrow(axis, used, tensor.shape[axis] - used)]

    def enlarged(self, size: int, base: BaseLayer) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Pads the parameters to a larger size; nothing is changed yet.

        Args:
            size: the new size (rank).
            base: the layer.

        Yields:
            A parameter that has to grow, and its value padded with zeros.
        """
        for name, axis in self.rank_axes.items():
            parameter: nn.Parameter = getattr(self, name)
            shape = [*parameter.shape]
            shape[axis] = size
            larger = parameter.new_zeros(shape)
            larger.narrow(axis, 0, parameter.shape[axis]).copy_(parameter.detach())
            yield parameter, larger

    def mark_padded(self) -> None:
        """Called when the adapter was padded: its tensors may be larger than it needs."""


class ServesRows(ABC):
    """Serves a mixed batch in one pass: rows may use different adapters of this class."""

    @classmethod
    @abstractmethod
    def mixed(
        cls, adapters: Sequence[Any], scales: Sequence[float], base: BaseLayer, kept: dict[Any, Any]
    ) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Prepares a function that computes the deltas of all rows in one pass.

        Args:
            adapters: the adapters of the batch; None for one that this layer does not have.
            scales: factor on the delta of each adapter.
            base: the layer.
            kept: a cache of this layer that lasts as long as the assignment of rows to adapters.

        Returns:
            A function of the input, (batch, …), and an int64 index into ``adapters``, (batch,), -1 for no adapter. It
            returns the delta to add to the output. None if rows have to be served adapter by adapter.
        """


class ConvertsToLora(ABC):
    """Its delta is exactly the product of two thin matrices."""

    @abstractmethod
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta | None:
        """The two matrices, detached and without padding; None if there are none on this layer."""


class IsLowRank(ConvertsToLora):
    """On every layer its delta is such a product, which is also how it can be saved."""

    @abstractmethod
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        """The two matrices; see ``ConvertsToLora``."""


class HasFixedTensors:
    """Has persistent buffers, which are saved, or values that follow from its config; ``prepare`` sets both."""

    optional_tensors: ClassVar[tuple[str, ...]] = ()
    """Names in ``fixed_tensors`` that a file may lack; ``prepare`` then computes these tensors."""

    @classmethod
    def fixed_tensors(
        cls, config: Any, shapes: Mapping[str, Shape], module: nn.Module, kind: LayerKind
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """The saved tensors that are not trained.

        Args:
            config: the method's own config.
            shapes: result of ``parameter_shapes``.
            module: the frozen layer.
            kind: kind of the layer.

        Returns:
            Buffer name -> its shape and dtype.
        """
        return {}

    @classmethod
    def unsaved_elements(cls, config: Any, module: nn.Module, kind: LayerKind) -> int:
        """Number of values on one layer that are not saved, for methods whose config determines that number.

        It is checked before the values are allocated.

        Args:
            config: the method's own config.
            module: the frozen layer.
            kind: kind of the layer.
        """
        return 0


class WeightInitialized(ABC):
    """May be initialized from a part of the weight, which it subtracts from the layer (PiSSA, OLoRA)."""

    loses_start: bool = False
    """Whether the initial part cannot be recomputed from a file, because it depends on data.

    The adapter is then saved as one without an initial part (``FileFormat.without_weight``).
    """

    leaves_start: bool = False
    """Whether its file is for the residual: a base model from which the initial part is already subtracted."""

    @property
    @abstractmethod
    def taken_over(self) -> InitialComponent | None:
        """The part of the weight that it is initialized from and subtracts from the layer; None if there is none."""

    @abstractmethod
    def take_out_(self, weight: Tensor) -> None:
        """Subtracts the initial part from a canonical weight in place, which gives the residual."""

    @abstractmethod
    def shapes_with_start(self) -> Shapes:
        """Parameter name -> shape in a file, the initial part included; called only if it ``loses_start``."""

    @abstractmethod
    def split_start(self, tensors: Mapping[str, Tensor], change: Transaction) -> dict[str, Tensor]:
        """Separates the tensors of a file into the initial part, which it stores, and the parameters.

        Args:
            tensors: parameter name -> tensor with ``shapes_with_start``; called only if it ``loses_start``.
            change: records what is written, so that a failure can undo it.

        Returns:
            Parameter name -> tensor to bind.
        """


class Untargeted:
    """Does not change the layer's weight as a whole, as a prompt or trained rows of an embedding.

    Its layer does not count as targeted, and the method itself handles other layers with the same weight.
    """


class NotConvertible:
    """Cannot be converted to a LoRA on its layer.

    Attributes:
        unconvertible: why not, as part of a sentence.
    """

    unconvertible: ClassVar[str]


class QuantizationAware:
    """May be trained against the rounding of its quantized weight.

    Attributes:
        is_quantization_aware: whether the layer computes as if the adapter were merged.
    """

    is_quantization_aware: bool = False


class MeasuresDelta(ABC):
    """Can measure its delta without computing it."""

    @abstractmethod
    def delta_size(self, weight: Tensor, base: BaseLayer) -> tuple[float, int | None]:
        """Measures the change of the weight.

        Args:
            weight: the frozen canonical weight.
            base: the layer.

        Returns:
            The Frobenius norm of the change, and the number of singular directions that contain most of it; None
            instead of the number if it is expensive to compute.
        """


class HotSwaps:
    """Has a size, settings or limitations that matter when another adapter's tensors and settings replace its own."""

    def swap_refusal(self) -> str:
        """Why its tensors cannot be replaced, as part of a sentence; empty if they can."""
        return ""

    @classmethod
    def size_of(cls, shapes: Mapping[str, Shape]) -> int | None:
        """The size (rank) of an adapter with these parameter shapes; None if the method has no such size."""
        following: Any = super()  # that of ``Paddable``, in whichever order a class derives from both
        return following.size_of(shapes) if hasattr(following, "size_of") else None

    def configure(self, config: Any, path: str) -> None:
        """Applies another config of the method, after the settings of ``from_config`` and the tensors were replaced.

        Args:
            config: the new config.
            path: path of the layer.
        """

    def keep_settings(self, change: Transaction) -> None:
        """Records what ``configure`` changes, so that a failed change can restore it."""


class HasInnerAdapters:
    """Consists of several adapters."""

    @property
    def inner_adapters(self) -> Mapping[str, Any]:
        """The adapters, its submodules, by the names that PEFT's layers use for these parts."""
        return {}


class TiedAdapter(ABC):
    """Uses the tensors of the adapter on another layer, its ``source``, because the two layers share one weight.

    Attributes:
        source: the other adapter; None if this one has its own tensors.
    """

    source: Any = None

    @abstractmethod
    def tie_to(self, source: Any) -> None:
        """Makes this adapter use the tensors of ``source``, an adapter on another layer with the same weight."""

    @classmethod
    def tied_tensors(cls, names: Collection[str], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to save for an adapter that uses those of another one.

        Args:
            names: names of the parameters of the tied adapter.
            source: parameter name -> tensor of the other adapter.

        Returns:
            Parameter name -> a view of a tensor in ``source``.
        """
        return {}

    @classmethod
    def differs(cls, own: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> bool:
        """Whether loaded tensors of a tied adapter differ from those derived from its source.

        Args:
            own: parameter name -> tensor in the file.
            source: parameter name -> tensor of the other adapter.
        """
        tied = cls.tied_tensors(own, source)
        return any(name in tied and not torch.equal(tensor, tied[name]) for name, tensor in own.items())


class ShowsModules:
    """Has modules that PEFT's layers have and that can be called (``PeftNames.wrapped`` and ``modules``)."""

    def peft_module(self, name: str, base: BaseLayer) -> nn.Module | None:
        """Makes the module that PEFT's layers have under a name in ``peft.wrapped`` or ``peft.modules``.

        For a name in ``wrapped`` the parameter becomes the module's ``weight``. A module for a name in ``modules`` has
        this adapter as its attribute ``adapter``.

        Args:
            name: one of these names.
            base: the layer.

        Returns:
            A new module; None if a plain module that only stores the parameter is sufficient.
        """
        return None

    @property
    def computes_by_parts(self) -> bool:
        """Whether the layer can be computed by calling the modules of ``peft_module`` one after the other."""
        return False

    def forget_observed(self, name: str) -> None:
        """Undoes ``observe`` for a name: its module is again the one that ``peft_module`` creates."""

    def observe(self, module: nn.Module, name: str = "") -> None:
        """Called when a user adds a hook to a module of ``peft_module``, or replaces it with another module.

        Args:
            module: the module with the hook, or the new module; by default the layer does not call it.
            name: name of the module, as for ``peft_module``.
        """
        warn_not_called(module, stacklevel=5)


def warn_not_called(module: nn.Module, stacklevel: int) -> None:
    """Warns that a hook was added to a module that the model does not call.

    Args:
        module: the module with the hook.
        stacklevel: as in ``warnings.warn``.
    """
    warnings.warn(
        f"the model does not call the {type(module).__name__} of an adapter itself: this hook will not run in calls "
        "of the model; put it on the layer",
        stacklevel=stacklevel,
    )


def source_of(adapter: nn.Module) -> Any:
    """The adapter of another layer whose tensors an adapter uses (``TiedAdapter``); None if it has its own."""
    return adapter.source if isinstance(adapter, TiedAdapter) else None


def inner_adapters_of(adapter: nn.Module) -> Mapping[str, Any]:
    """The adapters that an adapter consists of (``HasInnerAdapters``), by name; empty if it has none."""
    return adapter.inner_adapters if isinstance(adapter, HasInnerAdapters) else {}


def swap_refusal(adapter: nn.Module) -> str:
    """Why an adapter cannot be hot-swapped (``HotSwaps``), as part of a sentence; empty if it can."""
    return adapter.swap_refusal() if isinstance(adapter, HotSwaps) else ""


def size_of(adapter_class: type[nn.Module], shapes: Mapping[str, Shape]) -> int | None:
    """The size (rank) of an adapter with some shapes (``HotSwaps``, ``Paddable``); None if it has no such size."""
    return adapter_class.size_of(shapes) if issubclass(adapter_class, HotSwaps | Paddable) else None


def rounds(adapter: nn.Module) -> bool:
    """Whether an adapter was trained against the rounding of its quantized weight (``QuantizationAware``)."""
    return isinstance(adapter, QuantizationAware) and adapter.is_quantization_aware
