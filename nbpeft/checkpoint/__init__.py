"""Checkpoints on disk and on the hub: the only package that knows PEFT's file formats and key names.

Importing it sets the store that ``AdapterConfig.from_pretrained`` and ``save_pretrained`` use.

Files:

    atomic.py          Atomic updates of several files in a folder: either all of them change or none does
    card.py            The model card (README.md) of a saved adapter: YAML front matter for the hub, then Markdown
    config_format.py   Reads and writes ``adapter_config.json`` in PEFT's format
    folder.py          Reads and writes a saved adapter: the config, tensors and model card of one folder
    gguf_file.py       Reads GGUF files, and writes them one tensor at a time, with the package ``gguf``
    hub_token.py       Finds the access token for the hub. The token is passed to ``huggingface_hub`` and to nothing
                       else
    identity.py        Fingerprints of base models, to check that an adapter belongs to a model; computed in
                       milliseconds
    inside.py          Access to files inside a folder without following symbolic links
    k_quants.py        llama.cpp's block formats q4_k, q5_k and q6_k, byte by byte as its own quantizer writes them
    key_conversion.py  Loads adapters that were trained on an earlier version of a model's class in transformers
    lora_file.py       LoRA files of image models: one safetensors file without a config, with keys in one of several
                       formats
    model_files.py     Whole models on disk: reads and writes safetensors shards one tensor at a time
    model_keys.py      Converts keys of a whole model's state dict, which contain the adapter's name, to keys of an
                       adapter's file
    present.py         Detects a different adapter in a target folder or repository, so that it is not overwritten by
                       accident
    prompt_format.py   The format of the rows that an adapter was trained on, so that prompts can use the same format
    source.py          Location of a checkpoint: a local folder or a repository on the hub; downloads and uploads
    staging.py         Staging folders: hidden folders in which files are written before they are renamed into place
    tensor_file.py     Reads and writes files of tensors. Nothing but plain tensors is ever unpickled
    weights_format.py  Converts between the engine's tensors and the keys of PEFT's files
"""

from __future__ import annotations

from nbpeft.checkpoint.atomic import NewFile as NewFile
from nbpeft.checkpoint.atomic import disk_errors as disk_errors
from nbpeft.checkpoint.atomic import in_place_of as in_place_of
from nbpeft.checkpoint.atomic import replace_files as replace_files
from nbpeft.checkpoint.card import CardFacts as CardFacts
from nbpeft.checkpoint.card import card_text as card_text
from nbpeft.checkpoint.config_format import config_text as config_text
from nbpeft.checkpoint.config_format import config_to_save as config_to_save
from nbpeft.checkpoint.config_format import parse_config as parse_config
from nbpeft.checkpoint.folder import Checkpoint as Checkpoint
from nbpeft.checkpoint.folder import FolderStore
from nbpeft.checkpoint.folder import WrittenFiles as WrittenFiles
from nbpeft.checkpoint.folder import read_checkpoint as read_checkpoint
from nbpeft.checkpoint.folder import read_config as read_config
from nbpeft.checkpoint.folder import write_card as write_card
from nbpeft.checkpoint.folder import write_checkpoint as write_checkpoint
from nbpeft.checkpoint.folder import write_checkpoints as write_checkpoints
from nbpeft.checkpoint.folder import write_config as write_config
from nbpeft.checkpoint.gguf_file import GGUF_TYPES as GGUF_TYPES
from nbpeft.checkpoint.gguf_file import GgufTensor as GgufTensor
from nbpeft.checkpoint.gguf_file import file_type as file_type
from nbpeft.checkpoint.gguf_file import gguf_package as gguf_package
from nbpeft.checkpoint.gguf_file import read_gguf as read_gguf
from nbpeft.checkpoint.gguf_file import write_gguf as write_gguf
from nbpeft.checkpoint.hub_token import find_token as find_token
from nbpeft.checkpoint.hub_token import reading_token as reading_token
from nbpeft.checkpoint.identity import Fingerprint as Fingerprint
from nbpeft.checkpoint.identity import compare as compare
from nbpeft.checkpoint.identity import fingerprint as fingerprint
from nbpeft.checkpoint.identity import is_same_base as is_same_base
from nbpeft.checkpoint.inside import expanded as expanded
from nbpeft.checkpoint.inside import shown as shown
from nbpeft.checkpoint.key_conversion import key_conversion_of as key_conversion_of
from nbpeft.checkpoint.lora_file import lora_file as lora_file
from nbpeft.checkpoint.lora_file import read_lora_file as read_lora_file
from nbpeft.checkpoint.lora_file import write_lora_file as write_lora_file
from nbpeft.checkpoint.model_files import ModelFolder as ModelFolder
from nbpeft.checkpoint.model_files import TensorSpec as TensorSpec
from nbpeft.checkpoint.model_files import in_shards as in_shards
from nbpeft.checkpoint.model_files import local_folder as local_folder
from nbpeft.checkpoint.model_files import other_files as other_files
from nbpeft.checkpoint.model_files import write_model as write_model
from nbpeft.checkpoint.model_keys import is_of_a_model as is_of_a_model
from nbpeft.checkpoint.model_keys import keys_of_a_file as keys_of_a_file
from nbpeft.checkpoint.present import other_adapter as other_adapter
from nbpeft.checkpoint.present import other_config as other_config
from nbpeft.checkpoint.prompt_format import PromptFormat as PromptFormat
from nbpeft.checkpoint.prompt_format import common_format as common_format
from nbpeft.checkpoint.prompt_format import name_classes as name_classes
from nbpeft.checkpoint.prompt_format import other_classes as other_classes
from nbpeft.checkpoint.prompt_format import prompt_format as prompt_format
from nbpeft.checkpoint.prompt_format import set_prompt_format as set_prompt_format
from nbpeft.checkpoint.source import CONFIG_NAME as CONFIG_NAME
from nbpeft.checkpoint.source import present_file as present_file
from nbpeft.checkpoint.source import push as push
from nbpeft.checkpoint.staging import scratch_folder as scratch_folder
from nbpeft.checkpoint.tensor_file import UnreadTensors as UnreadTensors
from nbpeft.checkpoint.weights_format import PREFIX as PREFIX
from nbpeft.checkpoint.weights_format import SHARED_PREFIX as SHARED_PREFIX
from nbpeft.checkpoint.weights_format import Expected as Expected
from nbpeft.checkpoint.weights_format import Loaded as Loaded
from nbpeft.checkpoint.weights_format import Places as Places
from nbpeft.checkpoint.weights_format import adapted_paths as adapted_paths
from nbpeft.checkpoint.weights_format import from_file as from_file
from nbpeft.checkpoint.weights_format import remapped as remapped
from nbpeft.checkpoint.weights_format import to_file as to_file
from nbpeft.checkpoint.weights_format import without_prefix as without_prefix
from nbpeft.engine.contract.adapter import AdapterConfig

AdapterConfig.store = FolderStore()
