"""PEFT's attributes and methods of configs, apart from those that are nbpeft's own, such as ``save_pretrained``."""

from __future__ import annotations

import json
import os
from typing import Any

from nbpeft.engine.contract.adapter import AdapterConfig, store_of
from nbpeft.engine.contract.peft_types import PeftType
from nbpeft.engine.wrappers.extension import add_attributes


class PeftConfigAttributes(AdapterConfig):
    """PEFT's attributes of every config."""

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method learns a prompt."""
        return self.learns_prompt

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method adds attention over learned prompts inside the model."""
        return self.peft_type == PeftType("ADAPTION_PROMPT")

    @classmethod
    def from_peft_type(cls, **fields: Any) -> AdapterConfig:
        """Builds a config of the class that ``peft_type`` names; of this class if there is no ``peft_type``.

        With a ``peft_type``, unknown fields are left out with a warning.
        """
        return store_of(cls).make(fields) if fields.get("peft_type") is not None else cls(**fields)

    @classmethod
    def _get_peft_type(cls, model_id: str, **hf_hub_download_kwargs: Any) -> str:
        """Reads the ``peft_type`` of a saved adapter, which scripts look up in ``PEFT_TYPE_TO_CONFIG_MAPPING``.

        Args:
            model_id: a folder or a hub id.
            **hf_hub_download_kwargs: ``subfolder``, ``revision``, ….
        """
        return str(PeftType(AdapterConfig.from_pretrained(model_id, **hf_hub_download_kwargs).peft_type).value)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """Reads the fields of a config file, unchecked; ``runtime_config`` is left out."""
        with open(path_json_file, encoding="utf-8") as file:
            fields: dict[str, Any] = json.load(file)
        return {name: value for name, value in fields.items() if name != "runtime_config"}

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """A hook before a config is built from keywords; returns them, as the constructor checks them here."""
        return kwargs


add_attributes(AdapterConfig, PeftConfigAttributes)
