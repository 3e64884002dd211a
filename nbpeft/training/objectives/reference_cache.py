"""Log-probabilities of the reference that were computed before: those of a row are the same in each epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nbpeft.checkpoint import fingerprint, inside
from nbpeft.checkpoint.tensor_file import write_tensors
from nbpeft.engine.kernels.numerics import bytes_of
from nbpeft.engine.runtime.manager import require_manager
from nbpeft.errors import CheckpointError
from nbpeft.model.saving.sharded import is_sharded
from nbpeft.training.adapters.method_state import read_state

_FILE = "reference_log_probs.safetensors"
_DIGESTS, _VALUES = "digests", "log_probs"
_DIGEST_SIZE = 16


class KnownLogProbs:
    """Log-probabilities of sequences by a digest of their tokens.

    A checkpoint contains them: a row computed in another batch may be rounded differently.
    """

    def __init__(self) -> None:
        self._values: dict[bytes, float] = {}
        self._dtype = torch.float32

    def of(self, digests: Sequence[bytes]) -> Tensor | None:
        """The log-probabilities of the sequences of a batch, (rows,), on the CPU; None unless all are known.

        Args:
            digests: those of the sequences.
        """
        if not all(digest in self._values for digest in digests):
            return None
        return torch.tensor([self._values[digest] for digest in digests], dtype=self._dtype)

    def add(self, pairs: Iterable[tuple[bytes, float]], dtype: torch.dtype) -> None:
        """Keeps log-probabilities.

        Args:
            pairs: (digest of a sequence, its log-probability).
            dtype: the dtype in which they were computed.
        """
        self._values.update(pairs)
        self._dtype = dtype

    def write(self, folder: Path, model: nn.Module) -> None:
        """Writes them into a checkpoint, with the fingerprint of the base model.

        Args:
            folder: the folder of the checkpoint.
            model: the model in training.
        """
        if self._values:
            digests = torch.frombuffer(bytearray(b"".join(self._values)), dtype=torch.uint8)
            values = torch.tensor([*self._values.values()], dtype=self._dtype)
            write_tensors(folder / _FILE, {_DIGESTS: digests.view(-1, _DIGEST_SIZE), _VALUES: values}, _base_of(model))

    def read(self, folder: Path, model: nn.Module) -> None:
        """Restores those of a checkpoint, if it has some and was written with this base model.

        Args:
            folder: the folder of the checkpoint.
            model: the model in training.

        Raises:
            CheckpointError: the file is damaged.
        """
        self._values = {}
        file = folder / _FILE
        if not inside.leads_to_file(file):
            return
        tensors, metadata = read_state(file, model)
        if any(metadata.get(name) != value for name, value in _base_of(model).items()):
            return
        digests, values = tensors.get(_DIGESTS, torch.empty(0)), tensors.get(_VALUES, torch.empty(0))
        count = values.shape[0] if values.dim() == 1 and values.is_floating_point() else -1
        if digests.dtype != torch.uint8 or digests.shape != (count, _DIGEST_SIZE):
            raise CheckpointError(f"{file} does not have a log-probability for each digest of a sequence")
        self.add(zip((row.numpy().tobytes() for row in digests), values.tolist(), strict=True), values.dtype)


def _base_of(model: nn.Module) -> dict[str, str]:
    """The fingerprint of a base model, as metadata; empty if its weights are sharded."""
    return {} if is_sharded(model) else fingerprint(require_manager(model).model).to_metadata()


def digests_of(batch: Mapping[str, Tensor], owner: str = "") -> list[bytes]:
    """A digest of each sequence of a batch, without its padding.

    All tensors count: adapters may take others than tokens, such as ``task_ids``.

    Args:
        batch: ``input_ids``, ``attention_mask``, ``labels`` etc., each of shape (rows, …).
        owner: the adapter to which the rows belong, if several have rows of their own.
    """
    columns = {name: batch[name].cpu() for name in sorted(batch)}
    found = []
    for row, kept in enumerate(columns["attention_mask"].bool()):
        digest = hashlib.blake2b(owner.encode(), digest_size=_DIGEST_SIZE)
        for name, values in columns.items():
            part = values[row][kept] if values[row].shape[:1] == kept.shape else values[row]
            digest.update(f"\0{name} {part.dtype} {tuple(part.shape)}\0".encode() + bytes_of(part))
        found.append(digest.digest())
    return found
