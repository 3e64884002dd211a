"""The tests with other versions of the packages: ``python3 tests/run.py --stack lowest | colab | newest``.

    lowest    the lower bounds in pyproject.toml
    colab     what Google Colab has, in colab-2026-08.txt
    newest    what the package index gives, pre-releases included

Each has an environment of its own in ``artifacts/stacks``, made once for a list of packages. torch is linked from the
environment that runs this, and so is what torch needs: other versions come with several gigabytes of CUDA.
"""
