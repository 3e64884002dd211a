"""Checkpoints on disk and on the hub: the only package that knows PEFT's file formats and key names.

Importing it sets the store that ``AdapterConfig.from_pretrained`` and ``save_pretrained`` use.
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
from nbpeft.checkpoint.weights_format import adapted_paths as adapted_paths
from nbpeft.checkpoint.weights_format import from_file as from_file
from nbpeft.checkpoint.weights_format import remapped as remapped
from nbpeft.checkpoint.weights_format import to_file as to_file
from nbpeft.checkpoint.weights_format import without_prefix as without_prefix
from nbpeft.engine.contract.adapter import AdapterConfig

AdapterConfig.store = FolderStore()
