"""Checks in about two seconds whether the hub can be reached, before anything is requested from it.

huggingface_hub retries five times, with timeouts of up to a minute, and logs each attempt. That is right for a hub with
temporary problems, but wrong for a machine without network, where only the cache can be used.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

TIMEOUT = 2.0
"""Seconds to wait for a response, unless ``HF_HUB_ETAG_TIMEOUT`` is set."""
_TRUSTED = {True: 60.0, False: 3.0}
"""Seconds for which a positive and a negative result are cached."""
_TRUE = ("1", "ON", "YES", "TRUE")

_known: dict[str, tuple[bool, float]] = {}


def hub_options(place: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return ``{"local_files_only": True}`` for a source on the hub if the hub cannot be reached; else no options.

    Args:
        place: a folder, a file or a hub id.
        options: download options; ``endpoint`` selects another hub, and with ``local_files_only`` no hub is asked.
    """
    options = options or {}
    if os.path.exists(os.path.expanduser(place)) or options.get("local_files_only") or _is_offline():
        return {}
    return {} if hub_answers(options.get("endpoint") or _endpoint()) else {"local_files_only": True}


def config_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return what ``AutoConfig.from_pretrained`` raises for a config that is missing or has a value of a wrong type.

    Args:
        others: exceptions to return together with them.
    """
    # Where it was not imported, it cannot have been raised: this is called when an exception is there already.
    strict = getattr(sys.modules.get("huggingface_hub.errors"), "StrictDataclassError", None)
    return OSError, ValueError, ImportError, *([] if strict is None else [strict]), *others


def hub_answers(endpoint: str | None = None) -> bool:
    """Return whether the hub is not switched off and responds with anything but a server error.

    Args:
        endpoint: URL of the hub; None for the configured one.
    """
    if endpoint is None:
        return not _is_offline() and hub_answers(_endpoint())
    known = _known.get(endpoint)
    if known is not None and time.monotonic() - known[1] < _TRUSTED[known[0]]:
        return known[0]
    answered: list[bool] = []
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or TIMEOUT)
    # In a separate thread, because the timeout of urlopen does not apply to the DNS lookup.
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
        return error.code < 500  # a client error shows that the hub works
    except OSError as error:
        # huggingface_hub may accept a certificate that urllib does not know.
        return "certificate" in str(error).lower()
    except Exception:  # not a URL, or not HTTP: huggingface_hub reports what is wrong with it
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
