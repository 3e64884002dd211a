"""Many trainings at once: adapters that learn side by side over one frozen base, each as if it trained alone.

run_training ── side_by_side ──> adapters.py   makes the adapters, chooses the best, undoes
    └── SideBySide, in members.py              the adapters and how each does
        ├── SweepEvaluations, evaluations.py   early stopping of each, and its curves in a resumed run
        ├── OwnRows, in rows.py                rows of their own, with the batches of a training alone
        └── SideBySideTrainer, in trainer.py   rows, loss, clipping, schedule and evaluation of each
            └── SplitLoss, in loss.py          the loss of a mixed batch, member by member
"""
