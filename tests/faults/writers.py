"""Everything that writes files, each as: write a first state, write the second, tell which is there."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM, TrainingArguments

from nbpeft.checkpoint import read_checkpoint
from nbpeft.errors import CheckpointError
from nbpeft.model import LoraConfig, PeftModel, get_peft_model, merge_to_folder
from nbpeft.model.saving.files import write_card
from nbpeft.shipping import ship
from nbpeft.shipping.formats import GGUF_MODEL
from nbpeft.training import Collator, Trainer, export_script
from nbpeft.training.disk.checkpoints import flaw_of
from tests.closeness import is_close
from tests.shipping import support
from tests.tiny_models import llama
from tests.training.support import token_rows

OLD, NEW = 2, 3
"""Ranks of the adapters that are written, by which the two states are told apart."""
NAMES = ("default", "sql", "chat")
LITTER = ".nbpeft-*"


@dataclass(frozen=True)
class Writer:
    """One way to write.

    Attributes:
        write: writes a state (``OLD`` or ``NEW``) into a folder.
        found: which states a folder holds, each found to be whole; empty where there is nothing.
        begin: whether the first state is there before.
    """

    write: Callable[[Path, int], object]
    found: Callable[[Path], set[int]]
    begin: bool = True


def litter(folder: Path) -> list[Path]:
    return [*folder.parent.glob(LITTER), *folder.rglob(LITTER)]


class Models:
    """What the writers write, made once: a fork finds it ready."""

    def __init__(self, home: Path) -> None:
        torch.set_num_threads(1)
        llama().save_pretrained(home / "base")
        self.base = home / "base"
        self.one = {rank: self._adapted(rank, NAMES[:1]) for rank in (OLD, NEW)}
        self.several = {rank: self._adapted(rank, NAMES) for rank in (OLD, NEW)}
        self.merged = {name: value.clone() for name, value in self._merged().items()}
        self._home = home
        self.trainers: dict[str, Any] = {}

    def _adapted(self, rank: int, names: tuple[str, ...]) -> PeftModel:
        base = LlamaForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]), names[0])
        for name in names[1:]:
            model.add_adapter(name, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for key, part in model.named_parameters():
                if "lora_" in key:
                    part.fill_(rank / 100)
        return model

    @cached_property
    def ggufs(self) -> dict[int, bytes]:
        """The content of the GGUF file that is written in each state."""
        self.tokenizer = support.tokenizer()
        self.shipped = {rank: support.adapted(r=rank) for rank in (OLD, NEW)}
        for rank in self.shipped:
            self.ship(self._home / str(rank) / "target", rank)
        return {rank: (self._home / str(rank) / "target" / GGUF_MODEL).read_bytes() for rank in self.shipped}

    def ship(self, folder: Path, rank: int) -> None:
        """Writes a merged model with its tokenizer as a GGUF file."""
        options: dict[str, Any] = {"engine": "llama.cpp", "merged": True, "tokenizer": self.tokenizer}
        ship(self.shipped[rank], to=folder, replace=True, **options)

    def shipped_in(self, folder: Path) -> set[int]:
        """The state of the GGUF file in a folder."""
        if not folder.exists():
            return set()
        (file,) = folder.iterdir()
        found = {rank for rank, content in self.ggufs.items() if file.read_bytes() == content}
        assert file.name == GGUF_MODEL and len(found) == 1, f"{file.name} is torn"
        return found

    def _merged(self) -> dict[str, torch.Tensor]:
        return self._adapted(NEW, NAMES[:1]).merge_and_unload().state_dict()

    def trainer(self, folder: Path, step: int, cls: type[Any] = Trainer) -> Any:
        """A Trainer that has come to a step, without having trained: a fork must not meet autograd's threads."""
        key = f"{folder} {cls.__name__}"
        if key not in self.trainers:
            settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_total_limit": 2}
            arguments = TrainingArguments(str(folder), max_steps=9, dataloader_pin_memory=False, **settings)
            rows, collator = token_rows(8), Collator(copy_labels=True)
            model = self._adapted(OLD, NAMES[:1])
            trainer = cls(model=model, args=arguments, train_dataset=rows, data_collator=collator)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.create_optimizer_and_scheduler(num_training_steps=9)
            self.trainers[key] = trainer
        trainer = self.trainers[key]
        trainer.state.global_step = step
        with torch.no_grad():
            for name, part in trainer.model.named_parameters():
                if "lora_" in name:
                    part.fill_(step / 100)
        return trainer


def rank_in(folder: Path) -> set[int]:
    """The rank that config, shapes and values of an adapter agree on."""
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        return set()
    saved = read_checkpoint(folder)
    ranks = {saved.config.r}
    for key, tensor in saved.tensors.items():
        ranks |= {tensor.shape[0 if "lora_A" in key else 1], round(float(tensor.min()) * 100)}
        assert bool((tensor == tensor.flatten()[0]).all())
    assert len(ranks) == 1, f"{folder.name} is torn: {ranks}"
    return ranks


def ranks_in(folder: Path) -> set[int]:
    return set().union(*(rank_in(folder if name == "default" else folder / name) for name in NAMES))


def card_in(folder: Path) -> set[int]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n") and text.endswith("Trained with care.\n")
    ranks = {rank for rank in (OLD, NEW) if f"| `r` | `{rank}` |" in text}
    assert len(ranks) == 1
    return ranks


def script_in(folder: Path) -> set[int]:
    """The state that a script, its arguments and its rows agree on."""
    script = folder / "train.py"
    if not script.exists():
        return set()
    body = ast.parse(script.read_text(encoding="utf-8")).body
    values = {node.targets[0].id: node.value for node in body if isinstance(node, ast.Assign)}
    found = {name: ast.literal_eval(value) for name, value in values.items() if name != "HERE"}
    rows = [json.loads(line) for line in (folder / found["DATA"]).read_text(encoding="utf-8").splitlines()]
    assert {found["CONFIG"]["r"], found["ARGUMENTS"]["max_steps"], len(rows)} == {found["CONFIG"]["r"]}
    return {found["CONFIG"]["r"]}


def checkpoints_in(folder: Path) -> set[int]:
    steps = {int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")}
    for step in steps:
        place = folder / f"checkpoint-{step}"
        assert flaw_of(place) is None, f"{place.name}: {flaw_of(place)}"
        assert json.loads((place / "trainer_state.json").read_text())["global_step"] == step
        values = {round(float(t.mean()) * 100) for t in read_checkpoint(place).tensors.values()}
        assert values == {step}
        torch.load(place / "optimizer.pt", weights_only=True)
    return steps


def writers(models: Models) -> dict[str, Writer]:
    def merged_in(folder: Path) -> set[int]:
        try:
            found = LlamaForCausalLM.from_pretrained(folder).state_dict()
        except (OSError, ValueError):
            return set()
        assert all(is_close(value, models.merged[name]) for name, value in found.items())
        return {NEW}

    def merge(folder: Path, rank: int, **options: Any) -> None:
        if rank == OLD:
            folder.mkdir()
            (folder / "notes.txt").write_text("mine")
            return
        try:
            merge_to_folder(models.one[rank], None, folder, measure_errors=False, **options)
        except CheckpointError as error:
            if "already contains weights" not in str(error) or not merged_in(folder):
                raise

    def card(folder: Path, rank: int) -> None:
        if rank == OLD:
            write_card(models.one[OLD].manager, folder)
            text = (folder / "README.md").read_text()
            (folder / "README.md").write_text(text + "Trained with care.\n")
            return
        write_card(models.several[rank].manager, folder)

    def export(folder: Path, rank: int) -> None:
        export_script(models.one[rank], folder / "train.py", token_rows(rank), token_rows(4), max_steps=rank)

    def checkpoint_of(cls: type[Any]) -> Callable[[Path, int], None]:
        def checkpoint(folder: Path, step: int) -> None:
            trainer = models.trainer(folder, step, cls)
            trainer._save_checkpoint(trainer.model, trial=None)

        return checkpoint

    return {
        "save one": Writer(lambda folder, rank: models.one[rank].save_pretrained(folder), rank_in),
        "save one anew": Writer(lambda folder, rank: models.one[rank].save_pretrained(folder), rank_in, begin=False),
        "save several": Writer(lambda folder, rank: models.several[rank].save_pretrained(folder), ranks_in),
        "card": Writer(card, card_in),
        "merge": Writer(merge, merged_in, begin=False),
        "merge into shards": Writer(
            lambda folder, rank: merge(folder, rank, max_shard_bytes=20_000), merged_in, begin=False
        ),
        "merge beside other files": Writer(lambda folder, rank: merge(folder, rank, max_shard_bytes=20_000), merged_in),
        "export": Writer(export, script_in),
        "ship": Writer(lambda folder, rank: models.ggufs and models.ship(folder, rank), models.shipped_in),
        "checkpoint": Writer(checkpoint_of(Trainer), checkpoints_in),
        "checkpoint of transformers' Trainer": Writer(checkpoint_of(transformers.Trainer), checkpoints_in),
    }
