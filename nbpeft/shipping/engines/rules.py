"""The classes that describe an engine, and the rules that several engines share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from shlex import quote

from nbpeft.display.numbers import plural
from nbpeft.errors import few
from nbpeft.shipping.facts import AdapterFacts

MERGE = "merge it into the base"


@dataclass(frozen=True)
class Rule:
    """A property of adapters that an engine does not support.

    Attributes:
        what: facts -> description of the property; empty if the adapter does not have it.
        remedy: what to change.
    """

    what: Callable[[AdapterFacts], str]
    remedy: str


@dataclass(frozen=True)
class Form:
    """A format in which an engine loads an adapter or a merged model.

    Attributes:
        format: ``folder`` (PEFT's), ``gguf``, ``kohya`` or ``diffusers`` for an adapter; ``model`` or ``gguf`` for
            a merged model.
        rules: properties of adapters that are not supported.
        merges: whether it is a merged model.
        one_rank: whether all layers must have the same rank and scaling.
        types: storage types of the weights, the default first; empty if they are stored unchanged.
    """

    format: str
    rules: tuple[Rule, ...] = ()
    merges: bool = False
    one_rank: bool = False
    types: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """A program that serves models.

    Attributes:
        name: value of the argument ``engine``.
        label: display name.
        checked: version that the rules were taken from.
        source: URL of the rules' source.
        adapter: format of adapters; None if it loads no adapters.
        merged: format of merged models; None if it loads none.
        start: (facts, merged, folder) -> shell commands or Python lines that load the files in the folder.
        notes: facts -> a note for the user; empty if there is nothing to say.
    """

    name: str
    label: str
    checked: str
    source: str
    adapter: Form | None
    merged: Form | None
    start: Callable[[AdapterFacts, bool, str], tuple[str, ...]]
    notes: tuple[Callable[[AdapterFacts], str], ...] = ()


def _not_low_rank(facts: AdapterFacts) -> str:
    return ", ".join(f"{label} on {plural(count, 'layer')}" for label, count in facts.others.items())


def _prompt(facts: AdapterFacts) -> str:
    count = facts.prompt_tokens
    if count:
        return f"{facts.method}, {plural(count, 'trained token')} in front of the input"
    return f"{facts.method}, which changes the model's calls" if facts.transforms_calls else ""


def _copies(facts: AdapterFacts) -> str:
    return f"fully trained modules (modules_to_save: {few(facts.copies, 3)})" if facts.copies else ""


def _biases(facts: AdapterFacts) -> str:
    return f"{plural(len(facts.biases), 'trained bias', 'trained biases')} of the model" if facts.biases else ""


def _output_biases(facts: AdapterFacts) -> str:
    return f"its own bias on {plural(len(facts.output_biases), 'layer')}" if facts.output_biases else ""


def _tied_ends(facts: AdapterFacts) -> str:
    return f"{few(facts.tied_ends, 2)}, whose weight is tied to the other embedding" if facts.tied_ends else ""


def _resized(facts: AdapterFacts) -> str:
    return "a base model whose vocabulary was resized" if facts.vocabulary_resized else ""


def kinds_other_than(allowed: Iterable[str]) -> Callable[[AdapterFacts], str]:
    """Returns a rule against adapted layers whose kind contains none of the given strings."""
    kinds = tuple(allowed)

    def what(facts: AdapterFacts) -> str:
        others = [path for path, kind in facts.kinds.items() if not any(word in kind for word in kinds)]
        return f"layers that are not {' or '.join(kinds)} ({few(others, 2)})" if others else ""

    return what


PROMPT = Rule(_prompt, "serve it with PEFT, or train LoRA")
CONVERTIBLE = Rule(
    lambda facts: _not_low_rank(facts) if facts.convertible else "",
    f"{MERGE}, or convert it to LoRA: save_as_lora(DIR, model, rank=64)",
)
NOT_LOW_RANK = Rule(
    lambda facts: "" if facts.convertible else _not_low_rank(facts),
    f"{MERGE}, or train plain LoRA: use_dora=False, no trainable_token_indices",
)
COPIES = Rule(_copies, f"{MERGE}, or train with modules_to_save=None")
BIASES = Rule(_biases, f"{MERGE}, or train with bias='none'")
OUTPUT_BIASES = Rule(_output_biases, f"{MERGE}, or train with lora_bias=False")
TIED_ENDS = Rule(_tied_ends, f"{MERGE}, or leave embedding and head out of target_modules")
RESIZED = Rule(_resized, f"{MERGE}, so that the new embeddings are in the file")
PLAIN_LORA = (PROMPT, CONVERTIBLE, NOT_LOW_RANK, COPIES, BIASES, OUTPUT_BIASES)
"""Rules of engines that support only plain LoRA: products of two matrices."""


def dtype_note(facts: AdapterFacts) -> str:
    """Returns a note about an adapter that was trained on quantized weights; else the empty string."""
    if not facts.quantized:
        return ""
    return "the adapter was trained on quantized weights: its answers differ slightly on full-precision weights"


def completions_note(facts: AdapterFacts) -> str:
    """Returns a note about an adapter that is not asked through a server's chat template; else the empty string."""
    if not facts.is_plain:
        return ""
    return "trained without the chat template: send prompts to /v1/completions, not to /v1/chat/completions"


def base_word(facts: AdapterFacts) -> str:
    """Returns the base model's hub id, or a placeholder, for a command line; not quoted."""
    return facts.base_name or "BASE_MODEL"


def shell_word(text: str) -> str:
    """Quotes a path or a name for a shell; one that starts with ``-`` is not taken for an option."""
    return quote(f"./{text}" if text.startswith("-") else text)
