"""Trainers imported from transformers, or derived from it, with a model of ours."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.utils
import datasets
import peft
import pytest
import torch
import transformers
from accelerate.utils import is_peft_model
from transformers import TrainingArguments
from transformers.trainer import _is_peft_model

import nbpeft
from nbpeft.training import Collator
from nbpeft.training.transformers.trainer_patch import patch_when_used
from tests.closeness import assert_close
from tests.tiny_models import llama
from tests.training.support import token_rows, trainable, weights

METHODS = ("training_step", "_save", "_load_from_checkpoint", "_load_best_model")


@pytest.fixture
def unpatched() -> Iterator[None]:
    """The libraries as they were, for one test."""
    nbpeft.unpatch_trainer()
    yield
    nbpeft.patch_trainer()


def trainer_of(cls: Any, model: Any, folder: Path, rows: Any = None, collator: Any = None, **fields: Any) -> Any:
    options = {key: fields.pop(key) for key in ("model_init", "eval_dataset") if key in fields}
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "report_to": "none", "use_cpu": True}
    common = {"disable_tqdm": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 4}
    arguments = TrainingArguments(str(folder), **(settings | common | fields))
    data = {"train_dataset": rows or token_rows(), "data_collator": collator or Collator(copy_labels=True)}
    return cls(model=model, args=arguments, **data, **options)


class Derived(transformers.Trainer):
    """A Trainer of another library."""

    def __init__(self, model: Any = None, **options: Any) -> None:
        self.seen = type(self).__name__
        super().__init__(model, **options)


@pytest.mark.parametrize("cls", [transformers.Trainer, Derived, nbpeft.Trainer])
def test_checkpoints_hold_adapters_where_weights_are_tied(cls: Any, tmp_path: Path) -> None:
    model = trainable(llama(tie_word_embeddings=True), task_type="CAUSAL_LM")
    trainer = trainer_of(cls, model, tmp_path)
    assert type(trainer) is cls
    trainer.train()
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert "model.safetensors" not in files
    loaded = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "checkpoint-4")
    ids = torch.arange(10)[None]
    assert_close(loaded(ids).logits, model.eval()(ids).logits)


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    through = trainable(llama(), task_type="CAUSAL_LM")
    trainer_of(transformers.Trainer, through, tmp_path / "one").train()
    resumed = trainable(llama(), task_type="CAUSAL_LM")
    trainer_of(transformers.Trainer, resumed, tmp_path / "one").train(
        resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2")
    )
    for name, weight in weights(through).items():
        assert torch.equal(weights(resumed)[name], weight), name


def test_a_replaced_method_is_called_by_the_class_too(tmp_path: Path) -> None:
    trainer = trainer_of(transformers.Trainer, trainable(llama()), tmp_path, save_strategy="no", max_steps=2)
    for method in (transformers.Trainer.train, trainer.train):
        assert method.__name__ == "train"
        assert "resume_from_checkpoint" in inspect.signature(method).parameters
    transformers.Trainer.train(trainer, resume_from_checkpoint=False)
    assert trainer.state.global_step == 2
    with pytest.raises(nbpeft.CheckpointNotFoundError):  # the message of the replacement, and not of transformers
        transformers.Trainer.train(trainer, resume_from_checkpoint=str(tmp_path / "none"))


def test_without_a_task_type_columns_are_kept_and_the_loss_evaluated(tmp_path: Path) -> None:
    trainer = trainer_of(transformers.Trainer, trainable(llama()), tmp_path)
    trainer.train()
    assert trainer.evaluate(token_rows(8))["eval_loss"] > 0
    assert {"input_ids", "position_ids", "labels"} <= set(trainer._signature_columns)


def test_a_base_that_calls_itself_quantized_is_accepted(tmp_path: Path) -> None:
    base = llama()
    base.is_quantized = True
    base.hf_quantizer = type("Quantizer", (), {"is_trainable": True, "is_qat_trainable": False})()
    model = trainable(base)
    before = weights(model)
    trainer_of(transformers.Trainer, model, tmp_path, save_strategy="no").train()
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())


# What a derived Trainer overrides


class Masking(transformers.Trainer):
    """Keeps a column of its own, as the Trainers of TRL do."""

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["input_ids", "labels", "completion_mask"]  # type: ignore[assignment]


class MaskedCollator:
    def __init__(self) -> None:
        self.columns: set[str] = set()
        self.learned: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.columns |= {name for row in rows for name in row}
        batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "completion_mask")}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        self.learned.append(int((labels[:, 1:] != -100).sum()))
        return {"input_ids": batch["input_ids"], "labels": labels}


@pytest.mark.parametrize("library", [nbpeft, peft], ids=["nbpeft", "peft"])
def test_a_derived_trainer_keeps_its_own_columns(library: Any, tmp_path: Path) -> None:
    ids = torch.randint(0, 90, (16, 8), generator=torch.Generator().manual_seed(1)).tolist()
    rows = datasets.Dataset.from_dict(
        {"input_ids": ids, "completion_mask": [[0] * 5 + [1] * 3] * 16, "note": ["x"] * 16}
    )
    model = library.get_peft_model(llama(), library.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    collator = MaskedCollator()
    trainer_of(Masking, model, tmp_path, rows, collator, save_strategy="no", max_steps=2).train()
    assert collator.columns == {"input_ids", "completion_mask"}
    assert set(collator.learned) == {4 * 3}


class Writing(transformers.Trainer):
    """Saves and loads in its own way, and in ours besides."""

    loaded: str = ""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        assert output_dir is not None
        (Path(output_dir) / "mine.txt").write_text("mine")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.loaded = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self.loaded = "best"


@pytest.mark.parametrize("cls", [transformers.Trainer, nbpeft.Trainer])
def test_weights_of_a_new_adapter_decay_as_those_of_peft(cls: Any, tmp_path: Path) -> None:
    made = []
    for library in (peft, nbpeft):
        torch.manual_seed(1)
        config = library.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], lora_bias=True)
        model = library.get_peft_model(llama(), config)
        used = cls if library is nbpeft else transformers.Trainer
        trainer = trainer_of(used, model, tmp_path / library.__name__, weight_decay=0.5)
        groups = trainer.create_optimizer().param_groups
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        made.append([(group["weight_decay"], sorted(names[id(p)] for p in group["params"])) for group in groups])
    assert made[1] == made[0] and len(made[0][0][1]) == 5 and len(made[0][1][1]) == 2


def test_a_derived_trainer_saves_and_loads_in_its_own_way(tmp_path: Path) -> None:
    trainer_of(Writing, trainable(llama()), tmp_path).train()
    folder = tmp_path / "checkpoint-2"
    assert (folder / "mine.txt").read_text() == "mine"
    assert (folder / "adapter_model.safetensors").is_file()
    resumed = trainer_of(Writing, trainable(llama()), tmp_path)
    resumed.train(resume_from_checkpoint=str(folder))
    assert resumed.loaded == str(folder)
    settings = {"eval_dataset": token_rows(4), "eval_strategy": "steps", "eval_steps": 2}
    best = trainer_of(Writing, trainable(llama()), tmp_path / "b", load_best_model_at_end=True, **settings)
    best.train()
    assert best.loaded == "best"


def test_other_models_train_as_ever(tmp_path: Path) -> None:
    trainer_of(transformers.Trainer, llama(), tmp_path / "plain").train()
    assert (tmp_path / "plain" / "checkpoint-2" / "model.safetensors").is_file()
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    trainer_of(transformers.Trainer, theirs, tmp_path / "peft").train()
    trainer_of(transformers.Trainer, theirs, tmp_path / "peft").train(resume_from_checkpoint=True)
    assert (tmp_path / "peft" / "checkpoint-2" / "adapter_model.safetensors").is_file()


# model_init


def test_a_model_that_model_init_makes_is_known(tmp_path: Path) -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(trainable(llama(tie_word_embeddings=True), task_type="CAUSAL_LM"))
        return made[-1]

    trainer = trainer_of(transformers.Trainer, None, tmp_path, model_init=make)
    trainer.train()
    assert trainer.model is made[-1] and trainer.label_names == ["labels"] and trainer.model_accepts_loss_kwargs
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files


def test_a_hyperparameter_search_writes_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Search:
        """Two trials, without the library that chooses them."""

        def ensure_available(self) -> None:
            pass

        def run(self, trainer: Any, trials: int, direction: str) -> Any:
            for number in range(trials):
                trainer.train(trial=SimpleNamespace(number=number, params={}))
            return trials

    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)
    backends: dict[Any, Any] = transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS
    monkeypatch.setitem(backends, "optuna", Search)
    trainer = trainer_of(
        transformers.Trainer, None, tmp_path, model_init=lambda trial: trainable(llama(tie_word_embeddings=True))
    )
    spaces = iter([{"learning_rate": 1e-3}, {"learning_rate": 1e-2}])
    done = trainer.hyperparameter_search(lambda trial: next(spaces), n_trials=2, backend="optuna")
    assert done == 2 and trainer.args.learning_rate == 1e-2
    for number in (0, 1):
        assert (tmp_path / f"run-{number}" / "checkpoint-4" / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.rglob("model.safetensors"))


# Who asks, and taking it back


def test_what_asks_for_models_with_adapters_says_yes_to_ours() -> None:
    ours = trainable(llama())
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    for asks in (is_peft_model, accelerate.utils.is_peft_model, _is_peft_model, transformers.trainer._is_peft_model):
        assert asks(ours) and asks(theirs)
        assert not asks(ours.get_base_model()) and not asks(llama())
    assert is_peft_model(torch.nn.DataParallel(ours)) and is_peft_model(torch.compile(ours))


def test_it_is_taken_back_and_done_again(unpatched: None, tmp_path: Path) -> None:
    trainer = transformers.Trainer
    before = {name: trainer.__dict__[name] for name in METHODS}
    assert all(method.__module__ == "transformers.trainer" for method in before.values())
    assert not hasattr(before["_save"], "__wrapped__") and "__init_subclass__" not in trainer.__dict__
    ours = trainable(llama())
    assert not is_peft_model(ours) and not _is_peft_model(ours), "who took it back does not get it again unasked"
    nbpeft.patch_trainer()
    once = {name: trainer.__dict__[name] for name in METHODS}
    nbpeft.patch_trainer()
    assert {name: trainer.__dict__[name] for name in METHODS} == once != before
    assert is_peft_model(ours) and _is_peft_model(ours)
    nbpeft.unpatch_trainer()
    nbpeft.unpatch_trainer()
    assert {name: trainer.__dict__[name] for name in METHODS} == before
    assert "__init_subclass__" not in trainer.__dict__
    assert not any(type(finder).__name__ == "ImportHook" for finder in sys.meta_path)
    trainer_of(nbpeft.Trainer, ours, tmp_path, save_strategy="no")
    assert is_peft_model(ours)


def test_what_others_put_over_it_stays(unpatched: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = transformers.Trainer._save
    nbpeft.patch_trainer()
    below = transformers.Trainer._save
    monkeypatch.setattr(transformers.Trainer, "_save", lambda self, *args, **kwargs: below(self, *args, **kwargs))
    over = transformers.Trainer._save
    nbpeft.unpatch_trainer()
    assert transformers.Trainer._save is over
    trainer_of(transformers.Trainer, llama(), tmp_path, max_steps=2).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    monkeypatch.undo()
    setattr(transformers.Trainer, "_save", before)  # noqa: B010


def test_a_second_patch_changes_nothing(unpatched: None) -> None:
    patch_when_used()
    assert "__init_subclass__" not in transformers.Trainer.__dict__
    nbpeft.patch_trainer()
    patch_when_used()
    assert transformers.Trainer._save.__wrapped__.__module__ == "transformers.trainer"
    assert not hasattr(transformers.Trainer._save.__wrapped__, "__wrapped__")


ORDER = """
import json, sys
sys.modules["peft"] = None  # as if it were not installed; quicker too
import accelerate.utils
asks = accelerate.utils.is_peft_model.__code__
import nbpeft, nbpeft.session
def waiting():
    return sum(type(finder).__name__ == "ImportHook" for finder in sys.meta_path)
names = [getattr(nbpeft, name) for name in nbpeft.__all__ if name not in ("Trainer", "adapter_trainer", "train")]
untouched = accelerate.utils.is_peft_model.__code__ is asks and not waiting()
import torch
layers = torch.nn.Sequential(torch.nn.Linear(2, 2))
model = nbpeft.get_peft_model(layers, nbpeft.LoraConfig(target_modules=["0"]))
early = "transformers.trainer" in sys.modules
waited = waiting()
from transformers import Trainer
changed = hasattr(Trainer._save, "__wrapped__") and accelerate.utils.is_peft_model(model)
print(json.dumps([untouched, early, waited, waiting(), changed]))
"""


@pytest.mark.slow
def test_a_trainer_is_patched_after_the_first_model_not_on_import(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ORDER], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == [True, False, 1, 0, True]


RESTORED = """
import json, sys
import accelerate.utils, accelerate.utils.fsdp_utils, torch, transformers.trainer as library
import transformers.integrations.peft as integration
from transformers import Trainer
asks = (accelerate.utils.is_peft_model, library._is_peft_model)
def state():
    owners = (library, accelerate.utils.fsdp_utils, integration.PeftAdapterMixin)
    modules = {owner.__name__: dict(vars(owner)) for owner in owners}
    # PeftModules finds modules of nbpeft alone.
    finders = [finder for finder in sys.meta_path if type(finder).__name__ != "PeftModules"]
    return dict(vars(Trainer)), modules, [ask.__code__ for ask in asks], finders
def same(one, other):
    pairs = [(one[0], other[0]), *((one[1][name], other[1][name]) for name in one[1])]
    return all(a.keys() == b.keys() and all(a[name] is b[name] for name in a) for a, b in pairs) and (
        all(a is b for a, b in zip(one[2], other[2])) and one[3] == other[3]
    )
before = state()
import nbpeft
from nbpeft import LoraConfig, get_peft_model, patch_trainer, unpatch_trainer
nbpeft.IA3Config, nbpeft.model
imported = same(before, state())
LoraConfig()
configured = hasattr(Trainer._save, "__wrapped__") and hasattr(integration.PeftAdapterMixin.add_adapter, "__wrapped__")
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
patched = hasattr(Trainer._save, "__wrapped__") and asks[0](model) and asks[1](model)
unpatch_trainer()
print(json.dumps([imported, configured, patched, same(before, state()), Trainer.__init__ is before[0]["__init__"]]))
"""


@pytest.mark.slow
def test_importing_patches_nothing_and_unpatching_restores_all(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RESTORED], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == [True] * 5
