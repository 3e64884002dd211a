"""Seeded faults, and which of them the quick tests notice: ``python -m tests.mutation``.

Faults are drawn with a seed from all that the operators of :mod:`tests.mutation.mutants` find in the rooms of
:data:`tests.mutation.scope.SCOPE`. One process imports everything and collects the tests; for each fault a fork of it
gives the function its changed code (:mod:`tests.mutation.patching`) and runs the tests that reach the line until one
fails. Faults that act when their module is imported run in a fork that imports it with the fault. ``--reach`` measures
which tests reach which line, by statements that leave a mark (:mod:`tests.mutation.marks`); given paths, of these
tests alone, beside what was measured before. Verdicts are stored below ``artifacts/mutation``: a run that was
interrupted goes on where it stopped, and ``--again`` tries those that survived with the tests that are there now.

    python -m tests.mutation --reach
    python -m tests.mutation --number 60 --seed 1
    python -m tests.mutation --only checkpoint/atomic.py --tests tests/checkpoint/test_atomic.py
"""
