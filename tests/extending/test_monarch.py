"""A method of one short file, written with what the guide's page says: the whole product works with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import nbpeft
from nbpeft.errors import ConfigError
from nbpeft.memory import forecast
from nbpeft.session import Session
from tests.closeness import assert_close, differ
from tests.magics.notebook import Notebook
from tests.tiny_models import llama, logits, tokens

FIELDS: dict[str, Any] = {"r": 2, "blocks": 2, "target_modules": ["q_proj", "down_proj"]}
MOST_LINES = 60


@pytest.fixture(autouse=True)
def more(registered: Callable[[str], ModuleType]) -> Any:
    """The module with the method, which is registered for one test."""
    return registered("monarch")


def trained(more: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = nbpeft.get_peft_model(llama(), more.MoreConfig(**{**FIELDS, **fields}))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


def test_it_passes_the_checks_of_methods(more: Any) -> None:
    report = nbpeft.check_method(more.MoreConfig(r=2, blocks=2, target_modules=["q_proj", "down_proj"]))
    report.raise_for_failures()
    assert {check.model for check in report.checks if check.check == "merge" and check.status == "ok"} == {
        "Linear",
        "Linear without bias",
        "LlamaForCausalLM",
    }


def test_it_is_short(more: Any) -> None:
    assert len(Path(more.__file__).read_text("utf-8").splitlines()) <= MOST_LINES


def test_it_trains_is_saved_loaded_scaled_and_merged(more: Any, tmp_path: Path) -> None:
    model = trained(more, dropout=0.1)
    learned = logits(model)
    model.save_pretrained(str(tmp_path))
    loaded = nbpeft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert isinstance(loaded.peft_config["default"], more.MoreConfig)
    assert torch.equal(logits(loaded), learned)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    layer: Any = next(iter(model.manager.layers.values()))
    assert layer.scaling == {"default": 4.0}
    layer.set_scale("default", 0.5)
    assert layer.adapter("default").scaling == 2.0 and not torch.equal(logits(model), learned)
    layer.unscale_layer()
    assert_close(logits(loaded.merge_and_unload()), learned)


def test_another_takes_its_slot(more: Any, tmp_path: Path) -> None:
    trained(more, alpha=2.0).save_pretrained(str(tmp_path))
    model = trained(more)
    nbpeft.hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(logits(model), logits(nbpeft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()))


def test_rows_of_a_batch_may_use_it(more: Any) -> None:
    model = trained(more)
    alone = logits(model)
    model.add_adapter("lora", nbpeft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        mixed = model(input_ids=tokens(), adapter_names=["lora", "default"]).logits
    assert_close(mixed[1], alone[1])
    assert differ(mixed[0], alone[0])


def test_what_it_costs_is_known_before(more: Any) -> None:
    config = more.MoreConfig(**FIELDS)
    model = nbpeft.get_peft_model(llama(), config)
    parts = {part.name: part.byte_count for part in forecast(llama(), config, batch_size=1, max_length=8).parts}
    assert parts["adapters"] == sum(parameter.nbytes for parameter in model.manager.parameters("default"))


def test_it_is_listed_and_described() -> None:
    session, model = Session(), llama()
    row = next(row for row in session.methods(model, FIELDS).rows if row.label == "MoRe")
    assert row.paper == "arXiv:2408.17383"
    assert row.cost is not None and not row.cost.refusal
    added = session.add(model, {"peft_type": "more", **FIELDS}, name="mine").adapter
    assert (added.method, dict(added.summary)) == ("MoRe", {"r": "2 × 2"})
    assert added.parameter_count == row.cost.parameter_count


def test_cells_take_it(notebook: Notebook) -> None:
    notebook.do("%%lora model --method more --name mine\nr = 2\nblocks = 2\ntarget_modules = ['q_proj']")
    assert "MoRe" in str(notebook.do("%lora")) and "r=2 × 2" in str(notebook.do("%lora"))
    assert "MoRe" in str(notebook.do("%lora methods"))
    assert "did you mean 'blocks'" in notebook.run("%%lora model --method more --name k\nblock = 2").line.lower()
    refused = notebook.run("%%lora model --method more --name k\nblocks = 7\ntarget_modules = ['q_proj']").line
    assert "has no 7 equal blocks" in refused


def test_a_layer_that_it_does_not_support_is_refused(more: Any) -> None:
    with pytest.raises(ConfigError, match="has no 2 equal blocks"):
        nbpeft.get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 1)), more.MoreConfig(blocks=2, target_modules=["0"]))
