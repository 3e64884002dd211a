"""The form of an engine's rules, and those that several engines share."""

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
    """One thing that an engine does not take.

    Attributes:
        what: facts -> what the adapter has of it; empty where it has nothing.
        remedy: what to change.
    """

    what: Callable[[AdapterFacts], str]
    remedy: str


@dataclass(frozen=True)
class Form:
    """One form in which an engine loads what was trained.

    Attributes:
        format: ``folder`` (PEFT's), ``gguf``, ``kohya`` or ``diffusers`` for an adapter; ``model`` or ``gguf`` for
            a merged model.
        rules: what it does not take.
        merges: whether it is the whole model.
        one_rank: whether the format holds one rank and one scaling for all layers.
        types: how its weights can be stored; the first is the usual one, none means as they are.
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
        name: how it is asked for.
        label: its name for people.
        checked: the version that the rules were read from.
        source: address of where they stand.
        adapter: the form of adapters that it loads.
        merged: the form of merged models that it loads.
        start: (facts, merged, folder) -> lines for a shell, or of Python, that load what is in the folder.
        notes: facts -> something a person should know; empty where there is nothing.
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
    return f"{facts.method}, which acts on calls of the whole model" if facts.transforms_calls else ""


def _copies(facts: AdapterFacts) -> str:
    return f"modules trained as a whole (modules_to_save: {few(facts.copies, 3)})" if facts.copies else ""


def _biases(facts: AdapterFacts) -> str:
    return f"{plural(len(facts.biases), 'trained bias', 'trained biases')} of the model" if facts.biases else ""


def _output_biases(facts: AdapterFacts) -> str:
    return f"a bias of its own on {plural(len(facts.output_biases), 'layer')}" if facts.output_biases else ""


def _tied_ends(facts: AdapterFacts) -> str:
    return f"{few(facts.tied_ends, 2)}, whose weight embedding and head share" if facts.tied_ends else ""


def _resized(facts: AdapterFacts) -> str:
    return "a base whose vocabulary was resized" if facts.vocabulary_resized else ""


def kinds_beside(allowed: Iterable[str]) -> Callable[[AdapterFacts], str]:
    """Layers of other kinds than those that some words name."""
    words = tuple(allowed)

    def what(facts: AdapterFacts) -> str:
        found = [path for path, kind in facts.kinds.items() if not any(word in kind for word in words)]
        return f"layers that are not {' or '.join(words)} ({few(found, 2)})" if found else ""

    return what


PROMPT = Rule(_prompt, "serve it with PEFT, or train LoRA")
CONVERTIBLE = Rule(
    lambda facts: _not_low_rank(facts) if facts.convertible else "",
    f"{MERGE}, or make a LoRA of it: save_as_lora(DIR, model, rank=64)",
)
NOT_LOW_RANK = Rule(
    lambda facts: "" if facts.convertible else _not_low_rank(facts),
    f"{MERGE}, or train LoRA alone: use_dora=False, no trainable_token_indices",
)
COPIES = Rule(_copies, f"{MERGE}, or train with modules_to_save=None")
BIASES = Rule(_biases, f"{MERGE}, or train with bias='none'")
OUTPUT_BIASES = Rule(_output_biases, f"{MERGE}, or train with lora_bias=False")
TIED_ENDS = Rule(_tied_ends, f"{MERGE}, or leave embedding and head out of target_modules")
RESIZED = Rule(_resized, f"{MERGE}, so that the new embeddings are in the file")
PLAIN_LORA = (PROMPT, CONVERTIBLE, NOT_LOW_RANK, COPIES, BIASES, OUTPUT_BIASES)
"""Only products of two matrices are taken."""


def dtype_note(facts: AdapterFacts) -> str:
    """What a quantized base means for the adapter."""
    if not facts.quantized:
        return ""
    return "the adapter was trained on quantized weights: on full-precision ones its answers differ a little"


def base_word(facts: AdapterFacts) -> str:
    """What stands for the base model in a line of Python or of a shell, not quoted yet."""
    return facts.base_name or "BASE_MODEL"


def shell_word(text: str) -> str:
    """A path or a name as one word of a shell that no program takes for an option."""
    return quote(f"./{text}" if text.startswith("-") else text)
