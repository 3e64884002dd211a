"""Base models in fewer bits: loading, quantizing in memory, and which part is stored how.

Door, what other rooms import:

    quantize.py           Quantized base models, linear layers and experts: loaded through bitsandbytes, or quantized
                          in memory
    quantized_experts.py  Experts of a mixture beside bitsandbytes' layers: in the same settings, in memory or while a
                          model is read
    weight_storage.py     How the weights of a model are stored, part by part: quantized layers and experts,
                          embedding, head and the rest
"""
