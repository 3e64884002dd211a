"""PEFT's names for the parameters, settings and classes of a method, as the method declares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ADAPTER_PARTS = "adapter_parts"
"""Attribute of a layer for submodules of adapters that have no name in PEFT."""


@dataclass(frozen=True)
class PeftNames:
    """PEFT's names for the parts of an adapter. A method works without them; its layers then lack PEFT's names.

    Attributes:
        parameters: attributes of PEFT's layers that map adapter names to parameters, separated by spaces.
        others: attributes of PEFT's layers that map adapter names to other values, separated by spaces.
        layer: class name of a layer whose adapters are all of this method; empty for ``<peft_type>.<kind>``.
        layer_prefix: start of the names of its layer classes: ``HRA`` of ``HRALinear``.
        mappings: mappings that every layer has, even if they are empty there.
        attributes: attribute of an adapted layer -> attribute of the adapter that it reads.
        functions: method of an adapted layer -> function of the layer and the arguments.
        wrapped: parameters stored in a small module as its ``weight``: ``layer.core["default"].weight``.
        names_in_modules: parameter in ``wrapped`` -> its name in the module, if that is not ``weight``.
        lists: parameters stored in a list, ``layer.core["default"][0]``: here ``core.0``, ``core.1``, …; if they are
            also in ``wrapped``, a list of small modules.
        grouped: parameter -> attribute of PEFT's layer and key in its value for the adapter:
            ``osf_svd_params.S_low`` for ``layer.osf_svd_params["default"]["S_low"]``.
        modules: modules of PEFT's layers in addition to those for ``wrapped``; see ``ShowsModules.peft_module``.
        constants: parameters that are neither saved nor read; they exist because PEFT counts them.
        container: module below the layer in which PEFT keeps the parameters, if not on the layer itself.
        shown_as: attribute of a layer that contains the submodules of its adapters.
        on_model: names of modules of an adapter, or of the state that its layers share, that PEFT has on ``base_model``
            if the first adapter is of this method: modules of adapters by adapter name, and modules of a state with a
            mapping by adapter name for each of their tensors.
        model_functions: method of a model whose first adapter has such a config -> function of the model's manager and
            the arguments.
        model_attributes: attribute of such a model's ``base_model`` -> function of the ``base_model``, or a property.
    """

    parameters: str = ""
    others: str = ""
    layer: str = ""
    layer_prefix: str = ""
    mappings: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    wrapped: tuple[str, ...] = ()
    names_in_modules: Mapping[str, str] = field(default_factory=dict)
    lists: tuple[str, ...] = ()
    grouped: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    container: str = ""
    shown_as: str = ADAPTER_PARTS
    on_model: tuple[str, ...] = ()
    model_functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    model_attributes: Mapping[str, Callable[[Any], Any] | property] = field(default_factory=dict)
