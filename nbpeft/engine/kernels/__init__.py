"""Arithmetic: dtypes to compute in, products of quantized matrices, activations that are computed again.

Nothing here knows of adapters.

Door, what other rooms import:

    four_bit.py            The arithmetic of bitsandbytes' 4-bit codes: blocks of a weight in row-major order, each with
                           one constant
    grouped_heads.py       Attention of a model on the CPU in which several query heads share a key and a value, as they
                           are
    live_parameters.py     Parameters of a module that belong to other modules: read and written where they are
    nf4_rounding.py        Rounding the blocks of a weight to the nearest of sixteen levels on a CPU, many times faster
                           than searching for them
    numerics.py            Arithmetic that layers and methods share: dtypes, sums in place, finite numbers, whether a
                           tensor has changed
    quantized_matrices.py  A tensor of several matrices, the experts of a mixture, each quantized for itself: nf4, fp4
                           or int8
    recomputed.py          Tensors that are computed again in the backward pass instead of being kept for it
    rounding.py            Rounding a weight to a grid so that a layer's outputs stay, not each number by itself
    storage.py             What all backends share: where a weight lies and what it takes follow from its tensors
"""
