"""What is where in a model: layers that can be adapted, layers that are, and weights that share storage.

Door, what other rooms import:

    adapted_tree.py       Where a model carries adapters: read from its module tree, which other libraries change, too
    fused_layers.py       Linear layers that transformers 5 made parameters of: the experts of a mixture, and its
                          router
    model_tree.py         Every question about a model, asked in one place: its modules, its manager, its embeddings,
                          what is quantized
    parameter_targets.py  Which bare parameters of a model ``target_parameters`` means, those that are no layer's:
                          experts, routers
    tied_weights.py       Weights that several modules of a model share, as an embedding and the output head often do
"""
