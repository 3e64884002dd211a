"""Seeded faults, and which of them the quick tests notice: ``python -m tests.mutation``.

Faults are drawn with a seed from all that the operators of :mod:`tests.mutation.mutants` find in the rooms of `SCOPE`.
Each is imported in a process forked from one that has torch, and the tests that reach its line run there until one
fails. ``--reach`` measures once, with ``coverage``, which tests reach which line (``pip install coverage``); it takes
as long as three runs of the quick tests.

    python -m tests.mutation --reach
    python -m tests.mutation --number 60 --seed 1
    python -m tests.mutation --only checkpoint/atomic.py --tests tests/checkpoint/test_atomic.py
"""
