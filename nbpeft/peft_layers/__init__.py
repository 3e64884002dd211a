"""PEFT's interface of layers, models and configs: attributes and methods, classes for ``isinstance``, custom layers.

The engine itself only has the PEFT names that a method declares in its ``PeftNames``. This room adds all others to the
classes of the engine's wrappers and configs when the engine is imported, so that unpickled models have them too.

Door, what other rooms import:

    classes.py         PEFT's layer classes, for ``isinstance`` checks of adapted layers
    lora_layers.py     Base classes of custom LoRA layers: PEFT's ``LoraLayer`` and ``lora.Linear``
    shared_tensors.py  Tensors that the layers of an adapter share, under PEFT's names
    single_layers.py   Single adapted layers without a model, as PEFT's layer classes create them

Inside:

    blocks.py       PEFT's attributes and methods of blocks whose input a side network changes
    commands.py     PEFT's commands on a single layer or module: ``layer.set_adapter("default")``
    configs.py      PEFT's attributes and methods of configs: ``config.is_prompt_learning``,
                    ``config.from_peft_type(…)``
    copies.py       PEFT's attributes and methods of modules that are trained as a whole (``modules_to_save``)
    layer_types.py  Classes of adapted layers that are called as in PEFT: ``type(layer).__name__`` is ``Linear``
    layers.py       PEFT's attributes and methods of adapted layers: ``layer.scaling``, ``layer.merge()``
    models.py       PEFT's attributes of adapted base models (``model.peft_config``) and of AdaLoRA's allocator
    replaced.py     What scripts put on PEFT's layer classes: a ``forward`` is called, and what nothing calls is named
"""

from nbpeft.peft_layers import blocks, commands, configs, copies, layer_types, layers, models

__all__ = ["blocks", "commands", "configs", "copies", "layer_types", "layers", "models"]
