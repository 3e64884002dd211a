"""The adapters of one model: which there are, which are active or merged, and when that may change.

Door, what other rooms import:

    adapter_tensors.py  The tensors of one adapter, wherever they are in a model
    manager.py          AdapterManager: the one owner of the adapters on a base model
    merging.py          Merging adapters into the base weights and unmerging them, over a whole model
    method_hooks.py     What a method does in each call of a model and in each training step, in addition to the
                        forward of its layers
    scopes.py           Blocks in which other adapters, or none, are active: each thread and asyncio task has its own
    snapshots.py        Snapshots of an adapter in host memory, and how they are restored

Inside:

    layer_commands.py  Commands on a single layer, as PEFT's layers have them; those of the manager are for the whole
                       model
    renaming.py        Renaming an adapter, moving it in the order of adapters, and copying it
"""
