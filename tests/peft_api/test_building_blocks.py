"""Small parts of PEFT that others import give what PEFT's give."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nbpeft
from tests.closeness import assert_close
from tests.tiny_models import config, llama

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def both(path: str, *names: str) -> list[list[Any]]:
    """The things of these names in a module of nbpeft and of PEFT."""
    modules = [importlib.import_module(f"{library}.{path}") for library in ("nbpeft", "peft")]
    return [[getattr(module, name) for name in names] for module in modules]


def test_buffers_by_name() -> None:
    for (buffers,) in both("tuners._buffer_dict", "BufferDict"):
        made = buffers({"a": torch.ones(2)}, persistent=True)
        made.update(buffers({"b": torch.zeros(1)}))
        made.update([("c", torch.zeros(3))])
        assert [*made] == ["a", "b", "c"] and len(made) == 3 and "b" in made and torch.equal(made["a"], torch.ones(2))
        assert list(made.state_dict()) == ["a", "b", "c"] and not list(made.parameters())
        assert torch.equal(made.pop("b"), torch.zeros(1)) and list(made.keys()) == ["a", "c"]
        made.clear()
        assert not list(made.items()) and not list(made.values())
        assert not list(buffers({"a": torch.ones(1)}).state_dict())


def test_two_factors_of_a_size() -> None:
    (ours,), (theirs,) = both("tuners.lokr.layer", "factorization")
    for size in (1, 12, 50, 97, 512, 1000):
        assert [ours(size)] + [ours(size, factor) for factor in (2, 4, 7, 16)] == [
            theirs(size), *(theirs(size, factor) for factor in (2, 4, 7, 16))
        ]  # fmt: skip


def test_places_of_invocations() -> None:
    rows = torch.tensor([[0, 1, 2, 3], [1, 2, 1, 2], [0, 4, 5, 6]])
    configs = {
        name: nbpeft.LoraConfig(alora_invocation_tokens=tokens) for name, tokens in {"a": [1, 2], "b": [4]}.items()
    }
    configs["plain"] = nbpeft.LoraConfig()
    for (offsets,) in both("tuners.lora.variants", "calculate_alora_offsets"):
        assert offsets(configs, "a", rows) == [3, 2, None] and offsets(configs, "plain", rows) == [None] * 3
        assert offsets(configs, "a", rows, adapter_names=["a", "__base__", "b"]) == [3, None, 3]
        assert offsets(configs, "a", None) == []


@pytest.mark.parametrize("tokens", [[1, 2], None])
def test_options_of_a_call_with_an_invoked_adapter(tokens: list[int] | None) -> None:
    names = "get_alora_offsets_for_forward", "get_alora_offsets_for_generate", "is_alora_relevant_in_batch"
    rows, embedded = torch.tensor([[0, 1, 2, 3]]), torch.zeros(1, 4, 8)
    found = []
    for library, (forward, generate, relevant) in zip(
        (nbpeft, peft), both("tuners.lora.variants", *names), strict=True
    ):
        model = library.get_peft_model(
            llama(), library.LoraConfig(alora_invocation_tokens=tokens, target_modules=["q_proj"])
        )
        with pytest.warns() as warned:
            warnings.warn("one at least", stacklevel=1)
            options = [
                forward(model, rows, labels=1),
                forward(model, alora_offsets=[1]),
                forward(model, inputs_embeds=embedded),
                forward(model),
                generate(model, rows[0]),
                generate(model, input_ids=rows),
                generate(model, inputs_embeds=None),
                relevant(model, ["default", "__base__"]),
            ]
        found.append((options, [str(one.message) for one in warned if "aLoRA" in str(one.message)]))
    assert found[0] == found[1] and len(found[0][1]) == (2 if tokens else 0)


def test_block_diagonal_layers() -> None:
    x, found = torch.randn(2, 3, 12), []
    for (linear,) in both("tuners.lora.variants", "BlockDiagonalLinear"):
        torch.manual_seed(0)
        made = linear(12, 8, 4)
        found.append((made.weight, made.weight_as_blockdiagonal_matrix(), made(x)))
        assert not linear(12, 8, 4, init_zero=True).weight.any()
        with pytest.raises(ValueError, match="not divisible by 5"):
            linear(12, 8, 5)
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)
    adapted = nbpeft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4)),
        nbpeft.LoraConfig(r=2, target_modules=["0"], use_bdlora={"nblocks": 2, "target_modules_bd_a": ["0"]}),
    )
    [[ours], _] = both("tuners.lora.variants", "BlockDiagonalLinear")
    layer = adapted.base_model.model[0]
    assert isinstance(layer.lora_A["default"], ours) and not isinstance(layer.lora_B["default"], ours)


@pytest.mark.parametrize("groups", [2, 3])
def test_compressed_activations(groups: int) -> None:
    names = "_reshape_to_grouped_subtokens", "_compress_activations", "_reconstruct_activations"
    x, weight, bias = torch.randn(2, 4, 7), torch.randn(5, 7), torch.randn(5)
    found: list[list[Tensor]] = []
    for cut, compress, rebuild, normalise, function in both(
        "tuners.lora.velora", *names, "_normalize_projection", "VeloraFunction"
    ):
        direction = normalise(torch.arange(-(-7 // groups)).double())
        kept = compress(x, direction, groups)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        output = function.apply(*leaves, direction, groups, 0.5)
        output.square().sum().backward()
        rebuilt = rebuild(kept, direction, 7, 0.5)
        gradients: list[Any] = [leaf.grad for leaf in leaves]
        found.append([cut(x, groups), kept, rebuilt, normalise(torch.zeros(3)), output, *gradients])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


def test_where_an_adapter_is_read_from(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for (source,) in both("tuners.lora.arrow", "_resolve_adapter_source"):
        assert source(str(tmp_path / "adapter")) == (str(tmp_path / "adapter"), None)
        assert [source("a/b"), source("a/b/c/d")] == [("a/b", None), ("a/b", "c/d")]
        with pytest.raises((ValueError, nbpeft.NbpeftError), match=r"does not contain 'adapter_config\.json'"):
            source(str(tmp_path))


def test_modules_without_values() -> None:
    for empty, with_values in both("utils.integrations", "init_empty_weights", "skip_init_on_device"):
        with empty():
            inside = [nn.BatchNorm1d(2), with_values(nn.Linear)(2, 2)]
        with empty(include_buffers=True):
            inside.append(nn.BatchNorm1d(2))
        places = [{str(tensor.device) for tensor in made.state_dict().values()} for made in inside]
        assert places == [{"meta", "cpu"}, {"cpu"}, {"meta"}]
        assert nn.Linear(2, 2).weight.device.type == "cpu"


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_preconditioned_optimizers_learn_as_with_peft(optimizer: Any, tmp_path: Path) -> None:
    made: Any = nbpeft.get_peft_model(llama(), config())
    made.save_pretrained(tmp_path)
    ids, losses = torch.arange(8)[None], list[list[float]]()
    for library in (nbpeft, peft):
        model = library.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
        stepper = importlib.import_module(f"{library.__name__}.optimizers").create_riemannian_optimizer(
            model, optimizer, lr=1e-2, reg=1e-3
        )
        assert isinstance(stepper, optimizer)
        losses.append([])
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            stepper.step()
            stepper.zero_grad()
            losses[-1].append(loss.item())
        with pytest.raises(ValueError, match="does not support closures"):
            stepper.step(lambda: None)
    assert_close(losses[0], losses[1])
    assert losses[0][-1] < losses[0][0]


def test_what_cannot_be_preconditioned_is_refused() -> None:
    make = nbpeft.create_riemannian_optimizer
    for wrong, kind, words in (
        (torch.optim.LBFGS, ValueError, "requires a closure"),
        (dict, TypeError, "subclass of torch.optim.Optimizer"),
    ):
        with pytest.raises(kind, match=words):
            make(nbpeft.get_peft_model(llama(), config()), wrong, lr=1.0)
    with pytest.raises(ValueError, match="lora_A/lora_B parameter pairs"):
        make(llama(), torch.optim.SGD, lr=1.0)


def test_half_precision_is_preconditioned_in_single() -> None:
    [[preconditioner], _] = both("optimizers.riemannian", "_RiemannianPreconditioner")
    pair = [nn.Parameter(torch.randn(size).half()) for size in ((4, 6), (8, 4))]
    for one in pair:
        one.grad = torch.randn_like(one)
    preconditioner([tuple(pair)], reg=1e-4).step()
    assert all(one.grad is not None and one.grad.isfinite().all() and one.grad.dtype is torch.half for one in pair)


def test_hooks_that_decompose_inputs() -> None:
    found = []
    for svd, hashed in both("tuners.lora.eva", "SVDHook", "HashHook"):
        layer, options = nn.Linear(6, 2), {"name": "layer", "gather_distributed_inputs": False}
        hooks = svd(n_components=3, sim_thresh=0.9, **options), hashed(**options)
        for hook in hooks:
            layer.register_forward_hook(hook)
        generator = torch.Generator().manual_seed(2)
        for rows in (2, 8, 8, 30):
            layer(torch.randn(1, rows, 6, generator=generator) * torch.arange(6))
        found.append((hooks[0].svd.components_, hooks[0].converged, hooks[1].hashed_inputs))
        with pytest.raises(ValueError, match="sim_thresh"):
            svd(n_components=3, sim_thresh=torch.ones(2), **options)
    assert_close(found[0][0], found[1][0], dtype=torch.float32)
    assert found[0][1].tolist() == found[1][1].tolist() and found[0][2] == found[1][2] and len({*found[0][2]}) == 4


def test_tensors_of_another_shape_are_taken_out() -> None:
    model = nn.Linear(4, 2)
    given = {"weight": torch.ones(3, 4), "bias": torch.ones(2), "other": torch.ones(1)}
    for (take,) in both("utils.save_and_load", "_find_mismatched_keys"):
        assert take(model, dict(given))[1] == []
        left, removed = take(model, dict(given), ignore_mismatched_sizes=True)
        assert [*left] == ["bias", "other"] and removed == [("weight", (3, 4), (2, 4))]
        packed = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(6, 1))})  # two 4-bit values in a byte
        assert take(packed, {"weight": torch.ones(3, 4)}, True)[1] == []


def test_gradients_and_kinds_of_parameters() -> None:
    for (set_requires_grad,) in both("utils.other", "_set_layer_requires_grad"):
        layer, tensor = nn.Linear(2, 2), torch.ones(2)
        set_requires_grad(layer, False)
        set_requires_grad(tensor, True)
        computed = tensor * 2
        set_requires_grad(computed, False)
        assert not any(one.requires_grad for one in layer.parameters())
        assert tensor.requires_grad and computed.requires_grad
    for (kind,) in both("utils.integrations", "get_bnb_param_type"):
        made = [type(name, (nn.Parameter,), {})(torch.ones(1)) for name in ("Params4bit", "Int8Params", "Other")]
        assert [kind(one) for one in made] == ["4bit", "8bit", False]
