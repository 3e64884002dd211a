"""Whether a folder holds another adapter than the one to be saved there."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from nbpeft.checkpoint import fingerprint, other_adapter
from tests.tiny_models import adapted, llama


def test_another_name_base_or_shape_is_another_adapter(tmp_path: Path) -> None:
    adapted(name="default").save_pretrained(tmp_path)
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    base = fingerprint(llama())
    assert other_adapter(tmp_path, "default", shapes, base) == ""
    assert other_adapter(tmp_path, "sql", shapes, base) == "another adapter, 'default'"
    assert "of another base model" in other_adapter(tmp_path, "default", shapes, fingerprint(llama(hidden_size=64)))
    key = next(iter(shapes))
    wider, fewer = shapes | {key: (8, 32)}, {name: shape for name, shape in shapes.items() if name != key}
    assert "an adapter with other tensors" in other_adapter(tmp_path, "default", wider, base)
    assert "an adapter with other tensors" in other_adapter(tmp_path, "default", fewer, base)
    assert other_adapter(tmp_path, "default", fewer, base, optional={key}) == ""
