"""Scores of a base model and its adapters on rows with references, item by item.

Nothing of the model changes: its adapters stay as active as they are, and its modules in their modes.

Door, what other rooms import:

    in_training.py  Scores of a model in training: the same rows, answered by its adapters
    result.py       The result: scores with intervals, the items, paired tests, and how it is shown
    rows.py         Rows as they are scored: the prompt, the reference, and what a metric needs in addition
    score.py        ``score(model, rows)``: rows are read, answered and compared with their references
    settings.py     What is scored, and how: the columns, the batches, and how tokens are chosen

Inside:

    answers.py      Answers to the rows: base and adapters in mixed batches, sorted by length
    folders.py      Adapters in folders: a few of them are on the model at a time, by way of an adapter pool
    items.py        The parts of a result: scores with intervals, items, and what two columns differ in
    likelihoods.py  Losses, choices by likelihood, and classes, in mixed batches without generation
    metrics.py      The metrics, by name or as functions, and what each of them needs
    statistics.py   Intervals and paired tests: Wilson, t, bootstrap, McNemar, permutations
"""
