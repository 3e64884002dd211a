"""What users of PEFT find on adapted layers, models and configs: attributes, methods, classes, custom layers.

The engine knows no name of PEFT but those that the record of a method declares (``PeftNames``). This room adds the
others to the classes of its wrappers and configs when the engine is imported, so that unpickled models have them, too.

Door, what other rooms import:

    classes.py         PEFT's classes of layers: adapted layers pass as their instances in ``isinstance``
    custom_layers.py   Base classes of custom LoRA layers: PEFT's ``LoraLayer`` and ``lora.Linear``
    shared_tensors.py  Tensors that the layers of an adapter share, under PEFT's names

Inside:

    commands.py  PEFT's commands on a single layer or module: ``layer.set_adapter("default")``
    configs.py   PEFT's attributes and methods of configs: ``config.is_prompt_learning``, ``config.from_peft_type(…)``
    copies.py    PEFT's attributes and methods of modules that are trained as a whole (``modules_to_save``)
    layers.py    PEFT's attributes and methods of adapted layers: ``layer.scaling``, ``layer.merge()``
    models.py    PEFT's attributes of adapted base models: ``model.peft_config``
"""

from nbpeft.peft_layers import commands, configs, copies, layers, models

__all__ = ["commands", "configs", "copies", "layers", "models"]
