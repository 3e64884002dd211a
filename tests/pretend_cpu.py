"""Lets torch tell of another processor than that of this machine."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace

import pytest
import torch


def pretend_cpu(
    monkeypatch: pytest.MonkeyPatch, *, onednn: Collection[torch.dtype] = (), instructions: Collection[str] = ()
) -> None:
    """A processor for which oneDNN takes products in some dtypes, and with some sets of instructions."""

    def answers(value: bool) -> Callable[[], bool]:
        return lambda: value

    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    asked = {f"_is_mkldnn_{name}_supported": answers(dtype in onednn) for dtype, name in names.items()}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**asked))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for name in ("avx512", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", answers(name in instructions), raising=False)
