"""What users of PEFT find on a layer or model under names of PEFT's: what a method declares of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ADAPTER_PARTS = "adapter_parts"
"""Where the submodules of adapters are shown, for which PEFT has no name."""


@dataclass(frozen=True)
class PeftNames:
    """PEFT's names of what an adapter has; a method without it works everywhere but under these names.

    Attributes:
        parameters: names under which PEFT's layers keep its parameters, separated by spaces.
        others: the same of what they keep besides.
        layer: name of a layer that carries adapters of the method alone; empty for ``<peft_type>.<kind>``.
        layer_prefix: what the names of its kinds of layers begin with: ``HRA`` of ``HRALinear``.
        mappings: mappings that every layer has, also where the method has no entry for them.
        single_mapping: the one mapping in which layers keep all parameters, where that is so.
        attributes: attribute of an adapted layer -> that of the adapter behind it.
        functions: method of an adapted layer -> a function of the layer and arguments.
        wrapped: parameters kept in a small module, as its ``weight``: ``layer.core["default"].weight``.
        names_in_modules: such a parameter -> its name there, where that is another one.
        lists: what is kept in a list, ``layer.core["default"][0]``: the parameters ``core.0``, ``core.1``, …
        modules: what is kept in modules beside the parameters; ``ShowsModules.peft_module`` makes them.
        constants: parameters that no file holds and nothing reads: users of PEFT count them.
        shown_as: where the submodules of adapters are shown on a layer.
        model_functions: function of a model whose first adapter has such a config -> a function of the model's manager
            and the arguments.
        model_attributes: attribute of such a model's ``base_model`` -> a function of that.
    """

    parameters: str = ""
    others: str = ""
    layer: str = ""
    layer_prefix: str = ""
    mappings: tuple[str, ...] = ()
    single_mapping: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    wrapped: tuple[str, ...] = ()
    names_in_modules: Mapping[str, str] = field(default_factory=dict)
    lists: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    shown_as: str = ADAPTER_PARTS
    model_functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    model_attributes: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
