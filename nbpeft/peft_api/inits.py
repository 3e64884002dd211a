"""``peft.utils.loftq_utils``, and PEFT's non-public names for inits."""

from __future__ import annotations

import torch
from torch import Tensor

from nbpeft.engine.methods.entries.shira import random_mask as random_mask
from nbpeft.engine.methods.lora.initialization.incremental_pca import IncrementalPCA as IncrementalPCA
from nbpeft.engine.methods.lora.initialization.loftq import loftq_start
from nbpeft.model.from_data.data_inits import CordaEigens as CordaEigens
from nbpeft.model.from_data.data_inits import estimate_gradients as estimate_gradients
from nbpeft.model.from_data.eva import forward_fn_dict as forward_fn_dict
from nbpeft.model.from_data.eva import (
    prepare_layer_inputs_fn_language_modeling as prepare_layer_inputs_fn_language_modeling,
)
from nbpeft.model.from_data.eva import (
    prepare_model_inputs_fn_language_modeling as prepare_model_inputs_fn_language_modeling,
)


@torch.no_grad()
def loftq_init(weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the quantized weight, and two factors whose product best approximates the quantization error.

    Args:
        weight: (out, in).
        num_bits: 2, 4 or 8.
        reduced_rank: rank of the factors.
        num_iter: number of alternating iterations.

    Returns:
        The dequantized weight in the dtype of the first, A (reduced_rank, in) and B (out, reduced_rank) in float32.
    """
    quantized, factors = loftq_start(weight, lambda value: value, reduced_rank, bits=num_bits, iterations=num_iter)
    assert factors is not None
    return quantized.dequantize().to(weight.dtype), *factors
