"""Runs on disk: one folder each, in one place per notebook folder, readable by a person.

    nbpeft_runs/sql-3/
        run.json          what it is, with which settings, and how it stands
        curve.jsonl       what was logged: loss, learning rate, gradient norm, evaluations; a line each
        series.json       further values over time, and metrics
        samples.jsonl     answers while it trained
        checkpoint-60/    the adapter and the state of training after step 60, never the base

Knows neither a Trainer nor a session. A run that its process still writes is locked; one that says it is
running and is not locked ended with its process.

Of a place at most 200 runs and 4 GB stay (``MOST_RUNS``, ``MOST_BYTES``): the oldest go when a run ends, which says so.
The last state of a run whose adapter was not saved elsewhere is never deleted.
"""
