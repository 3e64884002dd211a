"""Base models in fewer bits: loading, quantizing in memory, and how each part is stored.

Door, what other rooms import:

    quantize.py           Quantized base models: linear layers and experts, loaded or converted in memory
    quantized_experts.py  Quantized experts of a mixture, which bitsandbytes does not support
    weight_storage.py     How each part of a model is stored: quantized layers, experts, embedding, head and the rest
"""
