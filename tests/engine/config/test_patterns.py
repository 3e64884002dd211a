"""Regular expressions of configs: the usual ones pass, those that could take forever are refused at once."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nbpeft.engine.config.module_paths import PatternTable
from nbpeft.engine.config.patterns import ENDING, LAYER_INDEX, WHOLE, check_patterns
from nbpeft.engine.config.targets import Matcher
from nbpeft.engine.methods.lora.config import LoraConfig
from nbpeft.errors import ConfigError

USUAL = (
    r".*decoder.*(SA|EA).*(q_proj|v_proj)$",
    r"^(?!.*vision_tower).*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$",
    r"(\w+\.)*q_proj",
    r"(?:[^.]+\.)+(q|v)_proj",
    r".*\.layers\.\d+\..*\.(q|v)_proj",
    r"model\.layers\.(1[0-9]|2[0-7])\.(self_attn|mlp)\.\w+_proj",
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|merger).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|k_proj|v_proj|up_proj)))",
    r"(.*)(self_attn)(.*)(q_proj)(.*)",
    r"layers\.\d{1,2}\..{1,30}q_proj",
    r"(?i:Q_PROJ)|é.*",
    r".*(?<=self_attn\.)q_proj",
)
ENDLESS = (
    r"(\w+\.?)+!",
    r"(a+)+b",
    r"(a|a)*b",
    r"(.|\w)*z",
    r"(.*)*x",
    r"((ab)*)*c",
    r"(\w+\s?)*$",
    r"([a-z_]+)*$",
    r"(x+x+)+y",
    r"(?:a?){30}a{30}",
    r"(?=(a+)+b)a",
    r"(?i)([A-Z]+)*$",
    r".*.*.*.*.*.*x",
    r"\w+\w+\w+\w+\w+$",
    r"(.*)\1",
    r"((a{1,30}){1,30}){1,30}x",
)


@pytest.mark.parametrize("pattern", USUAL)
@pytest.mark.parametrize("around", [WHOLE, ENDING, LAYER_INDEX])
def test_usual_expressions_pass(pattern: str, around: str) -> None:
    check_patterns([("target_modules", pattern, around)])


@pytest.mark.parametrize("pattern", ENDLESS)
def test_what_could_take_for_ever_is_refused_unmatched(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"^target_modules: matching .* could take forever") as caught:
        LoraConfig(target_modules=pattern)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "fields",
    [
        {"exclude_modules": r"(a+)+b"},
        {"rank_pattern": {r"(a+)+b": 3}},
        {"alpha_pattern": {r"(a+)+b": 3}},
        {"layers_pattern": r"(a+)+b", "layers_to_transform": [0]},
        {"rank_pattern": {rf"n{number}.*x": 3 for number in range(5000)}},
    ],
)
def test_all_fields_with_expressions_are_asked(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="could take forever"):
        LoraConfig(**{"target_modules": ["q"], **fields})


@pytest.mark.parametrize("pattern", ["a{99999999999}", "(" * 20_000, "[", "a" * 60_000, "*"])
def test_what_cannot_be_read_is_one_short_line(pattern: str) -> None:
    with pytest.raises(ConfigError, match="regular expression") as caught:
        LoraConfig(target_modules=pattern)
    assert len(str(caught.value)) < 300


def test_flags_inside_an_ending_are_refused_with_the_config() -> None:
    with pytest.raises(ConfigError, match="rank_pattern is not a regular expression: global flags"):
        LoraConfig(target_modules=["q"], rank_pattern={"(?i)Q": 3})


def test_thousands_of_whole_paths_are_looked_up() -> None:
    patterns = {f"^model.layers.{number}.q_proj": number for number in range(20_000)}
    table = PatternTable(LoraConfig(rank_pattern={name: 3 for name in patterns}).rank_pattern | patterns)
    assert table.get("model.layers.17.q_proj", None) == 17
    assert table.get("x.model.layers.17.q_proj", "none") == "none"
    assert re.match(r"(.*\.)?(^model.layers.17.q_proj)$", "x.model.layers.17.q_proj") is None
    assert len(table.unused(["model.layers.3.q_proj", "x.model.layers.4.q_proj"])) == 19_999


@pytest.mark.parametrize("empty", ["", [], None])
def test_an_empty_layers_pattern_means_any_as_in_peft(empty: Any) -> None:
    matcher = Matcher(["q"], layers=[1], layers_pattern=empty)
    assert matcher.matches("model.layers.1.q") and not matcher.matches("model.layers.0.q")


def test_the_longest_expression_is_accepted_and_a_longer_one_refused() -> None:
    check_patterns([("target_modules", "a" * 50_000, WHOLE)])
    with pytest.raises(ConfigError, match="too long"):
        check_patterns([("target_modules", "a" * 50_001, WHOLE)])


def test_what_only_the_compiler_refuses_is_refused_with_the_config() -> None:
    with pytest.raises(ConfigError, match="look-behind requires fixed-width"):
        LoraConfig(target_modules=r"(?<=a+)b")
