"""Shipping: folders that engines load as they are, all or nothing, and what is told before."""

from __future__ import annotations

import ast
import contextlib
import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import nbpeft
from nbpeft.errors import AdapterError, CheckpointError, ConfigError, MergeError
from nbpeft.model import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_compiled_hotswap,
    quantize_model,
)
from nbpeft.names import SERVING_ENGINES, STORED_TYPES
from nbpeft.session.results.training import ExportResult
from nbpeft.shipping import ENGINES, ship
from tests.closeness import assert_close
from tests.effort import drawn
from tests.faults.harness import traced
from tests.faults.test_interrupts import interrupted_at
from tests.shipping.support import VOCABULARY, adapted, base_model, ids, tokenizer
from tests.tiny_models import logits, randomize, same_state, state

UNEVEN: dict[str, Any] = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def test_the_names_for_completion_are_those_of_the_engines() -> None:
    assert tuple(ENGINES) == SERVING_ENGINES
    types = {
        kind for engine in ENGINES.values() for form in (engine.adapter, engine.merged) if form for kind in form.types
    }
    assert types == set(STORED_TYPES)


@pytest.mark.parametrize("engine", ["vllm", "transformers", "peft"])
@pytest.mark.parametrize("fields", [{}, UNEVEN], ids=["plain", "uneven"])
def test_a_folder_gives_the_same_answers_in_peft(engine: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**fields)
    expected = logits(model, ids())
    done = ship(model, engine=engine, to=tmp_path / "served")
    assert done.written and done.verdict.as_adapter
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path / "served").eval()
    assert_close(logits(loaded, ids()), expected)
    size = sum(
        t.nbytes for t in safetensors.torch.load_file(tmp_path / "served" / "adapter_model.safetensors").values()
    )
    assert done.byte_count == size


def test_transformers_loads_the_folder(tmp_path: Path) -> None:
    model = adapted()
    ship(model, engine="transformers", to=tmp_path / "served")
    base = base_model()
    base.load_adapter(str(tmp_path / "served"))
    assert_close(logits(base.eval(), ids()), logits(model, ids()))


@pytest.mark.parametrize(
    ("name", "told"),
    [("", "the base model is made in memory: load"), ("folder", "the base model is from a local folder, whose path")],
)
def test_a_base_without_a_hub_id_is_told_for_what_it_is(name: str, told: str, tmp_path: Path) -> None:
    model = adapted()
    model.config._name_or_path = str(tmp_path) if name else ""
    notes = ship(model, engine="peft", dry_run=True).notes
    assert sum(told in note for note in notes) == sum("base model is" in note for note in notes) == 1


def test_vllm_reads_one_rank_and_one_alpha(tmp_path: Path) -> None:
    done = ship(adapted(**UNEVEN), engine="vllm", to=tmp_path / "served")
    config = config_of(tmp_path / "served")
    assert config["r"] == 4 and not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    tensors = safetensors.torch.load_file(tmp_path / "served" / "adapter_model.safetensors")
    assert {min(t.shape) for t in tensors.values()} == {4}
    assert "its ranks 2, 4 are all padded with zeros to 4" in " ".join(done.notes)
    assert "--max-lora-rank 8 " in done.commands[0] and f"sql={tmp_path / 'served'}" in done.commands[0]


def test_one_rank_is_left_as_it_is(tmp_path: Path) -> None:
    ship(adapted(use_rslora=True), engine="vllm", to=tmp_path / "served")
    config = config_of(tmp_path / "served")
    assert config["use_rslora"] and config["r"] == 4 and config["target_modules"] == ["down_proj", "k_proj", "q_proj"]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_started_in_the_weights_becomes_plain(init: str, tmp_path: Path) -> None:
    model = get_peft_model(base_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init), "sql")
    with torch.no_grad():
        for parameter in model.manager.parameters("sql"):
            parameter.add_(0.1)
    done = ship(model.eval(), engine="peft", to=tmp_path / "served")
    assert config_of(tmp_path / "served")["init_lora_weights"] is True
    tensors = safetensors.torch.load_file(tmp_path / "served" / "adapter_model.safetensors")
    assert done.byte_count == sum(tensor.nbytes for tensor in tensors.values())
    assert "plain LoRA of rank 8" in " ".join(done.notes)
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path / "served").eval()
    assert_close(logits(loaded, ids()), logits(model, ids()))


def test_padding_for_hot_swapping_is_not_shipped(tmp_path: Path) -> None:
    model = adapted()
    expected = logits(model, ids())
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    ship(model, engine="vllm", to=tmp_path / "served")
    done = ship(model, engine="llama.cpp", to=tmp_path / "gguf")
    assert config_of(tmp_path / "served")["r"] == 4
    assert done.byte_count == ship(adapted(), engine="llama.cpp", dry_run=True).byte_count
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path / "served").eval()
    assert_close(logits(loaded, ids()), expected)


@pytest.mark.parametrize("quantized", ["nf4", "int8"])
def test_an_adapter_on_quantized_weights_is_shipped_with_a_note(quantized: str, tmp_path: Path) -> None:
    base = base_model()
    quantize_model(base, bits=4 if quantized == "nf4" else 8)
    model = adapted(base)
    done = ship(model, engine="llama.cpp", to=tmp_path / "served")
    assert "trained on quantized weights" in " ".join(done.notes)
    merged = ship(model, engine="llama.cpp", merged=True, quantize="f32", tokenizer=tokenizer(), to=tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(merged.folder, gguf_file="model.gguf").eval()
    assert float((logits(loaded, ids()) - logits(model, ids())).abs().mean()) < 0.05


def test_a_scale_is_part_of_what_is_written(tmp_path: Path) -> None:
    model = adapted()
    model.manager.set_scale("sql", 0.5)
    done = ship(model, engine="vllm", to=tmp_path / "served")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "served").eval()
    assert_close(logits(loaded, ids()), logits(model, ids()))
    assert "its scale of 0.5 is included" in " ".join(done.notes)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"trainable_token_indices": [3]}], ids=["dora", "token rows"])
def test_a_scale_that_cannot_be_written_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**fields)
    model.manager.set_scale("sql", 0.5)
    with pytest.raises(AdapterError, match=r"its scale of 0\.5 cannot be written with .*set the scale back to 1"):
        ship(model, engine="peft", to=tmp_path / "served")
    model.manager.set_scale("sql", 1.0)
    assert ship(model, engine="peft", to=tmp_path / "served").written


def test_names_and_folders_are_quoted_for_a_shell(tmp_path: Path) -> None:
    model = adapted(name="my {sql}; rm")
    place = tmp_path / "a folder"
    commands = [
        ship(model, engine=engine, to=place, dry_run=True).commands[0] for engine in ("vllm", "llama.cpp", "peft")
    ]
    assert f"'my {{sql}}; rm={place}'" in commands[0] and f"'{place}/adapter.gguf'" in commands[1]
    done = ship(model, engine="vllm", to=place)
    assert (
        done.written
        and ship(model, engine="ollama", base="x", to=place, dry_run=True).commands[1] == "ollama run my-sql-rm"
    )


HOSTILE = "a b; $(touch x) `y` 'z' \"q\" | & > \n *"


@pytest.mark.parametrize("name", [HOSTILE, "-rf"])
def test_every_command_is_the_words_that_are_meant(name: str) -> None:
    """Whatever the base, the adapter and the folder are called."""
    base, adapter = base_model(), "my adapter; rm"
    base.name_or_path = base.config._name_or_path = name
    model, word = adapted(base, name=adapter), f"./{name}" if name.startswith("-") else name
    lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{adapter}={name}"]
    expected: dict[tuple[str, bool], list[list[str]]] = {
        ("vllm", False): [["vllm", "serve", word, *lora]],
        ("vllm", True): [["vllm", "serve", word]],
        ("llama.cpp", False): [["llama-server", "-m", "BASE_MODEL.gguf", "--lora", f"{word}/adapter.gguf"]],
        ("llama.cpp", True): [["llama-server", "-m", f"{word}/model.gguf"]],
        ("ollama", False): [
            ["ollama", "create", "my-adapter-rm", "-f", f"{word}/Modelfile"],
            ["ollama", "run", "my-adapter-rm"],
        ],
    }
    for (engine, merged), words in expected.items():
        options: dict[str, Any] = {"base": "x"} if engine == "ollama" else {"tokenizer": tokenizer()}
        shipment = ship(model, engine=engine, to=name, merged=merged, dry_run=True, **options)
        assert [shlex.split(command) for command in shipment.commands] == words
    for engine in ("peft", "transformers"):
        for line in ship(model, engine=engine, to=name, dry_run=True).commands:
            ast.parse(line)
    _, _, command = str(ExportResult(HOSTILE, "sql", ())).rpartition("; run it with: accelerate launch ")
    assert shlex.split(command) == [HOSTILE]


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_merged_model_is_loaded_by_transformers(engine: str, tmp_path: Path) -> None:
    model = adapted(use_dora=True)
    done = ship(model, engine=engine, merged=True, quantize="f32", tokenizer=tokenizer(), to=tmp_path / "served")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "served").eval()
    assert_close(logits(loaded, ids()), logits(model, ids()))
    assert (tmp_path / "served" / "tokenizer.json").is_file()
    assert done.byte_count == sum(t.nbytes for t in loaded.state_dict().values())


OBSTACLES: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA on 6 layers"),
    "copies": ({"modules_to_save": ["lm_head"]}, "modules_to_save: 'lm_head'"),
    "token rows": ({"trainable_token_indices": [3]}, "on 1 layer "),
    "bias": ({"bias": "all", "target_modules": ["q_proj"]}, "bias of the model|biases of the model"),
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, "its own bias on 2 layers"),
    "rank": ({"r": 513}, r"rank 513 \(at most 512\)"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_vllm_does_not_take_is_refused_with_a_remedy(case: str, tmp_path: Path) -> None:
    fields, what = OBSTACLES[case]
    model = adapted(base_model("Llama", attention_bias=True), **fields)
    with pytest.raises(AdapterError, match=what) as caught:
        ship(model, engine="vllm", to=tmp_path / "served")
    assert "vLLM 0.26 cannot load the adapter" in str(caught.value)
    assert "merge it into the base" in str(caught.value) and "(merged=…)" in str(caught.value)
    assert not list(tmp_path.iterdir())
    planned = ship(model, engine="vllm", merged=True, dry_run=True)
    assert planned.verdict.as_merged and not planned.verdict.as_adapter


def test_what_acts_on_some_tokens_only_ships_as_it_is_or_not_at_all(tmp_path: Path) -> None:
    model = adapted(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    assert ship(model, engine="peft", to=tmp_path / "served").written
    for merged, why in ((False, "aLoRA on .* layers"), (True, "aLoRA does not support merging")):
        with pytest.raises(AdapterError, match=why):
            ship(model, engine="vllm", merged=merged, to=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_shared_embeddings_are_refused_and_can_be_merged(tmp_path: Path) -> None:
    model = adapted(base_model("Llama3"), target_modules=["embed_tokens", "q_proj"])
    for engine in ("vllm", "llama.cpp"):
        with pytest.raises(AdapterError, match=r"'model.embed_tokens', whose weight is tied to the other embedding"):
            ship(model, engine=engine, to=tmp_path / "served")


LOW_RANK: dict[str, Any] = {
    "AdaLoRA": nbpeft.AdaLoraConfig(init_r=4, target_modules=["q_proj", "down_proj"], total_step=9, tinit=0, tfinal=1),
    "DeLoRA": nbpeft.DeloraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "VB-LoRA": nbpeft.VBLoRAConfig(r=4, num_vectors=8, vector_length=16, target_modules=["q_proj", "down_proj"]),
}


@pytest.mark.parametrize("name", LOW_RANK)
def test_methods_that_add_a_product_of_two_matrices_become_plain(name: str, tmp_path: Path) -> None:
    model = get_peft_model(base_model(), LOW_RANK[name].copy(task_type="CAUSAL_LM"), "sql").eval()
    randomize(model, "sql")
    done = ship(model, engine="vllm", to=tmp_path / "served")
    assert any(f"{name} is written as equivalent plain LoRA of rank 4" in note for note in done.notes)
    assert config_of(tmp_path / "served")["peft_type"] == "LORA"
    assert done.byte_count == sum(
        t.nbytes for t in safetensors.torch.load_file(tmp_path / "served" / "adapter_model.safetensors").values()
    )
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path / "served").eval()
    assert_close(logits(loaded, ids()), logits(model, ids()))


PROMPTS: dict[str, Any] = {
    "prompt tuning": nbpeft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix tuning": nbpeft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_goes_to_peft_alone(name: str, tmp_path: Path) -> None:
    model = get_peft_model(base_model(), PROMPTS[name].copy(), "sql")
    for engine in ("vllm", "llama.cpp", "ollama", "transformers"):
        what = rf"{name}, 4 trained tokens in front of the input \(serve it with PEFT, or train LoRA\)$"
        with pytest.raises(AdapterError, match=what):
            ship(model, engine=engine, base="llama3.2:1b" if engine == "ollama" else None, to=tmp_path / "refused")
        with pytest.raises(AdapterError, match="cannot load the merged model: an adapter that cannot be merged"):
            ship(model, engine=engine, merged=True, to=tmp_path / "refused")
    ship(model, engine="peft", to=tmp_path / "served")
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path / "served").eval()
    assert_close(loaded(ids()).logits, model.eval()(ids()).logits)
    assert not (tmp_path / "refused").exists()


def test_what_a_lora_can_stand_for_ships_once_it_is_converted(tmp_path: Path) -> None:
    model = get_peft_model(base_model(), nbpeft.OFTConfig(oft_block_size=8, target_modules=["q_proj"]), "sql")
    remedy = r"OFT on 2 layers \(merge it into the base, or convert it to LoRA: save_as_lora\(DIR, model, rank=64\)\)"
    with pytest.raises(AdapterError, match=remedy):
        ship(model, engine="vllm", to=tmp_path / "served")
    randomize(model, "sql")
    nbpeft.save_as_lora(tmp_path / "lora", model, 64, "sql")
    ship(PeftModel.from_pretrained(base_model(), tmp_path / "lora"), engine="vllm", to=tmp_path / "served")
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path / "served").eval()
    assert_close(logits(loaded, ids()), logits(model, ids()))


def test_other_methods_and_other_programs(tmp_path: Path) -> None:
    model = get_peft_model(base_model(), nbpeft.IA3Config(task_type="CAUSAL_LM"), "sql")
    with pytest.raises(AdapterError, match=r"\(IA\)³ on 6 layers"):
        ship(model, engine="vllm", to=tmp_path / "served")
    ship(model, engine="peft", to=tmp_path / "served")
    assert config_of(tmp_path / "served")["peft_type"] == "IA3"
    with pytest.raises(AdapterError, match="a LlamaForCausalLM, which is not a component of a pipeline"):
        ship(adapted(), engine="diffusers", to=tmp_path / "other")
    with pytest.raises(AdapterError, match=r"PEFT 0.21.2 cannot load the merged model: .* does not load merged models"):
        ship(adapted(), engine="peft", merged=True, to=tmp_path / "other")


def test_wrong_arguments_are_one_line(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ConfigError, match=r"no engine is called 'vlm'.*Did you mean 'vllm'\?"):
        ship(model, engine="vlm")
    with pytest.raises(ConfigError, match=r"quantize is 'q4_k'; the types for llama.cpp are f32, f16, bf16, q8_0"):
        ship(model, engine="llama.cpp", quantize="q4_k")
    with pytest.raises(ConfigError, match="quantize is 'f16'; the types for vLLM are none"):
        ship(model, engine="vllm", quantize="f16")
    with pytest.raises(ConfigError, match="base requires Ollama"):
        ship(model, engine="vllm", base="llama3.2")
    with pytest.raises(ConfigError, match=r"includes its tokenizer: give it \(tokenizer=…\)"):
        ship(model, engine="llama.cpp", merged=True)
    with pytest.raises(AdapterError, match="has no adapters to ship"):
        ship(base_model(), engine="vllm")
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"name the one to ship \(name=…\): sql, other"):
        ship(model, engine="vllm")
    model.merge_adapter(["sql"])
    with pytest.raises(MergeError):
        ship(model, "sql", engine="vllm", to=tmp_path / "served")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = ship(adapted(), engine="vllm", to=tmp_path / "served", dry_run=True)
    assert not done.written and done.files and not list(tmp_path.iterdir())


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    place = tmp_path / "served"
    ship(adapted(), engine="vllm", to=place)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(CheckpointError, match=r"already exists; choose another folder, or replace it \(replace=…\)"):
        ship(adapted(r=8), engine="vllm", to=place)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    ship(adapted(r=8), engine="vllm", to=place, replace=True)
    assert config_of(place)["r"] == 8 and [path.name for path in tmp_path.iterdir()] == ["served"]
    (place / "sub").mkdir()
    with pytest.raises(CheckpointError, match="not just a folder of files"):
        ship(adapted(), engine="vllm", to=place, replace=True)


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, model = tmp_path / "served", adapted()
    ship(model, engine="vllm", to=place)
    before, weights = {path.name: path.read_bytes() for path in place.iterdir()}, state(model)

    def broken(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nbpeft.checkpoint.folder.write_tensors", broken)
    with pytest.raises(CheckpointError, match="no space left"):
        ship(model, engine="vllm", to=place, replace=True)
    with pytest.raises(CheckpointError, match="no space left"):
        ship(model, engine="vllm", to=tmp_path / "new" / "served")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["served"] and same_state(state(model), weights)


def test_interrupted_anywhere_the_folder_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    place, models = tmp_path / "served", (adapted(r=2), adapted(r=4))
    for model in models:
        ship(model, engine="vllm", to=place, replace=True)
    visits: Counter[tuple[str, int]] = Counter()
    with traced(lambda file, line: visits.update([(file, line)])):
        ship(models[1], engine="vllm", to=place, replace=True)
    lines = [spot for spot in visits if spot[0].endswith(("shipment.py", "formats.py", "atomic.py", "staging.py"))]
    assert len(lines) > 100
    for spot in drawn(sorted(lines), quick=8):
        ship(models[0], engine="vllm", to=place, replace=True)
        with contextlib.suppress(KeyboardInterrupt), interrupted_at((*spot, 1)):
            ship(models[1], engine="vllm", to=place, replace=True)
        tensors = safetensors.torch.load_file(place / "adapter_model.safetensors")
        assert {min(tensor.shape) for tensor in tensors.values()} == {config_of(place)["r"]}, spot
        assert f"| `r` | `{config_of(place)['r']}` |" in (place / "README.md").read_text()


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp", "transformers"])
@pytest.mark.parametrize("merged", [False, True])
def test_no_path_of_this_machine_is_written(engine: str, merged: bool, tmp_path: Path) -> None:
    secret = tmp_path / "home-of-somebody"
    base_model().save_pretrained(secret)
    model = adapted(AutoModelForCausalLM.from_pretrained(secret))
    done = ship(model, engine=engine, merged=merged, tokenizer=tokenizer(), to=tmp_path / "served")
    written = b"".join(path.read_bytes() for path in (tmp_path / "served").iterdir())
    assert b"home-of-somebody" not in written and str(tmp_path).encode() not in written
    assert merged or engine == "llama.cpp" or "path is not saved" in " ".join(done.notes)
    assert model.config.vocab_size == VOCABULARY
