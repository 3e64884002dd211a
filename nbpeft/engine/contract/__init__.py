"""The interfaces that methods, kinds of layers and weight backends implement, and the registry of implementations.

Start with ``adapter.py`` (a config and an adapter) and ``registry.py`` (the record of a method). ``base.py`` describes
the layer that an adapter sees. Deriving from ``weight_delta.py`` is the shortest way to write a new method.

Door, what other rooms import:

    adapter.py           The contract of a method: its config, its adapters, and their optional capabilities
    allocator.py         Base class of methods that distribute a budget (of ranks or subspaces) over the layers during
                         training
    base.py              The interfaces of a kind of layer and of a weight backend, and the layer as an adapter sees
                         it
    bindable.py          Modules whose tensors and attributes are set without ``nn.Module.__setattr__``
    capabilities.py      Optional capabilities of adapters: classes to derive from in addition to ``Adapter``
    combination.py       Inputs and results of combining adapters, for every method
    field_types.py       Checks the fields of a config against their annotations
    initial_draws.py     The random numbers of new parameters, drawn in the same order as PEFT draws them
    loss_terms.py        Terms that methods add to the training loss (AdaLoRA, KaSA, MonteCLoRA), each at most once
    manager_protocol.py  The protocol of ``AdapterManager``, for modules that cannot import it because it imports them
    method_records.py    Optional records that a method passes to ``register`` in addition to its config and adapter
                         classes
    model_adapter.py     The contract of adapters without target layers (prompt methods): they change whole calls of
                         the model
    peft_names.py        PEFT's names for the parameters, settings and classes of a method, as the method declares them
    peft_types.py        The values of ``task_type`` and ``peft_type`` in configs and files
    provider.py          The interface of objects that load adapters onto the model on demand
    registry.py          The registry of methods, layer kinds and weight backends, and the lookups in it
    shared_state.py      State that the layers of one adapter share: a common projection, a bank of vectors
    trained.py           Marks an adapter as unsaved when any optimizer has changed it
    training_hooks.py    Hooks of a method in each training step, and its training state for checkpoints
    weight_delta.py      Adapters whose delta has the size of the weight and is computed from few parameters in each
                         call

Inside:

    adapter_config.py   The fields that the config of every method has, and what a config says about its adapters
    adapter_site.py     The layer that an adapter is built for, and how its new parameters are created
    adapter_weights.py  The tensors of one adapter, independent of the model that they are on and of any file format
    registration.py     Checks what the author of a method passes to ``register``
"""
