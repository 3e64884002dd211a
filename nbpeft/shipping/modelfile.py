"""Ollama's Modelfile: the files of a model and its chat template.

Ollama's chat templates are Go templates, those of tokenizers are Jinja. If one of the formats defined here gives the
same prompt as the tokenizer's template, it is written as a Go template. Otherwise the Modelfile has no template, and
Ollama uses the one that it detects in the GGUF file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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

    def prompt(self, system: str, user: str) -> str:
        """Returns the text of a prompt, without ``begin``.

        Args:
            system: the system prompt.
            user: the user's message.
        """
        return self.system % system + self.user % user + self.answer

    def go_template(self) -> str:
        """Returns the format as a Go template for Ollama."""
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


def chat_format_of(tokenizer: Any) -> ChatFormat | None:
    """Returns the format that gives the same prompt as a tokenizer's chat template; None if there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may refuse a system prompt, or be broken
        return None
    return next(
        (
            format
            for format in CHAT_FORMATS.values()
            if text == format.begin + format.prompt(messages[0]["content"], messages[1]["content"])
        ),
        None,
    )


def modelfile(source: str, adapter: str | None, chat: ChatFormat | None, system: str = "") -> str:
    """Returns the text of a Modelfile.

    Args:
        source: the base model's name in Ollama, or path of a GGUF file relative to the Modelfile.
        adapter: path of a GGUF adapter relative to the Modelfile, or None.
        chat: the chat format; None writes no template.
        system: the system prompt; empty for none. One with three quotes cannot be written and is left out.
    """
    lines = [f"FROM {source}"]
    lines += [f"ADAPTER {adapter}"] if adapter else []
    if chat is not None:
        lines += [f'TEMPLATE """{chat.go_template()}"""', f'PARAMETER stop "{chat.end}"']
    if system and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"
