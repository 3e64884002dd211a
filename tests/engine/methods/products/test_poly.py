"""Polytropon: the task of each row, in every way in which a model is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import nbpeft
from nbpeft.errors import AdapterError, ConfigError, ConversionError, MergeError
from nbpeft.memory import forecast
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close, assert_same, differ
from tests.tiny_models import llama, logits, randomize, tokens

FIELDS: dict[str, Any] = {"r": 3, "n_tasks": 3, "n_skills": 4, "n_splits": 2}
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
SEQ2SEQ: dict[str, Any] = {**FIELDS, "target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=97, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config).eval()


def batch(rows: int = 3) -> dict[str, Tensor]:
    return {"input_ids": tokens(rows, 6), "task_ids": torch.arange(rows) % 3}


def made(seed: int = 3, **fields: Any) -> PeftModel:
    model = get_peft_model(llama(), nbpeft.PolyConfig(**FIELDS, **TARGETS, **fields))
    randomize(model, seed=seed, scale=0.4)
    return model.eval()


def both(folder: Path) -> tuple[PeftModel, Any]:
    """The same random adapter on an encoder and decoder in both libraries."""
    ours = get_peft_model(t5(), nbpeft.PolyConfig(**SEQ2SEQ))
    randomize(ours, scale=0.3)
    ours.save_pretrained(folder)
    return ours.eval(), peft.PeftModel.from_pretrained(t5(), folder, is_trainable=True).eval()


@pytest.mark.parametrize("init_weights", [True, False])
def test_a_seeded_start_is_that_of_peft(init_weights: bool) -> None:
    models = []
    for make, library in ((get_peft_model, nbpeft), (peft.get_peft_model, peft)):
        config = library.PolyConfig(**FIELDS, **TARGETS, init_weights=init_weights)
        base = llama()
        torch.manual_seed(5)
        models.append(make(base, config))
    ours, theirs = ({name: one for name, one in model.named_parameters() if one.requires_grad} for model in models)
    assert ours.keys() == theirs.keys() and len(ours) == 3 * 2 * 3
    for name, expected in theirs.items():
        assert_same(ours[name], expected)
    assert models[0].get_nb_trainable_parameters() == models[1].get_nb_trainable_parameters()


def test_each_task_gives_what_it_gives_in_peft(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    labels = tokens(3, 4, seed=1)
    found, expected = (model(**batch(), labels=labels).logits for model in (ours, theirs))
    assert_close(found, expected)
    other = ours(input_ids=batch()["input_ids"], task_ids=torch.tensor([2, 0, 1]), labels=labels).logits
    assert (other - found).abs().amax((1, 2)).min() > 1e-3
    written = [model.generate(**batch(), max_new_tokens=5, do_sample=False) for model in (ours, theirs)]
    assert torch.equal(*written)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert_close(*(model(**batch(), labels=labels).logits for model in (ours, theirs)))


def test_training_draws_as_peft_does(tmp_path: Path) -> None:
    """Its shares are drawn for each row of each call."""
    losses: list[list[float]] = []
    for model in both(tmp_path):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(6):
            loss = model.train()(**batch(), labels=tokens(3, 4, seed=1)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert_close(losses[0], losses[1])
    assert losses[0][-1] < losses[0][0]


def test_beams_are_of_the_task_of_their_row(tmp_path: Path) -> None:
    """PEFT raises: it has one task for several rows."""
    ours, theirs = both(tmp_path)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    together = ours.generate(**batch(), **options)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in batch().items()}
        alone = ours.generate(**one, **options)[0]
        assert torch.equal(together[row, : len(alone)], alone)
    with pytest.raises(RuntimeError):
        theirs.generate(**batch(), **options)


def test_a_row_is_served_as_if_it_were_alone() -> None:
    model = made()
    model.add_adapter("other", nbpeft.PolyConfig(**{**FIELDS, **TARGETS, "n_splits": 1}, init_weights=False))
    model.add_adapter("plain", nbpeft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.eval()
    names = ["default", "other", "plain", "__base__", "default"]
    rows = batch(5)
    found = model(**rows, adapter_names=names).logits
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in rows.items()}
        with model.disable_adapter() if name == "__base__" else model.use(name):
            assert_close(found[row], model(**one).logits[0])
    model.base_model.set_adapter(["default", "other"])
    assert (model(**rows).logits - found).abs().amax((1, 2)).min() > 1e-4


def test_tasks_that_do_not_fit_are_refused() -> None:
    model = made()
    ids = tokens(2, 6)
    expected = model(input_ids=ids, task_ids=torch.tensor([0, 2])).logits
    for given, words in (
        (None, "task_ids cannot be None"),
        ([0, 1], "task_ids cannot be None"),
        (torch.tensor([0, 3]), r"from 0 to 2, not \[0, 3\]"),
        (torch.tensor([-1, 0]), r"from 0 to 2, not \[-1, 0\]"),
        (torch.tensor([0.0, 1.0]), "must be one number for each row"),
        (torch.tensor([True, False]), "must be one number for each row"),
        (torch.tensor([[0], [1]]), "must be one number for each row"),
        (torch.tensor([0, 1, 2]), r"has 3 rows, but the input of a layer .* has shape \(2, 6, 32\)"),
    ):
        with pytest.raises(AdapterError, match=words):
            model(input_ids=ids, task_ids=given)
    found = model(input_ids=ids, task_ids=torch.tensor([0, 2], dtype=torch.uint8)).logits
    assert torch.equal(found, expected)
    with pytest.raises(MergeError, match="mixes its skills by the task of each row"):
        model.merge_and_unload()
    with pytest.raises(ConversionError, match="mixes its skills by the task of each row"):
        nbpeft.convert_to_lora(model, 2)
    with pytest.raises(ConfigError, match="n_splits = 3 must divide its 32 inputs"):
        get_peft_model(llama(), nbpeft.PolyConfig(**{**FIELDS, **TARGETS, "n_splits": 3}))


def test_one_task_needs_no_number() -> None:
    model = get_peft_model(llama(), nbpeft.PolyConfig(r=2, **TARGETS))
    randomize(model, scale=0.4)
    model.eval()
    assert torch.equal(model(input_ids=tokens()).logits, logits(model))
    given = torch.zeros(2, dtype=torch.long)
    assert_close(model(input_ids=tokens(), task_ids=given).logits, logits(model))
    config, state = nbpeft.convert_to_lora(model, 2)  # no less than the mixture
    lora = get_peft_model(llama(), config).eval()
    nbpeft.set_peft_model_state_dict(lora, state)
    assert_close(logits(lora), logits(model))
    drawn = []
    for tasks in ({}, {"task_ids": given}):
        torch.manual_seed(0)
        drawn.append(model.train()(input_ids=tokens(), **tasks).logits)
    assert torch.equal(*drawn) and differ(drawn[0], logits(model.eval()))


def test_the_router_is_the_module_that_peft_has(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    routers = [
        model.base_model.model.encoder.block[0].layer[0].SelfAttention.q.poly_router["default"]
        for model in (ours, theirs)
    ]
    ids = torch.tensor([2, 0])
    assert_close(routers[0](ids, None), routers[1](ids, None))
    assert_close(routers[0].module_logits, routers[1].module_logits)
    with torch.no_grad():
        routers[0].module_logits.zero_()
    assert torch.equal(routers[0](ids, None), torch.full((2, 2, 4), 0.25))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same_call_again(reentrant: bool) -> None:
    found = []
    for settings in (None, {"use_reentrant": reentrant}):
        model = made().train()
        if settings is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(settings)
        torch.manual_seed(2)
        model(**batch(), labels=tokens(3, 6)).loss.backward()
        found.append([one.grad for one in model.parameters() if one.grad is not None])
    assert len(found[0]) == len(found[1]) == 18
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected)


def test_layers_whose_input_has_other_rows_are_named() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(0, 1)).view_as(x)

    model = get_peft_model(Flat(), nbpeft.PolyConfig(n_tasks=2, target_modules=["inner"], init_weights=False)).eval()
    with pytest.raises(AdapterError, match=r"has 2 rows, but the input of a layer .* has shape \(6, 4\)"):
        model(torch.ones(2, 3, 4), task_ids=torch.tensor([0, 1]))
    assert model(torch.ones(2, 1, 4), task_ids=torch.tensor([0, 1])).shape == (2, 1, 4)


def test_a_forecast_knows_the_tasks() -> None:
    config = nbpeft.PolyConfig(**FIELDS, **TARGETS)
    model = get_peft_model(llama(), config)
    parts = {part.name: part for part in forecast(llama(), config, batch_size=2, max_length=8).parts}
    assert parts["adapters"].byte_count == 4 * model.get_nb_trainable_parameters()[0]
