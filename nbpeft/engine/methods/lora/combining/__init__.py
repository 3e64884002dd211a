"""Combining adapters: functions on the tensors of low-rank factors.

recipe.py     how to combine: the type and its settings, checked when made
factors.py    one adapter's factors on one layer, as matrices for every kind of layer
sparsify.py   pruning, sign election, weighted sums (TIES, DARE, magnitude pruning)
truncate.py   best rank-k factors of a weighted sum, and the approximation error
layers.py     combine(): all layers of a model
config.py     the config of the result
adapters.py   from adapters on layers to factors and back: the entry point of the engine
"""

from __future__ import annotations

from nbpeft.engine.contract.combination import Loss
from nbpeft.engine.methods.lora.combining.adapters import combine_low_rank
from nbpeft.engine.methods.lora.combining.config import combined_config
from nbpeft.engine.methods.lora.combining.factors import Factors
from nbpeft.engine.methods.lora.combining.layers import CombinedFactors, CombinedLayer, combine
from nbpeft.engine.methods.lora.combining.recipe import Recipe

__all__ = [
    "CombinedFactors",
    "CombinedLayer",
    "Factors",
    "Loss",
    "Recipe",
    "combine",
    "combine_low_rank",
    "combined_config",
]
