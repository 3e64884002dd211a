"""Modules and mappings that show the parts of adapters on an adapted layer, as other libraries expect them.

An adapter owns its parameters. Libraries find them as submodules and attributes of the layer, under the names that the
record of the method declares (``PeftNames``); this room contains no such names. It belongs to the engine because
``named_parameters()``, ``state_dict()``, hooks, ``nn.DataParallel`` and FSDP reach the adapters through these
submodules, and because methods derive callable modules from them.

Door, what other rooms import:

    layer_attributes.py  Attributes of an adapted layer by adapter name, as the record of each adapter's method declares
                         them
    own_modules.py       Modules that adapters own, where PEFT has them on the model or around a block
    part_modules.py      The modules behind the declared names of parameters: ``layer.core["default"].weight``
    part_names.py        The names of an adapter's parameters below a layer and below the model, as in PEFT
    shows_adapters.py    Base class of the modules that show adapters as submodules
    shown_modules.py     Which modules a layer shows for its adapters, and under which of the declared names
"""
