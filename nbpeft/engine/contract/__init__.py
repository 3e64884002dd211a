"""What a method, a kind of layer and a way to store weights have to say, and the registry of those that do.

Start with ``adapter.py`` (a config and an adapter) and ``registry.py`` (the record of a method); ``base.py`` says what
a method may ask of the layer it adapts. ``weight_delta.py`` is the shortest way to a method of one's own.

Door, what other rooms import:

    adapter.py           The contract of a method: its config, its adapters, and what else an adapter may be able to
                         do
    allocator.py         What shares a budget out among the layers of an adapter as it trains: ranks, subspaces
    base.py              What the engine asks of a kind of layer and of a way to store its weight
    bindable.py          Modules whose tensors and attributes are set without ``nn.Module.__setattr__``
    capabilities.py      What only some adapters can do: classes to derive from beside ``Adapter``
    combination.py       What combining adapters takes and gives, whatever their method
    field_types.py       Checks the fields of a config against their annotations, so that no value is guessed at
    initial_draws.py     The random numbers of new parameters, drawn as torch's own modules draw theirs
    loss_terms.py        What methods add to the loss of a training (AdaLoRA, KaSA, MonteCLoRA): each loss has it
                         once, whoever adds it
    manager_protocol.py  What modules below :class:`~nbpeft.engine.runtime.manager.AdapterManager`, which imports
                         them, need of it
    method_records.py    What a method may say of itself beside its config and its adapter: optional records of
                         ``register``
    model_adapter.py     The contract of an adapter without layers: it acts on whole calls of a model, in ``forward``
                         and ``generate``
    peft_names.py        What users of PEFT find on a layer or model under names of PEFT's: what a method declares of
                         it
    peft_types.py        What configs and files say an adapter is of: the task of its model, and its method
    provider.py          Where adapters come from that are named and not on the model
    registry.py          What methods, kinds of layers and ways to store a weight there are, and which one fits
    shared_state.py      What the layers of one adapter share: a common projection, a bank of vectors
    trained.py           Marks an adapter as unsaved when an optimizer has changed it, whoever makes the step
    training_hooks.py    What a method does in the steps of a training beside the gradient of its parameters, and what
                         it remembers
    weight_delta.py      Adapters whose delta is a whole weight, computed anew from few parameters at each call

Inside:

    adapter_site.py     Where an adapter of a layer is built, and what makes its new parameters
    adapter_weights.py  The tensors of one adapter, apart from where they hang and from any file format
    former_contract.py  Refuses methods that are written for the contract of nbpeft 0.2, and says what has taken the
                        place of what
"""
