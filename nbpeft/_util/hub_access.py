"""Whether the hub answers, found out in about two seconds before anything is asked of it.

huggingface_hub tries again five times, with timeouts of up to a minute, and logs each attempt. That is right for a hub
that stumbles, and wrong for a machine without network: there only the cache is left, and looking there takes no time.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

TIMEOUT = 2.0
"""Seconds to wait for an answer, unless ``HF_HUB_ETAG_TIMEOUT`` says how long."""
_TRUSTED = {True: 60.0, False: 3.0}
"""For how many seconds an answer, and a missing one, are believed."""
_TRUE = ("1", "ON", "YES", "TRUE")

_known: dict[str, tuple[bool, float]] = {}


def hub_options(place: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return ``{"local_files_only": True}`` where a place can only be on the hub, and that cannot be reached.

    Args:
        place: a folder, a file or a hub id.
        options: of the download; ``endpoint`` is another hub, and ``local_files_only`` asks none.
    """
    options = options or {}
    if os.path.exists(os.path.expanduser(place)) or options.get("local_files_only") or _is_offline():
        return {}
    return {} if hub_answers(options.get("endpoint") or _endpoint()) else {"local_files_only": True}


def hub_answers(endpoint: str | None = None) -> bool:
    """Return whether a hub, by default the one that is set up, may be asked and answers anything but that it fails."""
    if endpoint is None:
        return not _is_offline() and hub_answers(_endpoint())
    known = _known.get(endpoint)
    if known is not None and time.monotonic() - known[1] < _TRUSTED[known[0]]:
        return known[0]
    answered: list[bool] = []
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or TIMEOUT)
    # In a thread of its own: no timeout ends the search for a host's address.
    thread = threading.Thread(target=lambda: answered.append(_answers(endpoint, seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    found = bool(answered) and answered[0]
    _known[endpoint] = (found, time.monotonic())
    return found


def _answers(endpoint: str, seconds: float) -> bool:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=seconds):
            return True
    except HTTPError as error:
        return error.code < 500  # a refusal is an answer
    except OSError as error:
        # A certificate that is not known here may be known to huggingface_hub.
        return "certificate" in str(error).lower()
    except Exception:  # not an address, or not HTTP: huggingface_hub says what is wrong with it
        return True


def _is_offline() -> bool:
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        return bool(constants.HF_HUB_OFFLINE)
    return any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _endpoint() -> str:
    constants = sys.modules.get("huggingface_hub.constants")
    default = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return str(getattr(constants, "ENDPOINT", default)).rstrip("/")
