"""Tokenizes words with a tag each: the first token of a word has the label of its tag, the others have none."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbpeft.errors import TrainingError, in_one_line
from nbpeft.names import IGNORED_LABEL
from nbpeft.training.data.encoding import Encoded

_WITHOUT_SPACES = {"CJK", "IDEOGRAPHIC", "FULLWIDTH", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"}
"""First words in the Unicode names of characters of scripts that put no spaces between words."""


@dataclass(frozen=True)
class TaggedTokens:
    """The tokens of some words.

    Attributes:
        encoded: the tokens, with the label of a word at its first token.
        owners: the index of the word of each token; None for special tokens.
        more: other columns from the tokenizer, such as ``token_type_ids``.
    """

    encoded: Encoded
    owners: tuple[int | None, ...]
    more: Mapping[str, list[int]] = field(default_factory=dict)

    def groups(self, words: int, limit: int) -> Iterator[slice]:
        """The words in groups whose tokens are within a limit; a longer word is a group of its own.

        Args:
            words: number of words.
            limit: greatest number of tokens of a group, with special tokens.
        """
        counts = Counter(self.owners)
        room, start, used = limit - counts[None], 0, 0
        for place in range(words):
            if used and used + counts[place] > room:
                yield slice(start, place)
                start, used = place, 0
            used += counts[place]
        yield slice(start, words)


def space_token(tokenizer: Any) -> int | None:
    """The token of a space, if the tokenizer puts words together without spaces; None if it separates them.

    To a byte-level tokenizer a space is the beginning of the next token. It puts one before each word only if it was
    made with ``add_prefix_space=True``.

    Args:
        tokenizer: a tokenizer of transformers.
    """
    try:
        given = [tokenizer(words, is_split_into_words=True, add_special_tokens=False) for words in (["a", "b"], [" "])]
        together, space = (list(read["input_ids"]) for read in given)
        return space[0] if (tokenizer.decode(together), len(space)) == ("ab", 1) else None
    except (AssertionError, AttributeError, TypeError, ValueError):  # ``encode_words`` says what is wrong with it
        return None


def with_spaces(words: Sequence[str]) -> list[str]:
    """The words as they are in a text: all but the first with a space before them, unless they bring it.

    There is none between two words of Chinese, Japanese, Thai, Lao, Khmer or Burmese.
    """
    spaced, last = [], ""
    for word in words:
        spaced.append(f" {word}" if last and word and not _run_on(last, word[0]) else word)
        last = word[-1:] or last
    return spaced


def _run_on(last: str, first: str) -> bool:
    """Whether no space is added between two characters."""
    spaced = last.isspace() or first.isspace()
    return spaced or all(unicodedata.name(each, "").partition(" ")[0] in _WITHOUT_SPACES for each in (last, first))


def encode_words(
    tokenizer: Any, words: Sequence[str], labels: Sequence[int], limit: int | None = None, *, space: int | None = None
) -> TaggedTokens:
    """Tokenizes words.

    Args:
        tokenizer: a fast tokenizer of transformers.
        words: the words.
        labels: the label of each word.
        limit: number of tokens to which the tokenizer cuts, which keeps special tokens at the end; None to cut nothing.
        space: the token of a space, which gets no label where more of its word follows.

    Raises:
        TrainingError: the tokenizer does not say which word a token belongs to, or refuses words.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TrainingError(
            "tokens and tags need a fast tokenizer, which says to which word each token belongs, not a "
            f"{type(tokenizer).__name__}"
        )
    options = {} if limit is None else {"truncation": True, "max_length": limit}
    try:
        read = tokenizer(list(words), is_split_into_words=True, **options)
    except (AssertionError, TypeError, ValueError) as error:  # such as a tokenizer made without add_prefix_space
        raise TrainingError(f"the tokenizer does not take words: {in_one_line(error)}") from None
    owners = tuple(read.word_ids())
    learned, former = [], None
    for token, owner, following in zip(read["input_ids"], owners, (*owners[1:], None), strict=True):
        if token == space and owner == following:
            learned.append(IGNORED_LABEL)
            continue
        learned.append(IGNORED_LABEL if owner is None or owner == former else labels[owner])
        former = owner
    more = {name: list(values) for name, values in read.items() if name not in ("input_ids", "attention_mask")}
    return TaggedTokens(Encoded(list(read["input_ids"]), learned), owners, more)
