"""``adapter_config.json`` against what peft writes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn

from nbpeft.checkpoint import config_text, config_to_save, parse_config
from nbpeft.engine.contract.adapter import AdapterConfig, TaskType
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.errors import ConfigError, CorruptCheckpointError, NbpeftError, UnknownMethodError
from nbpeft.model import get_peft_model
from tests.fuzz.corpus import CONFIGS
from tests.tiny_models import llama

FIELDS: list[dict[str, Any]] = [
    {},
    {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["v_proj", "q_proj"], "task_type": "CAUSAL_LM"},
    {"target_modules": r".*\.q_proj", "use_dora": True, "use_rslora": True, "bias": "lora_only"},
    {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.q_proj": 4}, "alpha_pattern": {"q_proj": 2}},
    {"target_modules": ["q_proj"], "exclude_modules": ["b", "a"], "modules_to_save": ["score"], "lora_bias": True},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers", "revision": "main"},
]


def as_sets(text: str) -> dict[str, Any]:
    fields = json.loads(text)
    return {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}


@pytest.mark.parametrize("fields", FIELDS, ids=range(len(FIELDS)))
def test_equals_what_peft_writes(fields: dict[str, Any], tmp_path: Path) -> None:
    peft.LoraConfig(**fields).save_pretrained(str(tmp_path))
    theirs = (tmp_path / "adapter_config.json").read_text()
    ours = config_text(LoraConfig(**fields))
    assert as_sets(ours) == as_sets(theirs)
    assert list(json.loads(ours)) == list(json.loads(theirs)), "the order of the fields"
    assert ours.splitlines()[1].startswith("  "), "two spaces"
    assert peft.LoraConfig.from_pretrained(str(tmp_path)).r == json.loads(ours)["r"]


@pytest.mark.parametrize("fields", FIELDS, ids=range(len(FIELDS)))
def test_round_trip(fields: dict[str, Any]) -> None:
    text = config_text(LoraConfig(**fields))
    config, unknown = parse_config(text)
    assert isinstance(config, LoraConfig)
    assert unknown == {}
    assert config_text(config) == text


def test_inference_mode_and_version() -> None:
    config = LoraConfig(peft_version="0.9.0")
    fields = json.loads(config_text(config, inference_mode=True))
    assert fields["inference_mode"] is True
    assert fields["peft_version"] == "0.9.0"
    assert "runtime_config" not in fields


def test_sets_come_out_sorted() -> None:
    config = LoraConfig().copy(target_modules={"c", "a", "b"})
    assert json.loads(config_text(config))["target_modules"] == ["a", "b", "c"]


def test_unknown_fields_are_kept_out() -> None:
    text = json.dumps({"peft_type": "LORA", "r": 4, "brand_new": {"x": 1}, "runtime_config": {}})
    config, unknown = parse_config(text)
    assert isinstance(config, LoraConfig)
    assert config.r == 4
    assert unknown == {"brand_new": {"x": 1}}


@pytest.mark.parametrize("how", CONFIGS)
def test_a_config_that_once_failed_is_refused_in_one_line(how: str) -> None:
    text, says = CONFIGS[how]
    with pytest.raises(NbpeftError, match=re.escape(says)) as caught:
        parse_config(text, "here.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 520


def test_a_value_that_is_no_json() -> None:
    with pytest.raises(ConfigError, match="rank_pattern"):
        config_text(LoraConfig().copy(rank_pattern={"a": object()}))


def test_auto_mapping_and_base_name_like_peft(tmp_path: Path) -> None:
    model = llama()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(str(tmp_path))
    saved = config_to_save(LoraConfig(target_modules=["q_proj"]), llama())
    theirs = as_sets((tmp_path / "adapter_config.json").read_text())
    assert as_sets(config_text(saved, inference_mode=True)) == theirs
    assert theirs["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    named = llama()
    named.name_or_path = "someone/tiny"
    assert config_to_save(LoraConfig(task_type="CAUSAL_LM"), named).base_model_name_or_path == "someone/tiny"
    assert config_to_save(LoraConfig(task_type="CAUSAL_LM"), named).auto_mapping is None


def test_all_linear_is_written_out_and_condensed_like_peft(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=4)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.save_pretrained(str(tmp_path))
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    bare = llama(num_hidden_layers=4)
    targets = [name for name, module in bare.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert len(targets) >= 20
    for wanted in ("all-linear", targets):
        config = LoraConfig(target_modules=wanted, task_type="CAUSAL_LM")
        saved = config_to_save(config, bare, targets=targets)
        assert isinstance(saved, LoraConfig)
        assert sorted(saved.target_modules or []) == sorted(theirs)
        assert config.target_modules == (wanted if isinstance(wanted, str) else set(wanted)), (
            "the caller's config stays as it is"
        )


def test_the_public_class_reads_and_writes(tmp_path: Path) -> None:
    LoraConfig(r=5, target_modules=["q_proj"]).save_pretrained(str(tmp_path / "new"))
    assert not json.loads((tmp_path / "new" / "adapter_config.json").read_text())["inference_mode"]
    config = AdapterConfig.from_pretrained(str(tmp_path / "new"))
    assert isinstance(config, LoraConfig)
    assert config.r == 5
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "new")).r == 5


def test_fields_make_a_config_of_their_method(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ignored the fields later_field"):
        config = AdapterConfig.from_peft_type(peft_type="LORA", r=3, later_field=7)
    assert isinstance(config, LoraConfig) and config.r == 3
    assert LoraConfig.from_peft_type(r=5) == LoraConfig(r=5)
    with pytest.raises(UnknownMethodError, match="LORB"):
        AdapterConfig.from_peft_type(peft_type="LORB")
    config.save_pretrained(str(tmp_path))
    fields = LoraConfig.from_json_file(tmp_path / "adapter_config.json")
    assert fields == peft.LoraConfig.from_json_file(str(tmp_path / "adapter_config.json"))
    assert AdapterConfig.from_peft_type(**fields) == config


def test_type_and_version_are_those_of_peft() -> None:
    ours, theirs = LoraConfig(), peft.LoraConfig()
    assert ours.peft_type == theirs.peft_type == ours.peft_type.value == "LORA"
    assert ours.peft_version == theirs.peft_version
    assert parse_config(config_text(ours))[0].to_dict() == ours.to_dict() == theirs.to_dict()


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", TaskType.CAUSAL_LM, peft.TaskType.CAUSAL_LM])
def test_types_and_tasks_are_written_as_peft_writes_them(task: Any, tmp_path: Path) -> None:
    """Notebooks name folders by them: a task that is given as a string stays one."""
    of_peft = peft.TaskType.CAUSAL_LM if isinstance(task, TaskType) else task
    ours, theirs = LoraConfig(task_type=task), peft.LoraConfig(task_type=of_peft)

    def written(config: Any) -> list[str]:
        return [f"{config.peft_type} {config.task_type}", str(config.peft_type), repr(config.task_type)]

    assert written(ours) == written(theirs)
    ours.save_pretrained(str(tmp_path))
    assert written(AdapterConfig.from_pretrained(str(tmp_path))) == written(peft.PeftConfig.from_pretrained(tmp_path))
    assert written(get_peft_model(llama(), ours).peft_config["default"]) == written(theirs)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
@pytest.mark.parametrize("names", [["v_proj", "q_proj", "v_proj"], None])
def test_names_are_kept_as_peft_keeps_them(field: str, names: Sequence[str] | None) -> None:
    ours, theirs = (getattr(library(**{field: names}), field) for library in (LoraConfig, peft.LoraConfig))
    if field == "modules_to_save" and names is not None:
        assert ours == ["v_proj", "q_proj"], "in the order given, without repeats"
    else:
        assert ours == theirs
    written = json.loads(config_text(LoraConfig(**{field: names})))[field]
    assert written == (None if names is None else ours if isinstance(ours, list) else sorted(ours))


def test_a_file_that_is_too_large_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "LORA"}' + " " * 8_000_000)
    with pytest.raises(CorruptCheckpointError, match="more than 8,000,000 bytes"):
        AdapterConfig.from_pretrained(str(tmp_path))


def test_a_model_of_many_experts_may_be_written_out(tmp_path: Path) -> None:
    paths = [f"model.layers.{layer}.mlp.experts.{e}.up_proj" for layer in range(60) for e in range(384)]
    LoraConfig(target_modules=paths, rank_pattern={path: 4 for path in paths}).save_pretrained(str(tmp_path))
    assert LoraConfig.from_pretrained(str(tmp_path)).target_modules == set(paths)  # type: ignore[attr-defined]


def test_messages_stay_short_whatever_is_given() -> None:
    for fields in (
        {"r": "x" * 100_000},
        {"bias": "x" * 100_000},
        {"rank_pattern": {"x" * 100_000: 0}},
        {"init_lora_weights": "x" * 100_000},
        {"target_modules": "[" + "x" * 10_000},
        {"task_type": "x" * 100_000},
        {"peft_type": "x" * 100_000},
        {"modules_to_save": [1] * 10_000},
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config(json.dumps({"peft_type": "LORA", **fields}))
        assert len(str(caught.value)) <= 500
