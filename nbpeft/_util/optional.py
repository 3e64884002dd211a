"""Optional dependencies: reports which extra to install if a package is missing.

``pip install nbpeft`` installs what the adapter engine needs; notebooks, training and quantization need more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nbpeft.errors import MissingPackageError, in_one_line

_EXTRAS = {"accelerate": "train", "bitsandbytes": "bnb", "rich": "notebook"}
"""Package -> the extra of nbpeft that includes it; other packages are installed by their own name."""


@contextmanager
def needs(package: str, what: str) -> Iterator[None]:
    """Turns a failed import in the block into one line that says what to install.

        with needs("bitsandbytes", "Quantizing"):
            import bitsandbytes

    Args:
        package: name of the package on PyPI.
        what: the feature that needs it, as the beginning of a sentence.

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
