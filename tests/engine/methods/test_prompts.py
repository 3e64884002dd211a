"""Learned prompts: equal to peft where it is right, in every kind of model, call and batch, and as any adapter."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import nbpeft
from nbpeft.engine.calls.model_properties import cache_argument
from nbpeft.engine.config.prompt_config import PromptLearningConfig
from nbpeft.engine.contract.registry import Method, methods
from nbpeft.engine.runtime.snapshots import restore, snapshot
from nbpeft.errors import AdapterError, ConfigError, MergeError, NbpeftError
from nbpeft.model import PeftModel, get_peft_model
from nbpeft.model.handle.serving import blended
from tests.closeness import assert_close
from tests.fuzz import mutations
from tests.tiny_models import LLAMA, classifier, config, gpt2, llama, logits, randomize, same_state, state, tokens

METHODS = [method for method in methods() if issubclass(method.config_class, PromptLearningConfig)]
SAMPLES = [
    pytest.param(method, dict(fields), id=f"{method.peft_type.lower()}-{name}")
    for method in METHODS
    for name, fields in method.sample_configs.items()
]
FIRST = [next(sample for sample in SAMPLES if sample.values[0] is method) for method in METHODS]
every_sample = pytest.mark.parametrize(("method", "fields"), SAMPLES)
every_method = pytest.mark.parametrize(("method", "fields"), FIRST)
pytestmark = pytest.mark.filterwarnings("ignore")
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """A cache as an argument of a model: its name differs between versions of transformers."""
    return {cache_argument(model.get_base_model()): cache}


def t5() -> Any:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    made = T5Config(**sizes, initializer_factor=3.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=96)
    return seeded(lambda: T5ForConditionalGeneration(made))


def lively() -> Any:
    """A model that does not say the same whatever it reads."""
    return llama(initializer_range=0.3)


def lively_gpt2() -> Any:
    return gpt2(initializer_range=0.3, tie_word_embeddings=False)


def bart() -> Any:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    made = BartConfig(vocab_size=97, d_model=32, init_std=0.3, **sizes, **heads, **special, forced_eos_token_id=None)
    return seeded(lambda: BartForConditionalGeneration(made))


def made(method: Method, fields: dict[str, Any], task: str | None = "CAUSAL_LM", **more: Any) -> Any:
    return method.config_class(**fields, task_type=task, **more)


def of_peft(config: Any) -> Any:
    fields = {key: value for key, value in config.to_dict().items() if key != "peft_version"}
    return peft.get_peft_config(fields)


def pair(method: Method, fields: dict[str, Any], base: Callable[[], Any] = llama, **more: Any) -> tuple[PeftModel, Any]:
    """The same new prompt in both libraries: drawn in the same order from the same seed."""
    settings = made(method, fields, **more)
    torch.manual_seed(1)
    ours = get_peft_model(base(), settings)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base(), of_peft(settings))
    return ours.eval(), theirs.eval()


def tasks(method: Method, rows: int = 2) -> dict[str, Tensor]:
    return {"task_ids": torch.arange(rows) % 2} if "task_ids" in method.calls.arguments else {}


def prompted(name: str = "default", base: Any = None, **fields: Any) -> PeftModel:
    """A model with a prompt that changes what it gives."""
    settings = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(lively() if base is None else base, nbpeft.get_peft_config(settings), name)
    randomize(model, name, scale=0.5)
    return model.eval()


@torch.no_grad()
def greedy(model: Any, ids: Tensor, count: int = 5, **more: Any) -> Tensor:
    """What generate has to give: the whole sequence through forward for each new token."""
    for _ in range(count):
        last = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[:, -1]
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    return ids


GENERATE: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


# Equal to peft


@pytest.mark.drawn(12)
@every_sample
@pytest.mark.parametrize("base", [llama, gpt2], ids=["llama", "gpt2"])
def test_forward_counts_and_files_are_those_of_peft(
    method: Method, fields: dict[str, Any], base: Callable[[], Any], tmp_path: Path
) -> None:
    ours, theirs = pair(method, fields, base)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ids = tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, **tasks(method)}
    expected, found = theirs(**inputs), ours(**inputs)
    assert_close(found.logits, expected.logits)
    assert_close(float(found.loss), float(expected.loss))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    saved, theirs_saved = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert theirs_saved.keys() <= saved.keys()
    for key, value in theirs_saved.items():
        assert_close(saved[key], value)
    read = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert_close(read(**inputs).logits, expected.logits)
    for folder in ("ours", "theirs"):
        for trainable in (False, True):
            again = PeftModel.from_pretrained(base(), tmp_path / folder, is_trainable=trainable).eval()
            assert_close(again(**inputs).logits, expected.logits)
            assert any(parameter.requires_grad for parameter in again.parameters()) == trainable


def trained(model: Any, more: dict[str, Tensor], steps: int = 8) -> list[float]:
    ids, losses = tokens(), []
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **more).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@every_sample
def test_eight_steps_of_training_are_those_of_peft(method: Method, fields: dict[str, Any]) -> None:
    ours, theirs = pair(method, fields)
    expected = trained(theirs, tasks(method))
    assert_close(trained(ours, tasks(method)), expected)
    assert expected[-1] < expected[0] - 1e-3
    assert all(p.grad is None for p in ours.get_base_model().parameters() if not p.requires_grad)


@pytest.mark.drawn(5)
@pytest.mark.parametrize(("method", "fields"), [sample for sample in FIRST if sample.values[0].peft_type != "CPT"])
@pytest.mark.parametrize("base", [t5, bart], ids=["t5", "bart"])
def test_encoder_decoder_models_are_as_in_peft(method: Method, fields: dict[str, Any], base: Any) -> None:
    ours, theirs = pair(method, fields, base, task="SEQ_2_SEQ_LM")
    ids, labels = tokens(), tokens(2, 6, seed=5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **tasks(method)}
    expected, found = theirs(**inputs), ours(**inputs)
    assert_close(found.logits, expected.logits)
    assert_close(float(found.loss), float(expected.loss))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    randomize(ours, scale=0.5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | tasks(method)
    made = ours.generate(**batch, **GENERATE)
    if not tasks(method):  # whose decoder has tokens in forward alone, as in PEFT
        with torch.no_grad():
            logits = ours(**batch, decoder_input_ids=made[:, :-1]).logits
        assert torch.equal(logits.argmax(-1)[:, -4:], made[:, 2:][:, -4:])
    assert torch.equal(ours.generate(**batch, **GENERATE, use_cache=False), made)
    with ours.disable_adapter():
        assert not torch.equal(ours.generate(**{k: v for k, v in batch.items() if k != "task_ids"}, **GENERATE), made)


def bert() -> Any:
    return seeded(lambda: BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=64, num_labels=3)))


def bert_tokens() -> Any:
    return seeded(lambda: BertForTokenClassification(BertConfig(**SIZES, intermediate_size=64, num_labels=3)))


def of_llama(cls: Any) -> Callable[[], Any]:
    return lambda: seeded(lambda: cls(LlamaConfig(**LLAMA, pad_token_id=0, num_labels=3)))


OTHER_TASKS = {
    "SEQ_CLS": (classifier, {"labels": torch.tensor([0, 2])}),
    "SEQ_CLS bert": (bert, {"labels": torch.tensor([0, 2]), "token_type_ids": torch.zeros(2, 9, dtype=torch.long)}),
    "TOKEN_CLS": (of_llama(LlamaForTokenClassification), {}),
    "TOKEN_CLS bert": (bert_tokens, {}),
    "QUESTION_ANS": (
        of_llama(LlamaForQuestionAnswering),
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    ),
    "FEATURE_EXTRACTION": (of_llama(LlamaModel), {}),
}


@pytest.mark.drawn(6)
@pytest.mark.parametrize("task", OTHER_TASKS)
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_other_tasks_are_as_in_peft(task: str, kind: str, tmp_path: Path) -> None:
    base, more = OTHER_TASKS[task]
    method = next(one for one in METHODS if one.peft_type == kind)
    ours, theirs = pair(method, {"num_virtual_tokens": 4}, base, task=task.split()[0])
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens()), **more}
    expected, found = theirs(**inputs), ours(**inputs)
    for key in ("logits", "start_logits", "last_hidden_state", "loss"):
        if getattr(expected, key, None) is not None:
            assert_close(getattr(found, key), getattr(expected, key))
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(base(), tmp_path / "theirs").eval()
    assert_close(again(**inputs)[-1 if "hidden" in task else 0], found[0])
    ours.save_pretrained(tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert_close(read(**inputs)[0], found[0])


@pytest.mark.parametrize("base", [of_llama(LlamaForTokenClassification), bert_tokens], ids=["llama", "bert"])
def test_labels_of_tokens_are_ignored_for_the_prompt(base: Callable[[], Any]) -> None:
    """PEFT raises there: it leaves the labels shorter than the logits."""
    model = prompted(base=base(), task_type="TOKEN_CLS")
    ids, labels = tokens(), tokens() % 3
    found = model(input_ids=ids, labels=labels)
    assert found.logits.shape[1] == 13
    expected = torch.nn.functional.cross_entropy(found.logits[:, 4:].reshape(-1, 3), labels.reshape(-1))
    assert_close(found.loss, expected)


def test_labels_of_a_classifier_with_a_name_of_its_own_are_as_they_are() -> None:
    base = classifier(problem_type="multi_label_classification")
    base.__class__ = type("OwnName", (type(base),), {})
    labels = torch.eye(3)[:2]
    found = prompted(base=base, task_type="SEQ_CLS")(input_ids=tokens(length=3), labels=labels)
    assert_close(found.loss, torch.nn.functional.binary_cross_entropy_with_logits(found.logits, labels))


@pytest.mark.parametrize("base", [classifier, of_llama(LlamaModel)], ids=["classifier", "features"])
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
def test_a_prefix_of_other_models(base: Callable[[], Any], projected: bool, tmp_path: Path) -> None:
    model = prompted(base=base(), peft_type="PREFIX_TUNING", task_type=None, prefix_projection=projected)
    ids = tokens()
    with model.disable_adapter():
        before = model(input_ids=ids)[0]
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    assert found.shape == before.shape and (found - before).abs().max() > 1e-3
    # The prefix is what a cache holds of tokens that were there before.
    cache = model.get_prompt(2)
    with model.disable_adapter():
        expected = model(input_ids=ids, attention_mask=torch.ones(2, 13), **cached(model, cache))[0]
    assert_close(found, expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert_close(again(input_ids=ids)[0], found)


# In generate


@pytest.mark.drawn(6)
@every_method
@pytest.mark.parametrize("base", [lively, lively_gpt2], ids=["llama", "gpt2"])
@torch.no_grad()
def test_generate_gives_what_forward_gives(method: Method, fields: dict[str, Any], base: Callable[[], Any]) -> None:
    model = get_peft_model(base(), made(method, fields)).eval()
    randomize(model, scale=0.5)
    ids, more = tokens(), tasks(method)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    expected = greedy(model, ids, **more)
    with model.disable_adapter():
        assert not torch.equal(greedy(model, ids), expected)
    for use_cache in (True, False):
        assert torch.equal(model.generate(**inputs, **GENERATE, use_cache=use_cache), expected)
    assert torch.equal(model.generate(input_ids=ids, **GENERATE, **more), expected)
    embeds = model.word_embeddings(ids)
    made_of = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **GENERATE, **more)
    assert torch.equal(made_of, expected[:, 9:])
    beams: list[Any] = [
        model.generate(**inputs, **GENERATE | {"num_beams": 3, "use_cache": cache}) for cache in (True, False)
    ]
    assert torch.equal(*beams)
    torch.manual_seed(0)
    assert model.generate(**inputs, **GENERATE | {"do_sample": True}).shape == (2, 14)


@every_method
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(method: Method, fields: dict[str, Any]) -> None:
    model = get_peft_model(lively(), made(method, fields)).eval()
    randomize(model, scale=0.5)
    short, long = tokens(1, 5), tokens(1, 9)
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), long])
    mask = (torch.arange(9) >= torch.tensor([[4], [0]])).long()
    found = model.generate(input_ids=ids, attention_mask=mask, **GENERATE, **tasks(method))
    for row, alone in enumerate((short, long)):
        task = {key: value[row : row + 1] for key, value in tasks(method).items()}
        assert torch.equal(found[row, 9:], greedy(model, alone, **task)[0, alone.shape[1] :])


@torch.no_grad()
def test_a_static_cache_is_refused_in_one_line() -> None:
    model = prompted()
    with pytest.raises(AdapterError, match="not that of a static cache: omit cache_implementation"):
        model.generate(input_ids=tokens(), **GENERATE, cache_implementation="static")


# Mixed batches, several at once


def several() -> PeftModel:
    model = prompted("p4")
    model.add_adapter("p2", nbpeft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.add_adapter("prefix", nbpeft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.add_adapter("mlp", nbpeft.PromptEncoderConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    model.add_adapter("lora", config())
    for seed, name in enumerate(model.peft_config):
        randomize(model, name, seed=seed, scale=0.5)
    return model.eval()


@torch.no_grad()
def test_each_row_of_a_mixed_batch_is_as_alone() -> None:
    model, ids = several(), tokens(6)
    names = ["p4", "prefix", "__base__", "lora", "p2", "mlp"]
    found = model(input_ids=ids, adapter_names=names).logits
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **GENERATE)
    beams = model.generate(input_ids=ids, adapter_names=names, **GENERATE | {"num_beams": 2})
    for row, name in enumerate(names):
        one = ids[row : row + 1]
        with model.disable_adapter() if name == "__base__" else model.use(name):
            alone = model(input_ids=one).logits[0, -9:]
            assert_close(found[row, -9:], alone)
            assert torch.equal(made[row], greedy(model, one)[0]), name
            assert torch.equal(beams[row], model.generate(input_ids=one, **GENERATE | {"num_beams": 2})[0]), name


@torch.no_grad()
def test_two_prompts_and_a_lora_act_together() -> None:
    model, ids = several(), tokens()
    model.set_adapter(["p2", "p4", "prefix", "lora"])
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert found.logits.shape[1] == 9 + 6
    rows: list[Any] = [model.prompt_encoder[name].embedding.weight for name in ("p2", "p4")]
    embeds = torch.cat(rows)
    whole = torch.cat([embeds.expand(2, -1, -1), model.word_embeddings(ids)], 1)
    with model.use("prefix"):
        cache = model.get_prompt(2)
    with model.use("lora"):
        expected = model(inputs_embeds=whole, **cached(model, cache)).logits
    assert_close(found.logits, expected)
    assert torch.equal(model.generate(input_ids=ids, **GENERATE), greedy(model, ids))


@torch.no_grad()
def test_rows_of_several_tasks() -> None:
    model = prompted(peft_type="MULTITASK_PROMPT_TUNING", num_tasks=3, num_ranks=2)
    ids, kinds = tokens(3), torch.tensor([2, 0, 1])
    found = model(input_ids=ids, task_ids=kinds).logits
    for row, kind in enumerate(kinds):
        alone = model(input_ids=ids[row : row + 1], task_ids=kind.unsqueeze(0)).logits
        assert_close(found[row], alone[0])
    with pytest.raises(AdapterError, match="task_ids cannot be None"):
        model(input_ids=ids)
    with pytest.raises(AdapterError, match="from 0 to 2"):
        model(input_ids=ids, task_ids=torch.tensor([0, 1, 3]))
    with pytest.raises(AdapterError, match="2 entries for 3 rows"):
        model(input_ids=ids, task_ids=torch.tensor([0, 1]))
    assert torch.equal(model(input_ids=ids, task_ids=kinds).logits, found)


# As any adapter


def test_positions_that_are_given_move() -> None:
    model, ids = prompted(), tokens()
    positions = torch.arange(9).expand(2, 9)
    expected = model(input_ids=ids).logits
    assert_close(model(input_ids=ids, position_ids=positions).logits, expected)
    assert_close(model.base_model(ids, None, positions).logits, expected)  # by place, without the handle
    later = model(input_ids=ids, position_ids=positions + 3).logits
    assert (later - expected).abs().max() > 1e-4


def test_it_leaves_nothing_behind() -> None:
    base = llama()
    before, expected = state(base), base(tokens()).logits
    model = prompted(base=base)
    model.add_adapter("prefix", nbpeft.PrefixTuningConfig(num_virtual_tokens=3))
    assert (model(input_ids=tokens()).logits[:, 4:] - expected).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens()).logits, expected)
    model.delete_adapter("default")
    assert model.active_adapter == "prefix" and model(input_ids=tokens()).logits.shape == expected.shape
    plain = model.unload()
    assert plain is base and same_state(state(base), before) and torch.equal(base(tokens()).logits, expected)
    assert not base._forward_pre_hooks and not base.model._forward_pre_hooks


def test_a_failing_add_leaves_the_model_as_it_was() -> None:
    base = gpt2()
    before = state(base)
    for wrong, line in (
        ({"token_dim": 31}, "token_dim is 31, but the tokens of the model have 32 features"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens must be a whole number"),
        ({"modules_to_save": ["nothing"]}, "nothing"),
    ):
        with pytest.raises(NbpeftError, match=line):
            prompted(base=base, **wrong)
        assert same_state(state(base), before) and not base._forward_pre_hooks and not hasattr(base, "peft_config")


def test_a_failing_call_leaves_the_model_as_it_was() -> None:
    model = prompted()
    expected = model(input_ids=tokens()).logits
    with pytest.raises(ValueError, match="one of input_ids or inputs_embeds"):
        model(input_ids=None)
    with pytest.raises(IndexError):
        model(input_ids=tokens() + 1000)
    assert torch.equal(model(input_ids=tokens()).logits, expected)


def test_what_makes_no_sense_is_refused_in_one_line(tmp_path: Path) -> None:
    model = several()
    model.set_adapter("p4")
    with pytest.raises(MergeError, match="cannot be merged into the weights: it inserts trained tokens before"):
        model.merge_and_unload()
    with pytest.raises(NbpeftError, match="cannot be combined"):
        model.add_weighted_adapter(["p4", "p4"], [1.0, 1.0], "both")
    model.save_pretrained(tmp_path, selected_adapters=["p4"])
    with pytest.raises(NbpeftError, match="load the other one under another name"):
        nbpeft.hotswap_adapter(model, tmp_path / "p4", "p4")
    with pytest.raises(AdapterError, match=r"cannot have a scale of 0\.5, only 1: it is a prompt"):
        model.manager.set_scale("p4", 0.5)
    with blended(model.manager, {"p4": 0.5, "lora": 0.5}), pytest.raises(AdapterError, match=r"scale of 0\.5"):
        model(input_ids=tokens())
    pool = nbpeft.AdapterPool(model, 10.0)
    with pytest.raises(NbpeftError, match="changes the model's calls"):
        pool.register("stored", tmp_path / "p4")
        pool.load("stored")


def test_gradient_checkpointing() -> None:
    """Of a prompt it changes nothing; a prefix is in a cache, which it leaves out."""
    ids, grads = tokens(), []
    for checkpointing in (False, True):
        model = prompted()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        grads.append(model.prompt_encoder["default"].embedding.weight.grad)
    assert_close(*grads)
    with pytest.raises(ConfigError, match="does not work with gradient checkpointing"):
        prompted("prefix", model.unload(), peft_type="PREFIX_TUNING")
    model = prompted(peft_type="PREFIX_TUNING")
    model.gradient_checkpointing_enable()
    with pytest.raises(AdapterError, match="does not work with gradient checkpointing"):
        model.train()(input_ids=ids, labels=ids)


@every_sample
def test_copies_of_the_model_are_its_own(method: Method, fields: dict[str, Any]) -> None:
    model = get_peft_model(llama(), made(method, fields)).eval()
    randomize(model, scale=0.5)
    inputs = {"input_ids": tokens(), **tasks(method)}
    expected = model(**inputs).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs).logits, expected)
        randomize(twin, seed=5)
        assert not torch.equal(twin(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)
    kept = snapshot(model.manager, "default")
    model.add_adapter("other", config())
    model.delete_adapter("default")
    restore(model.manager, kept)
    model.set_adapter("default")
    assert torch.equal(model(**inputs).logits, expected)
    model.manager.copy("default", "second")
    model.set_adapter("second")
    assert torch.equal(model(**inputs).logits, expected)


@every_sample
def test_training_goes_on_from_a_file(method: Method, fields: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(llama(), made(method, fields))
    trained(model, tasks(method), 2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert_close(trained(again, tasks(method), 2), trained(model, tasks(method), 2))


def test_threads_have_their_own_prompts() -> None:
    model, ids = several(), tokens()
    expected = {}
    for name in ("p4", "p2"):
        with model.use(name), torch.no_grad():
            expected[name] = model(input_ids=ids).logits
    wrong: list[str] = []
    start = threading.Barrier(2)

    def run(name: str) -> None:
        start.wait()
        with model.use(name), torch.no_grad():
            wrong.extend(name for _ in range(10) if not torch.equal(model(input_ids=ids).logits, expected[name]))

    threads = [threading.Thread(target=run, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_names_that_users_of_peft_reach_for() -> None:
    model = prompted()
    assert model.active_peft_config.is_prompt_learning and model.peft_type == "PROMPT_TUNING"
    assert model.prompt_tokens["default"].tolist() == [0, 1, 2, 3]
    encoder = model.prompt_encoder["default"]
    assert isinstance(encoder, nbpeft.PromptEmbedding) and encoder.embedding.weight.shape == (4, 32)
    saved = model.get_prompt_embedding_to_save("default")
    assert torch.equal(saved, encoder.embedding.weight) and not saved.requires_grad
    assert model.get_prompt(3).shape == (3, 4, 32) and model.word_embeddings(tokens()).shape == (2, 9, 32)
    found = nbpeft.get_peft_model_state_dict(model)
    assert set(found) == {"prompt_embeddings"}
    other = {key: torch.ones_like(value) for key, value in found.items()}
    assert nbpeft.set_peft_model_state_dict(model, other).missing_keys == []
    assert torch.equal(encoder.embedding.weight, other["prompt_embeddings"])
    prefix = prompted(peft_type="PREFIX_TUNING")
    assert prefix.get_prompt(2).get_seq_length() == 4
    lora = get_peft_model(llama(), config())
    assert not hasattr(lora, "prompt_encoder") and not lora.active_peft_config.is_prompt_learning
    with pytest.raises(AdapterError, match="is not of a prompt method"):
        lora.get_prompt(1)


@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_multitask_prompt_starts_from_a_file(init: str, tmp_path: Path) -> None:
    prompted(peft_type="MULTITASK_PROMPT_TUNING", num_tasks=3, num_ranks=2).save_pretrained(tmp_path)
    source = tmp_path / "adapter_model.safetensors"
    method = next(one for one in METHODS if tasks(one))
    start = {"prompt_tuning_init": init, "prompt_tuning_init_task": 1, "num_ranks": 2, "num_virtual_tokens": 4}
    ours, theirs = pair(method, start, prompt_tuning_init_state_dict_path=str(source))
    inputs = {"input_ids": tokens(), "task_ids": torch.zeros(2, dtype=torch.long)}
    assert_close(ours(**inputs).logits, theirs(**inputs).logits)
    with pytest.raises(ConfigError, match="needs to be specified with prompt_tuning_init"):
        method.config_class(**start)
    with pytest.raises(NbpeftError, match="there is no file"):
        get_peft_model(llama(), method.config_class(**start, prompt_tuning_init_state_dict_path="nowhere"))


@pytest.mark.slow
@every_method
def test_mutated_folders(
    method: Method, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is right or refused in one line, and the model stays as it was."""
    monkeypatch.setattr(mutations, "FIELDS", tuple(one.name for one in dataclasses.fields(method.config_class)))
    get_peft_model(llama(), made(method, fields)).save_pretrained(tmp_path / "start")
    model = get_peft_model(llama(), nbpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    before, right = state(model), 0
    for seed in range(50):
        folder = tmp_path / f"f{seed}"
        done = mutations.mutated(tmp_path / "start", folder, random.Random(seed))
        try:
            model.load_adapter(str(folder), "new")
            model.set_adapter("new")
            with torch.no_grad():
                model(input_ids=tokens(), **tasks(method))
            right += 1
        except NbpeftError as error:
            assert len(str(error)) <= 520 and "\n" not in str(error), (seed, done, str(error))
        except Exception as error:
            raise AssertionError(f"seed {seed}, {done}") from error
        finally:
            if "new" in model.peft_config:
                model.set_adapter("default")
                model.delete_adapter("new")
        assert same_state(state(model), before), (seed, done)
    assert right >= 5


@every_method
def test_every_field_has_its_type_and_none_is_refused_in_one_line(method: Method, fields: dict[str, Any]) -> None:
    values: tuple[Any, ...] = (None, -1, "no", 1.5, float("nan"), True, [], {}, [1], "\n")
    base = llama()
    for name in [one.name for one in dataclasses.fields(method.config_class)]:
        for value in values:
            try:
                base = get_peft_model(base, method.config_class(**fields | {name: value})).unload()
            except NbpeftError as error:
                assert "\n" not in str(error) and len(str(error)) <= 520, (name, value, str(error))


def tokenizer_in(folder: Path) -> None:
    words = {word: number for number, word in enumerate(["<unk>", *"abcdefgh"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder)


@pytest.mark.parametrize("text", ["a b c", "a b c d e f g h"], ids=["repeated", "cut"])
def test_a_prompt_starts_as_a_text(text: str, tmp_path: Path) -> None:
    tokenizer_in(tmp_path / "tokenizer")
    start = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text, "num_virtual_tokens": 5}
    start["tokenizer_name_or_path"] = str(tmp_path / "tokenizer")
    start["tokenizer_kwargs"] = {"padding_side": "left", "trust_remote_code": True}
    method = next(one for one in METHODS if one.peft_type == "PROMPT_TUNING")
    ours, theirs = pair(method, start)
    rows = ours.prompt_encoder["default"].embedding.weight
    assert_close(rows, theirs.prompt_encoder["default"].embedding.weight)
    assert torch.equal(rows[:3], ours.word_embeddings(torch.tensor([1, 2, 3])))
    ours.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "tokenizer")  # loading needs none
    again = PeftModel.from_pretrained(llama(), tmp_path / "saved", is_trainable=True)
    assert torch.equal(again.prompt_encoder["default"].embedding.weight, rows)
    for missing in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
        with pytest.raises(ConfigError, match=f"{missing} can't be None"):
            nbpeft.PromptTuningConfig(**start | {missing: None})
    with pytest.raises(ConfigError, match="tokenizer_kwargs only valid"):
        nbpeft.PromptTuningConfig(num_virtual_tokens=4, tokenizer_kwargs={"use_fast": True})


@pytest.mark.filterwarnings("ignore")
def test_a_prefix_passes_over_layers_that_share_a_cache(tmp_path: Path) -> None:
    gemma4 = pytest.importorskip("transformers.models.gemma4")

    def base() -> Any:
        torch.manual_seed(0)
        kinds = ["sliding_attention", "full_attention"] * 2
        config = gemma4.Gemma4TextConfig(
            **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4},
            **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "global_head_dim": 8},
            **{"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97},
            **{"layer_types": kinds, "pad_token_id": 0},
        )
        return gemma4.Gemma4ForCausalLM(config).eval()

    config = nbpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ours = get_peft_model(base(), config)
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    found = logits(ours.eval())
    assert (found - logits(base())).abs().max() > 1e-4
    assert_close(found, logits(theirs))


def listed(model: Any) -> list[tuple[str, bool]]:
    return [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]


@every_sample
def test_the_tree_is_that_of_peft(method: Method, fields: dict[str, Any]) -> None:
    ours, theirs = pair(method, fields)
    assert listed(ours) == listed(theirs)
    assert type(ours.base_model) is type(theirs.base_model)
    assert ours.get_parameter("base_model.model.embed_tokens.weight") is ours.word_embeddings.weight
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()][:2]
    # PEFT has the embedding under a second name.
    assert list(ours.state_dict()) == [key for key in theirs.state_dict() if key != "word_embeddings.weight"]


@every_sample
def test_states_of_whole_models_go_both_ways(method: Method, fields: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(method, fields)
    changed = {key: value + 0.5 for key, value in theirs.state_dict().items()}
    ours.load_state_dict(changed)
    assert all(torch.equal(value, changed[key]) for key, value in ours.state_dict().items())
    again = pair(method, fields)[0]
    assert nbpeft.set_peft_model_state_dict(again, ours.state_dict()) == ([], [])
    ours.save_pretrained(tmp_path / "own")
    again.save_pretrained(tmp_path / "read")
    pair(method, fields)[0].save_pretrained(tmp_path / "given", state_dict=ours.state_dict())
    own, *others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "read", "given"))
    assert all(same_state(own, other) for other in others)
    with pytest.raises(RuntimeError, match="embed_tokens"):
        ours.load_state_dict({key: value for key, value in changed.items() if "embed_tokens" not in key})


def test_the_tree_follows_the_adapters() -> None:
    model = prompted()
    model.add_adapter("second", nbpeft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    names = [f"prompt_encoder.{name}.embedding.weight" for name in ("default", "second")]
    assert [name for name, _ in model.named_parameters()][-2:] == names
    model.delete_adapter("default")
    assert [name for name, _ in model.named_parameters()][-1:] == names[1:]
    model.add_adapter("factors", nbpeft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    both = {name for name, _ in model.named_parameters() if "lora" in name or "prompt" in name}
    assert {name.removeprefix("base_model.model.") for name in both} >= {
        "embed_tokens.prompt_encoder.second.embedding.weight",
        "embed_tokens.lora_embedding_A.factors",
    }
    ids, copied = tokens(), pickle.loads(pickle.dumps(model))
    assert list(copied.state_dict()) == list(model.state_dict())
    assert torch.equal(copied(ids).logits, model(ids).logits)
    bare = model.unload()
    assert [name for name, _ in bare.named_parameters()] == [name for name, _ in llama().named_parameters()]


def test_a_prompt_beside_other_adapters_stays_where_it_is() -> None:
    model = get_peft_model(llama(), nbpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("words", nbpeft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert type(model.base_model).__name__ == "LoraModel"
    assert "base_model.model.model.embed_tokens.prompt_encoder.words.embedding.weight" in dict(model.named_parameters())


@pytest.mark.parametrize(("method", "fields"), FIRST)
def test_an_embedding_that_is_not_named_is_found_by_its_size(method: Method, fields: dict[str, Any]) -> None:
    def unnamed() -> Any:
        model = llama()
        model.get_input_embeddings = lambda: None
        return model

    model = get_peft_model(unnamed(), made(method, fields)).eval()
    randomize(model)
    assert model.word_embeddings is model.get_base_model().model.embed_tokens
    expected = get_peft_model(llama(), made(method, fields)).eval()
    expected.load_state_dict(model.state_dict())
    more = tasks(method)
    assert torch.equal(model(tokens(), **more).logits, expected(tokens(), **more).logits)
    model = unnamed()
    model.config.vocab_size += 1
    if not method.adapter_class.needs_embedding:  # type: ignore[attr-defined]
        return
    with pytest.raises(NbpeftError, match=r"config\.vocab_size"):
        get_peft_model(model, made(method, fields))


def test_the_vocabulary_of_a_model_of_several_is_that_of_its_language_model() -> None:
    model = llama()
    model.config.text_config = LlamaConfig(vocab_size=model.config.vocab_size, hidden_size=32)
    model.config.vocab_size = -1
    model.get_input_embeddings = lambda: None
    tuned = get_peft_model(model, nbpeft.PromptTuningConfig(num_virtual_tokens=3, num_layers=2, num_attention_heads=4))
    assert tuned.word_embeddings is model.model.embed_tokens


@pytest.mark.parametrize("method", [method for method in METHODS if not method.adapter_class.needs_embedding])  # type: ignore[attr-defined]
def test_a_prefix_needs_no_embedding(method: Method, tmp_path: Path) -> None:
    """It lies on the first layer then, whose own adapters compute as before."""

    def bare() -> Any:
        made = seeded(lambda: LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=64)))
        made.embed_tokens, made.get_input_embeddings = None, lambda: None
        return made

    hidden = torch.randn(2, 5, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0))
    model = get_peft_model(bare(), method.config_class(num_virtual_tokens=3)).eval()
    randomize(model, scale=0.5)
    prefixed = model(inputs_embeds=hidden)[0]
    assert model.word_embeddings is None and not torch.equal(prefixed, bare()(inputs_embeds=hidden)[0])
    model.save_pretrained(tmp_path)
    model.add_adapter("factors", nbpeft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert torch.equal(model(inputs_embeds=hidden)[0], prefixed)
    again = PeftModel.from_pretrained(bare(), tmp_path).eval()
    assert torch.equal(again(inputs_embeds=hidden)[0], prefixed)
    second = PeftModel.from_pretrained(again.get_base_model(), tmp_path).eval()
    assert torch.equal(second(inputs_embeds=hidden)[0], prefixed)
    assert torch.equal(again.unload()(inputs_embeds=hidden)[0], bare()(inputs_embeds=hidden)[0])
