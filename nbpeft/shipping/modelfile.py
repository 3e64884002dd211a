"""Ollama's Modelfile: what a model is made from, and how a conversation is written down for it.

Ollama writes prompts with Go templates, tokenizers with Jinja. A format that is known here is used where the
tokenizer's own template gives the same text; where none does, the Modelfile has no template, and Ollama takes
the one it detects in the GGUF file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ChatFormat:
    """A way to write a conversation.

    Attributes:
        system: around the system prompt, ``%s``.
        user: around what the user says.
        answer: what the answer begins with.
        end: what ends it.
        begin: what a tokenizer's template puts first and Ollama adds by itself.
    """

    system: str
    user: str
    answer: str
    end: str
    begin: str = ""

    def prompt(self, system: str, user: str) -> str:
        """The text of a prompt, without ``begin``."""
        return self.system % system + self.user % user + self.answer

    def go_template(self) -> str:
        """The same for Ollama."""
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
"""Name -> format."""


def chat_format_of(tokenizer: Any) -> ChatFormat | None:
    """The format under which a tokenizer's chat template gives the same prompt; None where none is known."""
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


def modelfile(source: str, adapter: str | None, chat: ChatFormat | None) -> str:
    """The text of a Modelfile.

    Args:
        source: the base model's name in Ollama, or a GGUF file beside the Modelfile.
        adapter: a GGUF file with an adapter, or None.
        chat: how conversations are written, or None to leave that to Ollama.
    """
    lines = [f"FROM {source}"]
    lines += [f"ADAPTER {adapter}"] if adapter else []
    if chat is not None:
        lines += [f'TEMPLATE """{chat.go_template()}"""', f'PARAMETER stop "{chat.end}"']
    return "\n".join(lines) + "\n"
