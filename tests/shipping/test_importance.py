"""Calibrated files: what is measured on rows, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from nbpeft.checkpoint import k_quants, read_gguf
from nbpeft.errors import AdapterError, CheckpointError, ConfigError, TrainingError
from nbpeft.session import Session
from nbpeft.shipping import ship
from nbpeft.shipping.importance import mean_squares
from tests.closeness import assert_close
from tests.shipping.support import adapted, base_model, tokenizer
from tests.tiny_models import same_state, state

SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
ROWS = [{"text": "select 24 orders"}, {"text": "select one"}, {"text": "how many orders of three lamps?"}]


class Tokenized:
    """Rows of unlike lengths, in batches."""

    rows = (torch.arange(1, 8), torch.arange(20, 32), torch.arange(50, 55))

    def batches(self, size: int, *, labels: bool) -> list[dict[str, torch.Tensor]]:
        assert size == 1 and not labels
        return [{"input_ids": row[None]} for row in self.rows]


def test_the_mean_squares_are_those_of_the_adapted_models_inputs() -> None:
    model = adapted(base_model(**SIZES), target_modules=["v_proj", "down_proj"]).train()
    before, modes = state(model), [module.training for module in model.modules()]
    found = mean_squares(model.manager, "sql", Tokenized())
    assert same_state(state(model), before) and [module.training for module in model.modules()] == modes

    seen: dict[str, list[torch.Tensor]] = {}
    base = model.get_base_model().eval()
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        hook = lambda _, args, path=path: seen.setdefault(path, []).append(args[0][0])  # noqa: E731
        base.get_submodule(path).register_forward_pre_hook(hook)
    with torch.no_grad():
        for row in Tokenized.rows:
            model(input_ids=row[None])
    for path, parts in seen.items():
        assert_close(found[f"{path}.weight"], torch.cat(parts).square().mean(0))
    assert len(found) == 2 * 7 and "lm_head.weight" not in found
    for fields in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        assert mean_squares(adapted(base_model(**SIZES), **fields).manager, "sql", Tokenized()).keys() == found.keys()


@pytest.mark.parametrize("stored_as", ["q4_k", "q5_k", "q6_k"])
def test_inputs_that_are_always_0_keep_their_weights(stored_as: str) -> None:
    base = base_model(**SIZES)
    base.model.layers[0].mlp.up_proj.weight.data.zero_()  # as in a pruned model: all inputs of down_proj are 0
    counts = mean_squares(adapted(base, target_modules=["k_proj"]).manager, "sql", Tokenized())
    weight = base.model.layers[0].mlp.down_proj.weight.detach().numpy()
    stored = k_quants.quantize(weight, stored_as, counts["model.layers.0.mlp.down_proj.weight"].numpy())
    read = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[stored_as.upper()])
    assert abs(read - weight).max() < 0.2 * abs(weight).max()


def test_inputs_and_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    base = base_model(**SIZES)
    base.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    model = adapted(base, target_modules=["k_proj"])
    with pytest.raises(AdapterError, match=r"the inputs of .* are not finite"):
        mean_squares(model.manager, "sql", Tokenized())
    options: dict[str, Any] = {"merged": True, "tokenizer": tokenizer(), "quantize": "q4_k_m"}
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_down.weight is not finite everywhere, so q4_k cannot"):
        ship(model, engine="llama.cpp", to=tmp_path / "a", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stored_as", ["q4_k_m", "q6_k"])
def test_a_calibrated_file_has_less_error_where_inputs_are_large(stored_as: str, tmp_path: Path) -> None:
    session, model = Session(), adapted(base_model(**SIZES))
    session.register(model, name="model")
    options: dict[str, Any] = {"engine": "llama.cpp", "merged": True, "tokenizer": tokenizer()}
    for name, more in (("exact", {"quantize": "f32"}), ("plain", {}), ("calibrated", {"calibrate": ROWS})):
        session.ship("sql", to=tmp_path / name, **options | {"quantize": stored_as} | more)
    exact, plain, calibrated = (read_gguf(tmp_path / name / "model.gguf") for name in ("exact", "plain", "calibrated"))
    from nbpeft.training.loop.rows import first_rows

    counts = mean_squares(model.manager, "sql", first_rows(model, ROWS, rows=9, tokenizer=tokenizer(), loss=False))
    weights = counts["model.layers.1.mlp.up_proj.weight"]
    name = "blk.1.ffn_up.weight"
    errors = [float(((found[name] - exact[name]) ** 2 * weights).sum()) for found in (plain, calibrated)]
    assert errors[1] < errors[0]
    assert torch.equal(plain["output.weight"], calibrated["output.weight"]), "no importance of output embeddings"
    kind = "q6_k" if stored_as == "q6_k" else "q4_k"
    expected = k_quants.quantize(exact["blk.0.ffn_up.weight"].numpy(), kind, None)
    assert expected.shape[1] == {"q6_k": 210, "q4_k": 144}[kind]


def test_what_cannot_be_calibrated_is_one_line_before_anything_is_read(tmp_path: Path) -> None:
    class Unread:
        def batches(self, size: int, *, labels: bool) -> list[dict[str, torch.Tensor]]:
            raise AssertionError("read")

    model, rows = adapted(), Unread()
    told = r"calibrate has no effect on weights of type f32: it is for whole models in q4_k_m, q5_k_m, q6_k"
    with pytest.raises(ConfigError, match=told):
        ship(model, engine="llama.cpp", to=tmp_path / "a", calibrate=rows)
    options: dict[str, Any] = {"engine": "llama.cpp", "merged": True, "tokenizer": tokenizer(), "quantize": "q4_k_m"}
    ship(model, to=tmp_path / "b", calibrate=rows, dry_run=True, **options)
    with pytest.raises(AssertionError, match="read"):
        ship(model, to=tmp_path / "c", calibrate=rows, **options)
    session = Session()
    session.register(model, name="model")
    with pytest.raises(TrainingError):
        session.ship("sql", to=tmp_path / "d", calibrate=[{"nothing": 1}], **options)
    assert list(tmp_path.iterdir()) == []
