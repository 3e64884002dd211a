"""Activations and norms that are computed again in backward: what is kept, what comes out, and that nothing stays."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.activations import GELUActivation, SiLUActivation

from nbpeft.engine.calls.selective_recompute import selective_recompute
from nbpeft.engine.kernels.grouped_heads import _SWITCH
from nbpeft.engine.methods.lora import products
from nbpeft.engine.tree.model_tree import linear_layers_to_quantize
from nbpeft.memory.checkpointing import enable_checkpointing
from nbpeft.memory.saved import SavedTensors
from nbpeft.model import LoraConfig, get_peft_model
from tests.closeness import DEPTH, assert_close, assert_same
from tests.model.allocations import Allocations
from tests.tiny_models import VOCABULARY, llama, tokens

ROWS, LENGTH, HIDDEN, WIDE = 2, 8, 32, 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = COMMON | {"num_key_value_heads": 2}
HEADED = GROUPED | {"head_dim": 8}
EXPERTS = GROUPED | {"num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "CausalLM", GROUPED),
    "mistral": ("Mistral", "CausalLM", GROUPED),
    "qwen2": ("Qwen2", "CausalLM", GROUPED),
    "qwen3": ("Qwen3", "CausalLM", HEADED),
    "gemma": ("Gemma", "CausalLM", HEADED),
    "gemma2": ("Gemma2", "CausalLM", HEADED),
    "gemma3": ("Gemma3Text", "CausalLM", HEADED),
    "phi": ("Phi", "CausalLM", COMMON),
    "phi3": ("Phi3", "CausalLM", GROUPED),
    "olmo2": ("Olmo2", "CausalLM", GROUPED),
    "cohere": ("Cohere", "CausalLM", GROUPED),
    "gpt_neox": ("GPTNeoX", "CausalLM", COMMON),
    "gpt2": ("GPT2", "LMHeadModel", COMMON | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "opt": ("OPT", "CausalLM", COMMON | {"ffn_dim": WIDE, "word_embed_proj_dim": HIDDEN, "dropout": 0.0}),
    "bloom": ("Bloom", "CausalLM", COMMON | {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "falcon": ("Falcon", "CausalLM", COMMON | {"hidden_dropout": 0.0, "attention_dropout": 0.0, "alibi": False}),
    "mixtral": ("Mixtral", "CausalLM", EXPERTS | {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", "CausalLM", EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": WIDE}),
    "t5": ("T5", "ConditionalGeneration", COMMON | {
        "d_model": HIDDEN, "d_ff": WIDE, "num_layers": 2, "num_heads": 4, "d_kv": 8, "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
    }),
}  # fmt: skip


def base_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, task, settings = MODELS[name]
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}Config" if kind != "Gemma3Text" else "Gemma3TextConfig")
    model_class = getattr(
        transformers, f"{kind.removesuffix('Text')}For{task}" if kind != "GPT2" else "GPT2LMHeadModel"
    )
    return model_class(config_class(**settings)).to(dtype)


def with_lora(base: Any, **fields: Any) -> Any:
    settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **fields}
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**settings)).train()


def step(model: Any, ids: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of one step, dropout masks drawn from a seed."""
    torch.manual_seed(2)
    ids = tokens(ROWS, LENGTH) if ids is None else ids
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.logits.detach(), gradients


def kept_bytes(model: Any) -> int:
    """What a step keeps for backward, its head and loss included."""
    ids = tokens(ROWS, LENGTH)
    with SavedTensors(model) as saved:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    model.zero_grad()
    return saved.peak


def assert_equal_steps(model: Any, compare: Callable[..., None] = assert_close) -> None:
    plain_logits, plain = step(model)
    with selective_recompute(model):
        logits, found = step(model)
    assert torch.equal(logits, plain_logits)
    assert found.keys() == plain.keys() and found
    for name, gradient in plain.items():
        compare(found[name], gradient, message=name)


def own_forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.drawn(8)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_same_and_keeps_less(name: str) -> None:
    targets = ["q_proj", "v_proj"] if name in ("mixtral", "qwen2_moe") else "all-linear"
    model = with_lora(base_model(name), target_modules=targets)
    assert_equal_steps(model)
    plain = kept_bytes(model)
    with selective_recompute(model):
        assert own_forwards(model)
        assert kept_bytes(model) < plain
    assert not own_forwards(model)


def test_a_llama_layer_keeps_what_its_matrix_products_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the MLP gate and up; of a norm what goes in; of attention q, k, v and its output."""
    monkeypatch.setattr(products, "_LEAST_LEAN", 0)  # small inputs are kept
    ranks = 2
    sizes = {layers: [0, 0] for layers in (2, 3)}
    for layers, found in sizes.items():
        model = with_lora(llama(num_hidden_layers=layers, attention_bias=False), r=ranks).base_model.model.model
        ids = tokens(ROWS, LENGTH)
        for recomputes in (False, True):
            with SavedTensors(model) as saved:
                if recomputes:
                    with selective_recompute(model):
                        output = model(input_ids=ids).last_hidden_state
                else:
                    output = model(input_ids=ids).last_hidden_state
            found[recomputes] = saved.byte_count
            del output
    plain, recomputed = (sizes[3][each] - sizes[2][each] for each in (False, True))
    hidden, wide, heads, grouped, thin = 32, 64, 4, 16, 7 * ranks
    attention = 2 * hidden + 2 * grouped + heads  # q, output, k and v, and the sums of the softmax
    scales = 2  # of the norms
    assert plain == 4 * ROWS * LENGTH * (4 * hidden + 4 * wide + attention + scales + thin)
    assert recomputed == 4 * ROWS * LENGTH * (2 * hidden + 2 * wide + attention + thin)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_bf16_gives_the_same_bits(dropout: float) -> None:
    assert_equal_steps(with_lora(llama(dtype=torch.bfloat16), lora_dropout=dropout), assert_same)


def test_autocast_is_as_in_the_forward_pass() -> None:
    model = with_lora(llama())

    def run() -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=tokens(), labels=tokens())
        output.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return output.logits.detach(), gradients

    logits, plain = run()
    with selective_recompute(model):
        found_logits, found = run()
    assert torch.equal(found_logits, logits)
    for gradient, expected in zip(found, plain, strict=True):
        assert_close(gradient, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_works_with_it(reentrant: bool) -> None:
    model = with_lora(llama(), lora_dropout=0.5)
    model.enable_input_require_grads()
    _, plain = step(model)
    enable_checkpointing(model.base_model.model, {"use_reentrant": reentrant})
    kept = kept_bytes(model)
    with selective_recompute(model):
        _, found = step(model)
        assert kept_bytes(model) <= kept
    for name, gradient in plain.items():
        assert_close(found[name], gradient)


def test_a_checkpointed_layer_keeps_its_input_alone() -> None:
    sizes = []
    for recomputes in (False, True):
        model = with_lora(llama(intermediate_size=72)).base_model.model.model
        model.enable_input_require_grads()
        enable_checkpointing(model, {"use_reentrant": False})
        with selective_recompute(model) if recomputes else nullcontext():
            with Allocations() as allocated:
                output = model(input_ids=tokens(ROWS, LENGTH), use_cache=False).last_hidden_state
            sizes.append(allocated.now)
            output.sum().backward()
    assert sizes[1] <= sizes[0]


def test_derivatives_of_higher_order_are_right() -> None:
    model = with_lora(llama(dtype=torch.float64, attn_implementation="eager"))
    lora_A = next(p for name, p in model.named_parameters() if "gate_proj.lora_A" in name)

    def penalty() -> Tensor:
        loss = model(input_ids=tokens(), labels=tokens()).loss
        (gradient,) = torch.autograd.grad(loss, lora_A, create_graph=True)
        (second,) = torch.autograd.grad(gradient.pow(2).sum(), lora_A)
        return second

    plain = penalty()
    with selective_recompute(model):
        assert_close(penalty(), plain, depth=6 * DEPTH, dtype=torch.float32)  # transformers' loss is in float32


def test_backward_may_run_twice() -> None:
    model = with_lora(llama())
    with selective_recompute(model):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward(retain_graph=True)
        once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        loss.backward()
    for name, gradient in once.items():
        assert_close(dict(model.named_parameters())[name].grad, 2 * gradient)


def test_without_gradients_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(llama()).eval()
    plain = model.generate(input_ids=tokens(), max_new_tokens=4, do_sample=False)
    with selective_recompute(model), monkeypatch.context() as patch:
        patch.setattr("nbpeft.engine.calls.selective_recompute.recompute", None)
        assert torch.equal(model.generate(input_ids=tokens(), max_new_tokens=4, do_sample=False), plain)


def test_another_thread_generates_while_it_trains() -> None:
    model = with_lora(llama())
    plain = model.eval().generate(input_ids=tokens(), max_new_tokens=4, do_sample=False)
    found: list[Tensor] = []

    def generate() -> None:
        found.extend(model.generate(input_ids=tokens(), max_new_tokens=4, do_sample=False) for _ in range(3))

    _, gradients = step(model)
    thread = threading.Thread(target=generate)
    thread.start()
    while thread.is_alive():
        with selective_recompute(model):
            _, during = step(model)
        for name, gradient in gradients.items():
            assert_close(during[name], gradient)
    thread.join()
    assert len(found) == 3 and all(torch.equal(each, plain) for each in found)


def test_nothing_stays_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(llama())
    before = {name: dict(vars(module)) for name, module in model.named_modules()}

    def is_as_before() -> bool:
        now = {name: dict(vars(module)) for name, module in model.named_modules()}
        return now.keys() == before.keys() and all(now[name].keys() == before[name].keys() for name in now)

    with pytest.raises(KeyboardInterrupt), selective_recompute(model):
        raise KeyboardInterrupt
    assert is_as_before()
    with selective_recompute(model), selective_recompute(model):  # the inner one finds nothing to do
        step(model)
    assert is_as_before()

    class Failing:
        def __init__(self, *_: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("nbpeft.engine.calls.selective_recompute._RecomputedForward", Failing)
    with pytest.raises(KeyboardInterrupt), selective_recompute(model):
        pass
    assert is_as_before()


def test_a_change_of_mode_keeps_it(tmp_path: Path) -> None:
    """``from_pretrained`` uses ``kernels``, which sets the forwards of norms and activations at a change of mode."""
    llama().save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert base.use_kernels
    model = with_lora(base)
    plain, before = kept_bytes(model), {name: set(vars(module)) for name, module in model.named_modules()}
    model.eval()
    with selective_recompute(model):
        changed = own_forwards(model)
        least = kept_bytes(model.train())
        assert changed and own_forwards(model) == changed and least < plain
        for part in (model.eval(), base.train(), base.eval(), model.train()):
            assert part in (model, base) and own_forwards(model) == changed
        with selective_recompute(model):
            assert kept_bytes(model.eval().train()) == least
        model.get_submodule(changed[0]).forward = taken = lambda x: x  # a kernel
    assert own_forwards(model) == [changed[0]] and model.get_submodule(changed[0]).forward is taken
    del model.get_submodule(changed[0]).forward
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_a_copy_made_meanwhile_works_and_is_its_own() -> None:
    model = with_lora(llama())
    _, plain = step(model)
    with selective_recompute(model):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    _, found = step(copied)
    for name, gradient in plain.items():
        assert_close(found[name], gradient)


class Drifting(nn.Module):
    """Gives something else each time: no norm that could be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class DriftingNorm(Drifting):
    pass


class DriftingGELU(Drifting):
    pass


def test_a_module_that_does_not_repeat_itself_is_left_alone() -> None:
    x = torch.randn(3, requires_grad=True)
    for module in (DriftingNorm(), DriftingGELU()):
        with selective_recompute(nn.Sequential(module)):
            module(x)
            output = module(x)
            calls = module.calls
            assert torch.equal(torch.autograd.grad(output.sum(), x)[0], torch.full((3,), float(calls)))
            assert module.calls == calls


def test_who_watches_or_trains_a_module_sees_it_as_it_is() -> None:
    hooked, trained, replaced = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: 2 * x  # type: ignore[method-assign, assignment]
    x = torch.randn(2, 4, requires_grad=True)
    with selective_recompute(nn.Sequential(hooked, trained, replaced)) as running:
        assert [*running._forwards] == [trained]
        assert "Recompute" not in type(trained(x).grad_fn).__name__
        trained.requires_grad_(False)
        assert "Recompute" in type(trained(x).grad_fn).__name__
        assert torch.equal(replaced(x), 2 * x)


class ScaledGELU(nn.Module):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return nn.functional.gelu(x) * scale


@pytest.mark.parametrize(
    ("activation", "further"),
    [
        (nn.ReLU(inplace=True), ()),
        (nn.SiLU(inplace=True), ()),
        (nn.Softmax(dim=2), ()),
        (nn.Softmax2d(), ()),
        (ScaledGELU(), (2.0,)),
    ],
    ids=str,
)
def test_an_activation_of_another_kind_is_left_alone(activation: nn.Module, further: tuple[float, ...]) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 3, 5, 4)
    model = nn.ModuleList([layer, activation])
    gradients = []
    for context in (nullcontext(), selective_recompute(model)):
        with context:
            layer.zero_grad()
            activation(layer(x), *further).pow(2).sum().backward()
        assert layer.weight.grad is not None
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(*gradients)


class Mlp(nn.Module):
    """down(act(gate) * up), or what a test makes of it."""

    def __init__(self, combine: Callable[[Any, Tensor, Tensor], Any], activation: nn.Module | None = None) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.nonlinearity = activation or SiLUActivation()
        self.dropout = nn.Dropout(0.0)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        gate = self.left(x)
        hidden: Tensor = self.last(self.dropout(self.combine(self.nonlinearity(gate), gate, self.right(x))))
        return hidden


@pytest.mark.parametrize(
    ("combine", "waits"),
    [
        (lambda activated, gate, up: activated * up, True),
        (lambda activated, gate, up: up * activated, True),
        (lambda activated, gate, up: torch.mul(up, activated), True),
        (lambda activated, gate, up: activated + up, False),
        (lambda activated, gate, up: activated * up + activated.mean(), False),
        (lambda activated, gate, up: -activated * up, False),
        (lambda activated, gate, up: activated, False),
    ],
)
def test_gating_is_found_whatever_the_layers_are_called(combine: Any, waits: bool) -> None:
    mlp = Mlp(combine).requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    expected = mlp(x)
    (plain,) = torch.autograd.grad(expected.sum(), x)
    with selective_recompute(mlp):
        assert type(vars(mlp.nonlinearity)["forward"]).__name__ == ("_GatingForward" if waits else "_RecomputedForward")
        output = mlp(x)
    assert torch.equal(output, expected)
    assert_close(torch.autograd.grad(output.sum(), x)[0], plain)


def test_an_activation_shared_with_another_mlp_does_not_wait() -> None:
    shared = GELUActivation()
    gated, plain = Mlp(lambda a, gate, up: a * up, shared), Mlp(lambda a, gate, up: a, shared)
    x = torch.randn(3, 4, requires_grad=True)
    model = nn.Sequential(gated, plain)
    expected = model(x)
    with selective_recompute(model):
        assert torch.equal(model(x), expected)
    with selective_recompute(nn.Sequential(gated)) as running:
        assert type(vars(next(iter(running._forwards)))["forward"]).__name__ == "_GatingForward"


def test_a_quantized_base_gives_the_same_bits() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = llama(hidden_size=64, intermediate_size=128, dtype=torch.bfloat16, attention_bias=False)
    for path in linear_layers_to_quantize(base):
        rows, columns = base.get_parameter(f"{path}.weight").shape
        new = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(
            base.get_parameter(f"{path}.weight").detach(), requires_grad=False, quant_type="nf4", module=new
        )
        base.set_submodule(path, new.to("cpu"))
    assert_equal_steps(with_lora(base), assert_same)


@pytest.mark.slow
def test_compiled_code_decides_by_itself() -> None:
    model = with_lora(llama(attention_bias=False))
    _, plain = step(model)
    model.base_model.model.model.compile(backend="aot_eager", fullgraph=True)
    with selective_recompute(model):
        _, found = step(model)
    for name, gradient in plain.items():
        assert_close(found[name], gradient)


@pytest.mark.parametrize("verify", [False, True])
def test_attention_repeats_no_heads_inside(verify: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_SWITCH, raising=False)
    with selective_recompute(llama(num_hidden_layers=1), verify=verify):
        assert (_SWITCH in os.environ) == verify
    assert _SWITCH not in os.environ
