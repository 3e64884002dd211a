"""Runs on disk: one folder each, in one place per notebook folder, readable by a person.

    nbpeft_runs/sql-3/
        run.json          what it is, with which settings, and how it stands
        curve.jsonl       what was logged: loss, learning rate, gradient norm, evaluations; a line each
        series.json       further values over time, and metrics
        samples.jsonl     answers while it trained
        checkpoint-60/    the adapter and the state of training after step 60, never the base

Knows neither a Trainer nor a session. A run that its process still writes is locked; one that says it is
running and is not locked ended with its process.

When a run ends, the oldest runs beyond 200 (``MOST_RUNS``) are deleted, and beyond 4 GB (``MOST_BYTES``) old runs lose
their states and keep their curves; the run that ends says so. The last state of a run whose adapter was not saved
elsewhere is never deleted.
"""
