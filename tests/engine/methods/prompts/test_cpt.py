"""Context-aware prompt tuning: what is learned and how much it counts, how far embeddings go, and where PEFT errs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

import nbpeft
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import DEPTH, assert_close
from tests.tiny_models import config, llama, randomize, same_state, state, tokens

FIELDS: dict[str, Any] = {
    "cpt_token_ids": [5, 17, 9, 33, 6, 18, 40, 9],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 0, 8],
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.7,
    "opt_projection_epsilon": 0.4,
    "task_type": "CAUSAL_LM",
}
TYPES = torch.tensor([[1, 2, 2, 3, 4, 0, 5, 7, 8], [1, 1, 2, 3, 4, 4, 0, 0, 0]])
pytestmark = pytest.mark.filterwarnings("ignore")


def cpt(name: str = "default", base: Any = None, **changes: Any) -> PeftModel:
    return get_peft_model(llama() if base is None else base, nbpeft.CPTConfig(**FIELDS | changes), name)


def of_peft(**changes: Any) -> Any:
    return peft.get_peft_model(llama(), peft.CPTConfig(**FIELDS | changes))


def batch() -> dict[str, Tensor]:
    labels = tokens()
    labels[1, 5] = -100
    return {"input_ids": tokens(), "labels": labels, "input_type_mask": TYPES.clone()}


def steps(model: Any, count: int = 6) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=5e-2)
    losses = []
    for _ in range(count):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("kind", ["decay", "none"])
def test_types_of_the_input_train_as_in_peft(kind: str) -> None:
    ours, theirs = cpt(opt_weighted_loss_type=kind), of_peft(opt_weighted_loss_type=kind)
    assert_close(steps(ours), steps(theirs))
    own, other = ours.prompt_encoder["default"], theirs.prompt_encoder["default"]
    assert_close(own.get_projection(), other.get_projection())
    assert_close(own.get_epsilon(), other.get_epsilon())
    norms = own.get_projection().norm(dim=1)
    assert (norms <= own.get_epsilon() * (1 + 1e-6)).all() and (norms[[0, 1, 2, 4, 5]] > 1e-3).all()
    assert not own.delta_embedding.weight[[3, 6, 7]].any()  # outputs, and what is nothing
    assert torch.equal(own.embedding.weight, llama().get_input_embeddings().weight[FIELDS["cpt_token_ids"]])


def test_without_types_the_input_is_learned_and_in_peft_nothing() -> None:
    ours, theirs = cpt(cpt_tokens_type_mask=None), of_peft(cpt_tokens_type_mask=None)
    inputs = {"input_ids": tokens(), "labels": tokens()}
    found = ours(**inputs)
    expected = cross_entropy(found.logits[:, 7:-1].flatten(0, 1), tokens().flatten())
    assert_close(found.loss, expected)
    assert theirs(**inputs).loss.isnan()


def test_the_types_of_the_caller_stay_and_in_peft_change() -> None:
    ours, theirs = batch(), batch()
    cpt()(**ours)
    of_peft()(**theirs)
    assert torch.equal(ours["input_type_mask"], TYPES) and not torch.equal(theirs["input_type_mask"], TYPES)


def test_each_adapter_has_settings_of_its_own() -> None:
    model = cpt("first")
    with pytest.raises(KeyError, match="default"):
        peft.get_peft_model(llama(), peft.CPTConfig(**FIELDS), "first")(**batch())
    model.add_adapter("second", nbpeft.CPTConfig(**FIELDS | {"opt_loss_decay_factor": 0.1}))
    first = model(**batch()).loss
    model.set_adapter("second")
    second = model(**batch()).loss
    assert_close(float(first), float(of_peft()(**batch()).loss))
    assert second < 0.7 * first
    model.set_adapter(["first", "second"])  # side by side: 8 and 8 tokens, each weighed by its own
    found = model(**batch())
    assert found.logits.shape[1] == 25 and float(found.loss.detach()) > 0


def test_rows_of_a_mixed_batch_are_weighed_each_by_its_adapter() -> None:
    model = cpt("cpt").eval()
    model.add_adapter("soft", nbpeft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.add_adapter("lora", config())
    for name in model.peft_config:
        randomize(model, name, scale=0.5)
    names, ids = ["cpt", "soft", "__base__", "lora"], tokens(4)
    types = TYPES.repeat(2, 1)
    whole = model(input_ids=ids, labels=ids, input_type_mask=types, adapter_names=names).loss
    sums, learned = 0.0, 0
    for row, name in enumerate(names):
        one = {"input_ids": ids[row : row + 1], "labels": ids[row : row + 1]}
        # What the examples and the row have of outputs, or the whole row, whose first token nothing predicts alone.
        count = {"cpt": 4, "soft": 9}.get(name, 8)
        with model.disable_adapter() if name == "__base__" else model.use(name):
            alone = model(**one, **({"input_type_mask": types[row : row + 1]} if name == "cpt" else {})).loss
        sums, learned = sums + float(alone) * count, learned + count
    assert_close(float(whole), sums / learned)


def test_what_a_call_returns_has_its_usual_form() -> None:
    model = cpt().eval()
    found = model(**batch())
    assert next(iter(found)) == "loss" and torch.equal(found[0], found.loss)
    loss, logits, *_ = model(**batch(), return_dict=False)
    assert torch.equal(loss, found.loss) and torch.equal(logits, found.logits)
    plain = {key: value for key, value in batch().items() if key == "input_ids"}
    assert model(**plain).loss is None
    with model.disable_adapter():
        assert_close(model(**batch()).loss, llama()(tokens(), labels=batch()["labels"]).loss)
    assert torch.equal(nbpeft.chunked_loss(model, **batch()), found.loss)
    assert_close(model.base_model(**batch()).loss, found.loss)  # without the handle


def test_accumulated_batches_count_by_their_tokens() -> None:
    """PEFT takes the mean of each for itself and adds them up."""
    model, whole = cpt().eval(), batch()
    total = int((whole["labels"][:, 1:] != -100).sum())
    assert float(model(**whole, num_items_in_batch=total).loss) == pytest.approx(float(model(**whole).loss))
    halves = [{key: value[row : row + 1] for key, value in whole.items()} for row in range(2)]
    found = sum(model(**half, num_items_in_batch=total).loss for half in halves)
    shares = [int((half["labels"][:, 1:] != -100).sum()) / total for half in halves]
    expected = sum(share * model(**half).loss for share, half in zip(shares, halves, strict=True))
    assert_close(found, expected)


def test_a_training_takes_the_types_of_its_rows(tmp_path: Path) -> None:
    kinds = [[1, 2, 3, 4], [1, 2, 2, 3, 4, 4]]
    rows: list[dict[str, Any]] = [
        {"input_ids": (ids := tokens(1, len(one))[0].tolist()), "labels": ids, "input_type_mask": one} for one in kinds
    ]
    settings: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 0.1}
    found = {}
    for size, name in ((128, "chunks"), (0, "whole")):
        model = cpt()
        result = nbpeft.train(model, rows, output_dir=str(tmp_path / name), loss_chunk_size=size, **settings)
        found[name] = model.prompt_encoder["default"].delta_embedding.weight
    assert result.steps == 2 and found["whole"].any()
    assert_close(found["chunks"], found["whole"], depth=2 * 3 * DEPTH)  # two steps
    padded, types = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    labels = torch.full((2, 6), -100)
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        padded[place, :length] = labels[place, :length] = torch.tensor(row["input_ids"])
        types[place, :length] = torch.tensor(row["input_type_mask"])
    first = nbpeft.train(
        cpt(), rows, output_dir=str(tmp_path / "one"), **settings | {"max_steps": 1, "logging_steps": 1}
    )
    expected = cpt()(input_ids=padded, attention_mask=(types > 0).long(), labels=labels, input_type_mask=types).loss
    assert_close(first.loss, float(expected))


def test_a_file_has_both_parts_and_one_of_peft_their_sum(tmp_path: Path) -> None:
    ours, theirs = cpt(), of_peft()
    steps(ours, 3)
    steps(theirs, 3)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(llama(), tmp_path / "ours", is_trainable=True)
    assert same_state(state(again.prompt_encoder["default"]), state(ours.prompt_encoder["default"]))
    read = PeftModel.from_pretrained(llama(), tmp_path / "theirs", is_trainable=True).prompt_encoder["default"]
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert torch.equal(read.embedding.weight, tensors["prompt_embeddings"]) and not read.delta_embedding.weight.any()
    assert nbpeft.set_peft_model_state_dict(again, tensors).missing_keys == []
    assert torch.equal(again.prompt_encoder["default"].embedding.weight, tensors["prompt_embeddings"])


def test_it_leaves_nothing_behind() -> None:
    base = llama()
    before = state(base)
    model = cpt(base=base)
    model.add_adapter("other", nbpeft.CPTConfig(**FIELDS))
    assert len(base._forward_hooks) == 1
    model.delete_adapter("other")
    assert model.unload() is base and same_state(state(base), before)
    assert not base._forward_hooks and not base._forward_hooks_with_kwargs and not base._forward_pre_hooks


def test_sizes_of_a_config_are_those_of_the_model_as_in_peft() -> None:
    given: dict[str, Any] = {"num_layers": 7, "token_dim": 9, "num_attention_heads": 3, "num_transformer_submodules": 4}
    fields: dict[str, Any] = {"cpt_token_ids": [1, 2, 3], "task_type": "CAUSAL_LM", "num_virtual_tokens": 8, **given}
    names = [*given, "num_virtual_tokens"]
    found, expected = (library.CPTConfig(**fields) for library in (nbpeft, peft))
    assert [getattr(found, name) for name in names] == [getattr(expected, name) for name in names]
    assert [getattr(found, name) for name in names] == [None, None, None, 1, 3]


@torch.no_grad()
def test_an_evaluation_writes_nothing() -> None:
    model = cpt()
    randomize(model)
    for training in (False, True):
        before = state(model.train(training).prompt_encoder["default"])
        model(**batch())
        assert same_state(state(model.prompt_encoder["default"]), before)


def test_what_makes_no_sense_is_refused_in_one_line() -> None:
    for changes, line in (
        ({"task_type": None}, r"CPTConfig only supports task_type = CAUSAL_LM\."),
        ({"cpt_mask": [1]}, "must have the same length, not 8, 1 and 8"),
        ({"cpt_token_ids": []}, "cpt_token_ids must be the ids of at least one token"),
        ({"cpt_token_ids": [5] * 7 + [97]}, "cpt_token_ids has 97, but the model has 97 tokens"),
        ({"cpt_tokens_type_mask": [1] * 7 + [-3]}, "must be the types of tokens, 0 or more"),
        ({"opt_weighted_loss_type": "decays"}, "Did you mean 'decay'"),
        ({"opt_projection_epsilon": -0.1}, "opt_projection_epsilon must not be negative"),
    ):
        with pytest.raises(ConfigError, match=line):
            cpt(**changes)
    encoding = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1))
    with pytest.raises(ConfigError, match="CPT is for causal language models"):
        cpt(base=encoding)
    with pytest.raises(AdapterError, match=r"input_type_mask must have the shape \(2, 9\), as the input, not \(2, 8\)"):
        cpt()(**batch() | {"input_type_mask": TYPES[:, 1:]})
    with pytest.raises(AdapterError, match="labels must have one entry for each of the 9 tokens"):
        cpt()(**batch() | {"labels": tokens()[:, 1:]})
