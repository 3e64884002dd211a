"""Turns rows into batches: reads them from any source, tokenizes them once, and puts labels on the tokens to train on.

    {"input_ids", …}                      as it is; missing labels are copied from input_ids; completion_mask and
                                          assistant_masks select the labels that count
    {"text"} or a string                  loss on the whole text
    {"prompt", "completion"} or a pair    loss on the completion
    {"messages": [...]}                   the tokenizer's chat template; loss on the assistant's turns
    {"conversations": [...]}              the same in ShareGPT's form: from and value instead of role and content
    {"instruction", "input", "output"}    Alpaca: the chat template, or Alpaca's own text if there is no template
    {"prompt"}                            the model in training completes it; other columns are for reward functions
    {"text", "label"}                     for a classifier, with ``text_pair`` for a second text

Prompt and completion may be lists of messages too. ``columns`` maps other names to these. A ``weight`` of a row, or of
a turn of the assistant, is a factor on its loss; with 0 it is not trained on. ``chat_template_kwargs`` of a row are
variables for the chat template. Rows without any label that counts are left out. Any other content of a row is an error
or is named in the notes of the training; none is ignored silently.

Files:

    answers.py       The distinct answers or labels of rows, where they are few, and those that look like mistakes
    chats.py         Renders chats as text with the assistant's turns marked, and finds the parts that a chat template
                     does not print
    checks.py        Checks that rows fit a model, before a training step fails on them with an error that names no row
    classes.py       The classes of a classifier of texts or tokens, and the conversion of a row's label to one of them
    collator.py      Collates rows into batches
    encoding.py      Tokenized rows, and the encoding of text with marked spans as token ids and labels
    files.py         Reads rows from a file: JSON Lines, JSON, CSV and TSV with the standard library, Parquet with
                     pyarrow
    forms.py         The forms of rows, recognized by their columns, and the example that each row gives
    hub.py           Loads datasets from the Hub and from folders with the ``datasets`` library
    left_out.py      Rows that cannot be read, and parts of rows that are not trained on: counted by reason, and
                     reported
    lengths.py       The lengths of rows, and a sampling order in which the rows of a batch have about the same length
    mixed.py         Draws the rows of a mixture
    options.py       How rows are read: which turns of a chat are learned, and what happens to reasoning and to long
                     rows
    packing.py       Packs several rows into one sequence, so that no tokens are spent on padding
    prompt_formats.py  How the rows of a training are written: with the chat template or without, and with which system
                     prompts
    reading.py       How the rows of some data are read: their form, their columns, and what their labels mean
    row.py           One row of data, read by the names of its form; errors name the row's number
    row_coder.py     Tokenizes a row of any form: text, chats, pairs, comparisons, classes and tags, or tokens as they
                     are
    sources.py       The sources of rows: lists, datasets, streams, tables, files and datasets on the Hub
    split.py         Splits evaluation rows off the training rows, and counts those that are on both sides
    summary.py       Rows as a model reads them, and the lengths of all rows
    tags.py          Tokenizes words with a tag each: the first token of a word has the label of its tag, the others
                     have none
    tokenized.py     Tokenizes rows of any form: all at once, or one by one as a stream yields them
"""

from __future__ import annotations

from nbpeft._util.mixtures import Mixture as Mixture
from nbpeft._util.mixtures import mixture as mixture
from nbpeft.training.data.checks import check_rows as check_rows
from nbpeft.training.data.collator import Collator as Collator
from nbpeft.training.data.packing import PackedCollator as PackedCollator
from nbpeft.training.data.packing import PackedRows as PackedRows
from nbpeft.training.data.packing import joined as joined
from nbpeft.training.data.reading import ModelInputs as ModelInputs
from nbpeft.training.data.reading import columns_of as columns_of
from nbpeft.training.data.reading import is_plain as is_plain
from nbpeft.training.data.sources import is_stream as is_stream
from nbpeft.training.data.sources import open_data as open_data
from nbpeft.training.data.sources import separator_for as separator_for
from nbpeft.training.data.split import HeldOut as HeldOut
from nbpeft.training.data.split import grouping as grouping
from nbpeft.training.data.split import groups_of as groups_of
from nbpeft.training.data.split import hold_out as hold_out
from nbpeft.training.data.split import is_amount as is_amount
from nbpeft.training.data.split import leaked as leaked
from nbpeft.training.data.split import learned_prompts as learned_prompts
from nbpeft.training.data.summary import DataSummary as DataSummary
from nbpeft.training.data.summary import summarize as summarize
from nbpeft.training.data.tokenized import PreparedRows as PreparedRows
from nbpeft.training.data.tokenized import StreamedRows as StreamedRows
from nbpeft.training.data.tokenized import TokenizedRows as TokenizedRows
from nbpeft.training.data.tokenized import prepare_data as prepare_data
from nbpeft.training.data.tokenized import prepared as prepared
