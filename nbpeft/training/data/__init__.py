"""Rows of a notebook become batches: tokenised once, loss only where it belongs.

    {"input_ids", …}              as it is; labels are copied from input_ids where they are missing
    {"text"} or a string          loss on the whole text
    {"prompt", "completion"}      loss on the completion
    {"messages": [...]}           the tokenizer's chat template; loss on the assistant's turns

Prompt and completion may be lists of messages too.
"""

from __future__ import annotations

from nbpeft.training.data.checks import check_rows as check_rows
from nbpeft.training.data.collator import Collator as Collator
from nbpeft.training.data.tokenized import TokenizedRows as TokenizedRows
from nbpeft.training.data.tokenized import columns_of as columns_of
from nbpeft.training.data.tokenized import is_plain as is_plain
from nbpeft.training.data.tokenized import prepare_data as prepare_data
