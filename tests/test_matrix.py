"""What every registered method promises, in each of its sample configs, on every kind of layer and backend."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nbpeft.engine.backends.bnb4bit import Bnb4bit
from nbpeft.engine.contract.adapter import AdapterConfig
from nbpeft.engine.contract.registry import method_of, methods
from nbpeft.engine.tree.model_tree import manager_of
from nbpeft.engine.wrappers.layer import AdaptedLayer
from nbpeft.errors import MergeError, NbpeftError, TargetError
from nbpeft.model import PeftModel, get_peft_model
from tests.closeness import assert_close, is_close
from tests.pretend_cpu import pretend_repacking, repack

bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")


class Net(nn.Module):
    """One layer of the kind under test between two that stay plain."""

    def __init__(self, layer: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.target = layer
        self.norm = nn.LayerNorm(8)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.target(x)
        return self.after(hidden.float()) if hidden.is_floating_point() else hidden


@dataclass
class Case:
    """A layer and what to expect of it; repacked as bitsandbytes does it on some processors, and computes otherwise."""

    layer: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    peft_config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    quantized: bool = False
    repacked: bool = False
    rounded: float = 0.0
    """Of a quantized weight: the mean error of outputs that merging may leave, as it is rounded again."""


def _floats(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def _conv1d() -> nn.Module:
    layer = Conv1D(24, 16)
    nn.init.normal_(layer.bias)
    return layer


def _linear4bit(*, repacked: bool = False, **options: Any) -> nn.Module:
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=True, compute_dtype=torch.float32, **options)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    layer.support_avx512bf16_for_cpu = False
    layer.to("cpu")
    if repacked:
        repack(layer)
    return layer


def _linear8bit() -> nn.Module:
    layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=True, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    return layer.to("cpu")


CASES = {
    "linear": Case(lambda: nn.Linear(16, 24), _floats(3, 5, 16)),
    "linear-no-bias": Case(lambda: nn.Linear(16, 24, bias=False), _floats(3, 5, 16)),
    "linear-bf16": Case(
        lambda: nn.Linear(16, 24).to(torch.bfloat16),
        _floats(3, 5, 16, dtype=torch.bfloat16),
        dtype=torch.bfloat16,
    ),
    "transformers-conv1d": Case(_conv1d, _floats(3, 5, 16), {"fan_in_fan_out": True}),
    "embedding": Case(lambda: nn.Embedding(11, 24), lambda: torch.tensor([[1, 4, 9], [0, 10, 2]])),
    "conv1d": Case(lambda: nn.Conv1d(6, 8, 3, padding=1), _floats(2, 6, 9)),
    "conv2d": Case(lambda: nn.Conv2d(3, 8, 3, stride=2), _floats(2, 3, 9, 9)),
    "conv3d": Case(lambda: nn.Conv3d(3, 8, 2), _floats(2, 3, 4, 5, 6)),
    "layer-norm": Case(lambda: nn.LayerNorm(16), _floats(3, 5, 16)),
    "nf4": Case(lambda: _linear4bit(quant_type="nf4"), _floats(2, 3, 64), quantized=True, rounded=0.3),
    "fp4-repacked": Case(
        lambda: _linear4bit(quant_type="fp4", compress_statistics=True, repacked=True),
        _floats(2, 3, 64),
        quantized=True,
        repacked=True,
        rounded=0.3,
    ),
    "int8": Case(_linear8bit, _floats(2, 3, 64), quantized=True, rounded=0.05),
}

SAMPLES: dict[str, tuple[type[AdapterConfig], dict[str, Any]]] = {
    f"{method.label}-{name}": (method.config_class, dict(fields))
    for method in methods()
    for name, fields in method.sample_configs.items()
    if not method.transforms_calls
}

WITHOUT_SAMPLES = {
    "aLoRA": "acts behind tokens that each call has to contain (tests/engine/methods/lora/variants/test_alora.py)",
    "Arrow": "routes over adapters that are on the model before (test_arrow.py)",
    "X-LoRA": "weighs adapters that are read from files (test_xlora.py)",
}
"""Methods that no config alone makes, and why; each has tests of its own for what is asked of the others here."""

labels = {f"{method.label}-{name}": method.label for method in methods() for name in method.sample_configs}

pytestmark = [
    pytest.mark.filterwarnings("ignore:merging into", "ignore:MatMul8bitLt", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.* no bias in the base", "ignore:.* is taken there"),
]


def test_every_method_is_tried_or_says_why_not() -> None:
    own = [method for method in methods() if method.adapter_class.__module__.startswith("nbpeft.")]
    assert {method.label for method in own if not method.sample_configs} == WITHOUT_SAMPLES.keys()


def config_of(sample: str, **more: Any) -> AdapterConfig:
    cls, fields = SAMPLES[sample]
    own = {key: value for key, value in more.items() if key in cls.__dataclass_fields__}
    return cls(**{"target_modules": ["target"], **fields, **own})


@pytest.fixture(autouse=True)
def repacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every processor computes with re-packed weights."""
    pretend_repacking(monkeypatch, True)


def make(case: Case) -> Net:
    torch.manual_seed(0)
    return Net(case.layer(), nn.Tanh()).eval()


def make_plain(case: Case) -> Net:
    """The same, with a re-packed layer in the layout in which layers with adapters compute."""
    base = make(case)
    if case.repacked:
        Bnb4bit().prepare(base.target)
    return base


def randomise(model: nn.Module) -> None:
    """Moves every adapter parameter off its start, so that nothing is zero."""
    generator = torch.Generator().manual_seed(9)
    manager = manager_of(model)
    assert manager is not None
    with torch.no_grad():
        for name in manager.names:
            for parameter in manager.parameters(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)


PACKED = ("LoHa", "LoKr", "HRA", "FourierFT", "C3A", "HiRA", "TinyLoRA", "DEFT", "PEANuT", "Super-Tuning", "AdaMSS")
"""Methods that peft has for nn.Linear alone, which a 4-bit layer is an instance of."""

# (kind, sample), or (kind, label) for all samples of a method.
PEFT_IS_WRONG = {
    **{(kind, label): "takes the shape of the packed weight" for kind in ("nf4", "fp4-repacked") for label in PACKED},
    **{(kind, "trainable tokens-tokens"): "drops the bias of the layer" for kind in ("linear", "linear-bf16")},
    ("transformers-conv1d", "trainable tokens-tokens"): "raises AttributeError",
    ("transformers-conv1d", "Lily"): "raises NotImplementedError",
    ("conv1d", "LoKr-factored"): "raises RuntimeError",
    **{("int8", label): "multiplies the 8-bit numbers" for label in ("HRA", "HiRA", "PEANuT")},
    ("int8", "Super-Tuning"): "adds to the 8-bit numbers",
    ("int8", "AdaMSS"): "takes the directions of the 8-bit numbers",
    ("int8", "TinyLoRA"): "takes the directions of the 8-bit numbers",
    **{(kind, "Uni-LoRA"): "rounds the scales to integers" for kind in ("nf4", "fp4-repacked", "int8")},
    ("conv2d", "OFT"): "folds patches that overlap, which is not what it merges",
    **{(kind, "DeLoRA"): "takes the norms of the stored numbers" for kind in ("nf4", "fp4-repacked", "int8")},
    **{(kind, "LoRA-orthogonal"): "raises RuntimeError" for kind in ("nf4", "fp4-repacked", "int8")},
    **{(kind, "QALoRA"): "takes it for plain LoRA" for kind in CASES},
    ("transformers-conv1d", "BD-LoRA"): "raises AttributeError",
    **{(kind, "BD-LoRA"): "raises RuntimeError" for kind in ("nf4", "fp4-repacked", "int8")},
    **{(kind, "MiCA"): "raises TypeError" for kind in ("nf4", "fp4-repacked", "int8")},
    **{(kind, "VeLoRA-random"): "draws in the dtype of the packed numbers" for kind in ("nf4", "fp4-repacked", "int8")},
}
DRAWS = ("MonteCLoRA", "Polytropon")
"""Methods whose output in training is drawn."""
STARTS_NEAR = {("linear-bf16", "DEFT"), ("int8", "DEFT")}
"""Where a method takes from the layer's rounded output what it puts back exactly."""
STARTS_ELSEWHERE = ("KaSA",)
"""Methods that leave something of the weight out from the start."""
LINEAR = ("linear", "linear-no-bias", "linear-bf16", "transformers-conv1d", "nf4", "fp4-repacked", "int8")
"""Layers on which every method works but ``DENSE_ONLY``, which do not work on the quantized ones."""
DENSE_ONLY = ("LN tuning", "trainable tokens")
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
WORKS_ON: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("HRA", "(IA)³", "LoHa-r3", "LoKr-whole", "LoKr-flat", "LoRA-bias"), CONVOLUTIONS),
    **dict.fromkeys(("HiRA", "OFT", "DoRA-dora", "LoRA-plain", "LoRA-rslora"), ("embedding", *CONVOLUTIONS)),
    **dict.fromkeys(("MiCA", "TinyLoRA", "trainable tokens"), ("embedding",)),
    **dict.fromkeys(("LoHa-cores", "LoKr-factored"), ("conv1d", "conv2d")),
    "AdaLoRA": ("conv2d",),
    "LN tuning": ("embedding", *CONVOLUTIONS, "layer-norm"),
}
"""Sample, or label for all samples of a method -> on which other layers it works; everywhere else it is refused."""
UNMERGEABLE = {
    ("linear-no-bias", "LoRA-bias"): "adds a bias, but the base layer has no bias",
    ("linear-no-bias", "BEFT"): "adds a bias, but the base layer has no bias",
    **{(kind, "Lily"): "Lily mixes its experts by the inputs of each call" for kind in CASES},
}


def merge_refusal(kind: str, *samples: str) -> str | None:
    """Why one of some samples cannot be merged there."""
    names = [name for sample in samples for name in (sample, labels[sample])]
    return next((UNMERGEABLE[kind, name] for name in names if (kind, name) in UNMERGEABLE), None)


def merge(model: PeftModel, kind: str, *samples: str) -> bool:
    """Merges, or checks that it is refused where it is impossible."""
    refusal = merge_refusal(kind, *samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if refusal is None:
            model.merge_adapter()
            return True
        with pytest.raises(MergeError, match=refusal):
            model.merge_adapter()
    return False


def assert_merged(case: Case, found: Tensor, expected: Tensor) -> None:
    """Fails unless merging changed nothing but how the weight is rounded."""
    if case.quantized:
        assert float((found - expected).detach().abs().mean()) <= case.rounded
    else:
        assert_close(found, expected, depth=2, dtype=case.dtype)


def adapted(case: Case, sample: str, **more: Any) -> tuple[Net, PeftModel]:
    base = make(case)
    model = get_peft_model(base, config_of(sample, **more))
    randomise(base)
    return base, model.eval()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def stored_in(model: Any) -> list[Tensor]:
    """Copies of all tensors that the weight under test is stored in."""
    layer = model.target
    return [tensor.detach().clone() for tensor in layer.backend.tensors(layer.base_layer)]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def works(kind: str, sample: str) -> bool:
    """Whether a sample config has to work on a kind of layer."""
    own = next((WORKS_ON[name] for name in (sample, labels[sample]) if name in WORKS_ON), ())
    return kind in own or (kind in LINEAR and not (CASES[kind].quantized and labels[sample] in DENSE_ONLY))


PAIRS = [(kind, sample) for kind in CASES for sample in SAMPLES if works(kind, sample)]
REFUSED = [(kind, sample) for kind in CASES for sample in SAMPLES if not works(kind, sample)]
REPRESENTATIVES = [(kind, sample) for kind, sample in PAIRS if sample in ("LoRA-plain", "VeRA-r8", "LN tuning-norms")]
"""For what does not depend on the method: one, one whose layers share tensors, and one for what those do not adapt."""
READS_WEIGHT = {method.label for method in methods() if method.adapter_class.reads_weight}
STORED = [
    (kind, sample)
    for kind, sample in PAIRS
    if kind == "linear"
    or (kind, sample) in REPRESENTATIVES
    or (kind in ("nf4", "int8") and labels[sample] in READS_WEIGHT)
]
"""For what depends on the method's tensors, and on the kind of layer only where the method reads its weight."""
every_pair = pytest.mark.parametrize(("kind", "sample"), PAIRS)


def test_every_method_has_samples_and_works_somewhere() -> None:
    for method in methods():
        # These say nothing on layers, which are called without a model's inputs, or without adapters beside.
        if method.calls.context is not None or method.transforms_calls or not method.files.has_tensors:
            continue
        names = [f"{method.label}-{name}" for name in method.sample_configs]
        assert names, method.label
        assert all(any(name == sample for _, sample in PAIRS) for name in names), method.label


@pytest.mark.drawn(200)
@pytest.mark.parametrize(("kind", "sample"), REFUSED)
def test_what_does_not_work_is_refused_in_one_line(kind: str, sample: str) -> None:
    base = make(CASES[kind])
    before = weights_of(base)
    with pytest.raises(NbpeftError) as caught:
        get_peft_model(base, config_of(sample))
    assert "target" in str(caught.value) and "\n" not in str(caught.value)
    assert same(before, weights_of(base)) and manager_of(base) is None


@pytest.mark.drawn(250)
@every_pair
def test_identity_at_start(kind: str, sample: str) -> None:
    case = CASES[kind]
    base = make(case)
    x = case.batch()
    before = base(x)
    model = get_peft_model(base, config_of(sample)).eval()
    if case.repacked:  # where the library computes in bfloat16
        with model.disable_adapter():
            assert_close(model(x), before, depth=1, dtype=torch.bfloat16)
            before = model(x)
    coarser = torch.bfloat16 if (kind, labels[sample]) in STARTS_NEAR else case.dtype
    assert is_close(model(x), before, depth=2, dtype=coarser) == (labels[sample] not in STARTS_ELSEWHERE)


@pytest.mark.parametrize(("kind", "sample"), REPRESENTATIVES)
def test_failed_injection_leaves_the_model_as_it_was(kind: str, sample: str) -> None:
    case = CASES[kind]
    base = make(case)
    before, modules = weights_of(base), [type(m) for m in base.modules()]
    trainable = [name for name, p in base.named_parameters() if p.requires_grad]
    with pytest.raises(TargetError, match="Tanh"):
        get_peft_model(base, config_of(sample, target_modules=["target", "after"]))
    assert same(before, weights_of(base))
    assert modules == [type(m) for m in base.modules()]
    assert trainable == [name for name, p in base.named_parameters() if p.requires_grad]
    assert manager_of(base) is None


@pytest.mark.drawn(250)
@every_pair
def test_gradients_reach_every_adapter_parameter_and_no_other(kind: str, sample: str) -> None:
    case = CASES[kind]
    _, model = adapted(case, sample)
    model.train()
    model(case.batch()).square().sum().backward()
    adapter_parameters = {id(p) for p in model.manager.parameters("default")}
    for name, parameter in model.named_parameters():
        if id(parameter) in adapter_parameters:
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


@pytest.mark.drawn(250)
@every_pair
def test_merged_gives_what_forward_gave(kind: str, sample: str) -> None:
    case = CASES[kind]
    _, model = adapted(case, sample)
    x = case.batch()
    expected = model(x)
    if not merge(model, kind, sample):
        return
    assert_merged(case, model(x), expected)
    base = model.merge_and_unload()
    assert not any(isinstance(module, AdaptedLayer) for module in base.modules())
    assert_merged(case, base(x), expected)


@pytest.mark.drawn(250)
@every_pair
def test_unmerge_is_bit_equal(kind: str, sample: str) -> None:
    case = CASES[kind]
    base, model = adapted(case, sample)
    x = case.batch()
    expected, before, stored = model(x), weights_of(base), stored_in(base)
    if merge(model, kind, sample):
        model(x)
        model.unmerge_adapter()
    assert all(torch.equal(*pair) for pair in zip(stored, stored_in(base), strict=True))
    assert torch.equal(model(x), expected)
    if not case.quantized:
        assert same(before, weights_of(base))


@pytest.mark.parametrize(("kind", "sample"), STORED)
def test_save_remove_load_is_equal(kind: str, sample: str, tmp_path: Any) -> None:
    case = CASES[kind]
    base, model = adapted(case, sample)
    x = case.batch()
    expected = model(x)
    model.save_pretrained(tmp_path)
    plain = model.unload()
    assert manager_of(plain) is None and plain is base
    plain(x)  # which re-packs the weight again
    again = PeftModel.from_pretrained(plain, tmp_path)
    assert_close(again(x), expected)


def neighbours(kind: str) -> list[tuple[str, str]]:
    """Pairs of samples on a kind of layer, each method beside the next."""
    here = list(dict.fromkeys(sample for place, sample in PAIRS if place == kind))
    return list(zip(here, here[1:] + here[:1], strict=True))


beside = pytest.mark.parametrize(
    ("kind", "first", "second"), [(kind, *pair) for kind in CASES for pair in neighbours(kind)]
)


def two_adapters(case: Case, first: str, second: str) -> PeftModel:
    base, model = adapted(case, first)
    model.add_adapter("other", config_of(second))
    randomise(base)
    return model.eval()


@pytest.mark.drawn(100)
@beside
def test_two_active_adapters_in_either_order_are_equal(kind: str, first: str, second: str) -> None:
    case = CASES[kind]
    model = two_adapters(case, first, second)
    x = case.batch()
    model.set_adapter(["default", "other"])
    expected = model(x)
    model.set_adapter(["other", "default"])
    assert_close(model(x), expected, depth=3, dtype=case.dtype)
    if merge(model, kind, first, second):
        assert_merged(case, model(x), expected)


@pytest.mark.drawn(100)
@beside
@torch.no_grad()
def test_one_batch_is_served_row_by_row(kind: str, first: str, second: str) -> None:
    case = CASES[kind]
    model = two_adapters(case, first, second)
    x = case.batch()
    names = ["default", "other", "__base__"][: x.shape[0]]
    found = model(x, adapter_names=names)
    for row, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else model.use(name):
            expected = model(x[row : row + 1])[0]  # alone: what some methods add depends on the whole batch
        # A quantized layer rounds its input, and a method may change that instead of adding to the output.
        coarser = torch.bfloat16 if case.quantized else case.dtype
        assert_close(found[row], expected, depth=2, dtype=coarser, message=name)


@pytest.mark.drawn(150)
@every_pair
def test_equal_to_peft_for_the_same_weights(kind: str, sample: str, tmp_path: Any) -> None:
    case = CASES[kind]
    config = config_of(sample)
    if config.initialised_from_weight or not hasattr(peft.PeftType, method_of(config).peft_type):
        pytest.skip("peft has no such method, or initializes it from the weight anew when it loads (test_inits.py)")
    wrong = next((PEFT_IS_WRONG[kind, name] for name in (sample, labels[sample]) if (kind, name) in PEFT_IS_WRONG), "")
    if wrong:
        pytest.skip(f"peft {wrong}")
    own = {name: value for name, value in case.peft_config.items() if hasattr(config, name)}
    peft_type = method_of(config).peft_type
    their_config = peft.get_peft_config({**config.to_dict(), **own, "peft_type": peft_type})
    try:
        peft.get_peft_model(make(case), their_config)
    except (ValueError, TypeError, NotImplementedError) as error:
        assert "support" in str(error)
        pytest.skip("peft has the method not for this kind of layer")
    _, model = adapted(case, sample, **case.peft_config)
    x = case.batch()
    # In eval mode bitsandbytes rounds the input of 8-bit layers, but not that of a method that changes the weight.
    training = kind == "int8" and labels[sample] not in DRAWS
    expected = model.train(training)(x)
    model.save_pretrained(tmp_path)
    oracle = peft.PeftModel.from_pretrained(make_plain(case), tmp_path).train(training)
    if labels[sample] == "Polytropon":  # whose tasks a model without a task type does not hand on in peft
        found = oracle.base_model(x, task_ids=torch.zeros(len(x), dtype=torch.long))
    else:
        found = oracle(x)
    assert_close(found, expected, depth=2, dtype=case.dtype)


@pytest.mark.parametrize(("kind", "sample"), STORED)
def test_deepcopy_and_pickle_survive(kind: str, sample: str) -> None:
    case = CASES[kind]
    _, model = adapted(case, sample)
    x = case.batch()
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    with twin.disable_adapter():
        assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(restored(x), expected)
    assert torch.equal(copy.deepcopy(restored)(x), expected)
