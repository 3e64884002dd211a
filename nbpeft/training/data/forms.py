"""The forms of rows, recognized by their columns, and the example that each row gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nbpeft.display.numbers import plural
from nbpeft.errors import TrainingError, did_you_mean, near, with_article
from nbpeft.names import JUDGED, PAIRS, PROMPTS, SCORED_PAIRS
from nbpeft.training.data.left_out import Unreadable
from nbpeft.training.data.row import (
    KNOWN_ROLES,
    LABEL,
    SHAREGPT_ROLES,
    WEIGHT,
    Messages,
    Row,
    listed,
    nearest_role,
)

TOKENISED = "input_ids"
TEMPLATE = "chat_template_kwargs"
"""The column with further variables of a row for the chat template, as in TRL."""
MARGIN = "margin"
"""The column with the margin of a row with two completions."""

_PROMPTS = ("question", "query", "instruction", "input", "source", "context", "user", "frage", "pregunta")
_COMPLETIONS = (
    *("answer", "response", "output", "target", "completion", "solution", "assistant", "reply", "chosen"),
    *("antwort", "réponse", "respuesta"),
)
_PROMPT_WORDS = (
    *("text", "message", "body", "sentence", "review", "comment", "document", "article", "description"),
    *("nachricht", "beschreibung"),
)
_COMPLETION_WORDS = (
    *("label", "labels", "category", "class", "intent", "tag", "team", "summary", "translation"),
    *("kategorie", "klasse", "catégorie", "categoría"),
)
"""Words in names of columns that are not names of a form."""
_NUMBERING = re.compile(
    r"(?i)(row|ticket|order|user|message)?[\s_-]?(id|uuid|nr|no|num|number|index|idx)\.?|unnamed: \d+|"
)
"""Names of columns that number the rows."""
_TYPO = 0.75
"""The least similarity between the name of a column and the known name that it may stand for."""
_WORDS, _TAGS = ("tokens", "words", "sentence", "text"), ("tags", "labels", "label")
"""Names of columns with words and with their tags."""
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class Plain:
    """Text to train on as a whole."""

    text: str


@dataclass(frozen=True)
class Pair:
    """A prompt, and the completion to train on; ``unused`` names the parts of the row that are not used."""

    prompt: str
    completion: str
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chat:
    """A conversation; the assistant's turns are trained on.

    Attributes:
        messages: the messages, with ``role`` and ``content``.
        weights: the factor on the loss of each message.
        first: index of the first message to train on.
        tools: the tools, for the chat template.
        unused: names of the parts of the messages that are not used.
        template: further variables for the chat template.
        masks: whether the reasoning of the assistant is read, but not trained on.
    """

    messages: tuple[Mapping[str, Any], ...]
    weights: tuple[float, ...]
    first: int = 0
    tools: Any = None
    unused: tuple[str, ...] = ()
    template: Mapping[str, Any] = field(default_factory=dict)
    masks: bool = False

    @property
    def variables(self) -> dict[str, Any]:
        """The arguments for ``apply_chat_template``."""
        return dict(self.template) if self.tools is None else {**self.template, "tools": self.tools}


@dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, with the label for a classifier."""

    text: str
    pair: str | None
    label: Any


@dataclass(frozen=True)
class Tagged:
    """Words, with the label of each for a classifier of tokens."""

    words: tuple[str, ...]
    tags: tuple[Any, ...]


@dataclass(frozen=True)
class Compared:
    """Two completions of one prompt, of which the first is preferred."""

    chosen: Pair | Chat
    rejected: Pair | Chat


@dataclass(frozen=True)
class Prompted:
    """A prompt that the model in training answers: a text, or a conversation that ends before the answer."""

    prompt: str | Chat


Example = Plain | Pair | Chat | Labelled | Tagged | Compared | Prompted


@dataclass(frozen=True)
class Form:
    """One of the forms that rows can have.

    Attributes:
        name: its name in messages.
        needs: the required columns, by which the form is recognized.
        read: (row, whether the tokenizer has a chat template) -> the example.
        may: optional columns.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Row, bool], Example]
    may: tuple[str, ...] = ()


def _read_text(row: Row, chat: bool) -> Example:
    return Plain(row.text("text"))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0  # pandas and Parquet return arrays


def _read_pair(row: Row, chat: bool) -> Example:
    prompt = row.value("prompt")
    if isinstance(prompt, str) or not any(map(_is_list, (prompt, row.value("completion")))):
        return Pair(row.text("prompt"), row.text("completion"), _unused_of_text(row))
    return _chat(row, row.messages("completion"), row.messages("prompt"))


def _read_messages(row: Row, chat: bool) -> Example:
    return _chat(row, row.messages("messages"), _system(row))


def _read_conversations(row: Row, chat: bool) -> Example:
    return _chat(row, row.messages("conversations"), _system(row))


def _read_instruction(row: Row, chat: bool) -> Example:
    instruction, more, output = row.text("instruction"), row.optional("input"), row.text("output")
    if not chat:
        head, middle = (_ALPACA_INPUT, f"\n\n### Input:\n{more}") if more else (_ALPACA, "")
        head = row.optional("system") or head
        prompt = f"{head}\n\n### Instruction:\n{instruction}{middle}\n\n### Response:\n"
        return Pair(prompt, output, _unused_of_text(row))
    if not output.strip():
        return Pair(instruction, "")
    request = f"{instruction}\n\n{more}" if more else instruction
    turns = ({"role": "user", "content": request}, {"role": "assistant", "content": output})
    return _chat(row, Messages(turns, (None, None)), _system(row))


def _read_compared(row: Row, chat: bool) -> Example:
    given = {name: row.value(name) for name in ("chosen", "rejected")}
    prompt = row.value("prompt") if row.columns.get("prompt", "prompt") in row.values else None
    if not any(isinstance(value, str) for value in given.values()):
        return _compared_chats(row, prompt)
    texts = {name: row.text(name) for name in given}
    if prompt is not None:
        text = row.text("prompt")
    else:  # what both begin with, up to the last blank: they differ in the word that follows
        pairs = enumerate(zip(*texts.values(), strict=False))
        differs = next((place for place, (left, right) in pairs if left != right), min(map(len, texts.values())))
        text = re.sub(r"\S*$", "", texts["chosen"][:differs])
        texts = {name: completion[len(text) :] for name, completion in texts.items()}
    unused = _unused_of_text(row)
    return Compared(Pair(text, texts["chosen"], unused), Pair(text, texts["rejected"], unused))


def _compared_chats(row: Row, prompt: Any) -> Compared:
    """Two conversations. Without a prompt of its own, what both begin with is the prompt."""
    chosen, rejected = row.messages("chosen"), row.messages("rejected")
    before = _system(row)
    begins = {part.messages[0]["role"] for part in (chosen, rejected) if part.messages}
    if prompt is not None and begins <= {"assistant"}:
        asked = Messages(({"role": "user", "content": prompt},), (None,)) if isinstance(prompt, str) else None
        before = before.followed_by(row.messages("prompt") if asked is None else asked)
    else:
        pairs = zip(chosen.messages[:-1], rejected.messages[:-1], strict=False)
        shared = next((place for place, (left, right) in enumerate(pairs) if left != right), None)
        if shared is None:
            shared = max(0, min(len(chosen.messages), len(rejected.messages)) - 1)
        before, chosen, rejected = before.followed_by(chosen[:shared]), chosen[shared:], rejected[shared:]
    return Compared(_chat(row, chosen, before), _chat(row, rejected, before))


def _read_labelled(row: Row, chat: bool) -> Example:
    return Labelled(row.text("text"), row.optional("text_pair") or None, row.value("label"))


def _read_tagged(row: Row, chat: bool) -> Example:
    words, tags = row.listed("tokens", "words"), row.listed("tags", "tags")
    for place, word in enumerate(words):
        if not isinstance(word, str):
            column = row.columns.get("tokens", "tokens")
            raise row.error(f"word {place} of {column!r} is {with_article(word)} ({word!r:.40}), not text.")
    if len(words) != len(tags):
        raise row.error(f"it has {plural(len(words), 'word')} and {plural(len(tags), 'tag')}; each word needs one tag.")
    return Tagged(words, tags)


def _read_prompt(row: Row, chat: bool) -> Example:
    value = row.value("prompt")
    if value is None or isinstance(value, str):
        return Prompted(value or "")
    given = _chat(row, Messages(), row.messages("prompt"))
    if given.messages and given.messages[-1]["role"] == "assistant":
        raise row.error("the prompt ends with the assistant's answer: remove that answer.")
    return Prompted(given)


def _unused_of_text(row: Row) -> tuple[str, ...]:
    """The columns of a row of plain text that only a chat template would use, which is not applied to it."""
    given = {"tools": row.tools(), TEMPLATE: row.variables(TEMPLATE) or None}
    return tuple(repr(row.columns.get(name, name)) for name, value in given.items() if value is not None)


def _system(row: Row) -> Messages:
    text = row.optional("system")
    return Messages(({"role": "system", "content": text},), (None,)) if text else Messages()


def _chat(row: Row, learned: Messages, before: Messages) -> Chat:
    """A chat whose first messages are context and not trained on."""
    messages, first = (*before.messages, *learned.messages), len(before.messages)
    weights = (*before.weights, *learned.weights)
    unused = [
        f"{WEIGHT!r} of {message['role']} messages{' of the prompt' if place < first else ''}"
        for place, (message, weight) in enumerate(zip(messages, weights, strict=True))
        if weight and (place < first or message["role"] != "assistant")
    ]
    return Chat(
        messages,
        tuple(1.0 if weight is None else weight for weight in weights),
        first,
        row.tools(),
        tuple(dict.fromkeys((*before.unused, *learned.unused, *unused))),
        row.variables(TEMPLATE),
    )


PAIR = Form("prompt and completion", ("prompt", "completion"), _read_pair, ("tools", TEMPLATE, WEIGHT))
TEXT = Form("text", ("text",), _read_text, (WEIGHT,))
FORMS = (
    Form("messages", ("messages",), _read_messages, ("tools", "system", TEMPLATE, WEIGHT)),
    PAIR,
    Form("conversations", ("conversations",), _read_conversations, ("system", "tools", TEMPLATE, WEIGHT)),
    Form(
        "instruction and output",
        ("instruction", "output"),
        _read_instruction,
        ("input", "system", "tools", TEMPLATE, WEIGHT),
    ),
    TEXT,
)
"""The forms of rows for language models."""
LABELLED = Form("text and label", ("text", "label"), _read_labelled, ("text_pair", WEIGHT))
"""The form of rows for text classifiers."""
TAGGED = Form("tokens and tags", ("tokens", "tags"), _read_tagged, (WEIGHT,))
"""The form of rows for classifiers of tokens: words, with a tag each."""
FOR_CLASSIFIERS = (LABELLED, TAGGED)
"""The forms of rows for classifiers."""
COMPARED = Form(
    "chosen and rejected", ("chosen", "rejected"), _read_compared, ("prompt", "tools", "system", TEMPLATE, WEIGHT)
)
"""The form of rows with two completions of one prompt, of which the first is preferred."""
SCORED = replace(COMPARED, may=(*COMPARED.may, MARGIN))
"""The same with a number by which the chosen completion is better."""
VERDICT = Form("prompt, completion and label", ("prompt", LABEL, "completion"), _read_pair, ("tools", TEMPLATE, WEIGHT))
"""The form of rows with a completion of which a label says whether it is good."""
PROMPTED = Form("prompt", ("prompt",), _read_prompt, ("tools", TEMPLATE))
"""The form of rows with a prompt alone; all other columns are for reward functions."""
AS_CHAT = {"instruction": "prompt", "output": "completion"}
"""Names of the form to which the chat template is applied -> those of the form to which it is not."""
FORMS_OF = {"": FORMS, PAIRS: (COMPARED,), SCORED_PAIRS: (SCORED,), JUDGED: (VERDICT,), PROMPTS: (PROMPTED,)}
"""Kind of rows -> its forms."""
_EXPECTED = "prompt and completion, messages, text, instruction and output, conversations, or input_ids"
_EXPECTED_OF = {
    LABELLED.name: "text and label (and text_pair), or input_ids and labels, to train a classifier",
    TAGGED.name: "tokens and tags, or input_ids and labels, to train a classifier of tokens",
}
_CLASS_OF = {LABELLED.name: "AutoModelForSequenceClassification", TAGGED.name: "AutoModelForTokenClassification"}
"""Name of a form -> the class with which transformers loads a model that takes it."""
NAMES = tuple(dict.fromkeys(name for form in (*FORMS, *FOR_CLASSIFIERS, SCORED) for name in (*form.needs, *form.may)))
"""The columns of all forms: the keys that ``columns`` may have."""


def row_of(value: Any, number: int, columns: Mapping[str, str]) -> Row:
    """Wraps a row: a dictionary, a text, or a prompt and completion.

    Args:
        value: the row.
        number: its number, 0 for the first.
        columns: name in the form -> column, where they differ.

    Raises:
        TrainingError: it is none of them.
    """
    if isinstance(value, Unreadable):
        raise TrainingError(f"Row {number}: {value.why}", index=number)
    if isinstance(value, str):
        return Row({"text": value}, number)
    if _is_pair(value):
        return Row({"prompt": value[0], "completion": value[1]}, number)
    if not isinstance(value, Mapping):
        raise TrainingError(f"Row {number} is {with_article(value)}, not a dictionary with {_EXPECTED}.", index=number)
    return Row(value, number, columns)


def keys_of(value: Any) -> tuple[str, ...]:
    """The columns of a first row.

    Raises:
        TrainingError: it is not a row.
    """
    return tuple(map(str, row_of(value, 0, {}).values))


def form_of(
    columns: Sequence[str],
    mapping: Mapping[str, str],
    *,
    usual: tuple[Form, ...] = FORMS,
    kind: str | None = "",
    first: Any = None,
    chat: bool = False,
    main: str | None = "",
) -> Form | None:
    """The form of rows with these columns; None for rows that are inputs of the model already, such as tokens.

    Args:
        columns: the columns of the rows.
        mapping: name in a form -> column; only forms that use one of the names are considered.
        usual: the forms that the model takes if the kind of rows says nothing else.
        kind: the kind of rows, see ``FORMS_OF``; None for any.
        first: the first row, whose values tell which columns are meant; None if it is unknown.
        chat: whether the tokenizer has a chat template, which a suggested mapping then applies.
        main: the input that makes rows those of the model; None if rows of any form are taken as they are.

    Raises:
        TrainingError: there is no such form; the message names the columns and suggests a mapping.
    """
    available = {*columns, *mapping}
    if TOKENISED in available and (not mapping or TOKENISED in mapping):
        return None
    alone = (PROMPTED,) if {*columns} <= {*PROMPTED.needs, *PROMPTED.may} else ()
    for form in FORMS_OF[kind] if kind else (*usual, *((COMPARED, *alone) if kind is None else ())):
        if available.issuperset(form.needs) and (
            not mapping or not mapping.keys().isdisjoint((*form.needs, *form.may))
        ):
            return form
    if not kind and (main is None or main in columns) and mapping.keys() <= {"labels", LABEL}:
        return None
    if kind == PROMPTS:
        raise TrainingError(
            f"Expected a column prompt; found {listed(columns)}.{_hint(columns, PROMPTED.needs)}", columns=columns
        )
    if kind:
        needs = FORMS_OF[kind][0].needs
        expected = "prompt, completion and label" if kind == JUDGED else "chosen and rejected (and prompt)"
        what = f"Expected columns {expected}; found {listed(columns)}.{_hint(columns, needs)}"
        raise TrainingError(what, columns=columns)
    _refuse_mixed(mapping)
    names = _likely_compared(columns) if kind is None and usual is FORMS else {}
    if names:
        what = f"Expected columns chosen and rejected; found {listed(columns)}. Say which is which: columns={names}."
        raise TrainingError(what, columns=columns)
    form = usual[0]
    expected = _EXPECTED_OF.get(form.name, _EXPECTED)
    needs = form.needs if form in FOR_CLASSIFIERS else PAIR.needs
    hint = _other_model(columns, form) or _chats_hint(columns, form, first) or _hint(columns, needs, first, chat)
    raise TrainingError(f"Expected columns {expected}; found {listed(columns)}.{hint}", columns=columns)


def _refuse_mixed(mapping: Mapping[str, str]) -> None:
    """Refuses column names that belong to two different forms.

    Raises:
        TrainingError: a prompt is named as in one form, and its completion as in another.
    """
    for prompt, completion in (("instruction", "completion"), ("prompt", "output")):
        if {prompt, completion} <= mapping.keys():
            goes_with = "output" if prompt == "instruction" else "completion"
            names = {prompt: mapping[prompt], goes_with: mapping[completion]}
            raise TrainingError(f"columns: instruction goes with output, and prompt with completion: columns={names}")


def _other_model(columns: Sequence[str], wanted: Form) -> str:
    """A hint at the kind of model that takes rows with these columns; empty if no other kind does."""
    for form in FOR_CLASSIFIERS:
        if form is not wanted and {*columns} >= {*form.needs}:
            return f" Rows with {form.name} are for a model loaded with {_CLASS_OF[form.name]}."
    return ""


def checked_columns(mapping: Any, columns: Sequence[str]) -> dict[str, str]:
    """Checks a mapping of columns; returns it without names that are mapped to themselves.

    White space around the name of a column, which spreadsheets leave there unseen, need not be given.

    Args:
        mapping: name in a form -> column, or None.
        columns: the columns of the rows.

    Raises:
        TrainingError: a name does not belong to any form, the rows have no such column, or it is given for two names.
    """
    if mapping is None:
        return {}
    known = (*NAMES, TOKENISED, "labels")
    if not isinstance(mapping, Mapping):
        raise TrainingError(f"columns must be a dictionary like {{'prompt': 'question'}}, not {mapping!r:.60}")
    mapping = {name: _meant(column, columns) for name, column in mapping.items()}
    for name, column in mapping.items():
        if name not in known:
            swapped = column in known and name in columns
            hint = f" The other way round: {column}={name}." if swapped else did_you_mean(str(name), known)
            raise TrainingError(f"columns: {name!r:.40} is none of {', '.join(map(repr, known))}.{hint}")
        if column not in columns:
            nearest = did_you_mean(str(column), columns)
            raise TrainingError(f"columns: the rows have no {column!r:.40}, but {listed(columns)}.{nearest}")
    _check_distinct(mapping)
    return {name: column for name, column in mapping.items() if name != column}


def _check_distinct(mapping: Mapping[str, str]) -> None:
    """Refuses a column that is given for two names; the labels of tokens may be the tokens themselves."""
    names: dict[str, str] = {}
    for name, column in mapping.items():
        other = names.setdefault(column, name)
        if other != name and {other, name} != {TOKENISED, "labels"}:
            raise TrainingError(f"columns: {column!r:.40} is given for both {other!r} and {name!r}; name two columns.")


def _meant(given: Any, columns: Sequence[str]) -> Any:
    """The only column with that name but for white space around it; what was given if there is none."""
    found = [column for column in columns if str(column).strip() == str(given).strip()]
    return found[0] if len(found) == 1 else given


def check_roles(row: int, chat: Chat, template: str) -> None:
    """Refuses a role that is neither one of the usual roles nor mentioned in the chat template.

    Args:
        row: the number of the row, for the message.
        chat: the chat.
        template: the text of the tokenizer's chat template.

    Raises:
        TrainingError: a role is unknown; names the row and the message.
    """
    for place, message in enumerate(chat.messages):
        role = message["role"]
        if role not in KNOWN_ROLES and role not in template:
            known = SHAREGPT_ROLES.get(role)
            hint = f" Did you mean {known!r}?" if known else nearest_role(role, KNOWN_ROLES)
            raise TrainingError(f"Row {row}: message {place} has the role {role!r:.40}.{hint}", index=row)


def _likely_compared(columns: Sequence[str]) -> dict[str, str]:
    """The columns that likely have the parts of preferences, by their names; empty if none do."""
    named = {need: [column for column in columns if need in column.lower()] for need in COMPARED.needs}
    found = {need: [c for c in likely if c.lower() == need] or likely for need, likely in named.items()}
    names = {need: likely[0] for need, likely in found.items() if len(likely) == 1}
    if len({*names.values()}) < len(COMPARED.needs):
        return {}
    prompt, _ = _likely(columns)
    return names if prompt is None or prompt in ("prompt", *names.values()) else {"prompt": prompt, **names}


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _chats_hint(columns: Sequence[str], form: Form, first: Any) -> str:
    """A hint at the column with conversations; empty if there is none."""
    values = first if isinstance(first, Mapping) and form not in FOR_CLASSIFIERS else {}
    for column in columns:
        value: Any = values.get(column)
        messages = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(messages, list | tuple) and messages and isinstance(messages[0], Mapping):
            names = {"conversations" if "from" in messages[0] else "messages": column}
            return f" Say where the conversations are: columns={names}."
        nodes = list(value.values()) if isinstance(value, Mapping) else []
        if nodes and all(isinstance(node, Mapping) and "message" in node for node in nodes):
            return f" {column!r} has each conversation as a tree, as ChatGPT exports it: make lists of messages first."
    return ""


def _hint(columns: Sequence[str], needs: Sequence[str] = PAIR.needs, first: Any = None, chat: bool = False) -> str:
    """A hint: a mapping of these columns that would work, as far as their names say which is which."""
    lower = {column.lower(): column for column in columns}
    prompt, completion = _likely(columns)
    if {"chosen", "rejected"} <= lower.keys() and "chosen" not in needs and needs != VERDICT.needs:
        asked = next((lower[name] for name in ("prompt", *_PROMPTS) if name in lower), None)
        names = {"messages" if asked is None else "completion": lower["chosen"]}
        names |= {} if asked in (None, "prompt") else {"prompt": asked}
        return (
            " Chosen and rejected answers are for preference tuning (objective='dpo'); here a model is trained on one "
            f"answer to each prompt: columns={names} takes the chosen ones."
        )
    names = dict.fromkeys(needs, "COLUMN")
    if "chosen" not in needs:
        likely = (prompt, lower.get(LABEL), completion) if needs == VERDICT.needs else (prompt, completion)
        if needs == TAGGED.needs:
            prompt, completion = likely = _likely_tags(columns)
        names = {name: column or "COLUMN" for name, column in zip(needs, likely, strict=False)}
        if prompt and (completion or len(needs) == 1):
            return f" Say which is which: columns={_as_chat(names) if chat else names}."
        if needs in (PAIR.needs, LABELLED.needs):
            names = _with_guesses(names, columns, first if isinstance(first, Mapping) else {})
    known = (*NAMES, TOKENISED, "labels")
    unknown = (column for column in columns if column not in (*known, prompt, completion))
    nearest = next(filter(None, (near(column.lower(), known, 1, cutoff=_TYPO) for column in unknown)), None)
    typo = f" Did you mean {nearest[0]!r}? Or say" if nearest else " Say"
    example = ": " if "COLUMN" in names.values() else ", e.g. "
    alone = " Prompts alone are for rewards (objective='grpo')." if needs == PAIR.needs and "prompt" in columns else ""
    return f"{typo} what they are called{example}columns={_as_chat(names) if chat else names}.{alone}"


def _as_chat(names: Mapping[str, str]) -> dict[str, str]:
    """A mapping of prompts and completions, in the form to which the chat template is applied."""
    forms = {pair: chat for chat, pair in AS_CHAT.items()}
    return {forms.get(name, name): column for name, column in names.items()}


def _with_guesses(names: Mapping[str, str], columns: Sequence[str], first: Mapping[str, Any]) -> dict[str, str]:
    """The names of columns, with guesses for unknown ones: a similar column, else the longest text, or the last column.

    Args:
        names: name in the form -> column, or ``COLUMN``.
        columns: all columns.
        first: the first row; empty if it is unknown.
    """
    nested = {name for name, value in first.items() if isinstance(value, Mapping | list | tuple)}
    used = nested.union(names.values())
    others = [name for name in columns if name not in used and not _NUMBERING.fullmatch(name.strip())]
    lengths = {name: len(first[name]) for name in others if isinstance(first.get(name), str)}
    if len(columns) == 1 and others and "text" not in names:
        return {"text": others[0]}
    found = dict(names)
    for similar in (True, False):
        for name in names:
            likely = [column for column in others if not similar or near(column.lower(), [name], cutoff=_TYPO)]
            if found[name] == "COLUMN" and likely:
                longest = max(likely, key=lambda column: lengths.get(column, 0))
                found[name] = longest if name == next(iter(names)) else likely[-1]
                others.remove(found[name])
    return found


def _likely_tags(columns: Sequence[str]) -> tuple[str | None, str | None]:
    """The columns that are likely the words and their tags, by their names."""
    words = next((name for name in columns if name.lower() in _WORDS), None)
    tags = [name for name in columns if name.lower() in _TAGS or name.lower().endswith(("_tags", "_labels"))]
    return words, min(tags, key=lambda name: "ner" not in name.lower(), default=None)


def likely_completion(columns: Sequence[str]) -> str | None:
    """Returns the column that likely has the completions, by its name; None if there is none.

    Args:
        columns: the columns of the rows.
    """
    return _likely(columns)[1]


def _likely(columns: Sequence[str]) -> tuple[str | None, str | None]:
    """The columns that are likely the prompt and the completion, by their names or by a word in them."""
    lower = {column.lower(): column for column in columns}

    def find(names: Sequence[str], words: Sequence[str], other: str | None = None) -> str | None:
        exact = [lower[name] for name in names if name in lower]
        words_of = {column: re.findall(r"[^\W_]+", column.lower()) for column in columns}
        inside = [column for word in (*names, *words) for column in columns if word in words_of[column]]
        return next((column for column in (*exact, *inside) if column != other), None)

    prompt = find(("prompt", *_PROMPTS), _PROMPT_WORDS)
    return prompt, find(_COMPLETIONS, _COMPLETION_WORDS, prompt)
