"""What is computed from rows that a model is shown: starts of adapters, and merges that lose less.

Door, what other rooms import:

    calibrated_merge.py  Merging into quantized weights so that what was learned is left: rounded by what the layers'
                         inputs are
    cartridges.py        Prompts of keys and values that start as a text's, or as a cache's, and cartridges that are
                         put together
    data_inits.py        ``preprocess_corda`` and ``preprocess_loraga``: what an init needs to know of the data, left
                         on the layers
    eva.py               EVA: A starts in the main directions of a layer's inputs, and layers share the ranks out
                         (Paischer et al. 2024)
    loftq.py             ``replace_lora_weights_loftq``: adapters that make up for what quantizing a model lost, layer
                         by layer
    observing.py         Running a model to see what its layers get, so that it is as before afterwards
    start_from_rows.py   Inits that need data, each in one call: rows are shown to a model, and an adapter starts from
                         what is found

Inside:

    eva_search.py  The directions of layers' inputs that EVA starts from, found batch by batch, and the ranks they
                   give the layers
"""
