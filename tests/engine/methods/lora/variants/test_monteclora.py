"""MonteCLoRA: with the same draws it learns as PEFT's, its divergences are right, and nothing is drawn ahead."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.monteclora import BufferedMontecloraSampler, MontecloraSampler
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence

from nbpeft.engine.methods.lora.variants import monteclora
from nbpeft.errors import ConfigError, HotSwapError
from nbpeft.model import (
    LoraConfig,
    MontecloraConfig,
    MontecloraTrainerMixin,
    PeftModel,
    get_peft_model,
    hotswap_adapter,
)
from tests.closeness import assert_approximates, assert_close, differ
from tests.tiny_models import llama, logits, randomize, tokens

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"num_samples": 3, "sample_scaler": 0.05, "kl_loss_weight": 1e-2, "buffer_size": 2}
PRIORS = (monteclora.STD, monteclora.PRIOR)


def adapted(base: nn.Module | None = None, **settings: Any) -> PeftModel:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    config = LoraConfig(**fields, task_type="CAUSAL_LM", monteclora_config=SETTINGS | settings)
    model = get_peft_model(base or llama(), config)
    randomize(model, scale=0.2)
    return model


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's samplers take what ours would draw, and their divergence of the Dirichlet is right."""

    def get(self: Any) -> dict[str, Tensor]:
        sampler = self.model
        wishart, dirichlet = monteclora._draws(monteclora._draw_seed(), sampler.out_features, sampler.num_samples, CPU)
        shape = sampler.out_features, sampler.in_features
        samples = [drawn.T for drawn in monteclora.normals(monteclora._draw_seed(), sampler.num_samples, shape, CPU)]
        return {"z_mvn": torch.stack(samples), "z_wishart": torch.diag(wishart), "z_dirichlet": dirichlet}

    def divergence(self: Any, concentration: Tensor) -> Tensor:
        return monteclora.dirichlet_divergence(concentration, self.dirichlet_prior)

    monkeypatch.setattr(BufferedMontecloraSampler, "get", get)
    monkeypatch.setattr(MontecloraSampler, "dirichlet_kl", divergence)


def step(model: Any, seed: int) -> Tensor:
    torch.manual_seed(seed)
    loss: Tensor = model.train()(input_ids=tokens(), labels=tokens()).loss
    if isinstance(model, peft.PeftModel):
        loss = loss + model.base_model._get_monteclora_loss()
    loss.backward()
    return loss.detach()


def gradients(model: Any) -> dict[str, Tensor]:
    """Of the trained parameters, by PEFT's key in a file."""
    state = peft.get_peft_model_state_dict(model) if isinstance(model, peft.PeftModel) else None
    if state is None:
        return {
            f"{path}.{name}": parameter.grad.clone()
            for path, layer in model.manager.layers.items()
            for name, parameter in layer.adapter("default").named_parameters(recurse=False)
        }
    spelling = {"lora_A.default.weight": "lora_A", "lora_B.default.weight": "lora_B"} | {
        f"lora_monteclora_sampler.default.{name.removeprefix('lora_monteclora_')}": name for name in PRIORS
    }
    found = {}
    for name, parameter in model.named_parameters():
        for theirs, ours in spelling.items():
            if name.endswith(theirs):
                found[name.removeprefix("base_model.model.").replace(theirs, ours)] = parameter.grad.clone()
    return found


@pytest.mark.parametrize("use_entropy", [False, True])
@pytest.mark.usefixtures("same_draws")
def test_learns_as_in_peft_with_the_same_draws(use_entropy: bool, tmp_path: Path) -> None:
    ours = adapted(use_entropy=use_entropy)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert_close(logits(ours.eval()), logits(theirs.eval()))
    models: list[Any] = [ours, theirs]
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in models]
    first: list[dict[str, Tensor]] = []
    for number in range(8):
        losses = [step(model, number) for model in models]
        assert_close(losses[0], losses[1])
        if number == 0:
            first = [gradients(model) for model in models]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len(first[0]) == 16
    assert_close(first[0], first[1])
    assert_close(logits(ours.eval()), logits(theirs.eval()))


def test_eight_steps_with_draws_of_its_own_end_near_those_of_peft(tmp_path: Path) -> None:
    ours = adapted(sample_scaler=1e-4, kl_loss_weight=1e-5)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    losses: list[list[float]] = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        losses.append([])
        for number in range(8):
            losses[-1].append(float(step(model, number)))
            optimizer.step()
            optimizer.zero_grad()
    assert_approximates(losses[0], losses[1], 1e-3)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("prior", [0.1, 1.0, 7.0])
def test_the_divergence_of_the_dirichlet_is_right(prior: float) -> None:
    concentration = torch.tensor([0.4, 2.0, 5.5])
    expected = kl_divergence(Dirichlet(concentration), Dirichlet(torch.full((3,), prior)))
    assert_close(monteclora.dirichlet_divergence(concentration, prior), expected)
    nothing = monteclora.dirichlet_divergence(torch.full((3,), prior), prior)
    assert_close(nothing, torch.zeros(()), scale=float(torch.lgamma(torch.tensor(3 * prior)).abs()) + 1)
    theirs = MontecloraSampler(4, 2, 3, dirichlet_prior=prior, buffer_size=1).dirichlet_kl(concentration)
    assert prior == 1.0 or abs(float(theirs) - float(expected)) > 0.1
    assert monteclora.dirichlet_divergence(torch.full((3,), 200.0), prior).isfinite()


def test_files_go_both_ways(tmp_path: Path) -> None:
    ours = adapted()
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours", is_trainable=True)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert mine.keys() == other.keys() and len(mine) == 24
    weights = [value for name, value in mine.items() if name.endswith("expert_weights")]
    assert weights and all(torch.equal(value, torch.full_like(value, 1 / len(value))) for value in weights)
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    again = PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    assert torch.equal(logits(again), logits(ours.eval()))
    assert again.peft_config["default"].monteclora_config == MontecloraConfig(**SETTINGS)
    found = peft.PeftConfig.from_pretrained(tmp_path / "ours").monteclora_config
    assert vars(found) == vars(again.peft_config["default"].monteclora_config)


def test_samples_act_in_training_alone() -> None:
    model = adapted(sample_scaler=1.0)
    plain = logits(model.eval())
    assert torch.equal(logits(model), plain)
    model.train()
    torch.manual_seed(1)
    first = logits(model)
    assert differ(first, plain) and differ(logits(model), first)
    torch.manual_seed(1)
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


def test_the_divergence_is_in_the_loss_of_a_step() -> None:
    given = {"input_ids": tokens(), "labels": tokens()}
    without, with_it = (adapted(kl_loss_weight=weight) for weight in (0.0, 1.0))
    losses = []
    for model in (without, with_it):
        torch.manual_seed(0)
        losses.append(model.train()(**given).loss)
    extra = with_it.manager.extra_loss()
    assert extra is not None and extra > 1
    assert_close(losses[1] - losses[0], extra)
    assert torch.equal(without.eval()(**given).loss, with_it.eval()(**given).loss)
    with with_it.train().disable_adapter():
        assert with_it.manager.extra_loss() is None


def test_a_loop_that_adds_it_as_for_PEFT_adds_it_once() -> None:
    model = adapted(kl_loss_weight=1.0).train()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    extra = model.base_model._get_monteclora_loss()
    assert extra > 1 and torch.equal(extra, model.manager.extra_loss()) and torch.equal(loss + extra, loss)
    logits = model(input_ids=tokens()).logits.mean()
    extra = model.base_model._get_monteclora_loss()
    assert_close((logits + extra).item(), logits.item() + extra.item())


def test_a_trainer_with_the_mixin_of_PEFT_adds_it_once() -> None:
    class Trainer:
        def compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
            loss: Tensor = model(**inputs).loss
            return loss

    class Mixed(MontecloraTrainerMixin, Trainer):
        pass

    losses, model = [], adapted(kl_loss_weight=1.0).train()
    for trainer in (Trainer(), Mixed()):
        torch.manual_seed(0)
        losses.append(trainer.compute_loss(model, {"input_ids": tokens(), "labels": tokens()}))
    assert torch.equal(*losses)


def test_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for settings in ({"use_reentrant": False}, {"use_reentrant": True}, None):
        model = adapted()
        if settings is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(settings)
        step(model, 5)
        found.append(gradients(model))
    assert all(torch.equal(one[name], found[2][name]) for one in found[:2] for name in found[2])


def test_weighted_normals_are_differentiated_as_when_all_are_kept() -> None:
    weights = torch.tensor([0.2, 0.5, 0.3], requires_grad=True)
    samples = torch.stack(list(monteclora.normals(7, 3, (4, 6), CPU)))
    wanted = torch.arange(24.0).view(4, 6)
    results: list[Callable[[], Tensor]] = [
        lambda: monteclora._weighted_normals(weights, 7, (4, 6)),
        lambda: torch.einsum("n,nij->ij", weights, samples),
    ]
    values = [result() for result in results]
    assert_close(values[0], values[1])
    assert_close(*(torch.autograd.grad(value, weights, wanted)[0] for value in values))
    grad = torch.func.grad(lambda given: monteclora._weighted_normals(given, 7, (4, 6)).sum())(weights)
    assert grad.shape == (3,)


def live_bytes() -> int:
    gc.collect()
    # Of these types alone: what other tests traced may be left, and has no memory.
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_drawn_ahead() -> None:
    settings = {"num_samples": 4, "buffer_size": 50}
    grown = []
    for library, make in ((peft, peft.get_peft_model), (None, get_peft_model)):
        base = nn.Sequential(nn.Linear(128, 128))
        before = live_bytes()
        config: Any = (LoraConfig if library is None else peft.LoraConfig)(
            r=4, target_modules=["0"], monteclora_config=settings
        )
        model = make(base, config)
        model.train()(torch.randn(2, 128)).sum().backward()
        grown.append(live_bytes() - before)
    assert grown[0] > 50 * 4 * 128 * 4 * 4 > 20 * grown[1]


def test_what_does_not_go_is_refused_in_one_line(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(HotSwapError, match="stores the spread of its factors"):
        hotswap_adapter(model, str(tmp_path), "default")
    with pytest.raises(ConfigError, match="monteclora_config works on linear layers only"):
        get_peft_model(llama(), LoraConfig(monteclora_config={}, target_modules=["embed_tokens"]))
    for settings, message in (
        ({"num_samples": 0}, "num_samples must be a positive whole number"),
        ({"dirichlet_prior": 0.0}, "dirichlet_prior must be above 0"),
        ({"samples": 2}, "monteclora_config has no field 'samples'"),
    ):
        with pytest.raises(ConfigError, match=message):
            LoraConfig(monteclora_config=settings)
