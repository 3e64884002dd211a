"""A learned prompt in a session: added, reconfigured, compared, forecast and shown as any adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbpeft.engine.config.prompt_config import PromptLearningConfig
from nbpeft.engine.contract.registry import methods
from nbpeft.errors import AdapterError, MergeError
from nbpeft.memory import forecast
from nbpeft.model import get_peft_model
from nbpeft.session import Session
from tests.char_tokenizer import CharTokenizer
from tests.session.support import alone
from tests.tiny_models import llama, logits, randomize

METHODS = [method for method in methods() if issubclass(method.config_class, PromptLearningConfig)]
SAMPLES = [
    pytest.param(method, dict(next(iter(method.sample_configs.values()))), id=method.peft_type.lower())
    for method in METHODS
]
every_method = pytest.mark.parametrize(("method", "fields"), SAMPLES)
SOFT = {"peft_type": "prompt_tuning", "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
pytestmark = pytest.mark.filterwarnings("ignore")


@every_method
def test_it_is_shown_and_reconfigured(method: Any, fields: dict[str, Any]) -> None:
    session, base = Session(), llama()
    fields = {"peft_type": method.peft_type.lower(), "task_type": "CAUSAL_LM"} | fields
    result = session.add(base, fields, name="p")
    added, model = result.adapter, session.model()
    assert added.method == method.label and added.summary["tokens"] == str(model.peft_config["p"].num_virtual_tokens)
    randomize(model, "p")
    ids = {"task_ids": torch.tensor([0, 1])} if "task_ids" in method.calls.arguments else {}
    before = model(input_ids=torch.ones(2, 5, dtype=torch.long), **ids).logits
    longer: dict[str, Any] = {"num_virtual_tokens": 9}
    if "cpt_token_ids" in fields:
        longer = {"cpt_token_ids": [*range(9)], "cpt_tokens_type_mask": [1] * 9}
    again = session.add(base, {**fields, **longer}, name="p").adapter
    assert again.summary["tokens"] == "9" and again.parameter_count > added.parameter_count
    session.undo()
    assert torch.equal(model(input_ids=torch.ones(2, 5, dtype=torch.long), **ids).logits, before)
    assert session.state.models[0].adapters[0].parameter_count == added.parameter_count


@pytest.mark.slow
@every_method
def test_a_forecast_counts_its_parameters(method: Any, fields: dict[str, Any]) -> None:
    model = get_peft_model(llama(), method.config_class(task_type="CAUSAL_LM", **fields))
    config = model.peft_config["default"]
    parts = {part.name: part.byte_count for part in forecast(llama(), config, max_length=8).parts}
    assert parts["adapters"] == sum(parameter.nbytes for parameter in model.prompt_encoder["default"].parameters())


@pytest.mark.slow
def test_a_forecast_counts_the_longer_sequences() -> None:
    def activations(count: int) -> int:
        config = METHODS[-1].config_class(num_virtual_tokens=count, task_type="CAUSAL_LM")
        parts = forecast(llama(), config, batch_size=2, max_length=16).parts
        return sum(part.byte_count for part in parts if part.name == "activations")

    assert activations(16) > 1.5 * activations(1)


def test_prompts_answer_beside_other_adapters() -> None:
    session, base = Session(), llama(initializer_range=0.3)
    first = session.add(base, SOFT, name="soft")
    model: Any = session.model(first.model)
    session.add(base, {"peft_type": "prefix_tuning", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}, name="prefix")
    session.add(base, {"r": 2, "task_type": "CAUSAL_LM"}, name="lora")
    model.eval()
    for name in model.peft_config:
        randomize(model, name, scale=0.5)
    prompts = ["Ana needs 12 chairs", "Hi"]
    result = session.compare(prompts, tokenizer=CharTokenizer(), max_new_tokens=6)
    assert list(result.answers) == ["base", "soft", "prefix", "lora"]
    for name, texts in result.answers.items():
        assert list(texts) == [alone(model, prompt, None if name == "base" else name, 6) for prompt in prompts]
    assert len(set(result.answers.values())) == 4


def test_commands_on_weights_refuse_in_one_line() -> None:
    session, base = Session(), llama()
    result = session.add(base, SOFT, name="soft")
    model = session.model(result.model)
    before = logits(model)
    with pytest.raises(MergeError, match="changes no weight"):
        session.merge("soft")
    with pytest.raises(AdapterError, match="it is a prompt, which cannot be scaled"):
        session.scale("soft", 2.0)
    assert torch.equal(logits(model), before) and "embed_tokens" in str(session.inspect("soft"))
