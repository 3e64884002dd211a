"""Which low-rank product a kind of layer gets."""

from __future__ import annotations

import pytest

from nbpeft.engine.contract.registry import layer_kinds
from nbpeft.engine.layer_kinds.convolution import Convolution
from nbpeft.engine.methods.lora.low_rank import (
    LowRank,
    LowRankConvolution,
    LowRankLookup,
    LowRankParameter,
    low_rank_of,
)
from nbpeft.errors import LayerKindError


def test_each_kind_has_its_product() -> None:
    found = {kind.name: type(low_rank_of(kind)) for kind in layer_kinds()}
    convolutions = {f"convolution{count}d": LowRankConvolution for count in (1, 2, 3)}
    linear = dict.fromkeys(("linear", "conv1d", "eetq_linear", "attention"), LowRank)
    assert found == {"embedding": LowRankLookup, "parameter": LowRankParameter, **convolutions, **linear}


def test_a_kind_without_a_product_is_refused() -> None:
    class Recurrent(Convolution):
        name = "recurrent"

    class Strange:
        name, peft_name, is_linear, takes_ids = "strange", "Strange", False, False

    assert type(low_rank_of(Recurrent())) is LowRankConvolution
    with pytest.raises(LayerKindError, match="LoRA does not work on layers of the kind 'strange'"):
        low_rank_of(Strange())  # type: ignore[arg-type]
