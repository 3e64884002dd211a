"""The names that users of PEFT find on adapted layers: factors, ``scaling``, ``merged_adapters``.

Each method's record maps its parameters and settings to these names; this room provides the attributes and modules.

Door, what other rooms import:

    peft_layer_api.py  PEFT's attributes and methods of adapted layers: mappings by adapter name that read and write
                       the adapters
    peft_modules.py    The modules behind PEFT's parameter names: ``layer.core["default"].weight``,
                       ``…core.default.weight``
"""
