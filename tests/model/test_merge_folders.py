"""An adapter of any method merged from folder to folder, without the model in memory, as it is merged in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nbpeft import PeftModel
from nbpeft.errors import MergeError, NbpeftError
from nbpeft.model import merge_to_folder
from tests.closeness import assert_close
from tests.fuzz.starts import METHODS, base_model, write_method_starts


def moved(folder: Path) -> Any:
    """The adapter of a folder on its base, away from its start, saved there again."""
    model = PeftModel.from_pretrained(base_model(), folder, is_trainable=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder)
    return model


@pytest.mark.drawn(12)
@pytest.mark.parametrize("label", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_every_method_is_merged_from_folder_to_folder(label: str, tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    (tmp_path / "starts").mkdir()
    folders = write_method_starts(tmp_path / "starts", label)
    assert folders
    for folder in folders:
        out = tmp_path / "out" / folder.name
        try:
            wanted: nn.Module = moved(folder).merge_and_unload()
        except NbpeftError:
            with pytest.raises(NbpeftError):
                merge_to_folder(tmp_path / "base", folder, out)
            continue
        try:
            merge_to_folder(tmp_path / "base", folder, out)
        except MergeError as refusal:
            assert "changed its base weights" in str(refusal)
            continue
        found = AutoModelForCausalLM.from_pretrained(out)
        for (name, value), (_, other) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
            assert_close(other, value, message=name)
