"""A network beside a model, where gradient checkpointing computes the hooks of a block again, too."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import nbpeft
from nbpeft.engine.calls import side_network
from nbpeft.errors import AdapterError
from tests.tiny_models import llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore")


def kept() -> int:
    """How many states are kept for blocks that are computed again."""
    gc.collect()
    return sum(type(one) is side_network._Kept for one in gc.get_objects())


def gradients() -> dict[str, Tensor]:
    torch.manual_seed(1)
    config = nbpeft.ShadowConfig(task_type="CAUSAL_LM", init_weights=False, shadow_alpha=1.0)
    model = nbpeft.get_peft_model(llama(num_hidden_layers=3, initializer_range=0.3), config).train()
    model.get_base_model().model.__dict__["gradient_checkpointing"] = True
    torch.manual_seed(3)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    assert kept() == 3
    loss.backward()
    del loss
    assert kept() == 0
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def test_a_block_that_is_computed_again_with_its_hooks_has_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = gradients()

    def checkpointed(self: Any, *args: Any, reentrant: bool = False, **kwargs: Any) -> Any:
        call = partial(nn.Module.__call__, self, **kwargs)
        return torch.utils.checkpoint.checkpoint(call, *args, use_reentrant=reentrant)

    monkeypatch.setattr(LlamaDecoderLayer, "__call__", checkpointed, raising=False)
    found = gradients()
    assert found.keys() == wanted.keys() and len(wanted) > 20
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    again = partial(checkpointed, reentrant=True)
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", lambda self, *args, **kwargs: again(self, *args, **kwargs))
    with pytest.raises(AdapterError, match="does not train with reentrant gradient checkpointing"):
        gradients()
