"""All ways in which a folder gets into a process, each undone afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nbpeft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from nbpeft.model import AdapterPool, hotswap_adapter, merge_to_folder
from nbpeft.session.preview import preview_of
from tests.fuzz.starts import base_model

IDS = torch.tensor([[1, 5, 7, 2]])


class Ways:
    """A model with an adapter of its own, and what may be tried on it.

    Args:
        starts: the folders of ``write_starts``.
    """

    def __init__(self, starts: Path) -> None:
        self.starts = starts
        self.model = get_peft_model(base_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        self.bare = base_model()
        self.pool: AdapterPool | None = None

    def state(self) -> list[tuple[str, bool, Tensor]]:
        """Everything in both models that must not change."""
        found = [(f"own {name}", p.requires_grad, p.detach()) for name, p in self.model.named_parameters()]
        found += [(f"bare {name}", p.requires_grad, p.detach()) for name, p in self.bare.named_parameters()]
        return found + [(name, False, buffer) for name, buffer in self.model.named_buffers()]

    def all(self) -> dict[str, Callable[[Path], None]]:
        ways = (
            self.config,
            self.preview,
            self.load,
            self.from_pretrained,
            self.swap,
            self.pooled,
            self.merge,
            self.auto,
        )
        return {way.__name__: way for way in ways}

    def config(self, folder: Path) -> None:
        PeftConfig.from_pretrained(str(folder))

    def preview(self, folder: Path) -> None:
        found = PeftConfig.from_pretrained(str(folder))
        str(preview_of(self.bare, found, name="x", model_name="m", replaces=False, notes=[]))

    def load(self, folder: Path) -> None:
        self.model.load_adapter(str(folder), "new")
        try:
            self.model.set_adapter("new")
            with torch.no_grad():
                self.model(input_ids=IDS)
        finally:
            self.model.set_adapter("default")
            self.model.delete_adapter("new")

    def from_pretrained(self, folder: Path) -> None:
        PeftModel.from_pretrained(self.bare, str(folder)).unload()

    def swap(self, folder: Path) -> None:
        self.model.load_adapter(str(self.starts / "lora"), "slot")
        before = {key: value.clone() for key, value in self.model.state_dict().items()}
        try:
            hotswap_adapter(self.model, str(folder), "slot")
            before = {}
        finally:
            now = self.model.state_dict()
            changed = [key for key, value in before.items() if not torch.equal(value, now[key])]
            self.model.delete_adapter("slot")
            assert not changed, f"a swap that failed changed {changed[:3]}"

    def pooled(self, folder: Path) -> None:
        if self.pool is None:
            self.pool = AdapterPool(self.model, 10, host_limit_mb=0)
        self.pool.register("pooled", str(folder))
        try:
            self.pool.load("pooled")
        finally:
            self.pool.unregister("pooled")

    def merge(self, folder: Path) -> None:
        out = self.starts / "out"
        try:
            merge_to_folder(self.starts / "base", folder, out, measure_errors=False)
        except BaseException:
            assert not out.exists(), "a merge that failed left a folder"
            raise
        shutil.rmtree(out)

    def auto(self, folder: Path) -> None:
        AutoPeftModelForCausalLM.from_pretrained(str(folder))
