"""Drawn configs of LoRA on drawn tiny models, and whether nbpeft does with each what PEFT does.

``python -m tests.engine.methods.lora.drawn_configs FIRST LAST`` tries chunks of draws and prints every difference,
where the test stops at the first.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import nbpeft
from nbpeft.errors import NbpeftError
from tests.tiny_models import experts_of, gpt2, llama, mixture

CHUNK = 50
"""Draws of one seed."""
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97}
TOLERANCE = 2e-4
"""Of the largest number, or of 1."""
ROUNDED = 20
"""As many times that for OLoRA and PiSSA, which add and subtract a part of the weight, here in another order than in
PEFT, and this part is many times the weight where alpha is large."""


class ConvNet(nn.Module):
    """A picture goes through convolutions of one and two dimensions, with groups, strides and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {
                "stem": nn.Conv2d(3, 8, 3, stride=2, padding=1),
                "point": nn.Conv2d(8, 8, 1, bias=False),
                "wide": nn.Conv2d(8, 12, (1, 3), padding=(0, 1), dilation=1),
            }
        )
        self.line = nn.Conv1d(12, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        x = pixel_values
        for layer in self.features.values():
            x = torch.tanh(layer(x))
        x = self.norm(torch.tanh(self.line(x.flatten(2))).mean(-1))
        logits = self.head(x)
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


@dataclass(frozen=True)
class Architecture:
    """A tiny model and what configs may name in it.

    Attributes:
        make: builds it.
        inputs: of its forward.
        names: ends of the paths of layers.
        patterns: over whole paths.
        lists: names of lists of layers.
        saved: modules to train as a whole.
        embedding: end of the path of the input embedding.
        parameters: bare parameters.
        task_type: of a config for it.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    names: tuple[str, ...]
    patterns: tuple[str, ...]
    lists: tuple[str, ...] = ("layers",)
    saved: tuple[str, ...] = ("lm_head",)
    embedding: str = ""
    parameters: tuple[str, ...] = ()
    task_type: str | None = "CAUSAL_LM"


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
        return model

    return made


def _text() -> dict[str, Tensor]:
    ids = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def _classes() -> dict[str, Tensor]:
    return {"input_ids": _text()["input_ids"], "labels": torch.tensor([0, 2])}


def _pictures() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "labels": torch.tensor([1, 4])}


_SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        _seeded(lambda: llama(**_SMALL)),
        _text,
        (
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
            "self_attn.q_proj",
            "embed_tokens",
        ),
        (r".*\.(q|v)_proj", r"model\.layers\.\d+\.mlp\..*", r".*1\.self_attn\.[qk]_proj", r".*proj"),
        embedding="embed_tokens",
        saved=("lm_head", "model.norm", "o_proj", "embed_tokens", "input_layernorm"),
    ),
    "tied_llama": Architecture(
        _seeded(lambda: llama(**_SMALL, tie_word_embeddings=True, attention_bias=False)),
        _text,
        ("q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"),
        (r".*\.(q|v)_proj", r".*mlp.*proj"),
        embedding="embed_tokens",
        saved=("lm_head", "model.norm", "embed_tokens"),
    ),
    "gpt2": Architecture(
        _seeded(lambda: gpt2(n_embd=16, n_head=2)),
        _text,
        ("c_attn", "c_proj", "c_fc", "attn.c_proj", "wte"),
        (r".*attn\.c_.*", r"transformer\.h\.[01]\.mlp\.c_fc"),
        lists=("h",),
        embedding="wte",
        saved=("lm_head", "ln_f", "c_fc", "wte"),
    ),
    "opt": Architecture(
        _seeded(
            lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32))
        ),
        _text,
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        (r".*\.fc\d", r".*self_attn\..*"),
        embedding="embed_tokens",
        saved=("final_layer_norm", "fc1"),
    ),
    "bert": Architecture(
        _seeded(lambda: BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=24, num_labels=3))),
        _classes,
        ("query", "key", "value", "dense", "attention.output.dense", "word_embeddings", "classifier"),
        (r".*attention.*(query|value)", r".*output\.dense"),
        lists=("layer",),
        embedding="word_embeddings",
        saved=("classifier", "pooler", "LayerNorm"),
        task_type="SEQ_CLS",
    ),
    "t5": Architecture(
        _seeded(
            lambda: T5ForConditionalGeneration(
                T5Config(
                    vocab_size=97, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
                )
            )
        ),
        _text,
        ("q", "k", "v", "o", "wi", "wo", "SelfAttention.q"),
        (r".*decoder.*\.(q|v)", r".*EncDecAttention\..*", r".*wi"),
        lists=("block",),
        embedding="shared",
        saved=("final_layer_norm", "wo"),
        task_type="SEQ_2_SEQ_LM",
    ),
    "neox": Architecture(
        _seeded(lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=24, max_position_embeddings=32))),
        _text,
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        (r".*dense.*", r".*attention\..*"),
        embedding="embed_in",
        saved=("lm_head", "final_layer_norm"),
    ),
    "bloom": Architecture(
        _seeded(lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2))),
        _text,
        ("query_key_value", "dense", "dense_h_to_4h", "word_embeddings"),
        (r".*dense.*", r".*self_attention\..*"),
        lists=("h",),
        embedding="word_embeddings",
        saved=("ln_f", "dense"),
    ),
    "qwen3_moe": Architecture(
        _seeded(lambda: mixture("qwen3_moe", num_experts=3, hidden_size=16, num_attention_heads=2)),
        _text,
        ("q_proj", "v_proj", "o_proj"),
        (r".*\.(q|v)_proj", r".*self_attn.*proj"),
        embedding="embed_tokens",
        saved=("lm_head", "model.norm"),
        parameters=tuple(experts_of("qwen3_moe")),
    ),
    "mixtral": Architecture(
        _seeded(lambda: mixture("mixtral", hidden_size=16, num_attention_heads=2)),
        _text,
        ("q_proj", "v_proj", "k_proj"),
        (r".*\.(q|v)_proj", r".*self_attn.*proj"),
        embedding="embed_tokens",
        saved=("lm_head",),
        parameters=(*experts_of("mixtral"), "gate.weight"),
    ),
    "convolutions": Architecture(
        _seeded(ConvNet),
        _pictures,
        ("stem", "point", "wide", "line", "head", "features.stem"),
        (r"features\..*", r".*(wide|line|head)"),
        lists=("features",),
        saved=("norm", "head", "stem"),
        task_type=None,
    ),
}


@functools.cache
def _original(name: str) -> nn.Module:
    return ARCHITECTURES[name].make()


def base(name: str) -> Any:
    """A model of an architecture, the same each time."""
    return copy.deepcopy(_original(name))


@dataclass(frozen=True)
class Case:
    """A config on an architecture."""

    architecture: str
    fields: dict[str, Any] = field(hash=False)

    def config(self, library: Any) -> Any:
        """The config; its values are copied, since PEFT changes what it is given."""
        return library.LoraConfig(**copy.deepcopy(self.fields))

    def close(self, found: Tensor, wanted: Tensor) -> bool:
        """Whether numbers are the same but for how they were rounded."""
        if not wanted.numel():
            return True
        most = TOLERANCE * (ROUNDED if self.fields["init_lora_weights"] in ("olora", "pissa") else 1)
        return float((found - wanted).abs().amax()) <= most * max(1.0, float(wanted.abs().amax()))


_RANKS = st.sampled_from([1, 2, 4, 6])
_ALPHAS = st.sampled_from([1, 2, 8, 16, 3.5])


def _some(choices: tuple[str, ...], least: int = 1, most: int = 3) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(choices), min_size=least, max_size=most, unique=True)


@st.composite
def cases(draw: Any) -> Case:
    """A strategy over architectures and the fields of ``LoraConfig``."""

    def rarely(strategy: Any, times: int = 4, default: Any = None) -> Any:
        """What the strategy draws, once in so many times."""
        return draw(strategy) if draw(st.integers(1, times)) == 1 else default

    name = draw(st.sampled_from(sorted(ARCHITECTURES)))
    kind = ARCHITECTURES[name]
    fields: dict[str, Any] = {"r": draw(_RANKS), "lora_alpha": draw(_ALPHAS), "task_type": kind.task_type}
    fields["target_modules"] = draw(
        st.one_of(
            _some(kind.names, 1, 4),
            _some(kind.names, 1, 2),
            st.sampled_from(kind.patterns),
            # PEFT resolves strings against old names of a mixture's experts, and takes these along.
            st.just("all-linear") if not kind.parameters else st.sampled_from(kind.patterns),
            st.just(None),
        )
    )
    if kind.parameters and draw(st.booleans()):
        fields["target_parameters"] = draw(_some(kind.parameters))
        fields["target_modules"] = draw(st.one_of(_some(kind.names, 0, 2), st.sampled_from(kind.patterns)))
    named = (*kind.names, *kind.patterns)
    fields["use_rslora"] = draw(st.booleans())
    fields["use_dora"] = rarely(st.just(True), default=False)
    fields["bias"] = rarely(st.sampled_from(["all", "lora_only"]), 3, "none")
    fields["lora_bias"] = rarely(st.just(True), 8, False)
    fields["fan_in_fan_out"] = rarely(st.just(True), 6, False)
    fields["init_lora_weights"] = draw(st.sampled_from([True, True, False, "gaussian", "orthogonal", "olora", "pissa"]))
    fields["exclude_modules"] = rarely(st.one_of(_some(kind.names, 1, 2), st.sampled_from(kind.patterns)), 5)
    fields["rank_pattern"] = rarely(st.dictionaries(st.sampled_from(named), _RANKS, max_size=2), 3, {})
    fields["alpha_pattern"] = rarely(st.dictionaries(st.sampled_from(named), _ALPHAS, max_size=2), 3, {})
    if not isinstance(fields["target_modules"], str) or draw(st.integers(1, 8)) == 1:
        fields["layers_to_transform"] = rarely(st.sampled_from([0, 1, [0], [1, 0], [1]]), 3)
        lists = (*kind.lists, *kind.lists, "layers")
        if fields["layers_to_transform"] is not None or draw(st.integers(1, 20)) == 1:
            fields["layers_pattern"] = rarely(st.one_of(st.sampled_from(lists), _some(kind.lists)), 2)
    fields["modules_to_save"] = rarely(_some(kind.saved, 1, 2), 3)
    tokens = st.lists(st.integers(0, 96), min_size=1, max_size=3, unique=True)
    if kind.embedding:
        by_name = st.dictionaries(st.just(kind.embedding), tokens, min_size=1, max_size=1)
        fields["trainable_token_indices"] = rarely(st.one_of(tokens, by_name), 5)
    # With layers_to_transform PEFT adapts a head tied to an embedding that it does not adapt; embeddings of other names
    # than this it does not tie, and those of an encoder and a decoder have factors apart.
    can_tie = kind.embedding in ("", "embed_tokens") and fields.get("layers_to_transform") is None
    fields["ensure_weight_tying"] = can_tie and rarely(st.just(True), 10, False)
    return Case(name, {key: value for key, value in fields.items() if value is not None})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of either library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What a function gives, or what it raises."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def outputs(model: Any, architecture: str) -> Tensor:
    """The logits in evaluation mode."""
    with torch.no_grad():
        found: Tensor = model.eval()(**ARCHITECTURES[architecture].inputs()).logits
    return found


def step(model: Any, architecture: str) -> float:
    """One step of gradient descent on what is trainable; the loss before it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model.eval()(**ARCHITECTURES[architecture].inputs()).loss
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(0.1 * gradient)
    return float(loss.detach())


def trained_count(model: Any) -> int:
    """Number of values that are trained; PEFT has two parameters for the memory of tied factors."""
    return sum({p.data_ptr(): p.numel() for p in model.parameters() if p.requires_grad}.values())


def stir(model: Any) -> None:
    """Moves everything trainable of PEFT's model away from where it starts."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def same(case: Case, found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Fails where two sets of tensors are not the same."""
    assert sorted(found) == sorted(wanted), f"{what}: {sorted(found.keys() ^ wanted.keys())}"
    for key, value in wanted.items():
        assert found[key].shape == value.shape, f"{what}: {key} {found[key].shape} {value.shape}"
        assert case.close(found[key].float(), value.float()), f"{what}: {key}"


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """What an adapter's file holds."""
    found = load_file(folder / "adapter_model.safetensors")
    # With bias="all" PEFT writes biases of copied modules a second time, under names that nothing reads.
    unread = [".modules_to_save.", ".original_module."]
    if json.loads((folder / "adapter_config.json").read_text())["ensure_weight_tying"]:
        unread.append(".base_layer.weight")  # PEFT leaves a tied embedding out where the head alone was named
    return {key: value for key, value in found.items() if not any(part in key for part in unread)}


def compare(case: Case, folder: Path) -> str:
    """Does all with both libraries; says which way it ended.

    Raises:
        AssertionError: they differ.
    """
    with quiet():
        name = case.architecture
        theirs, their_error = attempt(lambda: peft.get_peft_model(base(name), case.config(peft)))
        ours, own_error = attempt(lambda: nbpeft.get_peft_model(base(name), case.config(nbpeft)))
        if own_error is not None and not isinstance(own_error, NbpeftError):
            raise own_error
        if their_error is not None:
            return "both refuse" if own_error is not None else f"only PEFT refuses: {_short(their_error)}"
        if own_error is not None:
            assert any(re.search(reason, str(own_error)) for reason in REFUSED), f"only nbpeft refuses: {own_error}"
            return f"refused with a reason: {_short(own_error)}"
        counts = [trained_count(model) for model in (ours, theirs)]
        if case.fields["init_lora_weights"] is not False:
            plain = outputs(base(name), name)
            start, their_error = attempt(lambda: outputs(theirs, name))
            assert case.close(outputs(ours, name), plain), "outputs at the start"
            if their_error is not None:
                return f"PEFT cannot run: {_short(their_error)}"
            if not case.close(start, plain):
                return "PEFT does not start at the base"
        _, their_error = attempt(lambda: theirs.save_pretrained(folder / "start"))
        if their_error is not None:
            return f"PEFT cannot save: {_short(their_error)}"
        ours.save_pretrained(folder / "own_start")
        first, own_first = tensors_in(folder / "start"), tensors_in(folder / "own_start")
        assert sorted(first) == sorted(own_first), f"keys: {sorted(first.keys() ^ own_first.keys())}"
        assert {key: value.shape for key, value in first.items()} == {k: v.shape for k, v in own_first.items()}, (
            "shapes"
        )
        assert counts[0] == counts[1], f"trainable: {counts}"
        if case.fields["init_lora_weights"] in ("olora", "pissa"):
            same(case, own_first, first, "start")
        same_settings(folder / "own_start", folder / "start")
        stir(theirs)
        expected = outputs(theirs, name)
        theirs.save_pretrained(folder / "theirs")
        return _after(case, folder, theirs, expected)


def _after(case: Case, folder: Path, theirs: Any, expected: Tensor) -> str:
    """Loading both ways, a step, and merging."""
    name = case.architecture
    again, error = attempt(lambda: peft.PeftModel.from_pretrained(base(name), folder / "theirs"))
    if error is not None:
        return f"PEFT cannot load its own: {_short(error)}"
    its_own_is_right = case.close(outputs(again, name), expected)
    ours = nbpeft.PeftModel.from_pretrained(base(name), folder / "theirs", is_trainable=True)
    found = outputs(ours, name)
    if not its_own_is_right:
        return "PEFT's file does not bring its model back" + (
            "" if case.close(found, expected) else ", nor does nbpeft"
        )
    assert case.close(found, expected), "PEFT's file"
    losses = step(ours, name), step(theirs, name)
    assert abs(losses[0] - losses[1]) < 1e-4 * max(1, losses[1]), f"losses {losses}"
    ours.save_pretrained(folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    same(case, tensors_in(folder / "ours"), tensors_in(folder / "theirs"), "after a step")
    expected = outputs(theirs, name)
    assert case.close(outputs(ours, name), expected), "outputs after a step"
    back = peft.PeftModel.from_pretrained(base(name), folder / "ours")
    assert case.close(outputs(back, name), expected), "own file in PEFT"
    merged, error = attempt(lambda: theirs.merge_and_unload())
    if error is not None:
        return f"PEFT cannot merge: {_short(error)}"
    own = ours.merge_and_unload()
    same_merged = outputs(merged, name)
    if not case.close(same_merged, expected):
        assert case.close(outputs(own, name), expected), "merged, where PEFT is wrong"
        return "PEFT's merged model gives something else"
    assert case.close(outputs(own, name), expected), "merged"
    same(case, {k: v for k, v in own.state_dict().items()}, dict(merged.state_dict()), "merged weights")
    return "equal"


REFUSED = (
    # PEFT starts an embedding as init_lora_weights=True does, whatever was asked for.
    r"init_lora_weights='(olora|pissa|orthogonal)' works on linear layers only",
    # PEFT trains both and saves one: the other is gone with the file.
    r"already adapted or trained as a whole and cannot be in trainable_token_indices too",
    # PEFT takes those of its inits that read a weight where the parameter happens to be called weight.
    r"\(target_parameters\) does not work with init_lora_weights='(olora|pissa|orthogonal)'",
    # PEFT ties factors of another rank or strength, what is excluded, and DoRA, whose norms differ.
    r"^ensure_weight_tying",
)
"""What nbpeft alone refuses, and why."""
_APART = ("base_model_name_or_path", "peft_version", "auto_mapping", "inference_mode", "revision", "runtime_config")


def same_settings(own: Path, theirs: Path) -> None:
    """Fails where two config files do not say the same."""
    found, wanted = (json.loads((place / "adapter_config.json").read_text()) for place in (own, theirs))
    for key, value in wanted.items():
        if key in _APART:
            continue
        if key == "target_modules" and isinstance(found.get(key), str) and isinstance(value, list):
            continue  # of a mixture: see ``cases``
        if key in ("target_modules", "modules_to_save") and found["ensure_weight_tying"]:
            continue  # PEFT names the embedding for a head that is tied to it, and we what was asked for
        # PEFT adds the head of a classifier to modules_to_save once more where it is named already.
        values = [sorted(set(one)) if isinstance(one, list) else one for one in (found.get(key) or None, value or None)]
        assert values[0] == values[1], f"adapter_config.json: {key} is {values[0]!r}, in PEFT {values[1]!r}"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:110]


def each(number: int, count: int, use: Callable[[Case], None]) -> None:
    """Calls a function with the draws of a seed.

    Args:
        number: the seed.
        count: how many.
        use: what is called.
    """

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def draw(case: Case) -> None:
        use(case)

    draw()


def main(first: int, last: int) -> None:
    """Tries chunks and prints every difference, and what came of all."""
    found: Counter[str] = Counter()

    def use(case: Case) -> None:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[compare(case, Path(folder))] += 1
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                found["DIFFERENT"] += 1
                where = f"{place.filename[-30:]}:{place.lineno}"
                print(f"DIFFERENT {type(error).__name__} {str(error)[:200]} [{where}] {case}", flush=True)

    for number in range(first, last):
        each(number, CHUNK, use)
        print(f"chunk {number} done: {sum(found.values())} draws", flush=True)
    for outcome, count in found.most_common():
        print(f"{count:5} {outcome}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
