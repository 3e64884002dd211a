"""Runs the quick tests in the environment of a stack: ``python -m tests.stacks colab [arguments of pytest]``."""

from __future__ import annotations

import sys

from tests.stacks.stack import main

if __name__ == "__main__":
    sys.exit(main())
