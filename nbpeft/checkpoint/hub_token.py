"""Finds the access token for the hub. The token is passed to ``huggingface_hub`` and to nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from nbpeft.errors import CheckpointError

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_SECRET = "HF_TOKEN"


def find_token(given: str | None = None) -> str:
    """Returns the access token for uploads.

    Without ``given``, ``huggingface_hub`` is asked, which uses the variable ``HF_TOKEN``, the stored login or Colab's
    secret ``HF_TOKEN``; then Kaggle's secret ``HF_TOKEN`` is used.

    Args:
        given: a token that takes precedence.

    Raises:
        CheckpointError: there is no token; the message says where to set one.
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
    """Returns the token for downloads: the given one, else Kaggle's secret; None lets ``huggingface_hub`` decide."""
    return given or _from_kaggle()


def _from_kaggle() -> str | None:
    """Returns the secret of a Kaggle notebook; None outside Kaggle or if it is not set."""
    if "KAGGLE_KERNEL_RUN_TYPE" not in os.environ or importlib.util.find_spec("kaggle_secrets") is None:
        return None
    try:
        client: Any = importlib.import_module("kaggle_secrets").UserSecretsClient()
        return str(client.get_secret(_SECRET) or "") or None
    except Exception:  # the client's error classes differ between versions; any error means that there is no token
        return None
