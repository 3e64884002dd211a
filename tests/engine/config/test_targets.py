"""Which module paths a config means."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import peft
import pytest
from peft.tuners.tuners_utils import _find_minimal_target_modules
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from torch import nn

from nbpeft import LoraConfig
from nbpeft.engine.config.targets import (
    Matcher,
    condense_targets,
    matches_segment_names,
    no_match,
    no_pattern_match,
    usual_targets,
)
from nbpeft.engine.injection.plan import plan
from nbpeft.errors import TargetError


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_are_those_of_peft(model_type: str) -> None:
    expected = DEFAULTS[model_type]
    found = usual_targets(model_type)
    assert found == expected if isinstance(expected, str) else set(found or ()) == set(expected)


def test_unknown_architectures_have_no_default() -> None:
    assert usual_targets("nothing") is None and usual_targets(None) is None


@pytest.mark.parametrize(
    ("targets", "path", "expected"),
    [
        (["q"], "q", True),
        (["q"], "layers.0.q", True),
        (["q"], "layers.0.aq", False),
        (["q"], "q.inner", False),
        (["attn.q"], "layers.0.attn.q", True),
        (["attn.q"], "layers.0.battn.q", False),
        (r".*\.(q|v)", "layers.0.v", True),
        (r".*\.(q|v)", "layers.0.vv", False),
        (r"q", "layers.q", False),
        ([], "q", False),
    ],
)
def test_names_are_whole_segments_and_patterns_whole_paths(targets: object, path: str, expected: bool) -> None:
    assert Matcher(targets).matches(path) is expected  # type: ignore[arg-type]


def test_exclusion_by_name_and_by_pattern() -> None:
    assert Matcher(["q"], ["layers.1.q"]).excluded("model.layers.1.q")
    assert not Matcher(["q"], ["layers.1.q"]).excluded("model.layers.11.q")
    assert Matcher(["q"], r".*\.1\..*").excluded("model.layers.1.q")


@pytest.mark.parametrize(
    ("layers", "pattern", "path", "expected"),
    [
        (1, None, "model.layers.1.q", True),
        ([0, 2], None, "model.layers.1.q", False),
        ([1], "layers", "model.layers.1.q", True),
        ([1], ["h", "layers"], "model.layers.1.q", True),
        ([1], "h", "model.layers.1.q", False),
        ([1], None, "model.layers.1.experts.3.q", True),
        ([3], None, "model.layers.1.experts.3.q", False),
        ([0], "layers", "layers.0.q", True),
        ([0], None, "q", True),
    ],
)
def test_layers_to_transform(layers: object, pattern: object, path: str, expected: bool) -> None:
    matcher = Matcher(["q"], None, layers, pattern)  # type: ignore[arg-type]
    assert matcher.matches(path) is expected


def test_missing_targets_are_known_after_all_paths() -> None:
    matcher = Matcher(["q", "nope", "attn.v"])
    for path in ("a.q", "a.attn.v", "b.k"):
        matcher.matches(path)
    assert matcher.missing() == ("nope",)


def test_a_name_is_seen_on_a_path_that_is_named_whole_as_well() -> None:
    matcher = Matcher(["q", "layers.0.q"])
    assert matcher.matches("layers.0.q")
    assert matcher.missing() == ()
    limited = Matcher(["q", "layers.0.q"], layers=[1])
    assert limited.matches("layers.0.q") and not limited.matches("layers.2.q")


def test_the_error_names_near_targets_and_what_there_is() -> None:
    error = no_match(["q_porj", "xyz"], ["m.0.q_proj", "m.1.v_proj"])
    assert "'q_porj' is near 'q_proj'" in str(error) and "The model has: q_proj, v_proj" in str(error)
    assert error.details["missing"] == ("q_porj", "xyz")


def test_a_name_given_as_a_pattern_is_explained() -> None:
    assert "use target_modules=['q_proj']" in str(no_pattern_match("q_proj", ["m.0.q_proj"]))
    assert "Did you mean 'q_proj'" in str(no_pattern_match("q_porj", ["m.0.q_proj"]))


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"target_modules": ["frist"]}, r"Target modules .*'frist'.* not found in the base model"),
        ({"target_modules": "frist"}, r"Target modules .*frist.* not found in the base model"),
        ({"target_modules": ["first", "second"], "exclude_modules": ["first", "second"]}, "All modules were excluded"),
        (
            {"target_modules": ["first", "other"], "exclude_modules": ["first"]},
            "No modules were targeted for adaptation",
        ),
    ],
)
def test_the_words_that_users_of_peft_look_for(fields: dict[str, Any], phrase: str) -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(2, 2), second=nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=phrase):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields))
    with pytest.raises(TargetError, match=phrase):
        plan(model, LoraConfig(**fields))


@pytest.mark.parametrize(
    ("targets", "others"),
    [
        ([f"enc.{i}.q" for i in range(30)], [f"dec.{i}.k" for i in range(30)]),
        ([f"enc.{i}.q" for i in range(30)], [f"dec.{i}.q" for i in range(30)]),
        ([f"enc.{i}.q" for i in range(30)] + ["q", "x.q"], ["a.b"]),
        ([f"b.{i}.{n}" for i in range(12) for n in "qk"], [f"b.{i}.{n}" for i in range(12, 20) for n in "qk"]),
        (["a.b", "x.a.b", "b"], ["c.b2", "d.a"]),
        (["a.b", "x.a.b"], ["z.b", "b"]),
    ],
)
def test_condensed_like_peft(targets: list[str], others: list[str]) -> None:
    endings = tuple(f".{name}" for name in targets)
    left = [name for name in others if name not in targets and not name.endswith(endings)]
    assert condense_targets(targets, [*others, *targets]) == _find_minimal_target_modules(targets, left)


def test_names_may_come_from_an_iterator() -> None:
    assert matches_segment_names("layers.0.q", iter(["v", "q"]))
    assert not matches_segment_names("layers.0.q", iter(["v", "k"]))
