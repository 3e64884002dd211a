"""Training runs on disk: one human-readable folder per run, in ``nbpeft_runs`` next to the notebook.

    nbpeft_runs/sql-3/
        run.json          adapter, settings, status and latest loss
        curve.jsonl       one line per log entry: loss, learning rate, gradient norm, evaluations
        series.json       further values over time, and metrics
        samples.jsonl     answers generated during training
        checkpoint-60/    the adapter and the state of training after step 60, never the base model

This package knows neither a Trainer nor a session. A process locks the folder of the run that it writes; a run with
status ``running`` whose folder is not locked has crashed.

When a run ends, old runs are cleaned up: beyond 200 runs (``MOST_RUNS``) the oldest are deleted, and beyond 4 GB
(``MOST_BYTES``) the checkpoints of the oldest are deleted, but not their curves. The run that ends reports it. The last
checkpoint of a run whose adapter was not saved elsewhere is never deleted.

Files:

    folder.py  The folder of one run: reads and writes its files, and locks it
    record.py  The record of a run, read and checked from its folder
    store.py   All runs of one folder: creates, finds, renames and deletes them, and cleans up old ones
"""
