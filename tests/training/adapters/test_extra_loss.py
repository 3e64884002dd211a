"""What a method adds to the loss is in each loss once: whoever computes it, however gradients are accumulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import nbpeft
from nbpeft import (
    AdaLoraConfig,
    CPTConfig,
    KasaConfig,
    LoraConfig,
    LoraModel,
    MontecloraConfig,
    MontecloraTrainerMixin,
    PeftModel,
    chunked_loss,
    get_peft_model,
    sweep,
    train,
)
from nbpeft.engine.contract.loss_terms import LossTerm, share_of_batch
from nbpeft.engine.methods.lora.variants.kasa import KaSA
from nbpeft.errors import TrainingError
from nbpeft.training import Collator, Trainer
from tests.closeness import assert_close
from tests.tiny_models import llama, tokens
from tests.training.support import token_rows

KASA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
WEIGHTS = {"beta": 0.05, "gamma": 0.02}
ADALORA: dict[str, Any] = {
    **{"init_r": 4, "target_r": 2, "total_step": 20, "tinit": 9, "tfinal": 1, "orth_reg_weight": 0.5},
    **{"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"},
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")


def kasa() -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(llama(), LoraConfig(**KASA, kasa_config=KasaConfig(**WEIGHTS))).train()


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    """A leaf in the place of KaSA's terms: its gradient is how often they were in the loss."""
    leaf = torch.zeros((), requires_grad=True)
    layers = len(kasa().manager.layers)
    monkeypatch.setattr(KaSA, "penalty", lambda self: leaf / layers)
    yield leaf


# In a Trainer


class AsInPeftsExample(transformers.Trainer):
    """As the one of PEFT's example of KaSA."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if return_outputs:
            return result[0] + model._get_kasa_loss(), result[1]
        return result + model._get_kasa_loss()


class FromLogits(transformers.Trainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        return F.cross_entropy(model(**inputs).logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


class FromLogitsAndPefts(FromLogits):
    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, *args, **kwargs) + model._get_kasa_loss()


class NormalizedFromLogits(transformers.Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        return summed_loss(model(**inputs).logits, inputs["labels"]) / num_items_in_batch + model._get_kasa_loss()


class Logs(transformers.Trainer):
    """Looks at it and does not add it."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        model._get_kasa_loss().item()
        return super().compute_loss(model, *args, **kwargs)


class Preferring(transformers.Trainer):
    """Of two calls of the model, with and without the adapter, and from logits alone, as DPO."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        ids = inputs["input_ids"]
        chosen, rejected = (model(input_ids=one).logits.log_softmax(-1).amax(-1).mean() for one in (ids, ids.flip(1)))
        with torch.no_grad(), model.disable_adapter():
            reference = model(input_ids=ids).logits.log_softmax(-1).amax(-1).mean()
        return -F.logsigmoid(chosen - rejected - reference)


class DividesTwice(Trainer):
    """As that of transformers 5.3 to 5.5: accelerate divides the loss by the number of batches, too."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return summed_loss(outputs.logits, labels) / num_items_in_batch


TRAINERS: dict[str, dict[str, Any]] = {
    "nbpeft's": {"trainer_class": Trainer},
    "transformers'": {"trainer_class": transformers.Trainer},
    "as in PEFT's example": {"trainer_class": AsInPeftsExample},
    "from logits": {"trainer_class": FromLogits},
    "from logits, added": {"trainer_class": FromLogitsAndPefts},
    "from logits, normalized": {"trainer_class": NormalizedFromLogits},
    "logged": {"trainer_class": Logs},
    "preferring": {"trainer_class": Preferring},
    "compute_loss_func": {"trainer_class": Trainer, "compute_loss_func": own_loss},
    "label smoothing": {"trainer_class": Trainer, "label_smoothing_factor": 0.1},
}
QUICK: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "data_collator": Collator(copy_labels=True)}


@pytest.mark.drawn(10)
@pytest.mark.parametrize(("batches", "rows"), [(1, 4), (4, 1), (4, 3)])
@pytest.mark.parametrize("case", TRAINERS)
def test_it_is_in_the_loss_of_a_trainer_once(case: str, batches: int, rows: int, probe: Tensor) -> None:
    settings = {**QUICK, "gradient_accumulation_steps": batches, "per_device_train_batch_size": rows}
    train(kasa(), token_rows(), **settings, **TRAINERS[case])
    assert float(probe.grad) == pytest.approx(settings["max_steps"])


def test_losses_are_divided_once(probe: Tensor) -> None:
    settings = {**QUICK, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    train(kasa(), token_rows(), **settings, trainer_class=DividesTwice)
    assert float(probe.grad) == pytest.approx(settings["max_steps"])


def test_an_incomplete_last_step_has_it_once(probe: Tensor) -> None:
    """Of 7 rows in batches of 2, accumulated over 3, the second step has one batch."""
    settings = {**QUICK, "max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 3}
    result = train(kasa(), token_rows(7), per_device_train_batch_size=2, **settings)
    assert result.steps == 2 and float(probe.grad) == pytest.approx(2)


def test_evaluation_and_the_trainer_itself_are_as_without(tmp_path: Path) -> None:
    model = kasa()
    seen: list[Any] = []

    class Noting(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            result = super().training_step(*args, **kwargs)
            seen.append(vars(self).get("compute_loss"))
            return result

    rows = token_rows(4)
    result = train(model, rows, rows, trainer_class=Noting, max_steps=1, learning_rate=1e-6)
    assert seen == [None]
    assert_close(result.loss, result.eval_loss + model._get_kasa_loss().item())


@pytest.mark.parametrize("batches", [1, 4])
def test_equal_to_the_trainer_of_pefts_example(batches: int, tmp_path: Path) -> None:
    """PEFT adds it to each micro-batch: where a Trainer divides by the tokens of all, that is once for each."""
    torch.manual_seed(3)
    theirs: Any = peft.get_peft_model(llama(), peft.LoraConfig(**KASA, kasa_config=peft.KasaConfig(**WEIGHTS)))
    theirs.save_pretrained(tmp_path / "start")
    ours = PeftModel.from_pretrained(llama(), tmp_path / "start", is_trainable=True)

    class Once(AsInPeftsExample):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
            loss = transformers.Trainer.compute_loss(self, model, inputs, return_outputs, **kwargs)
            return loss + model._get_kasa_loss() / batches

    logged = []
    for model, kind in ((ours, AsInPeftsExample), (theirs, Once)):
        arguments = transformers.TrainingArguments(
            **{"output_dir": str(tmp_path), "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1},
            **{"gradient_accumulation_steps": batches, "per_device_train_batch_size": 2, "report_to": "none"},
            **{"save_strategy": "no", "disable_tqdm": True, "use_cpu": True},
        )
        trainer = kind(
            model=model, args=arguments, train_dataset=token_rows(), data_collator=Collator(copy_labels=True)
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(logged[0]) == 3
    assert_close(logged[0], logged[1])


@pytest.mark.parametrize("batches", [1, 4])
def test_adalora_is_peft_with_its_term_once(batches: int, tmp_path: Path) -> None:
    ours = get_peft_model(llama(), AdaLoraConfig(**ADALORA))
    ours.save_pretrained(str(tmp_path))
    config = peft.AdaLoraConfig(**{**ADALORA, "orth_reg_weight": ADALORA["orth_reg_weight"] / batches})
    theirs = peft.get_peft_model(llama(), config)
    peft.set_peft_model_state_dict(theirs, peft.load_peft_weights(str(tmp_path), device="cpu"))
    settings = {"max_steps": 3, "gradient_accumulation_steps": batches, "per_device_train_batch_size": 2}
    losses = [
        train(model, token_rows(), trainer_class=transformers.Trainer, learning_rate=1e-2, **settings).state.history
        for model in (ours, theirs)
    ]
    assert_close([loss for _, loss in losses[0]], [loss for _, loss in losses[1]])


def test_the_mixin_of_monteclora_adds_it_once() -> None:
    config = LoraConfig(**KASA, monteclora_config=MontecloraConfig(num_samples=2, kl_loss_weight=0.1))

    class Mixed(MontecloraTrainerMixin, transformers.Trainer):
        pass

    losses = []
    for kind in (Mixed, transformers.Trainer):
        torch.manual_seed(1)
        settings = {"max_steps": 2, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
        losses.append(train(get_peft_model(llama(), config), token_rows(), trainer_class=kind, **settings).loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("batches", [1, 4])
def test_a_sweep_of_cpt_learns_as_each_alone(batches: int) -> None:
    """Its weights of tokens are in its loss; what else adds to a loss is refused."""

    def made() -> PeftModel:
        types = {"cpt_token_ids": [5, 7, 9, 3], "cpt_tokens_type_mask": [1, 2, 3, 4]}
        return get_peft_model(llama(), CPTConfig(task_type="CAUSAL_LM", opt_projection_epsilon=5.0, **types), "a")

    settings = {"max_steps": 2, "gradient_accumulation_steps": batches, "per_device_train_batch_size": 2}
    result = train(made(), token_rows(), learning_rate=sweep(0.01, 0.05), **settings)
    for member, rate in zip(result.members, (0.01, 0.05), strict=True):
        alone = train(made(), token_rows(), learning_rate=rate, **settings)
        assert_close(member.loss, alone.loss)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**KASA, kasa_config=KasaConfig()),
        LoraConfig(**KASA, monteclora_config=MontecloraConfig(num_samples=2)),
        AdaLoraConfig(**ADALORA),
    ],
)
def test_a_sweep_refuses_what_adds_to_a_loss(config: Any) -> None:
    with pytest.raises(TrainingError, match="has training hooks, which a sweep does not support"):
        train(get_peft_model(llama(), config, "a"), token_rows(), learning_rate=sweep(0.01, 0.05), max_steps=1)


# In a loop of one's own


def parts(count: int, *sizes: int) -> list[Tensor]:
    return list(tokens(sum(sizes), 7).split(list(sizes)))[:count]


LOOPS: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "the model's": lambda model, ids, items: model(input_ids=ids, labels=ids).loss / 4,
    "the model's, normalized": lambda model, ids, items: (
        model(input_ids=ids, labels=ids, num_items_in_batch=items).loss
    ),
    "in chunks": lambda model, ids, items: chunked_loss(model, input_ids=ids, labels=ids, num_items_in_batch=items),
    "added as in PEFT": lambda model, ids, items: (model(input_ids=ids, labels=ids).loss + model._get_kasa_loss()) / 4,
    "added in another order": lambda model, ids, items: (
        model._get_kasa_loss() * 0.25 + model(input_ids=ids, labels=ids).loss / 4
    ),
    "added to a part": lambda model, ids, items: model(input_ids=ids, labels=ids).loss / 4 + model._get_kasa_loss() / 4,
    "summed": lambda model, ids, items: sum([model._get_kasa_loss(), model(input_ids=ids, labels=ids).loss]) / 4,
    "stacked": lambda model, ids, items: (
        torch.stack([model(input_ids=ids, labels=ids).loss, model._get_kasa_loss()]).sum() / 4
    ),
    "joined in another order": lambda model, ids, items: (
        torch.cat([model._get_kasa_loss()[None], model(input_ids=ids, labels=ids).loss[None]]).sum() / 4
    ),
    "from logits, stacked": lambda model, ids, items: (
        torch.stack((model(input_ids=ids).logits.square().mean(), model._get_kasa_loss())).sum() / 4
    ),
    "from logits": lambda model, ids, items: (model(input_ids=ids).logits.square().mean() + model._get_kasa_loss()) / 4,
    "from logits of a call with labels": lambda model, ids, items: (
        (model(input_ids=ids, labels=ids).logits.square().mean() + model._get_kasa_loss()) / 4
    ),
    "from logits, by the manager": lambda model, ids, items: (
        (model(input_ids=ids).logits.square().mean() + model.manager.extra_loss()) / 4
    ),
    "the model's, added by the manager": lambda model, ids, items: (
        (model(input_ids=ids, labels=ids).loss + model.manager.extra_loss()) / 4
    ),
}


@pytest.mark.parametrize("case", LOOPS)
def test_it_is_in_the_loss_of_a_loop_once(case: str, probe: Tensor) -> None:
    model = kasa()
    batches = parts(4, 1, 3, 2, 2)
    items = sum(batch[:, 1:].numel() for batch in batches)
    for batch in batches:
        LOOPS[case](model, batch, items).backward()
    assert float(probe.grad) == pytest.approx(1)


@pytest.mark.drawn(2)
@pytest.mark.parametrize("called", ["a tuner alone", "a handle", "the tuner of a handle", "a compiled tuner"])
def test_it_is_in_the_loss_once_whoever_is_called(called: str, probe: Tensor) -> None:
    model: Any = kasa()
    if called == "a tuner alone":
        model = LoraModel(llama(), LoraConfig(**KASA, kasa_config=KasaConfig(**WEIGHTS)), "default").train()
    elif called != "a handle":
        model = model.base_model
    if called == "a compiled tuner":
        model = torch.compile(model, backend="eager")
    batch = tokens()
    (model(input_ids=batch, labels=batch).loss + model._get_kasa_loss()).backward()
    model(input_ids=batch, labels=batch, return_dict=False)[0].backward()
    assert float(probe.grad) == pytest.approx(2)
    probe.grad = None
    assert not model.eval()(input_ids=batch, labels=batch).loss.isnan()
    model.train()(input_ids=batch).logits.sum().backward()
    assert probe.grad is None


def test_a_tuner_of_adalora_gives_the_loss_of_peft() -> None:
    losses = []
    for library, config in ((peft, peft.AdaLoraConfig(**ADALORA)), (nbpeft, AdaLoraConfig(**ADALORA))):
        torch.manual_seed(0)
        model = library.AdaLoraModel(llama(), config, "default").train()
        losses.append(model(input_ids=tokens(), labels=tokens()).loss)
        bare = model.model(input_ids=tokens(), labels=tokens()).loss
        assert losses[-1] > bare + 0.1
    assert_close(*losses)


def test_added_in_place_it_is_there_once(probe: Tensor) -> None:
    model, batch = kasa(), tokens()
    loss = model(input_ids=batch, labels=batch).loss
    loss += model._get_kasa_loss()
    other = model(input_ids=batch, labels=batch).logits.square().mean()
    other += model._get_kasa_loss()
    (loss + other).backward()
    assert float(probe.grad) == pytest.approx(2)  # one for each loss


def test_what_peft_adds_can_be_looked_at_and_is_whole() -> None:
    model, batch = kasa(), tokens()
    whole = model(input_ids=batch, labels=batch).loss
    term: Any = model._get_kasa_loss()
    bare = model.eval()(input_ids=batch, labels=batch).loss
    assert isinstance(term, LossTerm) and term.item() > 0.1
    assert_close(whole, bare + term.item())
    total = whole + term
    assert torch.equal(total, whole) and type(total) is Tensor
    assert type(bare + term) is Tensor and (bare + term).item() == pytest.approx(whole.item())
    assert (term + 0.0).item() == term.item() and torch.equal(term + term, 2 * term)
    assert get_peft_model(llama(), LoraConfig(**KASA)).train().manager.extra_loss() is None


def test_terms_of_two_models_and_two_adapters_are_apart(probe: Tensor) -> None:
    teacher, student, batch = kasa(), kasa(), tokens()
    loss = student(input_ids=batch, labels=batch).loss
    assert (loss + teacher._get_kasa_loss()) is not loss
    student.add_adapter("other", LoraConfig(**KASA, kasa_config=KasaConfig(**WEIGHTS)))
    (loss + student._get_kasa_loss("other")).backward()
    assert float(probe.grad) == pytest.approx(2)


@pytest.mark.parametrize(
    ("labels", "items", "shifts", "share"),
    [
        (torch.tensor([[5, -100, 5, 5]]), 8, True, 0.25),
        (torch.tensor([[5, -100, 5, 5]]), 6, False, 0.5),
        (torch.tensor([[5, 5]]), None, True, 1.0),
        (torch.tensor([1, 0]), 4, True, 1.0),
        (None, 4, True, 1.0),
    ],
)
def test_the_share_of_a_batch(labels: Any, items: Any, shifts: bool, share: float) -> None:
    assert float(share_of_batch(labels, items, shifts=shifts)) == share
