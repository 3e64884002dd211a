"""Computations that run a model on sample data: data-dependent inits, and merging with less rounding error.

Door, what other rooms import:

    calibrated_merge.py  Merging into quantized weights with rounding that is calibrated on the layers' inputs
    cartridges.py        Initializing prefixes and cartridges from a text or a KV cache, and concatenating cartridges
    data_inits.py        ``preprocess_corda`` and ``preprocess_loraga``: collecting what these inits need on the
                         layers
    eva.py               EVA: A is initialized with the principal directions of a layer's inputs (Paischer et al.
                         2024)
    eva_search.py        Incremental search for the input directions of EVA, and the ranks that follow from them
    loftq.py             ``replace_lora_weights_loftq``: adapters that compensate the quantization error, layer by
                         layer
    observing.py         Running a model to observe the inputs of its layers, and restoring its state afterwards
    start_from_rows.py   Data-dependent inits in one call: runs the data through a model and initializes an adapter
                         from the result
"""
