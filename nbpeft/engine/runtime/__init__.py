"""The adapters of one model: which there are, which act, merged or not, and when that may change.

Door, what other rooms import:

    adapter_tensors.py  The tensors of one adapter, wherever they hang in a model
    manager.py          AdapterManager: the one owner of the adapters on a base model
    merging.py          Merging adapters into the base weights and taking them out again, over a whole model
    method_hooks.py     What a method does in each call of a model and in each step of a training, beside the maths of
                        its layers
    scopes.py           Blocks in which other adapters, or none, act: each thread and asyncio task has its own
    snapshots.py        An adapter as it was, kept in host memory, and how it comes back

Inside:

    layer_commands.py  Commands on one layer alone, as PEFT's layers have them, beside those of the manager on the
                       whole model
    renaming.py        Adapters under other names: renamed, at another place in the order, and copied
"""
