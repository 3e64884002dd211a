"""``peft.utils.hotswap``: files may lack tensors, which count as zeros as in PEFT, but with a warning."""

from __future__ import annotations

import functools

from nbpeft.model.swapping import hotswap

hotswap_adapter = functools.wraps(hotswap.hotswap_adapter)(
    functools.partial(hotswap.hotswap_adapter, allow_missing=True)
)
hotswap_adapter_from_state_dict = functools.wraps(hotswap.hotswap_adapter_from_state_dict)(
    functools.partial(hotswap.hotswap_adapter_from_state_dict, allow_missing=True)
)
