"""Arithmetic that does not depend on adapters: dtypes, products of quantized matrices, recomputed activations.

Door, what other rooms import:

    four_bit.py            The arithmetic of bitsandbytes' 4-bit codes: blocks of a weight in row-major order, each
                           with one scale
    grouped_heads.py       Grouped-query attention on the CPU without repeating keys and values for each query head
    live_parameters.py     A parameter mapping that reads and writes the parameters of other modules
    nf4_rounding.py        Rounds blocks of a weight to the nearest of 16 levels (nf4) on a CPU, many times faster
                           than a search
    numerics.py            Arithmetic that layers and methods share: dtypes, in-place sums, checks for finite values
                           and for changed tensors
    quantized_matrices.py  A tensor of several matrices (the experts of a mixture), each quantized separately: nf4,
                           fp4 or int8
    recomputed.py          Tensors that the backward pass computes again instead of storing them
    rounding.py            Rounds a weight to a quantization grid so that the layer's outputs change little (GPTQ)
    storage.py             Base classes of weight backends, and helpers for storages, tensor subclasses and dtypes
"""
