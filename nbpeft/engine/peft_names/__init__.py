"""The names that users of PEFT find on adapted layers: factors, ``scaling``, ``merged_adapters``.

Each method's record says which of its numbers has which name; this room makes attributes and modules of them.

Door, what other rooms import:

    peft_layer_api.py  An adapted layer as users of PEFT know it: attributes by adapter name that read and write the
                       adapters
    peft_modules.py    The small modules that PEFT's names mean: ``layer.core["default"].weight``,
                       ``…core.default.weight``
"""
