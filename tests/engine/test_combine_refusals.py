"""What combining refuses, and that it never builds a whole delta."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nbpeft.engine.combination import check_weights
from nbpeft.engine.methods.lora.combining import Recipe, combine, combined_config
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.names import COMBINATION_TYPES
from tests.engine.test_combine import random_factors


def test_a_path_at_the_end_of_another_keeps_its_own_rank() -> None:
    two, four = random_factors(2, (8, 8), seed=1), random_factors(4, (8, 8), seed=2)
    ours = combine({"q": {"a": two, "b": two}, "m.q": {"a": four, "b": four}}, ["a", "b"], [1, 1], Recipe("linear"))
    config = combined_config([LoraConfig(r=4, target_modules=["q"]), LoraConfig(r=4, target_modules=["q"])], ours)
    assert (config.rank_at("q"), config.rank_at("m.q")) == (2, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe("tiess"), "combination_type 'tiess' is unknown.*Did you mean 'ties'"),
        (lambda: Recipe("ties"), "'ties' needs density"),
        (lambda: Recipe("dare_linear", density=0.0), "density must be > 0"),
        (lambda: Recipe("magnitude_prune", density=-0.1), "density must be >= 0"),
        (lambda: Recipe("svd", svd_rank=0), "svd_rank must be a positive integer"),
        (lambda: Recipe("svd", svd_clamp=2.0), "svd_clamp is a quantile"),
        (lambda: Recipe("ties", density=0.5, majority_sign_method="freqency"), "Did you mean 'frequency'"),
        (lambda: Recipe("svd", svd_rank=True), "svd_rank must be a positive integer"),
        (lambda: Recipe("svd", svd_clamp="most"), "svd_clamp is a quantile.*not 'most'"),  # type: ignore[arg-type]
        (lambda: Recipe("ties", density="half"), "density must be >= 0.*not 'half'"),  # type: ignore[arg-type]
        (lambda: Recipe("svd", svd_driver="gesv"), "svd_driver 'gesv' is unknown"),
    ],
)
def test_wrong_recipes_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_wrong_inputs_are_refused() -> None:
    layers = {"x": {"a": random_factors(4, (8, 8)), "b": random_factors(2, (8, 8))}}
    with pytest.raises(ConfigError, match=r"'linear' needs equal ranks, but x has a 4, b 2; use 'exact'"):
        combine(layers, ["a", "b"], [1, 1], Recipe("linear"))
    with pytest.raises(AdapterError, match=r"2 adapters \(a, b\) need as many weights, got 1"):
        check_weights(["a", "b"], [1])
    with pytest.raises(AdapterError, match="no adapters to combine"):
        check_weights([], [])
    with pytest.raises(AdapterError, match="weight of adapter 'b' is nan"):
        check_weights(["a", "b"], [1, math.nan])
    for wrong in ("1", None):
        with pytest.raises(AdapterError, match=f"weight of adapter 'b' is {wrong!r}, expected a finite number"):
            check_weights(["a", "b"], [1, wrong])  # type: ignore[list-item]
    with pytest.raises(AdapterError, match="none of the adapters z has low-rank factors"):
        combine(layers, ["z"], [1], Recipe())
    with pytest.raises(ConfigError, match="svd_driver='gesvd' works on CUDA only"):
        combine(layers, ["a", "b"], [1, 1], Recipe("svd", svd_driver="gesvd"))
    grouped = {"x": {"a": random_factors(4, (12, 8, 3, 3), 1.0, 2), "b": random_factors(2, (12, 8, 3, 3), 1.0, 2)}}
    with pytest.raises(ConfigError, match="2 groups and cannot take rank 3"):
        combine(grouped, ["a", "b"], [1, 1], Recipe("svd", svd_rank=3))


def test_density_one_keeps_all_and_says_so() -> None:
    layers = {"x": {"a": random_factors(4, (8, 8), seed=1), "b": random_factors(4, (8, 8), seed=2)}}
    with pytest.warns(UserWarning, match="keeps every entry"):
        kept = combine(layers, ["a", "b"], [1, 1], Recipe("magnitude_prune", density=1.0))
    plain = combine(layers, ["a", "b"], [1, 1], Recipe("linear"))
    torch.testing.assert_close(kept.layers["x"].lora_A, plain.layers["x"].lora_A)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self.count = max(self.count, part.numel())
        return result


def test_no_delta_is_built() -> None:
    parts = {name: random_factors(16, (512, 512), 2.0, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    with LargestTensor() as largest:
        combine({"x": parts}, ["a", "b"], [0.5, 0.5], Recipe("svd"))
    assert largest.count <= 512 * 32


@pytest.mark.parametrize("name", COMBINATION_TYPES)
def test_an_adapter_with_numbers_that_are_not_finite_is_named(name: str) -> None:
    broken = random_factors(4, (8, 8), seed=2)
    broken.lora_B[0, 0] = math.nan
    layers = {"m.q": {"a": random_factors(4, (8, 8), seed=1), "b": broken}}
    recipe = Recipe(name, density=0.5 if Recipe(name, density=0.5).prunes else None)
    with pytest.raises(AdapterError, match=r"adapter 'b' holds numbers at m\.q that are not finite"):
        combine(layers, ["a", "b"], [0.5, 0.5], recipe)
