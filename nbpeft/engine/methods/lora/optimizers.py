"""Optimizers made for low-rank adapters: LoRA-FA, LoRA+ and Riemannian preconditioning.

LoRA-FA: A stays at its random initial value, only B is trained (https://arxiv.org/abs/2308.03303). The gradient of B
is replaced by the one whose product with A is closest to the full gradient: g_B (A Aᵀ)⁻¹ / scaling². A is
frozen, so the (rank, rank) inverse is computed once.

LoRA+: B is trained with a higher learning rate than A (https://arxiv.org/abs/2402.12354).
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nbpeft.engine.changes.called_modules import called_modules
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.errors import ConfigError, TrainingError

_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")
_RIDGE = 1e-8
_B_IN_NAME = re.compile(r"\.(lora|lora_embedding)_B\b")
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


class LoraFAOptimizer(Optimizer):
    """AdamW in which the gradients of B parameters are projected first.

    Args:
        params: Parameters or groups. As in PEFT, a group may have ``names`` and ``scaling_factors`` of its parameters:
            each B whose A is in the group, too, is trained by LoRA-FA.
        lr: Learning rate.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay, as in AdamW.
        correct_bias: Whether the means are corrected for their initial value of zero.
        partners: B parameter -> its A, (rank, in), and the scaling of their product, for groups without ``names``. A
            parameter that it does not contain is trained by plain AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        partners: Mapping[nn.Parameter, tuple[Tensor, float]] | None = None,
    ) -> None:
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"lr={lr}, betas={betas}, eps={eps}: rates must not be negative, betas lie in [0, 1)")
        self._partners = dict(partners or {})
        self._inverses: dict[Tensor, tuple[int, Tensor]] = {}
        self._has_old_groups = False
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters; see ``torch.optim.Optimizer``."""
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        parameters, names = added["params"], added.get("names", ())
        self._has_old_groups |= "scaling_factor" in added and "scaling_factors" not in added
        scalings = added.get("scaling_factors") or [added.get("scaling_factor")] * len(parameters)
        by_name = dict(zip(names, parameters, strict=bool(names)))
        for name, scaling in zip(names, scalings, strict=bool(names)):
            partner = by_name.get(_B_IN_NAME.sub(r".\1_A", name))
            if scaling is not None and partner is not None and _B_IN_NAME.search(name):
                self._partners[by_name[name]] = partner, scaling

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes an optimizer step; returns the result of ``closure``."""
        if self._has_old_groups:
            warnings.warn(
                "`scaling_factor` is deprecated: give a group `scaling_factors`, one for each parameter",
                FutureWarning,
                stacklevel=2,
            )
            self._has_old_groups = False
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(group, parameters, [self.projected(parameter) for parameter in parameters])
        return loss

    def projected(self, parameter: nn.Parameter) -> Tensor:
        """The gradient that AdamW uses for a parameter."""
        gradient = parameter.grad
        assert gradient is not None
        if parameter not in self._partners:
            return gradient
        inverse = self._inverse(*self._partners[parameter])
        return (gradient.to(inverse.dtype) @ inverse).to(gradient.dtype)

    def _inverse(self, lora_A: Tensor, scaling: float) -> Tensor:
        """(A Aᵀ)⁻¹ / scaling², (rank, rank); recomputed only after A was written to."""
        version, found = self._inverses.get(lora_A, (-1, None))
        if found is None or version != lora_A._version:
            wide = lora_A.detach().float()
            ridge = _RIDGE * torch.eye(wide.shape[0], device=wide.device)
            found = torch.linalg.pinv(wide @ wide.T + ridge) / scaling**2
            self._inverses[lora_A] = (lora_A._version, found)
        return found

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = torch.zeros_like(parameter), torch.zeros_like(parameter)
                self.state[parameter].update(step=0, exp_avg=zeros[0], exp_avg_sq=zeros[1])
            self.state[parameter]["step"] += 1
        states = [self.state[parameter] for parameter in parameters]
        means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        first, second = group["betas"]
        torch._foreach_mul_(means, first)
        torch._foreach_add_(means, gradients, alpha=1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - second)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        sizes = [-group["lr"] * _correction(state["step"], first, second, group["correct_bias"]) for state in states]
        torch._foreach_addcdiv_(parameters, means, roots, sizes)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])


def _correction(step: int, first: float, second: float, wanted: bool) -> float:
    return math.sqrt(1 - second**step) / (1 - first**step) if wanted else 1.0


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """Freezes every A of the active adapters, and creates an optimizer of the rest. Arguments as in PEFT.

    Args:
        model: The model with adapters.
        r: Ignored, accepted as in PEFT: each layer's own scaling is used.
        lora_alpha: Likewise.
        lr: Learning rate.
        weight_decay: As in AdamW.
        use_rslora: Deprecated in PEFT; must agree with the adapters' configs.

    Returns:
        The optimizer.

    Raises:
        ConfigError: ``use_rslora`` contradicts a config.
        TrainingError: there is no trainable B.
    """
    if use_rslora is not None:
        manager = manager_of(model)
        active = {} if manager is None else {name: manager.configs[name] for name in manager.active}
        wrong = [n for n, config in active.items() if bool(getattr(config, "use_rslora", False)) != use_rslora]
        if wrong:
            raise ConfigError(
                f"use_rslora={use_rslora} was passed to create_lorafa_optimizer, but the config of {wrong[0]!r} says "
                "otherwise: leave it out."
            )
        warnings.warn("use_rslora is not needed here: the config says it.", FutureWarning, stacklevel=2)
    pairs = list(_pairs(model))
    if not pairs:
        raise TrainingError("No trainable lora_B was found: activate a LoRA adapter and unfreeze it first.")
    for lora_A, _, _ in pairs:
        lora_A.requires_grad_(False)
    partners = {lora_B: (lora_A, scaling) for lora_A, lora_B, scaling in pairs}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    scalings = [partners[parameter][1] if parameter in partners else None for parameter in trained.values()]
    group = {"params": list(trained.values()), "names": list(trained), "scaling_factors": scalings}
    return LoraFAOptimizer([group], lr=lr, weight_decay=weight_decay, partners=partners)


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter, float]]:
    """Yields (A, B, scaling) of every adapter on every layer whose B is trained."""
    for module in called_modules(model):
        own = dict(module.named_parameters(recurse=False))
        for first, second in _PAIRS:
            if first in own and second in own and own[second].requires_grad:
                yield own[first], own[second], float(getattr(module, "scaling", 1.0))


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """Creates an optimizer with LoRA+'s learning rates (https://arxiv.org/abs/2402.12354). Arguments as in PEFT.

    Args:
        model: The model with adapters.
        optimizer_cls: Class of the optimizer.
        lr: Learning rate of A and of everything that is neither A nor B.
        loraplus_lr_ratio: Learning rate of B and of vectors, as a multiple of ``lr``; at least 1.
        **kwargs: For the optimizer, and ``loraplus_weight_decay`` (0.0) and
            ``loraplus_lr_embedding`` (1e-6), the learning rate of adapters on embeddings.

    Returns:
        An instance of ``optimizer_cls``, with one group of parameters for each learning rate and weight decay.

    Raises:
        TrainingError: nothing is trainable.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_rate = kwargs.pop("loraplus_lr_embedding", 1e-6)
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    in_norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters(recurse=False)
    }
    own_names = {
        id(parameter): name
        for module in called_modules(model)  # modules that show adapters' parameters come before the adapters
        for name, parameter in module.named_parameters(recurse=False)
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[_group(own_names[id(parameter)], parameter, id(parameter) in in_norms)].append(parameter)
    if not any(groups.values()):
        raise TrainingError("Nothing is trainable: unfreeze an adapter before making its optimizer.")
    rates = {
        "A": lr,
        "embedding": embedding_rate,
        "B": lr * loraplus_lr_ratio,
        "B without decay": lr * loraplus_lr_ratio,
    }
    optimizer = optimizer_cls(
        [
            {"params": members, "lr": rates[group], "weight_decay": 0.0 if group == "B without decay" else decay}
            for group, members in groups.items()
        ],
        **{"lr": lr, **kwargs},
    )
    if optimizer_cls.__name__ in _EIGHT_BIT:
        _keep_embeddings_in_32_bits(model)
    return optimizer


def _group(name: str, parameter: nn.Parameter, in_norm: bool) -> str:
    if name.startswith("lora_embedding_"):
        return "embedding"
    if name.startswith("lora_B") or parameter.ndim == 1:
        return "B without decay" if in_norm or "bias" in name else "B"
    return "A"


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    optim: Any = importlib.import_module("bitsandbytes.optim")
    manager = optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


class RiemannianPreconditioner:
    """Rescales the gradients of LoRA's factors by each other (https://arxiv.org/abs/2402.02347), in place.

        g_A <- (Bᵀ B + reg I)⁻¹ g_A        g_B <- g_B (A Aᵀ + reg I)⁻¹

    Args:
        pairs: A, (rank, in), and B, (out, rank), of each product.
        reg: keeps the inverses finite if a factor is rank-deficient, as B is at the start.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], reg: float) -> None:
        self.lora_pairs = list(pairs)
        self.reg = reg

    @torch.no_grad()
    def step(self) -> None:
        """Rescales the gradients that exist, before the optimizer's own step."""
        for first, second in self.lora_pairs:
            dtype = torch.promote_types(first.dtype, torch.float32)
            lora_A, lora_B = first.detach().to(dtype), second.detach().to(dtype)
            if first.grad is not None:
                first.grad.copy_(self._inverse(lora_B.T @ lora_B) @ first.grad.to(dtype))
            if second.grad is not None:
                second.grad.copy_(second.grad.to(dtype) @ self._inverse(lora_A @ lora_A.T))

    def _inverse(self, square: Tensor) -> Tensor:
        damping = self.reg * torch.eye(len(square), dtype=square.dtype, device=square.device)
        return torch.linalg.pinv(square + damping)


def trained_pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """A and B of every product of two matrices in a model, if both are trained; embeddings are left out."""
    first, second = _PAIRS[0]
    held = (dict(module.named_parameters(recurse=False)) for module in called_modules(model))
    pairs = ((own[first], own[second]) for own in held if first in own and second in own)
    return [pair for pair in pairs if all(factor.requires_grad and factor.ndim == 2 for factor in pair)]


def _needs_closure(optimizer_cls: type[Optimizer]) -> bool:
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """Creates an optimizer that rescales the gradients of LoRA's factors before each step. Arguments as in PEFT.

    Args:
        model: The model with adapters.
        optimizer_cls: Class of the optimizer, whose ``step`` must not need a closure.
        lr: Learning rate.
        reg: Added to the diagonal of the matrices that are inverted; see ``RiemannianPreconditioner``.
        **kwargs: For the optimizer.

    Returns:
        An instance of ``optimizer_cls``, whose ``step`` rescales first.

    Raises:
        ConfigError: the optimizer needs a closure, or no pair of factors is trained.
        TypeError: ``optimizer_cls`` is not a subclass of ``Optimizer``.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, not {optimizer_cls!r:.60}")
    if _needs_closure(optimizer_cls):
        raise ConfigError(
            f"{optimizer_cls.__name__} requires a closure, which computes the gradients again after rescaling; "
            "use an optimizer such as AdamW or SGD"
        )
    pairs = trained_pairs(model)
    if not pairs:
        raise ConfigError("No trainable lora_A/lora_B parameter pairs were found: activate a LoRA adapter first.")
    preconditioner = RiemannianPreconditioner(pairs, reg)
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)  # type: ignore[call-arg]

    def rescale(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise ConfigError(
                "create_riemannian_optimizer does not support closures, which compute the gradients again after they "
                "were rescaled: call step() without one"
            )
        preconditioner.step()

    # A hook, because a Trainer calls the optimizer's own ``step``.
    optimizer.register_step_pre_hook(rescale)
    return optimizer
