"""Combining adapters: functions on the tensors of low-rank factors.

recipe.py     how to combine: the type and its settings, checked when made
factors.py    one adapter's factors on one layer, as matrices whatever the layer kind
sparsify.py   pruning, sign election, weighted sums (TIES, DARE, magnitude pruning)
truncate.py   best rank-k factors of a weighted sum, and how much of it was lost
layers.py     combine(): all layers of a model
config.py     the config of the result
draws.py      the random draws PEFT makes before it combines
"""

from __future__ import annotations

from nbpeft.engine.combine.config import combined_config
from nbpeft.engine.combine.draws import skip_initial_draws
from nbpeft.engine.combine.factors import Factors
from nbpeft.engine.combine.layers import Combination, CombinedLayer, combine
from nbpeft.engine.combine.recipe import Recipe
from nbpeft.engine.combine.truncate import Loss

__all__ = [
    "Combination",
    "CombinedLayer",
    "Factors",
    "Loss",
    "Recipe",
    "combine",
    "combined_config",
    "skip_initial_draws",
]
