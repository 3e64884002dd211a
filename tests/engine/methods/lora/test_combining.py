"""Combining adapters: PEFT's numbers under PEFT's names, and the exact weighted sum; what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from nbpeft.engine.contract.combination import check_weights
from nbpeft.engine.methods.lora.combining import (
    CombinedFactors,
    Factors,
    Recipe,
    combine,
    combined_config,
)
from nbpeft.engine.methods.lora.combining.truncate import measure_loss, truncate_factors
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.names import COMBINATION_TYPES
from tests.closeness import assert_close, assert_same

PEFT_TYPES = [name for name in COMBINATION_TYPES if name != "exact"]
PRUNING = [name for name in PEFT_TYPES if name.startswith(("ties", "dare", "magnitude"))]
TARGETS = ["embed", "linear", "conv1d", "conv2d", "pointwise"]


class Zoo(nn.Module):
    """One layer of each kind PEFT can combine with SVD."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.linear = nn.Linear(7, 9)
        self.conv1d = Conv1D(8, 5)
        self.conv2d = nn.Conv2d(4, 6, 3)
        self.pointwise = nn.Conv2d(5, 7, 1)


def zoo_with_adapters(ranks: dict[str, int], **options: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    model: peft.PeftModel | None = None
    for position, (name, rank) in enumerate(ranks.items()):
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank + position, target_modules=TARGETS, init_lora_weights=False, **options
        )
        if model is None:
            model = peft.get_peft_model(Zoo(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    return model


def factors_of(layer: Any, name: str) -> Factors:
    if name in layer.lora_embedding_A:
        lora_A, lora_B = layer.lora_embedding_A[name].data, layer.lora_embedding_B[name].data
        return Factors(lora_A, lora_B, layer.scaling[name], transposed=True)
    groups, turned = getattr(layer.get_base_layer(), "groups", 1), isinstance(layer.get_base_layer(), Conv1D)
    lora_A, lora_B = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
    return Factors(lora_A, lora_B, layer.scaling[name], groups, transposed=turned)


def layers_of(model: Any, names: list[str]) -> dict[str, dict[str, Factors]]:
    layers: dict[str, dict[str, Factors]] = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            layers[path] = {
                name: factors_of(module, name)
                for name in names
                if name in module.lora_A or name in module.lora_embedding_A
            }
    return layers


def product(lora_A: Tensor, lora_B: Tensor, groups: int = 1) -> Tensor:
    """B A as (out, in * kernel) in float64, group by group."""
    rows_A, rows_B = lora_A.double().flatten(1).chunk(groups), lora_B.double().flatten(1).chunk(groups)
    return torch.cat([b @ a for a, b in zip(rows_A, rows_B, strict=True)])


def true_delta(parts: dict[str, Factors], weights: dict[str, float]) -> Tensor:
    shares = [
        weights[name] * part.scaling * product(part.lora_A, part.lora_B, part.groups) for name, part in parts.items()
    ]
    return torch.stack(shares).sum(0)


def random_factors(rank: int, shape: tuple[int, ...], scaling: float = 1.0, groups: int = 1, seed: int = 0) -> Factors:
    """Factors of a weight (out, in, *kernel) whose A sees all ``in`` channels."""
    generator = torch.Generator().manual_seed(seed)
    out, *rest = shape
    ones = [1] * (len(shape) - 2)
    lora_A = torch.randn(rank, *rest, generator=generator)
    return Factors(lora_A, torch.randn(out, rank // groups, *ones, generator=generator), scaling, groups)


def assert_combined_as_in_peft(ours: CombinedFactors, model: Any, name: str, *, factorwise: bool) -> None:
    for path, layer in ours.layers.items():
        theirs = factors_of(model.base_model.model.get_submodule(path), name)
        assert theirs.scaling == 1.0
        assert layer.lora_A.shape == theirs.lora_A.shape and layer.lora_B.shape == theirs.lora_B.shape
        if factorwise:
            assert_close(layer.lora_A, theirs.lora_A)
            assert_close(layer.lora_B, theirs.lora_B)
        expected = product(theirs.lora_A, theirs.lora_B)
        assert_close(product(layer.lora_A, layer.lora_B), expected, dtype=torch.float32)


@pytest.mark.drawn(16)
@pytest.mark.parametrize("weights", [[0.7, 0.3, 0.5], [1.2, -0.8, 0.25], [-1.0, -0.5, 2.0]])
@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_equals_peft_under_the_same_seed(kind: str, weights: list[float]) -> None:
    ranks = {"a": 4, "b": 4, "c": 4} if kind in ("linear", *PRUNING) else {"a": 4, "b": 2, "c": 3}
    model = zoo_with_adapters(ranks)
    names, density = list(ranks), 0.6 if kind in PRUNING else None
    layers = layers_of(model, names)
    torch.manual_seed(11)
    model.add_weighted_adapter(names, weights, "mix", combination_type=kind, density=density)
    torch.manual_seed(11)
    rank = int(vars(model.peft_config["mix"])["r"])
    model.add_adapter("drawn first", model.peft_config["mix"])
    ours = combine(layers, names, weights, Recipe(kind, density=density))
    assert ours.rank == rank
    assert_combined_as_in_peft(ours, model, "mix", factorwise=kind == "cat" or not kind.endswith("svd"))


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["ties", "ties_svd", "dare_ties", "dare_ties_svd"])
def test_majority_sign_methods_equal_peft(kind: str, method: str) -> None:
    model, names, weights = zoo_with_adapters({"a": 4, "b": 4, "c": 4}), ["a", "b", "c"], [0.5, -0.4, 1.5]
    layers = layers_of(model, names)
    options: dict[str, Any] = {"density": 0.5, "majority_sign_method": method}
    torch.manual_seed(5)
    model.add_weighted_adapter(names, weights, "mix", combination_type=kind, **options)
    torch.manual_seed(5)
    model.add_adapter("drawn first", model.peft_config["mix"])
    ours = combine(layers, names, weights, Recipe(kind, **options))
    assert_combined_as_in_peft(ours, model, "mix", factorwise=not kind.endswith("svd"))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("kind", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_svd_settings_equal_peft(kind: str, full: bool) -> None:
    model, names, weights = zoo_with_adapters({"a": 4, "b": 4}), ["a", "b"], [0.7, 0.6]
    layers = layers_of(model, names)
    options: dict[str, Any] = {"svd_rank": 3, "svd_clamp": 0.9, "svd_full_matrices": full, "density": 0.5}
    model.add_weighted_adapter(names, weights, "mix", combination_type=kind, **options)
    ours = combine(layers, names, weights, Recipe(kind, **options))
    assert ours.rank == 3
    assert_combined_as_in_peft(ours, model, "mix", factorwise=True)


@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_one_adapter_is_combined_as_peft_does(kind: str) -> None:
    model = zoo_with_adapters({"a": 4})
    layers = layers_of(model, ["a"])
    model.add_weighted_adapter(["a"], [-0.5], "mix", combination_type=kind, density=0.5)
    assert_combined_as_in_peft(combine(layers, ["a"], [-0.5], Recipe(kind, density=0.5)), model, "mix", factorwise=True)


def test_adapters_on_different_targets() -> None:
    torch.manual_seed(0)
    common: dict[str, Any] = {"init_lora_weights": False, "lora_alpha": 6}
    model = peft.get_peft_model(Zoo(), peft.LoraConfig(r=4, target_modules=["linear", "embed"], **common), "a")
    model.add_adapter("b", peft.LoraConfig(r=4, target_modules=["linear", "conv2d"], **common))
    layers = layers_of(model, ["a", "b"])
    for kind in ("svd", "cat", "linear"):
        model.add_weighted_adapter(["a", "b"], [0.3, -2.0], kind, combination_type=kind)
        ours = combine(layers, ["a", "b"], [0.3, -2.0], Recipe(kind))
        assert set(ours.layers) == {"embed", "linear", "conv2d"}
        assert_combined_as_in_peft(ours, model, kind, factorwise=False)


SHAPES = {
    "linear": ((20, 30), 1),
    "wide": ((3, 40), 1),
    "conv1d": ((12, 8, 3), 1),
    "conv2d": ((12, 8, 3, 5), 1),
    "conv3d": ((6, 4, 2, 3, 2), 1),
    "grouped": ((12, 8, 3, 3), 2),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_exact_is_the_weighted_sum(kind: str) -> None:
    shape, groups = SHAPES[kind]
    parts = {
        "a": random_factors(4, shape, 2.0, groups, seed=1),
        "b": random_factors(2, shape, 0.25, groups, seed=2),
        "c": random_factors(6, shape, 8.0, groups, seed=3),
    }
    weights = {"a": 0.7, "b": -1.5, "c": 0.1}
    ours = combine({"x": parts}, list(weights), list(weights.values()), Recipe())
    layer = ours.layers["x"]
    assert ours.rank == layer.rank == 12
    expected = true_delta(parts, weights)
    assert_close(product(layer.lora_A, layer.lora_B, groups), expected, dtype=torch.float32)
    assert layer.loss.relative_error < 1e-5
    assert_close(layer.loss.energy_kept, 1.0)


@pytest.mark.parametrize("kind", SHAPES)
def test_truncation_is_the_best_rank_k(kind: str) -> None:
    shape, groups = SHAPES[kind]
    parts = {"a": random_factors(8, shape, 2.0, groups, seed=1), "b": random_factors(6, shape, 0.5, groups, seed=2)}
    weights = {"a": 0.7, "b": -1.5}
    ours = combine({"x": parts}, ["a", "b"], [0.7, -1.5], Recipe("exact", svd_rank=4))
    delta = true_delta(parts, weights)
    best, kept, total = [], 0.0, float((delta**2).sum())
    for block in delta.chunk(groups):
        u, s, v = torch.linalg.svd(block, full_matrices=False)
        k = 4 // groups
        best.append(u[:, :k] * s[:k] @ v[:k])
        kept += float((s[:k] ** 2).sum())
    layer, expected = ours.layers["x"], torch.cat(best)
    found = product(layer.lora_A, layer.lora_B, groups)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert_close(layer.loss.relative_error, float((delta - found).norm() / delta.norm()), scale=1.0)
    assert_close(layer.loss.energy_kept, kept / total)


def test_cat_of_grouped_convolutions_keeps_each_group_apart() -> None:
    parts = {
        "a": random_factors(4, (12, 8, 3, 3), 2.0, 2, seed=1),
        "b": random_factors(2, (12, 8, 3, 3), 1.0, 2, seed=2),
    }
    ours = combine({"x": parts}, ["a", "b"], [1.0, -2.0], Recipe("cat"))
    layer = ours.layers["x"]
    expected = true_delta(parts, {"a": 1.0, "b": -2.0})
    assert_close(product(layer.lora_A, layer.lora_B, 2), expected, dtype=torch.float32)
    assert layer.loss.relative_error < 1e-6


def test_an_adapter_minus_itself_is_nothing() -> None:
    part = random_factors(4, (20, 30), 2.0)
    ours = combine({"x": {"a": part, "b": part}}, ["a", "b"], [1.0, -1.0], Recipe("exact", svd_rank=4))
    layer = ours.layers["x"]
    assert float(product(layer.lora_A, layer.lora_B).norm()) < 1e-4
    empty = Factors(part.lora_A, torch.zeros_like(part.lora_B))
    nothing = combine({"x": {"a": empty}}, ["a"], [1.0], Recipe())
    assert nothing.loss.relative_error == 0.0 and nothing.loss.energy_kept == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_half_precision_is_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    wide = {name: random_factors(4, (20, 30), 2.0, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    half = {name: Factors(p.lora_A.to(dtype), p.lora_B.to(dtype), p.scaling) for name, p in wide.items()}
    again = {name: Factors(p.lora_A.float(), p.lora_B.float(), p.scaling) for name, p in half.items()}
    recipe = Recipe(kind, density=0.5)
    torch.manual_seed(0)
    ours = combine({"x": half}, ["a", "b"], [0.5, 0.5], recipe).layers["x"]
    torch.manual_seed(0)
    reference = combine({"x": again}, ["a", "b"], [0.5, 0.5], recipe).layers["x"]
    assert ours.lora_A.dtype == ours.lora_B.dtype == dtype
    assert_same(ours.lora_A, reference.lora_A.to(dtype))
    assert_same(ours.lora_B, reference.lora_B.to(dtype))


def test_linear_reports_how_far_it_is_from_the_weighted_sum() -> None:
    parts = {"a": random_factors(4, (40, 40), 1.0, seed=1), "b": random_factors(4, (40, 40), 1.0, seed=2)}
    layer = combine({"x": parts}, ["a", "b"], [0.5, 0.5], Recipe("linear")).layers["x"]
    delta = true_delta(parts, {"a": 0.5, "b": 0.5})
    kept = product(layer.lora_A, layer.lora_B)
    assert_close(layer.loss.relative_error, float((delta - kept).norm() / delta.norm()))
    assert layer.loss.relative_error > 0.9
    cosine = float((delta * kept).sum() / delta.norm() / kept.norm())
    assert_close(layer.loss.energy_kept, cosine**2)


def test_loss_over_all_layers() -> None:
    layers = {
        "small": {"a": random_factors(2, (10, 10), 0.1, seed=1), "b": random_factors(2, (10, 10), 0.1, seed=2)},
        "big": {"a": random_factors(2, (30, 30), 1.0, seed=3), "b": random_factors(2, (30, 30), 1.0, seed=4)},
    }
    ours = combine(layers, ["a", "b"], [1.0, 1.0], Recipe("svd"))
    errors = sum(layer.loss.error for layer in ours.layers.values())
    truths = sum(layer.loss.true for layer in ours.layers.values())
    assert ours.loss.relative_error == pytest.approx(math.sqrt(errors / truths))
    assert "svd: 2 layers, rank 2" in str(ours)


def test_dora_gains_combine_exactly() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 30, dtype=torch.float64)
    parts, deltas = {}, {}
    for name, seed in (("a", 1), ("b", 2), ("plain", 3)):
        factors = random_factors(4, (20, 30), 0.5, seed=seed)
        change = factors.scaling * product(factors.lora_A, factors.lora_B)
        row_scale = None if name == "plain" else torch.rand(20) + 0.5
        parts[name] = Factors(factors.lora_A, factors.lora_B, factors.scaling, row_scale=row_scale)
        deltas[name] = change if row_scale is None else row_scale.double()[:, None] * (weight + change) - weight
    weights = {"a": 0.6, "b": -0.3, "plain": 1.1}
    layer = combine({"x": parts}, list(weights), list(weights.values()), Recipe()).layers["x"]
    assert layer.row_scale is not None
    found = layer.row_scale.double()[:, None] * (weight + product(layer.lora_A, layer.lora_B)) - weight
    assert_close(found, sum(weights[name] * deltas[name] for name in weights), dtype=torch.float32)


def test_biases_add_up() -> None:
    parts = {}
    for name, seed, scaling in (("a", 1, 2.0), ("b", 2, 0.5)):
        factors = random_factors(4, (20, 30), scaling, seed=seed)
        parts[name] = Factors(factors.lora_A, factors.lora_B, scaling, bias=torch.full((20,), float(seed)))
    for kind in ("exact", "linear", "cat", "svd"):
        layer = combine({"x": parts}, ["a", "b"], [0.5, -1.0], Recipe(kind)).layers["x"]
        assert_close(layer.bias, torch.full((20,), 0.5 * 2.0 * 1 - 1.0 * 0.5 * 2))


def test_config_follows_and_scaling_is_one() -> None:
    layers = {
        "m.q": {"a": random_factors(4, (8, 8), seed=1), "b": random_factors(4, (8, 8), seed=2)},
        "m.v": {"a": random_factors(2, (8, 8), seed=3), "b": random_factors(2, (8, 8), seed=4)},
    }
    first = LoraConfig(r=4, lora_alpha=16, target_modules=["q", "v"], rank_pattern={"v": 2}, use_rslora=True)
    second = LoraConfig(r=4, lora_alpha=1, target_modules=["v", "q", "k"], rank_pattern={"v": 2})
    for kind, ranks in (("linear", (4, 2)), ("svd", (4, 4)), ("cat", (8, 8)), ("exact", (8, 8))):
        ours = combine(layers, ["a", "b"], [0.5, 0.5], Recipe(kind))
        config = combined_config([first, second], ours)
        assert tuple(config.rank_at(path) for path in layers) == ranks
        assert [config.scaling_at(path) for path in layers] == [1.0, 1.0]
        assert config.target_modules == {"q", "v", "k"} and not config.use_rslora
    assert first.rank_pattern == {"v": 2}


def test_config_lists_layers_where_selections_differ() -> None:
    parts = {"a": random_factors(4, (8, 8), seed=1)}
    ours = combine({"l.0.q": parts, "l.1.q": {"b": parts["a"]}}, ["a", "b"], [1.0, 1.0], Recipe())
    configs = [LoraConfig(r=4, target_modules=["q"], layers_to_transform=[layer]) for layer in (0, 1)]
    config = combined_config(configs, ours)
    assert config.target_modules == {"l.0.q", "l.1.q"} and config.layers_to_transform is None
    patterns = [LoraConfig(r=4, target_modules=r".*\.0\.q"), LoraConfig(r=4, target_modules=r".*\.1\.q")]
    assert combined_config(patterns, ours).target_modules == r"(.*\.0\.q)|(.*\.1\.q)"


@pytest.mark.parametrize("total", [3, 6, 20])
@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_truncation_and_loss_are_those_of_the_delta(total: int, shape: tuple[int, int]) -> None:
    wide_B, wide_A = torch.randn(2, shape[0], total), torch.randn(2, total, shape[1])
    delta = wide_B @ wide_A
    kept_B, kept_A = truncate_factors(wide_B, wide_A, 2, Recipe("svd"))
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    best = (left[..., :2] * values[:, None, :2]) @ right[:, :2]
    kept = kept_B @ kept_A
    assert kept_B.shape == (2, shape[0], 2) and kept_A.shape == (2, 2, shape[1])
    assert_close(kept, best)
    assert_close(kept_A @ kept_A.mT, torch.eye(2).expand(2, 2, 2))
    loss = measure_loss(wide_B, wide_A, kept_B, kept_A)
    assert_close(loss.true, float(delta.square().sum()))
    assert_close(loss.kept, float(kept.square().sum()))
    assert_close(loss.error, float((delta - kept).square().sum()))


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
    assert_close(kept.layers["x"].lora_A, plain.layers["x"].lora_A)


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
    with pytest.raises(AdapterError, match=r"adapter 'b' has non-finite values at m\.q"):
        combine(layers, ["a", "b"], [0.5, 0.5], recipe)
