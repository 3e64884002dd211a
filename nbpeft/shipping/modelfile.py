"""Ollama's Modelfile: the files of a model and its chat template.

Ollama's chat templates are Go templates, those of tokenizers are Jinja. If one of the formats defined here gives the
same prompt as the tokenizer's template, it is written as a Go template. Otherwise the Modelfile has no template, and
Ollama uses the one that it detects in the GGUF file. An adapter that was trained without a chat template gets the
template that is the prompt alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nbpeft.errors import ConfigError


@dataclass(frozen=True)
class ChatFormat:
    """A chat format.

    Attributes:
        system: format string of the system prompt, with ``%s``.
        user: format string of the user's message, with ``%s``.
        answer: text before the answer.
        end: text after the answer, which stops generation.
        begin: text at the beginning (BOS) that a tokenizer's template adds; Ollama adds it by itself.
    """

    system: str
    user: str
    answer: str
    end: str
    begin: str = ""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The lines of a Modelfile after its template."""
        return (f'PARAMETER stop "{self.end}"',) if self.end else ()

    def prompt(self, system: str, user: str) -> str:
        """Returns the text of a prompt, without ``begin``.

        Args:
            system: the system prompt.
            user: the user's message.
        """
        return self.system % system + self.user % user + self.answer

    def go_template(self) -> str:
        """Returns the format as a Go template for Ollama."""
        if self == PROMPT_ALONE:
            return "{{ .Prompt }}"
        system = "{{ if .System }}" + self.system % "{{ .System }}" + "{{ end }}"
        user = "{{ if .Prompt }}" + self.user % "{{ .Prompt }}" + "{{ end }}"
        return f"{system}{user}{self.answer}{{{{ .Response }}}}{self.end}"


CHAT_FORMATS = {
    "chatml": ChatFormat(
        "<|im_start|>system\n%s<|im_end|>\n",
        "<|im_start|>user\n%s<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "llama3": ChatFormat(
        "<|start_header_id|>system<|end_header_id|>\n\n%s<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n%s<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    "phi3": ChatFormat("<|system|>\n%s<|end|>\n", "<|user|>\n%s<|end|>\n", "<|assistant|>\n", "<|end|>"),
    "zephyr": ChatFormat("<|system|>\n%s</s>\n", "<|user|>\n%s</s>\n", "<|assistant|>\n", "</s>"),
}
"""Name of a chat format -> the format."""


PROMPT_ALONE = ChatFormat("", "%s", "", "")
"""No chat format: the prompt is written as it is given, and a system prompt is not written."""
_SYSTEM, _USER = "Be brief.", "What is 2 + 2?"


def chat_format_of(tokenizer: Any, variables: Mapping[str, Any] | None = None) -> ChatFormat | None:
    """Returns the format that gives the same prompt as a tokenizer's chat template; None if there is none.

    There is none, either, if the template begins the answer with what a Modelfile or a Go template would obey.

    Args:
        tokenizer: the tokenizer.
        variables: variables for its chat template, which may begin the answer.
    """
    text = _rendered(tokenizer, _SYSTEM, variables)
    for format in CHAT_FORMATS.values():
        prompt = format.begin + format.prompt(_SYSTEM, _USER)
        if text.startswith(prompt):
            begun = text.removeprefix(prompt)
            found = replace(format, answer=format.answer + begun) if begun else format
            # What begins the answer is the tokenizer's alone, and becomes a part of a template of Ollama.
            return found if "{{" not in begun and quoted(found.go_template()) is not None else None
    return None


def usual_system(tokenizer: Any, chat: ChatFormat, variables: Mapping[str, Any] | None = None) -> str:
    """Returns the system prompt that a chat template writes if none is given; empty if it writes none.

    Args:
        tokenizer: the tokenizer.
        chat: its chat format.
        variables: variables for its chat template.
    """
    before, after = chat.system.split("%s")
    text = _rendered(tokenizer, None, variables)
    head, tail = chat.begin + before, after + chat.user % _USER + chat.answer
    return text.removeprefix(head).removesuffix(tail) if text.startswith(head) and text.endswith(tail) else ""


def _rendered(tokenizer: Any, system: str | None, variables: Mapping[str, Any] | None) -> str:
    """A prompt in a tokenizer's chat template; empty if it has none, or refuses the prompt."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": _USER})
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    try:
        return str(tokenizer.apply_chat_template(messages, **(variables or {}), **options))
    except Exception:  # a template may refuse a system prompt, or be broken
        return ""


def quoted(text: str) -> str | None:
    """Returns a text between three quotes, as a Modelfile has it; None if the text would end them itself."""
    end = '"""'
    return f"{end}{text}{end}" if (text + end).index(end) == len(text) else None


def modelfile(source: str, adapter: str | None, chat: ChatFormat | None, system: str = "") -> str:
    """Returns the text of a Modelfile.

    Args:
        source: the base model's name in Ollama, or path of a GGUF file relative to the Modelfile.
        adapter: path of a GGUF adapter relative to the Modelfile, or None.
        chat: the chat format; None writes no template.
        system: the system prompt; empty for none.

    Raises:
        ConfigError: the source has several lines, or a text would end its quotes.
    """
    if len(source.splitlines()) != 1:
        raise ConfigError(f"the name of a model in Ollama is one line, not {source!r:.60}")
    lines = [f"FROM {source}"]
    lines += [f"ADAPTER {adapter}"] if adapter else []
    texts = {"TEMPLATE": chat.go_template()} if chat is not None else {}
    texts |= {"SYSTEM": system} if system else {}
    for directive, text in texts.items():
        if (words := quoted(text)) is None:
            raise ConfigError(f"{directive} of a Modelfile cannot contain {text!r:.60}: it would end its quotes")
        lines += [f"{directive} {words}", *(chat.parameters if chat is not None and directive == "TEMPLATE" else ())]
    return "\n".join(lines) + "\n"
