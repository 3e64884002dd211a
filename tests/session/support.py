"""Looking at an adapted model: all of its state, and what one adapter answers."""

from __future__ import annotations

from typing import Any

import torch

from nbpeft.training.watching.generation import PromptBatch
from tests.char_tokenizer import CharTokenizer


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


def alone(model: Any, prompt: str, name: str | None, tokens: int = 10) -> str:
    """What one adapter answers without any batch."""
    ids = torch.tensor([CharTokenizer()(prompt)["input_ids"]])
    with model.disable_adapter() if name is None else model.use(name):
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
    return str(
        PromptBatch.of([prompt], CharTokenizer(), model.get_base_model())
        .answer(made[0, ids.shape[1] :].tolist(), tokens)
        .text
    )
