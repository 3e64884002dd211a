"""Names and values of configs as they are given in cells."""

from __future__ import annotations

import pytest

from nbpeft import AdaLoraConfig, LoraConfig
from nbpeft.engine.methods.lora.config import INITS
from nbpeft.errors import ConfigError, UnknownMethodError
from nbpeft.session.configs import config_class, method_names


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("dora", "set use_dora = True"),
        ("QLoRA", "load the model in 4 bits (qlora)"),
        ("rslora", "set use_rslora = True"),
        ("pissa", 'set init_lora_weights = "pissa"'),
        ("alora", "set alora_invocation_tokens"),
    ],
)
def test_forms_of_lora_say_how_they_are_asked_for(name: str, how: str) -> None:
    with pytest.raises(UnknownMethodError, match="form of LoRA") as caught:
        config_class(name)
    assert how in str(caught.value) and name.lower() not in method_names()


def test_what_a_form_of_lora_is_asked_for_with_is_a_field() -> None:
    from nbpeft.session.configs import _FORMS_OF_LORA, field_names

    fields = [how.split()[1] for how in _FORMS_OF_LORA.values() if how.startswith("set ")]
    assert {*fields} <= {*field_names("lora")}
    inits = {how.split('"')[1] for how in _FORMS_OF_LORA.values() if "init_lora_weights" in how}
    assert inits <= {*INITS}


@pytest.mark.parametrize("given", [{"lora_alpha": -1}, {"alpha_pattern": {"q_proj": -2.0}}])
def test_a_negative_alpha_is_refused_as_a_rank_of_zero_is(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"(lora_alpha|alpha_pattern\['q_proj'\]) must not be negative"):
        LoraConfig(**given)
    if "lora_alpha" in given:
        with pytest.raises(ConfigError, match="lora_alpha must not be negative"):
            AdaLoraConfig(total_step=10, **given)
    with pytest.raises(ConfigError, match="r must be"):
        LoraConfig(r=0)
