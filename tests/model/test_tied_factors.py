"""One pair of factors on an embedding and the modules that share its weight (``ensure_weight_tying``)."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GemmaConfig,
    GemmaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import nbpeft
from nbpeft.engine.injection.plan import plan
from nbpeft.errors import AdapterError, CheckpointError, ConfigError, HotSwapError, MergeError
from nbpeft.memory import forecast
from nbpeft.model import AdapterPool, merge_to_folder, reduce_intruder_dimension
from tests.closeness import assert_approximates, assert_close, differ
from tests.tiny_models import LLAMA, VOCABULARY, config, gpt2, llama, logits, randomize, same_state, state, tokens

EMBED, HEAD, QUERY = "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"
RANK, WIDTH = 4, 32
TARGETS: list[Any] = [
    ["embed_tokens"],
    ["lm_head", "q_proj"],
    ["embed_tokens", "lm_head"],
    ".*embed_tokens",
    ".*(q_proj|lm_head)",
]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def settings(**changes: Any) -> dict[str, Any]:
    return {"r": RANK, "lora_alpha": 8, "target_modules": ["embed_tokens"], "ensure_weight_tying": True, **changes}


def tied_llama() -> Any:
    return llama(tie_word_embeddings=True)


def tied(base: nn.Module | None = None, name: str = "default", **changes: Any) -> Any:
    """A model with such an adapter that changes what it gives."""
    made = nbpeft.get_peft_model(base or tied_llama(), nbpeft.LoraConfig(**settings(**changes)), name).eval()
    randomize(made, name)
    return made


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)).eval()


def bart() -> Any:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "d_model": WIDTH}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    settings = BartConfig(vocab_size=VOCABULARY, scale_embedding=True, **sizes, **ids)
    return BartForConditionalGeneration(settings).eval()


def gemma() -> Any:
    torch.manual_seed(0)
    sizes = {key: value for key, value in LLAMA.items() if key != "attention_bias"}
    return GemmaForCausalLM(GemmaConfig(head_dim=8, pad_token_id=0, **sizes)).eval()


def resized() -> Any:
    model = tied_llama()
    torch.manual_seed(1)
    model.resize_token_embeddings(VOCABULARY + 3)
    return model


def test_a_state_dict_shares_the_graph_only_where_it_is_asked_to() -> None:
    model = tied()
    keys = [key for key in model.state_dict() if "lm_head.lora_" in key]
    assert len(keys) == 2
    assert not any(model.state_dict()[key].requires_grad for key in keys)
    assert all(model.state_dict(keep_vars=True)[key].requires_grad for key in keys)


@torch.no_grad()
def answers(model: Any) -> Tensor:
    """Logits, also of a model with an encoder."""
    ids = tokens()
    return model(input_ids=ids, labels=ids).logits


def both_ways(make: Callable[[], Any], folder: Path, targets: Any) -> Any:
    """A model whose adapter gives the same in PEFT, which reads its file, and whose file is read here."""
    ours = tied(make(), target_modules=targets)
    expected = answers(ours)
    assert differ(expected, answers(make()))
    ours.save_pretrained(folder / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), folder / "ours").eval()
    assert_close(answers(theirs), expected)
    theirs.save_pretrained(folder / "theirs")
    back = nbpeft.PeftModel.from_pretrained(make(), folder / "theirs").eval()
    assert torch.equal(answers(back), expected)
    return ours, theirs, back


def one_weight(model: Any) -> bool:
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return ends[0].weight is ends[1].weight


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_it_computes_and_is_saved_as_in_peft(targets: Any, tmp_path: Path) -> None:
    ours, theirs, back = both_ways(tied_llama, tmp_path, targets)
    names = [set(load_file(tmp_path / which / "adapter_model.safetensors")) for which in ("ours", "theirs")]
    # PEFT leaves the frozen embedding out where it named it by its path itself.
    assert {name for name in names[0] if "lora" in name} == {name for name in names[1] if "lora" in name}
    assert set(ours.base_model.targeted_module_names) == set(theirs.base_model.targeted_module_names)
    assert ours.state_dict().keys() == theirs.state_dict().keys() == back.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    back.load_state_dict(theirs.state_dict())
    assert torch.equal(answers(back), answers(ours))


@pytest.mark.parametrize("make", [resized, gemma, t5, bart])
def test_other_models_compute_as_in_peft(make: Callable[[], Any], tmp_path: Path) -> None:
    ours, _, _ = both_ways(make, tmp_path, ["embed_tokens"])
    before, expected = state(ours), answers(ours)
    ours.merge_adapter()
    assert_close(answers(ours), expected)
    ours.unmerge_adapter()
    assert same_state(state(ours), before)
    merged = ours.merge_and_unload()
    assert_close(answers(merged), expected)
    assert one_weight(merged) and merged.config.tie_word_embeddings


@pytest.mark.parametrize(("make", "name"), [(gpt2, "wte"), (t5, "shared"), (bart, "shared")])
def test_any_name_ties_and_is_saved_so_that_peft_ties_too(make: Any, name: str, tmp_path: Path) -> None:
    """PEFT knows embed_tokens and lm_head alone, and leaves the head as it is for other names."""
    both_ways(make, tmp_path, [name])
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**settings(target_modules=[name])))
    assert len(theirs.base_model.targeted_module_names) == 1


def test_one_pair_is_counted_saved_and_trained() -> None:
    ours = tied(target_modules=["lm_head"])
    theirs = peft.get_peft_model(tied_llama(), peft.LoraConfig(**settings(target_modules=["lm_head"])))
    count = RANK * (VOCABULARY + WIDTH)
    assert ours.get_nb_trainable_parameters()[0] == count
    assert theirs.get_nb_trainable_parameters()[0] == 2 * count  # of one storage
    assert plan(tied_llama(), nbpeft.LoraConfig(**settings())).parameter_count == count
    assert [tuple(parameter.shape) for parameter in ours.manager.parameters("default")] == [
        (RANK, VOCABULARY),
        (WIDTH, RANK),
    ]
    estimates = [
        forecast(tied_llama(), nbpeft.LoraConfig(**settings(**changes)), max_length=8)
        for changes in ({}, {"ensure_weight_tying": False})
    ]
    needed, of_the_table = ({part.name: part.byte_count for part in one.parts} for one in estimates)
    assert needed["adapters"] == of_the_table["adapters"] and needed["optimizer"] == of_the_table["optimizer"]
    table, head = ours.get_input_embeddings(), ours.get_output_embeddings()
    assert torch.equal(head.lora_A["default"].weight, table.lora_embedding_B["default"].T)
    assert head.lora_B["default"].weight.data_ptr() == table.lora_embedding_A["default"].data_ptr()
    assert head.r == table.r == {"default": RANK} and head.adapter_layer_names == table.adapter_layer_names
    x = torch.randn(3, WIDTH)
    assert_close(
        head.lora_B["default"](head.lora_A["default"](x)) * head.scaling["default"],
        x @ head.get_delta_weight("default").T,
    )


def batch() -> dict[str, Tensor]:
    ids = tokens()
    return {"input_ids": ids, "labels": ids}


def train(model: Any, optimizer: torch.optim.Optimizer) -> Tensor:
    """Losses of eight steps."""
    losses = []
    for _ in range(8):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def trained_like(theirs: Any, optimizer_class: Any, **options: Any) -> list[Tensor]:
    """Losses of our adapter and of PEFT's from the same start."""
    ours = tied().train()
    nbpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    losses = []
    for model in (ours, theirs):
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        losses.append(train(model, optimizer_class(learning, **options)))
    return losses


class Reference(nn.Module):
    """A model whose one weight of embeddings and head is W + s (B A)^T in all uses, by torch alone."""

    def __init__(self, base: Any, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__()
        self.base = [base.requires_grad_(False)]
        self.lora_A, self.lora_B = nn.Parameter(lora_A.detach().clone()), nn.Parameter(lora_B.detach().clone())

    def forward(self, **inputs: Any) -> Any:
        (base,) = self.base
        shared = base.get_input_embeddings().weight
        weight = shared + 2.0 * (self.lora_B @ self.lora_A).T
        uses = [name for name, own in base.named_parameters(remove_duplicate=False) if own is shared]
        return torch.func.functional_call(base, dict.fromkeys(uses, weight), kwargs=inputs, tie_weights=False)


def started(library: Any) -> Any:
    torch.manual_seed(5)
    return library.get_peft_model(tied_llama(), library.LoraConfig(**settings())).train()


def test_it_learns_from_all_uses_as_in_peft() -> None:
    ours, peers = trained_like(started(peft), torch.optim.SGD, lr=0.05, momentum=0.5)
    assert ours[0] - ours[-1] > 0.1
    assert_close(ours, peers)


def test_adam_takes_one_step_where_peft_takes_two() -> None:
    """PEFT's head has parameters of its own on the same memory: Adam moves that twice, each time by its own moments."""
    theirs = started(peft)
    table = theirs.get_input_embeddings()
    reference = Reference(tied_llama(), table.lora_embedding_A["default"], table.lora_embedding_B["default"])
    expected = train(reference, torch.optim.AdamW(reference.parameters(), lr=0.01))
    ours, peers = trained_like(theirs, torch.optim.AdamW, lr=0.01)
    assert_close(ours, expected)
    assert (peers - expected).abs().max() > 1e-2


def test_an_encoder_a_decoder_and_a_head_teach_one_pair() -> None:
    """PEFT has a pair for each of the two embeddings, and for the head one on a table that nothing calls."""
    theirs = peft.get_peft_model(t5(), peft.LoraConfig(**settings()))
    assert theirs.get_nb_trainable_parameters()[0] == 4 * RANK * (VOCABULARY + WIDTH)
    ours = tied(t5()).train()
    reference = Reference(t5(), *ours.manager.parameters("default"))
    for model in (ours, reference):
        model.eval()(**batch()).loss.backward()
    gradients = [parameter.grad for parameter in ours.manager.parameters("default")]
    assert_close(gradients, [parameter.grad for parameter in reference.parameters()])


def test_a_new_one_starts_at_the_base_model_as_in_peft() -> None:
    starts = {}
    for library in (nbpeft, peft):
        torch.manual_seed(0)
        made = library.get_peft_model(tied_llama(), library.LoraConfig(**settings(r=64)))
        assert torch.equal(logits(made.eval()), logits(tied_llama()))
        starts[library] = made.get_input_embeddings().lora_embedding_B["default"].detach()
    ours, theirs = starts[nbpeft], starts[peft]
    assert ours.abs().max() <= 1 / WIDTH**0.5 and theirs.abs().max() <= 1 / WIDTH**0.5
    assert_approximates(ours.std(), theirs.std(), 0.1)


@pytest.mark.parametrize("init", [False, "gaussian"])
def test_other_inits_start_as_in_peft(init: bool | str) -> None:
    stds = []
    for library in (nbpeft, peft):
        torch.manual_seed(0)
        made = library.get_peft_model(tied_llama(), library.LoraConfig(**settings(r=64, init_lora_weights=init)))
        table = made.get_input_embeddings()
        stds.append([float(table.lora_embedding_A["default"].std()), float(table.lora_embedding_B["default"].std())])
    assert_approximates(stds[0], stds[1], 0.1)


def test_a_merged_model_stays_tied_where_pefts_is_another_one(tmp_path: Path) -> None:
    ours = tied(target_modules=["embed_tokens", "q_proj"])
    before, expected = state(ours), logits(ours)
    ours.merge_adapter()
    assert one_weight(ours.get_base_model())
    assert_close(logits(ours), expected)
    ours.unmerge_adapter()
    assert same_state(state(ours), before) and torch.equal(logits(ours), expected)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(tied_llama()))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tied_llama(), tmp_path).eval()
    assert differ(logits(theirs.merge_and_unload()), expected)  # it adds the delta twice
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = ours.merge_and_unload()
    assert_close(logits(merged), expected)
    assert one_weight(merged) and merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    assert one_weight(again) and torch.equal(logits(again), logits(merged))


def test_merging_into_folders_keeps_one_weight(tmp_path: Path) -> None:
    ours = tied(target_modules=["embed_tokens", "q_proj"])
    expected = logits(ours)
    ours.save_pretrained(tmp_path / "adapter")
    tied_llama().save_pretrained(tmp_path / "base")
    live = merge_to_folder(ours, None, tmp_path / "live")
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    merge_to_folder(ours, None, tmp_path / "beside", base=tmp_path / "base")
    assert live.errors is not None and live.errors.full_precision < 1e-6
    for folder in ("live", "files", "beside"):
        again = type(tied_llama()).from_pretrained(tmp_path / folder).eval()
        assert_close(logits(again), expected)
        assert one_weight(again) and again.config.tie_word_embeddings
        assert f"{HEAD}.weight" not in load_file(tmp_path / folder / "model.safetensors")


def test_it_lives_beside_adapters_of_one_end() -> None:
    ours = tied()
    for number, (name, targets) in enumerate({"table": ["embed_tokens"], "head": ["lm_head"]}.items(), 1):
        ours.add_adapter(name, config(target_modules=targets))
        randomize(ours, name, seed=number)
    ours.manager.copy("default", "twin")
    randomize(ours, "twin", seed=9)
    alone = {name: (ours.set_adapter(name), logits(ours))[1] for name in ("default", "table", "head", "twin")}
    ours.set_adapter("default")
    before = state(ours)
    for names, stays in (
        (["default", "table"], False),
        (["head", "default"], False),
        (["default", "twin"], True),
        (["twin", "head", "table"], False),
    ):
        ours.base_model.set_adapter(names)
        expected = logits(ours)
        ours.merge_adapter()
        assert one_weight(ours.get_base_model()) == stays
        assert_close(logits(ours), expected)
        ours.unmerge_adapter()
        assert same_state(state(ours), before)
    ours.set_adapter("default")
    with torch.no_grad():
        mixed = ours(input_ids=tokens(), adapter_names=["default", "head"]).logits
    assert_close(mixed[0], alone["default"][0])
    assert_close(mixed[1], alone["head"][1])
    for name in ("head", "table", "twin"):
        ours.delete_adapter(name)
    assert torch.equal(logits(ours), alone["default"])
    bare = ours.unload()
    assert same_state(state(bare), state(tied_llama())) and one_weight(bare)


def test_none_is_added_while_a_merge_parts_the_weights(tmp_path: Path) -> None:
    tied().save_pretrained(tmp_path)
    ours = nbpeft.get_peft_model(tied_llama(), config(target_modules=["embed_tokens"]))
    ours.merge_adapter()
    before = state(ours)
    for add in (
        lambda: ours.add_adapter("tied", nbpeft.LoraConfig(**settings())),
        lambda: ours.load_adapter(tmp_path, "tied"),
    ):
        with pytest.raises(MergeError, match=r"'default' merged, so model\.embed_tokens is not tied at the moment"):
            add()
    assert same_state(state(ours), before)
    ours.unmerge_adapter()
    ours.load_adapter(tmp_path, "tied")
    ours.set_adapter("tied")
    assert torch.equal(logits(ours), logits(tied()))


def test_other_strengths_on_the_layers_part_them_when_merged() -> None:
    ours = tied()
    ours.get_output_embeddings().scaling["default"] = 0.5
    expected = logits(ours)
    ours.merge_adapter()
    assert_close(logits(ours), expected)
    assert not one_weight(ours.get_base_model())


def test_copies_have_a_pair_of_their_own(tmp_path: Path) -> None:
    ours = tied()
    expected = logits(ours)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(logits(twin), expected)
        randomize(twin, seed=4)
        assert torch.equal(logits(ours), expected)
        assert torch.equal(
            twin.get_output_embeddings().lora_A["default"].weight,
            twin.get_input_embeddings().lora_embedding_B["default"].T,
        )
    ours.manager.copy("default", "twin")
    ours.manager.rename("default", "old")
    ours.set_adapter("twin")
    assert torch.equal(logits(ours), expected)
    ours.save_pretrained(tmp_path, selected_adapters=["twin"])
    empty = nbpeft.PeftModel.from_pretrained(tied_llama(), tmp_path / "twin", low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(empty), expected)
    gathered = nbpeft.get_peft_model_state_dict(ours, state_dict=ours.state_dict(), adapter_name="twin")
    assert same_state(gathered, nbpeft.get_peft_model_state_dict(ours, adapter_name="twin"))


@pytest.mark.parametrize("make", [t5, tied_llama])
def test_a_file_whose_pairs_differ_is_read_as_it_is(make: Callable[[], Any], tmp_path: Path) -> None:
    """PEFT parts the factors when a model is moved to another device or dtype, and those of two embeddings always."""
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**settings())).eval()
    theirs.to(torch.float64).to(torch.float32)
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="although its config has ensure_weight_tying: they are loaded untied"):
        ours = nbpeft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert_close(answers(ours), answers(theirs))
    assert ours.get_nb_trainable_parameters()[0] == 0 and not ours.peft_config["default"].ensure_weight_tying
    ours.save_pretrained(tmp_path / "again")
    again = nbpeft.PeftModel.from_pretrained(make(), tmp_path / "again").eval()
    assert torch.equal(answers(again), answers(ours))


LACKING: list[Any] = [
    (tied_llama, ["lm_head"]),
    (tied_llama, ["embed_tokens"]),
    (tied_llama, ["lm_head.lora_A", "embed_tokens.lora_embedding_A"]),
    (tied_llama, ["lm_head.lora_B", "embed_tokens.lora_embedding_B"]),
    (t5, ["shared", "lm_head"]),
]


@pytest.mark.parametrize(("make", "lacks"), LACKING)
def test_one_copy_of_each_tensor_in_a_file_is_enough(make: Any, lacks: list[str], tmp_path: Path) -> None:
    ours = tied(make(), init_lora_weights=True)
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    halves = {key: value for key, value in tensors.items() if not any(name in key for name in lacks)}
    assert 0 < len(halves) < len(tensors)
    save_file({key: value.contiguous() for key, value in halves.items()}, tmp_path / "adapter_model.safetensors")
    loaded = nbpeft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert loaded.peft_config["default"].ensure_weight_tying
    assert torch.equal(answers(loaded), answers(ours))
    if make is tied_llama:
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
        assert_close(answers(theirs), answers(ours))


def test_tensors_that_differ_do_not_go_into_one_pair() -> None:
    ours = tied()
    before, tensors = state(ours), nbpeft.get_peft_model_state_dict(ours)
    other = {key: value + 1 if "lora_B" in key else value for key, value in tensors.items()}
    with pytest.raises(CheckpointError, match=r"different tensors for lm_head and model\.embed_tokens, which share"):
        nbpeft.set_peft_model_state_dict(ours, other)
    assert same_state(state(ours), before)
    head = {key: value * 2 for key, value in tensors.items() if "lm_head.lora" in key}
    nbpeft.set_peft_model_state_dict(ours, head)
    table = ours.get_input_embeddings()
    assert torch.equal(table.lora_embedding_B["default"].T, head["base_model.model.lm_head.lora_A.weight"])


@pytest.mark.parametrize("ends", [("input",), ("output",), ("input", "output"), ("output", "input")])
@pytest.mark.parametrize("changes", [{}, {"ensure_weight_tying": False, "target_modules": ["lm_head", "embed_tokens"]}])
def test_layers_merge_one_by_one(ends: tuple[str, ...], changes: dict[str, Any]) -> None:
    ours = tied(**changes)
    before, expected = state(ours), logits(ours)
    layers = [getattr(ours, f"get_{end}_embeddings")() for end in ends]
    for layer in layers:
        layer.merge()
        assert_close(logits(ours), expected)
    for layer in reversed(layers):
        layer.unmerge()
        assert_close(logits(ours), expected)
    assert same_state(state(ours), before) and one_weight(ours.get_base_model())


def test_a_hook_on_a_factor_of_the_head_runs() -> None:
    ours = tied()
    expected, seen = logits(ours), []
    factor = ours.get_output_embeddings().lora_A["default"]
    handle = factor.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert_close(logits(ours), expected)
    assert seen == [(*tokens().shape, RANK)]
    handle.remove()


@pytest.mark.parametrize("kind", ["exact", "cat"])
def test_combinations_are_factors_apart(kind: str) -> None:
    ours = tied()
    ours.manager.copy("default", "twin")
    randomize(ours, "twin", seed=2)
    ours.base_model.set_adapter(["default", "twin"])
    ours.manager.set_scale("twin", -2.0)
    expected = logits(ours)
    ours.manager.set_scale("twin", 1.0)
    ours.add_weighted_adapter(["default", "twin"], [1.0, -2.0], "sum", combination_type=kind)
    ours.set_adapter("sum")
    assert_close(logits(ours), expected)
    assert not ours.peft_config["sum"].ensure_weight_tying


def test_it_is_converted_to_factors_apart() -> None:
    ours = tied()
    made, tensors = nbpeft.convert_to_lora(ours, RANK)
    other = nbpeft.get_peft_model(tied_llama(), made).eval()
    nbpeft.set_peft_model_state_dict(other, tensors)
    assert_close(logits(other), logits(ours))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "share one weight, and adapters of DoRA cannot share tensors; remove all of them"),
    ({"init_lora_weights": "eva"}, "works with init_lora_weights True, False or 'gaussian' on .*, not 'eva'"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "True, False or 'gaussian' on .*, not 'loftq'"),
    ({"rank_pattern": {"lm_head": 2}}, "rank_pattern sets 4 and 2 for them; name both in it or neither"),
    ({"alpha_pattern": {"embed_tokens": 1}}, "alpha_pattern sets 1 and 8 for them; name both in it or neither"),
    ({"exclude_modules": ["lm_head"]}, "exclude_modules excludes lm_head; remove all of them from the targets"),
    ({"target_modules": ["lm_head"], "exclude_modules": ["embed_tokens"]}, "exclude_modules excludes .*embed_tokens"),
    ({"lora_bias": True}, "lora_bias=True is not supported for Embedding"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_one_pair_changes_nothing(changes: dict[str, Any], message: str) -> None:
    base = tied_llama()
    before = state(base)
    with pytest.raises(ConfigError, match=message):
        nbpeft.get_peft_model(base, nbpeft.LoraConfig(**settings(**changes)))
    assert same_state(state(base), before)


def test_patterns_that_name_both_ends_work(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"embed_tokens": 2, "lm_head": 2}, "alpha_pattern": {"embed_tokens": 3, "lm_head": 3}}
    ours = tied(**patterns)
    expected = logits(ours)
    assert ours.get_nb_trainable_parameters()[0] == 2 * (VOCABULARY + WIDTH)
    assert_close(logits(ours.merge_and_unload()), expected)


def test_one_pair_is_neither_swapped_pooled_nor_remade(tmp_path: Path) -> None:
    ours = tied()
    ours.save_pretrained(tmp_path)
    before = state(ours)
    with pytest.raises(HotSwapError, match=r"lm_head: adapter 'default' uses the factors of another layer"):
        nbpeft.hotswap_adapter(ours, tmp_path, "default")
    with pytest.raises(HotSwapError, match=r"lm_head uses the tensors of another layer .*: it cannot be swapped"):
        nbpeft.prepare_model_for_compiled_hotswap(ours, target_rank=8)
    pooled = nbpeft.get_peft_model(tied_llama(), config())
    with pytest.raises(AdapterError, match=r"has the same tensors on lm_head and model.embed_tokens"):
        AdapterPool(pooled, 10, adapters={"tied": tmp_path}).set_adapter("tied")
    with pytest.raises(AdapterError, match="one pair of factors on lm_head and the embedding"):
        reduce_intruder_dimension(ours, "default", "less", logging_sink=None)
    for layer in (ours.get_input_embeddings(), ours.get_output_embeddings()):
        with pytest.raises(
            ConfigError, match=r"has the same tensors on .* and another layer: delete it and add it again instead"
        ):
            layer.update_layer("default", 2, 4, nbpeft.LoraConfig(**settings()))
    assert same_state(state(ours), before)


def test_the_pair_goes_with_the_last_layer_that_uses_it() -> None:
    ours = tied(target_modules=["embed_tokens", "q_proj"])
    embedding, head = ours.get_input_embeddings(), ours.get_output_embeddings()
    before = state(ours)
    with pytest.raises(AdapterError, match="'default' on lm_head uses this layer's tensors: delete it there"):
        embedding.delete_adapter("default")
    assert same_state(state(ours), before)
    head.delete_adapter("default")
    assert not torch.equal(logits(ours), answers(tied_llama()))
    embedding.delete_adapter("default")
    assert [*ours.manager.layers[QUERY].r] == ["default"] and EMBED not in ours.manager.weights("default").adapters


def test_a_layer_of_its_own_is_remade_and_the_pair_is_reset() -> None:
    ours = tied(target_modules=["embed_tokens", "q_proj"])
    layer = ours.manager.layers[QUERY]
    layer.update_layer("default", 2, 4, nbpeft.LoraConfig(**settings()))
    assert layer.r == {"default": 2}
    for end in (ours.get_output_embeddings(), ours.get_input_embeddings()):
        end.reset_lora_parameters("default", True)
    for place in ours.manager.layers.values():
        place.reset_lora_parameters("default", True)
    assert torch.equal(logits(ours), logits(tied_llama()))


@pytest.mark.parametrize(
    ("tying", "targets", "message"),
    [
        (False, ["embed_tokens", "lm_head"], "no tied modules were found in the model"),
        (True, ["q_proj"], "no tied modules are added"),
        (True, "all-linear", "no tied modules are added"),
    ],
)
def test_nothing_comes_of_it_elsewhere_as_in_peft(tying: bool, targets: Any, message: str) -> None:
    counts = []
    for library in (nbpeft, peft):
        with pytest.warns(UserWarning, match=message):
            made = library.get_peft_model(
                llama(tie_word_embeddings=tying), library.LoraConfig(**settings(target_modules=targets))
            )
        counts.append(made.get_nb_trainable_parameters())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("fields", [{"target_modules": ["lm_head", "embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
def test_a_config_that_says_untied_is_believed_as_in_peft(fields: dict[str, Any]) -> None:
    fields = {"target_modules": ["q_proj"], **fields}
    counts = []
    for library in (nbpeft, peft):
        base = tied_llama()
        base.config.tie_word_embeddings = False
        with pytest.warns(UserWarning, match="no tied modules were found in the model"):
            made = library.get_peft_model(base, library.LoraConfig(**settings(**fields)))
        counts.append(made.get_nb_trainable_parameters())
    assert counts[0] == counts[1]


def test_all_linear_layers_are_those_without_a_head_of_any_name() -> None:
    base = tied_llama()
    base.get_output_embeddings = lambda: None
    ours = nbpeft.get_peft_model(base, nbpeft.LoraConfig(**settings(target_modules="all-linear")))
    assert not {EMBED, HEAD} & ours.manager.layers.keys()
