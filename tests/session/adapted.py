"""Looking at an adapted model: what it gives, and whether anything of it changed."""

from __future__ import annotations

from typing import Any

import torch

from nbpeft.session.generation import PromptBatch
from tests.session.letters import Letters

INPUT = {"input_ids": torch.arange(12).reshape(2, 6)}


def randomize(model: Any, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.manager.parameters(name):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**INPUT).logits
    return found


def everything(model: Any) -> dict[str, Any]:
    """Weights, what acts and how, and what trains, to compare bit by bit."""
    manager = model.manager
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "trains": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "modes": [module.training for module in model.modules()],
        "acts": (manager.names, manager.active, manager.enabled, [manager.scale(name) for name in manager.names]),
        "configs": {name: config.to_dict() for name, config in manager.configs.items()},
    }


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    weights, others = first.pop("weights"), second.pop("weights")
    return (
        first == second
        and weights.keys() == others.keys()
        and all(torch.equal(weight, others[name]) for name, weight in weights.items())
    )


def alone(model: Any, prompt: str, name: str | None, tokens: int = 10) -> str:
    """What one adapter answers without any batch."""
    ids = torch.tensor([Letters()(prompt)["input_ids"]])
    with model.disable_adapter() if name is None else model.use(name):
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
    return str(
        PromptBatch.of([prompt], Letters(), model.get_base_model())
        .answer(made[0, ids.shape[1] :].tolist(), tokens)
        .text
    )
