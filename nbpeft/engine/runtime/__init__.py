"""The adapters of one model: adding, activating, merging and removing them.

Door, what other rooms import:

    adapter_tensors.py  The tensors of one adapter, wherever they are in a model
    manager.py          AdapterManager: owns the adapters on a base model
    merging.py          Merging adapters into the base weights and unmerging them, over a whole model
    method_hooks.py     Runs the hooks that methods have for calls of the model and for training steps
    scopes.py           Blocks in which a thread or asyncio task uses other adapters, or none
    snapshots.py        Snapshots of an adapter in host memory, and how they are restored

Inside:

    adding.py          Adding an adapter: it is built first, without touching the model, and put into the model in one
                       transaction
    layer_commands.py  Commands on a single layer, as in PEFT; commands on the whole model are in the manager
    renaming.py        Renaming an adapter, moving it in the order of adapters, and copying it
    unloading.py       Removing all adapters of a model permanently, merged into its weights or not
"""
