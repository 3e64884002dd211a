"""What a model, with a plan made for it, can take from a file."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nbpeft.checkpoint.bare import bare_modules
from nbpeft.checkpoint.weights_format import Expected, Shape
from nbpeft.engine.plan import InjectionPlan


def expected_of(plan: InjectionPlan, model: nn.Module) -> Expected:
    """The tensors that a plan's adapter consists of.

    Args:
        plan: what is to be put into the model.
        model: the base model; adapters on it do not matter.

    Returns:
        Adapters, copies and trained biases of the plan; the weights of the input and output
        embeddings as optional, because files of resized models bring them.
    """
    adapters = {target.path: target.shapes for target in plan.targets}
    embeddings = [
        embedding
        for getter in ("get_input_embeddings", "get_output_embeddings")
        if (embedding := _call(model, getter)) is not None
    ]
    if not (plan.copies or plan.biases or embeddings):
        return Expected(adapters)
    copies: dict[str, dict[str, Shape]] = {}
    base: dict[str, Shape] = {}
    optional: dict[str, Shape] = {}
    biases = set(plan.biases)
    held = {id(part) for embedding in embeddings for part in embedding.modules()}
    for path, module in bare_modules(model):
        if path in plan.copies:
            copies[path] = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if parameter is None:
                continue
            if full in biases:
                base[full] = tuple(parameter.shape)
            elif id(module) in held and not _inside(path, plan.copies):
                optional[full] = tuple(parameter.shape)
    return Expected(adapters, copies, base, optional)


def _call(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def _inside(path: str, parents: Iterable[str]) -> bool:
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)
