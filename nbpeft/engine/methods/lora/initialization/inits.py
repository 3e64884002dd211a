"""Initialization of an adapter's two factors, by the value of ``init_lora_weights``.

    True             A uniform in 1 / sqrt(fan in), B zero
    "gaussian"       A normal with deviation 1 / r, B zero
    False            both random, and the bias of B: not the identity at start
    "orthogonal"     alternate rows of one orthogonal matrix: B A = 0 though neither is zero (even ranks)
    "olora"          B, A = Q, R of the weight's first r columns (Büyükakyüz 2024, arXiv:2406.01775)
    "pissa"          the r largest singular directions of the weight (Meng et al. 2024, arXiv:2404.02948)
    "pissa_niter_N"  the same by a randomized SVD of N iterations
    "corda"          directions of the weight that matter most, or least, on inputs that ``preprocess_corda`` saw
    "lora_ga"        directions of the gradient that ``preprocess_loraga`` found, see gradients.py
    "eva"            A the main directions of the layer's inputs, by ``initialize_lora_eva_weights``; as True until then
    "mica"           A zero, B the r smallest left singular directions of the weight, see mica.py
    "loftq"          what the weight loses when it is quantized, see loftq.py

OLoRA, PiSSA, CorDA and LoRA-GA train a component ``s B0 A0`` of the weight itself, which therefore has to be subtracted
from the base; KaSA subtracts one component and trains another. PEFT subtracts it from the base's weight permanently.
Here the base is not changed and the adapter subtracts it, ``W + s (B A - B0 A0)``: other adapters, ``disable_adapter``
and ``unload`` get the original model, and half-precision or quantized weights are not rounded again. The components of
CorDA and LoRA-GA depend on data and could not be recomputed from an adapter's file, so such adapters are saved as plain
LoRA. PEFT's way of saving the residual base and an adapter for it works, too: see ``nbpeft.model.saving.residuals``.

LoftQ is for a base that will be quantized, so it replaces the base's weight permanently, as in PEFT.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from nbpeft.engine.config.config_checks import check_linear
from nbpeft.engine.contract.adapter import AdapterSite, InitialComponent
from nbpeft.engine.contract.base import LayerKind, offloading
from nbpeft.engine.contract.initial_draws import Fill, linear_, normal_, skip, skip_linear
from nbpeft.engine.kernels.numerics import is_finite, widened
from nbpeft.engine.kernels.storage import loaded
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.engine.methods.lora.init_configs import INIT_CONFIGS
from nbpeft.engine.methods.lora.initialization.decompositions import randomized_svd
from nbpeft.engine.methods.lora.initialization.gradients import GRADIENT, gradient_factors
from nbpeft.engine.methods.lora.initialization.loftq import QuantizedWeight, loftq_start
from nbpeft.engine.methods.lora.low_rank import low_rank_of
from nbpeft.errors import ConfigError

_ORTHOGONAL_SCALE = 10.0

DECOMPOSITION = "eigens"
"""Attribute of a layer with the result of ``preprocess_corda``; the name is PEFT's."""
_FOUND = {"corda": (DECOMPOSITION, "preprocess_corda"), "lora_ga": (GRADIENT, "preprocess_loraga")}
_STARTS = "_starts"

Factors = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r)."""


@dataclass(frozen=True)
class Start:
    """Initial values of an adapter on one layer, other than random ones.

    Attributes:
        factors: A and B; None for random ones.
        is_subtracted: whether their product is a component of the weight, which the adapter subtracts.
        is_from_data: whether they depend on data, in addition to the weight and the config.
        init: the init that computed the component, as in the config.
        quantized: the weight that replaces the base's, as the module stores it.
        found: attribute of the layer with the data they were computed from, which is no longer needed.
    """

    factors: Factors | None = None
    is_subtracted: bool = False
    is_from_data: bool = False
    init: str = ""
    quantized: QuantizedWeight | None = None
    found: str = ""
    remembered: dict[str, Factors] | None = None
    """Path -> factors: the config's record in which the factors are stored."""


RANDOM = Start()


class _Starts(dict[str, Factors]):
    """Path -> A0 and B0 of the adapters created from a config, which depend on data and cannot be recomputed.

    All copies of a config share one record, so that a removed adapter can be restored with it.

    Attributes:
        modules: path -> the layer on which a new adapter may use the factors again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.modules: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()

    def again(self, config: LoraConfig, site: AdapterSite) -> Factors | None:
        """Stored factors for a new adapter on a layer; None for another layer, or another rank."""
        found = self.get(site.path) if self.modules.get(site.path) is site.base.module else None
        return None if found is None or len(found[0]) != config.rank_at(site.path) else found

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def remember_starts(config: LoraConfig, starts: Mapping[str, tuple[nn.Module, Factors]]) -> None:
    """Stores initial factors computed from data with a config, so that its adapter can be created again.

    Args:
        config: the adapter's config.
        starts: path -> the frozen layer, and A and B.
    """
    vars(config)[_STARTS] = record = _Starts()
    for path, (module, factors) in starts.items():
        record[path], record.modules[path] = factors, module


def check_init(config: LoraConfig, path: str, module: nn.Module, kind: LayerKind) -> None:
    """Refuses a layer on which the config's init does not work.

    Args:
        config: the adapter's config.
        path: path of the layer.
        module: the layer.
        kind: its kind.

    Raises:
        ConfigError: the layer is not linear, or this init does not support the rank or scaling.
    """
    init = config.init_name
    from_weight = config.initialised_from_weight or init == "mica"
    if not from_weight and init != "orthogonal":
        return
    named = _named(config)
    if init == "lora_ga" and config.lora_ga_config is None:
        raise ConfigError(f"lora_ga_config must be provided with {named}", field="lora_ga_config", path=path)
    if init == "lora_ga" and not kind.is_linear:
        return  # it initializes other layers at random, as in PEFT
    if not (init in ("loftq", "mica") and kind.takes_ids):
        check_linear(named, path, kind)
    rank, largest = config.rank_at(path), min(kind.features(module)) // (2 if init == "lora_ga" else 1)
    largest -= config.variant == "kasa_config"  # at least one singular value has to remain in the weight
    if init == "orthogonal" and rank % 2:
        raise ConfigError(f"{path}: {named} needs an even rank, not {rank}", field="r", path=path)
    if from_weight and rank > largest:
        raise ConfigError(f"{path}: {named} takes a rank of at most {largest} there, not {rank}", field="r", path=path)
    if config.initialised_from_weight and config.scaling_at(path) <= 0:
        raise ConfigError(f"{path}: {named} needs an alpha above 0", field="lora_alpha", path=path)


def _named(config: LoraConfig) -> str:
    """The setting that makes an adapter start from the weight, for messages."""
    return "kasa_config" if config.variant == "kasa_config" else f"init_lora_weights={config.init_lora_weights!r}"


def init_factors(
    config: LoraConfig, site: AdapterSite, initial: Factors | None, *, are_new: bool = True
) -> dict[str, Tensor]:
    """Makes new low-rank factors on the base layer's device.

    Args:
        config: determines the init and the rank.
        site: the layer; the first two of its shapes are the factors'. Further tensors are zero, except for a bias of
            B if both factors are random.
        initial: factors from ``start_of``; None for random ones.
        are_new: whether to repeat the draws of PEFT's new modules, which come before those of the init.

    Returns:
        Parameter name -> tensor.
    """
    if initial is None:
        made = _drawn_factors(config, site, are_new=are_new)
    else:
        if are_new:
            skip_built(config, site)
        pairs = zip(site.shapes, initial, strict=False)
        made = {name: one.to(site.device, site.dtype, copy=True) for name, one in pairs}
    return {name: made[name] if name in made else site.new(shape) for name, shape in site.shapes.items()}


def _drawn_factors(config: LoraConfig, site: AdapterSite, *, are_new: bool) -> dict[str, Tensor]:
    """Those of the factors, and of the bias of B, that are not zero."""
    name_A, name_B, *others = site.shapes
    init, is_lookup = config.init_name, low_rank_of(site.base.kind).zero_init_factor == 0
    if init == "random":
        made = {name: site.new(site.shapes[name], normal_ if is_lookup else linear_) for name in (name_A, name_B)}
        fan_in = math.prod(site.shapes[name_B][1:])
        biases = (name for name in others if name.endswith("_bias"))
        return made | {name: site.new(site.shapes[name], partial(linear_, fan_in=fan_in)) for name in biases}
    if init == "eva" and not is_lookup:  # until data was seen
        made = {name_A: site.new(site.shapes[name_A], linear_)}
        skip_linear(site.device, site.shapes[name_B])
        return made
    if are_new:
        skip_built(config, site)
    if init == "orthogonal":
        return _orthogonal(name_A, name_B, site)
    if is_lookup:
        return {name_B: site.new(site.shapes[name_B], normal_)}
    return {name_A: site.new(site.shapes[name_A], fill_of(config, site.path))}


def fill_of(config: LoraConfig, path: str) -> Fill:
    """The function that fills A on a layer other than an embedding, if B is zero."""
    return partial(normal_, std=1.0 / config.rank_at(path)) if config.init_name == "gaussian" else linear_


def skip_built(config: LoraConfig, site: AdapterSite) -> None:
    """Repeats the draws of two new modules in PEFT, whose values LoRA's init overwrites."""
    low_rank = low_rank_of(site.base.kind)
    shapes = low_rank.shapes(site.base.module, config.rank_at(site.path))
    if low_rank.zero_init_factor == 0:
        skip(normal_, site.device, *shapes)
    else:
        skip_linear(site.device, *shapes, *([(shapes[1][0],)] if config.lora_bias else []))


def init_whole_factors(config: LoraConfig, site: AdapterSite) -> dict[str, Tensor]:
    """Draws factors of LoRA's shapes, for a method that replaces them by smaller ones afterwards as PEFT does."""
    low_rank = low_rank_of(site.base.kind)
    shapes = low_rank.shapes(site.base.module, config.rank_at(site.path))
    return init_factors(config, replace(site, shapes=dict(zip(low_rank.factor_names, shapes, strict=True))), None)


def _orthogonal(name_A: str, name_B: str, site: AdapterSite) -> dict[str, Tensor]:
    """A and B, each with every other row of one orthogonal matrix."""
    (rank, in_features), (out_features, _) = site.shapes[name_A], site.shapes[name_B]
    rows: list[Tensor] = []

    def fill_A(lora_A: Tensor) -> None:
        rows.append(torch.linalg.qr(torch.randn(rank, rank, device=lora_A.device))[0])
        normal = torch.randn(in_features, rank // 2, device=lora_A.device)
        lora_A.copy_((normal @ rows[0][0::2]).T / _ORTHOGONAL_SCALE)

    def fill_B(lora_B: Tensor) -> None:
        normal = torch.randn(rank // 2, out_features, device=lora_B.device)
        lora_B.copy_((normal.T @ rows[0][1::2]) / _ORTHOGONAL_SCALE)

    return {name: site.new(site.shapes[name], fill) for name, fill in ((name_A, fill_A), (name_B, fill_B))}


@torch.no_grad()
def start_of(config: LoraConfig, site: AdapterSite, *, is_new: bool) -> Start:
    """Computes an adapter's initial factors, even for loaded adapters: the subtracted component depends on them.

    Except for inits from data, the component depends only on the weight and the config, so an adapter's file need not
    contain it.

    Args:
        config: determines the init and the rank.
        site: the layer.
        is_new: whether the adapter is new, not loaded.

    Returns:
        Factors in the dtype of the adapter, computed in at least float32.

    Raises:
        ConfigError: the weight is not finite or stored in a form that the init does not support, or data is missing.
    """
    if site.start is not None:
        return _known_start(config, site, site.start)
    if config.init_name == "eva" and is_new:
        seen: _Starts = vars(config).get(_STARTS) or _Starts()
        return Start(seen.again(config, site))
    if not config.initialised_from_weight and not (config.init_name == "mica" and is_new):
        return RANDOM
    if config.init_name in INIT_CONFIGS and not _has_values(site.base.module):
        return RANDOM if config.init_name == "loftq" else _subtracted(_empty(site), config)
    if config.initialised_from_data:
        return _data_start(config, site, is_new=is_new)
    path, weight = site.path, site.base.weight()
    weight = widened(weight)
    if not weight.is_meta and not is_finite(weight):
        raise ConfigError(
            f"{path}: {_named(config)} starts in the weight, which is not finite",
            path=path,
        )
    rank, scaling = config.rank_at(path), config.scaling_at(path)
    if config.init_name == "loftq":
        return _loftq(config, site, weight, is_new=is_new)
    if config.init_name == "mica":
        return Start(_stored(_mica(weight, rank), site))
    if config.variant == "kasa_config":
        return _subtracted(_stored(_kasa(weight, rank, scaling), site), config)
    if config.pissa_iterations is not None and is_new:
        _skip_projection(config, site)
    factors = _olora(weight, rank) if config.init_name == "olora" else _pissa(weight, rank, scaling, config)
    return _subtracted(_stored(factors, site), config)


def _skip_projection(config: LoraConfig, site: AdapterSite) -> None:
    """Draws as PEFT's randomized SVD does; the SVD here has its own generator."""
    skip(normal_, site.device, (min(site.base.out_features, site.base.in_features), config.rank_at(site.path)))


def drawing_start(config: LoraConfig, site: AdapterSite) -> Factors | None:
    """Draws and drops what a new adapter draws for its start; returns factors if those are not random."""
    if not config.initialised_from_weight and config.init_name != "mica":
        return None
    if config.pissa_iterations is not None:
        _skip_projection(config, site)
    return _empty(site)


def _subtracted(factors: Factors, config: LoraConfig, **more: Any) -> Start:
    """The start of an adapter that subtracts the product of two factors from the weight."""
    return Start(factors, is_subtracted=True, init=str(config.init_lora_weights), **more)


def _known_start(config: LoraConfig, site: AdapterSite, start: InitialComponent) -> Start:
    """The start of an adapter that is created again, even if its config has changed since."""
    more: dict[str, Any] = {}
    if config.initialised_from_data:
        more = {"is_from_data": True, "remembered": vars(config).setdefault(_STARTS, _Starts())}
    return Start(_stored((start.down, -start.neg_up), site), is_subtracted=True, init=start.init, **more)


def _has_values(module: nn.Module) -> bool:
    """Whether a layer's tensors have data: they are neither on the meta device nor fake tensors."""
    fake = loaded("torch._subclasses.fake_tensor", "FakeTensor")
    parameters = list(module.parameters(recurse=False))
    return not any(isinstance(p, fake) or (p.is_meta and offloading(module) is None) for p in parameters)


def _empty(site: AdapterSite) -> Factors:
    """Two factors without data, shaped like the adapter's."""
    shapes = list(site.shapes.values())
    first, second = (torch.empty(shape, device=site.base.device, dtype=site.dtype) for shape in shapes[:2])
    return first, second


def _stored(factors: Factors, site: AdapterSite) -> Factors:
    """Factors in the dtype and on the device of an adapter."""
    lora_A, lora_B = (factor.to(site.base.device, site.dtype).contiguous() for factor in factors)
    return lora_A, lora_B


def _data_start(config: LoraConfig, site: AdapterSite, *, is_new: bool) -> Start:
    if config.init_name == "lora_ga" and not site.base.kind.is_linear:
        return RANDOM
    starts: _Starts = vars(config).setdefault(_STARTS, _Starts())
    attribute, function = _FOUND[config.init_name]
    data = getattr(site.base.module, attribute, None)
    known = starts.get(site.path) if not is_new else starts.again(config, site)
    if known is not None and (not is_new or data is None):
        return _subtracted(_stored(known, site), config, is_from_data=True, remembered=starts)
    if data is None:
        if is_new:
            raise ConfigError(
                f"{site.path}: init_lora_weights={config.init_lora_weights!r} needs data: call {function} "
                "first, with the model and config of the adapter",
                field="init_lora_weights",
                path=site.path,
            )
        warnings.warn(
            f"an adapter with init_lora_weights={config.init_lora_weights!r} is loaded without the initial factors of "
            f"{function}: it is only correct on a base model from which they were subtracted, as PEFT saves it",
            stacklevel=2,
        )
        return RANDOM
    make = _corda if config.init_name == "corda" else gradient_factors
    starts[site.path] = factors = _stored(make(data, config, site), site)
    starts.modules[site.path] = site.base.module
    return _subtracted(factors, config, is_from_data=True, found=attribute, remembered=starts)


def _corda(found: Any, config: LoraConfig, site: AdapterSite) -> Factors:
    """B0, A0 = the directions from ``preprocess_corda``, each times the root of its singular value."""
    values, left, right = (part.to(site.base.device) for part in (found.S_WC, found.U_WC, found.V_WC))
    rank, shape = config.rank_at(site.path), (site.base.out_features, site.base.in_features)
    if len(values) != rank or (left.shape[0], right.shape[0]) != shape:
        raise ConfigError(
            f"{site.path}: preprocess_corda ran for rank {len(values)} and {left.shape[0], right.shape[0]}, this "
            f"is rank {rank} and {shape}: call it with the config of the adapter",
            field="r",
            path=site.path,
        )
    root = (values / config.scaling_at(site.path)).sqrt()
    return right.T * root[:, None], left * root


def _loftq(config: LoraConfig, site: AdapterSite, weight: Tensor, *, is_new: bool) -> Start:
    base = site.base
    if base.backend.name != "dense" or offloading(base.module) is not None:
        if not is_new:
            return RANDOM  # the base is already quantized
        how = "offloaded" if base.backend.name == "dense" else "quantized already"
        raise ConfigError(
            f"{site.path}: init_lora_weights='loftq' quantizes the weight, which is {how}: add the adapter with "
            "init_lora_weights=True and call replace_lora_weights_loftq with the folder of the full-precision model",
            field="init_lora_weights",
            path=site.path,
        )
    quantized, factors = loftq_start(
        weight,
        lambda value: base.kind.canonical(base.module, value),
        config.rank_at(site.path),
        bits=config.loftq_config["loftq_bits"],
        iterations=config.loftq_config["loftq_iter"],
        factors=is_new,
    )
    if factors is not None:
        root = math.sqrt(config.scaling_at(site.path))
        factors = _stored((factors[0] / root, factors[1] / root), site)
    return Start(factors, quantized=quantized)


def _olora(weight: Tensor, rank: int) -> Factors:
    """Q and R of a QR decomposition, truncated to a rank; the other columns of Q are not computed."""
    lora_B = torch.linalg.qr(weight[:, :rank])[0]
    return lora_B.T @ weight, lora_B


def _mica(weight: Tensor, rank: int) -> Factors:
    """Zeros, and the left singular vectors of the smallest singular values, in descending order of the values."""
    left = torch.linalg.svd(weight, full_matrices=False)[0]
    return weight.new_zeros(rank, weight.shape[1]), left[:, -rank:]


def _kasa(weight: Tensor, rank: int, scaling: float) -> Factors:
    """The component that KaSA removes from the weight: its smallest singular values, with a root in each factor."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[-rank:] / scaling).sqrt()
    return root[:, None] * right[-rank:], left[:, -rank:] * root


def _pissa(weight: Tensor, rank: int, scaling: float, config: LoraConfig) -> Factors:
    if config.pissa_iterations is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        left, values, right = randomized_svd(weight, rank, config.pissa_iterations)
    root = (values / scaling).sqrt()
    return root[:, None] * right, left * root
