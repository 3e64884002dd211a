"""Where things are in a model: layers that can be adapted, adapted layers, and shared weights.

Door, what other rooms import:

    adapted_tree.py       The adapted layers of a model, read from its module tree, which other libraries may change
                          too
    fused_layers.py       Linear layers that transformers 5 fused into parameters: the experts of a mixture, and its
                          router
    model_tree.py         Queries about a model: its modules, manager, embeddings and quantization
    parameter_targets.py  Resolves ``target_parameters`` to bare parameters of modules that are not layers: experts,
                          routers
    tied_weights.py       Weights that several modules of a model share, often the input embedding and the output head
"""
