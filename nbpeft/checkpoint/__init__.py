"""Files and the hub: the only place that knows how PEFT spells a saved adapter.

Importing it gives ``AdapterConfig.from_pretrained`` and ``save_pretrained`` their store.
"""

from __future__ import annotations

from nbpeft.checkpoint.atomic import NewFile, disk_errors
from nbpeft.checkpoint.card import card_text
from nbpeft.checkpoint.config_format import condense_targets, config_text, config_to_save, parse_config
from nbpeft.checkpoint.folder import (
    Checkpoint,
    FolderStore,
    WrittenFiles,
    read_checkpoint,
    read_config,
    write_card,
    write_checkpoint,
    write_checkpoints,
    write_config,
)
from nbpeft.checkpoint.hub import push
from nbpeft.checkpoint.identity import Fingerprint, compare, fingerprint
from nbpeft.checkpoint.model_files import ModelFolder, TensorSpec, in_shards, other_files, write_model
from nbpeft.checkpoint.model_keys import is_of_a_model, keys_of_a_file
from nbpeft.checkpoint.renames import renames_of
from nbpeft.checkpoint.staging import scratch_folder
from nbpeft.checkpoint.weights_format import (
    Expected,
    Loaded,
    adapted_paths,
    from_file,
    remapped,
    to_file,
    without_prefix,
)
from nbpeft.engine.adapter import AdapterConfig

__all__ = [
    "Checkpoint",
    "Expected",
    "Fingerprint",
    "Loaded",
    "ModelFolder",
    "NewFile",
    "TensorSpec",
    "WrittenFiles",
    "adapted_paths",
    "card_text",
    "compare",
    "condense_targets",
    "config_text",
    "config_to_save",
    "disk_errors",
    "fingerprint",
    "from_file",
    "in_shards",
    "is_of_a_model",
    "keys_of_a_file",
    "other_files",
    "parse_config",
    "push",
    "read_checkpoint",
    "read_config",
    "remapped",
    "renames_of",
    "scratch_folder",
    "to_file",
    "without_prefix",
    "write_card",
    "write_checkpoint",
    "write_checkpoints",
    "write_config",
    "write_model",
]

AdapterConfig.store = FolderStore()
