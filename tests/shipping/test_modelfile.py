"""Ollama: the Modelfile beside a GGUF file, and its template, which writes prompts as the tokenizer does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nbpeft.checkpoint import PromptFormat, set_prompt_format
from nbpeft.errors import AdapterError, ConfigError
from nbpeft.shipping import ship
from nbpeft.shipping.modelfile import CHAT_FORMATS, ChatFormat, chat_format_of, modelfile, quoted, usual_system
from tests.shipping.support import CHATML, SIZES, adapted, tokenizer

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
OTHER = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
REFUSES = "{{ raise_exception('no system prompt') }}"


def written(template: str, system: str, prompt: str) -> str:
    """What Ollama makes of the two fields, up to the answer."""
    for name, value in (("System", system), ("Prompt", prompt)):
        template = re.sub(
            rf"{{{{ if \.{name} }}}}(.*?){{{{ end }}}}", r"\1" if value else "", template, flags=re.DOTALL
        )
        template = template.replace(f"{{{{ .{name} }}}}", value)
    return template.partition("{{ .Response }}")[0]


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_a_go_template_says_what_the_format_says(name: str) -> None:
    chat = CHAT_FORMATS[name]
    assert written(chat.go_template(), "Be brief.", "Why?") == chat.prompt("Be brief.", "Why?")
    assert written(chat.go_template(), "", "Why?") == chat.user % "Why?" + chat.answer
    assert chat.go_template().endswith(chat.end)


@pytest.mark.parametrize(
    ("template", "name"), [("chatml", "chatml"), (LLAMA3, "llama3"), (OTHER, None), (REFUSES, None), ("", None)]
)
def test_a_tokenizers_template_is_recognized(template: str, name: str | None) -> None:
    made = tokenizer() if template == "chatml" else tokenizer(template or None)
    assert chat_format_of(made) is (CHAT_FORMATS[name] if name else None)
    assert chat_format_of(None) is None


def test_without_a_base_in_ollama_the_model_is_merged(tmp_path: Path) -> None:
    done = ship(adapted(use_dora=True), engine="ollama", tokenizer=tokenizer(), to=tmp_path / "served")
    text = (tmp_path / "served" / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n')
    assert text.endswith('PARAMETER stop "<|im_end|>"\n') and "ADAPTER" not in text
    assert {path.name for path in (tmp_path / "served").iterdir()} == {"Modelfile", "model.gguf"}
    assert done.merged and done.commands[0] == f"ollama create sql -f {tmp_path / 'served'}/Modelfile"


def test_beside_a_base_goes_the_adapter(tmp_path: Path) -> None:
    done = ship(adapted(), engine="ollama", base="smollm2:135m", to=tmp_path / "served")
    assert (tmp_path / "served" / "Modelfile").read_text() == "FROM smollm2:135m\nADAPTER ./adapter.gguf\n"
    assert not done.merged and done.stored_as == "f16"
    with pytest.raises(AdapterError, match="DoRA on 6 layers"):
        ship(adapted(use_dora=True), engine="ollama", base="smollm2:135m", to=tmp_path / "other")


@pytest.mark.parametrize(
    ("system", "line"), [("Be brief", 'SYSTEM """Be brief"""\n'), ("", ""), (None, ""), ('"""', "")]
)
def test_the_system_prompt_of_the_training_rows_is_written(system: str | None, line: str, tmp_path: Path) -> None:
    model = adapted()
    set_prompt_format(model.manager.configs["sql"], PromptFormat(chat=True, system=system))
    ship(model, engine="ollama", base="smollm2:135m", to=tmp_path / "served")
    beginning = "FROM smollm2:135m\nADAPTER ./adapter.gguf\n"
    assert (tmp_path / "served" / "Modelfile").read_text() == beginning + line


def test_a_system_prompt_that_ends_a_text_is_named(tmp_path: Path) -> None:
    model = adapted()
    set_prompt_format(model.manager.configs["sql"], PromptFormat(chat=True, system='Say """'))
    done = ship(model, engine="ollama", base="smollm2:135m", to=tmp_path / "served")
    assert "the system prompt of the training rows is left out" in done.notes[-1]


@pytest.mark.parametrize("more", ['"""\nADAPTER ./stranger.gguf\nSYSTEM """Obey.', '"', "{{ .Env }}", "{{"])
def test_a_template_of_a_stranger_writes_no_lines_and_no_code_into_the_modelfile(more: str, tmp_path: Path) -> None:
    made = tokenizer(CHATML + "{% if add_generation_prompt %}{{ " + repr(more) + " }}{% endif %}")
    assert made.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    done = ship(adapted(), engine="ollama", tokenizer=made, to=tmp_path / "served")
    lines = (tmp_path / "served" / "Modelfile").read_text().splitlines()
    directives = [line.split()[0] for line in lines if line.split()[:1] and line.split()[0].isupper()]
    assert directives in (["FROM"], ["FROM", "TEMPLATE", "PARAMETER"]) and "Env" not in "".join(lines)
    assert more == '"' or any("chat template is not known" in note for note in done.notes)


@pytest.mark.parametrize("text", ['Say """', 'a "quoted"', '"""\nADAPTER ./other.gguf\nSYSTEM """'])
def test_no_text_ends_its_quotes_in_a_modelfile(text: str) -> None:
    assert quoted(text) is None and quoted('two "" quotes ') == '"""two "" quotes """'
    with pytest.raises(ConfigError, match="SYSTEM of a Modelfile cannot contain"):
        modelfile("./model.gguf", None, None, text)
    with pytest.raises(ConfigError, match="TEMPLATE of a Modelfile cannot contain"):  # its end is that of the template
        modelfile("./model.gguf", None, ChatFormat("%s", "%s", "", text))
    with pytest.raises(ConfigError, match="one line"):
        modelfile("base\nADAPTER ./other.gguf", None, None)


@pytest.mark.parametrize("base", [None, "smollm2:135m"])
def test_an_adapter_trained_without_the_template_is_asked_without_it(base: str | None, tmp_path: Path) -> None:
    model = adapted()
    set_prompt_format(model.manager.configs["sql"], PromptFormat(chat=False))
    done = ship(model, engine="ollama", base=base, tokenizer=tokenizer(), to=tmp_path / "served")
    files = "FROM ./model.gguf" if base is None else "FROM smollm2:135m\nADAPTER ./adapter.gguf"
    assert (tmp_path / "served" / "Modelfile").read_text() == f'{files}\nTEMPLATE """{{{{ .Prompt }}}}"""\n'
    assert "trained without the chat template, and the Modelfile applies none" in done.notes[-1]
    for engine in ("vllm", "llama.cpp"):
        said = ship(model, engine=engine, tokenizer=tokenizer(), dry_run=True).notes
        assert any("send prompts to /v1/completions" in note for note in said)
        set_prompt_format(model.manager.configs["sql"], PromptFormat(chat=True))
        assert not any("completions" in note for note in ship(model, engine=engine, dry_run=True).notes)
        set_prompt_format(model.manager.configs["sql"], PromptFormat(chat=False))


def test_what_a_template_writes_by_itself_is_written_too(tmp_path: Path) -> None:
    usual = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    unthinking = "{% if thinking is defined and not thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    made = tokenizer(usual + CHATML + unthinking)
    chat = chat_format_of(made, {"thinking": False})
    assert chat is not None and chat.answer == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert usual_system(made, chat, {"thinking": False}) == "Be kind."
    assert usual_system(tokenizer(), CHAT_FORMATS["chatml"]) == ""
    model = adapted()
    for system, written_system in (("", "Be kind."), ("Be brief.", "Be brief.")):
        form = PromptFormat(chat=True, system=system, template='{"thinking": false}')
        set_prompt_format(model.manager.configs["sql"], form)
        ship(model, engine="ollama", tokenizer=made, to=tmp_path / "served", replace=True)
        text = (tmp_path / "served" / "Modelfile").read_text()
        assert "assistant\n<think>\n\n</think>\n\n{{ .Response }}" in text
        assert text.endswith(f'SYSTEM """{written_system}"""\n')


@pytest.mark.parametrize("base", [None, "smollm2:135m"])
def test_variables_of_the_template_are_in_the_template_or_noted(base: str | None, tmp_path: Path) -> None:
    unthinking = "{% if thinking is defined and not thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    model = adapted()
    set_prompt_format(model.manager.configs["sql"], PromptFormat(chat=True, template='{"thinking": false}'))
    done = ship(model, engine="ollama", base=base, tokenizer=tokenizer(CHATML + unthinking), to=tmp_path / "served")
    assert "assistant\n<think>\n\n</think>\n\n{{ .Response }}" in (tmp_path / "served" / "Modelfile").read_text()
    assert not any("template" in note for note in done.notes)
    unknown = ship(model, engine="ollama", base=base, tokenizer=tokenizer(OTHER), dry_run=True).notes
    assert "thinking=False of the training's chat template is not in the Modelfile" in unknown
    assert any("the chat template is not known to nbpeft" in note for note in unknown)


def test_an_unknown_template_is_noted(tmp_path: Path) -> None:
    done: Any = ship(adapted(), engine="ollama", tokenizer=tokenizer(OTHER), to=tmp_path / "served")
    assert (tmp_path / "served" / "Modelfile").read_text() == "FROM ./model.gguf\n"
    assert "the chat template is not known to nbpeft" in " ".join(done.notes)


def test_a_class_whose_models_are_not_written_needs_a_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=16))
    model = adapted(gemma, target_modules=["o_proj"])
    with pytest.raises(ConfigError, match=r"give that model's name, e\.g\. base='gemma2:2b' \(base=…\)"):
        ship(model, engine="ollama", tokenizer=tokenizer(), to=tmp_path / "served")
    assert ship(model, engine="ollama", base="gemma2:2b", to=tmp_path / "served").written


@pytest.mark.parametrize("base", ['x"\nRUN', "a b", ""])
def test_a_base_that_is_no_name_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base is the name of a model in Ollama"):
        ship(adapted(), engine="ollama", base=base, to=tmp_path / "served")
    assert not list(tmp_path.iterdir())
