"""Packages that only a part of nbpeft needs: what is missing without one, and the extra that brings it.

``pip install nbpeft`` brings what the adapter engine needs; notebooks, trainings and quantizing take more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nbpeft.errors import MissingPackageError, in_one_line

_EXTRAS = {"accelerate": "train", "bitsandbytes": "bnb", "rich": "notebook"}
"""Package -> the extra of nbpeft that is made for what needs it; others are installed by their own name."""


@contextmanager
def needs(package: str, what: str) -> Iterator[None]:
    """Says in one line what to install where an import in the block fails.

        with needs("bitsandbytes", "Quantizing"):
            import bitsandbytes

    Args:
        package: its name on PyPI.
        what: what it is needed for, the beginning of a sentence.

    Raises:
        MissingPackageError: an import failed: the package is not installed, or it is broken.
    """
    try:
        yield
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError)
        reason = "" if absent else f" ({in_one_line(error):.200})"
        wanted = f"'nbpeft[{_EXTRAS[package]}]'" if package in _EXTRAS else package
        message = f"{what} needs {package}{reason}: pip install {wanted}"
        raise MissingPackageError(message, package=package) from None
