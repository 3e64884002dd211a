"""Test suites of other projects, run on nbpeft by the name ``peft``: ``python -m tests.suites``."""
