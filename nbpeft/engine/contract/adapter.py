"""The contract of a method: its config, its adapters, and their optional capabilities.

    Adapter        the maths of one method on one layer: what to ADD to the output and to the weight
    SharedState    tensors that all layers of one adapter share, for methods that have some (a common projection)

An adapter does not know its own name, whether it is active, or how the weight is quantized. So M methods, K kinds of
layers and N weight backends (``base.py``) take M + K + N files, not M * K * N. What only some methods can do is a
capability (``capabilities.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from types import MethodType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nbpeft.engine.changes.transaction import Transaction
from nbpeft.engine.contract.adapter_config import AdapterConfig as AdapterConfig
from nbpeft.engine.contract.adapter_config import ConfigStore as ConfigStore
from nbpeft.engine.contract.adapter_config import is_of_an_adapter as is_of_an_adapter
from nbpeft.engine.contract.adapter_config import note_use as note_use
from nbpeft.engine.contract.adapter_config import store_of as store_of
from nbpeft.engine.contract.adapter_site import AdapterSite as AdapterSite
from nbpeft.engine.contract.adapter_weights import AdapterWeights as AdapterWeights
from nbpeft.engine.contract.adapter_weights import InitialComponent as InitialComponent
from nbpeft.engine.contract.adapter_weights import LowRankDelta as LowRankDelta
from nbpeft.engine.contract.adapter_weights import ReadsTensors as ReadsTensors
from nbpeft.engine.contract.base import BaseLayer, LayerKind, Shapes
from nbpeft.engine.contract.bindable import Bindable
from nbpeft.engine.contract.capabilities import AddsTogether as AddsTogether
from nbpeft.engine.contract.capabilities import ChangesBase as ChangesBase
from nbpeft.engine.contract.capabilities import ConvertsToLora as ConvertsToLora
from nbpeft.engine.contract.capabilities import FusesAdd as FusesAdd
from nbpeft.engine.contract.capabilities import HasFixedTensors as HasFixedTensors
from nbpeft.engine.contract.capabilities import HasInnerAdapters as HasInnerAdapters
from nbpeft.engine.contract.capabilities import HotSwaps as HotSwaps
from nbpeft.engine.contract.capabilities import IsLowRank as IsLowRank
from nbpeft.engine.contract.capabilities import MeasuresDelta as MeasuresDelta
from nbpeft.engine.contract.capabilities import MergesInPlace as MergesInPlace
from nbpeft.engine.contract.capabilities import NotConvertible as NotConvertible
from nbpeft.engine.contract.capabilities import Paddable as Paddable
from nbpeft.engine.contract.capabilities import QuantizationAware as QuantizationAware
from nbpeft.engine.contract.capabilities import ReplacesCall as ReplacesCall
from nbpeft.engine.contract.capabilities import Rescales as Rescales
from nbpeft.engine.contract.capabilities import ServesRows as ServesRows
from nbpeft.engine.contract.capabilities import Shape as Shape
from nbpeft.engine.contract.capabilities import ShowsModules as ShowsModules
from nbpeft.engine.contract.capabilities import TiedAdapter as TiedAdapter
from nbpeft.engine.contract.capabilities import TransformsInput as TransformsInput
from nbpeft.engine.contract.capabilities import TransformsOutput as TransformsOutput
from nbpeft.engine.contract.capabilities import Untargeted as Untargeted
from nbpeft.engine.contract.capabilities import WeightInitialized as WeightInitialized
from nbpeft.engine.contract.capabilities import inner_adapters_of as inner_adapters_of
from nbpeft.engine.contract.capabilities import rounds as rounds
from nbpeft.engine.contract.capabilities import size_of as size_of
from nbpeft.engine.contract.capabilities import source_of as source_of
from nbpeft.engine.contract.capabilities import swap_refusal as swap_refusal
from nbpeft.engine.contract.peft_names import ADAPTER_PARTS as ADAPTER_PARTS
from nbpeft.engine.contract.peft_names import PeftNames as PeftNames
from nbpeft.engine.contract.peft_types import TASK_HEADS as TASK_HEADS
from nbpeft.engine.contract.peft_types import PeftType as PeftType
from nbpeft.engine.contract.peft_types import TaskType as TaskType
from nbpeft.engine.contract.shared_state import SharedSite as SharedSite
from nbpeft.engine.contract.shared_state import SharedState as SharedState
from nbpeft.engine.kernels.numerics import add_scaled_, compute_dtype
from nbpeft.errors import MergeError


class Adapter(Bindable):
    """One method, for one adapter name, on one layer. The base class of a method's adapters.

    A subclass implements ``parameter_shapes``, ``initial_tensors``, ``forward`` and ``delta_weight``, and declares in
    ``from_config`` which settings it takes from its config. All tensors that it trains are its own parameters, named as
    in the paper; ``parameter_shapes`` returns their names and shapes before anything is allocated.
    """

    from_config: ClassVar[Mapping[str, str]] = {}
    """Attribute of the adapter -> the field, property or method of the config, or of one of its fields (``a.b``).

    A method is called with the path of the layer. The attributes are set when the adapter is created,
    replaced (and restored on failure) when another adapter is swapped in, and shown by ``repr``. An attribute named
    ``scaling`` is the factor that ``Rescales`` changes.
    """

    identity: ClassVar[Mapping[str, float]] = {}
    """Parameter -> a value at which the adapter changes nothing, whatever its other parameters are.

    Empty if the adapter changes nothing when all its parameters are zero.
    """

    reads_weight: ClassVar[bool] = False
    """Whether ``delta_weight`` depends on its ``weight``; then each of several adapters needs the frozen weight."""

    peft: ClassVar[PeftNames] = PeftNames()
    """PEFT's names for its parameters and attributes."""

    # What every method implements

    @classmethod
    def parameter_shapes(cls, config: Any, path: str, module: nn.Module, kind: LayerKind) -> Shapes:
        """The parameters that an adapter on this layer will have.

        Args:
            config: the method's own config.
            path: path of the layer in the base model.
            module: the frozen layer.
            kind: kind of the layer; gives its features and the shape of its canonical weight.

        Returns:
            Parameter name -> shape.

        Raises:
            ConfigError: the method does not work on this layer with this config.
        """
        raise NotImplementedError(f"{cls.__name__} does not implement parameter_shapes")

    @classmethod
    def initial_tensors(cls, config: Any, site: AdapterSite) -> Mapping[str, Tensor]:
        """Creates the tensors of a new adapter; by default all are zeros.

        Args:
            config: the method's own config.
            site: the layer; ``site.new`` makes tensors on its device and in the dtype of new parameters.

        Returns:
            Parameter name -> tensor.
        """
        return {name: site.new(shape) for name, shape in site.shapes.items()}

    def prepare(self, config: Any, site: AdapterSite, tensors: Mapping[str, Tensor]) -> None:
        """Sets buffers and attributes that are neither in ``from_config`` nor parameters; called after those are set.

        Args:
            config: the method's own config.
            site: the layer, with the state that it shares with others.
            tensors: the loaded or initial tensors by name, including those of ``fixed_tensors`` that are present.
        """

    _names: tuple[str, ...] = ()

    @classmethod
    def _class_for(cls, config: Any, site: AdapterSite) -> type[Adapter]:
        """The class of the adapter on a layer: this one, or a subclass for such layers or configs."""
        return cls

    @classmethod
    def create(cls, config: Any, site: AdapterSite, tensors: Mapping[str, Tensor] | None) -> Self:
        """Builds the adapter of one layer; rarely overridden.

        Args:
            config: the method's own config.
            site: the layer.
            tensors: loaded tensors by name, which are used without a copy; None to initialize new ones.

        Returns:
            The adapter.
        """
        own: Any = cls._class_for(config, site)
        made: Self = own()
        given = site.checked(own.initial_tensors(config, site), own) if tensors is None else tensors
        names = tuple(site.shapes)
        made.bind({name: given[name] for name in names}, _names=names, **made._config_values(config, site.path))
        made.prepare(config, site, given)
        return made

    def forward(self, x: Tensor, base_output: Tensor, base: BaseLayer) -> Tensor:
        """Computes what to ADD to the layer's output: by default the product with ``delta_weight``, and ``delta_bias``.

        Override it if that is cheaper without a tensor of the weight's size.

        Args:
            x: the layer's input, (…, in), in its own dtype. The adapter casts a copy and does not change ``x``.
            base_output: the output of the frozen layer, (…, out), bias included.
            base: the layer.

        Returns:
            A tensor shaped like ``base_output``, in the dtype of the adapter or of autocast.
        """
        delta = self.delta_weight(base.weight(), base)
        dtype = compute_dtype(x, delta)
        output = base.kind.apply(base.module, x.to(dtype) if x.is_floating_point() else x, delta.to(dtype))
        bias = self.delta_bias(base)
        return output if bias is None else output + base.kind.per_channel(base.module, bias).to(output)

    def delta_weight(self, weight: Tensor, base: BaseLayer) -> Tensor:
        """Computes what to ADD to the weight of the layer: by default the product of ``low_rank_delta``.

        Override it if the adapter has none; the result must be differentiable if ``forward`` is not overridden.

        Args:
            weight: the frozen canonical weight, (out, in) or (out, in / groups, *kernel).
            base: the layer.

        Returns:
            A tensor shaped like ``weight``.

        Raises:
            MergeError: it cannot be merged; see ``unmergeable_reason``.
        """
        product = self.low_rank_delta(base) if isinstance(self, ConvertsToLora) and not self.reads_weight else None
        if product is not None:
            return product.up @ product.down * product.scaling
        reason = self.unmergeable_reason(base)
        if not reason:
            raise NotImplementedError(f"{type(self).__name__} does not implement delta_weight")
        raise MergeError(f"what the adapter adds is not {reason}")

    # Defaults that a method may improve on

    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        """Computes what to ADD to the layer's bias, (out,); None if the bias does not change."""
        return None

    def unmergeable_reason(self, base: BaseLayer) -> str:
        """Why it cannot be merged, to complete the sentence "it cannot be merged into …"; empty if it can be."""
        return ""

    @property
    def delta_rank(self) -> int | None:
        """The largest rank that its delta can have; None if the method does not bound it."""
        return None

    def saved_tensors(self, shapes: Callable[[], Mapping[str, Shape]]) -> dict[str, Tensor]:
        """The tensors that are saved, not copies: parameters and, with ``HasFixedTensors``, persistent buffers.

        Args:
            shapes: returns what ``parameter_shapes`` gives for its config.

        Returns:
            Name -> tensor.
        """
        constants = self.peft.constants
        own: dict[str, Tensor | None] = {key: value for key, value in self._parameters.items() if key not in constants}
        if isinstance(self, HasFixedTensors):
            own |= {key: value for key, value in self._buffers.items() if key not in self._non_persistent_buffers_set}
        saved = {key: value for key, value in own.items() if value is not None}
        if not isinstance(self, Paddable) or not self.rank_axes:
            return saved
        unpadded = shapes()
        return {key: self.used_part(key, value, unpadded.get(key, value.shape))[0] for key, value in saved.items()}

    def reset_(self, base: BaseLayer) -> None:
        """Overwrites its parameters so that it adds nothing."""
        for name, value in (self.identity or dict.fromkeys(self._parameters, 0.0)).items():
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter.detach().fill_(value)

    @classmethod
    def _config_values(cls, config: Any, path: str) -> dict[str, Any]:
        """Attribute of ``from_config`` -> its value on the layer at ``path``."""
        values = {}
        for name, field_name in cls.from_config.items():
            value = attrgetter(field_name)(config)
            values[name] = value(path) if type(value) is MethodType else value
        if "scaling" in values:
            values["scaling"] = float(values["scaling"])
        return values

    def extra_repr(self) -> str:
        """The shapes of its parameters, and the settings of ``from_config``."""
        shapes = {name: tuple(value.shape) for name, value in self._parameters.items() if value is not None}
        shown = {**shapes, **{name: getattr(self, name) for name in self.from_config}}
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    @classmethod
    def config_warnings(cls, config: Any, modules: Sequence[tuple[str, nn.Module, LayerKind]]) -> Iterable[str]:
        """Warnings about a config, to be shown before it is applied.

        Args:
            config: the method's own config.
            modules: path, module and kind of each layer that it targets.

        Returns:
            One sentence for each problem.
        """
        return ()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Sets ``requires_grad`` on its parameters, except that ``frozen_parameters`` never get it."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad and name not in self.frozen_parameters)
        return self


_PLAIN = (bool, int, float, str, type(None))
"""Types of settings that can be compared."""


@torch.no_grad()
def delta_of(adapter: Adapter, weight: Tensor, base: BaseLayer) -> Tensor:
    """What an adapter adds to the weight of its layer, detached.

    Args:
        adapter: the adapter.
        weight: the frozen canonical weight.
        base: the layer.
    """
    return adapter.delta_weight(weight, base).detach()


def add_to_(adapter: Adapter, weight: Tensor, base: BaseLayer, scale: float) -> None:
    """Adds ``scale * delta_weight(weight)`` of an adapter to a canonical weight in place.

    Args:
        adapter: the adapter.
        weight: the canonical weight to change.
        base: the layer.
        scale: factor on the delta.
    """
    if isinstance(adapter, MergesInPlace):
        adapter.add_to_(weight, base, scale)
    else:
        add_scaled_(weight, delta_of(adapter, weight, base), scale)


def unconvertible_reason(adapter: Adapter, base: BaseLayer) -> str:
    """Why an adapter cannot be converted to a product of two matrices, as part of a sentence; empty if it can.

    Args:
        adapter: the adapter.
        base: the layer.
    """
    if isinstance(adapter, NotConvertible):
        return adapter.unconvertible
    if len(base.kind.weight_shape(base.module)) < 2:
        return "its weight is a vector, not a product of two matrices"
    reason = adapter.unmergeable_reason(base)
    if not reason and int(getattr(base.module, "groups", 1)) > 1:
        return "the weight of a grouped convolution is not a product of two matrices"
    return f"it cannot be merged into {reason}" if reason else ""


def norm_of_delta(adapter: Adapter, weight: Tensor, base: BaseLayer) -> float:
    """Computes an adapter's change of the weight, and returns its Frobenius norm.

    Args:
        adapter: the adapter.
        weight: the frozen canonical weight.
        base: the layer.
    """
    delta = delta_of(adapter, weight, base)
    return float(torch.linalg.vector_norm(delta, dtype=torch.promote_types(delta.dtype, torch.float32)))


def configure(adapter: Adapter, config: Any, path: str) -> None:
    """Applies another config of the method to an adapter; called after its tensors were replaced.

    Args:
        adapter: the adapter.
        config: the new config.
        path: path of the layer.
    """
    values = adapter._config_values(config, path)
    if isinstance(adapter, Rescales) and "scaling" in values:
        adapter.rescale(values.pop("scaling"), trained=True)
    adapter.bind(**values)
    if isinstance(adapter, HotSwaps):
        adapter.configure(config, path)


def is_configured(adapter: Adapter, config: Any, path: str) -> bool:
    """Whether an adapter certainly has the settings of a config, so that ``configure`` would change nothing.

    Args:
        adapter: the adapter.
        config: a config of its method.
        path: path of the layer.
    """
    if isinstance(adapter, HotSwaps) and type(adapter).configure is not HotSwaps.configure:
        return False
    own = vars(adapter)
    if own.get("_trained_scaling") is not None:
        return False
    for name, value in adapter._config_values(config, path).items():
        if type(value) not in _PLAIN or type(own.get(name)) is not type(value) or own[name] != value:
            return False
    return True


def keep_settings(adapter: Adapter, change: Transaction) -> None:
    """Records what ``configure`` changes on an adapter, so that a failed change can restore it.

    Args:
        adapter: the adapter.
        change: the record.
    """
    if isinstance(adapter, Rescales):
        adapter.keep_scaling(change)
    change.keep_attributes(adapter, *adapter.from_config)
    if isinstance(adapter, HotSwaps):
        adapter.keep_settings(change)
