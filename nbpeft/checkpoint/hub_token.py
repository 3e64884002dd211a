"""Where the access token for the hub comes from. It is handed to the hub's client and to nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from nbpeft.errors import CheckpointError

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_SECRET = "HF_TOKEN"


def find_token(given: str | None = None) -> str:
    """The access token: the one given, the hub client's own, or Kaggle's secret.

    The hub's client looks at ``HF_TOKEN``, at what its login stored, and at the secret ``HF_TOKEN`` of Colab.

    Args:
        given: takes precedence.

    Raises:
        CheckpointError: there is none; the message says where to put one.
    """
    from huggingface_hub import get_token

    token = given or get_token() or _from_kaggle()
    if not token:
        raise CheckpointError(
            f"the hub needs an access token with write access ({TOKENS_PAGE}): set {_SECRET} in the environment or as "
            "a secret of Colab or Kaggle, or log in with huggingface_hub.login()"
        )
    return token


def reading_token(given: str | None = None) -> str | None:
    """The token for downloads: the one given, or Kaggle's secret; None leaves it to the hub's client."""
    return given or _from_kaggle()


def _from_kaggle() -> str | None:
    """The secret of a Kaggle notebook; None elsewhere, and where there is none."""
    if "KAGGLE_KERNEL_RUN_TYPE" not in os.environ or importlib.util.find_spec("kaggle_secrets") is None:
        return None
    try:
        client: Any = importlib.import_module("kaggle_secrets").UserSecretsClient()
        return str(client.get_secret(_SECRET) or "") or None
    except Exception:  # its errors differ between versions; without an answer there is no token
        return None
