"""Which adapter a folder has."""

from __future__ import annotations

from pathlib import Path

from nbpeft.model.saving.saved_places import owner_of
from tests.tiny_models import adapted, config


def test_a_folder_has_the_adapter_that_was_saved_to_it(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", config())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    owners = [owner_of(model.manager, name, tmp_path) for name in ("default", "other")]
    assert owners == ["", "default"]
    assert owner_of(model.manager, "default", tmp_path / "elsewhere") is None
    (tmp_path / "adapter_model.safetensors").write_bytes(b"another file")
    assert owner_of(model.manager, "default", tmp_path) is None
