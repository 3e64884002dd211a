"""What adapters look like from outside: modules and mappings that show their parts on an adapted layer.

An adapter owns its parameters. Libraries find them as submodules and attributes of the layer, under the names that the
record of the method declares (``PeftNames``); the room has no such name itself. It is in the engine because these
submodules are in the tree through which ``named_parameters()``, ``state_dict()``, hooks, ``nn.DataParallel`` and FSDP
reach the adapters, and because methods derive callable ones from them.

Door, what other rooms import:

    layer_attributes.py  Attributes of an adapted layer by adapter name, as the record of each adapter's method declares
                         them
    part_modules.py      The modules behind the declared names of parameters: ``layer.core["default"].weight``
"""
