"""``peft.import_utils``: which packages are installed, and the version of transformers."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import torch
from packaging.version import Version

_transformers = Version(version("transformers"))
is_transformers_le_4_53 = _transformers < Version("4.54.0.dev0")
is_transformers_ge_v5 = _transformers >= Version("5.0.0.dev0")
is_transformers_ge_v5_1_0 = _transformers >= Version("5.1.0")
is_transformers_ge_v5_4_0 = _transformers >= Version("5.4.0")
is_transformers_ge_v5_6_0 = _transformers >= Version("5.6.0.dev0")
is_transformers_ge_v5_13_0 = _transformers >= Version("5.13.0.dev0")
is_transformers_ge_v5_17_0 = _transformers >= Version("5.17.0")


def is_aqlm_available() -> bool:
    """Whether aqlm is installed."""
    return find_spec("aqlm") is not None


def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes is installed; every version that nbpeft supports has 4-bit layers."""
    return is_bnb_available()


def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return find_spec("diffusers") is not None


def is_eetq_available() -> bool:
    """Whether eetq is installed."""
    return find_spec("eetq") is not None


def is_gptqmodel_available() -> bool:
    """Whether gptqmodel is installed."""
    return find_spec("gptqmodel") is not None


def is_hqq_available() -> bool:
    """Whether hqq is installed."""
    return find_spec("hqq") is not None


def is_inc_available() -> bool:
    """Whether neural_compressor is installed."""
    return find_spec("neural_compressor") is not None


def is_optimum_available() -> bool:
    """Whether optimum is installed."""
    return find_spec("optimum") is not None


def is_te_available() -> bool:
    """Whether transformer_engine is installed."""
    return find_spec("transformer_engine") is not None


def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is installed.

    Args:
        check_device: accepted for compatibility with PEFT and ignored.
    """
    return find_spec("torch_xla") is not None


def is_torchao_available() -> bool:
    """Whether torchao is installed."""
    return find_spec("torchao") is not None


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch sees an Intel GPU.

    Args:
        check_device: accepted for compatibility with PEFT and ignored; torch always checks the device.
    """
    return torch.xpu.is_available()


def is_torchao_ge_v0_18_0() -> bool:
    """Whether torchao 0.18 or newer is installed."""
    return is_torchao_available() and Version(version("torchao")) >= Version("0.18.0")


def is_te_pytorch_available() -> bool:
    """Whether transformer_engine is installed with its part for torch."""
    return is_te_available() and find_spec("transformer_engine.pytorch") is not None
