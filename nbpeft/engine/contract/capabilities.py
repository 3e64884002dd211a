"""What only some adapters can do: classes to derive from beside ``Adapter``.

The engine asks ``isinstance(adapter, Rescales)`` and never for a method:

    TransformsInput, TransformsOutput   act on the input or output of the one base call, at no second product
    ReplacesCall                        compute what a layer gives without the base call
    Rescales                            have a factor that can be changed while loaded
    ChangesBase                         change the layer itself when they are put on it
    Pads                                fit into larger tensors, so that a compiled model need not compile again
    ServesRows                          serve a mixed batch in one pass
    ConvertsToLora                      add a product of two thin matrices, which a LoRA can take over as they are
    IsLowRank                           are saved as such a product, so that any LoRA runtime can serve them
    HasFixedTensors                     have buffers that are saved
    StartsInWeight                      start in a part of the weight
    UsesAnother                         use the tensors of the adapter on another layer
    ShowsModules                        show users of PEFT modules that compute
    LearnsWithHooks                     take part in training beside the gradient (``training_hooks.py``)
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter_weights import LowRankDelta, TakenOver
from nbpeft.engine.contract.base import BaseLayer, LayerKind

Shape = tuple[int, ...]


class TransformsInput(ABC):
    """Alone on a layer, changes the input of the base call instead of adding to its output."""

    @abstractmethod
    def transform_input(self, x: Tensor, base: BaseLayer) -> Tensor:
        """The input (…, in) to call the frozen layer with, in the dtype of ``x``."""


class ReplacesCall(ABC):
    """Alone on a layer without hooks, computes what the layer gives in place of the base call."""

    @abstractmethod
    def output(self, x: Tensor, base: BaseLayer) -> Tensor | None:
        """What the layer gives for ``x``, bias included, in its own dtype; None where the base has to be called."""


class TransformsOutput(ABC):
    """Alone on a layer, changes the output of the base call; beside ``TransformsInput``, of that call."""

    @abstractmethod
    def transform_output(self, output: Tensor, base: BaseLayer) -> Tensor:
        """What the layer gives instead of ``output`` (…, out), in the dtype of that."""


class Rescales:
    """Has a factor on what it adds, ``scaling``, which can be changed while the adapter is loaded.

    Attributes:
        scaling: the factor; a 0-d tensor once the model is prepared for compiled hot-swapping.
    """

    scaling: float | Tensor
    _trained_scaling: float | None = None

    @property
    def trained_scaling(self) -> float:
        """The factor its config asks for, whatever was written since."""
        return float(self.scaling) if self._trained_scaling is None else self._trained_scaling

    def rescale(self, scaling: float | Tensor, *, trained: bool = False) -> None:
        """Sets the factor, in place where it is held as a tensor.

        Args:
            scaling: the new factor.
            trained: take it for the trained one from now on.
        """
        own = vars(self)
        own["_trained_scaling"] = None if trained else self.trained_scaling
        if isinstance(self.scaling, Tensor):
            self.scaling.fill_(float(scaling))
        else:
            own["scaling"] = float(scaling)

    def keep_scaling(self, change: Transaction) -> None:
        """Records the factor."""
        change.keep_attributes(self, "scaling", "_trained_scaling")
        if isinstance(self.scaling, Tensor):
            change.keep_values([self.scaling])

    def hold_scaling_as_tensor(self, device: torch.device) -> None:
        """Lets the factor change without recompiling."""
        if not isinstance(self.scaling, Tensor):
            vars(self)["scaling"] = torch.tensor(float(self.scaling), device=device)


class ChangesBase(ABC):
    """Changes the layer it is put on, beside what it adds."""

    @abstractmethod
    def change_base(self, base: BaseLayer, change: Transaction) -> None:
        """Changes the layer, once, as the adapter is put on it; what it changes is recorded."""


class Pads(ABC):
    """Can have more room in its tensors than it uses, so that adapters of another size fit in."""

    @property
    @abstractmethod
    def room(self) -> int:
        """The largest size (rank) that fits into its tensors now."""

    @abstractmethod
    def used_part(self, key: str, tensor: Tensor, shape: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Views of the part of a parameter that an adapter of some shape uses, and of the rest."""

    @abstractmethod
    def enlarged(self, size: int, base: BaseLayer) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The parameters that grow to a size, and their values padded with zeros."""

    @abstractmethod
    def mark_padded(self) -> None:
        """Remembers that its tensors have more room than it uses."""


class ServesRows(ABC):
    """Can serve a batch, whose rows are served by several adapters of the class, in one pass."""

    @classmethod
    @abstractmethod
    def mixed(
        cls, adapters: Sequence[Any], scales: Sequence[float], base: BaseLayer, kept: dict[Any, Any]
    ) -> Callable[[Tensor, Tensor], Tensor] | None:
        """One pass for a batch whose rows are served by several adapters of this method.

        Args:
            adapters: what may serve a row; None where the layer lacks the adapter.
            scales: factor on each one's delta.
            base: the layer.
            kept: a place for what is prepared once for many calls.

        Returns:
            A function of the input (batch, …) and an index (batch,) into ``adapters`` (-1: none)
            that gives the delta to add, or None where rows have to be served adapter by adapter.
        """


class ConvertsToLora(ABC):
    """What it adds to a weight is exactly the product of two thin matrices."""

    @abstractmethod
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta | None:
        """The two matrices, detached, without rows that are only padding; None where there are none on the layer."""


class IsLowRank(ConvertsToLora):
    """Its parameters are those two matrices, on every layer."""

    @abstractmethod
    def low_rank_delta(self, base: BaseLayer) -> LowRankDelta:
        """The two matrices; see ``ConvertsToLora``."""


class HasFixedTensors:
    """Has buffers that a file holds, or values that follow from its config; ``prepare`` sets them."""

    optional_tensors: ClassVar[tuple[str, ...]] = ()
    """Those of ``fixed_tensors`` that a file may lack; ``prepare`` finds them."""

    @classmethod
    def fixed_tensors(
        cls, config: Any, shapes: Mapping[str, Shape], module: nn.Module, kind: LayerKind
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """What a file holds of it that is not trained: name of a buffer -> its shape and dtype.

        Args:
            config: the method's own config.
            shapes: what ``parameter_shapes`` gave.
            module: the layer.
            kind: of the layer.
        """
        return {}

    @classmethod
    def unsaved_elements(cls, config: Any, module: nn.Module, kind: LayerKind) -> int:
        """Number of values it keeps on a layer that no file holds, where a config can ask for any number of them."""
        return 0


class StartsInWeight(ABC):
    """May start in a part of the weight, which it subtracts from the layer."""

    loses_start: bool = False
    """Whether a file cannot say what it started from: it is saved as one without (``FileFormat.without_weight``)."""

    leaves_start: bool = False
    """Whether it was saved for a base without the part of the weight that it starts in (``take_out_``)."""

    @property
    @abstractmethod
    def taken_over(self) -> TakenOver | None:
        """The part of the weight that it starts in, and subtracts from the layer; None where there is none."""

    @abstractmethod
    def take_out_(self, weight: Tensor) -> None:
        """Subtracts that part from a canonical weight in place, as the adapter does not do in a file without it."""

    @abstractmethod
    def shapes_with_start(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors in a file; only where it ``loses_start``."""

    @abstractmethod
    def split_start(self, tensors: Mapping[str, Tensor], change: Transaction) -> dict[str, Tensor]:
        """Takes the start over that tensors of a file hold, and returns those of its parameters.

        Args:
            tensors: parameter name -> tensor, as ``shapes_with_start`` says; only where it ``loses_start``.
            change: records what is written.
        """


class UsesAnother(ABC):
    """Uses the tensors of the adapter on another layer, its ``source``, where two layers share one weight."""

    @abstractmethod
    def tie_to(self, source: Any) -> None:
        """Makes this adapter use the tensors of another one, for layers that share one weight."""

    @classmethod
    def tied_tensors(cls, names: Collection[str], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a file holds of an adapter with some parameters that uses these of another one: views of them."""
        return {}

    @classmethod
    def differs(cls, own: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> bool:
        """Whether loaded tensors of an adapter that uses those of another one differ from what is given of these."""
        tied = cls.tied_tensors(own, source)
        return any(name in tied and not torch.equal(tensor, tied[name]) for name, tensor in own.items())


class ShowsModules:
    """Shows users of PEFT modules that compute as it does (``PeftNames.wrapped`` and ``modules``)."""

    def peft_module(self, name: str, base: BaseLayer) -> nn.Module | None:
        """Makes the module that users of PEFT know under a name of ``wrapped`` or ``modules`` of ``peft``.

        The parameter becomes its ``weight``. One of ``modules`` has this adapter as its ``adapter``.

        Args:
            name: one of them.
            base: the layer.

        Returns:
            A new module; None for one that only holds the parameter.
        """
        return None

    @property
    def computes_by_parts(self) -> bool:
        """Whether a call can be computed by the modules that ``peft_module`` made, one after the other."""
        return False

    def forget_observed(self, name: str) -> None:
        """Computes without the module of a name again, which is as ``peft_module`` makes it."""

    def observe(self, module: nn.Module, name: str = "") -> None:
        """Called when somebody puts a hook on a module that ``peft_module`` made, or another module in its place.

        Args:
            module: the module, which a layer does not call by itself.
            name: of what it takes the place of, as for ``peft_module``.
        """
        warn_not_called(module, stacklevel=5)


def warn_not_called(module: nn.Module, stacklevel: int) -> None:
    """Warns of a hook on a module that no call of the model runs."""
    warnings.warn(
        f"a {type(module).__name__} of an adapter computes only where it is called itself: this hook will not run "
        "in calls of the model; put it on the layer",
        stacklevel=stacklevel,
    )
