"""What model adapters add inside the model, where rows of a batch have adapters of their own."""

from __future__ import annotations

import torch

import nbpeft
from nbpeft.model import get_peft_model
from tests.closeness import assert_close
from tests.tiny_models import llama, randomize, tokens


@torch.no_grad()
def test_a_prompt_is_read_by_layers_whose_rows_have_other_adapters() -> None:
    fields = {"adapter_len": 3, "adapter_layers": 1, "task_type": "CAUSAL_LM"}
    model = get_peft_model(llama(), nbpeft.AdaptionPromptConfig(**fields), "prompt").eval()
    model.add_adapter("lora", nbpeft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False))
    randomize(model, "prompt")
    ids = tokens(3)
    rows = ["lora", "prompt", "__base__"]
    found = model(input_ids=ids, adapter_names=rows).logits
    for name, row, one in zip(rows, found.split(1), ids.split(1), strict=True):
        with model.disable_adapter() if name == "__base__" else model.use(name):
            assert_close(row, model(input_ids=one).logits)
